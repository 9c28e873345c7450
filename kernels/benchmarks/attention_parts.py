"""Each Triton kernel of KSA attention alone, and the sweep of candidate tiles behind tiles.json."""

import statistics
import time

import torch
import triton

from megatron_ksa.kernels.benchmarks.candidates import candidates
from megatron_ksa.kernels.benchmarks.check import TOLERANCE, ratio
from megatron_ksa.kernels.benchmarks.measure import milliseconds
from megatron_ksa.kernels.benchmarks.registry import Case, Op, Shape
from megatron_ksa.kernels.ksa_attention.operands import (
    Gradients,
    OutputGradients,
    Rows,
    Sizes,
    SummaryBackward,
    SummaryForward,
    TextOutputs,
)
from megatron_ksa.kernels.ksa_attention.tile_store import KERNELS
from megatron_ksa.kernels.ksa_attention.triton_config import Tile, Tiles, tiles_for
from megatron_ksa.kernels.ksa_attention.triton_summary import launch_summary_backward, launch_summary_forward
from megatron_ksa.kernels.ksa_attention.triton_text_backward import launch_dkv, launch_dq
from megatron_ksa.kernels.ksa_attention.triton_text_forward import launch_forward
from megatron_ksa.kernels.ksa_attention.workspace import Workspace, new_dealt, new_workspace

# A candidate is timed for 25 ms in each of four rounds; every round reverses the order of the round before. After the
# first round, candidates that took over 1.25 times as long as the fastest are timed no more.
ROUND_MS, LATER_ROUNDS, HOPELESS = 25, (-1, 1, -1), 1.25


class Kernels:
    """Each kernel alone at one shape, on inputs made once.

    Kernels with the stored tiles serve the summary queries too where they can; with tiles that are tried, none does.
    """

    def __init__(self, shape: Shape, device: str) -> None:
        self.device = device
        self.sizes = Sizes(shape.chunk_size, shape.summary_tokens, shape.window_chunks, 0, 0, 0, shape.head_dim**-0.5)
        q, k, v = (shape.random(shape.rows, count, device).detach() for count in (shape.heads, *[shape.groups] * 2))
        lse = torch.empty(shape.batch, shape.heads, shape.n, device=device)
        # Text rows and summary rows of each tensor.
        q, k, v, out, d_out, dq, dk, dv = (
            rows.split([shape.n, shape.summary_rows], dim=1)
            for rows in (q, k, v, torch.empty_like(q), torch.randn_like(q), *(torch.empty_like(t) for t in (q, k, v)))
        )
        self.rows = Rows(q[0], k[0], v[0], k[1], v[1], None)
        self.outputs, self.d_outputs = TextOutputs(out[0], lse), OutputGradients(d_out[0], None)
        self.gradients = Gradients(dq[0], dk[0], dv[0], dk[1], dv[1])
        self.forward_summary = SummaryForward(q[1], out[1])
        self.backward_summary = SummaryBackward(q[1], d_out[1], dq[1])
        self.default = tiles_for(q[0], shape.groups, shape.geometry)
        self.serve_summaries = self.default.serve_summaries(shape.chunk_size, shape.summary_tokens)
        # Statistics are written by dQ and read by dK/dV.
        self.statistics = self._workspace(self.default)
        self.results = {
            "forward": [out[0]], "dq": [dq[0]], "dkv_text": [dk[0], dv[0]], "dkv_summary": [dk[1], dv[1]],
            "summary_forward": [out[1]], "summary_backward": [dq[1]],
        }  # fmt: skip
        for name in self.results:
            self.launch(name)

    def _workspace(self, tiles: Tiles) -> Workspace:
        rows = self.rows
        return new_workspace(rows.q, rows.k, rows.k_summary, None, self.outputs.lse, tiles, self.serve_summaries)

    def launch(self, name: str, tile: Tile | None = None) -> None:
        """Run a kernel; those with tiles take other ones than the stored."""
        rows, sizes = self.rows, self.sizes
        if name == "summary_forward":
            return launch_summary_forward(rows._replace(q=self.forward_summary.q), sizes, self.forward_summary.out)
        if name == "summary_backward":
            summary = self.backward_summary
            gradients = self.gradients._replace(dq=summary.dq)
            return launch_summary_backward(rows._replace(q=summary.q), sizes, summary.d_out, gradients, accumulate=True)
        with_summaries = self.serve_summaries and tile is None
        tiles = self.default if tile is None else self.default._replace(**{name: tile})
        tile = getattr(tiles, name)
        if name == "forward":
            summary = self.forward_summary if with_summaries else None
            return launch_forward(rows, sizes, tile, self.outputs, *new_dealt(rows.q.device), summary)
        kept = self.statistics
        workspace = self._workspace(tiles)._replace(
            lse2=kept.lse2, delta=kept.delta, summary_lse2=kept.summary_lse2, summary_delta=kept.summary_delta
        )
        summary = self.backward_summary if with_summaries else None
        if name == "dq":
            return launch_dq(rows, sizes, tile, self.outputs, self.d_outputs, self.gradients.dq, workspace, summary)
        is_text = name == "dkv_text"
        return launch_dkv(rows, sizes, is_text, tile, self.d_outputs.d_out, self.gradients, workspace, summary)

    def try_tile(self, name: str, tile: Tile, expected: list[torch.Tensor]) -> dict:
        """Whether a kernel's result with a candidate tile agrees with `expected`, and then its time once."""
        entry: dict[str, object] = {"kernel": name, "tile": tile}
        try:
            for rows in self.results[name]:
                rows.fill_(float("nan"))
            self.launch(name, tile)
            entry["difference"] = max(ratio(*pair) for pair in zip(self.results[name], expected, strict=True))
            if entry["difference"] < TOLERANCE[self.rows.q.dtype]:
                entry["rounds_ms"] = [self.time_tile(name, tile)]
        except (RuntimeError, triton.runtime.errors.TritonError) as error:
            entry["error"] = str(error).split("\n")[0][:200]
        return entry

    def time_tile(self, name: str, tile: Tile) -> float:
        """Median milliseconds of a kernel with a tile."""
        return milliseconds(lambda: self.launch(name, tile), self.device, ROUND_MS)["median_ms"]


def _candidates(kernel: str, shape: Shape, device: str) -> list[Tile]:
    element_bytes = shape.torch_dtype.itemsize
    if device == "cpu":
        return candidates(kernel, shape.head_dim, element_bytes, None, False)
    properties = torch.cuda.get_device_properties(device)
    hopper = properties.major == 9 and element_bytes == 2
    return candidates(kernel, shape.head_dim, element_bytes, properties.shared_memory_per_block_optin, hopper)


def _time_in_rounds(kernels: Kernels, entries: list[dict], deadline: float) -> None:
    """Fill median_ms. A GPU slows down as it warms up, so that no candidate may always be the first or the last."""
    least = min((entry["rounds_ms"][0] for entry in entries), default=0.0)
    close = [entry for entry in entries if entry["rounds_ms"][0] < HOPELESS * least]
    for order in LATER_ROUNDS:
        for entry in close[::order]:
            if kernels.device != "cpu" and time.monotonic() < deadline:
                entry["rounds_ms"].append(kernels.time_tile(entry["kernel"], entry["tile"]))
    for entry in entries:
        entry["median_ms"] = statistics.median(entry["rounds_ms"])


def sweep(shape: Shape, device: str, deadline: float, given: dict[str, list[Tile]] | None = None) -> list[dict]:
    """Every candidate tile of each kernel at a shape, fastest first; after `deadline` (time.monotonic) only listed.

    Args:
        given: candidates by kernel, in place of those of `candidates.py`.
    """
    kernels, table = Kernels(shape, device), []
    for name in KERNELS:
        kernels.launch(name, getattr(kernels.default, name))
        expected = [rows.clone() for rows in kernels.results[name]]
        entries = []
        for tile in given[name] if given else _candidates(name, shape, device):
            if time.monotonic() > deadline:
                entries.append({"kernel": name, "tile": tile, "skipped": "the run's time was over"})
            else:
                entries.append(kernels.try_tile(name, tile, expected))
        _time_in_rounds(kernels, [entry for entry in entries if "rounds_ms" in entry], deadline)
        # The next kernel reads these results.
        kernels.launch(name, getattr(kernels.default, name))
        entries.sort(key=lambda entry: entry.get("median_ms", float("inf")))
        for entry in entries:
            outcome = entry.get("error") or entry.get("skipped") or "wrong result"
            if "median_ms" in entry:
                outcome = f"{entry['median_ms']:.3f} ms"
            print(f"sweep {shape} {name} {tuple(entry['tile'])}: {outcome}", flush=True)
        table += entries
    return table


def _parts(shape: Shape, device: str) -> Case:
    kernels = Kernels(shape, device)
    return Case([], lambda: (), modes={name: lambda name=name: kernels.launch(name) for name in kernels.results})


PARTS = Op("ksa_parts", "each kernel of KSA alone, with the stored tiles", _parts, checked_by="ksa")

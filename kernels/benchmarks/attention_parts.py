"""Each Triton kernel of KSA attention alone, and the sweep of candidate tiles behind tiles.json."""

import statistics
import time

import torch
import triton

from megatron_ksa.kernels.benchmarks.candidates import candidates
from megatron_ksa.kernels.benchmarks.check import TOLERANCE, ratio
from megatron_ksa.kernels.benchmarks.measure import milliseconds
from megatron_ksa.kernels.benchmarks.registry import Case, Op, Shape
from megatron_ksa.kernels.ksa_attention.tile_store import KERNELS
from megatron_ksa.kernels.ksa_attention.triton_backward import launch_dkv, launch_dq
from megatron_ksa.kernels.ksa_attention.triton_config import Tile, Tiles, tiles_for
from megatron_ksa.kernels.ksa_attention.triton_forward import launch_forward
from megatron_ksa.kernels.ksa_attention.triton_summary import launch_summary_backward, launch_summary_forward
from megatron_ksa.kernels.ksa_attention.workspace import Workspace, new_dealt, new_workspace

# Each candidate is timed for so long, in rounds that turn the order of the one before; one that takes so much longer
# than the fastest in the first round is out.
ROUND_MS, LATER_ROUNDS, HOPELESS = 25, (-1, 1, -1), 1.25


class Kernels:
    """Each kernel alone at one shape, on inputs made once.

    With the stored tiles, kernels that serve the summaries' own queries do; with tiles that are tried, none does.
    """

    def __init__(self, shape: Shape, device: str) -> None:
        self.device, self.n, self.sizes = device, shape.n, (shape.chunk_size, shape.summary_tokens)
        self.window, self.scale = shape.window_chunks, shape.head_dim**-0.5
        counts = (shape.heads, shape.groups, shape.groups)
        q, k, v = (shape.random(shape.rows, count, device).detach() for count in counts)
        d_out, out = torch.randn_like(q), torch.empty_like(q)
        self.lse = torch.empty(shape.batch, shape.heads, shape.n, device=device)
        gradients = [torch.empty_like(t) for t in (q, k, v)]
        split = [(t[:, : shape.n], t[:, shape.n :]) for t in (q, k, v, out, d_out, *gradients)]
        self.q, self.k, self.v, self.out, self.d_out, self.dq, self.dk, self.dv = split
        self.keys = (self.k[0], self.v[0], self.k[1], self.v[1])
        self.default = tiles_for(self.q[0], shape.groups, shape.geometry)
        self.own = self.default.serve_summaries(*self.sizes)
        # Statistics are written by dQ and read by dK/dV.
        self.statistics = self._workspace(self.default)
        self.results = {
            "forward": [self.out[0]], "dq": [self.dq[0]], "dkv_text": [self.dk[0], self.dv[0]],
            "dkv_summary": [self.dk[1], self.dv[1]], "summary_forward": [self.out[1]],
            "summary_backward": [self.dq[1]],
        }  # fmt: skip
        for name in self.results:
            self.launch(name)

    def _workspace(self, tiles: Tiles) -> Workspace:
        return new_workspace(self.q[0], self.k[0], self.k[1], None, self.lse, tiles, self.own)

    def launch(self, name: str, tile: Tile | None = None) -> None:
        """Run a kernel; those with tiles take other ones than the stored."""
        if name.startswith("summary"):
            options = (self.q[1], *self.keys, None, *self.sizes, 0, self.scale)
            if name == "summary_forward":
                return launch_summary_forward(*options, self.out[1])
            gradients = (self.dq[1], self.dk[0], self.dv[0], self.dk[1], self.dv[1])
            return launch_summary_backward(*options, self.d_out[1], *gradients, accumulate=True)
        own = self.own and tile is None
        tiles = self.default if tile is None else self.default._replace(**{name: tile})
        tile = getattr(tiles, name)
        settings = (*self.sizes, self.window)
        if name == "forward":
            keys = (self.q[0], *self.keys, None)
            out = (self.out[0], self.lse, *new_dealt(self.lse.device), (self.q[1], self.out[1]) if own else None)
            return launch_forward(*keys, *settings, 0, 0, 0, self.scale, tile, *out)
        kept = self.statistics
        workspace = self._workspace(tiles)._replace(
            lse2=kept.lse2, delta=kept.delta, own_statistics=kept.own_statistics
        )
        if name == "dq":
            options = (self.q[0], *self.keys, None, *settings, 0, 0, 0, self.scale, tile, self.out[0], self.lse)
            rows = (self.q[1], self.d_out[1], self.dq[1]) if own else None
            return launch_dq(*options, self.d_out[0], None, self.dq[0], workspace, rows)
        part = int(name == "dkv_summary")
        return launch_dkv(
            self.q[0], self.d_out[0], self.k[part], self.v[part], None, *settings, 0, 0, self.scale, not part, tile,
            self.dk[part], self.dv[part], workspace, (self.q[1], self.d_out[1]) if own else None,
        )  # fmt: skip

    def try_tile(self, name: str, tile: Tile, expected: list[torch.Tensor]) -> dict:
        """Whether a kernel's result with a candidate tile agrees with `expected`, and then its time once."""
        entry: dict[str, object] = {"kernel": name, "tile": tile}
        try:
            for rows in self.results[name]:
                rows.fill_(float("nan"))
            self.launch(name, tile)
            entry["difference"] = max(ratio(*pair) for pair in zip(self.results[name], expected, strict=True))
            if entry["difference"] < TOLERANCE[self.q[0].dtype]:
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

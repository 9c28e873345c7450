"""KSA attention on one CUDA device: checks, then times forward, forward + backward and each kernel; writes JSON.

    python -m megatron_ksa.kernels.benchmarks.ksa_attention --out DIR [--sweep]

An op is timed only if its output and every gradient agree with the float64 reference. `--sweep` also times candidate
tiles of each kernel at 8k and 32k (MHA), which is how the table of `ksa_attention/triton_config.py` is chosen.
"""

import argparse
import json
import subprocess
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
import triton
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from triton.testing import do_bench

from megatron_ksa.errors import UsageError, usage_errors_exit
from megatron_ksa.kernels.ksa_attention import reference, triton_rows, triton_text
from megatron_ksa.kernels.ksa_attention.geometry import KSAGeometry
from megatron_ksa.kernels.ksa_attention.triton_backward import launch_dkv, launch_dq, new_statistics
from megatron_ksa.kernels.ksa_attention.triton_config import Tile, tiles_for
from megatron_ksa.kernels.ksa_attention.triton_forward import launch_forward
from megatron_ksa.kernels.ksa_attention.triton_summary import launch_summary_backward, launch_summary_forward

GEOMETRY = KSAGeometry(8, 1, 128)
DIM = 128
LENGTHS = (8192, 32768, 131072)
HEADS = ((32, 32), (32, 8))
SWEEP_LENGTHS = (8192, 32768)
# ||a - b|| / ||b|| against float64, as in tests/compare.py.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}

# Queries, keys, warps, stages.
CANDIDATES = {
    "forward": [
        (64, 64, 4, 2), (64, 64, 4, 3), (64, 64, 4, 4), (64, 128, 4, 2), (64, 128, 4, 3), (128, 64, 4, 3),
        (128, 64, 8, 2), (128, 64, 8, 3), (128, 128, 8, 2), (128, 128, 8, 3), (128, 32, 8, 4), (64, 32, 4, 4),
    ],
    "dq": [
        (64, 64, 4, 2), (64, 64, 4, 3), (64, 128, 4, 2), (64, 32, 4, 3), (128, 64, 8, 2), (128, 64, 8, 3),
        (128, 128, 8, 2), (128, 32, 8, 3), (64, 128, 8, 2),
    ],
    "dkv": [
        (64, 128, 8, 2), (64, 128, 8, 3), (64, 64, 4, 2), (64, 64, 4, 3), (128, 64, 8, 2), (128, 64, 4, 2),
        (32, 128, 8, 3), (32, 128, 8, 4), (32, 64, 4, 3), (128, 128, 8, 2), (64, 64, 8, 3), (32, 128, 4, 3),
    ],
}  # fmt: skip

# (geometry, queries, query heads, K/V heads, head_dim, batch, dtype, cuts between documents, offsets)
CHECKS = {
    "mha": (KSAGeometry(8, 1, 16), 1000, 4, 4, 128, 1, torch.bfloat16, None, None),
    "gqa-batch-S2-documents": (KSAGeometry(8, 2, 16), 900, 8, 2, 64, 2, torch.bfloat16, [1, 333, 610], None),
    "mqa-dim96": (KSAGeometry(16, 1, 4), 777, 4, 1, 96, 1, torch.bfloat16, None, None),
    "dim256-documents": (KSAGeometry(8, 1, 8), 600, 2, 2, 256, 1, torch.bfloat16, [250], None),
    "causal": (KSAGeometry(8, 1, 128), 1000, 2, 2, 128, 1, torch.bfloat16, None, None),
    "no-window": (KSAGeometry(5, 3, 0), 501, 2, 2, 128, 1, torch.bfloat16, None, None),
    "segment": (KSAGeometry(8, 1, 16), 500, 4, 2, 128, 2, torch.bfloat16, [300, 700], (512, (384, 628), (3, 100))),
    "float16": (KSAGeometry(8, 1, 16), 1000, 4, 2, 128, 1, torch.float16, [500], None),
    "float32": (KSAGeometry(8, 1, 16), 500, 2, 1, 128, 1, torch.float32, [300], None),
    "table-shape": (KSAGeometry(8, 1, 128), 4096, 8, 2, 128, 1, torch.bfloat16, None, None),
}


def header(commit: str | None) -> dict:
    """What ran where."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    driver = subprocess.run(command, capture_output=True, text=True, check=False).stdout.split("\n")[0]
    if commit is None:
        command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
        commit = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or "unknown"
    return {
        "gpu": torch.cuda.get_device_name(), "driver": driver, "torch": torch.__version__,
        "cudnn": torch.backends.cudnn.version(), "triton": triton.__version__, "commit": commit,
    }  # fmt: skip


def ratio(actual: Tensor, expected: Tensor) -> float:
    """||actual - expected|| / ||expected||; infinite where actual is not finite or nothing is expected but given."""
    if not torch.isfinite(actual).all():
        return float("inf")
    scale, difference = expected.double().norm().item(), (actual.double() - expected.double()).norm().item()
    return difference / scale if scale else (float("inf") if difference else 0.0)


def random_rows(*shapes: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    return [torch.randn(shape, device="cuda", dtype=torch.float32).to(dtype).requires_grad_() for shape in shapes]


def errors(names: str, attend: Callable, expected: Callable, leaves: list[Tensor]) -> dict[str, float]:
    """Relative errors of outputs and gradients of `attend` against `expected` in float64."""
    outputs = attend(*leaves)
    d_outputs = [torch.randn_like(out) for out in outputs]
    gradients = torch.autograd.grad(outputs, leaves, d_outputs)
    again = torch.autograd.grad(attend(*leaves), leaves, d_outputs)
    exact_leaves = [leaf.detach().double().requires_grad_() for leaf in leaves]
    exact = expected(*exact_leaves)
    exact_gradients = torch.autograd.grad(exact, exact_leaves, [d_out.double() for d_out in d_outputs])
    results = zip(names.split(), (*outputs, *gradients), (*exact, *exact_gradients), strict=True)
    found = {name: ratio(actual.detach(), wanted.detach()) for name, actual, wanted in results}
    same = all(torch.equal(one, two) for one, two in zip(gradients, again, strict=True))
    return found | {"repeat": 0.0 if same else float("inf")}


def check(geometry, nq, heads, groups, dim, batch, dtype, cuts, offsets) -> dict[str, float]:
    """Errors of the text op, and of the op over `[text | summaries]` rows where no offset is given."""
    query_start, (key_start, nk), (chunk_start, nc) = offsets or (0, (0, nq), (0, nq // geometry.chunk_size))
    n, ns = query_start + nq, nc * geometry.summary_tokens
    starts = None
    if cuts is not None:
        starts = torch.zeros(batch, n, dtype=torch.int32, device="cuda")
        for cut in cuts:
            starts[:, cut:] = cut
    offsets = {"query_start": query_start, "key_start": key_start, "chunk_start": chunk_start}
    leaves = random_rows(
        (batch, nq, heads, dim), *[(batch, nk, groups, dim)] * 2, *[(batch, ns, groups, dim)] * 2, dtype=dtype
    )
    found = errors(
        "out lse dq dk dv dk_summary dv_summary",
        lambda *rows: triton_text.text_attention(*rows, geometry, document_start=starts, **offsets),
        lambda *rows: reference.text_attention(*rows, geometry, document_start=starts, **offsets),
        leaves,
    )
    if query_start:
        return found

    def joint_reference(q, k, v):
        (q, q_own), (k, k_own), (v, v_own) = ((rows[:, :nq], rows[:, nq:]) for rows in (q, k, v))
        whole = nc * geometry.chunk_size
        text, _ = reference.text_attention(q, k, v, k_own, v_own, geometry, document_start=starts)
        keys = (k[:, :whole], v[:, :whole], k_own, v_own)
        own = reference.summary_attention(q_own, *keys, geometry, document_start=starts)
        return (torch.cat([text, own], dim=1),)

    joint = errors(
        "out dq dk dv",
        lambda *rows: (triton_rows.attention(*rows, geometry, text_rows=nq, document_start=starts),),
        joint_reference,
        random_rows(*((batch, nq + ns, count, dim) for count in (heads, groups, groups)), dtype=dtype),
    )
    return found | {f"joint {name}": error for name, error in joint.items()}


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """cuDNN's full causal attention of [B, n, H, D] rows, with as many K/V heads as query heads."""
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        rows = [t.transpose(1, 2) for t in (q, k, v)]
        return F.scaled_dot_product_attention(*rows, is_causal=True).transpose(1, 2)


def check_sdpa() -> dict[str, float]:
    """cuDNN's own errors in bf16 on causal attention: the band in which ours should be."""
    expected = KSAGeometry(8, 1, 128)

    def causal(q, k, v):
        return (reference.text_attention(q, k, v, k[:, :0], v[:, :0], expected)[0],)

    leaves = random_rows(*[(1, 1000, 2, 128)] * 3, dtype=torch.bfloat16)
    return errors("out dq dk dv", lambda *rows: (sdpa(*rows),), causal, leaves)


def check_all() -> tuple[dict, list[str]]:
    """Errors of every case, and the names of what is out of tolerance. Uninitialised memory is NaN meanwhile."""
    found, failed = {}, []
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, case in CHECKS.items():
            try:
                found[name] = check(*case)
            except (RuntimeError, triton.runtime.errors.TritonError) as error:
                found[name], failed = {"error": repr(error)[:2000]}, [*failed, name]
                print(f"check {name}: {repr(error)[:400]}", flush=True)
                continue
            # The log-sum-exp is float32 whatever the inputs are.
            limits = {entry: 1e-5 if entry == "lse" else TOLERANCE[case[6]] for entry in found[name]}
            bad = [f"{name} {entry}" for entry, error in found[name].items() if not error <= limits[entry]]
            failed += bad
            line = " ".join(f"{entry.replace('joint ', 'j.')} {error:.1e}" for entry, error in found[name].items())
            print(f"check {'FAIL' if bad else 'ok'} {name}: {line}", flush=True)
    torch.use_deterministic_algorithms(False)
    found["cudnn"] = check_sdpa()
    print("check cudnn:", {entry: f"{error:.1e}" for entry, error in found["cudnn"].items()}, flush=True)
    return found, failed


def milliseconds(run: Callable[[], object], repeat: int = 200) -> dict[str, float]:
    """Median and 20th and 80th percentiles of the device time."""
    median, low, high = do_bench(run, warmup=repeat // 4, rep=repeat, quantiles=[0.5, 0.2, 0.8])
    return {"median_ms": median, "p20_ms": low, "p80_ms": high}


def visible_pairs(n: int, geometry: KSAGeometry) -> int:
    """Query-key pairs of the text queries."""
    i = torch.arange(n)
    past = (i // geometry.chunk_size - geometry.window_chunks).clamp(min=0)
    return int((i + 1 - past * geometry.chunk_size + past * geometry.summary_tokens).sum())


def time_attention(attend: Callable, leaves: list[Tensor], pairs: int) -> dict:
    """Forward, forward + backward, and the peak of memory of the latter, inputs included."""
    flops = 4 * pairs * leaves[0].shape[2] * DIM
    result = {}
    with torch.no_grad():
        result["forward"] = milliseconds(lambda: attend(*leaves))
    d_out = torch.randn_like(leaves[0])
    result["forward_backward"] = milliseconds(lambda: torch.autograd.grad(attend(*leaves), leaves, d_out))
    for mode, factor in (("forward", 1.0), ("forward_backward", 3.5)):
        result[mode]["visible_tflops"] = factor * flops / result[mode]["median_ms"] / 1e9
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    torch.autograd.grad(attend(*leaves), leaves, d_out)
    result["peak_bytes"] = torch.cuda.max_memory_allocated()
    result["peak_over_inputs_bytes"] = result["peak_bytes"] - before
    # out, dq, dk, dv, and three float32 statistics of a row
    rows = [leaves[0], *leaves]
    statistics = 3 * 4 * leaves[0].shape[1] * leaves[0].shape[2]
    result["outputs_and_gradients_bytes"] = sum(t.numel() * t.element_size() for t in rows) + statistics
    return result


class Kernels:
    """Each kernel alone at one shape, on inputs made once."""

    def __init__(self, n: int, heads: int, groups: int):
        rows = n + n // GEOMETRY.chunk_size * GEOMETRY.summary_tokens
        q, k, v = (torch.randn(1, rows, count, DIM, device="cuda").bfloat16() for count in (heads, groups, groups))
        d_out, out = torch.randn_like(q), torch.empty_like(q)
        self.lse = torch.empty(1, heads, n, device="cuda")
        self.lse2, self.delta = new_statistics(self.lse)
        gradients = [torch.empty_like(t) for t in (q, k, v)]
        split = [(t[:, :n], t[:, n:]) for t in (q, k, v, out, d_out, *gradients)]
        self.q, self.k, self.v, self.out, self.d_out, self.dq, self.dk, self.dv = split
        self.keys = (self.k[0], self.v[0], self.k[1], self.v[1])
        self.sizes = (GEOMETRY.chunk_size, GEOMETRY.summary_tokens)
        self.scale = DIM**-0.5
        self.default = tiles_for(DIM, torch.bfloat16)
        self.results = {
            "forward": [self.out[0]], "dq": [self.dq[0]], "dkv_text": [self.dk[0], self.dv[0]],
            "dkv_summary": [self.dk[1], self.dv[1]], "summary_forward": [self.out[1]],
            "summary_backward": [self.dq[1]],
        }  # fmt: skip
        for name in self.results:
            self.launch(name)

    def launch(self, name: str, tile: Tile | None = None) -> None:
        """Run a kernel; those with tiles take other ones than the stored."""
        if name.startswith("summary"):
            options = (self.q[1], *self.keys, None, *self.sizes, 0, self.scale)
            if name == "summary_forward":
                return launch_summary_forward(*options, self.out[1])
            gradients = (self.dq[1], self.dk[0], self.dv[0], self.dk[1], self.dv[1])
            return launch_summary_backward(*options, self.d_out[1], *gradients, accumulate=True)
        tile = tile or getattr(self.default, name)
        settings = (*self.sizes, GEOMETRY.window_chunks)
        if name.startswith("dkv"):
            part = int(name == "dkv_summary")
            statistics = (None, self.lse2, self.delta)
            return launch_dkv(
                self.q[0], self.d_out[0], self.k[part], self.v[part], *statistics, *settings, 0, 0, self.scale,
                not part, tile, self.dk[part], self.dv[part],
            )  # fmt: skip
        options = (self.q[0], *self.keys, None, *settings, 0, 0, 0, self.scale, tile, self.out[0], self.lse)
        if name == "forward":
            return launch_forward(*options)
        return launch_dq(*options, self.d_out[0], None, self.lse2, self.delta, self.dq[0])

    def time(self) -> dict:
        """Milliseconds of each kernel with the stored tiles."""
        return {name: milliseconds(lambda name=name: self.launch(name), 100) for name in self.results}

    def sweep(self, deadline: float) -> list[dict]:
        """Milliseconds of each candidate whose result agrees with that of the stored tiles, fastest first."""
        table = []
        for name in ("forward", "dq", "dkv_text", "dkv_summary"):
            self.launch(name)
            expected = [rows.clone() for rows in self.results[name]]
            entries = []
            for numbers in CANDIDATES[name.split("_")[0]]:
                if time.monotonic() > deadline:
                    print(f"sweep: out of time at {name} {numbers}", flush=True)
                    break
                entry = {"kernel": name, "tile": numbers}
                try:
                    for rows in self.results[name]:
                        rows.fill_(float("nan"))
                    self.launch(name, Tile(*numbers))
                    pairs = zip(self.results[name], expected, strict=True)
                    entry["difference"] = max(ratio(rows, wanted) for rows, wanted in pairs)
                    if entry["difference"] < TOLERANCE[torch.bfloat16]:
                        entry |= milliseconds(lambda n=name, t=numbers: self.launch(n, Tile(*t)), 50)
                except (RuntimeError, triton.runtime.errors.TritonError) as error:
                    entry["error"] = str(error).split("\n")[0][:200]
                entries.append(entry)
            # The next kernel reads these results.
            self.launch(name)
            entries.sort(key=lambda entry: entry.get("median_ms", float("inf")))
            for entry in entries:
                outcome = f"{entry['median_ms']:.3f} ms" if "median_ms" in entry else entry.get("error", "wrong result")
                print(f"sweep {name} {entry['tile']}: {outcome}", flush=True)
            table += entries
        return table


def report(name: str, result: dict) -> None:
    times = {mode: result[mode] for mode in ("forward", "forward_backward")}
    line = " | ".join(f"{m} {t['median_ms']:.3f} ms, {t['visible_tflops']:.0f} TFLOP/s" for m, t in times.items())
    peak, needed = (result[key] / 2**20 for key in ("peak_over_inputs_bytes", "outputs_and_gradients_bytes"))
    print(f"{name}: {line} | over inputs {peak:.0f} MiB, outputs and gradients {needed:.0f} MiB", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Check and time KSA attention on one CUDA device.")
    parser.add_argument("--out", type=Path, required=True, help="folder for ksa_attention.json")
    parser.add_argument("--sweep", action="store_true", help="also time candidate tiles of each kernel")
    parser.add_argument("--commit", help="commit of the code, where it is no git checkout")
    parser.add_argument("--limit", type=float, default=450.0, help="seconds after which the sweep stops")
    options = parser.parse_args()
    with usage_errors_exit():
        if not torch.cuda.is_available():
            raise UsageError("no CUDA device: this benchmark needs one")
        run(options)


def run(options: argparse.Namespace) -> None:
    """Check, time, and write the JSON after every step, so that a run cut short leaves what it has."""
    deadline = time.monotonic() + options.limit
    torch.manual_seed(0)
    options.out.mkdir(parents=True, exist_ok=True)
    record = {"header": header(options.commit), "shape": {"batch": 1, "head_dim": DIM, "geometry": str(GEOMETRY)}}

    def write() -> None:
        (options.out / "ksa_attention.json").write_text(json.dumps(record, indent=1) + "\n")

    print(record["header"], flush=True)
    record["checks"], failed = check_all()
    write()
    if failed:
        raise UsageError(f"not timed, because these checks fail: {', '.join(failed)}; see ksa_attention.json")
    for heads, groups in HEADS:
        for n in LENGTHS:
            name = f"n{n} h{heads}/{groups}"
            rows = n + n // GEOMETRY.chunk_size * GEOMETRY.summary_tokens
            counts = (heads, groups, groups)
            leaves = random_rows(*((1, rows, count, DIM) for count in counts), dtype=torch.bfloat16)
            record[f"ksa {name}"] = time_attention(
                lambda q, k, v, n=n: triton_rows.attention(q, k, v, GEOMETRY, text_rows=n),
                leaves,
                visible_pairs(n, GEOMETRY),
            )
            report(f"ksa {name}", record[f"ksa {name}"])
            del leaves
            record[f"kernels {name}"] = Kernels(n, heads, groups).time()
            times = ", ".join(f"{k} {t['median_ms']:.3f}" for k, t in record[f"kernels {name}"].items())
            print(f"kernels {name}: {times}", flush=True)
            write()
            torch.cuda.empty_cache()
    for n in LENGTHS:
        leaves = random_rows(*[(1, n, 32, DIM)] * 3, dtype=torch.bfloat16)
        record[f"cudnn n{n} h32/32"] = time_attention(sdpa, leaves, n * (n + 1) // 2)
        report(f"cudnn n{n} h32/32", record[f"cudnn n{n} h32/32"])
        del leaves
        write()
    if options.sweep:
        heads, groups = HEADS[0]
        for n in SWEEP_LENGTHS:
            print(f"sweep n{n} h{heads}/{groups}", flush=True)
            record[f"sweep n{n} h{heads}/{groups}"] = Kernels(n, heads, groups).sweep(deadline)
            write()


if __name__ == "__main__":
    main()

"""Decoding and prompts of a Qwen3-4B shape: a 3:1 hybrid of KSA and full layers against full attention, random weights.

    python examples/generation_speed/run.py --out runs/generation

measures on one GPU, for each length and batch, the time of a decoding step, and for each length the time of a prompt
and its peak memory over weights and state. A batch of 0 is as many sequences as fit in --memory-gib. Sequences are in
different places of their chunks, so that summary rows run at almost every step, as they do when sequences come and go.
What is in the results already is not measured again.
"""

import argparse
import gc
import json
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))
import installed  # noqa: F401
from report import GIB, tables

from megatron_ksa.config.ksa import KSAConfig
from megatron_ksa.errors import UsageError, usage_errors_exit
from megatron_ksa.files import check_writable, read_json, whole_file
from megatron_ksa.platform import prepare_platform
from megatron_ksa.results import stored_runs

# Left to activations, graphs and the allocator where as many sequences as fit are wanted.
RESERVE_GIB = 3.0
QWEN3_4B = dict(
    num_layers=36, hidden_size=2560, ffn_hidden_size=9728, num_attention_heads=32, num_query_groups=8, kv_channels=128
)
TINY = dict(num_layers=4, hidden_size=64, ffn_hidden_size=64, num_attention_heads=4, num_query_groups=2, kv_channels=16)


@dataclass(frozen=True)
class Setup:
    """Which model, and how long it is measured.

    Attributes:
        shape: fields of Megatron's TransformerConfig.
        ksa: settings of the hybrid.
        words: of the vocabulary.
        steps: that are timed.
    """

    shape: dict
    ksa: KSAConfig
    words: int
    steps: int


BIG = Setup(QWEN3_4B, KSAConfig(enabled=True, layer_pattern="kkkf*9"), 151936, 64)
SMALL = Setup(TINY, KSAConfig(enabled=True, layer_pattern="kkkf", chunk_size=2, window_chunks="4"), 64, 8)


def build(setup: Setup, model: str):
    """The model with random weights, bf16 on a GPU."""
    import torch
    from megatron.core.transformer.transformer_config import TransformerConfig

    from megatron_ksa.checkpoint.load import single_process_groups
    from megatron_ksa.model.builder import KSAGPTModelBuilder, KSAGPTModelConfig

    on_gpu = torch.cuda.is_available()
    dtype = torch.bfloat16 if on_gpu else torch.float32
    groups = single_process_groups()
    config = TransformerConfig(
        **setup.shape, params_dtype=dtype, bf16=on_gpu, normalization="RMSNorm", qk_layernorm=True,
        gated_linear_unit=True, activation_func=torch.nn.functional.silu, add_bias_linear=False,
        layernorm_epsilon=1e-6, hidden_dropout=0.0, attention_dropout=0.0, transformer_impl="local",
        use_cpu_initialization=not on_gpu, bias_activation_fusion=False, bias_dropout_fusion=False,
        masked_softmax_fusion=False, gradient_accumulation_fusion=False,
    )  # fmt: skip
    ksa = setup.ksa if model == "hybrid" else KSAConfig()
    built = KSAGPTModelBuilder(
        KSAGPTModelConfig(
            transformer=config, ksa=ksa, vocab_size=setup.words, seq_length=131072, text_length=131072,
            position_embedding_type="rope", rotary_base=1000000, share_embeddings_and_output_weights=True,
        )
    ).build_model(groups)  # fmt: skip
    return built.to("cuda" if on_gpu else "cpu", dtype).eval()


def synchronize() -> None:
    """Wait for the GPU, where there is one."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def measure_steps(model, setup: Setup, length: int, batch: int, cuda_graph: bool) -> dict:
    """Milliseconds of a decoding step of `batch` sequences of about `length` tokens."""
    import torch

    from megatron_ksa.inference import DecodingState

    warm_up = 4 * setup.ksa.chunk_size
    with DecodingState(model, batch, length + warm_up + setup.steps, cuda_graph=cuda_graph) as state:
        for cache in state.caches:
            cache.key.normal_()
            cache.value.normal_()
        slots = [state.join() for _ in range(batch)]
        for slot in slots:
            state.set_length(slot, length - slot % min(setup.ksa.chunk_size, length))
        tokens = torch.zeros(batch, dtype=torch.int64, device=state.device)
        for _ in range(warm_up):
            tokens = state.decode(slots, tokens).argmax(-1)
        synchronize()
        begin = time.perf_counter()
        for _ in range(setup.steps):
            tokens = state.decode(slots, tokens).argmax(-1)
        synchronize()
        ms = (time.perf_counter() - begin) / setup.steps * 1e3
        return {"ms": ms, "tokens_per_second": batch / ms * 1e3, "state_bytes": state.bytes()}


def measure_prompt(model, setup: Setup, length: int) -> dict:
    """Seconds of a prompt, and bytes at its peak over weights and state."""
    import torch

    from megatron_ksa.inference import DecodingState

    on_gpu = torch.cuda.is_available()
    tokens = torch.randint(setup.words, (length,), generator=torch.Generator().manual_seed(0))
    found: dict = {}
    # The first prompt compiles kernels.
    for _ in range(2):
        with DecodingState(model, 1, length + 1) as state:
            synchronize()
            before = torch.cuda.memory_allocated() if on_gpu else None
            if on_gpu:
                torch.cuda.reset_peak_memory_stats()
            begin = time.perf_counter()
            state.prefill(state.join(), tokens)
            synchronize()
            found = {"seconds": time.perf_counter() - begin, "state_bytes": state.bytes()}
            found["peak_over_bytes"] = torch.cuda.max_memory_allocated() - before if on_gpu else None
        del state
        gc.collect()
    return found


def as_many_as_fit(model, length: int, memory_gib: float) -> int:
    """Sequences of `length` tokens beside the weights."""
    from megatron_ksa.inference.state import sequence_bytes

    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    return max(int((memory_gib - RESERVE_GIB) * GIB - weights) // sequence_bytes(model, length), 0)


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, type=Path, help="folder for results.json and the table, results.md")
    parser.add_argument("--lengths", type=int, nargs="+", default=[16384, 32768, 131072], help="tokens (16k 32k 128k)")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 3, 8, 0], help="sequences (1 3 8 0)")
    parser.add_argument("--models", nargs="+", choices=("hybrid", "full"), default=["hybrid", "full"], help="both")
    parser.add_argument("--memory-gib", type=float, default=74.5, help="for a batch of 0 and larger ones: 80 GB (74.5)")
    parser.add_argument("--limit", type=float, default=540.0, help="seconds after which nothing new is started (540)")
    parser.add_argument("--tiny", action="store_true", help="a small model, for a CPU")
    parser.add_argument("--commit", help="commit of the code, where it is no git checkout")
    return parser.parse_args()


def earlier_runs(path: Path, now: dict) -> list[dict]:
    """What an earlier call measured, to be gone on with.

    Args:
        now: the header of this call.

    Raises:
        UsageError: no results of this program, or of another model, GPU or code, whose times would stand beside these.
    """
    runs = stored_runs(path)
    then = read_json(path).get("header") if path.exists() else None
    if not isinstance(then, dict):
        then = {}
    names = [name for name in ("model", "gpu", "torch", "triton", "commit") if then.get(name, now[name]) != now[name]]
    if names:
        told = ", ".join(f"{name} {then[name]}, now {now[name]}" for name in names)
        raise UsageError(f"{path} was measured otherwise ({told}): choose another --out")
    return runs


def plan(args: argparse.Namespace) -> list[dict]:
    """Measurements in order, by their keys: graphs on everywhere, and off at batch 1."""
    cells = [
        {"kind": "step", "length": length, "batch": batch, "cuda_graph": graph}
        for length in args.lengths for batch in args.batches for graph in ((True, False) if batch == 1 else (True,))
    ]  # fmt: skip
    cells += [{"kind": "prompt", "length": length, "batch": 1, "cuda_graph": False} for length in args.lengths]
    return [{"model": model, **cell} for model in args.models for cell in cells]


def measure(model, setup: Setup, cell: dict, memory_gib: float) -> dict:
    """A cell's result, or why there is none."""
    import torch

    most = as_many_as_fit(model, cell["length"] + 256, memory_gib)
    sequences = cell["batch"] or (most if setup.shape is not TINY else 3)
    if torch.cuda.is_available() and sequences > most or not sequences:
        return {"skipped": f"{most} sequences fit in {memory_gib:g} GiB"}
    try:
        if cell["kind"] == "prompt":
            return measure_prompt(model, setup, cell["length"])
        return {"sequences": sequences} | measure_steps(model, setup, cell["length"], sequences, cell["cuda_graph"])
    except torch.cuda.OutOfMemoryError as error:
        return {"error": str(error).splitlines()[0][:200]}


def main() -> None:
    """Measure what is missing, and write after each measurement."""
    with usage_errors_exit():
        args = parse_arguments()
        if min([*args.lengths, *args.batches]) < 0 or 0 in args.lengths:
            raise UsageError("--lengths are at least 1, --batches at least 0")
        for flag in ("memory_gib", "limit"):
            if not 0 < getattr(args, flag) < math.inf:
                raise UsageError(f"--{flag.replace('_', '-')} {getattr(args, flag):g}: a number above 0")
        prepare_platform([])
        import torch

        from megatron_ksa.kernels.benchmarks.measure import header

        setup = SMALL if args.tiny else BIG
        device = "cuda" if torch.cuda.is_available() else "cpu"
        if device == "cpu" and not args.tiny:
            raise UsageError("no CUDA device: run on a GPU, or try --tiny")
        out, begin = args.out / "results.json", time.monotonic()
        check_writable(args.out)
        head = header(device, args.commit) | {"model": "tiny" if args.tiny else "Qwen3-4B"}
        runs = earlier_runs(out, head)
        model, built = None, None
        for cell in plan(args):
            if any(all(run.get(key) == value for key, value in cell.items()) and "error" not in run for run in runs):
                continue
            if time.monotonic() - begin > args.limit:
                print(f"the run's {args.limit:.0f} s were over: start it again for the rest", flush=True)
                break
            if built != cell["model"]:
                model = None
                gc.collect()
                model, built = build(setup, cell["model"]), cell["model"]
            runs.append(cell | measure(model, setup, cell, args.memory_gib))
            print(runs[-1], flush=True)
            gc.collect()
            if device == "cuda":
                torch.cuda.empty_cache()
            with whole_file(out) as stream:
                stream.write(json.dumps({"header": head, "runs": runs}, indent=1) + "\n")
        with whole_file(args.out / "results.md") as stream:
            stream.write(tables(runs) + "\n")
        print(tables(runs))


if __name__ == "__main__":
    main()

"""The benchmarks of the kernels as tests call them: the command line in this process, and a tiny shape."""

from megatron_ksa.kernels.benchmarks import __main__ as program
from megatron_ksa.kernels.benchmarks.registry import Shape

TINY = Shape(40, 2, 1, 16, chunk_size=4, window_chunks=3, dtype="float32")
SIZES = "--device cpu --dtype float32 --heads 2/1 --head-dim 16 --chunk-size 4 --window-chunks 3".split()


def run_program(monkeypatch, *arguments) -> None:
    """`python -m megatron_ksa.kernels.benchmarks ARGUMENTS`, in this process."""
    monkeypatch.setattr("sys.argv", ["benchmarks", *map(str, arguments)])
    program.main()

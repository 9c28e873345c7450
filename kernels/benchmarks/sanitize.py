"""KSA attention and the rotation under compute-sanitizer's memcheck and racecheck, on a small shape.

    pip install nvidia-cuda-sanitizer-api
    python -m megatron_ksa.kernels.benchmarks.sanitize

Exit code 0: both tools are clean; 1: one found something; 2: no GPU or no compute-sanitizer.
"""

import argparse
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

from megatron_ksa.errors import UsageError, usage_errors_exit

TOOLS = ("memcheck", "racecheck")
TOOL_FOUND_ERRORS = 86


def find_sanitizer(given: Path | None) -> Path:
    """The program given, on PATH, or of NVIDIA's wheel.

    Raises:
        UsageError: there is none.
    """
    if given is not None:
        if not given.is_file():
            raise UsageError(f"--sanitizer {given}: no such file")
        return given
    if found := shutil.which("compute-sanitizer"):
        return Path(found)
    spec = importlib.util.find_spec("nvidia")
    for folder in spec.submodule_search_locations if spec is not None else ():
        for program in sorted(Path(folder).glob("*/compute-sanitizer/compute-sanitizer")):
            return program
    raise UsageError("no compute-sanitizer: run `pip install nvidia-cuda-sanitizer-api`, or pass --sanitizer PATH")


def workload() -> None:
    """Forward and backward of KSA attention (with and without groups) and of the rotation."""
    import torch

    from megatron_ksa.kernels.benchmarks import attention, rotation
    from megatron_ksa.kernels.benchmarks.registry import Shape

    for shape in (Shape(300, 2, 2, window_chunks=8), Shape(300, 4, 2, window_chunks=8)):
        for op in (attention.KSA, *rotation.ROTATIONS):
            case = op.prepare(shape, "cuda")
            outputs = case.run(*case.leaves)
            torch.autograd.grad(outputs, case.leaves, [torch.ones_like(out) for out in outputs])
    torch.cuda.synchronize()


def main() -> None:
    """Run the workload once for each tool."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sanitizer", type=Path, help="the compute-sanitizer program; found by itself by default")
    parser.add_argument("--workload", action="store_true", help="run the kernels and nothing else")
    options = parser.parse_args()
    if options.workload:
        return workload()
    with usage_errors_exit():
        import torch

        if not torch.cuda.is_available():
            raise UsageError("no CUDA device: compute-sanitizer needs one")
        program = find_sanitizer(options.sanitizer)
    # Without the allocator's cache each tensor has bounds of its own.
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    failed = False
    for tool in TOOLS:
        command = [program, "--tool", tool, "--target-processes", "all", "--error-exitcode", str(TOOL_FOUND_ERRORS)]
        command += [sys.executable, "-m", "megatron_ksa.kernels.benchmarks.sanitize", "--workload"]
        code = subprocess.run(command, env=environment, check=False).returncode
        print(f"{tool}: {'clean' if code == 0 else f'exit code {code}'}", flush=True)
        failed |= code != 0
    raise SystemExit(int(failed))


if __name__ == "__main__":
    main()

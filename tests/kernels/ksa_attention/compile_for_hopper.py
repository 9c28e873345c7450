"""Compiles and launches the kernels of KSA attention for compute capability 9.0 without a GPU; a JSON line each.

Triton compiles for a driver that stands for an H100, loads nothing and notes what it is given. So every launch goes
through Triton's own code twice, first from its Python arguments and then repeated by `kernels/launch.py`, which must
hand the driver the same (the attributes of compiled kernels that `launch.py` takes for granted differ between versions
of Triton).

Each line has the case, the kernel's name, bytes of shared memory, matrix products and the waits for them: where
registers run out, the compiler waits after every product.

Its own process: the test suite has the Triton interpreter on, and Gluon has no interpreter.
"""

import json
import re
import struct
import subprocess
import sys
import tempfile
from bisect import bisect_right
from collections.abc import Callable, Iterable
from itertools import accumulate

import torch
import triton
from triton.backends.compiler import GPUTarget

from megatron_ksa.kernels.ksa_attention import (
    KSAGeometry,
    gluon_common,
    triton_joint,
    triton_passes,
    triton_summary,
    triton_text,
)
from megatron_ksa.kernels.ksa_attention.operands import (
    Gradients,
    Rows,
    Sizes,
    SummaryBackward,
    SummaryForward,
    TextOutputs,
)
from megatron_ksa.kernels.ksa_attention.triton_config import HALF, HOPPER

calls: list[tuple] = []


def noted(argument: object) -> object:
    """An argument as the driver's launcher uses it: tensors and pointers are addresses."""
    if isinstance(argument, torch.Tensor):
        return argument.data_ptr()
    if hasattr(argument, "block_shape"):
        fields = vars(argument) | {"base": argument.base.data_ptr()}
        return type(argument).__name__, *[tuple(v) if isinstance(v, torch.Size) else str(v) for v in fields.values()]
    return argument


class Launcher:
    """Notes kernel, grid and arguments of a launch."""

    def __init__(self, source, metadata):
        self.name = source.fn.__name__

    def __call__(self, x, y, z, stream, function, packed_metadata, launch_metadata, enter, leave, *arguments):
        calls.append((self.name, function, (x, y, z), packed_metadata, [noted(argument) for argument in arguments]))


class Utilities:
    """Triton's calls of the CUDA driver; keeps what it is given to load."""

    case = ""
    loaded: list[tuple[dict, bytes]] = []

    def get_device_properties(self, device):
        return {"max_shared_mem": 227 * 1024, "multiprocessor_count": 132, "warpSize": 32}

    def load_binary(self, name, binary, shared, device):
        self.loaded.append(({"case": self.case, "kernel": name, "shared": shared}, binary))
        return object(), len(calls), 0, 0, 1024

    def unload_module(self, module):
        pass


class Driver:
    """An H100 as far as a launch asks."""

    launcher_cls, utils = Launcher, Utilities()

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_active_torch_device(self):
        return torch.device("cpu")


def machine_code(binary: bytes) -> bytes:
    """The instructions of a kernel: sections .text.* of a 64-bit ELF file."""
    (table,) = struct.unpack_from("<Q", binary, 40)
    size, count, names = struct.unpack_from("<HHH", binary, 58)
    # name, type, flags, address, offset, size
    sections = [struct.unpack_from("<IIQQQQ", binary, table + size * number) for number in range(count)]
    first_name = sections[names][4]
    return b"".join(
        binary[offset : offset + length]
        for name, _, _, _, offset, length in sections
        if binary.startswith(b".text.", first_name + name)
    )


def disassembled(binaries: list[bytes]) -> list[list[str]]:
    """The words of each kernel's instructions. One call for all: nvdisasm starts in 0.25 s."""
    parts = [machine_code(binary) for binary in binaries]
    with tempfile.NamedTemporaryFile() as file:
        file.write(b"".join(parts))
        file.flush()
        command = [triton.knobs.nvidia.nvdisasm.path, "--no-dataflow", "--binary", "SM90a", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    ends, words = list(accumulate(map(len, parts))), [[] for _ in parts]
    for address, instruction in re.findall(r"^\s*/\*([0-9a-f]+)\*/\s+([^;]*);", text, re.MULTILINE):
        words[bisect_right(ends, int(address, 16))] += instruction.split()
    if not all(words):
        raise RuntimeError("nvdisasm printed no instruction of a kernel")
    return words


def report(kernels: str, counts: Callable[[list[str]], dict]) -> None:
    """Print each kernel that was loaded since the last report, with what `counts` says of its instructions."""
    rows, binaries = zip(*Utilities.loaded, strict=True)
    Utilities.loaded.clear()
    Utilities.case = ""
    for row, words in zip(rows, disassembled(list(binaries)), strict=True):
        print(json.dumps({"kernels": kernels} | row | counts(words)), flush=True)


def products_and_waits(words: list[str]) -> dict:
    return {
        "products": sum(word.startswith("HGMMA") for word in words),
        "waits": sum(word.startswith("WARPGROUP.DEPBAR") for word in words),
    }


def twice(launches):
    """A `repeatable` function that is called a second time with the same tensors: both calls launch the same."""

    def run(*arguments):
        first = len(calls)
        launches(*arguments)
        second = len(calls)
        assert second > first, "nothing was launched"
        # A call that goes through Triton again shows in `repeatable`'s record: it would be made anew.
        recorded = launches.__closure__[[*launches.__code__.co_freevars].index("recorded")].cell_contents
        kinds = dict(recorded)
        launches(*arguments)
        assert kinds and recorded == kinds, "the launches were not kept for repetition"
        assert calls[second:] == calls[first:second], (calls[first:second], calls[second:])

    return run


def rows(count, heads):
    return torch.zeros(2, count, heads, 128, dtype=torch.bfloat16).requires_grad_()


def documents(n):
    return torch.zeros(2, n, dtype=torch.int32)


def joint(tiles, start=None, summary_tokens=1):
    n, geometry = 2048, KSAGeometry(8, summary_tokens, 128)
    leaves = [rows(n + n // 8 * summary_tokens, heads) for heads in (8, 2, 2)]
    out = triton_joint.attention(*leaves, geometry, text_rows=n, document_start=start, tiles=tiles)
    out.backward(torch.zeros_like(out))


def segment(tiles, start=None):
    """A part of a longer sequence, with a gradient of the log-sum-exp."""
    leaves = [rows(1024, 8), *[rows(2048, 2)] * 2, *[rows(128, 2)] * 2]
    outputs = triton_text.text_attention(
        *leaves, KSAGeometry(8, 1, 16), query_start=1024, document_start=start, tiles=tiles
    )
    torch.autograd.backward(outputs, [torch.zeros_like(out) for out in outputs])


def summaries():
    leaves = [rows(128, 8), *[rows(1024, 2)] * 2, *[rows(128, 2)] * 2]
    out = triton_summary.summary_attention(*leaves, KSAGeometry(8, 1, 16))
    out.backward(torch.zeros_like(out))


def passes():
    """As context parallelism calls them: a segment of a rank's rows, then what its queries see of other segments."""
    layer, length = torch.zeros(3, 2 * 1152, 2, 8, 128, dtype=torch.bfloat16), 1024
    heads, out, d_out = layer.unbind(), torch.zeros_like(layer[0]), torch.zeros_like(layer[0])
    gradients = torch.zeros_like(layer).unbind()

    def views(rows):
        by_batch = rows.transpose(0, 1)
        return by_batch[:, length : 2 * length], by_batch[:, 2 * length + 128 :]

    (q, q_s), (k, k_s), (v, v_s), (text, text_s), (d_text, d_text_s) = map(views, (*heads, out, d_out))
    (dq, dq_s), (dk, dk_s), (dv, dv_s) = map(views, gradients)
    outputs = TextOutputs(text, torch.zeros(2, 8, length))
    own, sizes = Rows(q, k, v, k_s, v_s, None), Sizes(8, 1, 16, 0, 0, 0, 0.1)
    triton_passes.forward(own, SummaryForward(q_s, text_s), outputs, sizes)
    triton_passes.backward(
        own, SummaryBackward(q_s, d_text_s, dq_s), outputs, d_text, Gradients(dq, dk, dv, dk_s, dv_s), sizes
    )  # fmt: skip

    halo, before, d_halo, d_before = (
        torch.zeros(count, 2, 2, 8, 128, dtype=torch.bfloat16).transpose(0, 2).unbind(1) for count in (128, 384) * 2
    )
    far, sizes = Rows(q, *halo, *before, None), Sizes(8, 1, 16, 3072, 2944, 0, 0.1)
    none = q[:, :0]
    triton_passes.forward(far, SummaryForward(none, none), TextOutputs(torch.zeros_like(q), outputs.lse), sizes)
    d_far = Gradients(torch.zeros_like(q), *d_halo, *d_before)
    triton_passes.backward(far, SummaryBackward(none, none, none), outputs, d_text, d_far, sizes)


CASES = {
    "joint": lambda: joint(HOPPER[128]),
    "joint, documents": lambda: joint(HOPPER[128], documents(2048)),
    "window": lambda: joint(HOPPER[128], summary_tokens=0),
    "segment": lambda: segment(HOPPER[128], documents(2048)),
    "plain tiles": lambda: segment(HALF[128]),
    "summaries": summaries,
    "passes": passes,
}


def main(cases: Iterable[str] = ()) -> None:
    """Compile and report these cases, or all."""
    triton.runtime.driver.set_active(Driver())
    gluon_common._multiprocessors = lambda device: 132
    for module in (triton_text, triton_summary):
        module._launch_forward = twice(module._launch_forward)
        module._launch_backward = twice(module._launch_backward)
    for name in ("launch_joint_forward", "launch_joint_backward"):
        launches = twice(getattr(triton_joint, name))
        for module in (triton_joint, triton_passes):
            setattr(module, name, launches)
    # Tiles are looked up by the GPU.
    triton_passes.tile_numbers = lambda *_: tuple(HOPPER[128].pack())
    for Utilities.case in cases or CASES:
        CASES[Utilities.case]()
    report("attention", products_and_waits)


if __name__ == "__main__":
    main(sys.argv[1:])

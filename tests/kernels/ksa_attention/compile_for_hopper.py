"""Compiles the warp-specialised kernels for compute capability 9.0; prints a JSON line for each: name, shared memory.

Its own process: the test suite has the Triton interpreter on, and Gluon has no interpreter.
"""

import json

import triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource

from megatron_ksa.kernels.ksa_attention import gluon_dq, gluon_forward
from megatron_ksa.kernels.ksa_attention.triton_config import HOPPER, Tile

POINTERS = {"p_start": "*i32", "p_out": "*bf16", "p_dq": "*bf16"} | dict.fromkeys(
    ("p_lse", "p_dlse", "p_lse2", "p_delta"), "*fp32"
)


def shared_memory(kernel, tile: Tile, documents: bool) -> int:
    """Bytes of a program with head_dim 128."""

    def descriptor(rows: int) -> str:
        block = [1, 1, rows, 128]
        return f"tensordesc<bf16{block},{gl.NVMMASharedLayout.get_default_for(block, gl.bfloat16)!r}>"

    sizes = {"C": 8, "S": 1, "GROUP": 4, "D": 128, "BD": 128, "BM": tile.queries, "BN": tile.keys, "STAGES": tile.stages}
    constants = sizes | {"HAS_DOCUMENTS": documents, "HAS_DLSE": documents}
    if not documents:
        constants |= {"p_start": None, "p_dlse": None}
    signature = {}
    for name in kernel.arg_names:
        if name in constants:
            signature[name] = "constexpr"
        elif name.startswith("d_"):
            signature[name] = descriptor(tile.queries if name in ("d_q", "d_out", "d_do") else tile.keys)
        else:
            signature[name] = POINTERS.get(name, "fp32" if name.startswith("scale") else "i32")
    places = {(kernel.arg_names.index(name),): value for name, value in constants.items() if name in kernel.arg_names}
    source = GluonASTSource(fn=kernel, signature=signature, constexprs=places)
    target = GPUTarget("cuda", 90, 32)
    return triton.compile(source, target=target, options={"num_warps": tile.warps}).metadata.shared


for tiles in HOPPER.values():
    for kernel, tile in ((gluon_forward._forward_kernel, tiles.forward), (gluon_dq._dq_kernel, tiles.dq)):
        for documents in (False, True):
            shared = shared_memory(kernel, tile, documents)
            print(json.dumps({"kernel": kernel.__name__, "documents": documents, "shared": shared}), flush=True)

"""Compiles the warp-specialised kernels for compute capability 9.0; prints a JSON line for each.

Name, bytes of shared memory, matrix instructions and the waits for them: where registers run out, the compiler waits
after every one.

Its own process: the test suite has the Triton interpreter on, and Gluon has no interpreter.
"""

import json

import triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource

from megatron_ksa.kernels.ksa_attention import gluon_dkv, gluon_dq, gluon_forward
from megatron_ksa.kernels.ksa_attention.triton_config import HOPPER, Tile

POINTERS = dict.fromkeys(("p_dealt", "p_start", "p_stop"), "*i32")
POINTERS |= dict.fromkeys(("p_out", "p_dq", "p_dk", "p_dv"), "*bf16")
POINTERS |= dict.fromkeys(("p_ks", "p_vs", "p_own_q", "p_own_out", "p_own_do", "p_own_dq"), "*bf16")
POINTERS |= dict.fromkeys(("p_own_lse2", "p_own_delta", "p_lse", "p_dlse", "p_lse2", "p_delta"), "*fp32")
KEYS = ("d_k", "d_v", "d_ks", "d_vs")


def compiled(kernel, tile: Tile, documents: bool):
    """A kernel for head_dim 128."""

    def descriptor(name: str) -> str:
        rows = tile.keys if name in KEYS else tile.queries
        if name.endswith(("lse2", "delta")):
            layout = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=3)
            return f"tensordesc<fp32{[1, 1, rows]},{layout!r}>"
        block = [1, 1, rows, 128]
        return f"tensordesc<bf16{block},{gl.NVMMASharedLayout.get_default_for(block, gl.bfloat16)!r}>"

    sizes = {"C": 8, "S": 1, "GROUP": 4, "D": 128, "BD": 128}
    constants = sizes | {"BM": tile.queries, "BN": tile.keys, "STAGES": tile.stages}
    constants |= {"HAS_DOCUMENTS": documents, "HAS_DLSE": documents, "IS_TEXT": documents, "OWN": True}
    if not documents:
        constants |= {"p_start": None, "p_stop": None, "p_dlse": None}
    signature = {}
    for name in kernel.arg_names:
        if name in constants:
            signature[name] = "constexpr"
        elif name.startswith("d_"):
            signature[name] = descriptor(name)
        else:
            signature[name] = POINTERS.get(name, "fp32" if name.startswith("scale") else "i32")
    places = {(kernel.arg_names.index(name),): value for name, value in constants.items() if name in kernel.arg_names}
    # What a launch finds out about its arguments: addresses and strides are multiples of 16.
    aligned = [name for name in kernel.arg_names if name in POINTERS or name.startswith("stride")]
    divisible = [["tt.divisibility", 16]]
    attributes = {(kernel.arg_names.index(name),): divisible for name in aligned if name not in constants}
    source = GluonASTSource(fn=kernel, signature=signature, constexprs=places, attrs=attributes)
    target = GPUTarget("cuda", 90, 32)
    return triton.compile(source, target=target, options={"num_warps": tile.warps})


tiles = HOPPER[128]
for kernel, tile in (
    (gluon_forward._forward_kernel, tiles.forward),
    (gluon_dq._dq_kernel, tiles.dq),
    (gluon_dkv._dkv_kernel, tiles.dkv_text),
):
    for documents in (False, True):
        program = compiled(kernel, tile, documents)
        instructions = program.asm["sass"].split()
        row = {"kernel": kernel.__name__, "documents": documents, "shared": program.metadata.shared}
        row["products"] = sum(word.startswith("HGMMA") for word in instructions)
        row["waits"] = sum(word.startswith("WARPGROUP.DEPBAR") for word in instructions)
        print(json.dumps(row), flush=True)

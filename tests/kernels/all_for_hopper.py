"""Compiles all kernels for compute capability 9.0 in one process, which imports torch and Triton once.

See `ksa_attention/compile_for_hopper.py`, `ksa_decode/decode_for_hopper.py` and `small_for_hopper.py`, whose lines it
prints; "kernels" of a line is attention, decode or small.
"""

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).with_name(folder)) for folder in ("ksa_attention", "ksa_decode")]
import compile_for_hopper  # noqa: E402
import decode_for_hopper  # noqa: E402
import small_for_hopper  # noqa: E402

if __name__ == "__main__":
    # The small kernels' script switches Triton's checks of arguments off.
    for script in (compile_for_hopper, decode_for_hopper, small_for_hopper):
        script.main()

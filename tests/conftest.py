import sys
from pathlib import Path

# tests/compare.py and tests/trainer.py are shared by every folder of tests.
sys.path.insert(0, str(Path(__file__).parent))

from megatron_ksa.platform.cpu import activate_cpu_platform  # noqa: E402

# Megatron's random-state tracker and recompute ask for CUDA; the trainer activates this platform in the same way.
activate_cpu_platform()

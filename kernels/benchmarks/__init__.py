"""Time and memory of kernels: `python -m megatron_ksa.kernels.benchmarks` (see README.md here)."""

"""Kernels with a plain-PyTorch reference beside each (imported as megatron_ksa.kernels)."""

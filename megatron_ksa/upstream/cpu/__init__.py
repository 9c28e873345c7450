"""A machine without a GPU: `cuda` stands for the CPU, gloo for NCCL."""

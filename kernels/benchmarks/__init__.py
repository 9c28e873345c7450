"""Time and memory of kernels; each module is a program and writes JSON under results/."""

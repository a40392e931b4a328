"""CUDA kernels; each has an equivalent in torch. Triton is optional, and imported when a kernel first runs."""

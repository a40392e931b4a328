"""Kernels for CUDA beside their torch twins. Triton is optional, and imported when a kernel first runs."""

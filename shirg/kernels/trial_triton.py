"""The smallest Triton kernel, which shows whether Triton works on a machine."""

import triton
import triton.language as tl


@triton.jit
def store_one(out):
    tl.store(out, 1)

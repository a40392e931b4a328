"""CUDA kernels in Triton, each with an equivalent in torch. Triton is imported when a kernel first runs."""

import warnings
from functools import cache
from importlib.util import find_spec

import torch


def usable(device: torch.device) -> bool:
    """Whether Triton kernels run on a device; if not, one warning says why, and the equivalents in torch run.

    Triton comes with torch for CUDA, but it compiles its launcher with the machine's C compiler, which small images do
    not have.
    """
    return _usable(device)


# What torch.compiler.assume_constant_result sets: the compiler takes the answer for a constant and does not trace the
# trial. Calling that function would import the whole compiler, which a selector does not need.
usable._dynamo_marked_constant = True  # type: ignore[attr-defined]


@cache
def _usable(device: torch.device) -> bool:
    if device.type != "cuda" or find_spec("triton") is None:
        return False
    try:
        from shirg.kernels.trial_triton import store_one

        with torch.cuda.device(device):
            store_one[(1,)](torch.empty(1, dtype=torch.int32, device=device))
    except Exception as error:  # whatever a compiler or driver may raise
        reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"
        warnings.warn(f"Triton kernels do not run on {device}, the slower torch code does: {reason}", stacklevel=3)
        return False
    return True

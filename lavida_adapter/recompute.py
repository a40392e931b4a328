"""Gradient checkpointing: a block keeps its inputs alone and runs again in the backward pass."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch.utils.checkpoint import checkpoint

T = TypeVar("T")


def run_block(recompute: bool, block: Callable[..., T], *inputs: Any) -> T:
    """The block's outputs; with `recompute` and a gradient to come, nothing inside it is kept."""
    if recompute and torch.is_grad_enabled():
        # Random states are put back for the second run, so that dropout drops the same.
        outputs: T = checkpoint(block, *inputs, use_reentrant=False)
        return outputs
    return block(*inputs)

"""Out of memory, said so that one knows what to change."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from experiments.roofline import cost_of

if TYPE_CHECKING:
    from lavida_adapter import Lavida

CPU_SAYS = "can't allocate memory"
"""Torch has no exception of its own for a CPU that has no memory left."""


class OutOfMemory(RuntimeError):
    """The device has not enough memory; the message says what was wanted and which knobs help."""


def is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, OutOfMemory | torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and CPU_SAYS in str(error)


@contextmanager
def explain_oom(model: "Lavida", batch_size: int, n_tokens: int) -> Iterator[None]:
    """Turns any of those errors into an OutOfMemory with an estimate for a batch of prompts of `n_tokens`."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemory(sentence(model, batch_size, n_tokens)) from error


def sentence(model: "Lavida", batch_size: int, n_tokens: int) -> str:
    """What weights, caches and one layer's activations take, roughly: enough to see which of them is too large."""
    config, item = model.config.lm, model.dtype.itemsize
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    cache = cost_of(config, model.dtype).cache_bytes(n_tokens, batch_size)
    layer = batch_size * n_tokens * (4 * config.d_model + 3 * config.mlp_hidden_size) * item
    has = ""
    if model.device.type == "cuda":
        has = f" of {_gib(torch.cuda.get_device_properties(model.device).total_memory)}"
    return (
        f"out of memory on {model.device.type}: weights take {_gib(weights)}{has}, and a batch of {batch_size} prompts "
        f"of {n_tokens} tokens about {_gib(cache + layer)} more; lower batch_size= or budget="
    )


def release() -> None:
    """Gives back what the failed work held, so that the next job of a sweep can have it."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _gib(n_bytes: float) -> str:
    return f"{n_bytes / 2**30:.2f} GiB"

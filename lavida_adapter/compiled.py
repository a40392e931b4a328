"""Prefill and denoising step compiled by torch: one kernel where eager torch launches five, for prompts of any length.

Plain twins are `Llada.prefill` and `lavida_adapter.engine.step_logits`: what is compiled is these very functions, so
that answers are the same (docs/lavida.md, "Engine").

Shape letters: B batch, P prefix slots, D width, A answer slots, M wanted slots.
"""

import os
import shutil
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lavida_adapter.cache import PrefixCache, StoredPrefix
from lavida_adapter.engine import DecodeSteps, step_logits
from lavida_adapter.llada import Llada
from lavida_adapter.replay import GraphCache, ReplayedSteps


class CompiledEngine:
    """One language model, compiled the first time it is used with a kind of shapes: one prompt or several, padded or
    not. A CPU then runs prefixes as long as they are; on CUDA steps are recorded as graphs too."""

    def __init__(self, lm: Llada) -> None:
        """
        Raises:
            ValueError: on a CPU without a C++ compiler.
        """
        self.lm = lm
        options: dict[str, Any] | None = None
        if lm.wte.weight.is_cuda:
            self._recorder: GraphCache | None = GraphCache(lm, compiled=True)
        else:
            self._recorder = None
            check_compiler()
            store_by_column(lm)
            options = {"cpp_wrapper": True}  # launches kernels from C++ too: a tenth of a small step
        self._step = torch.compile(step_logits, dynamic=True, options=options)
        self._prefill: Callable[..., PrefixCache] = torch.compile(lm.prefill, dynamic=True, options=options)
        self.prefill: Callable[..., PrefixCache] = self._prefill_with_angles

    def _prefill_with_angles(self, embeds_BPD: Tensor, *rest: Any) -> PrefixCache:
        """A compiler would make the angles again wherever they are used."""
        angles = self.lm.angles(torch.arange(embeds_BPD.shape[1], device=embeds_BPD.device)[None])
        return self._prefill(embeds_BPD, *rest, angles=angles)

    def steps(self, cache: StoredPrefix, n_answer: int) -> "ReplayedSteps | CompiledSteps":
        if self._recorder is not None:
            return self._recorder.steps(cache, n_answer)
        return CompiledSteps(DecodeSteps(self.lm, cache, n_answer, self._step))


class CompiledSteps:
    """Compiled steps that always get slots: "all of them" would be a function of its own to compile."""

    def __init__(self, steps: DecodeSteps) -> None:
        self._steps = steps

    def __call__(self, ids_BA: Tensor, want_BM: Tensor | None = None) -> Tensor:
        if want_BM is None:
            want_BM = torch.arange(ids_BA.shape[1], device=ids_BA.device).expand(len(ids_BA), -1)
        return self._steps(ids_BA, want_BM)


def check_compiler() -> None:
    """Raises ValueError when what torch would call to compile for the CPU is not there."""
    name = os.environ.get("CXX", "g++")
    if shutil.which(name) is None:
        raise ValueError(
            f"decode.engine=compile needs a C++ compiler on a CPU, and there is no {name!r} on the path: install one, "
            "name another in CXX, or use decode.engine=eager"
        )


@torch.inference_mode(False)
def store_by_column(module: nn.Module) -> None:
    """Stores float32 weights [out, in] of linear layers with `out` as the inner dimension; values stay what they are.

    With the few rows of a denoising step, a product of torch's spends a third of its time on bringing weights into this
    order. With many rows it makes no difference. Last digits change, because sums are taken in another order.
    """
    for layer in module.modules():
        if isinstance(layer, nn.Linear) and layer.weight.dtype == torch.float32:
            layer.weight.data = layer.weight.data.t().contiguous().t()

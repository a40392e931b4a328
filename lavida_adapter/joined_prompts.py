"""Prompts of unequal length, one behind the other without padding: their tokens, and their attention.

docs/lavida.md, "Engine". A slot of padding costs as much as a token in every matrix product, and the mask that hides it
rules out the fast kernels of torch. Here every token sees all tokens of its own prompt, so neither is needed.

Shape letters: B prompts, P slots of the longest, T tokens of all prompts, Q queries, H heads, G heads of keys and
values, Dh head size.
"""

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from importlib.util import find_spec
from inspect import signature
from itertools import accumulate
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

from lavida_adapter.attention import CPP_WIDTH, Backend, attend, has_avx512
from lavida_adapter.lm_config import LanguageModelConfig
from shirg import send
from shirg.kernels import usable


@dataclass(frozen=True)
class JoinedPrompts:
    """Where the tokens of each prompt are, joined and in a padded batch."""

    lengths: tuple[int, ...]
    row_T: Tensor
    """int64: the prompt of each token."""
    place_T: Tensor
    """int64: the position of each token in its prompt."""
    bound_E: Tensor
    """int32 [B + 1]: the first token of each prompt, and how many there are."""

    @classmethod
    def of(cls, lengths: Sequence[int], device: torch.device) -> "JoinedPrompts":
        """`lengths`: tokens of each prompt, known without asking the device."""
        row_T = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
        place_T = torch.cat([torch.arange(n) for n in lengths])
        bound_E = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
        return cls(tuple(lengths), *(send(t, device) for t in (row_T, place_T, bound_E)))

    @property
    def last_B(self) -> Tensor:
        """int64: the last token of each prompt."""
        return self.bound_E[1:].long() - 1

    def join(self, x_BPD: Tensor) -> Tensor:
        """The tokens [1, T, D] of a batch that is padded on the right."""
        return x_BPD[self.row_T, self.place_T][None]

    def store(self, tensors_1GTD: Iterable[Tensor], places_BGSD: Iterable[Tensor]) -> None:
        """Copies keys and values to the first slots of their prompts; the other slots stay as they are."""
        for x_1GTD, place_BGSD in zip(tensors_1GTD, places_BGSD, strict=True):
            place_BGSD.transpose(1, 2)[self.row_T, self.place_T] = x_1GTD[0].transpose(0, 1)


def kernel_for_joined(backend: Backend, device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    """What `attend_joined` runs: "varlen_attn" of torch, that of flash-attn, or "sdpa" and "math" prompt by prompt."""
    if backend == "flash":
        return "flash_attn_varlen_func"
    return "varlen_attn" if backend == "sdpa" and _has_varlen(device, dtype, head_dim) else backend


def attend_joined(
    q_1HQD: Tensor,
    k_1GTD: Tensor,
    v_1GTD: Tensor,
    prompts: JoinedPrompts,
    backend: Backend = "sdpa",
    *,
    one_each: bool = False,
) -> Tensor:
    """Softmax attention [1, Q, H, Dh] of each query over all tokens of its prompt.

    Queries are those of all tokens, or with `one_each` one of each prompt.
    """
    counts = (1,) * len(prompts.lengths) if one_each else prompts.lengths
    kernel = kernel_for_joined(backend, q_1HQD.device, q_1HQD.dtype, q_1HQD.shape[-1])
    if kernel == backend:
        each = zip(q_1HQD.split(counts, 2), *(x.split(prompts.lengths, 2) for x in (k_1GTD, v_1GTD)), strict=True)
        return torch.cat([attend(q, k, v, None, backend).transpose(1, 2) for q, k, v in each], dim=1)
    bound_E = torch.arange(len(counts) + 1, device=q_1HQD.device, dtype=torch.int32) if one_each else prompts.bound_E
    q_QHD, k_TGD, v_TGD = (x[0].transpose(0, 1) for x in (q_1HQD, k_1GTD, v_1GTD))
    bounds = bound_E, prompts.bound_E, max(counts), max(prompts.lengths)
    out_QHD: Tensor = _function_of(kernel)(q_QHD, k_TGD, v_TGD, *bounds)
    return out_QHD[None]


@cache
def _function_of(kernel: str) -> Callable[..., Any]:
    """The kernel as a function of queries [Q, H, Dh], keys, values, both bounds and both greatest lengths."""
    if kernel == "flash_attn_varlen_func":
        from flash_attn import flash_attn_varlen_func  # an optional extra: pip install shirg[gpu]

        return flash_attn_varlen_func
    from torch.nn.attention.varlen import varlen_attn

    # Heads that share keys were always computed; later versions of torch want to be told.
    return partial(varlen_attn, enable_gqa=True) if "enable_gqa" in signature(varlen_attn).parameters else varlen_attn


@cache
def _has_varlen(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether torch's flash kernel for unequal lengths can run: from torch 2.10 and Ampere on, in 16 bits."""
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16) or head_dim % 8 or head_dim > 256:
        return False
    is_built = find_spec("torch.nn.attention.varlen") is not None and torch.backends.cuda.is_flash_attention_available()
    return is_built and torch.cuda.get_device_capability(device) >= (8, 0)


Batching = Literal["equal", "joined", "padded"]
"""How the prompts of a batch are put together: of one length, one behind the other, or padded and with a mask."""


def kernels_of(
    backend: Backend,
    device: torch.device,
    dtype: torch.dtype,
    config: LanguageModelConfig,
    batchings: Collection[Batching] = (),
    *,
    replayed: bool = False,
) -> str:
    """What computes attention, in words: in general, then in steps and prefills that have kernels of their own.

    `batchings`: of the prompts so far. `replayed`: steps run as CUDA graphs where there is CUDA, and compiled on a CPU.
    """
    if replayed and backend == "sdpa" and device.type == "cpu" and dtype == torch.float32 and has_avx512():
        backend = "cpp" if config.head_dim % CPP_WIDTH == 0 else backend
    words = [f"sdpa ({_chosen(device, dtype, config, masked=False)})" if backend == "sdpa" else backend]
    unequal = {"joined", "padded"} & set(batchings)
    if (replayed or unequal) and backend != "math" and usable(device):
        words.append(f"steps{'' if replayed else ' of unequal prompts'}: lavida_adapter.prefix_attention")
    elif unequal and backend != "math":
        words.append(f"steps of unequal prompts: sdpa, mask ({_chosen(device, dtype, config, masked=True)})")
    if "joined" in batchings:
        kernel = kernel_for_joined(backend, device, dtype, config.head_dim)
        words.append("prefills of unequal prompts: " + (f"{kernel}, one by one" if kernel == backend else kernel))
    if "padded" in batchings and backend != "math":
        words.append(f"padded prompts: sdpa, mask ({_chosen(device, dtype, config, masked=True)})")
    return "; ".join(words)


def _chosen(device: torch.device, dtype: torch.dtype, config: LanguageModelConfig, *, masked: bool) -> str:
    """The kernel that torch chooses for an answer of 32 tokens."""
    rows = 32 * config.n_heads // config.n_kv_heads
    q = torch.empty(1, config.n_kv_heads, rows, config.head_dim, device=device, dtype=dtype)
    k = torch.empty(1, config.n_kv_heads, 1056, config.head_dim, device=device, dtype=dtype)
    mask = torch.ones(1, 1, 1, 1056, device=device, dtype=torch.bool) if masked else None
    return SDPBackend(torch._fused_sdp_choice(q, k, k, mask)).name.lower()

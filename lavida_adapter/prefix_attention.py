"""Attention of an answer to the slots of its prompt and to itself, without a mask over both and without joining them.

docs/lavida.md, "Engine". The kernel reads on the device how many slots each prompt uses. One recorded CUDA graph
therefore serves prompts of every length, and unequal prompts of a batch need no padding mask, which would rule out the
fast kernels of torch.

Shape letters: B batch, S prompt slots, Q queries, A answer tokens, H heads, G heads of keys and values, Dh head size.
"""

from dataclasses import dataclass
from functools import cache
from math import e, log2
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lavida_adapter.attention import Backend, attend
from shirg.kernels import usable

MOST_SPLITS = 16
ROWS = 64
"""The most rows of queries that one program holds."""


@dataclass(frozen=True)
class PromptSlots:
    """Which slots of a batch of prompts are used."""

    seen_BS: Tensor
    """bool: False in slots that must not be seen."""
    end_B: Tensor
    """int32: one more than the last slot that is seen."""

    @classmethod
    def blank(cls, batch: int, n_slots: int, device: torch.device) -> "PromptSlots":
        seen_BS = torch.zeros(batch, n_slots, dtype=torch.bool, device=device)
        return cls(seen_BS, torch.zeros(batch, dtype=torch.int32, device=device))

    @classmethod
    def of(cls, mask_BS: Tensor) -> "PromptSlots":
        found = cls.blank(len(mask_BS), mask_BS.shape[1], mask_BS.device)
        found.fill(mask_BS.shape[1], mask_BS)
        return found

    def fill(self, n_slots: int, mask_BP: Tensor | None) -> None:
        """Sets the tensors in place to a prompt of `n_slots` slots, all of them used or those of the mask."""
        self.seen_BS[:, n_slots:] = False
        self.seen_BS[:, :n_slots] = True if mask_BP is None else mask_BP
        number_S = torch.arange(1, self.seen_BS.shape[1] + 1, device=self.seen_BS.device, dtype=torch.int32)
        self.end_B.copy_((self.seen_BS * number_S).amax(-1))


@dataclass(frozen=True)
class SeenKeys:
    """Which keys an answer sees in one layer's slots of prompt and answer: all, or without the padding of prompts."""

    mask: Tensor | None = None
    """bool [B, 1, 1, P + A], for torch."""
    used: PromptSlots | None = None
    """The same for our kernel, where it runs."""
    n_answer: int = 0

    @classmethod
    def of(cls, mask_BP: Tensor | None, n_answer: int) -> "SeenKeys":
        """The whole answer and the given slots of the prompts; None: all."""
        if mask_BP is None:
            return cls()
        used = None
        if usable(mask_BP.device):
            used = PromptSlots.of(mask_BP)
        return cls(F.pad(mask_BP, (0, n_answer), value=True)[:, None, None], used, n_answer)

    def attend(self, q_BHQD: Tensor, k_BGKD: Tensor, v_BGKD: Tensor, backend: Backend) -> Tensor:
        """Softmax attention [B, Q, H, Dh]; of unequal prompts by our kernel on a GPU, otherwise as `attend` does it."""
        if self.used is not None and backend != "math":
            (k, own_k), (v, own_v) = (x.tensor_split([x.shape[2] - self.n_answer], dim=2) for x in (k_BGKD, v_BGKD))
            return by_kernel(q_BHQD, (k, v), self.used, (own_k, own_v))
        return attend(q_BHQD, k_BGKD, v_BGKD, self.mask, backend).transpose(1, 2)


def attend_prompt(
    q_BHQD: Tensor,
    prompt: tuple[Tensor, Tensor],
    used: PromptSlots,
    answer: tuple[Tensor, Tensor],
    backend: Backend = "sdpa",
) -> Tensor:
    """Softmax attention [B, Q, H, Dh] over the used slots of the prompt and the whole answer.

    Args:
        prompt: keys and values [B, G, S, Dh]; unused slots may hold any finite numbers.
        answer: keys and values [B, G, A, Dh].
        backend: "math" never takes the kernel; "flash" and "sdpa" do on a GPU.
    """
    if q_BHQD.is_cuda and backend != "math" and usable(q_BHQD.device):
        return by_kernel(q_BHQD, prompt, used, answer)
    keys, values = (torch.cat(both, dim=2) for both in zip(prompt, answer, strict=True))
    mask_B11K = F.pad(used.seen_BS, (0, answer[0].shape[2]), value=True)[:, None, None]
    return attend(q_BHQD, keys, values, mask_B11K, backend).transpose(1, 2)


def by_kernel(
    q_BHQD: Tensor,
    prompt: tuple[Tensor, Tensor],
    used: PromptSlots,
    answer: tuple[Tensor, Tensor],
    splits: int | None = None,
) -> Tensor:
    """`attend_prompt` by the Triton kernel. `splits`: among how many programs the slots of a head are divided."""
    attend_kernel, merge_kernel = _kernels()
    (keys, values), (own_keys, own_values) = prompt, answer
    b, h, n_queries, width = q_BHQD.shape
    kv_heads, n_slots = keys.shape[1:3]
    groups = h // kv_heads
    n_rows = groups * n_queries
    rows = max(16, min(ROWS, 1 << (n_rows - 1).bit_length()))
    per_tile = 64 if q_BHQD.element_size() == 2 else 32
    blocks = -(-n_rows // rows)
    splits = splits or splits_for(b * kv_heads * blocks, -(-n_slots // per_tile), q_BHQD.device)
    out = q_BHQD.new_empty(b, n_queries, h, width)
    parts = (b * kv_heads, splits, n_rows) if splits > 1 else (1, 1, 1)
    part_peak, part_total = (torch.empty(parts, dtype=torch.float32, device=q_BHQD.device) for _ in range(2))
    part_sums = torch.empty(*parts, width, dtype=torch.float32, device=q_BHQD.device)
    queries, tensors = _inner_contiguous(q_BHQD), [_inner_contiguous(t) for t in (keys, values, own_keys, own_values)]
    wide = max(16, 1 << (width - 1).bit_length())
    with current(q_BHQD.device):
        attend_kernel[(b * kv_heads, blocks, splits)](
            queries,
            *tensors,
            used.seen_BS,
            used.end_B,
            out,
            part_sums,
            part_peak,
            part_total,
            *queries.stride()[:3],
            *(stride for tensor in tensors for stride in tensor.stride()[:3]),
            used.seen_BS.stride(0),
            n_queries,
            own_keys.shape[2],
            kv_heads,
            groups,
            width**-0.5 * log2(e),
            SPLITS=splits,
            WIDTH=width,
            ROWS=rows,
            KEYS=per_tile,
            WIDE=wide,
        )
        if splits > 1:
            merge_kernel[(b * kv_heads, -(-n_rows // 16))](
                part_sums,
                part_peak,
                part_total,
                out,
                n_queries,
                kv_heads,
                groups,
                SPLITS=splits,
                WIDTH=width,
                ROWS=16,
                WIDE=wide,
            )
    return out


def splits_for(programs: int, tiles: int, device: torch.device) -> int:
    """One program for each multiprocessor, where there are keys enough: docs/results/gpu, "Attention"."""
    return max(1, min(_multiprocessors(device) // programs, tiles, MOST_SPLITS))


def _inner_contiguous(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


@cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def current(device: torch.device) -> Any:
    """Triton launches on the current device, not on that of the tensors."""
    return torch.cuda.device(device if device.type == "cuda" else -1)


@cache
def _kernels() -> tuple[Any, Any]:
    from lavida_adapter.step_triton import attend_kernel, merge_kernel

    return attend_kernel, merge_kernel

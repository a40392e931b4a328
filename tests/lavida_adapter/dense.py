"""A second computation of the language model: one row at a time, with an explicit mask."""

import torch
import torch.nn.functional as F
from torch import Tensor

from lavida_adapter.language_model import LanguageModel


@torch.no_grad()
def dense(
    lm: LanguageModel, embeds: Tensor, may_see: Tensor, positions: Tensor, maps: list[Tensor] | None = None
) -> Tensor:
    """The transformer over one row [L, D] with an explicit mask [L, L]; heads and rotation written out.

    `maps` collects the attention [H, L, L] of every layer.
    """
    x, dh = embeds, lm.config.head_dim
    freq = lm.config.rope_theta ** (-torch.arange(0, dh, 2) / dh)
    turn = torch.polar(torch.ones(len(x), dh // 2), positions[:, None] * freq)

    def heads(y: Tensor) -> Tensor:
        return y.view(len(x), -1, dh).transpose(0, 1)

    def spin(y: Tensor) -> Tensor:
        z = torch.complex(y[..., : dh // 2], y[..., dh // 2 :]) * turn
        return torch.cat([z.real, z.imag], dim=-1)

    def norm(y: Tensor, weight: Tensor) -> Tensor:
        return y / (y.pow(2).mean(-1, keepdim=True) + lm.config.rms_norm_eps).sqrt() * weight

    for block in lm.layers:
        u = norm(x, block.attention_norm.weight)
        q, k, v = spin(heads(block.query(u))), spin(heads(block.key(u))), heads(block.value(u))
        groups = len(q) // len(k)
        scores = q @ k.repeat_interleave(groups, 0).transpose(1, 2) / dh**0.5
        weights = scores.masked_fill(~may_see, -torch.inf).softmax(-1)
        if maps is not None:
            maps.append(weights)
        x = x + block.attention_out((weights @ v.repeat_interleave(groups, 0)).transpose(0, 1).flatten(1))
        u = norm(x, block.mlp_norm.weight)
        x = x + block.down(F.silu(block.gate(u)) * block.up(u))
    return norm(x, lm.final_norm.weight)


def may_see(prompt: int, answer: int, visual: Tensor | None, *, prompt_sees_answer: bool) -> Tensor:
    allowed = torch.ones(prompt + answer, prompt + answer, dtype=torch.bool)
    if not prompt_sees_answer:
        allowed[:prompt, prompt:] = False
    if visual is not None:
        picture = F.pad(visual[:prompt], (0, answer))
        allowed[picture] = picture
    return allowed

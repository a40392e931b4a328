"""The vision tower (a SigLIP transformer without its last layer) and the projector.

docs/lavida.md, "Vision tower". The modules come from transformers. The loop over them is ours, because selectors need
tensors from inside single layers (taps), and only requested taps may cost time and memory.

Shape letters: V views, S pixels a side, n tokens of a view, H heads, D width.
"""

from collections.abc import Collection, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import SiglipVisionConfig
from transformers.models.siglip.modeling_siglip import SiglipAttention, SiglipEncoderLayer, SiglipVisionEmbeddings

from lavida_adapter.config import VisionConfig
from lavida_adapter.language_model import run_block
from shirg import Share, UserError

TAPS = ("keys", "attention", "input", "post_norm", "output")
"""What a layer can record. "keys": its attention keys [V, n, H, D/H]. "attention": the attention that each token
receives within its view, averaged over heads and queries [V, n]. "input": the residual stream before the layer
[V, n, D]. "post_norm": the normed state between attention and MLP [V, n, D]. "output": the residual stream after the
layer [V, n, D]."""


class TowerLayer(SiglipEncoderLayer):
    """A layer of SigLIP that also records what is asked for."""

    def forward(self, x: Tensor, here: Collection[str] = ()) -> tuple[Tensor, dict[str, Tensor]]:
        """The layer's output [V, n, D], and the recordings named in `here`; see `TAPS`."""
        found: dict[str, Tensor] = {}
        h = self.layer_norm1(x)
        if "input" in here:
            found["input"] = x
        if "keys" in here:
            found["keys"] = self.self_attn.k_proj(h).unflatten(-1, (self.self_attn.num_heads, -1))
        if "attention" in here:
            found["attention"] = attention_received(self.self_attn, h)
        x = x + self.self_attn(h)[0]
        h = self.layer_norm2(x)
        if "post_norm" in here:
            found["post_norm"] = h
        x = x + self.mlp(h)
        if "output" in here:
            found["output"] = x
        return x, found


class _Encoder(nn.Module):
    def __init__(self, config: SiglipVisionConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(TowerLayer(config) for _ in range(config.num_hidden_layers))


class _VisionModel(nn.Module):
    """Holds the modules under the names of the published checkpoint; `post_layernorm` is stored but never applied."""

    def __init__(self, config: SiglipVisionConfig) -> None:
        super().__init__()
        self.embeddings = SiglipVisionEmbeddings(config)
        self.encoder = _Encoder(config)
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)


class _Tower(nn.Module):
    def __init__(self, config: SiglipVisionConfig) -> None:
        super().__init__()
        self.vision_model = _VisionModel(config)


class VisionTower(nn.Module):
    """Views [V, 3, S, S] -> token states [V, n, D], the residual stream after the last layer that is built."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        sizes = {**asdict(config), "num_hidden_layers": config.num_hidden_layers - 1, "vision_use_head": False}
        # Only transformers' own loader chooses an attention kernel; without this argument the slow eager one would run.
        self.vision_tower = _Tower(SiglipVisionConfig.from_dict(sizes, attn_implementation="sdpa"))
        self.recompute = False
        """Gradient checkpointing: layers run again in the backward pass instead of storing their activations."""

    @property
    def layers(self) -> Sequence["TowerLayer"]:
        return cast("Sequence[TowerLayer]", self.vision_tower.vision_model.encoder.layers)

    def number_positions(self, device: torch.device) -> None:
        """Makes the numbers of the positions again, which no checkpoint has and the meta device does not hold."""
        positions = torch.arange(self.config.side**2, device=device).expand(1, -1)
        self.vision_tower.vision_model.embeddings.register_buffer("position_ids", positions, persistent=False)

    def forward(self, pixels_V3SS: Tensor, taps: Iterable[str] = ()) -> tuple[Tensor, dict[str, Tensor]]:
        """States, and the recordings named by `taps`.

        A tap is "what@layer". The layer is counted from 0, or from the end if negative; with a decimal point it is a
        share of the depth: of 26 layers, "keys@0.83" is layer 21. For views of another size than the configured one,
        position embeddings are interpolated (bicubic); the stored ones do not change.

        Raises:
            UserError: for a tap that this tower cannot record.
        """
        wanted = {tap: self._parse(tap) for tap in taps}
        recorded: dict[str, Tensor] = {}
        resized = pixels_V3SS.shape[-1] != self.config.image_size
        x = self.vision_tower.vision_model.embeddings(pixels_V3SS, interpolate_pos_encoding=resized)
        # The patches of a convolution lie channel by channel. Every later sum would keep that order, and each norm
        # would copy it.
        x = x.contiguous()
        for i, layer in enumerate(self.layers):
            here = frozenset(what for what, at in wanted.values() if at == i)
            x, found = run_block(self.recompute, layer, x, here)
            # Two spellings of one tap ("keys@2" and "keys@-1") both get an entry.
            recorded |= {tap: found[what] for tap, (what, at) in wanted.items() if at == i}
        return x, recorded

    def _parse(self, tap: str) -> tuple[str, int]:
        what, _, at = tap.partition("@")
        n = len(self.layers)
        try:
            index = int(at) if "." not in at else Share.of(float(at)).down(n) if 0 <= float(at) < 1 else n
        except ValueError:
            index = n  # out of range: the message below covers it
        if what not in TAPS or not -n <= index < n:
            raise UserError(
                f"the vision tower has no tap {tap!r}: use one of {', '.join(TAPS)} with @layer in 0..{n - 1}, "
                "counted from the end if negative, or a share of the depth from 0.0 to below 1.0"
            )
        return what, index % n


def attention_received(attention: SiglipAttention, h_BND: Tensor, chunk: int = 128) -> Tensor:
    """Mean over heads and queries of the attention that each token receives [B, N], float32; in chunks of queries."""
    heads = attention.num_heads
    q, k = (
        proj(h_BND).unflatten(-1, (heads, -1)).transpose(1, 2).float() for proj in (attention.q_proj, attention.k_proj)
    )
    total = torch.zeros(h_BND.shape[:2], device=h_BND.device)
    with in_own_dtype(h_BND.device):
        for part in q.split(chunk, dim=2):
            total += (part @ k.transpose(-1, -2) * attention.scale).softmax(-1).sum(dim=(1, 2))
    return total / (heads * h_BND.shape[1])


def in_own_dtype(device: torch.device) -> AbstractContextManager[Any]:
    """No autocast, which a training with a bfloat16 base runs under: tokens are ranked as in an evaluation."""
    return torch.autocast(device.type, enabled=False)


def build_projector(vision_width: int, lm_width: int) -> nn.Sequential:
    """The projector `mlp2x_gelu`, applied to each token; its linear layers are 0 and 2, as in the checkpoint."""
    return nn.Sequential(nn.Linear(vision_width, lm_width), nn.GELU(), nn.Linear(lm_width, lm_width))

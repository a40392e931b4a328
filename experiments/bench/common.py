"""What the benches share: models, inputs, tables."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from omegaconf import DictConfig
from PIL import Image
from torch import Tensor

from experiments import build
from experiments.profiling import Limits, Work, measure_limits
from experiments.profiling import Timing as Timing
from experiments.profiling import time_call as time_call
from lavida_adapter import LavidaConfig, VisionConfig
from lavida_adapter.views import Views, cut, layout_on, patch_pixels
from lavida_adapter.vision import VisionTower
from shirg import Geometry, VisionFeatures

if TYPE_CHECKING:
    from lavida_adapter import Lavida


def config_of(*overrides: str) -> DictConfig:
    """What eval would be given."""
    return build.compose_eval(*overrides)


def load_model(name: str, device: torch.device, attention: str = "sdpa") -> "Lavida":
    """Weights of a checkpoint, or random ones made on the device itself."""
    return build.build_model(config_of(f"model={name}", f"attention={attention}"), device)


def prompt_embeds(model: "Lavida", batch: int, n: int) -> Tensor:
    """Noise of the size of the model's own word embeddings [B, P, D]: every row different."""
    weight = model.lm.wte.weight
    generator = torch.Generator(weight.device).manual_seed(0)
    noise = torch.randn(batch, n, weight.shape[1], generator=generator, device=weight.device)
    return (noise * weight.float().std()).to(weight.dtype)


@dataclass(frozen=True)
class Floor:
    """What the device cannot beat, and how far from it a time is."""

    limits: Limits

    @classmethod
    def of(cls, device: torch.device, dtype: torch.dtype) -> "Floor":
        return cls(measure_limits(device, dtype))

    def row(self, ms: float, work: Work) -> dict[str, Any]:
        floor = self.limits.floor_ms(work)
        return {"gflop": work.flops / 1e9, "mb": work.bytes / 1e6, "floor_ms": floor, "times_floor": ms / floor}


BOX = (0.30, 0.40, 0.55, 0.45)
"""Where an oracle finds the evidence: as fractions of the picture, a line of print."""


def random_tower(config: LavidaConfig, device: torch.device, dtype: torch.dtype) -> VisionTower:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return VisionTower(config.vision).eval().to(device, dtype)


def noise_picture(config: LavidaConfig) -> Image.Image:
    """Noise that fills the canvas with the most views, so that no token is padding."""
    width, height = max(config.image_grid_pinpoints, key=lambda size: size[0] * size[1])
    noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(noise)


@dataclass(frozen=True)
class Encoded:
    """One picture on one geometry, behind the tower."""

    views: Views
    states_ND: Tensor
    taps: dict[str, Tensor]
    encode: Callable[[], object]
    """The tower's call without recordings, to be timed."""

    def features(self, batch: int) -> VisionFeatures:
        """The picture `batch` times, each time a little different."""
        states_ND, layout = self.states_ND, self.views.layout
        device = states_ND.device
        generator = torch.Generator(device).manual_seed(0)
        noise_BND = torch.randn(batch, *states_ND.shape, device=device, dtype=states_ND.dtype, generator=generator)
        tokens_BND = states_ND + 0.1 * states_ND.std() * noise_BND
        count = self.views.base_count
        return VisionFeatures(
            tokens_BND=tokens_BND,
            layout=layout_on(layout, device),
            valid_BN=self.views.valid_N.to(device).expand(batch, -1).contiguous(),
            picture_B4=torch.tensor([self.views.picture_4] * batch, device=device),
            size_B2=torch.tensor([self.views.size] * batch, device=device),
            ids=tuple(f"picture {i}" for i in range(batch)),
            n_valid=(int(self.views.valid_N.sum()),) * batch,
            relevance_BN=torch.randn(batch, layout.n_tokens, device=device, generator=generator),
            base_count_B=None if count is None else torch.tensor([count] * batch, device=device),
            taps={name: torch.stack([tap] * batch) for name, tap in self.taps.items()} | {"encoder": tokens_BND},
            boxes=((BOX,),) * batch,
        )


def encode_noise(config: LavidaConfig, tower: VisionTower, geometry: Geometry, needs: Iterable[str]) -> Encoded:
    """The noise picture with everything recorded that `needs` names; the recordings come from the tower itself."""
    needs = frozenset(needs)
    weight = next(tower.parameters())
    views = cut(noise_picture(config), config, geometry)
    pixels_V3SS = views.pixels_V3SS.to(weight.device, weight.dtype)
    states_VnD, recorded = tower(pixels_V3SS, needs - {"encoder", "pixels"})
    taps = {name: tap.flatten(0, 1) for name, tap in recorded.items()}
    if "pixels" in needs:
        taps["pixels"] = patch_pixels(views.pixels_V3SS, views.layout).to(weight.device)
    return Encoded(views, states_VnD.flatten(0, 1), taps, lambda: tower(pixels_V3SS))


def square_features(n: int, batch: int, width: int, device: torch.device, dtype: torch.dtype) -> VisionFeatures:
    """Noise on one square view of about `n` tokens, with every recording that a scoring selector may want."""
    side = round(n**0.5)
    config = LavidaConfig(
        vision=VisionConfig(image_size=8 * side, patch_size=8), image_grid_pinpoints=((8 * side, 8 * side),)
    )
    views = cut(Image.new("RGB", (8 * side, 8 * side)), replace(config, image_aspect_ratio="resize"), "lavida_tiles")
    generator = torch.Generator(device).manual_seed(0)
    n_tokens = views.layout.n_tokens
    tokens = torch.randn(batch, n_tokens, width, device=device, generator=generator).to(dtype)
    return VisionFeatures(
        tokens_BND=tokens,
        layout=layout_on(views.layout, device),
        valid_BN=views.valid_N.to(device).expand(batch, -1).contiguous(),
        picture_B4=torch.tensor([views.picture_4] * batch, device=device),
        size_B2=torch.tensor([views.size] * batch, device=device),
        ids=tuple(f"picture {i}" for i in range(batch)),
        n_valid=(n_tokens,) * batch,
        relevance_BN=torch.randn(batch, n_tokens, device=device, generator=generator),
    )


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """One line a row: the first column to the left, the others, numbers, to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *others in rows:
        numbers = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        lines.append("  ".join([first.ljust(widths[0]), *numbers]))
    return lines


def table_title(model: str, shape: Mapping[str, Any]) -> str:
    """The line above a table: what was measured, at which sizes."""
    return f"{model}: " + ", ".join(f"{name} {value}" for name, value in shape.items())


WIDTH, HEIGHT, LEFT, BOTTOM, TOP, RIGHT = 640, 400, 60, 44, 16, 170
COLOURS = ("#1f6f8b", "#c8553d", "#6a994e", "#7b5ea7")


def loglog_chart(xs: Sequence[float], series: Mapping[str, Sequence[float]], x_title: str, y_title: str) -> str:
    """Lines named in a legend at the right; all values must be positive."""
    values = [y for ys in series.values() for y in ys]
    low_x, high_x = math.log10(min(xs)), math.log10(max(xs))
    low_y, high_y = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))

    def at(x: float, y: float) -> tuple[float, float]:
        across = (math.log10(x) - low_x) / (high_x - low_x)
        up = (math.log10(y) - low_y) / (high_y - low_y)
        return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)

    parts = [f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>']
    for decade in range(low_y, high_y + 1):
        (x0, y), (x1, _) = at(min(xs), 10.0**decade), at(max(xs), 1)
        parts.append(f'<line x1="{x0:.1f}" y1="{y:.1f}" x2="{x1:.1f}" y2="{y:.1f}" stroke="#ddd"/>')
        parts.append(_text(LEFT - 8, y + 4, f"{10.0**decade:g}", "end"))
    for x in xs:
        parts.append(_text(at(x, 1)[0], HEIGHT - BOTTOM + 16, f"{x:g}", "middle"))
    for (name, ys), colour in zip(series.items(), COLOURS, strict=False):
        points = [at(x, y) for x, y in zip(xs, ys, strict=True)]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in points]
        parts.append(_text(points[-1][0] + 10, points[-1][1] + 4, name, "start", colour))
    parts.append(_text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 8, x_title, "middle"))
    parts.append(_text(8, TOP - 2, y_title, "start"))
    size = f'width="{WIDTH}" height="{HEIGHT}" viewBox="0 0 {WIDTH} {HEIGHT}"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size}>\n' + "\n".join(parts) + "\n</svg>\n"


def _text(x: float, y: float, text: str, anchor: str, colour: str = "#333") -> str:
    style = f'text-anchor="{anchor}" fill="{colour}" font-family="sans-serif" font-size="12"'
    return f'<text x="{x:.1f}" y="{y:.1f}" {style}>{escape(text)}</text>'

"""What a selector sees at true size: features of a noise picture, from a tower with random weights.

The sizes are the published ones, on LaViDa's own tiles five views and 3645 tokens of width 1152; the content is not.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lavida_adapter import LavidaConfig, VisionConfig
from lavida_adapter.geometries import cut
from lavida_adapter.views import Views, layout_on, patch_pixels
from lavida_adapter.vision import VisionTower
from shirg import Geometry, VisionFeatures

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

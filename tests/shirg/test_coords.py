"""The coordinate embedding: silent at the start, then a function of the box."""

import pytest
import torch

from shirg import ShirgSelector, Source
from shirg.coords import CoordEmbed, sincos
from tests.features import make_features

SMALL = {"scaffold": {"size": 3}}


def test_starts_silent_and_learns_at_once() -> None:
    embed = CoordEmbed(width=6)
    box = torch.rand(2, 3, 4)
    out = embed(box)
    assert out.shape == (2, 3, 6) and bool((out == 0).all())
    out.sum().backward()
    assert embed.linear.weight.grad is not None and float(embed.linear.weight.grad.abs().max()) > 0


def test_features_tell_neighbouring_cells_apart() -> None:
    left = torch.arange(54) / 54
    boxes = torch.stack([left, torch.zeros(54), left + 1 / 54, torch.full((54,), 1 / 54)], dim=-1)[None]
    features = sincos(boxes)[0]
    assert features.shape == (54, 128)
    gaps = torch.cdist(features, features) + torch.eye(54) * 9
    assert float(gaps.min()) > 0.5
    assert torch.equal(features, sincos(boxes)[0])


def test_widths_and_heights_count() -> None:
    box = torch.tensor([[[0.2, 0.2, 0.4, 0.4], [0.1, 0.1, 0.5, 0.5]]])
    features = sincos(box)[0]
    # Same centre, so that the first half of each of sine and cosine agrees; sizes differ.
    assert torch.allclose(features[0].view(4, 32)[:2], features[1].view(4, 32)[:2])
    assert not torch.allclose(features[0].view(4, 32)[2:], features[1].view(4, 32)[2:])


def test_coordinates_start_silent_and_then_count() -> None:
    features = make_features((2, 2))
    plain_gate = ShirgSelector(budget=69, **SMALL)
    gate = ShirgSelector(budget=69, coord_embed="sincos_linear", coord_width=16, newline="row", **SMALL)
    assert [name for name, _ in gate.named_parameters()] == ["coords.linear.weight", "coords.linear.bias"]
    rows = ShirgSelector(budget=69, newline="row", **SMALL)(features)
    assert torch.equal(gate(features).tokens_BTD, rows.tokens_BTD)
    assert gate.coords is not None
    torch.nn.init.normal_(gate.coords.linear.weight, generator=torch.Generator().manual_seed(0))
    moved = gate(features)
    changed = (moved.tokens_BTD != rows.tokens_BTD).any(-1)
    assert torch.equal(changed, moved.mask_BT & (moved.source_BT != int(Source.NEWLINE)))
    assert torch.equal(moved.index_BT, rows.index_BT) and not list(plain_gate.parameters())
    with pytest.raises(ValueError, match="coord_width=8, but the tokens are 16 wide"):
        ShirgSelector(budget=69, coord_embed="sincos_linear", coord_width=8, **SMALL)(features)

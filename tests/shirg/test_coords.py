"""The coordinate embedding: silent at the start, then a function of the box."""

import torch

from shirg.coords import CoordEmbed, sincos


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

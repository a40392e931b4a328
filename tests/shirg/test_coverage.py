"""The scaffold against exact areas."""

import pytest
import torch

from shirg import Source, VisionFeatures
from shirg.dedup import CellAssignment, assign_cells
from shirg.scaffold import scaffold_tokens
from tests.features import SIZES, make_features


def seats(features: VisionFeatures) -> CellAssignment:
    return assign_cells(features.layout, features.valid_BN, features.relevance_BN, "relevance")


def exact(features: VisionFeatures, sample: int, size: int, source: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Means [size * size, D] and used windows, cell by cell, with areas in double precision."""
    layout, n = features.layout, features.layout.n_global
    rows, cols = (layout.side, layout.side) if source == "global" else layout.canvas
    places = layout.order_N[:n] if source == "global" else layout.order_N[n:]
    x = features.tokens_BND[sample, places].double()
    usable = features.valid_BN[sample, places]
    means, used = [], []
    for window in range(size * size):
        top, left = divmod(window, size)
        total, area = torch.zeros(x.shape[-1]).double(), 0.0
        for cell in range(rows * cols):
            r, c = divmod(cell, cols)
            high = min(r + 1, (top + 1) * rows / size) - max(r, top * rows / size)
            wide = min(c + 1, (left + 1) * cols / size) - max(c, left * cols / size)
            if high > 1e-9 and wide > 1e-9 and usable[cell]:
                total, area = total + high * wide * x[cell], area + high * wide
        means.append(total / max(area, 1e-9))
        used.append(area > 0)
    return torch.stack(means), torch.tensor(used)


@pytest.mark.parametrize(
    ("grid", "source", "size"),
    [((2, 2), "global", 4), ((2, 2), "global", 9), ((0, 0), "global", 2), ((2, 2), "canvas", 6), ((1, 3), "canvas", 4)],
)
def test_means_are_exact_areas(grid: tuple[int, int], source: str, size: int) -> None:
    features = make_features(grid, sizes=SIZES[grid], width=3)
    chosen = scaffold_tokens(features, seats(features), size, source)
    for sample in range(3):
        means, used = exact(features, sample, size, source)
        assert torch.equal(chosen.mask_BT[sample], used)
        assert torch.allclose(chosen.tokens_BTD[sample][used].double(), means[used], atol=1e-5)
    assert bool((chosen.source_BT == int(Source.SCAFFOLD)).all()) and bool((chosen.index_BT == -1).all())


def test_a_window_of_padding_is_an_unused_slot() -> None:
    features = make_features((2, 2), sizes=[(768, 300)])
    chosen = scaffold_tokens(features, seats(features), 6, "canvas")
    # Valid are rows 6 to 12 of 18; a window is 3 rows high.
    assert chosen.mask_BT.view(6, 6).tolist() == [[row in (2, 3, 4)] * 6 for row in range(6)]
    assert float(chosen.tokens_BTD[~chosen.mask_BT].abs().max()) == 0


def test_gradient_is_the_share_of_the_window() -> None:
    features = make_features((2, 2), sizes=[(768, 768)], side=8, width=2)
    x = features.tokens_BND.requires_grad_()
    scaffold_tokens(features, seats(features), 4, "global").tokens_BTD[0, 5].sum().backward()
    assert x.grad is not None
    # Window (1, 1) of 4 x 4 over 8 x 8 cells: cells (2..3, 2..3), a quarter each.
    grid = x.grad[0, :64, 0].view(8, 8)
    expected = torch.zeros(8, 8)
    expected[2:4, 2:4] = 0.25
    assert torch.allclose(grid, expected, atol=1e-6)
    assert float(x.grad[0, 64:].abs().max()) == 0


def test_every_token_is_used_once() -> None:
    features = make_features((2, 2), sizes=[(768, 768)], width=1)
    for source, size in (("global", 4), ("canvas", 8)):
        x = features.tokens_BND.detach().clone().requires_grad_()
        chosen = scaffold_tokens(VisionFeatures(**{**vars(features), "tokens_BND": x}), seats(features), size, source)
        chosen.tokens_BTD.sum().backward()
        assert x.grad is not None
        places = features.layout.order_N[:81] if source == "global" else features.layout.order_N[81:]
        share = size * size / len(places)
        assert torch.allclose(x.grad[0, places], torch.full((len(places), 1), share), atol=1e-6)


def test_boxes_partition_the_picture() -> None:
    features = make_features((2, 2), sizes=[(640, 480)], side=27, width=1)
    boxes = scaffold_tokens(features, seats(features), 8, "global").box_BT4[0].view(8, 8, 4)
    assert boxes[0, 0, :2].tolist() == pytest.approx([0, 0], abs=1e-6)
    assert boxes[7, 7, 2:].tolist() == pytest.approx([378 / 384, 378 / 384])
    assert torch.allclose(boxes[:, :-1, 2], boxes[:, 1:, 0]) and torch.allclose(boxes[:-1, :, 3], boxes[1:, :, 1])


@pytest.mark.parametrize(
    ("grid", "source", "most"), [((2, 2), "global", 9), ((1, 3), "canvas", 9), ((0, 0), "canvas", 0)]
)
def test_a_scaffold_finer_than_its_source_is_refused(grid: tuple[int, int], source: str, most: int) -> None:
    features = make_features(grid, sizes=SIZES[grid][:1])
    with pytest.raises(ValueError, match=f"choose at most {most}"):
        scaffold_tokens(features, seats(features), most + 1, source)

"""What baselines share: products of tokens in blocks, and quotas of groups."""

import pytest
import torch

from baselines import UniformGrid, base
from baselines.base import gram, product_strips, products, rows
from shirg import VisionFeatures
from tests.features import make_features
from tests.reference import kept


@pytest.mark.parametrize("block", [1, 3, 7, 100])
def test_gram_is_the_product(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "BLOCK", block)
    x = torch.randn(2, 3, 10, 4, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(gram(x), x @ x.transpose(-1, -2), atol=1e-6)


def test_rows_and_products_by_hand() -> None:
    x = torch.tensor([[[[1.0, 0.0], [0.0, 1.0], [3.0, 4.0]]]])
    assert rows(x, torch.tensor([[[2, 0]]])).tolist() == [[[[3.0, 4.0], [1.0, 0.0]]]]
    used = torch.tensor([[[True, False, True]]])
    assert products(x, x, used, -2.0).tolist() == [[[[1.0, -2.0, 3.0], [0.0, -2.0, 4.0], [3.0, -2.0, 25.0]]]]


@pytest.mark.parametrize("cached", [1, 30, 1000])
def test_strips_are_the_products(cached: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "CACHED", cached)
    a, b = torch.randn(2, 2, 3, 7, 4, generator=torch.Generator().manual_seed(0))
    used = torch.arange(7) < torch.tensor([[7, 3, 5], [1, 0, 6]])[..., None]
    strips = list(product_strips(a, b, used, -2.0))
    assert len(strips) == {1: 7, 30: 7, 1000: 1}[cached]
    expected = (a @ b.transpose(-1, -2)).masked_fill(~used[..., None, :], -2.0)
    torch.testing.assert_close(torch.cat(strips, dim=-2), expected, rtol=0, atol=1e-6)


def kept_of_each(budget: int, features: VisionFeatures) -> list[list[int]]:
    chosen = UniformGrid(budget=budget)(features)
    return [kept(chosen, sample) for sample in range(len(features.ids))]


def test_views_keep_the_same_share_of_what_is_not_padding() -> None:
    features = make_features((2, 2), side=27, sizes=[(768, 768), (640, 480)], width=4)
    for sample, index in enumerate(kept_of_each(300, features)):
        valid = features.layout.view_N[features.valid_BN[sample]].bincount(minlength=5).double()
        counts = features.layout.view_N[index].bincount(minlength=5).double()
        assert float((counts - 300 * valid / valid.sum()).abs().max()) < 1
    assert features.layout.view_N[kept_of_each(1200, features[:1])[0]].bincount().tolist() == [240] * 5

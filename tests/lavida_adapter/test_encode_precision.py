"""A training with a bfloat16 base ranks tokens as an evaluation does: its autocast does not reach the selectors."""

from collections.abc import Iterator

import pytest
import torch
from PIL import Image

from baselines import Pooled
from experiments.bench.captured_selectors import PRUNERS
from lavida_adapter import Lavida, LmEmbed
from shirg import Selector
from tests.lavida_adapter.tiny import noise, tiny_model

SIDE = 40


@pytest.fixture(scope="module")
def model() -> Iterator[Lavida]:
    yield tiny_model(vision={"hidden_size": 64}).to(torch.bfloat16)


def picture(seed: int) -> Image.Image:
    pixels = (noise(SIDE, SIDE, 3, seed=seed).sigmoid() * 255).to(torch.uint8)
    return Image.fromarray(pixels.numpy())


@pytest.mark.parametrize("kind", [Pooled, *PRUNERS])
def test_the_kept_tokens_do_not_depend_on_autocast(model: Lavida, kind: type[Selector]) -> None:
    selector = kind() if kind is Pooled else kind(budget=20)
    relevance = LmEmbed() if selector.uses_relevance else None
    pictures = [picture(seed) for seed in range(3)]
    kept = []
    for enabled in (False, True):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            prefix = model.encode(pictures, ["What is it?"] * 3, selector, relevance=relevance)
        kept.append(torch.cat([one.index_BT for one in prefix.selections]))
    assert torch.equal(*kept)

"""Answers that begin with a draft: their gaps are filled and their text stays."""

import pytest
import torch

from baselines import Pooled
from lavida_adapter import DecodeConfig
from lavida_adapter.generate import start
from tests.lavida_adapter.tiny import SIZES, picture, tiny_model

MASK = tiny_model().config.lm.mask_token_id


def test_every_row_starts_with_its_own_draft() -> None:
    drafts = [(3, MASK, 1), (), (2, 2)]
    ids_BA = start(3, DecodeConfig(max_new_tokens=4), MASK, drafts, torch.device("cpu"))
    assert ids_BA.tolist() == [[3, MASK, 1, MASK], [MASK] * 4, [2, 2, MASK, MASK]]


@pytest.mark.parametrize("cached", [True, False])
def test_drafts_of_a_batch_give_what_each_gives_alone(cached: bool) -> None:
    model, questions = tiny_model(), ["digit red", "letter", "how many shapes are there?"]
    drafts = [(31, MASK, MASK, 32, MASK, 33), (), (40, 41, MASK, MASK)]
    images, decode = [picture(size) for size in SIZES[:3]], DecodeConfig(max_new_tokens=6, prefix_cache=cached)
    together = model.generate(model.encode(images, questions, Pooled()), decode, drafts=drafts)
    assert (together.forwards, together.steps) == (6, (3, 6, 4))
    for i, draft in enumerate(drafts):
        prefix = model.encode(images[i : i + 1], questions[i : i + 1], Pooled())
        ids = together.ids_BA[i].tolist()
        assert ids == model.generate(prefix, decode, drafts=[draft]).ids_BA[0].tolist()
        assert all(found == token for found, token in zip(ids, draft, strict=False) if token != MASK)
        assert MASK not in ids
        assert bool(draft) == (ids != model.generate(prefix, decode).ids_BA[0].tolist())

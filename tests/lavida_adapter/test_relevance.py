"""Relevance against a loop over tokens and words; what it must not depend on."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from lavida_adapter.relevance import External, LmEmbed, NoRelevance, RelevanceContext
from shirg import VisionFeatures
from tests.features import make_features
from tests.lavida_adapter.tiny import noise

N, D, WIDE = 45, 8, 12
QUESTIONS = [torch.tensor([3, 1, 4, 1]), torch.tensor([5])]


@pytest.fixture
def features() -> VisionFeatures:
    """Two pictures, one of them with letterbox padding."""
    return make_features((2, 2), side=3, sizes=((60, 40), (40, 40)), tokens=noise(2, N, D))


@pytest.fixture
def embedding() -> nn.Embedding:
    table = nn.Embedding(20, WIDE)
    with torch.no_grad():
        table.weight.copy_(noise(20, WIDE, seed=1) + 0.5)
    return table


def context(embedding: nn.Embedding, projected: Tensor | None = None, questions: Any = QUESTIONS) -> RelevanceContext:
    table = noise(2, N, WIDE, seed=2) + 1 if projected is None else projected
    return RelevanceContext(lambda: table, questions, embedding)


def cosine(a: Tensor, b: Tensor) -> float:
    return (a @ b / a.norm() / b.norm()).item()


@pytest.mark.parametrize("agg", ["mean", "max", "pooled"])
def test_lm_embed_against_a_loop(features: VisionFeatures, embedding: nn.Embedding, agg: Any) -> None:
    assert not features.valid_BN.all()
    given = context(embedding)
    found = LmEmbed(agg=agg)(features, given)
    words = embedding.weight.detach()
    for b in range(2):
        p = given.projected()[b]
        centre = p[features.valid_BN[b]].mean(0)
        q = words[QUESTIONS[b]] - words.mean(0)
        for n in range(N):
            if agg == "pooled":
                expected = cosine(p[n] - centre, q.mean(0))
            else:
                each = [cosine(p[n] - centre, word) for word in q]
                expected = max(each) if agg == "max" else sum(each) / len(each)
            assert found[b, n].item() == pytest.approx(expected, abs=1e-5)


def test_aggregations_differ_for_several_words_and_agree_for_one(
    features: VisionFeatures, embedding: nn.Embedding
) -> None:
    found = [LmEmbed(agg=agg)(features, context(embedding)) for agg in ("mean", "max", "pooled")]
    for other in found[1:]:
        assert (found[0][0] - other[0]).abs().max() > 1e-2
        torch.testing.assert_close(found[0][1], other[1])


@pytest.mark.parametrize("agg", ["mean", "max", "pooled"])
def test_lm_embed_does_not_depend_on_scale_order_or_a_common_shift(
    features: VisionFeatures, embedding: nn.Embedding, agg: Any
) -> None:
    """Longer vectors, a reordered question, and an offset of all tokens (the modality gap) change nothing."""
    projected = noise(2, N, WIDE, seed=2) + 1
    plain = LmEmbed(agg=agg)(features, context(embedding, projected))
    reordered = [q.flip(0) for q in QUESTIONS]
    torch.testing.assert_close(LmEmbed(agg=agg)(features, context(embedding, projected * 7)), plain)
    torch.testing.assert_close(LmEmbed(agg=agg)(features, context(embedding, projected, reordered)), plain)
    shifted = context(embedding, projected + 5 * noise(WIDE, seed=3))
    torch.testing.assert_close(LmEmbed(agg=agg)(features, shifted), plain, rtol=0, atol=1e-5)
    scaled = nn.Embedding.from_pretrained(embedding.weight.detach() * 100)
    torch.testing.assert_close(LmEmbed(agg=agg)(features, context(scaled, projected)), plain)
    asked = context(embedding, projected, [torch.tensor([9]), torch.tensor([9])])
    assert (LmEmbed(agg=agg)(features, asked) - plain).abs().max() > 0.1


def test_lm_embed_finds_the_token_that_shows_the_word(features: VisionFeatures, embedding: nn.Embedding) -> None:
    projected = 0.1 * noise(2, N, WIDE, seed=2)
    projected[0, 17] += embedding.weight[5].detach() - embedding.weight.mean(0).detach()
    found = LmEmbed()(features, context(embedding, projected, [torch.tensor([5]), torch.tensor([5])]))
    assert found[0].argmax() == 17


def test_lm_embed_is_float32_whatever_the_model_is(features: VisionFeatures, embedding: nn.Embedding) -> None:
    half = nn.Embedding.from_pretrained(embedding.weight.detach().to(torch.bfloat16))
    found = LmEmbed()(features, context(half, (noise(2, N, WIDE, seed=2) + 1).to(torch.bfloat16)))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, LmEmbed()(features, context(embedding)), rtol=0, atol=0.02)


def test_lm_embed_needs_a_question(features: VisionFeatures, embedding: nn.Embedding) -> None:
    empty = [QUESTIONS[0], torch.tensor([], dtype=torch.int64)]
    with pytest.raises(ValueError, match="relevance=lm_embed needs a question.*use relevance=none"):
        LmEmbed()(features, context(embedding, questions=empty))
    with pytest.raises(ValueError, match="relevance.agg='sum': choose mean, max or pooled"):
        LmEmbed(agg="sum")  # type: ignore[arg-type]  # what is tested


def test_no_relevance_is_distance_from_the_mean(features: VisionFeatures, embedding: nn.Embedding) -> None:
    found = NoRelevance()(features, context(embedding, questions=[]))
    for b in range(2):
        x = features.tokens_BND[b]
        mean = x[features.valid_BN[b]].mean(0)
        expected = torch.tensor([1 - cosine(row, mean) for row in x])
        torch.testing.assert_close(found[b], expected, rtol=0, atol=1e-5)


def test_external_reads_a_file_and_a_mapping(features: VisionFeatures, embedding: nn.Embedding, tmp_path: Path) -> None:
    scores = {sample: noise(N, seed=i).to(torch.float64) for i, sample in enumerate((*features.ids, "another"))}
    save_file(scores, tmp_path / "scores.safetensors")
    expected = torch.stack([scores[i] for i in features.ids]).float()
    for provider in (External(path=tmp_path / "scores.safetensors"), External(scores=scores)):
        assert torch.equal(provider(features, context(embedding)), expected)


def test_external_errors(features: VisionFeatures, embedding: nn.Embedding, tmp_path: Path) -> None:
    given = context(embedding)
    first, second = features.ids
    with pytest.raises(ValueError, match=f"no scores for sample '{second}'"):
        External(scores={first: noise(N)})(features, given)
    with pytest.raises(ValueError, match=rf"scores of sample '{second}' have shape \(44,\), its canvas has 45 tokens"):
        External(scores={first: noise(N), second: noise(44)})(features, given)
    for wrong in ({}, {"path": tmp_path, "scores": {}}):
        with pytest.raises(ValueError, match="relevance=external needs relevance.path"):
            External(**wrong)
    with pytest.raises(FileNotFoundError, match="relevance.path=.*: no such file"):
        External(path=tmp_path / "absent.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"not a tensor file")
    with pytest.raises(ValueError, match="is not a readable safetensors file"):
        External(path=tmp_path / "broken.safetensors")


def test_spaces_are_named() -> None:
    assert (NoRelevance.space, LmEmbed.space, External.space) == ("encoder", "lm", "external")


def test_lm_embed_looks_at_a_picture_once(features: VisionFeatures, embedding: nn.Embedding) -> None:
    """Three questions about two pictures give what they give one by one."""
    rows, table = [0, 1, 0], noise(2, N, WIDE, seed=2) + 1
    asked = (QUESTIONS[0], QUESTIONS[1], QUESTIONS[1])
    many = replace(
        features,
        valid_BN=features.valid_BN[rows],
        ids=("a", "b", "c"),
        picture_at=(0, 1, 0),
    )
    found = LmEmbed()(many, context(embedding, table[rows], asked))
    assert torch.equal(found, LmEmbed()(replace(many, picture_at=None), context(embedding, table[rows], asked)))
    assert not torch.equal(found[0], found[2]), "the question decides"

"""Relevance against a loop over tokens and words, what it must not depend on; and by a whole tiny random SigLIP."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import SiglipConfig, SiglipModel, SiglipTextConfig, SiglipVisionConfig

from lavida_adapter import External, Lavida, LmEmbed, NoRelevance, RelevanceContext, SiglipText
from lavida_adapter.relevance import mean_row
from shirg import ShirgSelector, VisionFeatures, cosine_relevance, saliency
from tests.features import make_features
from tests.lavida_adapter.tiny import noise, picture, tiny_model, tokenizer

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


def test_the_mean_word_is_computed_once_and_again_after_a_change(
    features: VisionFeatures, embedding: nn.Embedding, monkeypatch: pytest.MonkeyPatch
) -> None:
    given, provider, computed = context(embedding), LmEmbed(), []

    def counted(weight: Tensor) -> Tensor:
        computed.append(weight)
        return mean_row(weight)

    monkeypatch.setattr("lavida_adapter.relevance.mean_row", counted)
    for _ in range(2):
        provider(features, given)
    assert len(computed) == 1
    with torch.no_grad():
        embedding.weight[:5] += 1
    found = provider(features, given)
    assert len(computed) == 2
    torch.testing.assert_close(found, LmEmbed()(features, given))


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


def test_plain_functions_compute_what_the_providers_do(features: VisionFeatures, embedding: nn.Embedding) -> None:
    given, words = context(embedding), embedding.weight.detach()
    questions = [words[ids] for ids in QUESTIONS]
    found = cosine_relevance(
        given.projected(), questions, agg="max", valid=features.valid_BN, text_centre=words.mean(0)
    )
    assert torch.equal(found, LmEmbed(agg="max")(features, given))
    assert torch.equal(saliency(features.tokens_BND, features.valid_BN), NoRelevance()(features, given))


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


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SigLIP of the tiny model's sizes, with its last layer, head and text tower."""
    place = tmp_path_factory.mktemp("siglip")
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2}
    vision = SiglipVisionConfig(**sizes, image_size=20, patch_size=6)
    text = SiglipTextConfig(
        **sizes, vocab_size=len(tokenizer()), max_position_embeddings=8, projection_size=16, pad_token_id=0
    )
    with torch.random.fork_rng():
        torch.manual_seed(3)
        siglip = SiglipModel(SiglipConfig(vision_config=vision.to_dict(), text_config=text.to_dict()))
        for weight in siglip.parameters():
            torch.nn.init.normal_(weight, std=0.3)
    siglip.save_pretrained(place)
    words = tokenizer()
    words.save_pretrained(place)
    return place


@pytest.fixture
def provider(folder: Path) -> SiglipText:
    return SiglipText(path=folder)


def model_of(provider: SiglipText) -> Lavida:
    """The tiny model with SigLIP's own tower, without the last layer."""
    model = tiny_model()
    given = provider.siglip.vision_model.state_dict()
    tower = model.model.vision_tower.vision_tower.vision_model
    tower.load_state_dict({name: given[name] for name in tower.state_dict()})
    return model


def asking(model: Lavida, *texts: str) -> RelevanceContext:
    return RelevanceContext(lambda: torch.empty(0), [], model.lm.embedding, texts, model.model.vision_tower)


def test_of_one_token_it_is_siglips_own_similarity(provider: SiglipText) -> None:
    """With one patch a view, the head has nothing to average: the token's value is the pooled picture feature."""
    model = model_of(provider)
    features = make_features((1, 2), side=1, sizes=[(40, 20)], tokens=noise(1, 3, 16))
    found = provider(features, asking(model, "digit red"))
    assert found.shape == (1, 3) and found.dtype == torch.float32
    vision = provider.siglip.vision_model
    ids = tokenizer()(["digit red"], padding="max_length", max_length=8, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        text = provider.siglip.get_text_features(input_ids=ids).pooler_output
        for i in range(3):
            state = vision.encoder.layers[-1](features.tokens_BND[:, i : i + 1], attention_mask=None)
            pooled = vision.head(vision.post_layernorm(state))
            assert float(found[0, i]) == pytest.approx(float(torch.cosine_similarity(pooled, text)), abs=1e-5)


def test_views_are_independent_and_questions_matter(provider: SiglipText) -> None:
    model = model_of(provider)
    features = make_features((1, 2), side=3, sizes=[(40, 20)], tokens=noise(1, 27, 16))
    here = provider(features, asking(model, "digit red"))
    assert not torch.allclose(here, provider(features, asking(model, "letter K")))
    tokens = features.tokens_BND.clone()
    tokens[0, 20, :8] += 1  # not all channels: a norm would not see that
    there = provider(replace(features, tokens_BND=tokens), asking(model, "digit red"))
    assert torch.equal(here[:, :18], there[:, :18]) and not torch.allclose(here[:, 18:], there[:, 18:])


def test_the_model_hands_over_questions_and_tower(provider: SiglipText) -> None:
    model = model_of(provider)
    selector = ShirgSelector(budget=12, scaffold={"size": 0})
    image = picture((40, 40))
    first, second = (
        model.encode([image], [question], selector, relevance=provider).selections[0].scores_BN
        for question in ("digit red", "letter K")
    )
    assert first is not None and second is not None and not torch.equal(first, second)


def test_every_provider_says_whether_it_reads_the_question(provider: SiglipText) -> None:
    reads = {SiglipText: True, LmEmbed: True, NoRelevance: False, External: False}
    assert provider.reads_question and all(kind.reads_question == does for kind, does in reads.items())


def test_a_tower_that_is_not_siglips_is_refused(provider: SiglipText, folder: Path) -> None:
    features = make_features((1, 2), side=3, sizes=[(40, 20)], tokens=noise(1, 27, 16))
    with pytest.raises(ValueError, match=r"patch_embedding.weight of the model's tower is .* away .*tolerance=0.1"):
        provider(features, asking(tiny_model(), "digit red"))
    with pytest.raises(ValueError, match="tower has num_hidden_layers=4, the SigLIP at relevance.path has 3"):
        provider(features, asking(tiny_model(vision={"num_hidden_layers": 4}), "digit red"))
    moved = model_of(provider)
    with torch.no_grad():
        moved.model.vision_tower.vision_tower.vision_model.embeddings.patch_embedding.weight.mul_(1.05)
    assert provider(features, asking(moved, "digit red")).isfinite().all()
    with pytest.raises(ValueError, match="tolerance=0.01"):
        SiglipText(path=folder, tolerance=0.01)(features, asking(moved, "digit red"))
    with pytest.raises(ValueError, match=r"Context\.tower is None"):
        provider(features, RelevanceContext(lambda: torch.empty(0), [], moved.lm.embedding, ("digit red",)))

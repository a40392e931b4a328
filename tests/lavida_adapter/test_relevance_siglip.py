"""Relevance by a whole SigLIP: a tiny random one, whose tower is also the model's."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import SiglipConfig, SiglipModel, SiglipTextConfig, SiglipVisionConfig

from lavida_adapter import Lavida
from lavida_adapter.relevance import RelevanceContext, SiglipText
from shirg import ShirgSelector
from tests.features import make_features
from tests.lavida_adapter.tiny import noise, picture, tiny_model, tokenizer


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


def context(model: Lavida, *texts: str) -> RelevanceContext:
    return RelevanceContext(lambda: torch.empty(0), [], model.lm.wte, texts, model.model.vision_tower)


def test_of_one_token_it_is_siglips_own_similarity(provider: SiglipText) -> None:
    """With one patch a view, the head has nothing to average: the token's value is the pooled picture feature."""
    model = model_of(provider)
    features = make_features((1, 2), side=1, sizes=[(40, 20)], tokens=noise(1, 3, 16))
    found = provider(features, context(model, "digit red"))
    assert found.shape == (1, 3) and found.dtype == torch.float32
    vision = provider.siglip.vision_model
    ids = tokenizer()(["digit red"], padding="max_length", max_length=8, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        text = provider.siglip.get_text_features(input_ids=ids).pooler_output
        for i in range(3):
            state = vision.encoder.layers[-1](features.tokens_BND[:, i : i + 1], attention_mask=None)
            pooled = vision.head(vision.post_layernorm(state))
            assert float(found[0, i]) == pytest.approx(float(torch.cosine_similarity(pooled, text)), abs=1e-5)


def test_views_are_strangers_and_questions_matter(provider: SiglipText) -> None:
    model = model_of(provider)
    features = make_features((1, 2), side=3, sizes=[(40, 20)], tokens=noise(1, 27, 16))
    here = provider(features, context(model, "digit red"))
    assert not torch.allclose(here, provider(features, context(model, "letter K")))
    tokens = features.tokens_BND.clone()
    tokens[0, 20, :8] += 1  # not all channels: a norm would not see that
    there = provider(replace(features, tokens_BND=tokens), context(model, "digit red"))
    assert torch.equal(here[:, :18], there[:, :18]) and not torch.allclose(here[:, 18:], there[:, 18:])


def test_the_model_hands_over_questions_and_tower(provider: SiglipText) -> None:
    model = model_of(provider)
    gate = ShirgSelector(budget=12, scaffold={"size": 0})
    image = picture((40, 40))
    first, second = (
        model.encode([image], [question], gate, relevance=provider).selections[0].scores_BN
        for question in ("digit red", "letter K")
    )
    assert first is not None and second is not None and not torch.equal(first, second)


def test_a_tower_that_is_not_siglips_is_refused(provider: SiglipText, folder: Path) -> None:
    features = make_features((1, 2), side=3, sizes=[(40, 20)], tokens=noise(1, 27, 16))
    with pytest.raises(ValueError, match=r"patch_embedding.weight of the model's tower is .* away .*tolerance=0.1"):
        provider(features, context(tiny_model(), "digit red"))
    with pytest.raises(ValueError, match="tower has num_hidden_layers=4, the SigLIP at relevance.path has 3"):
        provider(features, context(tiny_model(vision={"num_hidden_layers": 4}), "digit red"))
    moved = model_of(provider)
    with torch.no_grad():
        moved.model.vision_tower.vision_tower.vision_model.embeddings.patch_embedding.weight.mul_(1.05)
    assert provider(features, context(moved, "digit red")).isfinite().all()
    with pytest.raises(ValueError, match="tolerance=0.01"):
        SiglipText(path=folder, tolerance=0.01)(features, context(moved, "digit red"))
    with pytest.raises(ValueError, match=r"Context\.tower is None"):
        provider(features, RelevanceContext(lambda: torch.empty(0), [], moved.lm.wte, ("digit red",)))


def test_bad_paths_and_tolerances(folder: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no SigLIP checkpoint"):
        SiglipText(path=folder / "none")
    with pytest.raises(ValueError, match="give a number >= 0"):
        SiglipText(path=folder, tolerance=-1)

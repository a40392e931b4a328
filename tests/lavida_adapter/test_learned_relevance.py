"""The files of a relevance head: what comes back, what is refused; the provider against its parts."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lavida_adapter import Lavida, LmEmbed, LoraConfig, NoRelevance, Relevance, RelevanceContext, add_lora, merge_lora
from lavida_adapter.learned_relevance import META, WEIGHTS, Learned, holds_head
from lavida_adapter.relevance import mean_row
from shirg.relevance_head import question_vector
from tests.features import make_features
from tests.lavida_adapter.tiny import noise, tiny_model
from tests.refusals import assert_says, message_of


def trained(model: Lavida, base: Relevance | None = None, **options: Any) -> Learned:
    learned = Learned(base=base)
    head = learned.fresh(model, {"hidden": 4} | options)
    with torch.no_grad():
        for i, p in enumerate(head.parameters()):
            p.copy_(noise(*p.shape, seed=40 + i) if p.ndim else torch.tensor(0.7))
    head.standardise_by([noise(30, model.config.vision.hidden_size, seed=3) + 1])
    return learned


def context(model: Lavida) -> RelevanceContext:
    table = noise(2, 45, model.config.lm.d_model, seed=2)
    return RelevanceContext(lambda: table, [torch.tensor([3, 1, 4]), torch.tensor([5])], model.lm.embedding)


@pytest.mark.parametrize("base", [None, LmEmbed(agg="max"), NoRelevance()], ids=["alone", "lm_embed", "saliency"])
@pytest.mark.parametrize("question", [True, False])
def test_what_is_saved_comes_back(base: Relevance | None, question: bool, tmp_path: Path) -> None:
    model = tiny_model()
    learned = trained(model, base, question=question)
    features = make_features((2, 2), side=3, sizes=((60, 40), (40, 40)), tokens=noise(2, 45, 16))
    before = learned(features, context(model))
    learned.save(tmp_path, model)
    assert sorted(path.name for path in tmp_path.iterdir()) == [META, WEIGHTS]
    again = Learned(base=base)
    again.load(tmp_path, model)
    torch.testing.assert_close(again(features, context(model)), before.detach(), rtol=1e-6, atol=1e-5)
    assert again.reads_question == (question or (base is not None and base.reads_question))
    assert not any(p.requires_grad for p in again.head.parameters())


def test_the_provider_is_the_head_of_its_parts() -> None:
    model = tiny_model()
    learned, given = trained(model, LmEmbed()), context(model)
    features = make_features((2, 2), side=3, sizes=((60, 40), (40, 40)), tokens=noise(2, 45, 16))
    words = [model.lm.embedding(ids) for ids in given.questions]
    asked = question_vector(words, mean_row(model.lm.embedding.weight))
    expected = learned.head(features.tokens_BND, features.valid_BN, asked, LmEmbed()(features, given))
    assert torch.equal(learned(features, given), expected)


def test_a_head_fits_its_base_after_an_adapter_was_merged(tmp_path: Path) -> None:
    model = tiny_model()
    trained(model).save(tmp_path, model)
    add_lora(model, LoraConfig(rank=2, targets=("mm_projector.0",), train_whole=("image_newline",)))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.add_(0.1)
    Learned().load(tmp_path, model)
    merge_lora(model)
    Learned().load(tmp_path, model)


def tensor(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        change(tensors)
        save_file(tensors, folder / WEIGHTS)

    return damage


def meta(**changes: Any) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (folder / META).write_text(json.dumps(json.loads((folder / META).read_text()) | changes))

    return damage


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda folder: (folder / WEIGHTS).unlink(), "holds no relevance head (relevance.json and"),
    "torn": (lambda folder: (folder / WEIGHTS).write_bytes(b"{"), "cannot be read ... train it again"),
    "no JSON": (lambda folder: (folder / META).write_text("["), "cannot be read"),
    "no mapping": (lambda folder: (folder / META).write_text("[1]"), "cannot be read"),
    "no sizes": (meta(head={"hidden": 3}), "relevance.json lacks sizes"),
    "strange option": (
        meta(head={"states": 16, "words": 32, "rnk": 3}),
        "cannot be read ... unexpected keyword argument 'rnk'",
    ),
    "huge": (meta(head={"states": 16, "words": 32, "hidden": 10**9}), "head.hidden=1000000000: give a whole number"),
    "NaN": (tensor(lambda t: t["match_DW"].fill_(float("nan"))), "has NaN, infinity ... in match_DW"),
    "whole numbers": (tensor(lambda t: t.update(mean_D=t["mean_D"].long())), "whole numbers in mean_D"),
    "another width": (
        meta(head={"states": 17, "words": 32, "hidden": 4, "question": True, "base": False}),
        "are not those of a head for states of width 16 and words of width 32",
    ),
    "a tensor less": (tensor(lambda t: t.pop("std_D")), "are not those of a head"),
    "another family": (meta(family="dream"), "was trained on another base checkpoint"),
    "another relevance": (meta(residual_on="LmEmbed (agg=max)"), "corrects LmEmbed (agg=max), and relevance.base is"),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_damaged_heads_are_refused_in_one_sentence(kind: str, tmp_path: Path) -> None:
    model = tiny_model()
    trained(model).save(tmp_path, model)
    damage, said = DAMAGES[kind]
    damage(tmp_path)
    assert_says(message_of(partial(Learned().load, tmp_path, model)), said)


def test_heads_of_another_model_are_refused(tmp_path: Path) -> None:
    model = tiny_model()
    trained(model).save(tmp_path, model)
    load = partial(Learned().load, tmp_path, tiny_model(seed=1))
    assert_says(message_of(load), "was trained on another base checkpoint: load that one (model.path=)")
    assert_says(message_of(lambda: Learned().head), "relevance=learned has no head yet")


def test_saving_replaces_a_head(tmp_path: Path) -> None:
    model = tiny_model()
    trained(model).save(tmp_path, model)
    second = trained(model, question=False)
    second.save(tmp_path, model)
    again = Learned()
    again.load(tmp_path, model)
    assert not again.head.reads_question and holds_head(tmp_path)

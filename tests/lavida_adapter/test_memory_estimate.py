"""The memory of a step that is counted without memory, against what autograd really keeps."""

from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from lavida_adapter import Lavida, LoraConfig, ObjectiveConfig, TrainBatch, add_lora
from lavida_adapter.memory_estimate import Shape, footprint, kept_bytes
from lavida_adapter.prompt import training_example
from shirg import ShirgSelector
from tests.lavida_adapter.tiny import picture, tiny_config, tiny_model, tokenizer

LAYERS = "vision_tower.vision_tower.vision_model.encoder.layers"
TOWER = LoraConfig(rank=2, targets=("mm_projector.0", LAYERS + ".0.self_attn.{q_proj,k_proj}"))
LANGUAGE = LoraConfig(rank=2, targets=("transformer.blocks.*.q_proj",))
LANGUAGE_DREAM = LoraConfig(rank=2, targets=("transformer.layers.*.self_attn.q_proj",))
Family = Literal["llada", "dream"]
BATCH = TrainBatch([picture((40, 40), seed=i) for i in range(3)], ["digit red"] * 3, ["7"] * 3, list("abc"))


def sizes(family: Family = "llada") -> dict[str, Any]:
    """Dream here has two heads for keys and values, LLaDA four."""
    lm = {"family": family, "d_model": 64, "mlp_hidden_size": 160, "n_layers": 3}
    return {"lm": lm, "vision": {"hidden_size": 32}}


def real(family: Family, lora: LoraConfig, objective: ObjectiveConfig, recompute: bool) -> int:
    model = tiny_model(**sizes(family))
    add_lora(model, lora)
    model.checkpoint_gradients(recompute)
    own = {p.untyped_storage()._cdata for p in model.parameters()}
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        if (storage := tensor.untyped_storage())._cdata not in own:
            kept[storage._cdata] = storage.nbytes()
        return tensor

    selector = ShirgSelector(budget=20, scaffold={"size": 2}, weights={"similarity": 0})
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = model.loss(BATCH, selector, objective, torch.Generator().manual_seed(0))
    assert loss.requires_grad
    return sum(kept.values())


def counted(lora: LoraConfig, objective: ObjectiveConfig, recompute: bool, family: Family = "llada") -> int:
    with torch.device("meta"):
        model = Lavida(tiny_config(**sizes(family)), tokenizer())
        add_lora(model, lora)
    model.checkpoint_gradients(recompute)
    prompt, answer = text()
    shape = Shape(rows=3, views=5, view_px=20, projected=20, picture=20, prompt=prompt, answer=answer)
    return footprint(model, shape, objective, torch.float32).kept


def text() -> tuple[int, int]:
    example = training_example(tokenizer(), BATCH.questions[0], BATCH.answers[0], tiny_config())
    return len(example.prompt) - 1, len(example.answer)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("prefix_mask", [False, True])
@pytest.mark.parametrize(
    ("family", "lora"),
    [("llada", TOWER), ("llada", LANGUAGE), ("dream", TOWER), ("dream", LANGUAGE_DREAM)],
    ids=["llada tower", "llada language", "dream tower", "dream language"],
)
def test_what_is_counted_is_what_is_kept(family: Family, lora: LoraConfig, prefix_mask: bool, recompute: bool) -> None:
    objective = ObjectiveConfig(extra_padding=0, prefix_mask=prefix_mask)
    expected = real(family, lora, objective, recompute)
    assert counted(lora, objective, recompute, family) == pytest.approx(expected, rel=0.1)


def test_a_frozen_tower_keeps_nothing_and_one_copy_half() -> None:
    both = ObjectiveConfig(extra_padding=0)
    seen = 3 * 5 * 9 * 32 * 4  # one state of every token of every view
    assert counted(TOWER, both, False) - counted(LANGUAGE, both, False) > 5 * seen
    single = ObjectiveConfig(extra_padding=0, complementary=False)
    assert counted(LANGUAGE, single, False) == pytest.approx(counted(LANGUAGE, both, False) / 2, rel=0.1)


def test_checkpointing_keeps_less_and_runs_a_block_again() -> None:
    found = []
    for recompute in (False, True):
        with torch.device("meta"):
            model = Lavida(tiny_config(**sizes()), tokenizer())
            add_lora(model, TOWER)
        model.checkpoint_gradients(recompute)
        shape = Shape(rows=3, views=5, view_px=20, projected=20, picture=20, prompt=30, answer=8)
        found.append(footprint(model, shape, ObjectiveConfig(), torch.float32))
        assert model.lm.recompute is recompute
    plain, less = found
    logits = 3 * 8 * len(tokenizer()) * (4 + 4)
    assert plain.passing == logits
    assert less.kept < 0.5 * plain.kept and less.kept + less.passing < plain.kept


def test_parameters_are_not_counted_and_a_storage_once() -> None:
    layer = torch.nn.Linear(6, 5, bias=False, device="meta")
    x = torch.empty(4, 6, device="meta", requires_grad=True)
    assert kept_bytes(layer, lambda: layer(x).sum()) == 4 * 6 * 4
    assert kept_bytes(layer, lambda: (layer(x) + layer(x[:2].repeat(2, 1))).sum()) == 2 * 4 * 6 * 4
    assert kept_bytes(layer, lambda: (layer(x) + layer(x.view(4, 6))).sum()) == 4 * 6 * 4

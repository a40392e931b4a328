"""Ranks that are added while training: nothing changes at that moment, and the new ones learn from then on."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from baselines import Pooled
from lavida_adapter import Lavida, LoraConfig, ObjectiveConfig, add_lora, load_adapter, save_adapter
from lavida_adapter.lightning_module import LavidaModule
from lavida_adapter.lora import Growth, RankGrowth, lora_layers, rank_growth
from tests.lavida_adapter.test_lora import logits, loss
from tests.lavida_adapter.test_module import OPTIM, fit
from tests.lavida_adapter.tiny import tiny_model

pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec", "ignore:Be aware that when using `ckpt_path`")
CONFIG = LoraConfig(
    rank=8, targets=("mm_projector.{0,2}", "transformer.blocks.*.q_proj"), grow=Growth(start=2, patience=3, gain=0.5)
)


def grown(config: LoraConfig = CONFIG) -> tuple[Lavida, RankGrowth]:
    model = tiny_model()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        add_lora(model, config)
    growth = rank_growth(config, model)
    assert growth is not None
    return model, growth


def columns(model: Lavida) -> dict[str, Tensor]:
    """The largest number in each column of every B [r]."""
    return {n: layer.lora_B["default"].weight.detach().abs().amax(0) for n, layer in lora_layers(model)}


def train(model: Lavida, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        loss(model).backward()
        optimizer.step()


def test_growing_changes_nothing_and_then_the_new_ranks_learn() -> None:
    model, growth = grown()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05, weight_decay=0.1)
    train(model, optimizer, 3)
    assert all(c[:2].min() > 0 and c[2:].max() == 0 for c in columns(model).values())
    before = logits(model)
    growth.best = 1.0
    assert growth.decide(mean=0.9) and growth.rank == 4
    assert torch.equal(logits(model), before)
    train(model, optimizer, 2)
    assert all(c[:4].min() > 0 and c[4:].max() == 0 for c in columns(model).values())
    assert not torch.equal(logits(model), before)


def test_few_ranks_learn_what_a_small_adapter_learns() -> None:
    """The first two of eight are an adapter of rank two with the same A and the same scale."""
    model, _ = grown()
    small = tiny_model()
    add_lora(small, LoraConfig(rank=2, targets=CONFIG.targets))
    for (_, big), (_, little) in zip(lora_layers(model), lora_layers(small), strict=True):
        assert big.scaling == little.scaling == {"default": 2.0}
        with torch.no_grad():
            little.lora_A["default"].weight.copy_(big.lora_A["default"].weight[:2])
    for m in (model, small):
        train(m, torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], lr=0.05, weight_decay=0.0), 3)
    torch.testing.assert_close(logits(model), logits(small), rtol=0, atol=1e-5)


def test_when_ranks_are_added() -> None:
    growth = RankGrowth(Growth(start=2, patience=2, gain=0.1), most=6, factors_B=[])
    means = [growth.observe(torch.tensor(x)) for x in (4.0, 2.0, 2.0, 2.0, 3.0, 2.5)]
    assert means == [None, 3.0, None, 2.0, None, 2.75]
    decided = [(growth.decide(mean), growth.rank) for mean in (3.0, 2.0, 1.9, 1.7, 1.6, 1.5)]
    #           the first   better        5 % is not   10.5 % of 1.9 is    not           not: 6 is the most
    assert decided == [(False, 2), (False, 2), (True, 4), (False, 4), (True, 6), (True, 6)]
    assert growth.observe(torch.tensor(1.0)) is None


def test_growth_survives_a_stop(tmp_path: Path) -> None:
    from lightning.pytorch.callbacks import ModelCheckpoint

    def module() -> LavidaModule:
        model, growth = grown()
        return LavidaModule(
            model.train(), Pooled(), None, ObjectiveConfig(extra_padding=0), OPTIM, seed=3, growth=growth
        )

    whole, first, second = module(), module(), module()
    fit(whole, 6)
    keeper = ModelCheckpoint(tmp_path, save_last=True, save_top_k=0, every_n_train_steps=4)
    fit(first, 4, enable_checkpointing=True, callbacks=[keeper])
    fit(second, 6, resume=tmp_path / "last.ckpt")
    assert whole.growth is not None and second.growth is not None
    assert whole.growth.state_dict() == second.growth.state_dict()
    assert whole.growth.rank > 2
    for (name, a), (_, b) in zip(columns(whole.model).items(), columns(second.model).items(), strict=True):
        assert torch.equal(a, b), name


def test_a_grown_adapter_is_saved_with_all_its_ranks(tmp_path: Path) -> None:
    model, _ = grown()
    train(model, torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5), 2)
    save_adapter(model, CONFIG, tmp_path)
    again = tiny_model()
    assert load_adapter(again, tmp_path) == CONFIG
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("knobs", [{"start": 0}, {"patience": 0}, {"gain": 1.0}, {"gain": -0.1}])
def test_impossible_growth(knobs: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="lora.grow=.*give a rank and a number of steps of at least 1"):
        Growth(**knobs)
    with pytest.raises(ValueError, match="lora.grow.start=8: give a rank below lora.rank=8"):
        LoraConfig(rank=8, targets=("mm_projector.0",), grow=Growth(start=8))

"""Ranks that join during training: which columns learn, when they join, and that all processes decide alike."""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

from lavida_adapter import Lavida, LoraConfig, ObjectiveConfig, add_lora
from lavida_adapter.lightning_module import LavidaModule
from lavida_adapter.lora import lora_layers, rank_growth
from lavida_adapter.lora_growth import Growth, RankGrowth
from tests.lavida_adapter.test_lora import logits, train
from tests.lavida_adapter.tiny import tiny_model
from tests.lavida_adapter.training_runs import QUIET, draw, fit, stage

GROWING = LoraConfig(
    rank=8, targets=("mm_projector.{0,2}", "transformer.blocks.*.q_proj"), grow=Growth(start=2, patience=3, gain=0.5)
)


def growing(config: LoraConfig = GROWING) -> tuple[Lavida, RankGrowth]:
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


def adam(model: Lavida, weight_decay: float = 0.0) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05, weight_decay=weight_decay)


def test_growing_changes_nothing_and_then_the_new_ranks_learn() -> None:
    model, growth = growing()
    optimizer = adam(model, weight_decay=0.1)
    train(model, 3, optimizer)
    assert all(c[:2].min() > 0 and c[2:].max() == 0 for c in columns(model).values())
    before = logits(model)
    growth.best = 1.0
    assert growth.decide(mean=0.9) and growth.rank == 4
    assert torch.equal(logits(model), before)
    train(model, 2, optimizer)
    assert all(c[:4].min() > 0 and c[4:].max() == 0 for c in columns(model).values())
    assert not torch.equal(logits(model), before)


def test_few_ranks_learn_what_a_small_adapter_learns() -> None:
    """The first two of eight are an adapter of rank two with the same A and the same scale."""
    model, _ = growing()
    small = tiny_model()
    add_lora(small, LoraConfig(rank=2, targets=GROWING.targets))
    for (_, big), (_, little) in zip(lora_layers(model), lora_layers(small), strict=True):
        assert big.scaling == little.scaling == {"default": 2.0}
        with torch.no_grad():
            little.lora_A["default"].weight.copy_(big.lora_A["default"].weight[:2])
    for m in (model, small):
        train(m, 3, adam(m))
    torch.testing.assert_close(logits(model), logits(small), rtol=0, atol=1e-5)


def test_when_ranks_are_added() -> None:
    growth = RankGrowth(Growth(start=2, patience=2, gain=0.1), [nn.Parameter(torch.zeros(5, r)) for r in (4, 6, 1)])
    means = [growth.observe(torch.tensor(x)) for x in (4.0, 2.0, 2.0, 2.0, 3.0, 2.5)]
    assert means == [None, 3.0, None, 2.0, None, 2.75]
    decided = [(growth.decide(mean), growth.rank) for mean in (3.0, 2.0, 1.9, 1.7, 1.6, 1.5)]
    #           the first   better        5 % is not   10.5 % of 1.9 is    not           not: 6 is the most
    assert decided == [(False, 2), (False, 2), (True, 4), (False, 4), (True, 6), (True, 6)]
    assert growth.observe(torch.tensor(1.0)) is None


@pytest.mark.parametrize(("projector", "others"), [(16, 4), (3, 8)])
def test_a_part_with_its_own_rank_grows_to_it(projector: int, others: int) -> None:
    """The largest rank is the end of growth, whichever part has it."""
    model, growth = growing(replace(GROWING, rank=others, ranks={"mm_projector": projector}))
    most = max(projector, others)
    optimizer = adam(model)
    for rank in (2, 4, 8, 16):
        growth.best = 0.0
        assert growth.rank == min(rank, most) and growth.complete is (rank >= most)
        train(model, 2, optimizer)
        for name, column_R in columns(model).items():
            assert len(column_R) == (projector if "mm_projector" in name else others)
            assert column_R[:rank].min() > 0 and column_R[rank:].sum() == 0, (name, rank)
        growth.decide(mean=1.0)


def test_growth_that_cannot_grow_is_refused() -> None:
    fewer = replace(GROWING, ranks={"mm_projector": 2, "transformer": 1})
    sentence = (
        "lora.grow.start=2: no layer has more than 2 ranks, so nothing would grow; give a smaller start, or no grow"
    )
    with pytest.raises(ValueError, match=sentence):
        growing(fewer)
    with pytest.raises(ValueError, match="lora.grow.start=8: give a rank below lora.rank=8"):
        LoraConfig(rank=8, targets=GROWING.targets, grow=Growth(start=8))


@pytest.mark.parametrize("wrong", [{"start": 0}, {"patience": 0}, {"gain": 1.0}, {"gain": -0.1}], ids=str)
def test_numbers_that_growth_refuses(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"lora.grow=.*give a rank and a number of steps of at least 1"):
        Growth(**wrong)


def module() -> LavidaModule:
    made = stage(GROWING, objective=ObjectiveConfig(extra_padding=0), seed=3)
    made.growth = rank_growth(GROWING, made.model)
    return made


def state(of: LavidaModule) -> dict[str, Any]:
    assert of.growth is not None
    return of.growth.state_dict()


@QUIET
def test_growth_survives_a_stop(tmp_path: Path) -> None:
    whole, first, second = (module() for _ in range(3))
    fit(whole, 6)
    keeper = ModelCheckpoint(tmp_path, save_last=True, save_top_k=0, every_n_train_steps=4)
    fit(first, 4, enable_checkpointing=True, callbacks=[keeper])
    fit(second, 6, resume=tmp_path / "last.ckpt")
    assert whole.growth is not None and second.growth is not None
    assert whole.growth.state_dict() == second.growth.state_dict()
    assert whole.growth.rank > 2
    for (name, a), (_, b) in zip(columns(whole.model).items(), columns(second.model).items(), strict=True):
        assert torch.equal(a, b), name


WORLD = 2


@QUIET
def test_processes_grow_alike_and_as_if_they_had_not_stopped(tmp_path: Path) -> None:
    """Stopped in the middle of a sum, of which the checkpoint has one for all processes."""
    mp.spawn(_grow, args=(tmp_path,), nprocs=WORLD)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(WORLD))
    losses = [a - b for a, b in zip(first["losses"], second["losses"], strict=True)]
    assert len(losses) == 6 and min(map(abs, losses)) > 0.01, "the processes have losses of their own"
    means = [(a + b) / WORLD for a, b in zip(first["losses"], second["losses"], strict=True)]
    stored = torch.load(tmp_path / "last.ckpt", weights_only=True)["growth"]
    assert (stored["rank"], stored["seen"]) == (2, 1)
    assert stored["best"] == pytest.approx(sum(means[:3]) / 3, abs=1e-6)
    assert stored["total"] == pytest.approx(means[3], abs=1e-6)
    assert first["whole"] == second["whole"] == first["resumed"] == second["resumed"]
    assert first["whole"]["rank"] == 4
    for name, column_R in first["columns"].items():
        assert torch.equal(column_R, second["columns"][name]), name


def _grow(rank: int, folder: Path) -> None:
    """Six steps, and four, from whose checkpoint two more are made, in one of two processes."""
    torch.set_num_threads(1)
    os.environ["LOCAL_RANK"] = str(rank)
    store = dist.FileStore(str(folder / "store"), WORLD)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=WORLD)

    def run(trained: LavidaModule, steps: int, **options: Any) -> list[float]:
        shared: dict[str, Any] = {"devices": WORLD, "strategy": "ddp", "plugins": [LightningEnvironment()]}
        return fit(trained, steps, batches=lambda step: draw(10 * rank + step), **shared, **options)

    whole, stopped, resumed = (module() for _ in range(3))
    losses = run(whole, 6)
    keeper = ModelCheckpoint(folder, save_last=True, save_top_k=0, every_n_train_steps=4)
    run(stopped, 4, enable_checkpointing=True, callbacks=[keeper])
    run(resumed, 6, resume=folder / "last.ckpt")
    found = {"losses": losses, "whole": state(whole), "resumed": state(resumed), "columns": columns(resumed.model)}
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()

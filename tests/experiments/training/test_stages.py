"""The notes' recipes: what they train of the published model, and that every layer of it learns."""

import json
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig
from torch import Tensor, nn

from baselines import EvenContext
from experiments import build
from experiments.data.loader import collate
from experiments.data.synthetic.glyphs import SynthGlyphs
from experiments.jobs.distributed import Ranks
from experiments.schema import CONF, VERSION_BASE
from experiments.sweeps import system_of
from experiments.training.multi_budget import build_schedule
from experiments.training.plan import FourCharacters, skeleton
from experiments.training.stages import build_stage, lora_config
from lavida_adapter import Lavida, TrainBatch, add_lora, merge_lora
from lavida_adapter.lightning_module import LavidaModule
from lavida_adapter.lora import lora_layers, part_of, trained_parameters
from shirg import Selector, ShirgSelector
from tests.experiments.conftest import Here, result_of

OF_DREAM = {"lm_lora_dream"}
"""In test_dream_recipes.py."""
RECIPES = sorted({path.stem for path in (CONF / "recipe").glob("*.yaml")} - {"none"} - OF_DREAM)
TOWER = "vision_tower.vision_tower.vision_model.encoder.layers"
COUNTS = {
    # part: trained parameters and layers of the published model. LoRA on n inputs and m outputs has rank (n + m).
    "shirg_980": {"mm_projector": (64 * (1152 + 4096), 1), "vision_tower": (64 * 2304 * 8, 8)},
    "shirg_672": {
        "mm_projector": (128 * (1152 + 4096 + 4096 + 4096), 2),
        "vision_tower": (128 * 2304 * 24, 24),
        "selector": (16 * (128 + 1152), 1),
    },
    "shirg_fixed": {"mm_projector": (64 * (5248 + 8192), 2), "vision_tower": (64 * 2304 * 12, 12)},
    "shirg_x": {
        "mm_projector": (64 * (5248 + 8192), 2),
        "vision_tower": (64 * 2304 * 12, 12),
        "selector": (8 * (128 + 1152), 1),
    },
    "mixed_ratio": {"mm_projector": (16 * (5248 + 8192), 2)},
    "fovea": {"mm_projector": (64 * (5248 + 8192), 2), "vision_tower": (64 * 2304 * 16, 16)},
    "full_projector": {"mm_projector": (1152 * 4096 + 4096 + 4096 * 4096 + 4096, 2)},
    "lm_lora": {"transformer": (16 * 8192 * 64, 64)},
}
MILLIONS = {"shirg_980": 1.52, "shirg_672": 8.82, "shirg_fixed": 2.63, "fovea": 3.22, "full_projector": 21.5}
"""What docs/method.md says; SHIRG-672 has 8.80 without its coordinates."""


@cache
def composed(*overrides: str) -> DictConfig:
    with initialize_config_dir(str(CONF), version_base=VERSION_BASE, job_name="train"):
        return compose("train", list(overrides))


def recipe(name: str, *overrides: str) -> DictConfig:
    small = ("objective=tiny", "batch_size=4", "device=cpu", "data.qa_per_image=2")
    return composed(f"recipe={name}", *small, *overrides)


def prepared(name: str) -> tuple[LavidaModule, TrainBatch]:
    """The recipe's own stage on the tiny model, and its first batch, cut for the selector of its first step."""
    cfg = recipe(name)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        found = build_stage(cfg, build.build_model(cfg, torch.device("cpu")), Ranks())
    assert isinstance(found.module, LavidaModule)
    found.module.model.train()
    return found.module, found.draw(0)


def test_every_recipe_is_listed() -> None:
    assert RECIPES == sorted(COUNTS)
    others = {"tiny", "progressive", "tiny_dream"} | OF_DREAM
    assert set(COUNTS) | others == {path.stem for path in (CONF / "lora").glob("*.yaml")}


@pytest.mark.parametrize("name", RECIPES)
def test_parameters_of_the_published_model(name: str) -> None:
    cfg = composed(f"recipe={name}", "model=lavida_8b")
    model = skeleton(cfg)
    assert isinstance(model.tokenizer, FourCharacters)
    assert sum(p.numel() for p in model.parameters()) == 8_433_894_944
    selector = build.build_selector(cfg, model.config.budgets, model.config)
    with torch.device("meta"):
        found = add_lora(model, lora_config(cfg), selector)
    assert {f.part: (f.parameters, f.modules) for f in found} == COUNTS[name]
    total = sum(p.numel() for p in (*model.parameters(), *selector.parameters()) if p.requires_grad)
    assert total == sum(f.parameters for f in found)
    if name in MILLIONS:
        assert total / 1e6 == pytest.approx(MILLIONS[name], abs=0.005)
    layers = {n.removeprefix("model.") for n, _ in lora_layers(model)}
    if "vision_tower" in COUNTS[name]:
        deepest = {"shirg_980": 3, "shirg_fixed": 3, "shirg_x": 3, "shirg_672": 7, "fovea": 7}[name]
        assert f"{TOWER}.{deepest}.self_attn.q_proj" in layers
        assert f"{TOWER}.{deepest + 1}.self_attn.q_proj" not in layers
        assert (f"{TOWER}.0.self_attn.v_proj" in layers) is (name in ("shirg_672", "shirg_fixed", "shirg_x"))


def test_numbers_can_be_changed() -> None:
    cfg = composed("recipe=shirg_672", "model=lavida_8b", "lora.rank=32", "lora.ranks.selector=4", "optim.lr=1e-5")
    model = skeleton(cfg)
    with torch.device("meta"):
        found = add_lora(model, lora_config(cfg), build.build_selector(cfg, model.config.budgets, model.config))
    assert {f.part: f.rank for f in found} == {"mm_projector": 32, "vision_tower": 32, "selector": 4}
    assert {layer.scaling["default"] for _, layer in lora_layers(model)} == {2.0}
    assert cfg.optim.lr == 1e-5 and lora_config(composed("lora=progressive", "lora.grow.start=4")).grow is not None
    assert lora_config(composed("recipe=shirg_fixed", "model=lavida_8b")).scale == 0.5


def logits(module: LavidaModule) -> Tensor:
    """What the model says of four questions through the recipe's selector."""
    model, selector = module.model.eval(), module.selector
    dataset = SynthGlyphs(split="val", n=4, density="sparse", qa_per_image=2)
    batch = collate([dataset[i] for i in range(4)])
    with torch.no_grad():
        prefix = model.encode(batch.images, batch.questions, selector, relevance=module.relevance)
        masks = model.lm.embedding(torch.full((len(batch.ids), 3), model.config.lm.mask_token_id))
        return model.lm.logits(model.lm.decode(masks, model.prefill(prefix)))


def loss(module: LavidaModule, batch: TrainBatch) -> Tensor:
    return module.loss(batch, torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", RECIPES)
def test_every_layer_of_a_recipe_learns_and_the_base_does_not(name: str) -> None:
    module, batch = prepared(name)
    untouched = recipe(name)
    base = build.build_model(untouched, torch.device("cpu"))
    plain = build.build_selector(untouched, base.config.budgets, base.config)
    own = LavidaModule(base, plain, module.relevance, module.objective, module.optim, 0)
    before = logits(own)
    assert torch.equal(logits(module), before)  # a fresh adapter changes nothing

    module.model.train()
    loss(module, batch).backward()
    layers = [n for n, _ in lora_layers(module)]
    assert bool(layers) is (name != "full_projector")
    for name_, parameter in module.named_parameters():
        if "lora_A" in name_:
            assert parameter.grad is not None and parameter.grad.abs().max() == 0, name_
        elif parameter.requires_grad:
            assert parameter.grad is not None and parameter.grad.abs().max() > 0, name_
        else:
            assert parameter.grad is None, name_
    optimizer = module.configure_optimizers()["optimizer"]  # type: ignore[index]  # a dict here
    optimizer.step()
    optimizer.zero_grad()
    loss(module, batch).backward()
    for name_, parameter in module.named_parameters():
        assert (parameter.grad is not None and parameter.grad.abs().max() > 0) == parameter.requires_grad, name_
    kept = {n.replace(".base_layer", ""): p for n, p in module.model.named_parameters() if not p.requires_grad}
    assert all(torch.equal(p, kept[n]) for n, p in base.named_parameters() if n in kept)

    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(1)
        for _, layer in lora_layers(module):
            nn.init.normal_(layer.lora_B["default"].weight, std=0.02)
    unmerged = logits(module)
    assert (unmerged - before).abs().max() > (1e-2 if layers else 0)
    merge_lora(module.model, module.selector)
    torch.testing.assert_close(logits(module), unmerged, rtol=1e-5, atol=1e-5)
    assert not any("lora" in n for n, _ in module.named_parameters())


def tiny_counts(module: LavidaModule) -> list[tuple[str, int]]:
    """Layers that a recipe adapts of the tiny model: as many of a part as the published one, in three vision layers."""
    parts = [part_of(n) for n, _ in lora_layers(module)]
    return [(part, parts.count(part)) for part in dict.fromkeys(parts)]


@pytest.mark.parametrize(
    ("name", "layers"),
    [
        ("shirg_980", {"mm_projector": 1, "vision_tower": 2}),
        ("shirg_672", {"mm_projector": 2, "vision_tower": 3, "selector": 1}),
        ("fovea", {"mm_projector": 2, "vision_tower": 2}),
        ("lm_lora", {"transformer": 6}),
    ],
)
def test_a_share_of_three_layers_is_the_first_one(name: str, layers: dict[str, int]) -> None:
    assert dict(tiny_counts(prepared(name)[0])) == layers


@pytest.mark.parametrize("name", RECIPES)
def test_rank_zero_is_the_untouched_model(name: str) -> None:
    cfg = recipe(name)
    model = build.build_model(cfg, torch.device("cpu"))
    config = replace(lora_config(cfg), rank=0, ranks={}, grow=None)
    selector = build.build_selector(cfg, model.config.budgets, model.config)
    state = {n: p.clone() for n, p in model.named_parameters()}
    if name == "full_projector":
        assert [f.rank for f in add_lora(model, config, selector)] == [None]
    else:
        with pytest.raises(ValueError, match="lora: nothing would be trained"):
            add_lora(model, config, selector)
    assert not list(lora_layers(model, selector))
    assert all(torch.equal(p, state[n]) for n, p in model.named_parameters()) and len(state) == 88


def budgets_of(cfg: DictConfig, model: Lavida) -> list[list[tuple[str, Any]]]:
    mix = build_schedule(cfg, model, build.build_selector(cfg, model.config.budgets, model.config))
    assert mix is not None
    return [[(s.geometry, s.budget) for s in turn] for turn in mix.turns]


def test_one_adapter_for_four_budgets() -> None:
    found = budgets_of(cfg := composed("recipe=mixed_ratio", "model=lavida_8b"), skeleton(cfg))
    assert found == [[("lavida_tiles", b) for b in (None, 1025, 769, 513)]]


@pytest.mark.parametrize(("name", "whole", "smaller"), [("shirg_672", 1216, 684), ("shirg_fixed", 768, 432)])
def test_two_resolutions_in_turn(name: str, whole: int, smaller: int) -> None:
    """A smaller picture keeps the same share: 36 x 36 of 48 x 48 tokens."""
    found = budgets_of(cfg := composed(f"recipe={name}", "model=lavida_8b"), skeleton(cfg))
    assert found == [[("single_512", smaller)], [("single_672", whole)]]


def test_variants_share_the_layers_that_are_trained() -> None:
    module, _ = prepared("shirg_x")
    assert module.mix is not None and isinstance(module.selector, ShirgSelector)
    variants: list[Selector] = [s for turn in module.mix.turns for s in turn]
    assert len(variants) == 2 and all(
        s.coords is module.selector.coords for s in variants if isinstance(s, ShirgSelector)
    )


def test_a_context_trains_the_layers_of_the_selector_under_their_own_names() -> None:
    cfg = recipe("shirg_x", "context=even")
    model = build.build_model(cfg, torch.device("cpu"))
    found = build_stage(cfg, model, Ranks())
    assert isinstance(found.module, LavidaModule) and isinstance(found.module.selector, EvenContext)
    module, plain = found.module, prepared("shirg_x")[0]
    assert trained_parameters(model, module.selector).keys() == trained_parameters(plain.model, plain.selector).keys()
    assert module.mix is not None
    for (variant,) in module.mix.turns:
        assert isinstance(variant, EvenContext) and variant.evidence == 0.5
        assert dict(variant.inner.named_children()) == dict(module.selector.inner.named_children())
    loss(module, found.draw(0)).backward()
    assert all(p.grad is not None for p in trained_parameters(model, module.selector).values())


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (
            ["context=even", "selector.adaptive.mode=head", "lora.train_whole=[selector.head]"],
            "trains at its own levels: leave context=none",
        ),
        (["selector=pooled", "mix.budgets=[40]"], "mix.budgets: this selector has no budget"),
        (["selector=saint", "mix.geometries=[single_512]"], "mix.geometries: this selector supports one geometry"),
        (
            ["selector=shirg", "mix.geometries=[single_511]"],
            "selector.geometry='single_511' is not one of lavida_tiles",
        ),
        (["recipe=shirg_x", "mix.budgets=[pooled]"], "mix.budgets: pooled gives the selector's own layers"),
        (["selector.adaptive.mode=head", "lora.train_whole=[selector.head]"], "has to be trained: give objective.adap"),
        (["selector.adaptive.mode=head", "mix.budgets=[40]", "lora.train_whole=[selector.head]"], "leave mix. empty"),
        (["selector.adaptive.mode=head", "objective.adaptive_k=0.1"], "a layer of its own .* selector.head.linear"),
        (["stage=base", "selector.coord_embed=sincos_linear", "selector.coord_width=auto"], "stage=base saves the"),
    ],
)
def test_mixes_that_cannot_be(overrides: list[str], sentence: str) -> None:
    cfg = composed("device=cpu", *overrides)
    with pytest.raises(ValueError, match=sentence):
        build_stage(cfg, build.build_model(cfg, torch.device("cpu")), Ranks())


def test_a_recipe_says_how_to_evaluate_it() -> None:
    assert system_of(["recipe=shirg_x", "optim.steps=2"]) == [
        "selector=shirg_x",
        "selector.coord_embed=sincos_linear",
        "selector.coord_width=auto",
        "relevance.agg=max",
    ]
    mine = ["selector=shirg_v2", "recipe=mixed_ratio", "relevance.agg=mean", "data=folder", "selector.budget=1/2 base"]
    assert system_of(mine) == ["selector=shirg_v2", "relevance.agg=mean", "selector.budget=1/2 base"]


def test_what_a_recipe_trained_is_evaluated(
    train_here: Here, eval_here: Here, capfd: pytest.CaptureFixture[str]
) -> None:
    """Coordinates in the selector, two resolutions in turn: from training to a row, in the words that were printed."""
    common = ("recipe=shirg_672", "objective=tiny", "batch_size=4", "optim.steps=2", "study=s")
    folder = train_here(*common, "data.qa_per_image=2")
    stored = json.loads((folder / "adapter" / "adapter.json").read_text())["lora"]
    assert stored["ranks"] == {"selector": 16}
    words = system_of(list(common))
    row = result_of(eval_here(*words, f"adapter={folder / 'adapter'}", "data.n=6", "limit=6", "study=s"))
    assert row["status"] == "ok" and row["selector"]["budget"] == 99
    assert row["model"]["trainable_parameters"] == result_of(folder)["training"]["trainable_parameters"]
    failed = eval_here("selector=shirg_672", f"adapter={folder / 'adapter'}", "data.n=6", "study=s", ok=False)
    assert "a layer of a selector that this one does not have" in capfd.readouterr().err and not failed.exists()

"""Every YAML composes, says what the code says, and is built."""

import inspect
import re
import shlex
from dataclasses import MISSING, fields, replace
from enum import Enum
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ValueType
from hydra.utils import get_class
from omegaconf import DictConfig, OmegaConf

from experiments import build, schema
from experiments.schema import CONF, VERSION_BASE, describe_groups
from lavida_adapter import (
    DecodeConfig,
    DreamConfig,
    LanguageModelConfig,
    LavidaConfig,
    LladaConfig,
    LoraConfig,
    ObjectiveConfig,
)
from lavida_adapter.lightning_module import OptimConfig
from lavida_adapter.relevance_training import SubsetConfig

PLUG_INS = ("selector", "context", "relevance", "data", "cache", "logger")
BUDGETS = {"base": 80, "wide": 100, "full": 320}


def options() -> list[tuple[str, str]]:
    """Every option of every group; sweeps are command lines, which test_shorthand.py composes."""
    return sorted((path.parent.name, path.stem) for path in CONF.glob("*/*.yaml") if path.parent.name != "sweep")


def commands_of(group: str, option: str = "") -> list[str]:
    """The entry points whose defaults have the group; an experiment is for those that its first comment runs."""
    found = []
    for name in ("eval", "train"):
        defaults = OmegaConf.load(CONF / f"{name}.yaml")["defaults"]
        if any(isinstance(entry, DictConfig) and group in entry for entry in defaults):
            if group != "experiment" or f"{name}.py" in (CONF / group / f"{option}.yaml").read_text():
                found.append(name)
    return found


def composed(name: str, *overrides: str) -> DictConfig:
    with initialize_config_dir(str(CONF), version_base=VERSION_BASE, job_name=name):
        return compose(name, list(overrides))


@pytest.mark.parametrize(("group", "option"), options())
def test_every_option_composes(group: str, option: str) -> None:
    commands = commands_of(group, option)
    assert commands, f"conf/{group} belongs to no entry point"
    for name in commands:
        cfg = composed(name, f"{group}={option}")
        assert isinstance(cfg, DictConfig)
        schema_fields = {f.name for f in fields(schema.Eval if name == "eval" else schema.Train)}
        assert set(cfg) == schema_fields


@pytest.mark.parametrize(("group", "option"), [o for o in options() if o[0] in PLUG_INS])
def test_plug_ins_have_the_knobs_and_defaults_of_their_constructors(group: str, option: str) -> None:
    file = OmegaConf.to_container(OmegaConf.load(CONF / group / f"{option}.yaml"))
    assert isinstance(file, dict)
    if "_target_" not in file:
        # A variant changes another option of its group; tests/test_contract.py compares its options.
        assert (option == "none" and group in ("logger", "cache", "context")) or (
            group == "selector" and file["defaults"] in (["shirg", "_self_"], ["topv", "_self_"])
        )
        return
    parameters = inspect.signature(get_class(str(file["_target_"]))).parameters
    options = {str(k): v for k, v in file.items() if k not in ("_target_", "defaults")}
    if group != "logger":
        assert options.keys() <= parameters.keys()
    if group in ("selector", "context", "relevance", "cache"):
        # What is given by a caller or by a group of its own.
        made = {"external": {"scores"}, "learned": {"base"}, "even": {"selector"}}.get(option, set())
        assert options.keys() == parameters.keys() - made
        for name, value in options.items():
            default = parameters[name].default
            default = list(default) if isinstance(default, tuple) else default
            if value not in ("${budget}", "${seed}") and default not in (inspect.Parameter.empty, None):
                assert value == default, f"{group}={option}: {name} is {value} in the file and {default} in the code"


@pytest.mark.parametrize("option", sorted(path.stem for path in (CONF / "selector").glob("*.yaml")))
@pytest.mark.parametrize("budget", ["base", "wide", "matched", "77"])
def test_selectors_are_built_with_the_budget_of_the_model(option: str, budget: str) -> None:
    cfg = composed("eval", f"selector={option}", f"budget={budget}")
    selector = build.build_selector(cfg, BUDGETS)
    own = OmegaConf.to_container(OmegaConf.load(CONF / "selector" / f"{option}.yaml"))
    assert isinstance(own, dict)
    if own.get("budget", "${budget}") != "${budget}":
        assert selector.budget == build.resolve_budget(own["budget"], BUDGETS) != 77
        common = composed("eval", f"selector={option}", f"budget={budget}", "selector.budget=${budget}")
        assert build.build_selector(common, BUDGETS).budget == build.resolve_budget(common.budget, BUDGETS)
    elif "budget" in cfg.selector:
        assert selector.budget == {"base": 80, "wide": 100, "matched": "matched", "77": 77}[budget]
    else:
        assert selector.budget is None


ABLATIONS = sorted(path.stem for path in (CONF / "ablation").glob("*.yaml"))


@pytest.mark.parametrize("option", ABLATIONS)
def test_each_ablation_changes_shirg_and_is_built(option: str) -> None:
    whole, ablated = (composed("eval", "selector=shirg", f"ablation={name}") for name in ("none", option))
    build.build_relevance(ablated, build.build_selector(ablated, BUDGETS))
    changed = {key for key in whole if whole[key] != ablated[key]}
    # What the default does not have cannot be taken from it.
    assert changed == (
        set() if option in ("none", "no_coord") else {option.split("_")[0]} & {"relevance"} or {"selector"}
    )


def test_ablations_go_with_other_variants_and_the_command_line_has_the_last_word() -> None:
    cfg = composed("eval", "selector=shirg_x", "ablation=no_scaffold")
    assert build.build_selector(cfg, BUDGETS).budget == 74 and cfg.selector.scaffold.size == 0
    cfg = composed("eval", "ablation=sign_flip", "selector.neighbour.sign=-1")
    assert cfg.selector.neighbour.sign == -1
    cfg = composed("eval", "ablation=sign_flip", "selector=random")
    with pytest.raises(ValueError, match="selector.neighbour: Random has no such option; it has budget, seed"):
        build.build_selector(cfg, BUDGETS)


@pytest.mark.parametrize("option", ["none", "lm_embed"])
def test_relevance_is_built_for_the_selectors_that_ask(option: str) -> None:
    cfg = composed("eval", f"relevance={option}", "selector=shirg")
    shirg = build.build_selector(cfg, BUDGETS)
    assert build.build_relevance(cfg, shirg) is not None
    cfg = composed("eval", f"relevance={option}", "selector=random")
    assert build.build_relevance(cfg, build.build_selector(cfg, BUDGETS)) is None


@pytest.mark.parametrize(
    ("mirror", "original", "unused"),
    [
        (schema.Decode, DecodeConfig, {"keep_history"}),
        (schema.Objective, ObjectiveConfig, set()),
        (schema.Optim, OptimConfig, set()),
        (schema.Lora, LoraConfig, set()),
        (schema.Subsets, SubsetConfig, set()),
    ],
)
def test_the_typed_spine_mirrors_the_adapter(mirror: type, original: type, unused: set[str]) -> None:
    ours = {f.name: f for f in fields(mirror) if f.name != "subsets"}
    theirs = {f.name: f for f in fields(original)}
    assert ours.keys() == theirs.keys() - unused
    for name in ours.keys() - {"max_new_tokens"}:
        default = ours[name].default
        if theirs[name].default is not MISSING and default is not MISSING and default != "???":
            assert (default.value if isinstance(default, Enum) else default) == theirs[name].default, name


@pytest.mark.parametrize(
    ("name", "family", "shape"), [("small", "llada", (0, 4, 4)), ("small_dream", "dream", (1, 4, 2))]
)
def test_small_has_the_true_geometry(name: str, family: str, shape: tuple[int, int, int]) -> None:
    cfg = composed("eval", f"model={name}")
    model = build.build_model(cfg, torch.device("cpu"))
    published = LavidaConfig()
    assert model.config.lm.family == family
    assert (model.lm.shift, model.config.lm.n_heads, model.config.lm.n_kv_heads) == shape
    assert dict(model.config.budgets) == {"base": 980, "wide": 1200, "full": 3645} == dict(published.budgets)
    assert model.config.image_grid_pinpoints == published.image_grid_pinpoints
    assert (model.config.vision.side, model.config.pooled_side) == (27, 14)
    assert model.config.trained is False
    again = build.build_model(cfg, torch.device("cpu"))
    assert build.fingerprint(model) == build.fingerprint(again)
    cfg.model.seed = 1
    assert build.fingerprint(build.build_model(cfg, torch.device("cpu"))) != build.fingerprint(model)


def test_small_dream_is_small_with_another_language_model() -> None:
    model, llada = (
        build.build_model(composed("eval", f"model={n}"), torch.device("cpu")) for n in ("small_dream", "small")
    )
    assert model.config.lm == replace(
        DreamConfig(init_std=0.02),
        **{f: getattr(llada.config.lm, f) for f in ("d_model", "n_heads", "n_layers", "mlp_hidden_size")},
        n_kv_heads=2,
        vocab_size=len(model.tokenizer),
        **{f: getattr(model.tokenizer, f) for f in ("eos_token_id", "pad_token_id", "mask_token_id")},
    )
    assert model.config.budgets == llada.config.budgets and model.config.vision == llada.config.vision
    assert model.tokenizer.mask_token == "<|mask|>" and model.config.drop_token_after_image is False


@pytest.mark.parametrize(
    ("name", "lm", "rows"),
    [("lavida_8b_random", LladaConfig(), 126349), ("lavida_dream_random", DreamConfig(), 151667)],
)
def test_random_models_of_the_published_sizes(name: str, lm: LanguageModelConfig, rows: int) -> None:
    sizes: dict[str, Any] = OmegaConf.to_container(composed("eval", f"model={name}").model.config)  # type: ignore[assignment]
    published = LavidaConfig(lm=lm)
    for part in ("vision", "lm"):
        for name, value in sizes[part].items():
            # The checkpoint stores more embedding rows than its tokenizer has; the rest is cut off when it is loaded.
            if name != "vocab_size":
                assert value == getattr(getattr(published, part), name), f"{part}.{name}"
    assert sizes["lm"]["vocab_size"] == rows


def test_budgets_are_names_of_the_model_or_numbers() -> None:
    assert build.resolve_budget("wide", BUDGETS) == 100
    assert build.resolve_budget("matched", BUDGETS) == "matched"
    assert build.resolve_budget(7, BUDGETS) == 7
    assert build.resolve_budget("768/980 base", BUDGETS) == 63
    assert build.resolve_budget("768/980 base", {"base": 980}) == 768
    for wrong in ("most", 0, -3, 1.5, True, None, "0/2 base", "1/2 most", "1/2"):
        with pytest.raises(ValueError, match=r"base \(80\).*matched, or a positive number"):
            build.resolve_budget(wrong, BUDGETS)


def test_help_describes_every_option() -> None:
    for name in ("eval", "train"):
        lines = describe_groups(name).splitlines()
        for group, option in options():
            if name in commands_of(group, option):
                (line,) = [x for x in lines[lines.index(_heading(lines, group)) :] if x.split()[:1] == [option]][:1]
                assert len(line.split()) > 3, f"{group}={option} has no description"


def _heading(lines: list[str], group: str) -> str:
    return next(line for line in lines if line.startswith(f"{group} (default"))


def documented() -> list[str]:
    """Every command for an entry point in the documents, without the remark behind it.

    Those of CONTRIBUTING.md are for a selector that is still to be written; test_contributing.py writes it.
    """
    pages = [CONF.parent / "README.md", *CONF.parent.glob("docs/**/*.md")]
    texts = [re.sub(r"\\\n *", "", p.read_text()) for p in pages]
    found = [c for text in texts for c in re.findall(r"python (?:eval|train)\.py[^`#|\n]*", text)]
    # Groups of the command line alone (test_shorthand.py composes those), and what stands for a name of one's own.
    return sorted(
        {
            c.strip()
            for c in found
            if not re.search(r"\b(?:sweep|run|rescore|debug)=|-sc |--help|[A-Za-z]=NAME|<\w+>|\.\.\.", c)
        }
    )


@pytest.mark.parametrize("command", documented())
def test_documented_commands_compose(command: str) -> None:
    name, *words = [word for word in shlex.split(command)[1:] if word != "-m"]
    name = name.removesuffix(".py")
    axes: list[list[str]] = []
    for override in OverridesParser.create().parse_overrides(words):
        if override.is_choice_sweep() and override.value_type is not ValueType.GLOB_CHOICE_SWEEP:
            axes.append([f"{override.get_key_element()}={value}" for value in override.sweep_string_iterator()])
        elif not override.is_sweep_override():  # a glob stands for whatever there is
            axes.append([override.input_line or ""])
    assert axes or not words, "a command that says nothing"
    for n in range(max(map(len, axes), default=1)):
        cfg = composed(name, *(axis[min(n, len(axis) - 1)] for axis in axes))
        assert cfg.study, command

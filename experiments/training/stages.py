"""The stages of `train`: what each trains, on which batches, and what is measured at its end."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import torch
import torch.distributed as dist
from omegaconf import DictConfig, OmegaConf
from PIL import Image
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from experiments import build
from experiments.data.loader import Batches
from experiments.data.sample import Dataset
from experiments.data.train_data import Draw
from experiments.inference import EvalPipeline
from experiments.jobs.distributed import Ranks
from experiments.jobs.sample_facts import content_of, dataset_facts, facts_of
from experiments.jobs.sample_rows import SampleFacts, SampleRow
from experiments.metrics.answers import text_metrics
from experiments.schema import SubsetLoss
from experiments.token_stats import TokenGeometry
from experiments.training.filters import drop_too_long, first_that_fit
from experiments.training.multi_budget import build_schedule
from experiments.training.pretrain import Align, TextPretraining, VisionPretraining
from experiments.training.pretrain.text_stage import Curriculum
from experiments.viz.examples import save_example
from lavida_adapter import DecodeConfig, Lavida, LavidaConfig, LoraConfig, ObjectiveConfig, TrainBatch, add_lora
from lavida_adapter.encode import run_tower
from lavida_adapter.learned_relevance import Learned
from lavida_adapter.lightning_module import LavidaModule, OptimConfig, Trainable
from lavida_adapter.lora import part_of, rank_growth, trained_whole, tree_of
from lavida_adapter.relevance import Relevance
from lavida_adapter.relevance_training import RelevanceTraining, SubsetConfig
from lavida_adapter.sharding import shard
from lavida_adapter.views import Views, cut, ready
from shirg import Geometry, Selector, UserError, send

Gate = Callable[[], dict[str, float]]
Show = Callable[[Path], list[SampleRow]]
ALL = "all"
"""The group of questions without groups, and their density."""
SHOWN = 4
"""How many training examples are drawn for the logger."""


@dataclass(frozen=True)
class Stage:
    """A module to train, and what belongs to it."""

    module: Trainable
    draw: Draw
    """The batch of a step."""
    gate: Gate
    """Measures the trained stage; train.py compares with the thresholds in the config's `gate`."""
    show: Show = lambda _: []
    """Answers a few training examples and draws their kept tokens into a folder. Every rank must call it."""
    data: dict[str, Any] = field(default_factory=dict)
    """The section "data" of result.json."""


def build_stage(cfg: DictConfig, model: Lavida, ranks: Ranks) -> Stage:
    if cfg.stage in _WITH_SELECTOR:
        return _through_selector(cfg, model, ranks)
    if cfg.stage == "gate":
        return _gate(cfg, model, ranks)
    if ranks.world > 1:
        raise UserError(f"stage={cfg.stage} makes the tiny model's base in one process: leave trainer= out")
    return _ALONE[cfg.stage](cfg, model)


def accuracy(stage: LavidaModule, dataset: Dataset, batch_size: int) -> dict[str, float]:
    """Share of right answers in each group of the dataset, with the stage's own selector."""
    right: dict[str, list[bool]] = defaultdict(list)
    for row in answered(stage, dataset, batch_size):
        right[row["group"] or ALL].append(row["prediction"] in row["answers"])
    return {group: sum(hits) / len(hits) for group, hits in right.items()}


def _check_names(thresholds: Iterable[str], measured: Iterable[str]) -> None:
    """Before the training: raises UserError for a threshold of what no question of the check can measure."""
    known = list(dict.fromkeys(measured))
    for name in thresholds:
        if name not in known:
            raise UserError(f"gate.{name}: with these questions (check=) this stage measures {', '.join(known)}")


def _facts_in(stage: LavidaModule, check: Dataset) -> Iterator[SampleFacts]:
    """Raises UserError for a question that cannot be answered: after the training it would be too late."""
    pipeline = _pipeline(stage, check)
    for sample in (check[i] for i in range(len(check))):
        pipeline.check(sample)
        yield facts_of(sample)


def answered(stage: LavidaModule, dataset: Dataset, batch_size: int) -> Iterator[SampleRow]:
    """The rows of a dataset, answered with the stage's own selector."""
    pipeline = _pipeline(stage, dataset)
    for begin in range(0, len(dataset), batch_size):
        samples = [dataset[i] for i in range(begin, min(begin + batch_size, len(dataset)))]
        with stage.precision():
            yield from pipeline.answer(samples).rows


def draw_examples(stage: LavidaModule, dataset: Dataset, folder: Path | None) -> list[SampleRow]:
    """Answers the first few examples that fit; draws their kept tokens into the folder, if one is given."""
    pipeline = _pipeline(stage, dataset)
    samples = first_that_fit(dataset, stage, SHOWN)
    if not samples:
        return []
    with stage.precision():
        found = pipeline.answer(samples)
    if folder is not None:
        for i, sample in enumerate(samples):
            save_example(
                folder, i, sample.load_image(), found.selections[i], found.rows[i], sample.boxes, pipeline.geometry
            )
    return found.rows


def _pipeline(stage: LavidaModule, dataset: Dataset) -> EvalPipeline:
    return EvalPipeline(
        model=stage.model,
        selector=stage.selector,
        relevance=stage.relevance,
        decode=DecodeConfig(max_new_tokens=dataset.max_new_tokens),
        cache=None,
        scorers=text_metrics(dataset.metric_names),
        geometry=TokenGeometry(stage.model.config, stage.selector.geometry),
        seed=stage.seed,
    )


def lora_config(cfg: DictConfig) -> LoraConfig:
    plain = OmegaConf.to_container(cfg.lora, resolve=True)
    assert isinstance(plain, dict)
    return LoraConfig.from_dict({str(k): v for k, v in plain.items()})


def optim_config(cfg: DictConfig) -> OptimConfig:
    return OptimConfig(**_fields(cfg.optim))


def objective_config(cfg: DictConfig) -> ObjectiveConfig:
    """The masked-diffusion objective of a stage.

    Raises:
        UserError: subsets for another stage than "gate", or none for that.
    """
    fields = _fields(cfg.objective)
    if (fields.pop("subsets") is None) == (cfg.stage == "gate"):
        if cfg.stage == "gate":
            raise UserError(f"stage=gate needs what a head is fitted to: give objective={', '.join(SubsetLoss)}")
        raise UserError(f"stage={cfg.stage} fits no relevance head: take objective={cfg.objective.subsets.loss} out")
    return ObjectiveConfig(**fields)


def _fields(node: DictConfig) -> dict[str, Any]:
    """Keyword arguments of a frozen config: lists become tuples."""
    values = OmegaConf.to_container(node, resolve=True, enum_to_str=True)
    assert isinstance(values, dict)
    return {str(k): tuple(v) if isinstance(v, list) else v for k, v in values.items()}


def _vision(cfg: DictConfig, model: Lavida) -> Stage:
    stage = VisionPretraining(model, optim_config(cfg), cfg.seed, cfg.pictures)
    return Stage(stage, stage.draw, stage.gate)


def _text(cfg: DictConfig, model: Lavida) -> Stage:
    options = {str(k): v for k, v in cfg.text.items()}
    attention, noise = options.pop("prefix_attention"), options.pop("noise")
    stage = TextPretraining(
        model,
        optim_config(cfg),
        cfg.seed,
        objective_config(cfg),
        Curriculum(**options),
        prefix_attention=attention,
        noise=noise,
        codes=cfg.codes,
    )
    return Stage(stage, stage.draw, stage.gate)


def _align(cfg: DictConfig, model: Lavida) -> Stage:
    stage = Align(model, optim_config(cfg), cfg.seed, cfg.pictures, cfg.codes)
    return Stage(stage, stage.draw, stage.gate)


def _base(cfg: DictConfig, model: Lavida, selector: Selector) -> None:
    """Trains all but the vision tower, with the selector of the config: `pooled` for LaViDa's own base."""
    if any(True for _ in selector.parameters()):
        raise UserError("stage=base saves the model alone: choose a selector without layers of its own")
    _train_base(model)


def _train_base(model: Lavida) -> None:
    model.requires_grad_(False)
    for part in (model.lm, model.model.mm_projector):
        part.requires_grad_(True)
    model.model.image_newline.requires_grad_(True)


def _adapt(cfg: DictConfig, model: Lavida, selector: Selector) -> None:
    for part in add_lora(model, lora_config(cfg), selector):
        print(f"  {part}")


def make_trainable(cfg: DictConfig, model: Lavida, selector: Selector) -> None:
    """Sets which parameters this stage trains, and prints them."""
    _WITH_SELECTOR.get(cfg.stage, _adapt)(cfg, model, selector)


def base_splitter(cfg: DictConfig, device: torch.device) -> Callable[[Lavida], None] | None:
    """For trainer=fsdp: splits what this stage leaves frozen over the processes, before the model has weights."""
    if cfg.trainer.strategy != "fsdp" or cfg.stage not in (*_WITH_SELECTOR, "gate"):
        return None

    def split(model: Lavida) -> None:
        if cfg.stage == "base":
            _train_base(model)
        else:
            model.requires_grad_(False)
            config = lora_config(cfg)
            mine = tuple(pattern for pattern in config.train_whole if part_of(pattern) != "selector")
            for parameter in trained_whole(tree_of(model, None), replace(config, train_whole=mine)).values():
                parameter.requires_grad_(True)
        shard(model, init_device_mesh(device.type, (dist.get_world_size(),)))

    return split


def _through_selector(cfg: DictConfig, model: Lavida, ranks: Ranks) -> Stage:
    data = TrainingData.of(cfg)
    selector = build.build_selector(cfg, model.config.budgets, model.config).to(model.device)
    relevance = build.build_relevance(cfg, selector, model)
    make_trainable(cfg, model, selector)
    model.checkpoint_gradients(cfg.trainer.gradient_checkpointing)
    stage = LavidaModule(
        model,
        selector,
        relevance,
        objective_config(cfg),
        optim_config(cfg),
        cfg.seed,
        mix=build_schedule(cfg, model, selector),
        growth=rank_growth(lora_config(cfg), model, selector) if cfg.stage == "adapt" else None,
    )

    drop_too_long(data.parts, stage)
    check = build.build_dataset(cfg, "check") if cfg.gate else None
    if check is not None:
        _check_names(cfg.gate, (facts["group"] or ALL for facts in _facts_in(stage, check)))

    def gate() -> dict[str, float]:
        return {} if check is None else accuracy(stage, check, cfg.batch_size)

    return data.stage(cfg, stage, ranks, gate)


@dataclass(frozen=True)
class TrainingData:
    """The datasets that a stage trains on, and what they held when it began."""

    parts: Mapping[str, Dataset]
    contents: Mapping[str, str | None]

    @classmethod
    def of(cls, cfg: DictConfig) -> Self:
        parts = build.build_parts(cfg)
        return cls(parts, {name: content_of(part) for name, part in parts.items()})

    def batches(self, cfg: DictConfig, stage: LavidaModule, ranks: Ranks) -> Batches:
        """The batches of a process."""
        stream = build.build_stream(cfg, self.parts)
        return Batches(stream, cfg.batch_size, prepare=Cutter.of(stage), rank=ranks.rank, world=ranks.world)

    def stage(self, cfg: DictConfig, module: LavidaModule, ranks: Ranks, gate: Gate) -> Stage:
        def show(folder: Path) -> list[SampleRow]:
            return draw_examples(module, next(iter(self.parts.values())), folder if ranks.is_main else None)

        batches = self.batches(cfg, module, ranks)
        facts = {name: {**dataset_facts(part), "content": self.contents[name]} for name, part in self.parts.items()}
        return Stage(module, batches, gate, show, facts)


UNSEEN = "unseen"
"""The check that asks about words which the training leaves out."""
CALIBRATION = 4
"""Batches from which the mean and the standard deviation of encoder states are taken."""


def _gate(cfg: DictConfig, model: Lavida, ranks: Ranks) -> Stage:
    """A relevance head, alone or beside a LoRA (lora.rank above 0)."""
    data = TrainingData.of(cfg)
    selector = build.build_selector(cfg, model.config.budgets, model.config).to(model.device)
    learned: Relevance | None = build.build_relevance(cfg, selector)
    if not isinstance(learned, Learned):
        raise UserError("stage=gate trains relevance=learned, for a selector that ranks by relevance")
    objective, lora = objective_config(cfg), lora_config(cfg)
    _refuse_idle(cfg, lora, objective)
    if lora.rank or lora.train_whole:
        _adapt(cfg, model, selector)
    elif any(True for _ in selector.parameters()):
        raise UserError("stage=gate without a LoRA trains the head alone: choose a selector without layers of its own")
    head = learned.fresh(model, _fields(cfg.head))
    print(f"  relevance_head: {sum(p.numel() for p in head.parameters()):,} parameters")
    model.checkpoint_gradients(cfg.trainer.gradient_checkpointing)
    subsets = SubsetConfig(**_fields(cfg.objective.subsets))
    stage = RelevanceTraining(model, selector, learned, objective, optim_config(cfg), cfg.seed, subsets=subsets)
    drop_too_long(data.parts, stage)
    # The same batches in all processes, and in a run that was stopped and goes on.
    first = data.batches(cfg, stage, Ranks())
    at_once = max(1, cfg.batch_size // ranks.world)
    states = states_of(model, (first(step) for step in range(CALIBRATION)), selector.geometry, at_once)
    head.standardise_by(states)

    checks = {"": build.build_dataset(cfg, "check"), UNSEEN: build.build_dataset(cfg, UNSEEN)} if cfg.gate else {}
    names = (_figures_of(name, facts) for name, check in checks.items() for facts in _facts_in(stage, check))
    _check_names(cfg.gate, (figure for of_question in names for figure in of_question if figure))

    def gate() -> dict[str, float]:
        return head_figures(stage, checks, cfg.batch_size)

    return data.stage(cfg, stage, ranks, gate)


def _refuse_idle(cfg: DictConfig, lora: LoraConfig, objective: ObjectiveConfig) -> None:
    """Raises UserError for what another stage reads and this one does not."""
    alone = not (lora.rank or lora.train_whole)
    idle = {
        "mix.budgets": cfg.mix.budgets,
        "mix.geometries": cfg.mix.geometries,
        "lora.grow": lora.grow is not None,
        "objective.alignment (without a LoRA)": alone and objective.alignment,
        "objective.adaptive_k (without a LoRA)": alone and objective.adaptive_k,
    }
    for name, given in idle.items():
        if given:
            raise UserError(f"{name} has no effect with stage=gate: take it out")


@torch.no_grad()
def states_of(model: Lavida, batches: Iterable[TrainBatch], geometry: Geometry, at_once: int) -> Iterator[Tensor]:
    """The encoder states [N, D] of each picture of some batches, without padding; `at_once` pictures in the tower."""
    for batch in batches:
        pictures = list({id(image): image for image in batch.images}.values())
        for begin in range(0, len(pictures), at_once):
            views = [ready(image, model.config, geometry) for image in pictures[begin : begin + at_once]]
            for picture in model.enter(run_tower, model, views, frozenset()):
                yield picture.states_ND[send(picture.views.valid_N, model.device)]


def head_figures(stage: LavidaModule, checks: Mapping[str, Dataset], batch_size: int) -> dict[str, float]:
    """Evidence recall of detail questions for each density, and for words that were left out; accuracy by group."""
    figures: dict[str, list[float]] = defaultdict(list)
    for name, dataset in checks.items():
        for row in answered(stage, dataset, batch_size):
            accuracy_of, recall_of = _figures_of(name, row)
            if recall_of and row["recall"] is not None:
                figures[recall_of].append(row["recall"])
            figures[accuracy_of].append(float(row["prediction"] in row["answers"]))
    return {name: sum(values) / len(values) for name, values in figures.items()}


def _figures_of(check: str, facts: SampleFacts) -> tuple[str, str]:
    """The figures that a question counts in: accuracy, and recall or "". Where questions have no groups, all count."""
    recalled = bool(facts["boxes"]) and facts["group"] in ("fine", "")
    return check or facts["group"] or ALL, f"recall_{check or facts['density'] or ALL}" if recalled else ""


@dataclass(frozen=True)
class Cutter:
    """Cuts a picture into views for the selector of its step. Data workers call it, so it holds no model."""

    config: LavidaConfig
    turns: tuple[Geometry, ...]

    @classmethod
    def of(cls, stage: LavidaModule) -> "Cutter | None":
        """None when the selectors of one turn differ in geometry: pictures are then cut in the training step."""
        turns = ((stage.selector,),) if stage.mix is None else stage.mix.turns
        geometries = [{selector.geometry for selector in turn} for turn in turns]
        if any(len(found) > 1 for found in geometries):
            return None
        return cls(stage.model.config, tuple(found.pop() for found in geometries))

    def __call__(self, step: int, image: Image.Image) -> Views:
        return cut(image, self.config, self.turns[step % len(self.turns)])


_WITH_SELECTOR: dict[str, Callable[[DictConfig, Lavida, Selector], None]] = {"base": _base, "adapt": _adapt}
_ALONE: dict[str, Callable[[DictConfig, Lavida], Stage]] = {"vision": _vision, "text": _text, "align": _align}

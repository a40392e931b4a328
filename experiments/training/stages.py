"""The stages that train.py knows: what each trains, on which batches, and how it proves itself."""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf
from PIL import Image

from experiments import build
from experiments.data.loader import Batches
from experiments.data.sample import Dataset, Listed
from experiments.data.train_data import Draw
from experiments.inference import EvalPipeline
from experiments.jobs.distributed import Ranks
from experiments.jobs.results import SampleRow
from experiments.metrics.answers import text_metrics
from experiments.token_stats import TokenGeometry
from experiments.training.filters import drop_too_long
from experiments.training.multi_budget import build_schedule
from experiments.viz.examples import save_example
from lavida_adapter import DecodeConfig, LavidaConfig, LoraConfig, ObjectiveConfig, add_lora
from lavida_adapter.lightning_module import LavidaModule, OptimConfig, Trainable
from lavida_adapter.lora import rank_growth
from lavida_adapter.views import Views, cut
from shirg import Geometry, Selector, UserError

if TYPE_CHECKING:
    from lavida_adapter import Lavida

Gate = Callable[[], dict[str, float]]
Show = Callable[[Path], list[SampleRow]]
SHOWN = 4
"""Training examples whose pictures a logger gets."""


@dataclass(frozen=True)
class Stage:
    """What is trained, the batch of each step, what is measured at the end, and what result.json says of the data."""

    module: Trainable
    draw: Draw
    gate: Gate
    show: Show = lambda _: []
    """Rows of a few training examples, and into a folder what was kept of them; every process must ask."""
    data: dict[str, Any] = field(default_factory=dict)


def build_stage(cfg: DictConfig, model: "Lavida", ranks: Ranks) -> Stage:
    if cfg.stage in _WITH_SELECTOR:
        return _through_selector(cfg, model, ranks)
    if ranks.world > 1:
        raise UserError(f"stage={cfg.stage} makes the tiny model's base in one process: leave trainer= out")
    return _ALONE[cfg.stage](cfg, model)


def accuracy(stage: LavidaModule, dataset: Dataset, batch_size: int) -> dict[str, float]:
    """Share of right answers in each group of the dataset, through the stage's own selector."""
    right: dict[str, list[bool]] = defaultdict(list)
    system = _system(stage, dataset)
    for begin in range(0, len(dataset), batch_size):
        samples = [dataset[i] for i in range(begin, min(begin + batch_size, len(dataset)))]
        with stage.precision():
            rows = system.answer(samples).rows
        for row in rows:
            right[row["group"] or "all"].append(row["prediction"] in row["answers"])
    return {group: sum(hits) / len(hits) for group, hits in right.items()}


def draw_shots(stage: LavidaModule, dataset: Dataset, folder: Path | None) -> list[SampleRow]:
    """Answers the first few examples and draws into the folder, if there is one, what was kept of them."""
    system = _system(stage, dataset)
    samples = [dataset[i] for i in range(min(SHOWN, len(dataset)))]
    with stage.precision():
        found = system.answer(samples)
    if folder is not None:
        for i, sample in enumerate(samples):
            save_example(
                folder, i, sample.load_image(), found.selections[i], found.rows[i], sample.boxes, system.geometry
            )
    return found.rows


def _system(stage: LavidaModule, dataset: Dataset) -> EvalPipeline:
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
    return ObjectiveConfig(**_fields(cfg.objective))


def _fields(node: DictConfig) -> dict[str, Any]:
    """Keyword arguments of a frozen config: lists become tuples."""
    values = OmegaConf.to_container(node, resolve=True, enum_to_str=True)
    assert isinstance(values, dict)
    return {str(k): tuple(v) if isinstance(v, list) else v for k, v in values.items()}


def _vision(cfg: DictConfig, model: "Lavida") -> Stage:
    from experiments.training.pretrain import VisionPretraining

    stage = VisionPretraining(model, optim_config(cfg), cfg.seed, cfg.pictures)
    return Stage(stage, stage.draw, stage.gate)


def _text(cfg: DictConfig, model: "Lavida") -> Stage:
    from experiments.training.pretrain import TextPretraining
    from experiments.training.pretrain.text_stage import Curriculum

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
    )
    return Stage(stage, stage.draw, stage.gate)


def _align(cfg: DictConfig, model: "Lavida") -> Stage:
    from experiments.training.pretrain import Align

    stage = Align(model, optim_config(cfg), cfg.seed, cfg.pictures)
    return Stage(stage, stage.draw, stage.gate)


def _base(cfg: DictConfig, model: "Lavida", selector: Selector) -> None:
    """Everything but the vision tower, through the selector of the config: pooled, for LaViDa's own base."""
    if any(True for _ in selector.parameters()):
        raise UserError("stage=base writes the model alone: choose a selector without layers of its own")
    model.requires_grad_(False)
    for part in (model.lm, model.model.mm_projector):
        part.requires_grad_(True)
    model.model.image_newline.requires_grad_(True)


def _adapt(cfg: DictConfig, model: "Lavida", selector: Selector) -> None:
    for part in add_lora(model, lora_config(cfg), selector):
        print(f"  {part}")


def make_trainable(cfg: DictConfig, model: "Lavida", selector: Selector) -> None:
    """Freezes what this stage leaves alone, and says what it trains."""
    _WITH_SELECTOR[cfg.stage](cfg, model, selector)


def _through_selector(cfg: DictConfig, model: "Lavida", ranks: Ranks) -> Stage:
    parts = build.build_parts(cfg)
    selector = build.build_selector(cfg, model.config.budgets, model.config).to(model.device)
    relevance = build.build_relevance(cfg, selector)
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

    def gate() -> dict[str, float]:
        if not cfg.gate:
            return {}
        return accuracy(stage, build.build_dataset(cfg, "check"), cfg.batch_size)

    def show(folder: Path) -> list[SampleRow]:
        return draw_shots(stage, next(iter(parts.values())), folder if ranks.is_main else None)

    drop_too_long(parts, stage)
    batches = Batches(
        build.build_stream(cfg, parts), cfg.batch_size, prepare=Cutter.of(stage), rank=ranks.rank, world=ranks.world
    )
    return Stage(stage, batches, gate, show, {name: _facts(part) for name, part in parts.items()})


@dataclass(frozen=True)
class Cutter:
    """Cuts pictures for the selector of their step, away from the step itself."""

    config: LavidaConfig
    turns: tuple[Geometry, ...]

    @classmethod
    def of(cls, stage: LavidaModule) -> "Cutter | None":
        """None where the selectors of a turn differ in geometry; pictures are then cut in the step."""
        turns = ((stage.selector,),) if stage.mix is None else stage.mix.turns
        geometries = [{selector.geometry for selector in turn} for turn in turns]
        if any(len(found) > 1 for found in geometries):
            return None
        return cls(stage.model.config, tuple(found.pop() for found in geometries))

    def __call__(self, step: int, image: Image.Image) -> Views:
        return cut(image, self.config, self.turns[step % len(self.turns)])


def _facts(dataset: Dataset) -> dict[str, Any]:
    dropped = dict(dataset.dropped) if isinstance(dataset, Listed) else {}
    return {"name": dataset.name, "split": dataset.split, "n": len(dataset), "dropped": dropped}


_WITH_SELECTOR: dict[str, Callable[[DictConfig, "Lavida", Selector], None]] = {"base": _base, "adapt": _adapt}
_ALONE: dict[str, Callable[[DictConfig, "Lavida"], Stage]] = {"vision": _vision, "text": _text, "align": _align}

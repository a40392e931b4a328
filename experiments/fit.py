"""The verb `train`: one stage of training as a job, with its gate, its weights and the command that evaluates them."""

import hashlib
import json
import logging
import shutil
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, RichProgressBar
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from experiments import build, measure
from experiments.data.module import Batches, Draw, TrainData, collate
from experiments.data.sample import Dataset
from experiments.mirror import close
from experiments.study import record
from experiments.study.files import write_atomic
from experiments.study.job import Job
from lavida_adapter import DecodeConfig, LoraConfig, ObjectiveConfig, add_lora, save_adapter
from lavida_adapter.module import LavidaModule, OptimConfig, Trainable

if TYPE_CHECKING:
    from lavida_adapter import Lavida

PROVENANCE = "training.json"
Gate = Callable[[], dict[str, float]]


def fit(cfg: DictConfig, job: Job) -> dict[str, Any]:
    """Trains one stage; returns the sections of result.json."""
    device = measure.resolve_device(cfg.device)
    if cfg.threads is not None:
        torch.set_num_threads(cfg.threads)
    torch.manual_seed(cfg.seed)
    model = build.build_model(cfg, device)
    stage, draw, gate = STAGES[cfg.stage](cfg, model)
    model.train()
    trainable = sum(p.numel() for p in stage.parameters() if p.requires_grad)
    print(f"stage {cfg.stage}: {trainable:,} of {sum(p.numel() for p in model.parameters()):,} parameters are trained")

    checkpoints = job.folder / "checkpoints"
    if not cfg.resume:
        shutil.rmtree(checkpoints, ignore_errors=True)
    last = checkpoints / "last.ckpt"
    began = time.perf_counter()
    trainer = build_trainer(cfg, checkpoints)
    try:
        trainer.fit(stage, datamodule=TrainData(draw, cfg.optim.steps), ckpt_path=last if last.exists() else None)
    finally:
        close(trainer.logger)
    if trainer.interrupted:
        raise KeyboardInterrupt
    seconds = time.perf_counter() - began

    model.eval()
    with torch.no_grad():
        reached = gate()
    check_gate(reached, cfg.gate)
    artifact = save(cfg, model, job, {"stage": cfg.stage, "seconds": round(seconds, 1), "gate": reached})
    shutil.rmtree(checkpoints, ignore_errors=True)
    shown = artifact.relative_to(Path.cwd()) if artifact.is_relative_to(Path.cwd()) else artifact
    print(f"written  {shown}")
    print(how_to_evaluate(cfg, job, shown))
    return {
        "training": {
            "stage": cfg.stage,
            "steps": cfg.optim.steps,
            "loss": trainer.callback_metrics["loss"].item(),
            "trainable_parameters": trainable,
            "artifact": str(shown),
            "gate": reached,
        },
        "environment": record.environment(device, cfg.dtype),
        "times": {"train_s": seconds},
    }


def build_trainer(cfg: DictConfig, checkpoints: Path) -> L.Trainer:
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)  # no tips, no list of absent accelerators
    warnings.filterwarnings("ignore", module=r"lightning\.pytorch\.(utilities\._pytree|trainer\.connectors)")
    terminal = Console().is_terminal
    bar: Callback = RichProgressBar() if terminal else Lines(cfg.trainer.log_every)
    logger = build.build_logger(cfg)
    return L.Trainer(
        accelerator="cpu" if cfg.device == "cpu" else "auto",
        devices=1,
        precision=cfg.trainer.precision,
        max_steps=cfg.optim.steps,
        gradient_clip_val=cfg.trainer.clip,
        logger=logger if logger is not None else False,
        callbacks=[
            bar,
            ModelCheckpoint(
                checkpoints, save_last=True, save_top_k=0, every_n_train_steps=cfg.trainer.checkpoint_every
            ),
        ],
        log_every_n_steps=cfg.trainer.log_every,
        enable_progress_bar=terminal,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )


class Lines(Callback):
    """Progress for logs: one line every so many steps."""

    def __init__(self, every: int) -> None:
        self.every = every
        self.began = time.perf_counter()

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        step = trainer.global_step
        if step % (4 * self.every) == 0 or step == trainer.max_steps:
            loss = trainer.callback_metrics["loss"].item()
            print(
                f"step {step}/{trainer.max_steps}  loss {loss:.4f}  {time.perf_counter() - self.began:.0f} s",
                flush=True,
            )


def check_gate(reached: Mapping[str, float], wanted: Mapping[str, float]) -> None:
    """Raises when a stage fell short of what the next one needs: going on would only waste time."""
    for name, least in wanted.items():
        if name not in reached:
            raise ValueError(f"gate.{name}: this stage measures {', '.join(reached) or 'nothing'}")
        if reached[name] < least:
            raise ValueError(
                f"the stage did not pass its gate: {name} is {reached[name]:.3f}, it must be at least {least}; "
                "try another seed= or more optim.steps="
            )
    if reached:
        print("gate     " + "  ".join(f"{k}={v:.3f}" for k, v in reached.items()))


def save(cfg: DictConfig, model: "Lavida", job: Job, entry: dict[str, Any]) -> Path:
    """Writes an adapter for the stage "adapt", else whole weights; beside them, how they and their base were made."""
    adapting = cfg.stage == "adapt"
    folder = Path(cfg.weights) if cfg.weights else job.folder / ("adapter" if adapting else "weights")
    if adapting:
        save_adapter(model, lora_config(cfg), folder)
    else:
        model.config = replace(model.config, trained=model.config.trained or cfg.stage == "base")
        model.save_pretrained(folder)
    source = Path(cfg.model.path) / PROVENANCE if cfg.model.get("path") else None
    history = json.loads(source.read_text())["stages"] if source is not None and source.is_file() else []
    entry |= {"command": job.identity.command, "seed": cfg.seed, **record.code_version()}
    sha = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(folder.glob("*.safetensors"))}
    write_atomic(folder / PROVENANCE, json.dumps({"sha256": sha, "stages": [*history, entry]}, indent=2) + "\n")
    return folder


def accuracy(stage: LavidaModule, dataset: Dataset, batch_size: int) -> dict[str, float]:
    """Share of right answers in each group of the dataset, through the stage's own selector."""
    right: dict[str, list[bool]] = defaultdict(list)
    for begin in range(0, len(dataset), batch_size):
        samples = [dataset[i] for i in range(begin, min(begin + batch_size, len(dataset)))]
        batch = collate(samples)
        prefix = stage.model.encode(
            batch.images,
            batch.questions,
            stage.selector,
            relevance=stage.relevance,
            ids=batch.ids,
            prompts=batch.prompts,
            boxes=batch.boxes,
        )
        texts = stage.model.generate(prefix, DecodeConfig(max_new_tokens=dataset.max_new_tokens)).texts
        for sample, text in zip(samples, texts, strict=True):
            right[str(sample.meta.get("group") or "all")].append(text in sample.answers)
    return {group: sum(hits) / len(hits) for group, hits in right.items()}


def how_to_evaluate(cfg: DictConfig, job: Job, artifact: Path) -> str:
    """The command that evaluates what was trained: the same model, selector and relevance."""
    asked = ("model", "selector", "relevance", "budget")
    choices = " ".join(o for o in job.identity.overrides if o.partition("=")[0].partition(".")[0] in asked)
    if cfg.stage == "adapt":
        return f"evaluate python eval.py {choices} adapter={artifact}"
    return f"evaluate python eval.py selector=pooled model.path={artifact}"


def lora_config(cfg: DictConfig) -> LoraConfig:
    return LoraConfig(**_fields(cfg.lora))


def _optim(cfg: DictConfig) -> OptimConfig:
    return OptimConfig(**_fields(cfg.optim))


def _objective(cfg: DictConfig) -> ObjectiveConfig:
    return ObjectiveConfig(**_fields(cfg.objective))


def _fields(node: DictConfig) -> dict[str, Any]:
    """Keyword arguments of a frozen config: lists become tuples."""
    values = OmegaConf.to_container(node, resolve=True, enum_to_str=True)
    assert isinstance(values, dict)
    return {str(k): tuple(v) if isinstance(v, list) else v for k, v in values.items()}


def _vision(cfg: DictConfig, model: "Lavida") -> tuple[Trainable, Draw, Gate]:
    from experiments.pretrain import VisionPretraining
    from experiments.pretrain.regions import draw_regions

    stage = VisionPretraining(model, _optim(cfg), cfg.seed)
    return stage, lambda step: draw_regions(model, cfg.seed, step, cfg.batch_size), stage.gate


def _text(cfg: DictConfig, model: "Lavida") -> tuple[Trainable, Draw, Gate]:
    from experiments.pretrain import TextPretraining
    from experiments.pretrain.text import Curriculum

    options = {str(k): v for k, v in cfg.text.items()}
    attention, noise = options.pop("prefix_attention"), options.pop("noise")
    stage = TextPretraining(
        model, _optim(cfg), cfg.seed, _objective(cfg), Curriculum(**options), prefix_attention=attention, noise=noise
    )
    return stage, stage.draw, stage.gate


def _align(cfg: DictConfig, model: "Lavida") -> tuple[Trainable, Draw, Gate]:
    from experiments.pretrain import Align
    from experiments.pretrain.regions import draw_regions

    stage = Align(model, _optim(cfg), cfg.seed)
    return stage, lambda step: draw_regions(model, cfg.seed, step, cfg.batch_size), stage.gate


def _base(cfg: DictConfig, model: "Lavida") -> tuple[Trainable, Draw, Gate]:
    """Everything but the vision tower, through the selector of the config: pooled, for LaViDa's own base."""
    model.requires_grad_(False)
    for part in (model.lm, model.model.mm_projector):
        part.requires_grad_(True)
    model.model.image_newline.requires_grad_(True)
    return _with_selector(cfg, model)


def _adapt(cfg: DictConfig, model: "Lavida") -> tuple[Trainable, Draw, Gate]:
    for part, count in add_lora(model, lora_config(cfg)).items():
        print(f"  {part}: {count:,} parameters")
    return _with_selector(cfg, model)


def _with_selector(cfg: DictConfig, model: "Lavida") -> tuple[Trainable, Draw, Gate]:
    dataset = build.build_dataset(cfg)
    selector = build.build_selector(cfg, model.config.budgets).to(model.device)
    relevance = build.build_relevance(cfg, selector)
    stage = LavidaModule(model, selector, relevance, _objective(cfg), _optim(cfg), cfg.seed)

    def gate() -> dict[str, float]:
        if not cfg.gate:
            return {}
        return accuracy(stage, build.build_dataset(cfg, "check"), cfg.batch_size)

    return stage, Batches(dataset, cfg.batch_size, cfg.seed), gate


STAGES: dict[str, Callable[[DictConfig, "Lavida"], tuple[Trainable, Draw, Gate]]] = {
    "vision": _vision,
    "text": _text,
    "align": _align,
    "base": _base,
    "adapt": _adapt,
}

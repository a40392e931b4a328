"""The verb `train`: one stage of training as a job, with its gate, its weights and the command that evaluates them."""

import hashlib
import json
import shlex
import shutil
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

from experiments import build, profiling
from experiments.atomic_files import write_atomic
from experiments.data.train_data import TrainData
from experiments.jobs import results
from experiments.jobs.job import CHECKPOINT, Job
from experiments.jobs.results import SHOTS
from experiments.sweeps import system_of
from experiments.training.run_logger import RunLogger, shows_pictures
from experiments.training.stages import build_stage, lora_config
from experiments.training.trainer import build_trainer, gather_base
from lavida_adapter import save_adapter
from lavida_adapter.lightning_module import LavidaModule, Trainable
from shirg import UserError

PROVENANCE = "training.json"


def train(cfg: DictConfig, job: Job) -> dict[str, Any]:
    """Trains one stage; returns the sections of result.json, which the first process writes."""
    with RunLogger.of(cfg, job) as mirror:
        return _train(cfg, job, mirror)


def _train(cfg: DictConfig, job: Job, mirror: RunLogger) -> dict[str, Any]:
    device = profiling.resolve_device(cfg.device, job.ranks.local_rank)
    if cfg.threads is not None:
        torch.set_num_threads(cfg.threads)
    torch.manual_seed(cfg.seed)
    model = build.build_model(cfg, device)
    stage = build_stage(cfg, model, job.ranks)
    data = TrainData(stage.draw, cfg.optim.steps, cfg.trainer.workers)
    model.train()
    trainable = sum(p.numel() for p in stage.module.parameters() if p.requires_grad)
    whole = sum(p.numel() for p in stage.module.parameters())
    print(f"stage {cfg.stage}: {trainable:,} of {whole:,} parameters are trained")

    last = job.folder / CHECKPOINT
    began = time.perf_counter()
    trainer, pace = build_trainer(cfg, job.ranks, device, job.folder, last.parent, mirror)
    mirror.begin()
    try:
        trainer.fit(stage.module, datamodule=data, ckpt_path=starting_point(cfg, job, last))
    except SystemExit:  # what Lightning makes of Ctrl+C
        raise KeyboardInterrupt from None
    seconds = time.perf_counter() - began

    model.eval()
    with torch.no_grad():
        reached = stage.gate()
        shown = stage.show(job.folder / SHOTS) if shows_pictures(cfg) else []
    check_gate(reached, cfg.gate)
    gather_base(model)
    rates = pace.rates()
    sections = {
        "training": {
            "stage": cfg.stage,
            "steps": cfg.optim.steps,
            "loss": trainer.callback_metrics["loss"].item(),
            "trainable_parameters": trainable,
            "gate": reached,
        },
        "data": stage.data,
        "environment": results.environment(device, cfg.dtype),
        "times": {"train_s": seconds, "processes": job.ranks.world, **rates, "peak_mib": profiling.peak_mib(device)},
    }
    if job.ranks.is_main:
        artifact = save(cfg, stage.module, job, {"stage": cfg.stage, "seconds": round(seconds, 1), "gate": reached})
        shutil.rmtree(last.parent, ignore_errors=True)
        path = artifact.relative_to(Path.cwd()) if artifact.is_relative_to(Path.cwd()) else artifact
        sections["training"]["artifact"] = str(path)
        print("pace     " + "  ".join(f"{value:,.1f} {name.replace('_per_s', '/s')}" for name, value in rates.items()))
        print(f"written  {path}")
        print(how_to_evaluate(cfg, job, path))
    mirror.end(sections, shown)
    return sections


def starting_point(cfg: DictConfig, job: Job, last: Path) -> Path | None:
    """The checkpoint to go on from, the same for all processes; what is left of others is cleared away."""
    if job.ranks.is_main:
        if not cfg.resume:
            shutil.rmtree(last.parent, ignore_errors=True)
        for torn in last.parent.glob(f".{last.name}.*"):
            torn.unlink()
    return job.ranks.broadcast(last if last.exists() else None)


def check_gate(reached: Mapping[str, float], wanted: Mapping[str, float]) -> None:
    """Raises when a stage fell short of what the next one needs: going on would only waste time."""
    for name, least in wanted.items():
        if name not in reached:
            raise UserError(f"gate.{name}: this stage measures {', '.join(reached) or 'nothing'}")
        if reached[name] < least:
            raise UserError(
                f"the stage did not pass its gate: {name} is {reached[name]:.3f}, it must be at least {least}; "
                "try another seed= or more optim.steps="
            )
    if reached:
        print("gate     " + "  ".join(f"{k}={v:.3f}" for k, v in reached.items()))


def save(cfg: DictConfig, stage: Trainable, job: Job, entry: dict[str, Any]) -> Path:
    """Writes an adapter for the stage "adapt", else whole weights; beside them, how they and their base were made."""
    adapting, model = cfg.stage == "adapt", stage.model
    folder = Path(cfg.weights) if cfg.weights else job.folder / ("adapter" if adapting else "weights")
    if adapting:
        assert isinstance(stage, LavidaModule)
        save_adapter(model, lora_config(cfg), folder, stage.selector)
    else:
        model.config = replace(model.config, trained=model.config.trained or cfg.stage == "base")
        model.save_pretrained(folder)
    source = Path(cfg.model.path) / PROVENANCE if cfg.model.get("path") else None
    history = json.loads(source.read_text())["stages"] if source is not None and source.is_file() else []
    entry |= {"command": job.identity.command, "seed": cfg.seed, **results.code_version()}
    sha = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(folder.glob("*.safetensors"))}
    write_atomic(folder / PROVENANCE, json.dumps({"sha256": sha, "stages": [*history, entry]}, indent=2) + "\n")
    return folder


def how_to_evaluate(cfg: DictConfig, job: Job, artifact: Path) -> str:
    """The command that evaluates what was trained: the same model, selector and relevance."""
    if cfg.stage == "adapt":
        return (
            f"evaluate {shlex.join(['python', 'eval.py', *system_of(job.identity.overrides), f'adapter={artifact}'])}"
        )
    return f"evaluate python eval.py selector=pooled model.path={artifact}"

"""The `train` command: one stage of training as a job.

A stage ends with a check against the thresholds in `gate`. Only a stage that passes writes its weights, and prints the
command that evaluates them.
"""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from stat import S_ISDIR
from typing import Any

import torch
from omegaconf import DictConfig

from experiments import build, profiling
from experiments.atomic_files import clear_temporaries, read_json, write_atomic, write_json
from experiments.data.train_data import TrainData
from experiments.jobs import results
from experiments.jobs.distributed import Ranks
from experiments.jobs.job import CHECKPOINT, Job
from experiments.jobs.results import SHOTS
from experiments.jobs.sample_facts import content_of
from experiments.override_grammar import command_line, quote
from experiments.schema import Profiler, local_folder
from experiments.sweeps import system_of
from experiments.torch_trace import TorchTrace
from experiments.training.callbacks import last_loss
from experiments.training.run_logger import RunLogger, logs_images
from experiments.training.stages import base_splitter, build_stage, lora_config, objective_config, optim_config
from experiments.training.trainer import build_trainer
from lavida_adapter import Lavida, save_adapter
from lavida_adapter.adapter_files import META, base_fingerprint
from lavida_adapter.learned_relevance import base_of
from lavida_adapter.lightning_module import LavidaModule, Trainable
from lavida_adapter.relevance_training import RelevanceTraining
from lavida_adapter.sharding import gather_base
from shirg import MissingFileError, UserError

DATA = "data.json"
"""File in a job's folder: what identifies the data of its training."""
ADAPTING = ("adapt", "gate")
"""The stages that leave the base as it is."""
PROVENANCE = "training.json"
"""File beside trained weights: their SHA-256 sums, and every stage that made them and their base."""


def train(cfg: DictConfig, job: Job) -> dict[str, Any]:
    """Trains one stage; returns the sections of result.json, which rank 0 writes."""
    with RunLogger.of(cfg, job) as run_logger:
        return _train(cfg, job, run_logger)


def _train(cfg: DictConfig, job: Job, run_logger: RunLogger) -> dict[str, Any]:
    build.check_numbers(cfg)
    # What these refuse should be found before weights are loaded, and hours of work are done.
    optim_config(cfg), objective_config(cfg)
    check_place(cfg.weights)
    device = profiling.use_device(cfg.device, job.ranks.local_rank)
    if cfg.threads is not None:
        torch.set_num_threads(cfg.threads)
    torch.manual_seed(cfg.seed)
    model = build.build_model(cfg, device, base_splitter(cfg, device))
    stage = build_stage(cfg, model, job.ranks)
    contents = {name: facts["content"] for name, facts in stage.data.items()}
    last = job.folder / CHECKPOINT
    keep_data(job, contents, going_on=cfg.resume and last.exists())
    data = TrainData(stage.draw, cfg.optim.steps, cfg.trainer.workers)
    model.train()
    trainable = sum(p.numel() for p in stage.module.parameters() if p.requires_grad)
    total = sum(p.numel() for p in stage.module.parameters())
    print(f"stage {cfg.stage}: {trainable:,} of {total:,} parameters are trained")

    began = time.perf_counter()
    trace = TorchTrace(job.folder if cfg.profiler == Profiler.torch and job.ranks.is_main else None, device)
    trainer, throughput = build_trainer(cfg, job.ranks, device, job.folder, last.parent, run_logger, trace)
    run_logger.begin()
    job.begin()
    try:
        with trace:
            trainer.fit(stage.module, datamodule=data, ckpt_path=starting_point(last, cfg.resume, job.ranks))
    except SystemExit as end:
        if not isinstance(end.__context__, KeyboardInterrupt):
            raise
        raise KeyboardInterrupt from None  # Lightning has turned Ctrl+C into the other
    seconds = time.perf_counter() - began

    model.eval()
    with torch.no_grad():
        reached = stage.gate()
        shown = stage.show(job.folder / SHOTS) if logs_images(cfg) else []
    check_gate(reached, cfg.gate)
    base = prepare_saving(cfg, stage.module)
    rates = throughput.rates()
    sections = {
        "training": {
            "stage": cfg.stage,
            "steps": cfg.optim.steps,
            "loss": last_loss(trainer),
            "trainable_parameters": trainable,
            "gate": reached,
        },
        "data": stage.data,
        "environment": results.environment(device, cfg.dtype),
        "times": {"train_s": seconds, "processes": job.ranks.world, **rates, "peak_mib": profiling.peak_mib(device)},
    }
    if job.ranks.is_main:
        entry = {"stage": cfg.stage, "seconds": round(seconds, 1), "gate": reached}
        artifact = save(cfg, stage.module, job, entry, base)
        path = artifact.relative_to(Path.cwd()) if artifact.is_relative_to(Path.cwd()) else artifact
        sections["training"]["artifact"] = str(path)
        print("speed    " + "  ".join(f"{value:,.1f} {name.replace('_per_s', '/s')}" for name, value in rates.items()))
        print(f"written  {path}")
        print(how_to_evaluate(cfg.stage, job.identity.overrides, path))
    run_logger.end(sections, shown)
    return sections


def check_place(weights: str | None) -> None:
    """Raises UserError, or what the operating system says, where `weights` cannot become a folder."""
    if weights is None:
        return
    try:
        is_folder = S_ISDIR(os.stat(weights).st_mode)
    except FileNotFoundError:
        return
    except (NotADirectoryError, ValueError):  # below a file; a NUL in the name
        is_folder = False
    if not is_folder:
        raise UserError(f"weights={weights}: there is a file, not a folder; give another one")


def keep_data(job: Job, contents: Mapping[str, str | None], *, going_on: bool) -> None:
    """Records which data a training has; for one that goes on, raises UserError where it is not what it began with."""
    why = ""
    if job.ranks.is_main:
        before = (read_json(job.folder / DATA) if going_on else None) or {}
        why = changed_data(before, contents)
        if not why and any(contents.values()):
            write_json(job.folder / DATA, dict(contents))
    if why := job.ranks.broadcast(why):
        raise UserError(f"{why} since this training began; overwrite=true trains again, another study= keeps both")


def changed_data(before: Mapping[str, str | None], now: Mapping[str, str | None]) -> str:
    """Which data is not what it was, in words; "" where all is. What was not recorded is not compared."""
    known = {name: content for name, content in before.items() if content is not None}
    changed = [name for name, content in now.items() if content is not None and known.get(name, content) != content]
    return f"the data of {', '.join(changed)} has changed" if changed else ""


def check_data(cfg: DictConfig, folder: Path) -> str:
    """Compares a finished training's data with that of now: a remark where it cannot, UserError where it changed."""
    result = results.read_result(folder)
    before = {name: facts.get("content") for name, facts in (result or {}).get("data", {}).items()}
    if not any(before.values()):
        return ""
    try:
        parts = build.build_parts(cfg)
    except MissingFileError as error:
        return f"its data cannot be compared ({error})"
    if why := changed_data(before, {name: content_of(part) for name, part in parts.items()}):
        raise UserError(f"{why} since this training ended; overwrite=true trains again, another study= keeps both")
    return ""


def starting_point(last: Path, resume: bool, ranks: Ranks) -> Path | None:
    """The checkpoint to resume from, the same in all processes; None to start from the beginning.

    Without `resume` the old checkpoints are deleted; files of an interrupted save are deleted in any case.
    """
    if ranks.is_main:
        if not resume:
            shutil.rmtree(last.parent, ignore_errors=True)
        for torn in last.parent.glob(f".{last.name}.*"):
            torn.unlink()
    return ranks.broadcast(last if last.exists() else None)


def check_gate(reached: Mapping[str, float], thresholds: Mapping[str, float]) -> None:
    """Raises UserError when a stage stays below a threshold: the next stage would fail later."""
    for name, least in thresholds.items():
        if name not in reached:
            raise UserError(f"gate.{name}: this stage measures {', '.join(reached) or 'nothing'}")
        if reached[name] < least:
            raise UserError(
                f"the stage did not pass its gate: {name} is {reached[name]:.3f}, it must be at least {least}; "
                "try another seed= or more optim.steps="
            )
    if reached:
        print("gate     " + "  ".join(f"{k}={v:.3f}" for k, v in reached.items()))


def prepare_saving(cfg: DictConfig, stage: Trainable) -> str:
    """What rank 0 needs of the others to save; every rank must call it. Returns the base's fingerprint, "" for none."""
    if isinstance(stage, RelevanceTraining) and not stage.adapts:
        return base_of(stage.model)
    if isinstance(stage, LavidaModule) and cfg.stage in ADAPTING:
        return base_fingerprint(stage.model, lora_config(cfg), stage.selector)
    gather_base(stage.model)
    return ""


def save(cfg: DictConfig, stage: Trainable, job: Job, entry: dict[str, Any], base: str) -> Path:
    """Writes what the stage has trained, an adapter, a relevance head or whole weights; returns the folder.

    `base` is the fingerprint of the base of an adapter or a head. training.json in the folder lists the stages of the
    base model, then this one (`entry`).
    """
    adapting = cfg.stage in ADAPTING
    folder = Path(cfg.weights) if cfg.weights else job.folder / ("adapter" if adapting else "weights")
    if isinstance(stage, RelevanceTraining):
        if stage.adapts:
            save_adapter(stage.model, lora_config(cfg), folder, stage.selector, base=base)
        stage.learned.save(folder, stage.model, base=None if stage.adapts else base)
    elif isinstance(stage, LavidaModule) and adapting:
        save_adapter(stage.model, lora_config(cfg), folder, stage.selector, base=base)
    else:
        save_weights(stage.model, folder, trained=cfg.stage == "base")
    base_folder = local_folder(str(cfg.model.path)) if cfg.model.get("path") else None
    before = None if base_folder is None else base_folder / PROVENANCE
    stages = json.loads(before.read_text())["stages"] if before is not None and before.is_file() else []
    entry |= {"command": job.identity.command, "seed": cfg.seed, **results.code_version()}
    sha = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(folder.glob("*.safetensors"))}
    clear_temporaries(folder)  # of a process that was killed in the next line
    write_atomic(folder / PROVENANCE, json.dumps({"sha256": sha, "stages": [*stages, entry]}, indent=2) + "\n")
    return folder


def save_weights(model: Lavida, folder: Path, *, trained: bool) -> None:
    """Writes the whole model; `trained` says in its config that it can answer questions now."""
    model.config = replace(model.config, trained=model.config.trained or trained)
    model.save_pretrained(folder)


def how_to_evaluate(stage: str, overrides: Sequence[str], artifact: Path) -> str:
    """The command that evaluates the trained weights, for an adapter with the same model, selector and relevance."""
    if stage in ADAPTING:
        key = "relevance.path" if stage == "gate" and not (artifact / META).is_file() else "adapter"
        words = [*system_of(overrides), f"{key}={quote(str(artifact))}"]
    else:
        words = ["selector=pooled", f"model.path={quote(str(artifact))}"]
    return f"evaluate {command_line('eval', words)}"

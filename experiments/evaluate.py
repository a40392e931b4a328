"""The verb `eval`: answers every sample once, scores the answers and writes them down as it goes.

Batches are cut the same way in every run. Each is journaled as a whole, so an interrupted job goes on with the first
batch that is missing and ends with the answers of an undisturbed one.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from omegaconf import DictConfig
from PIL import Image

from experiments import build, profiling
from experiments.analysis.aggregate import summarise
from experiments.build import adapter_path
from experiments.data.image_io import picture_of, prefetch_pictures
from experiments.data.sample import Dataset, Sample, Traced, draw_ids, ids_hash, other_questions
from experiments.inference import EvalPipeline, Row, build_pipeline
from experiments.jobs import results
from experiments.jobs.job import JOURNAL, SHOTS, Job
from experiments.jobs.results import write_samples
from experiments.metrics.answer_metric import CLEANER
from experiments.metrics.answers import scorer_version, text_metrics
from experiments.progress import Progress
from experiments.training.run_logger import RunLogger
from experiments.viz.examples import pick_examples, save_example
from experiments.viz.token_map import MAPS, TokenWatch, save_map
from lavida_adapter.llada import kernel_of
from shirg import UserError


def evaluate(cfg: DictConfig, job: Job) -> dict[str, Any]:
    """Evaluates one system on one dataset; returns the sections of result.json."""
    if cfg.batch_size < 1:
        raise UserError(f"batch_size={cfg.batch_size}: give at least 1")
    device = profiling.resolve_device(cfg.device)
    if cfg.threads is not None:
        torch.set_num_threads(cfg.threads)
    # The data first: what is wrong with it should not wait for the weights.
    dataset = build.build_dataset(cfg)
    everything = choose_samples(dataset, cfg.limit, cfg.seed)
    samples = shard_of(everything, cfg.shard, cfg.shards)
    ids = ids_hash(sample.id for sample in samples)
    print(f"data  {dataset.name} {dataset.split}: {len(samples)} of {len(dataset)} samples, ids {ids}")
    mirror = RunLogger.of(cfg, job)
    decode = build.build_decode(cfg, dataset.max_new_tokens)
    adapter = adapter_path(cfg.adapter, cfg.model, job.identity.choices["selector"])
    model = build.build_model(cfg, device)
    asked = other_questions(everything, cfg.seed) if cfg.shuffle_questions else None
    scorers = text_metrics(dataset.metric_names)
    system = build_pipeline(cfg, model, decode, scorers, adapter=adapter, asked=asked)
    selector, cache = system.selector, system.cache
    if cfg.shuffle_questions and not (system.relevance is not None and system.relevance.reads_question):
        raise UserError(
            "shuffle_questions=true changes nothing here: choose a selector that ranks by relevance, and a relevance= "
            "that reads the question"
        )
    weights = build.fingerprint(model)
    profiling.reset_peak_memory(device)
    rows, timings = answer_all(system, samples, pick_examples(everything, cfg.shots), job, cfg, weights)
    summary = summarise(rows, tuple(system.scorers))
    write_samples(job.folder / results.SAMPLES, rows)
    sections: dict[str, Any] = {
        "model": {
            "trained": model.config.trained,
            "parameters": sum(p.numel() for p in model.parameters()),
            "trainable_parameters": build.adapter_size(adapter),
            "weights": weights,
        },
        "selector": {"class": type(selector).__name__, "stage": selector.stage, "budget": selector.budget},
        "cache": None
        if cache is None
        else {
            "class": type(cache).__name__,
            "after": getattr(cache, "after", "prefill"),
            "budget": getattr(cache, "budget", None),
        },
        "data": {
            "name": dataset.name,
            "split": dataset.split,
            "n": len(rows),
            "of": len(dataset),
            "ids": ids,
            "prompt": prompt_hash(cfg.data, decode.max_new_tokens),
            "cleaner": CLEANER,
            "scorer": scorer_version(),
            **({"found": dict(dataset.provenance)} if isinstance(dataset, Traced) else {}),
        },
        **summary,
        "environment": {
            **results.environment(device, cfg.dtype),
            "attention": kernel_of(model.lm.backend, device, model.dtype, model.config.lm),
        },
        "times": {**profiling.summarise_stages(timings), "peak_memory_mib": profiling.peak_memory_mib(device)},
    }
    if decode.prefix_cache:
        cost = profiling.cost_of(model.config.lm, model.dtype)
        floor = profiling.eval_floor(cost, rows, decode.max_new_tokens, cfg.batch_size)
        limits = profiling.known_limits(job.folder.parent, device, model.dtype)
        held = sum(p.numel() * p.element_size() for p in model.parameters())
        sections["times"]["flags"] = profiling.flags(sections["times"], held, limits, floor)
    with mirror:  # only now: a logger has threads of its own, which would be timed too
        mirror.begin()
        mirror.end(sections, rows)
    return sections


def budget_of(system: EvalPipeline) -> int:
    """Vision tokens of a prompt, as far as the configuration tells."""
    budget = system.selector.budget
    return budget if isinstance(budget, int) else system.model.config.budgets["full" if budget is None else "base"]


def choose_samples(dataset: Dataset, limit: int | None, seed: int) -> list[Sample]:
    """All samples, or `limit` of them drawn with the seed by their ids; the dataset's order stays."""
    if limit is not None and limit < 1:
        raise UserError(f"limit={limit}: give a positive number of samples, or null for all of them")
    samples = [dataset[i] for i in range(len(dataset))]
    if len({sample.id for sample in samples}) < len(samples):
        raise UserError(f"data: {dataset.name} has two samples with the same id; answers could not be told apart")
    drawn = draw_ids([sample.id for sample in samples], limit, seed)
    return [sample for sample in samples if sample.id in drawn]


def prompt_hash(data: DictConfig, max_new_tokens: int) -> str:
    """How a question becomes a prompt and how long the answer may be: 16 hex digits that rows can be compared by."""
    recipe = [data.get("suffix", ""), bool(data.get("capitalise", False)), max_new_tokens]
    return hashlib.sha256(json.dumps(recipe).encode()).hexdigest()[:16]


def shard_of(samples: list[Sample], shard: int, shards: int) -> list[Sample]:
    """Every `shards`-th sample, from number `shard` on."""
    if not 0 <= shard < shards:
        raise UserError(f"shard={shard} shards={shards}: shards are numbered from 0 to shards - 1")
    if len(samples) < shards:
        raise UserError(f"shards={shards}: there are only {len(samples)} samples")
    return samples[shard::shards]


def answer_all(
    system: EvalPipeline, samples: Sequence[Sample], shots: Mapping[str, int], job: Job, cfg: DictConfig, weights: str
) -> tuple[list[Row], list[dict[str, float]]]:
    """Every sample's row, and for every batch the milliseconds per sample by stage.

    The first batch of a session warms caches and allocators up; its times are left out unless there are no others.
    """
    size: int = cfg.batch_size
    batches = [samples[i : i + size] for i in range(0, len(samples), size)]
    shown = {sample.id: picture_of(sample) for sample in samples}
    mapped = {name: shown[name] for name in list(shots)[:MAPS] if name in shown}  # or in another shard
    watched = set(mapped.values())
    watch = TokenWatch(system.selector, {name: at for name, at in shown.items() if at in watched})
    with job.journal() as journal, Progress(job.identity.job, len(samples)) as progress, watch:
        if journal.entries and journal.entries[0]["weights"] != weights:
            raise UserError(f"{job.folder / JOURNAL} was begun with other weights: overwrite=true starts again")
        done = len(journal.entries)
        progress.advance(sum(map(len, batches[:done])))
        coming = prefetch_pictures(batches[done:], system.model.config, system.selector.geometry, cfg.workers)
        for number, (batch, pictures) in enumerate(zip(batches[done:], coming, strict=True)):
            with profiling.explain_oom(system.model, len(batch), budget_of(system)):
                answers = system.answer(batch, pictures)
            for sample, picture, selection, row in zip(
                batch, answers.pictures, answers.selections, answers.rows, strict=True
            ):
                if sample.id in shots:
                    shot, folder = shots[sample.id], job.folder / SHOTS
                    image = picture if isinstance(picture, Image.Image) else sample.load_image()
                    save_example(folder, shot, image, selection, row, sample.boxes, system.geometry)
                    if mapped.get(sample.id) in watch.tokens:
                        eligible_N = system.geometry(image.size).eligible_N
                        save_map(folder, shot, watch.tokens[mapped[sample.id]], eligible_N, row["kept"])
            journal.append({"weights": weights, "warm_up": number == 0, "ms": answers.ms, "rows": answers.rows})
            progress.advance(len(batch))
        entries = journal.entries
    shares = [{stage: ms / len(entry["rows"]) for stage, ms in entry["ms"].items()} for entry in entries]
    rows = [{**row, "batch": i, "ms": shares[i]} for i, entry in enumerate(entries) for row in entry["rows"]]
    timed = [share for share, entry in zip(shares, entries, strict=True) if not entry["warm_up"]] or shares
    return rows, timed

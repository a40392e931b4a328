"""The verb `eval`: answers every sample once, scores the answers and writes them down as it goes.

Batches are cut the same way in every run. Each is journaled as a whole, so an interrupted job goes on with the first
batch that is missing and ends with the answers of an undisturbed one.
"""

import hashlib
import random
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from omegaconf import DictConfig

from experiments import build, measure
from experiments.data.sample import Dataset, Sample
from experiments.data.shuffle import other_questions
from experiments.mirror import mirror
from experiments.progress import Progress
from experiments.report.shots import pick_shots, save_shot
from experiments.study import record
from experiments.study.job import JOURNAL, SHOTS, Job
from experiments.study.samples import write_samples
from experiments.study.summary import summarise
from experiments.system import Row, System, text_metrics
from experiments.tokens import TokenGeometry


def evaluate(cfg: DictConfig, job: Job) -> dict[str, Any]:
    """Evaluates one system on one dataset; returns the sections of result.json."""
    if cfg.batch_size < 1:
        raise ValueError(f"batch_size={cfg.batch_size}: give at least 1")
    device = measure.resolve_device(cfg.device)
    if cfg.threads is not None:
        torch.set_num_threads(cfg.threads)
    # The data first: what is wrong with it should not wait for the weights.
    dataset = build.build_dataset(cfg)
    samples = choose(dataset, cfg.limit, cfg.seed)
    logger = build.build_logger(cfg)
    decode = build.build_decode(cfg, dataset)
    model = build.build_model(cfg, device, cfg.adapter)
    selector = build.build_selector(cfg, model.config.budgets).to(device).eval()
    cache_selector = build.build_cache_selector(cfg, model.config.budgets)
    system = System(
        model=model,
        selector=selector,
        relevance=build.build_relevance(cfg, selector),
        decode=decode,
        cache_selector=cache_selector,
        scorers=text_metrics(dataset.metric_names),
        geometry=TokenGeometry(model.config, selector.geometry),
        seed=cfg.seed,
        asked=other_questions(samples, cfg.seed) if cfg.shuffle_questions else None,
    )
    if cfg.shuffle_questions and not (system.relevance is not None and system.relevance.reads_question):
        raise ValueError(
            "shuffle_questions=true changes nothing here: choose a selector that ranks by relevance, and a relevance= "
            "that reads the question"
        )
    weights = build.fingerprint(model)
    measure.reset_peak_memory(device)
    rows, timings = answer_all(system, samples, job, cfg, weights)
    write_samples(job.folder / record.SAMPLES, rows)
    sections = {
        "model": {
            "trained": model.config.trained,
            "parameters": sum(p.numel() for p in model.parameters()),
            "trainable_parameters": build.adapter_size(cfg.adapter),
            "weights": weights,
        },
        "selector": {"class": type(selector).__name__, "stage": selector.stage, "budget": selector.budget},
        "cache": None
        if cache_selector is None
        else {"class": type(cache_selector).__name__, "after": cache_selector.after, "budget": cache_selector.budget},
        "data": {
            "name": dataset.name,
            "split": dataset.split,
            "n": len(rows),
            "of": len(dataset),
            "ids": hashlib.sha256("\n".join(row["id"] for row in rows).encode()).hexdigest()[:16],
        },
        **summarise(rows, tuple(system.scorers)),
        "environment": record.environment(device, cfg.dtype),
        "times": {**measure.summarise_stages(timings), "peak_memory_mib": measure.peak_memory_mib(device)},
    }
    mirror(logger, job, sections, rows)
    return sections


def choose(dataset: Dataset, limit: int | None, seed: int) -> list[Sample]:
    """All samples in order, or `limit` of them drawn with the seed; the order stays."""
    if limit is not None and limit < 1:
        raise ValueError(f"limit={limit}: give a positive number of samples, or null for all of them")
    indices: Iterable[int] = range(len(dataset))
    if limit is not None and limit < len(dataset):
        indices = sorted(random.Random(seed).sample(range(len(dataset)), limit))
    samples = [dataset[i] for i in indices]
    if len({sample.id for sample in samples}) < len(samples):
        raise ValueError(f"data: {dataset.name} has two samples with the same id; answers could not be told apart")
    return samples


def answer_all(
    system: System, samples: Sequence[Sample], job: Job, cfg: DictConfig, weights: str
) -> tuple[list[Row], list[dict[str, float]]]:
    """Every sample's row, and for every batch the milliseconds per sample by stage.

    The first batch of a session warms caches and allocators up; its times are left out unless there are no others.
    """
    size: int = cfg.batch_size
    batches = [samples[i : i + size] for i in range(0, len(samples), size)]
    shots = pick_shots(samples, cfg.shots)
    with job.journal() as journal, Progress(job.identity.job, len(samples)) as progress:
        if journal.entries and journal.entries[0]["weights"] != weights:
            raise ValueError(f"{job.folder / JOURNAL} was begun with other weights: overwrite=true starts again")
        done = len(journal.entries)
        progress.advance(sum(map(len, batches[:done])))
        for number, batch in enumerate(batches[done:]):
            answers = system.answer(batch)
            for sample, image, selection, row in zip(
                batch, answers.images, answers.selections, answers.rows, strict=True
            ):
                if sample.id in shots:
                    fine_area = system.geometry(image.size).fine_area
                    save_shot(job.folder / SHOTS, shots[sample.id], image, selection, row, sample.boxes, fine_area)
            journal.append({"weights": weights, "warm_up": number == 0, "ms": answers.ms, "rows": answers.rows})
            progress.advance(len(batch))
        entries = journal.entries
    shares = [{stage: ms / len(entry["rows"]) for stage, ms in entry["ms"].items()} for entry in entries]
    rows = [{**row, "batch": i, "ms": shares[i]} for i, entry in enumerate(entries) for row in entry["rows"]]
    timed = [share for share, entry in zip(shares, entries, strict=True) if not entry["warm_up"]] or shares
    return rows, timed

"""The `eval` command: answers every sample once, scores the answers and records them as it goes.

Batches are the same in every run. Each is journaled as a whole, so an interrupted job goes on with the batches that are
missing or whose samples have changed, and ends with the same answers as an undisturbed one.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from omegaconf import DictConfig
from PIL import Image

from experiments import build, profiling
from experiments.analysis.aggregate import summarise
from experiments.atomic_files import Entry, Journal, remove_path
from experiments.data.chosen_samples import choose_samples, shard_of
from experiments.data.image_io import picture_of, prefetch_pictures
from experiments.data.sample import Ruled, Sample, Traced, ids_hash, other_questions
from experiments.inference import Answers, EvalPipeline
from experiments.jobs import results
from experiments.jobs.job import JOURNAL, Job
from experiments.jobs.results import SHOTS, adapter_path
from experiments.jobs.sample_facts import changes, describe, facts_of
from experiments.jobs.sample_rows import SampleRow, digests_of, drop_partial_digests, read_facts, stream_samples
from experiments.kept_between_jobs import take_dataset, take_model
from experiments.metrics.answer_metric import CLEANER
from experiments.metrics.answers import scorer_version, text_metrics
from experiments.metrics.final_answer import check_rule
from experiments.profiling import Progress
from experiments.training.run_logger import RunLogger
from experiments.viz.examples import pick_examples, save_example
from experiments.viz.token_map import MAPS, TokenCapture, save_map
from lavida_adapter.joined_prompts import kernels_of
from shirg import MissingFileError, UserError


def evaluate(cfg: DictConfig, job: Job) -> dict[str, Any]:
    """Evaluates one pipeline on one dataset; returns the sections of result.json."""
    build.check_numbers(cfg)
    device = profiling.use_device(cfg.device)
    if cfg.threads is not None:
        torch.set_num_threads(cfg.threads)
    # The data first: an error in it should be found before the weights are loaded.
    dataset = take_dataset(cfg)
    rule = check_rule(dataset.answer_rule if isinstance(dataset, Ruled) else "whole")
    everything = choose_samples(dataset, cfg.limit, cfg.seed)
    samples = shard_of(everything, cfg.shard, cfg.shards)
    ids = ids_hash(samples.ids)
    print(f"data  {dataset.name} {dataset.split}: {len(samples)} of {len(dataset)} samples, ids {ids}")
    logger = RunLogger.of(cfg, job)
    decode = build.build_decode(cfg, dataset.max_new_tokens)
    adapter = adapter_path(cfg.adapter, cfg.model, job.identity.choices["selector"])
    shared = take_model(cfg, device, adapter, job.identity.config["stored"])
    model = shared.model
    asked = other_questions(everything, cfg.seed) if cfg.shuffle_questions else None
    scorers = text_metrics(dataset.metric_names)
    pipeline = build.build_pipeline(cfg, model, decode, scorers, adapter=shared.unmerged, asked=asked, answer_rule=rule)
    shared.settle(pipeline.selector)
    for sample in samples:  # what cannot be answered should be found before any answer
        pipeline.check(sample)
    if cfg.shuffle_questions and not (pipeline.relevance is not None and pipeline.relevance.reads_question):
        raise UserError(
            "shuffle_questions=true changes nothing here: choose a selector that ranks by relevance, and a relevance= "
            "that reads the question"
        )
    profiling.reset_peak_memory(device)
    examples = Examples(job, pipeline, samples, pick_examples(everything, cfg.shots))
    with job.journal(without_kept) as journal:
        rows, timings, numbers = answer_all(
            pipeline, samples, examples, job, journal, shared.weights, cfg.batch_size, cfg.workers
        )
        summary = summarise(rows, tuple(pipeline.scorers))
        kept = (row["kept"] for number in numbers for row in journal.load(number)["rows"])
        stream_samples(job.folder / results.SAMPLES, rows, kept)
    sections: dict[str, Any] = {
        "model": {
            "trained": model.config.trained,
            "parameters": sum(p.numel() for p in model.parameters()),
            "trainable_parameters": build.adapter_size(adapter),
            "weights": shared.weights,
        },
        **_describe(pipeline),
        "data": {
            "name": dataset.name,
            "split": dataset.split,
            "n": len(rows),
            "of": len(dataset),
            "ids": ids,
            "digests": digests_of(rows),
            "prompt": prompt_hash(cfg.data, decode.max_new_tokens),
            "cleaner": CLEANER,
            "scorer": scorer_version(),
            **({"drawn": digests_of(list(map(facts_of, everything)))} if cfg.shards > 1 else {}),
            **({"found": dict(dataset.provenance)} if isinstance(dataset, Traced) else {}),
        },
        **summary,
        "environment": {
            **results.environment(device, cfg.dtype),
            "attention": kernels_of(
                model.lm.backend,
                device,
                model.dtype,
                model.config.lm,
                model.batchings,
                replayed=decode.engine != "eager",
            ),
        },
        "times": {**profiling.summarise_stages(timings), "peak_memory_mib": profiling.peak_memory_mib(device)},
    }
    if decode.prefix_cache:
        cost = profiling.cost_of(model.config.lm, model.dtype)
        floor = profiling.eval_floor(cost, rows, decode.max_new_tokens, cfg.batch_size)
        limits = profiling.known_limits(job.folder.parent, device, model.dtype)
        held = sum(p.numel() * p.element_size() for p in model.parameters())
        sections["times"]["flags"] = profiling.flags(sections["times"], held, limits, floor)
    with logger:  # only now: its threads would be timed, too
        logger.begin()
        logger.end(sections, rows)
    shared.keep()
    return sections


def check_data(cfg: DictConfig, folder: Path) -> str:
    """Compares a finished job's samples with those that it would answer now; returns a remark where it cannot.

    Raises:
        UserError: the data has changed, and how.
    """
    try:
        dataset = take_dataset(cfg)
    except MissingFileError as error:
        return f"its data cannot be compared ({error})"
    samples = shard_of(choose_samples(dataset, cfg.limit, cfg.seed), cfg.shard, cfg.shards)
    if not (folder / results.SAMPLES).is_file():
        raise UserError(f"{folder} has no {results.SAMPLES}: overwrite=true answers again")
    if found := changes(read_facts(folder / results.SAMPLES), samples):
        raise UserError(
            f"the data has changed since this job answered it: {describe(found)}; overwrite=true answers again, "
            "another study= keeps both"
        )
    return ""


@dataclass
class Examples:
    """Draws the chosen samples into the job's folder while it runs.

    Args:
        samples: those of this job; in a shard some of the chosen ones are missing.
        numbers: the number of each chosen sample, by id.
    """

    job: Job
    pipeline: EvalPipeline
    samples: Sequence[Sample]
    numbers: Mapping[str, int]

    def __post_init__(self) -> None:
        pictures = {sample.id: picture_of(sample) for sample in self.samples}
        self._mapped = {i: pictures[i] for i in list(self.numbers)[:MAPS] if i in pictures}
        wanted = set(self._mapped.values())
        asked = {i: picture for i, picture in pictures.items() if picture in wanted}
        self.watch = TokenCapture(self.pipeline.selector, asked)

    def draw(self, batch: Sequence[Sample], answers: Answers) -> None:
        """Draws the chosen samples of a batch, and maps the tokens of the first few."""
        folder, geometry = self.job.folder / SHOTS, self.pipeline.geometry
        found = zip(batch, answers.pictures, answers.selections, answers.rows, strict=True)
        for sample, picture, selection, row in found:
            if (number := self.numbers.get(sample.id)) is None:
                continue
            image = picture if isinstance(picture, Image.Image) else sample.load_image()
            save_example(folder, number, image, selection, row, sample.boxes, geometry)
            tokens = self.watch.tokens.get(self._mapped.get(sample.id, ""))
            if tokens is not None:
                save_map(folder, number, tokens, geometry(image.size).eligible_N, row["kept"])


def answer_all(
    pipeline: EvalPipeline,
    samples: Sequence[Sample],
    examples: Examples,
    job: Job,
    journal: Journal,
    weights: str,
    batch_size: int,
    workers: int,
) -> tuple[list[SampleRow], list[dict[str, float]], list[int]]:
    """Every sample's row without its kept tokens, for every batch the milliseconds per sample by stage, and the numbers
    of the batches in the journal.

    The first batch of a session warms caches and allocators up; its times are left out unless there are no others.
    """
    batches = [samples[i : i + batch_size] for i in range(0, len(samples), batch_size)]
    with Progress(job.identity.job, len(samples)) as progress, examples.watch:
        if journal.entries and journal.entries[0]["weights"] != weights:
            raise UserError(f"{job.folder / JOURNAL} was begun with other weights: overwrite=true starts again")
        answered = find_answered(journal.entries, batches, job.folder)
        missing = [i for i in range(len(batches)) if i not in answered]
        progress.advance(sum(len(batches[i]) for i in answered))
        todo = [batches[i] for i in missing]
        coming = prefetch_pictures(todo, pipeline.model.config, pipeline.selector.geometry, workers)
        for i, batch, loaded in zip(missing, todo, coming, strict=True):
            with profiling.explain_oom(pipeline.model, len(batch), pipeline.n_vision):
                answers = pipeline.answer(batch, loaded)
            examples.draw(batch, answers)
            answered[i] = len(journal.entries)
            entry = {"weights": weights, "warm_up": i == missing[0], "ms": answers.ms, "rows": answers.rows}
            journal.append(entry)
            progress.advance(len(batch))
    numbers = [answered[i] for i in range(len(batches))]
    entries = [journal.entries[number] for number in numbers]
    shares = [{stage: ms / len(entry["rows"]) for stage, ms in entry["ms"].items()} for entry in entries]
    numbered = [(i, row) for i, entry in enumerate(entries) for row in entry["rows"]]
    rows = [cast(SampleRow, {**row, "batch": i, "ms": shares[i]}) for i, row in numbered]
    drop_partial_digests(rows)
    timed = [share for share, entry in zip(shares, entries, strict=True) if not entry["warm_up"]] or shares
    return rows, timed, numbers


def without_kept(entry: Entry) -> Entry:
    """A journaled batch without its kept tokens, which are most of it; KeyError for what is none."""
    rows = [{**row, "id": row["id"], "kept": []} for row in entry["rows"]]
    return {**{key: entry[key] for key in ("weights", "warm_up", "ms")}, "rows": rows}


def find_answered(entries: Sequence[Entry], batches: Sequence[Sequence[Sample]], folder: Path) -> dict[int, int]:
    """Where in the journal batches are, by their numbers.

    Those count that are of the same samples in the same order, none of which has changed since.

    Where the data has changed, this is said, and the rest is answered again.
    """
    by_ids = {tuple(row["id"] for row in entry["rows"]): number for number, entry in enumerate(entries)}
    rows = [row for number in by_ids.values() for row in entries[number]["rows"]]
    ids = {row["id"] for row in rows}
    found = changes(rows, [sample for batch in batches for sample in batch if sample.id in ids])
    changed = {change.id for change in found}
    answered = {}
    for i, batch in enumerate(batches):
        names = tuple(sample.id for sample in batch)
        if names in by_ids and changed.isdisjoint(names):
            answered[i] = by_ids[names]
    if len(answered) < len(by_ids):
        n = sum(len(batches[i]) for i in answered)
        why = describe(found) or "other samples are drawn"
        print(f"data  has changed since this job stopped ({why}): {n} of its {len(ids)} answers are kept")
        remove_path(folder / SHOTS)
    return answered


def prompt_hash(data: Mapping[str, Any] | DictConfig, max_new_tokens: int) -> str:
    """How a question becomes a prompt and how long the answer may be: 16 hex digits that rows can be compared by."""
    recipe = [data.get("suffix", ""), bool(data.get("capitalise", False)), max_new_tokens]
    more = {"draft": data.get("draft"), "answer_rule": data.get("answer_rule", "whole")}
    if more != {"draft": None, "answer_rule": "whole"}:  # absent before, so that older rows stay comparable
        recipe.append(more)
    return hashlib.sha256(json.dumps(recipe).encode()).hexdigest()[:16]


def _describe(pipeline: EvalPipeline) -> dict[str, Any]:
    """The sections of result.json about the selector and the cache."""
    selector, cache = pipeline.selector, pipeline.cache
    about = None
    if cache is not None:
        after, budget = getattr(cache, "after", "prefill"), getattr(cache, "budget", None)
        about = {"class": type(cache).__name__, "after": after, "budget": budget}
    return {
        "selector": {
            "class": type(selector).__name__,
            "stage": selector.stage,
            "budget": selector.budget,
            "geometry": selector.geometry,
        },
        "cache": about,
    }

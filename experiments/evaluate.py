"""The `eval` command: answers every sample once, scores the answers and records them as it goes.

Batches are the same in every run. Each is journaled as a whole, so an interrupted job goes on with the batches that are
missing or whose samples have changed, and ends with the same answers as an undisturbed one.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from omegaconf import DictConfig
from PIL import Image

from experiments import build, profiling
from experiments.analysis.aggregate import score_corpora, summarise
from experiments.atomic_files import remove_path, replacing
from experiments.data.chosen_samples import ChosenSamples, choose_samples, shard_of
from experiments.data.image_io import picture_of, prefetch_pictures
from experiments.data.sample import Ruled, Sample, Traced, ids_hash, other_questions
from experiments.inference import Answers, EvalPipeline
from experiments.jobs import results
from experiments.jobs.answer_journal import AnsweredTables, AnswerJournal
from experiments.jobs.job import Job
from experiments.jobs.results import SHOTS, adapter_path
from experiments.jobs.sample_facts import Change, CurrentFacts, changes, describe, differing, facts_of
from experiments.jobs.sample_rows import FACTS, SampleColumns, digests_of, read_columns, read_facts, write_tables
from experiments.kept_between_jobs import take_dataset, take_model
from experiments.measured_times import LoadMeter, summarise_stages
from experiments.metrics.answer_metric import CLEANER
from experiments.metrics.answers import scorer_version, text_metrics
from experiments.metrics.final_answer import check_rule
from experiments.progress import Progress
from experiments.schema import Profiler
from experiments.torch_trace import TorchTrace
from experiments.training.run_logger import LOGGED, RunLogger
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
    # Measured before and after what they judge: a machine has faster and slower minutes.
    profiling.best_limits(job.folder.parent, device, model.dtype)
    profiling.reset_peak_memory(device)
    examples = Examples(job, pipeline, samples, pick_examples(everything, cfg.shots))
    job.begin()
    load = LoadMeter()
    with TorchTrace(job.folder if cfg.profiler == Profiler.torch else None, device) as trace:
        rows, summary, timings = answer_and_summarise(
            pipeline, samples, examples, job, shared.weights, cfg.batch_size, cfg.workers, trace
        )
    waited = load.waited()
    sections: dict[str, Any] = {
        "model": {
            "trained": model.config.trained,
            "parameters": sum(p.numel() for p in model.parameters()),
            "trainable_parameters": build.adapter_size(adapter),
            "lora_rank": build.lora_rank(adapter),
            "weights": shared.weights,
        },
        **_describe(pipeline),
        "data": {
            "name": dataset.name,
            "split": dataset.split,
            "n": len(samples),
            "of": len(dataset),
            "ids": ids,
            "digests": digests_of(read_facts(rows.path)),
            "prompt": prompt_hash(cfg.data, decode.max_new_tokens),
            "cleaner": CLEANER,
            "scorer": scorer_version(),
            **({"drawn": digests_of(map(facts_of, everything))} if cfg.shards > 1 else {}),
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
        "times": {
            **summarise_stages(timings),
            "waited": waited,
            "peak_memory_mib": profiling.peak_memory_mib(device),
        },
    }
    if decode.prefix_cache:
        cost = profiling.cost_of(model.config.lm, model.dtype)
        lengths, steps = rows.known("n_prefix"), rows.known("n_steps")
        floor = profiling.eval_floor(cost, lengths, steps, decode.max_new_tokens, cfg.batch_size)
        limits = profiling.best_limits(job.folder.parent, device, model.dtype)
        held = sum(p.numel() * p.element_size() for p in model.parameters())
        sections["times"]["flags"] = profiling.flags(sections["times"], held, limits, floor)
    with logger:  # only now: its threads would be timed, too
        logger.begin()
        logger.end(sections, read_columns(rows.path, LOGGED))
    shared.keep()
    return sections


def check_data(cfg: DictConfig, folder: Path) -> str:
    """Compares a finished job's samples with those that it would answer now; returns a remark where it cannot.

    Raises:
        UserError: the data has changed, and how; or it would be asked in another way.
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
    # Rows record the turns before a question, but there was a time when they were not asked.
    prompt = prompt_hash(cfg.data, build.build_decode(cfg, dataset.max_new_tokens).max_new_tokens)
    if ((results.read_result(folder) or {}).get("data") or {}).get("prompt", prompt) != prompt:
        raise UserError(
            "this job's prompts were made in another way than now; overwrite=true answers again, another study= keeps "
            "both"
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
        first = set(list(self.numbers)[:MAPS])
        searched = self.samples if first else ()
        self._mapped = {sample.id: picture_of(sample) for sample in searched if sample.id in first}
        wanted = set(self._mapped.values())
        asked = {sample.id: picture for sample in searched if (picture := picture_of(sample)) in wanted}
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


def answer_and_summarise(
    pipeline: EvalPipeline,
    samples: ChosenSamples,
    examples: Examples,
    job: Job,
    weights: str,
    batch_size: int,
    workers: int,
    trace: TorchTrace | None = None,
) -> tuple[SampleColumns, dict[str, Any], dict[str, np.ndarray]]:
    """Answers what the job's journal does not have, and writes samples.parquet from it.

    Returns:
        The columns of samples.parquet, the sections of result.json that they make, and the times of `batch_times`.
    """
    path = job.folder / results.SAMPLES
    with job.journal() as journal:
        batches = SampleBatches.of(samples, batch_size)
        answered = answer_all(pipeline, batches, examples, job, journal, weights, workers, trace or TorchTrace(None))
        tables, corpora = score_corpora(AnsweredTables(journal, answered.offsets), pipeline.scorers)
        with replacing(path) as file:
            write_tables(file, tables)
    rows = SampleColumns(path)
    return rows, summarise(rows, tuple(pipeline.scorers), corpora), batch_times(rows, answered.warm_up)


@dataclass(frozen=True)
class SampleBatches(Sequence[Sequence[Sample]]):
    """Samples in batches of a size, of which those with the given numbers are meant."""

    samples: ChosenSamples
    size: int
    numbers: np.ndarray

    @classmethod
    def of(cls, samples: ChosenSamples, size: int) -> Self:
        return cls(samples, size, np.arange(-(-len(samples) // size)))

    @property
    def n_samples(self) -> int:
        return int(np.minimum(self.size, len(self.samples) - self.size * self.numbers).sum())

    def only(self, chosen: np.ndarray) -> Self:
        return replace(self, numbers=self.numbers[chosen])

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> Sequence[Sample]:  # type: ignore[override]  # no slices
        begin = self.size * int(self.numbers[index])
        return self.samples[begin : begin + self.size]


@dataclass(frozen=True)
class Answered:
    """What is in memory of the answers of a job, batch by batch."""

    offsets: np.ndarray
    """int64: where in the journal each batch is; -1 for one that is not."""
    warm_up: np.ndarray
    """bool: batches whose times do not count: the first of sessions, which warm caches and allocators up, and recorded
    ones."""


def answer_all(
    pipeline: EvalPipeline,
    batches: SampleBatches,
    examples: Examples,
    job: Job,
    journal: AnswerJournal,
    weights: str,
    workers: int,
    trace: TorchTrace,
) -> Answered:
    """Answers the batches that the journal does not have."""
    with Progress(job.identity.job, len(batches.samples)) as progress, examples.watch:
        found = find_answered(journal, batches, weights, job.folder)
        todo = batches.only(found.offsets < 0)
        progress.advance(batches.n_samples - todo.n_samples)
        coming = prefetch_pictures(todo, pipeline.model.config, pipeline.selector.geometry, workers)
        for i, batch, loaded in zip(todo.numbers, todo, coming, strict=True):
            with profiling.explain_oom(pipeline.model, len(batch), pipeline.n_vision):
                answers = pipeline.answer(batch, loaded)
            examples.draw(batch, answers)
            found.warm_up[i] = i == todo.numbers[0] or trace.is_recording
            trace.step()
            found.offsets[i] = journal.append(answers.rows, answers.ms, weights, bool(found.warm_up[i]))
            progress.advance(len(batch))
    return found


def find_answered(journal: AnswerJournal, batches: SampleBatches, weights: str, folder: Path) -> Answered:
    """The batches that the journal has: of the same samples in the same order, none of which has changed since.

    Where the data has changed, this is said, and the rest is answered again.

    Raises:
        UserError: the journal was begun with other weights.
    """
    found = Answered(np.full(len(batches), -1), np.zeros(len(batches), dtype=bool))
    ids = batches.samples.ids
    place: dict[str, int] = {}
    after = 0
    current = CurrentFacts(batches.samples)
    changed: dict[str, Change] = {}
    known = np.zeros(len(batches.samples), dtype=bool)
    n_lost = 0
    for offset, answered in journal:
        if answered.weights != weights:
            raise UserError(f"{journal.path} was begun with other weights: overwrite=true starts again")
        rows = answered.rows.select(FACTS).to_pylist()
        here = list(range(after, after + len(rows)))
        if [row["id"] for row in rows] != ids[after : after + len(rows)]:
            # Not where the batch before it ended: only now is an index of all samples worth its memory.
            place = place or {name: i for i, name in enumerate(ids)}
            here = [place.get(row["id"], -1) for row in rows]
        after = here[-1] + 1
        for i, row in zip(here, rows, strict=True):
            fields = differing(row, current(batches.samples[i])) if i >= 0 else ()
            if i < 0 or fields:
                changed[row["id"]] = Change(row["id"], fields, gone=i < 0)
            else:
                changed.pop(row["id"], None)
        known[[i for i in here if i >= 0]] = True
        number, rest = divmod(here[0], batches.size)
        end = min(here[0] + batches.size, len(batches.samples))
        if rest == 0 and here == list(range(max(0, here[0]), end)):
            same = changed.keys().isdisjoint(row["id"] for row in rows)
            found.offsets[number] = offset if same else -1
            found.warm_up[number] = same and answered.warm_up
        else:
            n_lost += 1
    if n_lost or changed:
        n = batches.only(found.offsets >= 0).n_samples
        n_before = int(known.sum()) + sum(change.gone for change in changed.values())
        why = describe(list(changed.values())) or "other samples are drawn"
        print(f"data  has changed since this job stopped ({why}): {n} of its {n_before} answers are kept")
        remove_path(folder / SHOTS)
    return found


def batch_times(rows: SampleColumns, warm_up: np.ndarray) -> dict[str, np.ndarray]:
    """Milliseconds per sample of each batch by stage, without warm-ups unless there is nothing else."""
    first = np.unique(rows.known("batch"), return_index=True)[1]
    timed = first[~warm_up] if not warm_up.all() else first
    return {stage: rows.numbers(f"ms_{stage}")[timed] for stage in rows.stages}


def prompt_hash(data: Mapping[str, Any] | DictConfig, max_new_tokens: int) -> str:
    """How a question becomes a prompt and how long the answer may be: 16 hex digits that rows can be compared by."""
    recipe = [data.get("suffix", ""), bool(data.get("capitalise", False)), max_new_tokens]
    more = {"draft": data.get("draft"), "answer_rule": data.get("answer_rule", "whole")}
    if more != {"draft": None, "answer_rule": "whole"}:  # absent before, so that older rows stay comparable
        recipe.append(more)
    if data.get("history", False):  # absent without one, and in rows of a time when evaluation left the turns out
        recipe.append({"history": True})
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

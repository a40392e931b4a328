"""`python eval.py rescore=FOLDER`: scores stored answers again, with the metrics of this version.

Neither weights nor pictures are read: samples.parquet has the answers and the references. The scores become those of a
new run with these metrics; answers and times stay as they are.
"""

import shlex
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
from filelock import FileLock, Timeout
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from experiments.analysis.aggregate import score_corpora, summarise
from experiments.atomic_files import encode_json, read_json, replacing_together
from experiments.data.sample import ids_hash
from experiments.errors import sentence_of
from experiments.job_names import override_key
from experiments.jobs import results
from experiments.jobs.results import SHOTS
from experiments.jobs.sample_rows import RECALL, SampleColumns, read_columns, read_tables, write_tables
from experiments.metrics.answer_metric import CLEANER
from experiments.metrics.answers import Scorer, score_answer, scorer_version, text_metrics
from experiments.report.publish import refresh_report
from experiments.sweeps import job_folders
from shirg import MissingFileError, UserError

WORD = "rescore"
METRICS = "data.metrics"
_RECALL = "entity_recall"


@dataclass(frozen=True)
class RescoreRequest:
    """The jobs and metrics of a command line with `rescore=`."""

    pattern: str
    metrics: tuple[str, ...] | None
    """None takes the metrics of each job's own config."""


def parse(argv: Sequence[str]) -> RescoreRequest:
    """The request of a command line, which has a `rescore=` in it.

    Raises:
        UserError: more than one of them, or words that would change more than scores.
    """
    patterns = [word.partition("=")[2] for word in argv if word.startswith(f"{WORD}=")]
    others = [word for word in argv if not word.startswith(f"{WORD}=")]
    asked = [word for word in others if override_key(word) == METRICS]
    if len(patterns) > 1 or len(asked) > 1 or len(asked) < len(others):
        raise UserError(
            f"{WORD}=FOLDER goes with {METRICS}=[...] and nothing else, each once: it changes scores and leaves "
            f"answers as they are (several jobs: {WORD}='outputs/STUDY/*')"
        )
    return RescoreRequest(patterns[0], _names(asked[0]) if asked else None)


def rescore_all(request: RescoreRequest) -> dict[Path, bool]:
    """Scores every job that the request names and prints one line for each; True where that worked.

    Raises:
        UserError: the pattern names no job.
    """
    folders = job_folders(WORD, request.pattern, "eval")
    outcome = {}
    for folder in folders:
        try:
            before, after = rescore(folder, request.metrics)
        except Exception as error:
            if (sentence := sentence_of(error, place=folder)) is None:
                raise
            print(f"error: {' '.join(sentence.split())}", file=sys.stderr, flush=True)
            outcome[folder] = False
        else:
            print(f"ok    {folder.name}: {_headline(before)} -> {_headline(after)}", flush=True)
            outcome[folder] = True
    return outcome


def rescore(folder: Path, metrics: Sequence[str] | None = None) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """Scores one job again, by its own metrics or by those given; returns its quality before and after.

    Raises:
        UserError: no finished job of eval.py, a part of a larger one, answers that are not those it scored, or a
            metric that they cannot be scored by.
    """
    if results.read_result(folder) is None:
        raise UserError(f"{WORD}={folder}: there is no {results.RESULT} in it; give the folder of a job of eval.py")
    try:
        with FileLock(folder / results.LOCK, timeout=0):
            qualities = _rescore(folder, metrics)
    except Timeout:
        raise UserError(f"{WORD}={folder}: another process is running this job; wait for it") from None
    refresh_report(folder.parent)  # the command writes the rest when all are scored
    return qualities


def _rescore(folder: Path, metrics: Sequence[str] | None) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    result = results.read_result(folder)
    assert result is not None
    stored = folder / results.SAMPLES
    _check_answers(folder, result)
    scorers = text_metrics(metrics or result["config"]["data"]["metrics"])
    records = {path: read_json(path) for path in sorted((folder / SHOTS).glob("*.json"))}
    shots = {path: shot for path, shot in records.items() if shot is not None}
    rescored = _Rescored(stored, scorers, {shot["id"] for shot in shots.values()})
    tables, corpora = score_corpora(rescored, scorers)
    with replacing_together([*shots, stored, folder / results.RESULT]) as files:
        write_tables(files[-2], tables)
        files[-2].flush()
        rows = SampleColumns(Path(files[-2].name))
        quality = summarise(rows, tuple(scorers), corpora)["quality"]
        if metrics is not None:
            _check_references(folder, rows, scorers, metrics)
            result = _asked_with(result, metrics)
        for file, shot in zip(files, shots.values(), strict=False):
            # Scores that depend on all answers stay empty in an example.
            file.write(encode_json({**shot, "scores": rescored.scores[shot["id"]]}))
        files[-1].write(encode_json(_record(result, quality)))
    return result["quality"], quality


def _record(result: Mapping[str, Any], quality: Mapping[str, Any]) -> dict[str, Any]:
    """The job's record with its new scores."""
    return {
        **result,
        "data": {**result["data"], "cleaner": CLEANER, "scorer": scorer_version()},
        "quality": quality,
        "rescored": {
            "before": {"metrics": list(result["quality"]["metrics"]), "scorer": result["data"].get("scorer")},
            **results.code_version(),
        },
        "times": {**result["times"], "rescored": results.now()},
    }


def _check_answers(folder: Path, result: Mapping[str, Any]) -> None:
    """Checks that the job's answers are complete and the ones that were scored."""
    where = f"{WORD}={folder}"
    if result["verb"] != "eval" or result["status"] != "ok":
        raise UserError(
            f"{where} is a job of {result['verb']}.py with status {result['status']}: only a finished job of eval.py "
            "has answers to score; resume=true finishes it"
        )
    if result["config"].get("shards", 1) > 1:
        raise UserError(f"{where} is one of {result['config']['shards']} shards: score the job that they make together")
    if not (folder / results.SAMPLES).is_file():
        raise MissingFileError(f"{where} has no {results.SAMPLES}: overwrite=true answers again")
    found = ids_hash(row["id"] for row in read_columns(folder / results.SAMPLES, ["id"]))
    if found != result["data"]["ids"]:
        raise UserError(
            f"{where}: {results.SAMPLES} holds other samples (ids {found}) than {results.RESULT} scored "
            f"(ids {result['data']['ids']}); overwrite=true answers again"
        )


@dataclass(frozen=True)
class _Rescored:
    """The rows of samples.parquet with new scores of single answers, as often as they are asked for."""

    path: Path
    scorers: Mapping[str, Scorer]
    examples: Collection[str]
    """Ids of samples whose scores are kept in `scores`."""
    scores: dict[str, dict[str, float | None]] = field(default_factory=dict)

    def __iter__(self) -> Iterator[pa.Table]:
        for table in read_tables(self.path):
            rows = table.select(("id", "prediction", "answers", "target")).to_pylist()
            scores = [score_answer(self.scorers, row["prediction"], row["answers"], row["target"]) for row in rows]
            self.scores.update(
                (row["id"], s) for row, s in zip(rows, scores, strict=True) if row["id"] in self.examples
            )
            table = table.drop_columns([name for name in table.column_names if name.startswith("score_")])
            for name in self.scorers:
                table = table.append_column(f"score_{name}", pa.array([s[name] for s in scores], pa.float64()))
            yield table


def _check_references(folder: Path, rows: SampleColumns, scorers: Mapping[str, Scorer], asked: Sequence[str]) -> None:
    """Raises UserError unless each metric finds a reference in at least one sample."""
    for name in asked:
        if name == _RECALL:
            column, missing = RECALL, "boxes of the evidence"
        else:
            column, missing = f"score_{name}", getattr(scorers[name], "reference", "answers")
        if not len(rows.known(column)):
            raise UserError(f"{METRICS}: {name} needs {missing}, and no sample of {folder.name} has any")


def _asked_with(result: dict[str, Any], metrics: Sequence[str]) -> dict[str, Any]:
    """The record that a job run with these metrics would have."""
    word = f"{METRICS}=[{','.join(metrics)}]"

    def replaced(words: Sequence[str]) -> list[str]:
        return [*(w for w in words if override_key(w) != METRICS), word]

    config = {**result["config"], "data": {**result["config"]["data"], "metrics": list(metrics)}}
    return {
        **result,
        "command": shlex.join(replaced(shlex.split(result["command"]))),
        "overrides": replaced(result["overrides"]),
        "config": config,
        "config_hash": results.config_hash(config),
    }


def _names(word: str) -> tuple[str, ...]:
    """The metrics of `data.metrics=[a,b]`."""
    try:
        value = OverridesParser.create().parse_override(word).value()
    except HydraException as error:
        raise UserError(f"{word}: {str(error).splitlines()[0]}") from None
    if not isinstance(value, list) or not value or not all(isinstance(name, str) for name in value):
        raise UserError(f"{word}: give a list of metrics, for example {METRICS}=[exact_match,anls]")
    return tuple(value)


def _headline(quality: Mapping[str, Any]) -> str:
    score = quality["metrics"][quality["metric"]]
    return f"{quality['metric']} {'-' if score is None else format(100 * score['mean'], '.1f')}"

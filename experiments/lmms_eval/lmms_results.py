"""Finished jobs in the file format of lmms-eval 0.7, for tools that read it: comparisons, leaderboards, viewers.

Writes `STUDY/lmms/JOB/DATE_results.json` and `DATE_samples_TASK.jsonl`, as `--output_path STUDY/lmms --log_samples`
does. The task is the dataset and the model's name is the job's; fields that have no counterpart here are null.
"""

import hashlib
import json
import math
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from experiments.atomic_files import encode_json, write_together
from experiments.jobs.results import RESULT, SAMPLES, read_result
from experiments.jobs.sample_rows import picture_of_row, read_rows
from experiments.metrics import metric
from experiments.override_grammar import command_in
from shirg import UserError

FOLDER = "lmms"
NAME = "shirg"
"""The model's name in lmms-eval, under which `experiments.lmms_eval.lmms_model` is registered."""
UNKNOWN = "N/A"
"""lmms-eval's value for a standard error that cannot be estimated."""


def export(study: Path) -> list[Path]:
    """Writes both files of every finished evaluation of a study, and returns their paths.

    Raises:
        UserError: the study has no finished evaluation.
    """
    written: list[Path] = []
    for path in sorted(study.glob(f"*/{RESULT}")):
        result = read_result(path.parent)
        if result is not None and result["verb"] == "eval" and result["status"] == "ok":
            files = files_of(result, read_rows(path.parent / SAMPLES))
            contents = {study / FOLDER / name: content for name, content in files.items()}
            write_together(contents)
            written += contents
    if not written:
        raise UserError(f"{study} holds no finished evaluation to export: {command_in(study.name)}")
    return written


def files_of(result: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> dict[str, bytes]:
    """A job's samples and results, by their names in `FOLDER`."""
    task = result["data"]["name"]
    stem = f"{sanitise(result['job'])}/{_date(result)}"
    lines = [sample(number, row) for number, row in enumerate(rows)]
    return {
        f"{stem}_samples_{task}.jsonl": "".join(json.dumps(x, ensure_ascii=False) + "\n" for x in lines).encode(),
        f"{stem}_results.json": encode_json(results(result, rows, [line["doc_hash"] for line in lines])),
    }


def results(result: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], hashes: Sequence[str]) -> dict[str, Any]:
    """The object of `DATE_results.json`."""
    task, config, times = result["data"]["name"], result["config"], result["times"]
    metrics = {name: metric(name).higher_is_better for name in result["quality"]["metrics"]}
    length = config["decode"]["max_new_tokens"] or config["data"]["max_new_tokens"]
    began, ended = (datetime.fromisoformat(times[key]).timestamp() for key in ("started", "finished"))
    return {
        "results": {task: {"alias": task, **{k: v for name in metrics for k, v in aggregate(rows, name).items()}}},
        "group_subtasks": {task: []},
        "configs": {
            task: {
                "task": task,
                "dataset_path": (result["data"].get("found") or {}).get("id") or task,
                "test_split": result["data"]["split"],
                "output_type": "generate_until",
                "generation_kwargs": {"max_new_tokens": length, "do_sample": bool(config["decode"]["temperature"])},
                "metric_list": [
                    {"metric": n, "aggregation": "mean", "higher_is_better": h} for n, h in metrics.items()
                ],
                "num_fewshot": 0,
                "metadata": {key: result["data"].get(key) for key in ("ids", "prompt", "cleaner", "scorer")},
            }
        },
        "versions": {task: result["data"].get("scorer")},
        "n-shot": {task: 0},
        "higher_is_better": {task: metrics},
        "n-samples": {task: {"original": result["data"]["of"], "effective": result["data"]["n"]}},
        "config": {
            "model": NAME,
            "model_args": ",".join(result["overrides"]),
            "model_backend": None,
            "batch_size": config["batch_size"],
            "batch_sizes": [],
            "device": result["environment"]["device"],
            "use_cache": None,
            "limit": config["limit"],
            "offset": 0,
            "bootstrap_iters": 0,
            "process_docs_parallel": 1,
            "gen_kwargs": None,
            **dict.fromkeys(("random_seed", "numpy_seed", "torch_seed", "fewshot_seed"), config["seed"]),
            "resolved_cli_args": config,
        },
        "git_hash": result["environment"]["git"],
        "git_branch": None,
        "lmms_eval_version": None,
        "date": _date(result),
        "usage": {},
        "task_hashes": {task: _hash("".join(f"sample_{number}{one}" for number, one in enumerate(hashes)))},
        "model_source": NAME,
        "model_name": result["job"],
        "model_name_sanitized": sanitise(result["job"]),
        **dict.fromkeys(("system_instruction", "system_instruction_sha", "fewshot_as_multiturn")),
        **dict.fromkeys(("chat_template", "chat_template_sha")),
        "start_time": began,
        "end_time": ended,
        "total_evaluation_time_seconds": str(times["wall_s"]),
    }


def sample(number: int, row: Mapping[str, Any]) -> dict[str, Any]:
    """A line of `DATE_samples_TASK.jsonl`; metrics without a score are left out."""
    document = {key: row[key] for key in ("id", "picture", "question", "answers")}
    answers = row["answers"]
    return {
        "doc_id": number,
        "target": answers[0] if len(answers) == 1 else str(answers),
        "filtered_resps": row["prediction"],
        "token_counts": [{"input_tokens": row["n_prefix"]}],
        "doc_hash": _hash(json.dumps(document, indent=2, ensure_ascii=False)),
        **{name: score for name, score in row["scores"].items() if score is not None},
        "input": "\n\n".join([*(row.get("history") or ()), row["prompt"]]),
    }


def aggregate(rows: Sequence[Mapping[str, Any]], name: str) -> dict[str, float | str]:
    """A metric's mean with its standard errors, of independent samples and of pictures as clusters."""
    scored = [(row["scores"][name], picture_of_row(row)) for row in rows if row["scores"][name] is not None]
    if not scored:
        return {}
    scores = [score for score, _ in scored]
    mean = math.fsum(scores) / len(scores)
    alone = clustered = None
    if len(scores) > 1:
        variance = math.fsum((score - mean) ** 2 for score in scores) / (len(scores) - 1) / len(scores)
        alone = math.sqrt(variance)
        pictures: dict[str, list[float]] = defaultdict(list)
        for score, picture in scored:
            pictures[picture].append(score - mean)
        if len(pictures) > 1:
            # Miller (2024), equation 4: the covariance of answers about one picture is added to the plain variance.
            shared = math.fsum(math.fsum(part) ** 2 - math.fsum(x * x for x in part) for part in pictures.values())
            clustered = math.sqrt(max(0.0, variance + shared / len(scores) ** 2))
    errors = {"stderr": alone, "stderr_clt": alone, "stderr_clustered": clustered}
    named = {f"{name}_{kind},none": UNKNOWN if error is None else error for kind, error in errors.items()}
    return {f"{name},none": mean, **named}


def sanitise(name: str) -> str:
    """A name as lmms-eval makes a folder of it."""
    return re.sub(r'["<>:/|\\?*\[\]]+', "__", name)


def _date(result: Mapping[str, Any]) -> str:
    return datetime.fromisoformat(result["times"]["finished"]).strftime("%Y%m%d_%H%M%S")


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()

"""lmms-eval's requests answered by our systems: the same answers and scores as our own evaluation's."""

import hashlib
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tomllib
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import datasets
import pytest
from PIL import Image

from experiments.data.synthetic.glyphs import SynthGlyphs
from experiments.lmms_eval.answerer import Answerer, LmmsRequest
from experiments.lmms_eval.lmms_results import aggregate, export
from experiments.report.__main__ import main as report
from experiments.schema import CONF
from shirg import UserError
from tests.data import official
from tests.experiments.conftest import result_of, rows_of

Eval = Callable[..., Path]
N = 24
SHIPPED = CONF.parent / "weights" / "tiny"
"""Weights that give right and wrong answers; random ones are always wrong, and any score would do."""
TASK = """\
task: local_glyphs
dataset_path: parquet
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: generate_until
doc_to_visual: !function glyphs.picture
doc_to_text: prompt
doc_to_target: answer
generation_kwargs: {{max_new_tokens: 3, until: ["\\n\\n"]}}
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true, ignore_case: true}}
"""


def glyphs() -> SynthGlyphs:
    return SynthGlyphs(
        split="test", n=N, density=["sparse"], tasks=["digit", "letter", "shape"], seed=0, qa_per_image=6
    )


def requests(**options: Any) -> list[LmmsRequest]:
    """One for each sample of `glyphs`, as lmms-eval would make them."""
    samples = [glyphs()[i] for i in range(N)]
    return [LmmsRequest(s.id, s.prompt, [s.load_image()], {"max_new_tokens": 3} | options, s.question) for s in samples]


@pytest.fixture(scope="module")
def answerer() -> Answerer:
    return Answerer({"selector": "shirg", "model.path": SHIPPED, "batch_size": 16, "device": "cpu", "adapter": "own"})


def test_answers_are_those_of_our_own_evaluation(answerer: Answerer, eval_here: Eval) -> None:
    words = ("selector=shirg", f"model.path={SHIPPED}", "device=cpu", "adapter=own", "shots=0")
    rows = rows_of(eval_here(*words, f"data.n={N}", "data.density=sparse"))
    answers = answerer.answer(requests())
    assert [a.text for a in answers] == [row["prediction"] for row in rows]
    assert [a.n_prefix for a in answers] == [row["n_prefix"] for row in rows]
    assert len({a.text for a in answers}) > 5, "random weights would say one thing"


def test_a_dream_is_loaded_answers_and_samples_by_top_p(eval_here: Eval) -> None:
    words = (
        "selector=shirg",
        "model=tiny_dream_scratch",
        "device=cpu",
        "shots=0",
        f"data.n={N}",
        "data.density=sparse",
    )
    rows = rows_of(eval_here(*words))
    answerer = Answerer({"selector": "shirg", "model": "tiny_dream_scratch", "batch_size": 16, "device": "cpu"})
    answers = answerer.answer(requests())
    assert [(a.text, a.n_prefix) for a in answers] == [(row["prediction"], row["n_prefix"]) for row in rows]
    likeliest, loose = (
        answerer.answer(requests(do_sample=True, temperature=5.0, top_p=top_p)) for top_p in (1e-6, 0.99)
    )
    assert likeliest == answers != loose


def test_a_task_says_how_long_and_until_where(tiny_weights: Path) -> None:
    """Random weights fill an answer to its end."""
    answerer = Answerer({"selector": "pooled", "model.path": tiny_weights, "batch_size": 16, "device": "cpu"})
    whole, short = answerer.answer(requests()), answerer.answer(requests(max_new_tokens=1))
    assert [a.text for a in whole] != [a.text for a in short]
    first = whole[0].text
    (cut, *_) = answerer.answer(requests(until=["\n\n", first[-1]]))
    assert cut.text == first[: first.index(first[-1])] != first
    mixed = [*requests()[:2], *requests(max_new_tokens=1)[2:4], *requests()[4:]]
    assert [a.text for a in answerer.answer(mixed)] == [(short if 2 <= i < 4 else whole)[i].text for i in range(N)], (
        "answers stay in the order of their requests"
    )


def test_sampling_is_asked_for_by_a_temperature(answerer: Answerer) -> None:
    greedy = [a.text for a in answerer.answer(requests(temperature=0.0, do_sample=False, top_p=0.5, num_beams=1))]
    assert greedy == [a.text for a in answerer.answer(requests())]
    hot = requests(do_sample=True, temperature=5.0, top_p=None)
    assert [a.text for a in answerer.answer(hot)] != greedy


def test_tokens_are_ranked_by_the_question_alone_where_it_is_known(answerer: Answerer) -> None:
    """With one that asks for something else, the same prompt gets other tokens and other answers."""
    asked = requests()
    other = [LmmsRequest(r.id, r.prompt, r.visuals, r.options, "shape") for r in asked]
    assert [a.text for a in answerer.answer(other)] != [a.text for a in answerer.answer(asked)]


def test_transparent_pictures_become_white(answerer: Answerer) -> None:
    clear = [LmmsRequest(r.id, r.prompt, [r.visuals[0].convert("RGBA")], r.options, r.question) for r in requests()]
    assert answerer.answer(clear) == answerer.answer(requests())


PICTURE = Image.new("RGB", (9, 9))
REFUSED: dict[str, tuple[list[Any], dict[str, Any], str]] = {
    "no picture": ([], {}, "t/0: the model reads one picture with each question; this one comes with nothing"),
    "a film": (["film.mp4"], {}, "this one comes with str"),
    "two pictures": ([PICTURE] * 2, {}, "this one comes with Image, Image"),
    "no length": ([PICTURE], {"max_new_tokens": None}, "names no max_new_tokens; add decode.max_new_tokens=N"),
    "beams": (
        [PICTURE],
        {"do_sample": True, "num_beams": 4},
        "samples with num_beams=4, but a masked diffusion model has no beams",
    ),
    "top-p": (
        [PICTURE],
        {"do_sample": True, "top_p": 0.5},
        "t/0: its task samples. decode.top_p=0.5 belongs to Dream's",
    ),
}
"""Pictures and options of a request, and words of the sentence that refuses it."""


@pytest.mark.parametrize("case", REFUSED)
def test_refused_requests(answerer: Answerer, case: str) -> None:
    visuals, options, words = REFUSED[case]
    with pytest.raises(UserError) as error:
        answerer.answer([LmmsRequest("t/0", "?", visuals, {"max_new_tokens": 2} | options, "?")])
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"selector": "shrig"}, "--model_args: selector=shrig: there is no such option; did you mean shirg?"),
        ({"selector": "pooled", "selector.buget": 3}, "--model_args: selector.buget: selector=pooled has no such"),
    ],
)
def test_refused_model_args(overrides: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError) as error:
        Answerer(overrides)
    assert words in str(error.value)


def test_lmms_eval_finds_the_model() -> None:
    """The entry point of pyproject.toml names a module and a name in it; lmms-eval itself may be absent."""
    points = tomllib.loads((CONF.parent / "pyproject.toml").read_text())["project"]["entry-points"]["lmms_eval.models"]
    module, _, name = points["shirg"].partition(":")
    spec = importlib.util.find_spec(module)
    assert spec is not None and spec.origin is not None
    assert f"\n{name} = " in Path(spec.origin).read_text()


def local_task(folder: Path) -> None:
    """A task of lmms-eval over a parquet file of the glyphs, and its two functions."""
    samples = [glyphs()[i] for i in range(N)]
    table = {
        "prompt": [s.prompt for s in samples],
        "question": [s.question for s in samples],
        "answer": [s.answers[0] for s in samples],
        "image": [s.load_image() for s in samples],
    }
    features = datasets.Features(
        {**{key: datasets.Value("string") for key in ("prompt", "question", "answer")}, "image": datasets.Image()}
    )
    folder.mkdir()
    datasets.Dataset.from_dict(table, features=features).to_parquet(str(folder / "glyphs.parquet"))
    (folder / "local_glyphs.yaml").write_text(TASK.format(file=folder / "glyphs.parquet"))
    (folder / "glyphs.py").write_text("def picture(doc):\n    return [doc['image']]\n")


def run_lmms(cwd: Path, model_args: str, *more: str) -> tuple[dict[str, Any], list[dict[str, Any]], str]:
    """Results, samples and output of the command line."""
    command = [sys.executable, "-m", "lmms_eval", "--model", "shirg", "--model_args", model_args, *more]
    command += ["--tasks", "local_glyphs", "--include_path", str(cwd / "tasks"), "--device", "cpu"]
    command += ["--batch_size", "16", "--output_path", str(cwd / "out"), "--log_samples"]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(cwd / "hub"), "PYTHONPATH": str(CONF.parent)}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=540)
    assert done.returncode == 0, done.stdout + done.stderr
    (results,), (samples,) = (list((cwd / "out").rglob(name)) for name in ("*_results.json", "*_samples_*.jsonl"))
    lines = samples.read_text().splitlines()
    return json.loads(results.read_text()), [json.loads(line) for line in lines], done.stdout + done.stderr


@pytest.mark.slow
def test_lmms_eval_reports_our_own_score(tmp_path: Path, eval_here: Eval) -> None:
    """The command line as a user gives it, on a task that lies on this disk."""
    pytest.importorskip("lmms_eval")
    local_task(tmp_path / "tasks")
    words = ("selector=pooled", f"model.path={SHIPPED}")
    results, samples, _ = run_lmms(tmp_path, ",".join((*words, "question=question")))
    ours = eval_here(*words, "device=cpu", "shots=0", f"data.n={N}", "data.density=sparse")
    rows = rows_of(ours)
    assert [sample["filtered_resps"] for sample in samples] == [row["prediction"] for row in rows]
    assert [sample["exact_match"] for sample in samples] == [row["score_exact_match"] for row in rows]
    assert [s["token_counts"] for s in samples] == [[{"input_tokens": row["n_prefix"]}] for row in rows]
    score = result_of(ours)["quality"]["metrics"]["exact_match"]["mean"]
    assert results["results"]["local_glyphs"]["exact_match,none"] == score
    assert 0 < score < 1


KEYS_OF_RESULTS = """results group_subtasks configs versions n-shot higher_is_better n-samples config git_hash
git_branch lmms_eval_version date usage task_hashes model_source model_name model_name_sanitized system_instruction
system_instruction_sha fewshot_as_multiturn chat_template chat_template_sha start_time end_time
total_evaluation_time_seconds""".split()
KEYS_OF_A_SAMPLE = ["doc_id", "target", "filtered_resps", "token_counts", "doc_hash", "exact_match", "input"]
KEYS_OF_CONFIG = """model model_args model_backend batch_size batch_sizes device use_cache limit offset bootstrap_iters
process_docs_parallel gen_kwargs random_seed numpy_seed torch_seed fewshot_seed resolved_cli_args""".split()
"""What lmms-eval 0.7.3 writes; `test_lmms_eval_writes_these_keys` holds it to that."""


def exported(study: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Results and samples of the study's only job."""
    (results,), (samples,) = (list((study / "lmms").rglob(name)) for name in ("*_results.json", "*_samples_*.jsonl"))
    return json.loads(results.read_text()), [json.loads(line) for line in samples.read_text().splitlines()]


def test_results_in_their_form(eval_here: Eval, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("selector=shirg", f"model.path={SHIPPED}", "adapter=own", "device=cpu", "shots=0", "data.density=sparse")
    job = eval_here(*words, f"data.n={N}", "study=s")
    capsys.readouterr()
    report([str(job.parent), "--lmms"])
    results, samples = exported(job.parent)
    ours, rows = result_of(job), rows_of(job)
    stamp = datetime.fromisoformat(ours["times"]["finished"]).strftime("%Y%m%d_%H%M%S")
    folder = f"lmms/{job.name}/{stamp}"
    assert capsys.readouterr().out.split() == [
        "written:",
        f"{folder}_samples_synth_glyphs.jsonl",
        f"{folder}_results.json",
    ]
    assert list(results) == KEYS_OF_RESULTS and list(results["config"]) == KEYS_OF_CONFIG
    assert all(list(sample) == KEYS_OF_A_SAMPLE for sample in samples)
    assert [(s["doc_id"], s["filtered_resps"], s["exact_match"], s["target"], s["input"]) for s in samples] == [
        (i, row["prediction"], row["score_exact_match"], row["answers"][0], row["prompt"]) for i, row in enumerate(rows)
    ]
    scores = [row["score_exact_match"] for row in rows]
    error = statistics.stdev(scores) / N**0.5
    found = results["results"]["synth_glyphs"]
    assert list(found) == [
        "alias",
        *(f"exact_match{k},none" for k in ("", "_stderr", "_stderr_clt", "_stderr_clustered")),
    ]
    assert found["exact_match,none"] == ours["quality"]["metrics"]["exact_match"]["mean"]
    assert found["exact_match_stderr,none"] == found["exact_match_stderr_clt,none"] == pytest.approx(error, rel=1e-12)
    assert results["n-samples"] == {"synth_glyphs": {"original": N, "effective": N}}
    hashes = "".join(f"sample_{i}{s['doc_hash']}" for i, s in enumerate(samples))
    assert results["task_hashes"] == {"synth_glyphs": hashlib.sha256(hashes.encode()).hexdigest()}
    assert results["config"]["model_args"] == ",".join(ours["overrides"]) and results["date"] == stamp


def test_standard_errors_by_hand() -> None:
    """Two pictures with two answers each: what the two share counts, as in lmms-eval's `clustered_stderr`."""
    rows = [{"scores": {"m": s}, "picture": p} for s, p in ((1.0, "a"), (1.0, "a"), (0.0, "b"), (1.0, "b"))]
    found = aggregate(rows, "m")
    mean, variance = 0.75, (3 * 0.25**2 + 0.75**2) / 3
    shared = 2 * 0.25 * 0.25 + 2 * -0.75 * 0.25
    assert found["m,none"] == mean
    assert found["m_stderr,none"] == pytest.approx((variance / 4) ** 0.5, rel=1e-12)
    assert found["m_stderr_clustered,none"] == pytest.approx((variance / 4 + shared / 16) ** 0.5, rel=1e-12)
    assert aggregate(rows[:1], "m") == {"m,none": 1.0} | dict.fromkeys(
        ("m_stderr,none", "m_stderr_clt,none", "m_stderr_clustered,none"), "N/A"
    )
    assert aggregate([{"scores": {"m": None}, "picture": "a"}], "m") == {}


def test_several_answers_and_none(eval_here: Eval, tmp_path: Path) -> None:
    """Metrics of the corpus too; a study without a finished job exports nothing."""
    read = official.write("docvqa", "disk", tmp_path / "pages")
    job = eval_here(*read, "selector=pooled", "shots=0", "decode.max_new_tokens=4", "limit=5", "study=s")
    export(job.parent)
    results, samples = exported(job.parent)
    assert samples[0]["target"] == str(rows_of(job)[0]["answers"]) and samples[0]["target"].startswith("['")
    assert results["n-samples"] == {"docvqa": {"original": official.N, "effective": 5}}
    assert results["configs"]["docvqa"]["generation_kwargs"] == {"max_new_tokens": 4, "do_sample": False}
    assert results["higher_is_better"]["docvqa"] == dict.fromkeys(result_of(job)["quality"]["metrics"], True)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty holds no finished evaluation to export"):
        export(tmp_path / "empty")


@pytest.mark.slow
def test_lmms_eval_writes_these_keys(tmp_path: Path) -> None:
    pytest.importorskip("lmms_eval")
    local_task(tmp_path / "tasks")
    results, samples, _ = run_lmms(tmp_path, f"selector=pooled,model.path={SHIPPED}", "--limit", "6")
    assert [key for key in results if key not in ("throughput", "efficiency")] == KEYS_OF_RESULTS
    assert list(results["config"]) == KEYS_OF_CONFIG
    assert all(list(sample) == KEYS_OF_A_SAMPLE for sample in samples) and len(samples) == 6
    from lmms_eval.api.metrics import clustered_stderr

    scores, pictures = [1.0, 1.0, 0.0, 1.0, 0.5], ["a", "a", "b", "b", "c"]
    rows = [{"scores": {"m": s}, "picture": p} for s, p in zip(scores, pictures, strict=True)]
    assert aggregate(rows, "m")["m_stderr_clustered,none"] == pytest.approx(
        clustered_stderr(scores, pictures), rel=1e-12
    )

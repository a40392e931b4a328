"""Bad input: one clear sentence, exit code 1, no traceback; and nothing heavy before it is needed."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from experiments.errors import is_user_error
from tests.experiments.conftest import ROOT, finish, result_of, start


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (
            ["selector=foo"],
            "error: selector=foo: there is no such option; choose one of cdpruner, divprune, full, global_only, ",
        ),
        (
            ["selector=random", "selector.foo=1"],
            "error: selector.foo: selector=random has no such option; it has budget, geometry, seed",
        ),
        (
            ["-m", "selector=random,pooled", "selector.seed=1"],
            "error: selector.seed: selector=pooled has no such option; it has none",
        ),
        (["batch_size=many"], "error: batch_size=many: Value 'many' of type 'str' could not be converted to Integer"),
        (
            ["decode.schedule=slow"],
            "error: decode.schedule=slow: Invalid value 'slow', expected one of [none, shift, cosine",
        ),
        (["bach_size=3"], "error: bach_size: there is no such key; the keys are adapter, "),
    ],
)
def test_command_lines_that_do_not_compose(overrides: list[str], sentence: str, tmp_path: Path) -> None:
    code, out, err = finish(start("eval", *overrides, cwd=tmp_path))
    assert (code, out, len(err)) == (1, "", 1)
    assert err[0].startswith(sentence)


@pytest.fixture
def bad_folders(picture_folder: Callable[..., Path], tmp_path: Path) -> list[tuple[Path, str]]:
    absent = tmp_path / "absent"
    lost = picture_folder("lost")
    (lost / "0.png").unlink()
    corrupt = picture_folder("corrupt")
    (corrupt / "0.png").write_bytes((corrupt / "0.png").read_bytes()[:200])
    outside = picture_folder("outside")
    row = {"file_name": "../lost/metadata.jsonl", "question": "?", "answers": ["no"]}
    (outside / "metadata.jsonl").write_text(json.dumps(row))
    return [
        (absent, f"data folder {absent} does not exist"),
        (lost, f"line 1: picture {lost / '0.png'} does not exist"),
        (corrupt, f"{corrupt / '0.png'}: cannot be read as a picture"),
        (outside, "picture '../lost/metadata.jsonl' is outside the data folder"),
    ]


def test_bad_folders_fail_their_own_jobs_and_no_other(
    bad_folders: list[tuple[Path, str]], picture_folder: Callable[..., Path], tiny_weights: Path, tmp_path: Path
) -> None:
    """Four sweep points with bad data and one with good data: each says why at once, the good one is in the table."""
    good = picture_folder("good")
    roots = ",".join(str(folder) for folder, _ in [*bad_folders, (good, "")])
    arguments = ["-m", "study=s", "data=folder", f"data.root={roots}", f"model.path={tiny_weights}", "selector=pooled"]
    code, out, err = finish(start("eval", *arguments, cwd=tmp_path))
    assert code == 1
    assert len(err) == 4, err
    results = [result_of(path.parent) for path in (tmp_path / "outputs/s").glob("*/result.json")]
    for line, (folder, sentence) in zip(err, bad_folders, strict=True):
        assert line.startswith("error: eval_data.root-")
        assert sentence in line
        (failed,) = [r for r in results if r["config"]["data"]["root"] == str(folder)]
        assert failed["status"] == "failed"
        assert sentence in failed["reason"]
    assert out.rstrip().endswith("table: outputs/s/table.md   report: outputs/s/report.html")
    table = (tmp_path / "outputs/s/table.md").read_text()
    assert table.count("| failed |") == 4
    assert table.count("| ok |") == 1


def test_a_single_bad_job_prints_one_sentence(tiny_weights: Path, tmp_path: Path) -> None:
    arguments = [f"model.path={tiny_weights}", "decode.max_new_tokens=16", "decode.block_length=3", "limit=1"]
    code, out, err = finish(start("eval", *arguments, cwd=tmp_path))
    assert (code, len(err)) == (1, 1)
    assert err[0].startswith("error: decode.block_length=3 does not divide decode.max_new_tokens=16")
    assert "Traceback" not in out


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["selector=random", "budget=321"], r"budget 321 is larger than the 320 vision tokens"),
        (["selector=shirg", "budget=337"], r"budget 337 .* has 320 tokens to choose from"),
        (["budget=most"], r"budget=most: give base \(80\).*full \(320\).*matched, or a positive number of tokens"),
        (["selector=shirg", "selector.weights.similarity=high"], r"selector.weights.similarity='high' is not a number"),
        (["selector=shirg", "selector.norm=best"], r"selector.norm='best' is not one of zscore, minmax, rank, none"),
        (["selector=random", "+selector.foo=1"], r"selector.foo: Random has no such option; it has budget, seed"),
        (
            ["model.path=./weights/absent"],
            r"model.path=./weights/absent: there are no weights there; `make tiny` trains",
        ),
        (["model=small", "+model.config.lm.depth=3"], r"model.config: no model has a field 'depth'"),
        (["adapter=outputs/absent"], r"outputs/absent holds no adapter"),
        (["device=cuda:99"], r"device=cuda:99: this machine has \d+ CUDA devices"),
        (["limit=0"], r"limit=0: give a positive number of samples"),
        (["batch_size=0"], r"batch_size=0: give at least 1"),
        (["data.metrics=[entity_recall]"], r"scores no answers: name a text metric"),
        (
            ["relevance=external", "relevance.path=absent.safetensors"],
            r"relevance.path=absent.safetensors: no such file",
        ),
    ],
)
def test_values_that_cannot_be(
    overrides: list[str], sentence: str, eval_here: Callable[..., Path], capfd: pytest.CaptureFixture[str]
) -> None:
    limit = [] if "limit=0" in overrides else ["limit=4"]
    folder = eval_here(*limit, *overrides, ok=False)
    (line,) = capfd.readouterr().err.strip().splitlines()
    assert line.startswith("error: ")
    assert re.search(sentence, line), line
    assert result_of(folder)["status"] == "failed"


def test_a_value_that_must_be_given(eval_here: Callable[..., Path], capfd: pytest.CaptureFixture[str]) -> None:
    folder = eval_here("data=folder", ok=False)
    assert capfd.readouterr().err == "error: data.root has no value; give data.root=...\n"
    assert not (folder / "result.json").exists()


def test_a_bug_keeps_its_traceback(
    eval_here: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("experiments.evaluate.summarise", lambda *_: int("seven"))
    folder = eval_here("limit=2", ok=False)
    err = capfd.readouterr().err
    assert "Traceback" in err and "invalid literal for int()" in err
    assert result_of(folder)["reason"].startswith("ValueError: invalid literal")
    assert "invalid literal" in (folder / "error.txt").read_text()


def test_what_counts_as_bad_input() -> None:
    def error_of(call: Callable[[], object]) -> Exception:
        with pytest.raises(Exception) as caught:  # noqa: PT011
            call()
        return caught.value

    from experiments.build import resolve_budget

    assert is_user_error(error_of(lambda: resolve_budget("most", {})))
    assert not is_user_error(error_of(lambda: int("seven")))
    assert not is_user_error(error_of(lambda: Path("absent").read_text()))
    assert not is_user_error(error_of(lambda: {}["key"]))


def test_help_imports_nothing_heavy(tmp_path: Path) -> None:
    code = (
        "import runpy, sys; sys.argv = ['eval.py', '--help']; sys.path.insert(0, {root!r})\n"
        "try: runpy.run_path({path!r}, run_name='__main__')\n"
        "except SystemExit: pass\n"
        "assert not {{'torch', 'transformers', 'lightning', 'numpy', 'PIL'}} & set(sys.modules)\n"
    )
    for verb in ("eval", "train"):
        program = code.format(root=str(ROOT), path=str(ROOT / f"{verb}.py"))
        done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "pooled" in done.stdout and "resume=true" in done.stdout

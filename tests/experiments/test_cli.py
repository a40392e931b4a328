"""Command lines: one sentence for bad input, a traceback for a bug, and no heavy imports before they are needed."""

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from experiments.build import resolve_budget
from experiments.errors import ConfigError, is_user_error
from shirg import MissingFileError
from tests.experiments.conftest import ROOT, Command, result_of

Eval = Callable[..., Path]
OUTSIDE = """
import dataclasses
import numpy as np
from experiments.data.folder import Folder
from shirg import UserError

def shapes():
    return np.zeros(3) @ np.zeros(4)

def refused():
    try:
        shapes()
    except ValueError as error:
        raise UserError(str(error)) from None

class Bug(Folder):
    def __getitem__(self, index):
        return dataclasses.replace(super().__getitem__(index), load_image=shapes)

class Refused(Folder):
    def __getitem__(self, index):
        return dataclasses.replace(super().__getitem__(index), load_image=refused)

class Picky(Folder):
    def __init__(self, *, flavour="sweet", **options):
        if flavour == "sour":
            raise ValueError("flavours are sweet\\nor salty")
        super().__init__(**options)
"""
"""A plug-in outside the four packages."""
NUMPY = "matmul: Input operand 1 has a mismatch in its core dimension"


@pytest.fixture
def outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, picture_folder: Callable[..., Path]) -> list[str]:
    """The overrides that read a folder; the classes of the module `outside` take its place by `data._target_`."""
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "outside.py").write_text(OUTSIDE)
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    monkeypatch.delitem(sys.modules, "outside", raising=False)
    return ["selector=pooled", "data=folder", f"data.root={picture_folder('mine')}", "decode.max_new_tokens=4"]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_numpy_error_in_a_picture_is_a_bug_and_keeps_its_traceback(
    workers: int, outside: list[str], eval_here: Eval, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = eval_here(*outside, "data._target_=outside.Bug", f"workers={workers}", ok=False)
    assert result_of(folder)["reason"].startswith(f"ValueError: {NUMPY}")
    for trace in (capfd.readouterr().err, (folder / "error.txt").read_text()):
        assert "Traceback" in trace and "return np.zeros(3) @ np.zeros(4)" in trace


def test_the_same_sentence_raised_on_purpose_is_bad_input(
    outside: list[str], eval_here: Eval, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = eval_here(*outside, "data._target_=outside.Refused", ok=False)
    assert result_of(folder)["reason"].startswith(NUMPY)
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith(f"error: {NUMPY}")


def test_what_a_constructor_refuses_is_bad_input(
    outside: list[str], eval_here: Eval, capfd: pytest.CaptureFixture[str]
) -> None:
    eval_here(*outside, "data._target_=outside.Picky", "+data.flavour=sour", ok=False)
    assert capfd.readouterr().err == "error: data: Picky cannot be built: flavours are sweet or salty\n"
    eval_here(*outside, "data._target_=outside.Nothing", ok=False)
    assert "error: data._target_=outside.Nothing: outside has no class Nothing" in capfd.readouterr().err


def test_what_counts_as_bad_input() -> None:
    def error_of(call: Callable[[], object]) -> Exception:
        with pytest.raises(Exception) as caught:  # noqa: PT011
            call()
        return caught.value

    assert is_user_error(error_of(lambda: resolve_budget("most", {})))
    assert is_user_error(MissingFileError("no such file")) and is_user_error(ConfigError("no such key"))
    assert not is_user_error(error_of(lambda: int("seven")))
    assert not is_user_error(error_of(lambda: Path("absent").read_text()))
    assert not is_user_error(error_of(lambda: {}["key"]))


def test_a_bug_keeps_its_traceback(
    eval_here: Eval, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("experiments.evaluate.summarise", lambda *_: int("seven"))
    folder = eval_here("limit=2", ok=False)
    err = capfd.readouterr().err
    assert "Traceback" in err and "invalid literal for int()" in err
    assert result_of(folder)["reason"].startswith("ValueError: invalid literal")
    assert "invalid literal" in (folder / "error.txt").read_text()


def test_a_bug_while_scoring_again_keeps_its_traceback(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("experiments.rescore.job_folders", lambda *_: int("seven"))
    with pytest.raises(ValueError, match="invalid literal"):
        command("eval", "rescore=outputs/s")


def test_bad_folders_fail_their_own_jobs_and_no_other(
    picture_folder: Callable[..., Path], tiny_weights: Path, tmp_path: Path, command: Command
) -> None:
    """Four sweep points with bad data and one with good data: each says why at once, the good one is in the table.

    Only the torn picture is found after its job has begun, and has a row.
    """
    lost, corrupt, outside, good = (picture_folder(name) for name in ("lost", "corrupt", "outside", "good"))
    (lost / "0.png").unlink()
    (corrupt / "0.png").write_bytes((corrupt / "0.png").read_bytes()[:200])
    (outside / "metadata.jsonl").write_text(
        '{"file_name": "../lost/metadata.jsonl", "question": "?", "answers": ["a"]}'
    )
    bad = [
        (tmp_path / "absent", "data folder .*absent does not exist"),
        (lost, "line 1: picture .* does not exist"),
        (corrupt, "0.png: cannot be read as a picture"),
        (outside, "is outside the data folder"),
    ]
    roots = ",".join(str(folder) for folder in (*(folder for folder, _ in bad), good))
    words = ["-m", "study=s", "data=folder", f"data.root={roots}", f"model.path={tiny_weights}", "selector=pooled"]
    ended = command("eval", *words)
    assert ended.code == 1 and len(ended.err) == len(bad), ended.err
    results = [result_of(path.parent) for path in (tmp_path / "outputs/s").glob("*/result.json")]
    for line, (folder, sentence) in zip(ended.err, bad, strict=True):
        failed = [r for r in results if r["config"]["data"]["root"] == str(folder)]
        assert [r["status"] for r in failed] == (["failed"] if folder == corrupt else [])
        assert re.search(sentence, line) and all(line == f"error: {r['job']}: {r['reason']}" for r in failed)
    assert ended.out.rstrip().endswith("table: outputs/s/table.md   report: outputs/s/report.html")
    table = (tmp_path / "outputs/s/table.md").read_text()
    assert (table.count("| failed "), table.count("| ok ")) == (1, 1)


def test_a_launcher_that_is_not_there(command: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Without srun nothing is submitted, and no job begins."""
    monkeypatch.setattr("experiments.cli.shutil.which", lambda name: None)
    ended = command("eval", "-m", "hydra/launcher=slurm", "selector=pooled,full")
    assert ended.code == 1 and ended.err[-1].startswith("error: hydra/launcher=slurm: there is no srun on this machine")
    assert not (tmp_path / "outputs").exists()
    ended = command("eval", "hydra/launcher=slurm", "--cfg", "hydra")
    assert ended.code == 0 and "SlurmJobs" in ended.out


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["lora.grow={start: 3}"], "lora.grow={start: 3}: lora.grow is null here; these have it: lora=progressive"),
        (["lora.grow.start=3"], "lora.grow.start=3: lora.grow is null here; these have it: lora=progressive"),
        (
            ["-m", "objective.subsets.tilt=1,2"],
            "objective.subsets.tilt=1,2: objective.subsets is null here; "
            "these have it: objective=joint, straight_through, subset_mil, subset_regression",
        ),
    ],
)
def test_a_value_below_a_null_section_names_the_options_that_have_it(
    command: Command, words: list[str], sentence: str
) -> None:
    ended = command("train", *words)
    assert ended.code == 1 and ended.err[-1] == f"error: {sentence}"


def test_a_command_knows_nothing_of_the_one_before(command: Command, tiny_weights: Path) -> None:
    words = (f"model.path={tiny_weights}", "selector=pooled", "shots=0", "study=s", "device=cpu")
    assert command("eval", *words, "limit=0").code == 1
    ended = command("eval", *words, "limit=2")
    assert (ended.code, ended.err) == (0, []) and ended.out.count("table: outputs/s/table.md") == 1


def test_help_imports_nothing_heavy(tmp_path: Path) -> None:
    program = (
        "import runpy, sys\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "for name in ('eval', 'train'):\n"
        f"    sys.argv = [f'{ROOT}/{{name}}.py', '--help']\n"
        "    try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "    except SystemExit: pass\n"
        "assert not {'torch', 'transformers', 'lightning', 'numpy', 'PIL'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("  pooled ") == 2 and done.stdout.count("resume=true") == 2

"""How commands end when they are interrupted, or when a file cannot be written: one sentence, and resume=true works."""

import errno
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from experiments.errors import sentence_of
from experiments.report import __main__ as report
from experiments.training.callbacks import Throughput
from tests.experiments.conftest import Command, lasting, little_room, result_of, rows_of, table_without_times

EVAL = ("eval", "selector=pooled", "limit=12", "batch_size=4", "shots=0")
TRAIN = ("train", "selector=shirg", "optim.steps=6", "optim.warmup=0", "batch_size=2", "trainer.checkpoint_every=2")
COMMON = ("study=s", "device=cpu", "threads=1")


@pytest.mark.parametrize(
    ("number", "name", "sentence"),
    [
        (errno.ENOSPC, None, "FOLDER could not be written (No space left on device): make room there; AGAIN"),
        (errno.ENOSPC, "table.csv", "table.csv could not be written (No space left on device): make room there; AGAIN"),
        (errno.EROFS, "a", "a could not be written (Read-only file system): get leave to write there, or start in an"),
        (errno.EACCES, "locked", "locked could not be written (Permission denied): get leave"),
        (errno.EACCES, "locked/new/file", "locked/new/file could not be written (Permission denied): get leave"),
        (errno.EACCES, "open/secret", "open/secret could not be read (Permission denied): get leave to read it"),
        (errno.ENAMETOOLONG, "a" * 5000, f"{'a' * 80}... (5,000 characters) is too long for the name of a file: give"),
        (errno.EACCES, None, None),
        (errno.ENOENT, "locked", None),
        (errno.EIO, "locked", None),
    ],
)
def test_a_file_that_cannot_be_written_is_told_from_one_that_cannot_be_read(
    number: int, name: str | None, sentence: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As root there are no permissions: os.access answers as for somebody else."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "locked").mkdir()
    (tmp_path / "open").mkdir()
    (tmp_path / "open/secret").touch()

    def access(path: Any, mode: int) -> bool:
        return {"locked": mode != os.W_OK, "secret": mode == os.W_OK}.get(Path(path).name, True)

    monkeypatch.setattr(os, "access", access)
    found = sentence_of(OSError(number, os.strerror(number), name), "AGAIN", Path("FOLDER") if name is None else None)
    if number == errno.ENOSPC and name is None:
        assert found == sentence
    elif sentence is None:
        assert found is None
    else:
        assert found is not None and found.startswith(sentence)


@pytest.mark.parametrize("words", [EVAL, ("eval", "-m", *EVAL[1:]), TRAIN])
@pytest.mark.parametrize("size", [1_000, 20_000])
def test_a_full_disk_costs_one_sentence_and_no_answers(
    words: tuple[str, ...], size: int, command: Command, tiny_weights: Path, tmp_path: Path
) -> None:
    words = (*words, *COMMON, f"model.path={tiny_weights}")
    with little_room(size):
        ended = command(*words, cwd=tmp_path / "full")
    assert ended.code == 1 and len(ended.err) == 1, ended.err
    assert "could not be written" in ended.err[0] and "File too large" in ended.err[0]
    assert ended.err[0].startswith("error: ") and "resume=true" in ended.err[0]
    again, calm = (
        command(*words, *more, cwd=tmp_path / place) for place, more in (("full", ["resume=true"]), ("calm", []))
    )
    assert (again.code, again.err, calm.code) == (0, [], 0)
    equal(tmp_path / "full/outputs/s", tmp_path / "calm/outputs/s")


def equal(study: Path, calm: Path) -> None:
    """The same files, records and rows."""
    ours, theirs = ({str(path.relative_to(top)) for path in top.rglob("*")} for top in (study, calm))
    assert ours == theirs
    for record in calm.glob("*/result.json"):
        here = study / record.parent.name
        assert lasting(result_of(here)) == lasting(result_of(record.parent))
        if (here / "samples.parquet").exists():
            assert rows_of(here) == rows_of(record.parent)
    if (calm / "table.csv").exists():  # a study of trainings alone has none
        assert table_without_times(study) == table_without_times(calm)


def test_a_full_disk_while_scoring_again_and_reporting(
    command: Command, tiny_weights: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert command(*EVAL, *COMMON, f"model.path={tiny_weights}").code == 0
    (job,) = (tmp_path / "outputs/s").glob("eval_*")
    with little_room(1_000):
        ended = command("eval", f"rescore={job}")
    assert ended.code == 1 and len(ended.err) == 1
    assert "could not be written (File too large): make room there; run the command again" in ended.err[0]
    with little_room(20_000), pytest.raises(SystemExit):
        report.main([str(tmp_path / "outputs/s")])
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("error: ") and "could not be written (File too large)" in line
    assert command("eval", f"rescore={job}").code == 0


@pytest.mark.parametrize("words", [EVAL, ("eval", "-m", *EVAL[1:]), TRAIN])
def test_sigterm_says_what_ctrl_c_says_and_nothing_is_lost(
    words: tuple[str, ...], command: Command, tiny_weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = (*words, *COMMON, f"model.path={tiny_weights}")
    before = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        if "train" in words:
            told = Throughput.on_train_batch_end

            def terminate(self: Throughput, trainer: Any, *more: Any) -> None:
                told(self, trainer, *more)
                if trainer.global_step == 3:
                    signal.raise_signal(signal.SIGTERM)

            patch.setattr(Throughput, "on_train_batch_end", terminate)
        else:
            patch.setattr(
                "experiments.progress.Progress.advance", lambda self, n: n and signal.raise_signal(signal.SIGTERM)
            )
        ended = command(*words, cwd=tmp_path / "rough")
    assert (ended.code, ended.err) == (143, ["error: interrupted; the same command with resume=true goes on from here"])
    assert signal.getsignal(signal.SIGTERM) == before
    again, calm = (
        command(*words, *more, cwd=tmp_path / place) for place, more in (("rough", ["resume=true"]), ("calm", []))
    )
    assert (again.code, again.err, calm.code) == (0, [], 0)
    equal(tmp_path / "rough/outputs/s", tmp_path / "calm/outputs/s")

"""Training that is killed or runs out of disk space, then resumed: it ends as an undisturbed run does."""

import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from experiments.training.trainer import SafeCheckpoints
from shirg import UserError
from tests.experiments.conftest import Here, finish, lasting, little_room, result_of, start
from tests.experiments.training.runs import last_step, wait_for_step

WORDS = ["selector=shirg", "batch_size=4", "trainer.log_every=2", "lora.dropout=0.1", "study=s"]
ALONE = ["optim.warmup=0", "threads=1", "device=cpu"]


def outcome(folder: Path) -> dict[str, bytes]:
    """Weights and curve, byte by byte."""
    names = ("metrics.csv", *(f"adapter/adapter{end}" for end in ("_model.safetensors", "_config.json", ".json")))
    return {name: (folder / name).read_bytes() for name in names}


def test_a_killed_run_ends_as_an_undisturbed_one(train_here: Here, tiny_weights: Path, tmp_path: Path) -> None:
    words = [*WORDS, "optim.steps=40", "trainer.checkpoint_every=5"]
    whole = train_here(*words, root=tmp_path / "whole")
    killed = tmp_path / "killed"
    killed.mkdir()
    process = start("train", f"model.path={tiny_weights}", *ALONE, *words, cwd=killed)
    wait_for_step(process, killed, 8)
    process.send_signal(signal.SIGKILL)
    finish(process)
    (folder,) = (killed / "outputs/s").glob("train_*")
    assert result_of(folder)["status"] == "running"
    assert 5 <= last_step(folder) < 40, "killed too early or too late"
    (folder / "checkpoints/.last.ckpt.1").write_bytes(b"torn")  # what a kill in the middle of writing leaves
    at = last_step(folder)
    with little_room(20_000):
        train_here(*words, "resume=true", root=killed, ok=False)
    reason = result_of(folder)["reason"]
    assert "could not be written" in reason and "the last one is kept: make room and give resume=true" in reason
    assert last_step(folder) == at
    resumed = train_here(*words, "resume=true", root=killed)
    assert resumed == folder and not (folder / "checkpoints").exists()
    assert outcome(folder) == outcome(whole)
    assert lasting(result_of(folder))["training"] == lasting(result_of(whole))["training"]


@pytest.mark.slow
def test_five_kills_at_random_steps(tiny_weights: Path, tmp_path: Path) -> None:
    words = [f"model.path={tiny_weights}", *ALONE, *WORDS, "optim.steps=120", "trainer.checkpoint_every=7"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for root in (whole, killed):
        root.mkdir()
    assert finish(start("train", *words, cwd=whole))[0] == 0
    draw = random.Random(time.time_ns())
    steps = sorted(draw.sample(range(2, 112, 2), 5))
    print("killed after steps", steps)
    for step in steps:
        process = start("train", *words, "resume=true", cwd=killed)
        wait_for_step(process, killed, step)
        time.sleep(draw.random() / 20)
        process.send_signal(signal.SIGKILL)
        finish(process)
    assert finish(start("train", *words, "resume=true", cwd=killed))[0] == 0
    (folder,), (whole_folder,) = ((root / "outputs/s").glob("train_*") for root in (killed, whole))
    assert outcome(folder) == outcome(whole_folder)


class _Killer:
    """Kills the process that pickles it."""

    def __reduce__(self) -> Any:
        os.kill(os.getpid(), signal.SIGKILL)


class _Printer:
    """Code in a checkpoint, which must not run."""

    def __reduce__(self) -> Any:
        return print, ("run",)


def test_a_kill_while_writing_keeps_the_checkpoint_before_it(tmp_path: Path) -> None:
    path, files = tmp_path / "last.ckpt", SafeCheckpoints()
    files.save_checkpoint({"global_step": 3, "x": torch.ones(5)}, path)
    child = os.fork()
    if child == 0:
        files.save_checkpoint({"global_step": 4, "x": torch.zeros(1000), "then": _Killer()}, path)
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    found = files.load_checkpoint(path)
    assert found["global_step"] == 3 and found["x"].tolist() == [1.0] * 5


@pytest.mark.parametrize("first", [True, False])
def test_a_disk_without_room_keeps_the_checkpoint_before_it(first: bool, tmp_path: Path) -> None:
    path, files = tmp_path / "last.ckpt", SafeCheckpoints()
    if not first:
        files.save_checkpoint({"global_step": 3, "x": torch.ones(5)}, path)
    with little_room(100_000), pytest.raises(UserError) as failed:
        files.save_checkpoint({"global_step": 4, "x": torch.zeros(200_000)}, path)
    rest = "there is none before it" if first else "the last one is kept"
    said = f"the checkpoint of step 4 could not be written to {tmp_path} (File too large); {rest}"
    assert str(failed.value) == f"{said}: make room and give resume=true"
    assert os.listdir(tmp_path) == ([] if first else ["last.ckpt"])


def test_what_is_not_a_checkpoint_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    path.write_bytes(b"something else")
    with pytest.raises(ValueError, match="last.ckpt is not a checkpoint: overwrite=true starts again"):
        SafeCheckpoints().load_checkpoint(path)
    torch.save({"code": _Printer()}, path)
    with pytest.raises(ValueError, match="last.ckpt cannot be read .*: overwrite=true starts again"):
        SafeCheckpoints().load_checkpoint(path)

"""A training in several processes: one record, and the loss curve of a single process."""

import signal
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from experiments.training.callbacks import read_points
from tests.experiments.conftest import Here, finish, result_of, start
from tests.experiments.training.runs import last_step, read_run, wait_for_step

TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")


def test_two_processes_give_the_curve_of_one(train_here: Here, tiny_weights: Path, tmp_path: Path) -> None:
    """By torchrun, DDP and then the sharded base; the same batches, padding and draws, one folder for each run."""
    pytest.importorskip("wandb")
    words = ["selector=shirg", "optim.steps=3", "batch_size=6", "trainer.log_every=1", "trainer.checkpoint_every=2"]
    words += ["objective.extra_padding=5", "objective.prefix_mask=false", "objective.alignment=0.5"]
    alone = train_here(*words, "study=alone")
    several = [f"model.path={tiny_weights}", "optim.warmup=0", "threads=1", "device=cpu", "study=several", *words]
    several += ["logger=wandb", f"logger.save_dir={tmp_path}"]
    code, out, err = finish(start("train", "-m", "trainer=ddp,fsdp", *several, cwd=tmp_path, launcher=TORCHRUN))
    assert code == 0, err
    logged = [read_run(path) for path in tmp_path.glob("wandb/offline-run-*/run-*.wandb")]
    assert len(logged) == 2 and all(len(run.history("loss")) == 3 and run.exit_code == 0 for run in logged)
    assert out.count("\nok    ") == 2 and out.count("written  ") == 2, "one of the processes speaks"
    one = read_points(alone / "metrics.csv")
    assert [point["step"] for point in one] == [1, 2, 3] and all(point["grad_norm"] > 1e-4 for point in one)
    folders = sorted((tmp_path / "outputs/several").glob("train_*"))
    assert len(folders) == 2
    for folder in folders:
        assert not (folder / "checkpoints").exists()
        assert result_of(folder)["times"]["processes"] == 2
        two = read_points(folder / "metrics.csv")
        for name in ("loss", "loss_alignment", "accuracy", "grad_norm", "lr"):
            assert [p[name] for p in two] == pytest.approx([p[name] for p in one], abs=1e-4), name
        ours, theirs = (load_file(path / "adapter/adapter_model.safetensors") for path in (folder, alone))
        assert ours.keys() == theirs.keys()
        for name, tensor in theirs.items():
            torch.testing.assert_close(ours[name], tensor, rtol=0, atol=1e-4)
        assert (folder / "adapter/adapter.json").read_text() == (alone / "adapter/adapter.json").read_text()


@pytest.mark.slow
def test_a_split_base_of_random_weights_goes_on_after_a_kill(tmp_path: Path) -> None:
    """Without a checkpoint every process draws the base and keeps its part; the gate answers with it."""
    words = ["model=tiny_scratch", "selector=shirg", "optim.steps=60", "optim.warmup=0", "batch_size=4", "threads=1"]
    words += ["device=cpu", "trainer.log_every=2", "trainer.checkpoint_every=4", "study=s"]
    glyphs = "_target_: experiments.data.synthetic.glyphs.SynthGlyphs, split: val, n: 6, density: [sparse]"
    words += [f"+check={{{glyphs}}}", "+gate={fine: 0}"]
    homes = {name: tmp_path / name for name in ("alone", "whole", "killed")}
    for home in homes.values():
        home.mkdir()
    assert finish(start("train", *words, cwd=homes["alone"]))[0] == 0
    words += ["trainer=fsdp"]
    code, _, err = finish(start("train", *words, cwd=homes["whole"], launcher=TORCHRUN))
    assert code == 0, err
    process = start("train", *words, cwd=homes["killed"], launcher=TORCHRUN)
    wait_for_step(process, homes["killed"], 8)
    process.send_signal(signal.SIGTERM)
    finish(process)
    (killed,) = homes["killed"].glob("outputs/s/train_*")
    assert 4 <= last_step(killed) < 60
    code, _, err = finish(start("train", *words, "resume=true", cwd=homes["killed"], launcher=TORCHRUN))
    assert code == 0, err
    (alone,), (whole,) = (homes[name].glob("outputs/s/train_*") for name in ("alone", "whole"))
    for name in ("metrics.csv", "adapter/adapter_model.safetensors", "adapter/adapter.json"):
        assert (killed / name).read_bytes() == (whole / name).read_bytes(), name
    assert (whole / "adapter/adapter.json").read_text() == (alone / "adapter/adapter.json").read_text()
    losses = [[point["loss"] for point in read_points(folder / "metrics.csv")] for folder in (alone, whole)]
    assert losses[1] == pytest.approx(losses[0], abs=1e-3)
    assert result_of(whole)["training"]["gate"] == result_of(alone)["training"]["gate"]


@pytest.mark.gpu
def test_the_sharded_base_on_gpus(tiny_weights: Path, tmp_path: Path) -> None:
    """Two steps in bfloat16 on all GPUs of this machine, of which one is enough, against a single process."""
    n = torch.cuda.device_count()
    words = [f"model.path={tiny_weights}", "selector=shirg", "optim.steps=2", "optim.warmup=0", f"batch_size={4 * n}"]
    words += ["device=cuda", "dtype=bfloat16", "trainer.log_every=1", "trainer.gradient_checkpointing=true"]
    launcher = (*TORCHRUN[:-1], f"--nproc_per_node={n}")
    for trainer, by in (("default", (sys.executable,)), ("fsdp", launcher)):
        code, _, err = finish(start("train", f"trainer={trainer}", "study=s", *words, cwd=tmp_path, launcher=by))
        assert code == 0, err
    one, sharded = sorted((tmp_path / "outputs/s").glob("train_*"))
    assert result_of(sharded)["times"]["processes"] == n and result_of(sharded)["times"]["peak_mib"] > 1
    losses = [[point["loss"] for point in read_points(folder / "metrics.csv")] for folder in (one, sharded)]
    assert len(losses[0]) == 2 and losses[1] == pytest.approx(losses[0], rel=0.02)

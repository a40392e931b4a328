"""`train.py stage=gate`: from the command to a head that eval.py reads, killed and resumed, in one process or two."""

import json
import shlex
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from experiments.training.callbacks import read_points
from lavida_adapter.learned_relevance import META, WEIGHTS
from tests.experiments.conftest import Here, finish, lasting, result_of, rows_of, start
from tests.experiments.training.runs import last_step, wait_for_step

WORDS = [
    "stage=gate",
    "batch_size=6",
    "trainer.log_every=2",
    "study=s",
    "gate.recall_sparse=0",
    "gate.recall_unseen=0",
    "gate.guard=0",
    "check.n=6",
    "unseen.n=6",
]
ALONE = ["optim.warmup=0", "threads=1", "device=cpu"]
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")


def test_a_trained_head_is_found_measured_and_refused(
    train_here: Here, eval_here: Here, tiny_weights: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = train_here(*WORDS, "optim.steps=3")
    found = result_of(folder)
    assert found["training"]["stage"] == "gate" and found["training"]["trainable_parameters"] == 867
    assert {"recall_sparse", "recall_unseen", "fine", "guard", "unseen"} <= found["training"]["gate"].keys()
    assert found["data"]["data"]["name"] == "synth_glyphs"
    printed = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("evaluate"))
    words = shlex.split(printed)[3:]
    assert words[:2] == ["selector=shirg_learned", "relevance=learned"] and "relevance.path=" in words[-1]
    job = eval_here(*words, "data.n=6")
    assert result_of(job)["config"]["stored"]["relevance"] and result_of(job)["status"] == "ok"
    eval_here("selector=shirg_learned", "relevance=learned", "data.n=6", ok=False)
    assert "holds a relevance head: train one with train.py stage=gate" in capsys.readouterr().err
    # An untrained head ranks as its base.
    plain = eval_here("selector=shirg_learned", "relevance=lm_embed", "data.n=6")
    untrained = train_here(*WORDS, "optim.steps=1", "optim.lr=1e-12", "study=t")
    same = eval_here(*words[:2], f"relevance.path={untrained / 'adapter'}", "data.n=6", "study=t")
    assert [row["kept"] for row in rows_of(same)] == [row["kept"] for row in rows_of(plain)]


def test_a_lora_beside_the_head_is_one_adapter(train_here: Here, eval_here: Here) -> None:
    folder = train_here(*WORDS, "optim.steps=2", "lora.rank=2")
    names = {path.name for path in (folder / "adapter").iterdir()}
    assert {"adapter.json", "adapter_model.safetensors", META, WEIGHTS, "training.json"} <= names
    job = eval_here("experiment=P2", f"adapter={folder / 'adapter'}", "data.n=6")
    assert result_of(job)["status"] == "ok" and result_of(job)["model"]["lora_rank"] == 2
    # A LoRA of another stage, on top of a head that stays as it is.
    on_top = train_here(
        "experiment=P2", f"relevance.path={folder / 'adapter'}", "optim.steps=2", "study=u", "batch_size=6"
    )
    assert not (on_top / "adapter" / META).exists()


def test_an_objective_belongs_to_its_stage(train_here: Here, capsys: pytest.CaptureFixture[str]) -> None:
    for words, said in (
        (["objective=joint"], "stage=adapt fits no relevance head: take objective=joint out"),
        ([*WORDS, "objective=tiny"], "stage=gate needs what a head is fitted to: give objective="),
        ([*WORDS, "selector=saint"], "stage=gate trains relevance=learned"),
        ([*WORDS, "mix.budgets=[9,12]"], "mix.budgets has no effect with stage=gate: take it out"),
        ([*WORDS, "objective.alignment=0.1"], "objective.alignment (without a LoRA) has no effect with stage=gate"),
        ([*WORDS, "lora=progressive", "lora.rank=64"], "lora.grow has no effect with stage=gate"),
    ):
        train_here(*words, "optim.steps=2", ok=False)
        assert said in capsys.readouterr().err


def test_a_killed_training_ends_as_an_undisturbed_one(train_here: Here, tiny_weights: Path, tmp_path: Path) -> None:
    words = [*WORDS, "optim.steps=24", "trainer.checkpoint_every=4"]
    whole = train_here(*words, root=tmp_path / "whole")
    killed = tmp_path / "killed"
    killed.mkdir()
    process = start("train", f"model.path={tiny_weights}", *ALONE, *words, cwd=killed)
    wait_for_step(process, killed, 6)
    process.send_signal(signal.SIGKILL)
    finish(process)
    (folder,) = (killed / "outputs/s").glob("train_*")
    assert 4 <= last_step(folder) < 24, "killed too early or too late"
    assert train_here(*words, "resume=true", root=killed) == folder
    for name in (META, WEIGHTS):
        assert (folder / "adapter" / name).read_bytes() == (whole / "adapter" / name).read_bytes(), name
    assert (folder / "metrics.csv").read_bytes() == (whole / "metrics.csv").read_bytes()
    assert lasting(result_of(folder))["training"] == lasting(result_of(whole))["training"]


def test_two_processes_draw_what_one_draws(train_here: Here, tiny_weights: Path, tmp_path: Path) -> None:
    words = [*WORDS, "optim.steps=3", "trainer.log_every=1"]
    alone = train_here(*words, "study=alone")
    several = [f"model.path={tiny_weights}", *ALONE, *words, "study=several"]
    code, _, err = finish(start("train", "-m", "trainer=ddp,fsdp", *several, cwd=tmp_path, launcher=TORCHRUN))
    assert code == 0, err
    folders = list((tmp_path / "outputs/several").glob("train_*"))
    assert len(folders) == 2
    for folder in folders:
        _assert_same_head(folder, alone)


def _assert_same_head(folder: Path, alone: Path, atol: float = 1e-5) -> None:
    one, two = (read_points(path / "metrics.csv") for path in (alone, folder))
    assert [p["loss_relevance"] for p in two] == pytest.approx([p["loss_relevance"] for p in one], abs=1e-5)
    ours, theirs = (load_file(path / "adapter" / WEIGHTS) for path in (folder, alone))
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=0, atol=atol)
    assert json.loads((folder / "adapter" / META).read_text()) == json.loads((alone / "adapter" / META).read_text())


@pytest.mark.slow
@pytest.mark.parametrize("words", [["objective=straight_through"], ["lora.rank=2"]], ids=["gradient", "lora"])
def test_a_split_base_under_the_gradients_of_a_stage(
    words: list[str], train_here: Here, tiny_weights: Path, tmp_path: Path
) -> None:
    words = [*WORDS, *words, "optim.steps=3", "trainer.log_every=1"]
    alone = train_here(*words, "study=alone")
    several = [f"model.path={tiny_weights}", *ALONE, *words, "study=several", "trainer=fsdp"]
    code, _, err = finish(start("train", *several, cwd=tmp_path, launcher=TORCHRUN))
    assert code == 0, err
    (folder,) = (tmp_path / "outputs/several").glob("train_*")
    # Adam makes whole steps of the smallest gradients, whose sums the order of rows rounds differently.
    _assert_same_head(folder, alone, atol=1e-3)


def test_a_head_beside_the_weights_is_trained_once(
    train_here: Here, tiny_weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its own output, which relevance=learned would find there, is no input of the job."""
    shutil.copytree(tiny_weights, tmp_path / "base")
    words = [*WORDS, "optim.steps=2", f"model.path={tmp_path / 'base'}", "resume=true"]
    for name in ("relevance", "relevance_blind", "relevance"):
        train_here(*words, f"weights={tmp_path / 'base' / name}")
        printed = capsys.readouterr().out
    assert "skip" in printed and len(list((tmp_path / "outputs/s").glob("train_*"))) == 2


def test_questions_without_groups_are_measured(
    train_here: Here, capsys: pytest.CaptureFixture[str], picture_folder: Callable[..., Path]
) -> None:
    """Thresholds that no question of the check can measure are refused before the training, and none need be given."""
    own = f"_target_: experiments.data.folder.Folder, root: '{picture_folder('own', ['1', '2'])}'"
    words = [word for word in WORDS if not word.startswith(("gate.", "check.", "unseen."))]
    words += ["~check", "~unseen", f"+check={{{own}}}", f"+unseen={{{own}}}", "optim.steps=2"]
    train_here(*words, ok=False)
    said = capsys.readouterr().err
    assert "gate.recall_sparse: with these questions (check=) this stage measures all, unseen" in said
    none = ["~gate.recall_sparse", "~gate.recall_unseen", "~gate.guard"]
    folder = train_here(*words, *none, "+gate.all=0")
    assert set(result_of(folder)["training"]["gate"]) == {"all", "unseen"}
    assert result_of(train_here(*words, *none, "study=t"))["training"]["gate"] == {}

"""A model with random weights at the tiny model's geometry, folders of pictures, and three ways to run a command."""

import csv
import json
import os
import re
import resource
import runpy
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf, open_dict
from PIL import Image

from experiments.analysis.turns import LAST_REFRESH
from experiments.cli import update_report
from experiments.data.synthetic.tokenizer import build_tokenizer
from experiments.evaluate import check_data, evaluate
from experiments.jobs.answer_journal import JOURNAL, AnswerJournal
from experiments.jobs.job import Work, run_job
from experiments.jobs.results import VOLATILE
from experiments.schema import CONF, VERSION_BASE
from experiments.train import check_data as check_training
from experiments.train import train
from lavida_adapter import Lavida, LavidaConfig, LladaConfig, VisionConfig

ROOT = CONF.parent
Here = Callable[..., Path]
RANDOM = {f"model={name}" for name in ("small", "small_dream", "tiny_dream_scratch")}
"""Models that are built without a checkpoint."""


@pytest.fixture(scope="session")
def tiny_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Views of 8 x 8 tokens, N = 320, budgets base 80 and full 320; smaller in every width than the shipped model."""
    tokenizer = build_tokenizer()
    torch.manual_seed(0)
    vision = VisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=64, patch_size=8
    )
    lm = LladaConfig(
        d_model=16,
        n_heads=2,
        n_kv_heads=2,
        n_layers=1,
        mlp_hidden_size=32,
        vocab_size=len(tokenizer),
        mask_token_id=tokenizer.mask_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    folder = tmp_path_factory.mktemp("weights")
    config = LavidaConfig(vision=vision, lm=lm, image_grid_pinpoints=((128, 128),), trained=False)
    Lavida(config, tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture
def eval_here(tmp_path: Path, tiny_weights: Path, monkeypatch: pytest.MonkeyPatch) -> Here:
    """Runs eval's job in this process; returns the job's folder, which lies under tmp_path/outputs."""
    return evaluator(tmp_path, tiny_weights, monkeypatch)


def evaluator(home: Path, tiny_weights: Path, monkeypatch: pytest.MonkeyPatch) -> Here:
    return partial(_run_here, "eval", evaluate, monkeypatch, tiny_weights, root=home)


@pytest.fixture
def train_here(tmp_path: Path, tiny_weights: Path, monkeypatch: pytest.MonkeyPatch) -> Here:
    """Runs train's job in this process, on one thread as other processes do."""
    here = partial(_run_here, "train", train, monkeypatch, tiny_weights, "threads=1", "device=cpu", root=tmp_path)
    return partial(here, "optim.warmup=0")


def _run_here(
    command: str,
    work: Work,
    monkeypatch: pytest.MonkeyPatch,
    tiny_weights: Path,
    *overrides: str,
    root: Path,
    ok: bool = True,
) -> Path:
    root.mkdir(exist_ok=True)
    monkeypatch.chdir(root)
    with initialize_config_dir(str(CONF), version_base=VERSION_BASE, job_name=command):
        weights = [] if RANDOM & {*overrides} else [f"model.path={tiny_weights}"]
        cfg = compose(command, [*weights, *overrides], return_hydra_config=True)
    with open_dict(cfg):
        folder = root / str(cfg.hydra.run.dir)
        cfg.hydra.runtime.output_dir = str(folder)
    folder.mkdir(parents=True, exist_ok=True)
    HydraConfig.instance().set_config(cfg)
    with open_dict(cfg):
        del cfg["hydra"]
    OmegaConf.set_struct(cfg, True)
    (folder.parent / LAST_REFRESH).unlink(missing_ok=True)  # every job of a test writes the table and the page
    outcome = run_job(cfg, work, update_report, check_data if command == "eval" else check_training)
    assert outcome is not None and outcome.ok is ok
    return folder


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int
    out: str
    err: list[str]
    """Lines of standard error."""


Command = Callable[..., Ended]


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Command:
    """Runs eval.py or train.py with a command line as a script, but in this process; `cwd` is tmp_path."""

    def run(name: str, *words: str, cwd: Path = tmp_path) -> Ended:
        cwd.mkdir(parents=True, exist_ok=True)
        capfd.readouterr()
        code: str | int | None = 0
        with monkeypatch.context() as patch:
            patch.chdir(cwd)
            patch.setattr(sys, "argv", [str(ROOT / f"{name}.py"), *words])
            patch.delenv("HYDRA_FULL_ERROR", raising=False)
            try:
                runpy.run_path(sys.argv[0], run_name="__main__")
            except SystemExit as end:
                code = end.code
            os.environ.pop("HYDRA_FULL_ERROR", None)
        out, err = capfd.readouterr()
        assert isinstance(code, int)
        return Ended(code, out, err.splitlines())

    return run


@pytest.fixture
def picture_folder(tmp_path: Path) -> Callable[..., Path]:
    """Writes a dataset of one row per question, each with its own small picture."""

    def write(name: str, questions: Sequence[str] = ("how many?",), **fields: Any) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        rows = []
        for i, question in enumerate(questions):
            picture = Image.effect_noise((90, 60), 60).convert("RGB")
            picture.save(folder / f"{i}.png")
            rows.append({"file_name": f"{i}.png", "question": question, "answers": ["one"], **fields})
        (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return folder

    return write


def start(
    command: str,
    *overrides: str,
    cwd: Path,
    launcher: Sequence[str] = (sys.executable,),
    environment: Mapping[str, str] = os.environ,
    session: bool = False,
) -> subprocess.Popen[str]:
    """The entry point in a process of its own, as a user starts it, or in several that a launcher starts.

    With `session` it and all that it starts are one process group, which can be killed as a whole.
    """
    cwd.mkdir(parents=True, exist_ok=True)
    return subprocess.Popen(
        [*launcher, str(ROOT / f"{command}.py"), *overrides],
        cwd=cwd,
        # A shell that runs the tests in the background has its children ignore Ctrl+C.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        env={k: v for k, v in environment.items() if k != "HYDRA_FULL_ERROR"} | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=session,
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str, list[str]]:
    """Exit code, standard output, and the lines of standard error."""
    out, err = process.communicate(timeout=500)
    return process.returncode, out, err.splitlines()


@contextmanager
def little_room(size: int) -> Iterator[None]:
    """No file of this process can grow beyond `size` bytes."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def result_of(folder: Path) -> dict[str, Any]:
    result = json.loads((folder / "result.json").read_text())
    assert isinstance(result, dict)
    return result


def journaled(journal: Path) -> list[list[dict[str, Any]]]:
    """The rows of each batch in a journal that a job may be writing now."""
    with TemporaryDirectory() as folder:
        shutil.copy(journal, Path(folder) / JOURNAL)
        with AnswerJournal(Path(folder)) as found:
            return [batch.rows.to_pylist() for _, batch in found]


def lasting(result: dict[str, Any]) -> dict[str, Any]:
    """What two runs share; the commit is left out because somebody may commit while the test runs."""
    environment = {key: value for key, value in result.get("environment", {}).items() if not key.startswith("git")}
    return {key: value for key, value in result.items() if key not in VOLATILE} | {"environment": environment}


def rows_of(folder: Path) -> list[dict[str, Any]]:
    rows = pq.read_table(folder / "samples.parquet").to_pylist()
    return [{key: value for key, value in row.items() if not key.startswith("ms_")} for row in rows]


def table_without_times(study: Path) -> list[dict[str, str]]:
    rows = list(csv.DictReader((study / "table.csv").read_text().splitlines()))
    drop = re.compile(r".* ms( q[13])?|waited|peak memory MiB|flags|env git.*")  # a flag is about a time
    return [{k: v for k, v in row.items() if not drop.fullmatch(k)} for row in rows]

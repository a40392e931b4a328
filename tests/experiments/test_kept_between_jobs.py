"""A job on a model that others have used gives the rows of a job that read its own; changed data is read anew."""

import os
import shutil
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from omegaconf import DictConfig, OmegaConf

from experiments import build, kept_between_jobs
from experiments.data.synthetic.entitygrid.entity_dataset import EntityGrid
from experiments.data.synthetic.entitygrid.entitygrid_files import write
from experiments.inference import EvalPipeline
from experiments.kept_between_jobs import release_model, take_dataset
from lavida_adapter import Lavida
from lavida_adapter import model as lavida_model
from lavida_adapter.engine import EagerEngine
from lavida_adapter.fused_layers import step_layers
from lavida_adapter.language_model import LanguageModel
from shirg import UserError
from tests.experiments import conftest
from tests.experiments.conftest import Command, result_of

Here = Callable[..., Path]

COMMON = ("data.n=24", "limit=6", "batch_size=4", "shots=0")
SINCOS = ("selector=shirg", "selector.coord_embed=sincos_linear", "selector.coord_width=auto")
ADAPTERS = {
    "plain": ("selector=shirg", "lora.train_whole=[]"),
    "with_selector": (*SINCOS, "lora.train_whole=[selector.coords.linear]", "++optim.rates.selector=0.1"),
}
JOBS = [
    ("selector=pooled",),
    ("selector=shirg", "decode.engine=compile"),
    ("selector=shirg", "adapter=plain"),
    ("selector=shirg", "adapter=plain", "relevance.projector=base"),
    ("selector=full", "adapter=plain", "cache=fastv", "cache.layer=0", "budget=60"),
    ("selector=topv", "adapter=plain", "decode.engine=compile"),
    (*SINCOS, "adapter=with_selector"),
    (*SINCOS, "adapter=with_selector", "cache=int8"),
    (*SINCOS, "context=even", "adapter=with_selector"),
    (*SINCOS, "budget=70", "adapter=with_selector", "decode.engine=compile"),
    ("selector=shirg_x", "cache=redvtp", "cache.budget=60", "decode.temperature=0.7"),
    ("selector=full", "model.prefix_attention=image_first"),
    ("selector=full", "attention=math"),
]
LOADS = 7
"""Models that are read for these jobs, in this order or backwards."""


class Joined(EagerEngine):
    """What an engine on a GPU does to the weights."""

    def __init__(self, lm: LanguageModel) -> None:
        super().__init__(lm)
        step_layers(lm)


@pytest.fixture(autouse=True)
def nothing_kept() -> Iterator[None]:
    release_model()
    kept_between_jobs._datasets.clear()
    yield
    release_model()
    kept_between_jobs._datasets.clear()


@pytest.fixture
def adapters(train_here: Here, tmp_path: Path) -> Path:
    """A folder of two adapters, the second with a trained layer of the selector."""
    words = ("optim.steps=2", "batch_size=2", "lora.rank=2", "optim.lr=0.05", "data.n=60")
    for name, options in ADAPTERS.items():
        folder = train_here(*words, *options, f"study={name}")
        shutil.copytree(folder / "adapter", tmp_path / name)
    return tmp_path


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[Lavida]:
    """Weak references to the models that were read; there is never a second one."""
    release_model()
    found: list[Any] = []
    original = build.build_model

    def counted(*args: Any) -> Lavida:
        assert all(reference() is None for reference in found), "the model before is still in memory"
        model = original(*args)
        found.append(weakref.ref(model))
        return model

    monkeypatch.setattr(build, "build_model", counted)
    return found


def answers(folder: Path) -> list[dict[str, Any]]:
    rows = pq.read_table(folder / "samples.parquet").to_pylist()
    return [{key: value for key, value in row.items() if not key.startswith("ms_")} for row in rows]


@pytest.mark.parametrize("compiles", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_used_model_answers_as_a_fresh_one(
    eval_here: Here, adapters: Path, read: list[Any], monkeypatch: pytest.MonkeyPatch, compiles: bool
) -> None:
    monkeypatch.setattr(conftest, "update_report", lambda study: None)  # a third of the time
    if not compiles:
        monkeypatch.setattr(lavida_model, "CompiledEngine", Joined)
    jobs = [tuple(word.replace("adapter=", f"adapter={adapters}/") for word in job) for job in JOBS]
    alone = {}
    for job in jobs:
        release_model()
        alone[job] = eval_here(*COMMON, *job, "study=alone")
    for study, order in (("forward", jobs), ("backward", jobs[::-1])):
        release_model()
        before = len(read)
        for job in order:
            folder = eval_here(*COMMON, *job, f"study={study}")
            assert answers(folder) == answers(alone[job]), job
            assert result_of(folder)["model"] == result_of(alone[job])["model"], job
        assert len(read) - before == LOADS


def test_a_job_that_fails_leaves_no_model(eval_here: Here, read: list[Any]) -> None:
    eval_here(*COMMON, "selector=full", "study=a")
    eval_here(*COMMON, "selector=shirg", "budget=100000", "study=a", ok=False)
    assert kept_between_jobs._models == []
    eval_here(*COMMON, "selector=random", "study=a")
    assert len(read) == 2


def test_a_model_that_was_written_to_is_read_again(
    eval_here: Here, read: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = EvalPipeline.answer

    def writes(self: EvalPipeline, *args: Any) -> Any:
        with torch.no_grad():
            self.model.lm.embedding.weight[0] += 1
        return answer(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(EvalPipeline, "answer", writes)
        eval_here(*COMMON, "selector=full", "study=a")
    eval_here(*COMMON, "selector=random", "study=a")
    assert len(read) == 2


def test_changed_files_are_read_again(eval_here: Here, read: list[Any], tiny_weights: Path, tmp_path: Path) -> None:
    copy = tmp_path / "model"
    shutil.copytree(tiny_weights, copy)
    first = eval_here(f"model.path={copy}", *COMMON, "selector=full", "study=a")
    model = Lavida.from_pretrained(copy)
    with torch.no_grad():
        model.lm.embedding.weight.neg_()
    model.save_pretrained(copy)
    second = eval_here(f"model.path={copy}", *COMMON, "selector=random", "study=a")
    assert result_of(first)["model"]["weights"] != result_of(second)["model"]["weights"]
    assert len(read) == 2


def test_a_sweep_reads_its_model_and_builds_its_data_once(
    command: Command, read: list[Any], tiny_weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = counted_datasets(monkeypatch)
    words = (f"model.path={tiny_weights}", "threads=1", "limit=4", "shots=0", "study=s")
    ended = command("eval", "-m", "selector=pooled,random,shirg", *words)
    assert ended.code == 0 and len(read) == 1 and len(built) == 1
    assert [line for line in ended.out.splitlines() if line.startswith("model ")] == [
        f"model {tiny_weights}: llada, read in {ended.out.split('read in ')[1].split(' ')[0]} s"
    ]
    again = command("eval", "-m", "selector=pooled,random,shirg", *words, "resume=true")
    assert again.code == 0 and again.out.count("skip ") == 3
    assert len(read) == 1 and len(built) == 1


def counted_datasets(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    built: list[str] = []
    original = build.build_dataset

    def counted(*args: Any) -> Any:
        dataset = original(*args)
        built.append(dataset.name)
        return dataset

    monkeypatch.setattr(build, "build_dataset", counted)
    return built


@pytest.mark.parametrize("change", ["row", "linked row", "new file"])
def test_data_that_changes_in_between_is_built_again(
    picture_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, change: str
) -> None:
    root = picture_folder("mine", ["how many?", "which?"])
    if change == "linked row":
        (tmp_path / "linked").symlink_to(root)
        (root / "back").symlink_to(root)
        (root / "nowhere").symlink_to(tmp_path / "not there")
    given = tmp_path / "linked" if change == "linked row" else root
    built = counted_datasets(monkeypatch)
    cfg = build.compose_eval("data=folder", f"data.root={given}")
    assert take_dataset(cfg) is take_dataset(cfg)
    other = build.compose_eval("data=folder", f"data.root={given}", "data.suffix=x")
    assert take_dataset(other) is not take_dataset(cfg)
    assert len(built) == 2
    if change == "new file":
        (root / "2.png").write_bytes(b"")
    else:
        lines = root / "metadata.jsonl"
        stat = lines.stat()
        lines.write_text(lines.read_text().replace("which?", "where?"))
        os.utime(lines, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # as a copy that keeps the time
    assert take_dataset(cfg)[1].question == ("which?" if change == "new file" else "where?")
    assert len(built) == 3


@pytest.mark.parametrize("change", ["label", "picture"])
def test_changed_data_is_refused_in_the_same_process(
    eval_here: Here, picture_folder: Callable[..., Path], capfd: pytest.CaptureFixture[str], change: str
) -> None:
    root = picture_folder("mine", ["how many?", "which?"])
    words = ("data=folder", f"data.root={root}", "selector=full", "shots=0", "study=a")
    eval_here(*words)
    eval_here(*words, "resume=true")
    if change == "label":
        (root / "metadata.jsonl").write_text((root / "metadata.jsonl").read_text().replace("one", "two"))
    else:
        (root / "1.png").write_bytes((root / "0.png").read_bytes())
    eval_here(*words, "resume=true", ok=False)
    assert "has another " + ("answers" if change == "label" else "picture") in capfd.readouterr().err


def test_no_more_than_a_few_datasets_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept_between_jobs, "MOST_DATASETS", 2)
    built = counted_datasets(monkeypatch)
    for seed in (0, 1, 0, 2, 0, 1):  # 1 has left for 2
        take_dataset(build.compose_eval(f"data.seed={seed}"))
    assert len(built) == 4


def test_what_is_checked_or_unknown_is_built_each_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = dict(canvas=[96, 96], sizes=[14], entities=1, suffix="", max_new_tokens=4, metrics=["exact_match"])
    write(EntityGrid(split="test", **small), tmp_path)
    cfg = build.compose_eval("data=entitygrid", "data.source=disk", f"data.root={tmp_path}")
    assert take_dataset(cfg) is not take_dataset(cfg)
    (next((tmp_path / "test/images").iterdir())).write_bytes(b"other")
    with pytest.raises(UserError):
        take_dataset(cfg)
    monkeypatch.setattr(build, "build_dataset", lambda cfg: object())
    own = OmegaConf.merge(cfg, {"data": {"_target_": "mine.Dataset"}})
    assert isinstance(own, DictConfig)
    assert take_dataset(own) is not take_dataset(own)

"""Every benchmark from every source, in small copies of its official forms; one sentence for what is wrong with one."""

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
from omegaconf import OmegaConf
from PIL import Image

from experiments.build import build_dataset
from experiments.data.benchmarks import hub as hub_source
from experiments.data.loader import collate
from experiments.data.sample import Dataset, Listed, Traced
from experiments.evaluate import prompt_hash
from experiments.metrics import metric
from shirg import UserError
from tests.data import official
from tests.data.official import BENCHMARKS, SOURCES, N, people, question, split_of
from tests.refusals import assert_says, message_of

CONF = Path(__file__).resolve().parents[2] / "conf" / "data"
Build = Callable[..., Dataset]

PROMPTS = {
    "chartqa": "7f2401fbb7ef8fc4",
    "docvqa": "1605648ec83b6cc3",
    "entitygrid": "d00b896860e4ae58",
    "infovqa": "1605648ec83b6cc3",
    "textvqa": "1c515be91806e3b0",
    "vqav2": "d00b896860e4ae58",
}
"""What a benchmark asks and how long the answer may be; results carry these digits. A new one is another benchmark."""


@pytest.fixture(autouse=True)
def _offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert datasets.config.HF_HUB_OFFLINE, "tests/conftest.py keeps the tests off the network"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    hub_source._open.cache_clear()
    hub_source._pictures.cache_clear()


@pytest.fixture
def build(tmp_path: Path) -> Build:
    """Writes a benchmark in one of its forms and builds what reads it."""

    def make(name: str, source: str, *overrides: str, split: str | None = None, n: int = N) -> Dataset:
        read = official.write(name, source, tmp_path / name / source, split, n)
        return load(*read, *overrides)

    return make


def load(option: str, *overrides: str) -> Dataset:
    """As `python eval.py data=... data.x=...` does, without the rest of the config."""
    file = OmegaConf.create({"data": OmegaConf.load(CONF / f"{option.removeprefix('data=')}.yaml")})
    return build_dataset(OmegaConf.merge(file, OmegaConf.from_dotlist(list(overrides))))


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("name", BENCHMARKS)
def test_samples(build: Build, name: str, source: str) -> None:
    data = build(name, source)
    assert isinstance(data, Dataset) and isinstance(data, Traced)
    assert (data.name, data.split, len(data)) == (name, split_of(name), N)
    assert data.provenance["source"] == source
    samples = [data[i] for i in range(N)]
    assert len({sample.id for sample in samples}) == N
    assert [sample.question for sample in samples] == [question(i) for i in range(N)]
    suffix = OmegaConf.load(CONF / f"{name}.yaml").suffix
    asked = "What is number 7?" if name == "textvqa" else "What is NUMBER 7?"
    assert samples[7].prompt == asked + suffix
    pictures = [sample.load_image() for sample in samples]
    assert all(picture.mode == "RGB" and picture.size == (40, 30) for picture in pictures)
    assert [round(picture.getpixel((5, 5))[0] / 20) for picture in pictures] == [i // 2 for i in range(N)]
    for scorer in map(metric, data.metric_names):
        if hasattr(scorer, "score"):
            references = [samples[7].target] if scorer.reference == "target" else samples[7].answers
            assert scorer.score(prediction="7%" if name == "chartqa" else "7", references=references) == 1


@pytest.mark.parametrize("source", SOURCES)
def test_transparency_is_white(build: Build, source: str) -> None:
    assert build("chartqa", source)[0].load_image().getpixel((35, 5)) == (255, 255, 255)


@pytest.mark.parametrize("source", SOURCES)
def test_chartqa_knows_who_asked(build: Build, source: str) -> None:
    data = build("chartqa", source)
    assert [data[i].subtask for i in range(N)] == ["human"] * 6 + ["augmented"] * 6
    assert data[7].answers == ("7%",)
    if source != "folder":
        assert [data[i].id for i in (0, 5, 6)] == ["test/human/0", "test/human/5", "test/augmented/0"]


def test_other_tables_of_chartqa(build: Build, tmp_path: Path) -> None:
    """Class labels and answers in lists, as HuggingFaceM4 has them, and file names, as the authors'."""
    columns = {
        "query": [question(i) for i in range(4)],
        "label": [[str(i)] for i in range(4)],
        "human_or_machine": [0, 0, 1, 1],
        "imgname": ["a.png", "a.png", "b.png", "b.png"],
        "image": [official.picture(i) for i in range(4)],
    }
    root = official.hub("chartqa", tmp_path / "other", "train", 4, columns)
    data = load("data=chartqa", f"data.hub={root}", "data.split=train")
    assert [(data[i].id, data[i].answers) for i in (1, 2)] == [("train/human/1", ("1",)), ("train/augmented/0", ("2",))]
    assert [data[i].meta["picture"] for i in range(4)] == ["a.png", "a.png", "b.png", "b.png"]


@pytest.mark.parametrize("source", ["hub", "disk"])
def test_people_keep_their_order_and_their_number(build: Build, source: str) -> None:
    for name in ("vqav2", "textvqa"):
        assert build(name, source)[3].answers == tuple(people(3))
    sample = build("vqav2", source)[3]
    assert (sample.target, sample.subtask, sample.meta["picture"]) == ("3", "other", "8")


@pytest.mark.parametrize("source", ["hub", "disk"])
def test_ids_are_the_official_ones(build: Build, source: str) -> None:
    for name in ("docvqa", "infovqa", "textvqa", "vqav2"):
        assert [build(name, source)[i].id for i in (0, 11)] == ["100", "111"]
    assert build("docvqa", source)[2].meta["picture"] == "doc1_1"


def test_what_training_learns_is_the_target(build: Build) -> None:
    data = build("vqav2", "disk", split="train")
    batch = collate([data[2], data[3]])
    assert batch.answers == ["2", "3"] and len({id(image) for image in batch.images}) == 1


def test_a_blank_answer_is_not_learned(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(official, "answers", lambda *_: ["", " ", "42", "43"])
    data = build("docvqa", "disk", split="train")
    assert data[0].answers == ("", " ", "42", "43")
    assert collate([data[0], data[1]]).answers == ["42", "42"]


@pytest.mark.parametrize("source", SOURCES)
def test_what_does_not_fit_is_dropped_and_counted(build: Build, source: str) -> None:
    data = build("docvqa", source)
    assert isinstance(data, Listed) and data.dropped == {}
    data.keep(lambda sample: sample.question != question(3), "number 3")
    data.keep(lambda sample: True, "none")
    assert data.dropped == {"number 3": 1} and len(data) == N - 1
    assert [data[i].question for i in range(N - 1)] == [question(i) for i in range(N) if i != 3]


@pytest.mark.parametrize("name", BENCHMARKS)
def test_train_splits(build: Build, name: str) -> None:
    for source in SOURCES:
        assert build(name, source, split="train", n=4).split == "train"


def test_a_folder_may_be_whole_or_have_a_folder_for_each_split(build: Build, tmp_path: Path) -> None:
    build("docvqa", "folder")
    folder = tmp_path / "docvqa" / "folder"
    assert len(load("data=docvqa", "data.source=folder", f"data.root={folder / 'val'}")) == N
    with pytest.raises(FileNotFoundError, match=r"data.split=train does not exist in .*: it has val"):
        load("data=docvqa", "data.source=folder", f"data.root={folder}", "data.split=train")


def test_docvqa_without_question_types_and_split_folder(build: Build, tmp_path: Path) -> None:
    build("docvqa", "disk")
    root = tmp_path / "docvqa" / "disk"
    (root / "val" / "val_v1.0_withQT.json").rename(root / "val_v1.0.json")
    assert len(load("data=docvqa", "data.source=disk", f"data.root={root}", "data.split=validation")) == N


def test_both_ways_of_reading_the_hub_agree(build: Build, tmp_path: Path) -> None:
    streamed = build("vqav2", "hub")
    found = hub_source.find(hub_source.candidates(str(tmp_path / "vqav2" / "hub")), "val")
    columns = frozenset({"question", "answers", "image_id"})
    rows = hub_source._download(found, columns)
    assert [row.fields["question"] for row in rows] == [streamed[i].question for i in range(N)]
    assert rows[5].fields["answers"][0]["answer"] == "5" and rows[5].fields.keys() == columns
    for i in (0, 5, 11):
        assert rows[i].load_image().tobytes() == streamed[i].load_image().tobytes()
    assert pickle.loads(pickle.dumps(rows[5].load_image))().size == (40, 30)
    assert pickle.loads(pickle.dumps(streamed[5].load_image))().size == (40, 30)


def test_streaming_reads_a_row_group_once_and_only_when_asked(build: Build) -> None:
    data = build("docvqa", "hub")
    assert hub_source._pictures.cache_info().misses == 0
    for i in range(N):
        data[i].load_image()
    # Two files of 6 rows, in groups of 4.
    assert hub_source._pictures.cache_info().misses == 4


def test_candidates_are_tried_in_order(build: Build, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    build("chartqa", "hub")
    good = tmp_path / "chartqa" / "hub"
    train = official.hub("chartqa", tmp_path / "train only", "train", 4)
    tried = f"data.hub=[{{id: nobody/nothing, revision: abc}},'{train}',{{id: {good}, config: default}}]"
    data = load("data=chartqa", tried)
    assert len(data) == N and isinstance(data, Traced)
    assert data.provenance == {"source": "hub", "id": str(good), "split": "test", "revision": ""}
    out = capsys.readouterr().out
    assert "passed over nobody/nothing: Couldn't reach it" in out and f"passed over {train} has train" in out
    with pytest.raises(ValueError, match=rf"data.split=lite does not exist: {train} has train; {good} has test"):
        load("data=chartqa", tried, "data.split=lite")


def test_the_commit_of_a_repository_is_read_off_its_files() -> None:
    class Builder:
        class config:  # noqa: N801
            data_files = {
                "test": ["hf://datasets/a/b@" + "0123456789abcdef0123456789abcdef01234567" + "/data/x.parquet"]
            }

    found = hub_source.Found(hub_source.Candidate("a/b"), "test", Builder())
    assert found.revision == "0123456789abcdef0123456789abcdef01234567"


@pytest.mark.parametrize("name", [*BENCHMARKS, "entitygrid"])
def test_prompts_are_pinned(name: str) -> None:
    cfg = OmegaConf.load(CONF / f"{name}.yaml")
    assert prompt_hash(cfg, cfg.max_new_tokens) == PROMPTS[name]
    assert prompt_hash(cfg, cfg.max_new_tokens + 1) != PROMPTS[name]
    assert prompt_hash(OmegaConf.merge(cfg, {"suffix": cfg.suffix + " "}), cfg.max_new_tokens) != PROMPTS[name]


def test_prompts_and_lengths_are_those_of_the_published_evaluation() -> None:
    word = "\nAnswer the question using a single word or phrase."
    files = {name: OmegaConf.load(CONF / f"{name}.yaml") for name in PROMPTS}
    assert {name: cfg.max_new_tokens for name, cfg in files.items()} == {
        "chartqa": 16,
        "docvqa": 32,
        "entitygrid": 16,
        "infovqa": 32,
        "textvqa": 16,
        "vqav2": 16,
    }
    suffixes = {name: cfg.suffix for name, cfg in files.items()}
    assert suffixes.pop("chartqa") == "\nAnswer the question with a single word."
    assert set(suffixes.values()) == {word}
    assert {name: cfg.metrics[0] for name, cfg in files.items()} == {
        "chartqa": "relaxed_accuracy",
        "docvqa": "anls",
        "entitygrid": "entity_match",
        "infovqa": "anls",
        "textvqa": "textvqa_accuracy",
        "vqav2": "vqa_accuracy",
    }


def edit(path: Path, change: Callable[[Any], None]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("name", BENCHMARKS)
def test_broken_sets(build: Build, name: str, source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A split that is missing, a picture that cannot be read, a split that is empty, answers that are missing."""

    def afresh(n: int = N) -> Dataset:
        shutil.rmtree(root, ignore_errors=True)
        hub_source._open.cache_clear()
        return build(name, source, n=n)

    root = tmp_path / name / source
    data = afresh()
    words = [f"data={name}", f"data.source={source}", f"data.{'hub' if source == 'hub' else 'root'}={root}"]
    assert_says(message_of(lambda: load(*words, "data.split=dev")), "dev")
    if source == "hub":
        columns = dict(official.table(name, 2)) | {"image": [{"bytes": b"no picture", "path": None}] * 2}
        data = load(f"data={name}", f"data.hub={official.hub(name, tmp_path / 'torn', split_of(name), 2, columns)}")
    for path in (path for path in root.rglob("*") if path.suffix in (".png", ".jpg", ".jpeg")):
        path.write_bytes(b"no picture")
    assert_says(message_of(data[0].load_image), ": cannot be read as a picture ... ; replace it or remove its rows")
    assert_says(message_of(lambda: afresh(n=0)), "empty")
    lacking = "" if name == "chartqa" else []
    monkeypatch.setattr(official, "answers", lambda _, i: lacking if name == "chartqa" or i == 7 else [str(i)] * 4)
    message = message_of(afresh)
    assert "questions have no answers, the first is" in message or "needs 'answers'" in message


@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_picture_that_is_not_there(build: Build, name: str, tmp_path: Path) -> None:
    build(name, "disk")
    victim = sorted(p for p in (tmp_path / name / "disk").rglob("*") if p.suffix in (".png", ".jpg", ".jpeg"))[0]
    victim.unlink()
    overrides = [f"data={name}", "data.source=disk", f"data.root={tmp_path / name / 'disk'}"]
    with pytest.raises(FileNotFoundError, match=rf"entry \d+: its picture is missing: looked for .*{victim.name}"):
        load(*overrides)


def test_a_row_without_a_picture(tmp_path: Path) -> None:
    columns = dict(official.table("docvqa", 2)) | {"image": [None, None]}
    data = load("data=docvqa", f"data.hub={official.hub('docvqa', tmp_path / 'none', 'val', 2, columns)}")
    with pytest.raises(ValueError, match=r"none \(validation\), row 1: has no picture; remove the row"):
        data[1].load_image()


def test_a_torn_table_of_the_hub(build: Build, tmp_path: Path) -> None:
    build("docvqa", "hub")
    root = tmp_path / "docvqa" / "hub"
    (torn, *_) = sorted(root.rglob("*.parquet"))
    torn.write_bytes(torn.read_bytes()[:100])
    hub_source._open.cache_clear()
    with pytest.raises(UserError, match=r"\.parquet cannot be read .*; try again, or data.streaming=false"):
        load("data=docvqa", f"data.hub={root}")


def test_an_unlabelled_split_of_the_hub(tmp_path: Path) -> None:
    columns = dict(official.table("docvqa", 3)) | {"answers": [[], [], []]}
    root = official.hub("docvqa", tmp_path / "test", "test", 3, columns)
    with pytest.raises(
        ValueError, match=r"docvqa \(test\): 3 of 3 questions have no answers, the first is .*row 0; choose"
    ):
        load("data=docvqa", f"data.hub={root}", "data.split=test")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["data=chartqa", "data.source=disk"],
            r"data.source=disk needs data.root=DIR, the folder of the chartqa files",
        ),
        (["data=chartqa", "data.source=disk", "data.root=absent"], r"data.root=absent does not exist"),
        (["data=chartqa", "data.root=there"], r"data.root=there is not read with data.source=hub"),
        (["data=chartqa", "data.source=web"], r"data.source='web' is not one of hub, disk, folder"),
        (["data=chartqa", "data.name=charts"], r"data.name=charts does not exist: choose one of chartqa"),
        (
            ["data=chartqa"],
            r"no dataset can be read \(lmms-lab-encoder/ChartQA, .*: Couldn't reach it .*\): give another data.hub",
        ),
        (["data=chartqa", "data.hub=[{name: x}]"], r"data.hub: .* must be an id, or have an id"),
        (["data=entitygrid", "data.source=hub"], r"no dataset can be read \(data.hub is empty\)"),
    ],
)
def test_configs_that_cannot_be_read(overrides: list[str], message: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        load(*overrides)


def test_files_that_are_not_official(build: Build, tmp_path: Path) -> None:
    build("docvqa", "disk")
    file = tmp_path / "docvqa" / "disk" / "val" / "val_v1.0_withQT.json"
    overrides = ["data=docvqa", "data.source=disk", f"data.root={tmp_path / 'docvqa' / 'disk'}"]
    edit(file, lambda content: content["data"][1].pop("questionId"))
    with pytest.raises(ValueError, match=r"entry 1: has no questionId or question_id or id; it has question"):
        load(*overrides)
    edit(file, lambda content: content["data"][1].update(questionId=100))
    with pytest.raises(ValueError, match=r"entry 1: the id 100 is taken already"):
        load(*overrides)
    edit(file, lambda content: content["data"][1].update(questionId=1, question=" "))
    with pytest.raises(ValueError, match=r"entry 1: the question is ' '; it must be a text"):
        load(*overrides)
    edit(file, lambda content: content["data"][1].update(question="?", answers=[3]))
    with pytest.raises(ValueError, match=r"entry 1: the answers are \[3\]; they must be texts"):
        load(*overrides)
    edit(file, lambda content: content.pop("data"))
    with pytest.raises(ValueError, match=r"has no list of questions under 'data'; is it the official file"):
        load(*overrides)
    file.write_text("{")
    with pytest.raises(ValueError, match=r"is not valid JSON .*; download it again"):
        load(*overrides)


def test_a_table_without_the_columns(tmp_path: Path) -> None:
    table = dict(official.table("vqav2", 2))
    table.pop("question_id")
    root = official.hub("vqav2", tmp_path / "thin", "val", 2, table)
    with pytest.raises(ValueError, match=r"row 0: has no question_id or id; it has question, "):
        load("data=vqav2", f"data.hub={root}")
    renamed = tmp_path / "renamed"
    (renamed / "data").mkdir(parents=True)
    datasets.Dataset.from_dict({"picture": [Image.new("RGB", (2, 2))]}).to_parquet(
        renamed / "data" / "validation-0.parquet"
    )
    with pytest.raises(ValueError, match=r"renamed \(validation\) has no column 'image'; it has picture"):
        load("data=vqav2", f"data.hub={renamed}")

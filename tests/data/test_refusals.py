"""What datasets, pictures and loaders refuse: UserError in one sentence, with these words in it.

Broken files of the public benchmarks are in test_benchmarks.py.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from PIL import Image
from transformers import AutoTokenizer

from experiments import build
from experiments.data.folder import Folder
from experiments.data.image_io import load_picture, prefetch_pictures
from experiments.data.llava import Llava
from experiments.data.loader import Batches, Shuffled
from experiments.data.sample import Sample, other_questions
from experiments.data.synthetic.chart import SynthChart
from experiments.data.synthetic.entitygrid.__main__ import main as write_entitygrid
from experiments.data.synthetic.glyphs import SynthGlyphs, SynthList, ask, draw_lookups, draw_scene, questions
from experiments.data.synthetic.mixture import SynthMix
from experiments.data.synthetic.tokenizer import build_tokenizer, glyph_tokens
from experiments.data.train_data import TrainData
from shirg import MissingFileError, UserError
from tests.data.test_entitygrid import grid
from tests.data.test_loader import glyphs
from tests.experiments.test_configs import composed
from tests.lavida_adapter.tiny import tiny_config
from tests.refusals import assert_says, message_of

ROW = {"file_name": "a.png", "question": "What?", "answers": ["this"]}
TALK = {"image": "a.png", "conversations": [{"from": "human", "value": "?"}, {"from": "gpt", "value": "!"}]}


def row(**changes: Any) -> dict[str, Any]:
    return {key: value for key, value in {**ROW, **changes}.items() if value is not None}


def glyph_set(**changes: Any) -> SynthGlyphs:
    return SynthGlyphs(**{"split": "test", "n": 6, "density": "sparse", **changes})


def list_set(**changes: Any) -> SynthList:
    return SynthList(**{"split": "test", "n": 6, "density": "sparse", **changes})


def chart_set(**changes: Any) -> SynthChart:
    return SynthChart(**{"split": "test", "n": 6, "density": "sparse", **changes})


def mix_set(**shares: int) -> SynthMix:
    return SynthMix(shares=shares, split="train", n=6, density="train")


def asking(*texts: str) -> list[Sample]:
    """Samples with these questions and no pictures."""
    fields: dict[str, Any] = {"dataset": "d", "split": "s", "load_image": lambda: None, "size": None, "answers": ("a",)}
    return [Sample(id=str(i), question=text, prompt=text, **fields) for i, text in enumerate(texts)]


def mixture(**weights: float) -> object:
    cfg = composed("train", "data=mixture", "data.parts.own.root=nowhere")
    cfg.data.weights = OmegaConf.create(weights)
    return build.build_parts(cfg)


def scene() -> Any:
    return draw_scene(0, "train", 0, "hard")


OPTIONS: dict[str, tuple[Callable[[], object], str]] = {
    "glyphs, split": (
        lambda: glyph_set(split="dev"),
        "data.split='dev' does not exist: choose one of train, val, test",
    ),
    "glyphs, density": (lambda: glyph_set(density="sparse,foggy"), "'foggy' does not exist: choose from sparse, dense"),
    "glyphs, twice": (lambda: glyph_set(density=["sparse"] * 2), "must name one or more different densities"),
    "glyphs, none": (lambda: glyph_set(density=[]), "must name one or more different densities"),
    "glyphs, n": (lambda: glyph_set(n=0), "data.n=0 and data.qa_per_image=6 must be positive"),
    "glyphs, tasks": (lambda: glyph_set(tasks=["digits"]), "must name some of digit, letter, shape"),
    "glyphs, too many": (lambda: glyph_set(tasks=["shape"], qa_per_image=3), "qa_per_image=3 is more than a picture"),
    "glyphs, left out": (
        lambda: glyph_set(leave_out=["red", "puce"]),
        "data.leave_out: 'puce' is no word of a list; questions ask for red, green, ",
    ),
    "glyphs, no list": (lambda: glyph_set(only="red"), "data.only: 'red' is no word of a list"),
    "glyphs, no word": (lambda: glyph_set(only=["7"]), "data.only: '7' is no word of a list"),
    "glyphs, both": (lambda: glyph_set(only=["red"], leave_out=["K"]), "data.leave_out and data.only exclude each"),
    "glyphs, one word": (lambda: glyph_set(only=["red"]), "qa_per_image=6 is more than a picture can answer"),
    "glyphs, two": (lambda: glyph_set(only=["K", "L"], qa_per_image=3), "qa_per_image=3 is more than a picture can"),
    "glyphs, other task": (lambda: glyph_set(only=["K"], tasks=["digit"]), "leave no word that data.tasks=['digit']"),
    "glyphs, keys": (
        lambda: glyph_set(tasks=["letter"], density="sparse,hard", qa_per_image=13),
        "qa_per_image=13 is more than a picture can answer with tasks ['letter'] about 20 letters",
    ),
    "glyphs, all keys": (
        lambda: glyph_set(only=list("ACDEFHJKLMNP"), density="hard", qa_per_image=12),
        "in 1000 draws (seed 0, index 0) has 12 of the letters ACDEFHJKLMNP: lower data.qa_per_image",
    ),
    "list, tasks": (lambda: list_set(tasks=["shape"]), "data.tasks=['shape'] must name some of digit, letter"),
    "list, one piece": (lambda: list_set(pieces=1), "data.pieces=1: give 2 to 8"),
    "list, many pieces": (lambda: list_set(pieces=9), "data.pieces=9: give 2 to 8"),
    "list, density": (lambda: list_set(density="foggy"), "'foggy' does not exist: choose from sparse, dense, hard"),
    "chart, density": (lambda: chart_set(density="hard"), "data.density='hard' does not exist: choose from sparse"),
    "chart, tasks": (lambda: chart_set(tasks=["paint"]), "must name some of value"),
    "chart, too many": (lambda: chart_set(qa_per_image=9), "qa_per_image=9 is more than a picture can answer"),
    "mix, family": (lambda: mix_set(maps=1), "data.shares.maps does not exist: choose from glyphs, chart, doc"),
    "mix, nothing": (lambda: mix_set(doc=0), "not all of them 0"),
    "mix, negative": (lambda: mix_set(doc=-1, grid=1), "must be numbers of pictures"),
    "grid, split": (lambda: grid(split="dev"), "data.split=dev does not exist: choose one of train, val, test"),
    "grid, tasks": (lambda: grid(tasks=["naming"]), "data.tasks: there is no naming; choose from identification"),
    "grid, sizes": (lambda: grid(sizes=[241]), "data.sizes=[241]: entities have 7 to 240 pixels on this canvas"),
    "grid, no size": (lambda: grid(sizes=[]), "entities have 7 to 240 pixels"),
    "grid, three slices": (lambda: grid(canvas=[1152, 384], grid=[1, 3], sizes=[300]), "entities have 7 to 240"),
    "grid, canvas": (lambda: grid(canvas=[768]), "data.canvas must be [width, height]"),
    "grid, jitter": (lambda: grid(jitters=[200]), "data.jitters=[200]: give numbers of pixels from 0 to 120"),
    "grid, entities": (lambda: grid(entities=500), "data.entities=500: the split test has 1 to"),
    "grid, crowded": (lambda: grid(canvas=[384, 384], grid=[1, 1]), "has no room for two entities of 28 pixels"),
    "scene, split": (lambda: draw_scene(0, "dev", 0, "sparse"), "split='dev' does not exist: choose one of"),
    "scene, density": (lambda: draw_scene(0, "test", 0, "full"), "density='full' does not exist: choose one of"),
    "question, digit": (lambda: ask(scene(), "digit", "K"), "'digit K' is not a question"),
    "question, letter": (lambda: ask(scene(), "letter", "red"), "'letter red' is not a question"),
    "question, foil": (lambda: ask(scene(), "letter", "Q"), "'letter Q' is not a question"),
    "question, shape": (lambda: ask(scene(), "shape", "size"), "'shape size' is not a question"),
    "question, word": (lambda: ask(scene(), "word", "K"), "'word K' is not a question"),
    "questions, none": (lambda: questions(scene(), n=1, tasks=()), "must name some of digit, letter, shape"),
    "questions, word": (lambda: questions(scene(), n=1, tasks=("digit", "word")), "must name some of digit, letter"),
    "questions, many": (lambda: questions(scene(), n=13, tasks=("letter",)), "qa_per_image=13 is more than a picture"),
    "contexts": (lambda: draw_lookups(np.random.default_rng(0), batch=1, cells=1), "cells=1"),
    "shuffling": (lambda: other_questions(asking("red?", "RED?"), 0), "all samples ask the same: choose another"),
    "workers": (lambda: next(prefetch_pictures([], tiny_config(), "lavida_tiles", workers=-1)), "workers=-1: give 0"),
    "training workers": (lambda: TrainData(lambda step: step, 1, workers=-1), "trainer.workers=-1: give 0 or more"),
    "batch, shared": (
        lambda: Batches(Shuffled(glyphs(), 0), 6, world=4),
        "shared by 4 processes: give a multiple",
    ),
    "batch, empty": (lambda: Batches(Shuffled(glyphs(), 0), 0), "batch_size=0: give at least 1"),
    "weights, missing": (lambda: mixture(glyphs=1), "must name the same datasets: own is in one of them alone"),
    "weights, negative": (lambda: mixture(glyphs=1, own=-1), "give numbers from 0 on, and one at least above 0"),
    "weights, all 0": (lambda: mixture(glyphs=0, own=0), "give numbers from 0 on, and one at least above 0"),
    "mixture, evaluated": (
        lambda: build.build_dataset(composed("train", "data=mixture")),
        "a mixture is for training; evaluate its parts one by one",
    ),
}


@pytest.mark.parametrize("case", OPTIONS)
def test_options(case: str) -> None:
    call, words = OPTIONS[case]
    assert_says(message_of(call), words)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder with one picture, a conversation and a question about it, and files and links that are no pictures."""
    outside, folder = tmp_path / "outside", tmp_path / "mine"
    outside.mkdir()
    (folder / "deep").mkdir(parents=True)
    for path in (folder / "a.png", outside / "secret.png"):
        Image.new("RGB", (6, 4)).save(path)
    (folder / "metadata.jsonl").write_text(json.dumps(ROW))
    (folder / "talks.json").write_text(json.dumps([TALK, {**TALK, "image": "deep/b.png"}]))
    (folder / "escape.png").symlink_to(outside / "secret.png")
    (folder / "dangling.png").symlink_to(outside / "nothing.png")
    (folder / "tunnel").symlink_to(outside, target_is_directory=True)
    (folder / "loop.png").symlink_to(folder / "loop.png")
    (folder / "empty.png").touch()
    (folder / "blank.jsonl").write_text("\n\n  \n")
    (folder / "none.json").write_text("[]")
    (folder / "torn.json").write_text('[{"id": 1')
    (folder / "deep.json").write_text("[" * 100_000)
    (folder / "latin.json").write_bytes('[{"id": "\xe9"}]'.encode("latin-1"))
    Image.new("F", (2, 2), 0.5).save(folder / "float.tiff")
    return folder


def talks(root: Path, name: str = "talks.json", **options: Any) -> Llava:
    return Llava(json=root / name, images=options.pop("images", root), **options)


FILES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no folder": (lambda root: Folder(root=root / "gone"), "data folder ... does not exist: set data.root"),
    "no metadata": (lambda root: Folder(root=root / "deep"), "metadata.jsonl does not exist: write one JSON object"),
    "no rows": (
        lambda root: Folder(root=root, metadata="blank.jsonl"),
        "blank.jsonl is empty: write rows with file_name",
    ),
    "no empty file": (lambda root: Folder(root=root, metadata="empty.png"), "is empty: write rows with file_name"),
    "rows, limit": (lambda root: Folder(root=root, limit=0), "data.limit=0 must be a positive number"),
    "32 bits": (lambda root: load_picture(root / "float.tiff"), "32 bits (mode F); save it with 8 bits a channel"),
    "no conversations": (lambda root: talks(root, "gone.json"), "data.json= ... does not exist"),
    "no images": (lambda root: talks(root, images=root / "gone"), "data.images= ... does not exist"),
    "missing picture": (talks, "1 of 2 pictures are not in ... the first is deep/b.png ... missing=drop"),
    "empty list": (lambda root: talks(root, "none.json"), "none.json: nothing in it can be learned from (it is empty)"),
    "torn list": (lambda root: talks(root, "torn.json"), "torn.json is neither a JSON list nor JSON lines"),
    "deep list": (lambda root: talks(root, "deep.json"), "deep.json is neither a JSON list nor JSON lines"),
    "Latin-1": (lambda root: talks(root, "latin.json"), "latin.json is neither a JSON list nor JSON lines"),
    "talks, limit": (lambda root: talks(root, limit=0), "data.limit=0 must be a positive number"),
    "grid, no files": (
        lambda root: grid(source="disk", root=str(root), split="val"),
        "data.split=val does not exist in ... write it with",
    ),
}


@pytest.mark.parametrize("case", FILES)
def test_files(root: Path, case: str) -> None:
    call, words = FILES[case]
    assert_says(message_of(lambda: call(root)), words)


LINES: list[tuple[dict[str, Any] | str | bytes, str]] = [
    ('{"file_name": ', "not valid JSON"),
    ("[" * 100_000, "not valid JSON"),
    (b'{"file_name": "\xff\xfe"}', "not valid JSON"),
    ('["a.png"]', "must be a JSON object"),
    *((text, "must be a JSON object") for text in ("3", "null", "NaN", '"text"')),
    ('{"file_name":' * 100_000, "not valid JSON"),
    (json.dumps(row(question="half \ud800")), "half a character, '\\ud800'"),
    (json.dumps(row(answers=["\udfff"])), "half a character"),
    (json.dumps(row(file_name="\ud800.png")), "half a character"),
    (json.dumps(row(question_id="\ud800")), "half a character"),
    (json.dumps(row(question="Où?"), ensure_ascii=False).encode("latin-1"), "not valid JSON"),
    (row(question="why " * 2_500_000), "a text of 10,000,000 characters; give at most 200,000"),
    (row(answers=["a", "why " * 60_000]), "a text of 240,000 characters"),
    (row(draft="why " * 60_000), "a text of 240,000 characters"),
    *((row(question=value), "needs a non-empty text 'question'") for value in ([], {}, True, float("nan"))),
    *((row(file_name=value), "needs a non-empty text 'file_name'") for value in ([], {}, True, float("nan"))),
    *((row(answers=value), "needs 'answers'") for value in ({}, True, float("nan"), [[]], [None])),
    *((row(question_id=value), "the id must be a text or a whole number") for value in ([], {}, float("nan"))),
    *((row(draft=value), "'draft' must be a non-empty text") for value in (3, [], {}, " ")),
    (row(file_name=None), "needs a non-empty text 'file_name'"),
    (row(file_name=""), "needs a non-empty text 'file_name'"),
    (row(question=None), "needs a non-empty text 'question'"),
    (row(question=3), "needs a non-empty text 'question'"),
    (row(answers=None), "needs 'answers'"),
    (row(answers=[]), "needs 'answers'"),
    (row(answers=["x", " "]), "needs 'answers'"),
    (row(answers=14), "numbers in quotes"),
    (row(answers=["x", 3]), "numbers in quotes"),
    (row(question_id=True), "the id must be a text or a whole number, not True"),
    (row(question_id=1.5), "the id must be a text or a whole number, not 1.5"),
    (row(question_id="first"), "id 'first' is also on line 1; ids must be unique"),
    (row(file_name="../a.png"), "picture '../a.png' is outside the data folder"),
    (row(file_name="deep/../a.png"), "picture 'deep/../a.png' is outside the data folder"),
    (row(file_name="escape.png"), "picture 'escape.png' is outside the data folder"),
    (row(file_name="dangling.png"), "picture 'dangling.png' is outside the data folder"),
    (row(file_name="tunnel/secret.png"), "picture 'tunnel/secret.png' is outside the data folder"),
    (row(file_name="/a.png"), "picture '/a.png' is outside the data folder"),
    (row(file_name="loop.png"), "picture 'loop.png' cannot be looked up"),
    (row(file_name="a\0.png"), "cannot be looked up"),
    (row(file_name="x" * 5000), "cannot be looked up"),
    (row(file_name="empty.png"), "empty.png is an empty file"),
    (row(file_name="gone.png"), "'gone.png' does not exist in ... add it or remove the row"),
    (row(file_name="deep"), "'deep' does not exist in ... add it or remove the row"),
]


@pytest.mark.parametrize(("line", "words"), LINES, ids=lambda value: str(value)[:40])
def test_lines_of_metadata(root: Path, line: dict[str, Any] | str | bytes, words: str) -> None:
    raw = line if isinstance(line, bytes) else (line if isinstance(line, str) else json.dumps(line)).encode()
    (root / "metadata.jsonl").write_bytes(json.dumps(row(question_id="first")).encode() + b"\n\n" + raw + b"\n")
    assert_says(message_of(lambda: Folder(root=root)), f"metadata.jsonl, line 3: ... {words}")


def test_an_absolute_path_is_outside_even_when_it_points_inside(root: Path) -> None:
    (root / "metadata.jsonl").write_text(json.dumps(row(file_name=str(root / "a.png"))))
    assert_says(message_of(lambda: Folder(root=root)), "is outside the data folder")


ENTRIES: list[tuple[Any, str]] = [
    ([], "entry 0: must be an object with image and conversations"),
    ({"image": "a.png"}, "entry 0: needs conversations, a list of turns"),
    ({"image": "a.png", "conversations": ["hi"]}, "entry 0: a turn must be an object with from and value"),
    ({**TALK, "conversations": [{"from": "cat", "value": "x"}]}, "from 'cat': it must be from human or gpt"),
    ({**TALK, "image": "../secret.jpg"}, "is outside ... : give paths that start there"),
    *(
        ({**TALK, "image": value}, "entry 0: image must be the path of a picture")
        for value in (3, {"path": "a.png"}, float("nan"), [3], [None], [["a.png"]], True)
    ),
    *(({**TALK, "conversations": value}, "needs conversations, a list of turns") for value in (3, "hi", {}, None)),
    ({**TALK, "conversations": [{"from": "human", "value": "?" * 300_000}]}, "a turn of 300,000 characters"),
    *(({**TALK, "conversations": [turn]}, "a turn must be an object") for turn in (3, None, [], {"from": "human"})),
    ({**TALK, "id": "\ud800"}, "is neither a JSON list nor JSON lines ... half a character"),
    ({"conversations": TALK["conversations"]}, "nothing in it can be learned from (1 without a picture)"),
    (
        {**TALK, "conversations": [{"from": "human", "value": "<image>"}, TALK["conversations"][1]]},
        "nothing in it can be learned from (1 without a question)",
    ),
    ({**TALK, "conversations": TALK["conversations"][:1]}, "nothing in it can be learned from (1 without an answer)"),
    *(({**TALK, "image": value}, "image must be the path of a picture") for value in (0, False, {})),
]


@pytest.mark.parametrize(("entry", "words"), ENTRIES)
def test_entries_of_conversations(root: Path, entry: Any, words: str) -> None:
    (root / "talks.json").write_text(json.dumps([entry]))
    assert_says(message_of(lambda: talks(root)), words)


@pytest.mark.parametrize("end", ["\u2028", "\u2029", "\x85", "\x1e", "\x0b"])
def test_other_ends_of_lines_are_part_of_a_text(root: Path, end: str) -> None:
    """JSON allows them in a text, except for control characters, which it has escapes for."""
    text = f"one{end}two"
    (root / "metadata.jsonl").write_text(json.dumps(row(question=text), ensure_ascii=False), encoding="utf-8")
    assert Folder(root=root)[0].question == text
    talk = {**TALK, "conversations": [{"from": "human", "value": text}, {"from": "gpt", "value": text}]}
    lines = [json.dumps({**talk, **fields}, ensure_ascii=False) for fields in ({}, {"image": ["a.png"]})]
    (root / "lines.json").write_text("\n".join(lines), encoding="utf-8")
    assert [sample.question for sample in (talks(root, "lines.json")[i] for i in range(2))] == [text, text]


def test_pictures_in_the_plural(root: Path) -> None:
    entry = {"images": ["a.png"], "conversations": TALK["conversations"]}
    (root / "talks.json").write_text(json.dumps([entry, {**entry, "images": ["a.png", "b.png"]}]))
    data = talks(root)
    assert (len(data), data[0].meta["picture"]) == (1, "a.png")
    assert data.dropped == {"with several pictures": 1}


FIELD = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=6), st.lists(st.text(max_size=3), max_size=2)
)


@given(st.dictionaries(st.sampled_from([*ROW, "answer", "question_id", "id", "draft", "drafts"]), FIELD), st.data())
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_line_is_read_or_refused(root: Path, changes: dict[str, Any], data: st.DataObject) -> None:
    line = json.dumps({**ROW, **changes}, ensure_ascii=data.draw(st.booleans())).encode(errors="surrogatepass")
    cut = data.draw(st.integers(1, len(line)))
    (root / "metadata.jsonl").write_bytes(line[:cut] if data.draw(st.booleans()) else line)
    try:
        (sample,) = Folder(root=root)  # type: ignore[misc]  # a sequence of samples can be unpacked
    except UserError as error:
        assert "\n" not in str(error)
    else:
        assert sample.question.strip() and all(answer.strip() for answer in sample.answers)


def test_a_missing_file_is_also_a_file_not_found_error(root: Path) -> None:
    with pytest.raises(FileNotFoundError):
        Folder(root=root / "gone")
    assert issubclass(MissingFileError, FileNotFoundError)


def test_another_tokenizer(tmp_path: Path) -> None:
    build_tokenizer().save_pretrained(tmp_path)
    path = tmp_path / "tokenizer.json"
    path.write_text(path.read_text().replace('"content": "red"', '"content": "rot"'))
    assert_says(message_of(lambda: glyph_tokens(AutoTokenizer.from_pretrained(tmp_path))), "'red' is 3 tokens")


def test_options_of_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["colour=red"], ["entities=500"]):
        with pytest.raises(SystemExit) as stop:
            write_entitygrid([str(tmp_path / "probe"), *words])
        assert stop.value.code == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ") and words[0].partition("=")[0] in line

"""The four task families: reproducible, disjoint, balanced, and right by a reader that sees nothing but pixels."""

import random
from collections import Counter
from pathlib import Path

import hydra
import numpy as np
import pytest
from omegaconf import OmegaConf

from experiments.data.sample import Dataset, Sample
from experiments.data.synthetic.board import BAR, KINDS, Stamp
from experiments.data.synthetic.board_task import SynthTask
from experiments.data.synthetic.chart import value
from experiments.data.synthetic.glyphs.render import GLYPHS
from experiments.data.synthetic.glyphs.scene import CHARS, COLOUR_RGB, COLOURS, SHAPES
from experiments.data.synthetic.mixture import FAMILIES, SynthMix
from experiments.data.synthetic.synthetic_dataset import BUCKETS
from experiments.data.synthetic.text_context import draw_contexts
from experiments.data.synthetic.tokenizer import build_tokenizer, word_tokens
from experiments.metrics import METRICS, metric
from experiments.metrics.answer_metric import TextMetric

CONF = Path(__file__).resolve().parents[2] / "conf" / "data"
PINNED = {
    "chart": 15109941047914288599,
    "doc": 16163333924586639496,
    "grid": 15380324538673394896,
    "shapes": 5737985632227867495,
}
each_family = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)


def samples(family: type[SynthTask], n: int = 48, **options: object) -> list[Sample]:
    data = family(**{"split": "test", "n": n, "density": "sparse,dense", **options})  # type: ignore[arg-type]
    return [data[i] for i in range(n)]


def picture_of(sample: Sample) -> np.ndarray:
    """[128, 128, 3] in [0, 1]."""
    return np.asarray(sample.load_image()) / 255


def cells(picture: np.ndarray) -> np.ndarray:
    """[16, 16, 8, 8, 3]."""
    return picture.reshape(16, 8, 16, 8, 3).transpose(0, 2, 1, 3, 4)


def hue(pixels: np.ndarray, dim: float = 1.0) -> str:
    """The colour of the pixels that are brighter than the ground; "" is grey."""
    ink = pixels.reshape(-1, 3)
    ink = ink[ink.max(axis=-1) > 0.3]
    rgb = np.array([(0.5, 0.5, 0.5), *(np.array(c) * dim for c in COLOUR_RGB.values())])
    return COLOURS[int(np.square(rgb - ink.mean(axis=0)).sum(axis=1).argmin())]


def inked(cell: np.ndarray) -> np.ndarray:
    return np.asarray(cell.max(axis=-1) > 0.34)


def read_chart(picture: np.ndarray, question: str) -> str:
    """The height of the bar of the asked colour over the lower side of its quarter, to a quarter of a cell."""
    (_, colour), grid = question.split(), cells(picture)
    heights = []
    for row, col in np.ndindex(16, 16):
        ink = inked(grid[row, col])
        if ink.sum() > 6 and hue(grid[row, col][ink]) == colour:
            y = row * 8 + int(np.flatnonzero(ink.sum(axis=1) > 3)[-1])
            heights.append((63 - y % 64) // 2 * 2.5 + 10)
    (height,) = heights
    return str(int(height))


def read_char(cell: np.ndarray) -> str:
    """The char of the bitmap that fits the dark pixels best, at any place in the cell."""
    dark = 1 - cell.mean(axis=-1)
    best = (np.inf, "")
    for char, (y, x) in ((c, p) for c in range(1, len(CHARS)) for p in np.ndindex(2, 4)):
        expected = np.full((8, 8), 0.08)
        expected[y : y + 7, x : x + 5][GLYPHS[char]] = 0.85
        best = min(best, (float(np.square(dark - expected).sum()), CHARS[char]))
    return best[1]


def read_doc(picture: np.ndarray, question: str) -> str:
    key, grid = question.split()[1], cells(picture)
    values = []
    for row in range(16):
        for col in range(0, 16, 4):
            if grid[row, col].min() < 0.5 and read_char(grid[row, col]) == key:
                values.append(read_char(grid[row, col + 1]) + read_char(grid[row, col + 2]))
    (value,) = values
    return value


def kind_of(cell: np.ndarray) -> str:
    """By the ink: a disc has its middle and most of its box, a ring no middle, a plus a full row, a cross none."""
    ink = inked(cell)
    rows, cols = np.flatnonzero(ink.any(axis=1)), np.flatnonzero(ink.any(axis=0))
    box = ink[rows[0] : rows[0] + 7, cols[0] : cols[0] + 7]
    if not box[3, 3]:
        return "ring"
    if box.mean() > 0.5:
        return "disc"
    return "plus" if box[3].mean() > 0.9 else "cross"


def read_grid(picture: np.ndarray, question: str) -> str:
    (task, colour, kind), grid = question.split(), cells(picture)
    found = [
        (row, col)
        for row, col in np.ndindex(16, 16)
        if inked(grid[row, col]).sum() > 8
        and hue(grid[row, col][inked(grid[row, col])]) == colour
        and kind_of(grid[row, col]) == kind
    ]
    if task == "count":
        return str(len(found))
    ((row, col),) = found
    return "abcdefgh"[col % 8] + str(8 - row % 8)


def read_shapes(picture: np.ndarray, question: str) -> str:
    """Finds each dim colour's pixels; a shape's kind follows from how many whole windows they fill."""
    task, argument = question.split()
    kinds: dict[str, str] = {}
    for colour, rgb in COLOUR_RGB.items():
        near = (abs(picture - 0.45 * np.array(rgb)) < 0.2).all(axis=-1)
        # Glyphs are thin and noise is sparse: only a shape fills whole 5x5 windows.
        windows = np.lib.stride_tricks.sliding_window_view(near, (5, 5)).mean(axis=(2, 3)) > 0.95
        if windows.sum() > 60:
            fill = windows.sum()
            kinds[colour] = "triangle" if fill < 400 else "circle" if fill < 555 else "square"
    if task == "many":
        return str(len(kinds))
    if task == "any":
        return "yes" if argument in kinds else "no"
    if task == "form":
        return kinds[argument]
    (colour,) = (colour for colour, kind in kinds.items() if kind == argument)
    return colour


READERS = {"chart": read_chart, "doc": read_doc, "grid": read_grid, "shapes": read_shapes}


@pytest.mark.parametrize("name", FAMILIES)
def test_a_reader_of_the_pixels_gives_the_answer(name: str) -> None:
    asked = samples(FAMILIES[name], 16 if name == "doc" else 64)
    for sample in asked:
        assert (READERS[name](picture_of(sample), sample.question),) == sample.answers, sample.id
    assert {s.subtask for s in asked} == set(FAMILIES[name].TASKS)


@pytest.mark.parametrize("name", FAMILIES)
def test_boards_are_pinned(name: str) -> None:
    """Other boards mean other test sets and useless weights: a change here needs new weights."""
    assert FAMILIES[name].draw(0, "test", 3, "dense").digest == PINNED[name]


@each_family
def test_splits_are_disjoint_by_content(family: type[SynthTask]) -> None:
    seen = {split: {family.draw(s, split, i, "sparse").digest for s in (0, 1) for i in range(40)} for split in BUCKETS}
    for split, digests in seen.items():
        assert len(digests) >= 78  # a single shape alone has 4056 places, colours and kinds, so some come twice
        assert {digest % 100 for digest in digests} <= set(BUCKETS[split])


@pytest.mark.parametrize("name", FAMILIES)
def test_the_boxes_hold_the_evidence(name: str) -> None:
    """The reader finds the answer with everything else blanked out, and not with the boxes blanked out."""
    for sample in samples(FAMILIES[name], 12):
        if sample.answers[0] in ("no", "0"):
            assert sample.boxes  # what could be mistaken for it
            continue
        picture = picture_of(sample)
        inside = np.zeros((128, 128, 1), dtype=bool)
        for x0, y0, x1, y1 in (np.round(128 * np.array(box)).astype(int) for box in sample.boxes):
            inside[y0:y1, x0:x1] = True
        ground = np.median(picture)
        assert READERS[name](np.where(inside, picture, ground), sample.question) == sample.answers[0]
        try:
            assert READERS[name](np.where(inside, ground, picture), sample.question) != sample.answers[0]
        except (ValueError, KeyError):
            pass  # found none


@pytest.mark.parametrize(
    ("name", "subtask", "classes", "chance"),
    [
        ("chart", "value", 32, 1 / 32),
        ("doc", "field", 90, 1 / 90),
        ("grid", "where", 64, 1 / 64),
        ("grid", "count", 6, 1 / 6),
        ("shapes", "paint", 8, 1 / 8),
        ("shapes", "form", 3, 1 / 3),
        ("shapes", "many", 4, 1 / 4),
        ("shapes", "any", 2, 1 / 2),
    ],
)
def test_answers_are_balanced_and_the_question_gives_nothing_away(
    name: str, subtask: str, classes: int, chance: float
) -> None:
    """The best constant answer, and the best one for each question text, taken from other pictures."""
    asked = samples(FAMILIES[name], 1200, tasks=(subtask,), density="sparse", qa_per_image=1, split="train")
    known, new = asked[:600], asked[600:]
    answers = Counter(s.answers[0] for s in asked)
    assert len(answers) == classes
    margin = 0.03 + 3 * (chance * (1 - chance) / len(new)) ** 0.5
    constant = Counter(s.answers[0] for s in known).most_common(1)[0][0]
    by_text = {t: Counter(s.answers[0] for s in known if s.question == t) for t in {s.question for s in known}}
    guesses = [by_text[s.question].most_common(1)[0][0] if s.question in by_text else constant for s in new]
    assert np.mean([s.answers[0] == constant for s in new]) <= chance + margin
    assert np.mean([g == s.answers[0] for g, s in zip(guesses, new, strict=True)]) <= chance + margin


@each_family
def test_pooling_blocks_are_crowded(family: type[SynthTask]) -> None:
    """The mean of four cells mixes pieces of evidence of different questions, but for the guard."""
    for number in range(10):
        board = family.draw(0, "test", number, "sparse")
        in_block = Counter((s.row // 2, s.col // 2) for s in board.stamps)
        if family.GUARD:
            assert all(stamp.side == 4 for stamp in board.stamps)
        else:
            assert min(in_block.values()) >= 2


@each_family
def test_words_name_what_is_drawn_and_every_word_is_one_token(family: type[SynthTask]) -> None:
    tokens = word_tokens(build_tokenizer())
    for stamp in family.draw(0, "train", 1, "dense").stamps:
        assert set(stamp.words) <= tokens.keys()
        assert (stamp.mark in stamp.words) == (stamp.mark in (*SHAPES, *KINDS, *CHARS[1:31]))
        assert (stamp.colour in stamp.words) == bool(stamp.colour)


def test_a_bar_has_four_heights_and_a_scale() -> None:
    bars = [Stamp(row, 3, BAR, "red", part) for row in (7, 6, 0, 15, 8) for part in range(4)]
    assert [value(bar) for bar in bars] == [
        *("10", "12", "15", "17", "20", "22", "25", "27", "80", "82", "85", "87"),
        *("10", "12", "15", "17", "80", "82", "85", "87"),
    ]


@each_family
def test_a_context_holds_what_its_question_needs(family: type[SynthTask]) -> None:
    for cells_ in (6, 64):
        for context in draw_contexts(random.Random(1), family, n=40, cells=cells_):
            assert len(context.bags) == cells_
            task, *arguments = context.question.split()
            holding = [bag for bag in context.bags if set(arguments) <= set(bag)]
            if task == "any":
                assert bool(holding) == (context.answer == "yes")
            else:
                assert len(holding) == (3 if task == "field" else 1)
                said = {word.removeprefix("row-").removeprefix("column-") for bag in holding for word in bag}
                if task in ("value", "field", "where"):
                    assert set(context.answer[0 if task == "value" else slice(None)]) <= said
                else:
                    assert context.answer in said


@pytest.mark.parametrize("name", FAMILIES)
def test_the_shipped_config(name: str) -> None:
    data = hydra.utils.instantiate(OmegaConf.load(CONF / f"synth_{name}.yaml"))
    family = FAMILIES[name]
    assert isinstance(data, Dataset) and isinstance(data, family)
    assert data.metric_names == family.METRICS and set(data.metric_names) <= set(METRICS)
    asked = [data[i] for i in range(0, len(data), 12)]
    assert {s.meta["density"] for s in asked} <= {"sparse", "dense"} and {s.split for s in asked} == {"test"}
    headline = metric(data.metric_names[0])
    assert isinstance(headline, TextMetric)
    assert all(headline.score(prediction=s.answers[0], references=s.answers) == 1 for s in asked)
    assert all(s.answers[0].isalnum() and len(s.answers[0]) <= 8 for s in asked)
    assert {s.meta["group"] for s in asked} == {"guard" if family.GUARD else "fine"}


def test_a_mix_is_its_families_in_turn() -> None:
    mix = SynthMix(shares={"glyphs": 1, "doc": 2}, split="train", n=60, density="train", qa_per_image=3, seed=3)
    alone = FAMILIES["doc"](split="train", n=60, density="train", qa_per_image=3, seed=3)
    drawn = [mix[i] for i in range(60)]
    families = [s.dataset.removeprefix("synth_") for s in drawn[:18]]
    assert families == (["glyphs"] * 3 + ["doc"] * 6) * 2
    docs = [s for s in drawn if s.dataset == "synth_doc"]
    assert [s.id for s in docs] == [alone[i].id for i in range(len(docs))]
    assert {s.meta["group"] for s in docs} == {"doc"}
    assert {s.meta["group"] for s in drawn} == {"doc", "fine", "guard"}
    assert len({s.id for s in drawn}) == 60

"""The slides: filled from the study, left out where it has nothing for them, and with everything in its place."""

import re
import shutil
import subprocess
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from matplotlib import get_data_path
from pptx import Presentation
from pptx.enum.shapes import MSO_SHAPE_TYPE
from pptx.util import Emu

from experiments.analysis.table import collect, refresh
from experiments.report.figures import draw
from experiments.report.slide_facts import signed
from experiments.report.slide_graphics import SlideTable
from experiments.report.slide_layout import BODY, Slides, arrange, text_width
from experiments.report.slides import MOST_ROWS, terms_in_use, varied, write_slides
from experiments.report.verdict import verdict
from shirg import UserError
from tests.experiments.conftest import evaluator
from tests.experiments.planting import plant
from tests.experiments.report.answers import answered, counts

TITLES = [
    "Which vision tokens to keep: {study}",
    "Selected once, read in every step",
    "All tokens: quality and cost",
    "Selectors compared",
    "SHIRG: {ours}",
    "Results",
    "Scores by kind of question",
    "Ablations",
    "Where the time goes",
    "Which tokens are kept",
    "Where it fails",
    "What is known, what is next",
]
INTERVAL = re.compile(r"\[[+\u2212]?\d+\.\d, [+\u2212]?\d+\.\d\]|[+-]\d+\.\d to [+-]\d+\.\d")
POINT = 12700
"""Units of a slide in a point."""


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory, tiny_weights: Path) -> Iterator[Path]:
    """The slides of one system without pictures, all of whose answers are right."""
    with pytest.MonkeyPatch.context() as patch:
        job = evaluator(tmp_path_factory.mktemp("small"), tiny_weights, patch)("selector=pooled", "limit=6", "shots=0")
    plant(job, lambda i: True)
    table = refresh(job.parent)
    yield write_slides(job.parent, table.frame, draw(table))


@pytest.fixture(scope="module")
def letters() -> dict[str, float]:
    """Widths of the letters of Helvetica, which are those of Arial, for a size of 1."""
    metrics = (Path(get_data_path()) / "fonts/afm/phvr8a.afm").read_text()
    found = re.findall(r"^C (\d+) ; WX (\d+) ;", metrics, re.MULTILINE)
    return {chr(int(code)): int(width) / 1000 for code, width in found if int(code) < 128} | {"\u2212": 0.584}


def slides_of(deck: Path) -> list[Any]:
    return list(Presentation(str(deck)).slides)


def titles_of(deck: Path) -> list[str]:
    return [slide.shapes.title.text_frame.text for slide in slides_of(deck)]


def text_of(slide: Any) -> str:
    return "\n".join(shape.text_frame.text for shape in slide.shapes if shape.has_text_frame)


def table_of(slide: Any) -> list[list[str]]:
    table = next(shape.table for shape in slide.shapes if shape.has_table)
    return [[cell.text_frame.text for cell in row.cells] for row in table.rows]


def test_a_study_with_everything_has_twelve_slides(study: Path) -> None:
    titles = titles_of(study / "deck.pptx")
    expected = [title.format(study=study.name, ours=titles[4].removeprefix("SHIRG: ")) for title in TITLES]
    assert titles == expected
    text = [text_of(slide) for slide in slides_of(study / "deck.pptx")]
    rows = list(collect(study))
    full = next(row for row in rows if row["selector"] == "full")
    delta = [100 * full[f"delta fine vs pooled {key}"] for key in ("mean", "low", "high")]
    assert "fine {} [{}, {}]".format(*map(signed, delta)) in text[2]
    assert f"{full['visual tokens mean'] / 88:.1f} times the tokens" in text[2]
    finished = [row for row in rows if row["status"] == "ok"]
    assert "synth_glyphs, test, 24 of " in text[0] and "6 systems on cpu" in text[0] and "commit " in text[0]
    assert verdict(finished) in text[0]
    answers = counts(answered(study), "pooled", "shirg")
    assert f"{answers['fixed']} answers fixed, {answers['broken']} broken: " in text[10]
    assert f"[{100 * answers['broken'] / 24:.1f}" not in text[10], "an interval is wider than its mean"


def test_slides_that_would_say_nothing_are_left_out(small: Path) -> None:
    """One system without pictures: no pictures, no comparison, no method, no failures, nothing to fill in."""
    titles = titles_of(small)
    assert titles == [
        f"Which vision tokens to keep: {small.parent.name}",
        "Results",
        "Where the time goes",
        "What is known, what is next",
    ]


def test_every_score_has_its_interval(study: Path) -> None:
    slides = slides_of(study / "deck.pptx")
    head, *rows = table_of(slides[5])
    assert len(rows) == 6, "the finished systems"
    assert head[:2] == ["system", "visual tokens"] and len(head) > 4 and "recall" not in head
    cells = [cell for row in rows for cell in row[2:] if cell != "-"]
    assert len(cells) > 20 and all(INTERVAL.search(cell) for cell in cells)
    for slide in slides:
        for line in text_of(slide).splitlines():
            scores = re.findall(r"[+\u2212]\d+\.\d(?! %?\])|\d+\.\d %", re.sub(INTERVAL, "", line))
            assert len(INTERVAL.findall(line)) >= len(scores), line


@pytest.mark.parametrize("deck", ["study", "small"])
def test_everything_is_on_its_slide_and_nothing_on_something_else(deck: str, request: pytest.FixtureRequest) -> None:
    path = request.getfixturevalue(deck)
    presentation = Presentation(str(path / "deck.pptx" if path.is_dir() else path))
    for slide in presentation.slides:
        title = slide.shapes.title.text_frame.text
        for shape in slide.shapes:
            assert 0 <= shape.left and shape.left + shape.width <= presentation.slide_width, title
            assert 0 <= shape.top and shape.top + shape.height <= presentation.slide_height, title
        for a, b in combinations(slide.shapes, 2):
            across = min(a.left + a.width, b.left + b.width) - max(a.left, b.left)
            down = min(a.top + a.height, b.top + b.height) - max(a.top, b.top)
            assert min(across, down) <= 2, (title, a.name, b.name)
        assert all(shape.text_frame.text for shape in slide.placeholders), title
        content = [s for s in slide.shapes if s.has_table or s.shape_type == MSO_SHAPE_TYPE.PICTURE or s.has_text_frame]
        lowest = max(s.top + s.height for s in content if s.top < Emu(presentation.slide_height * 0.9))
        assert lowest > 0.6 * presentation.slide_height, f"{title}: its lower part is empty"


@pytest.mark.parametrize("deck", ["study", "small"])
def test_no_text_leaves_its_box(deck: str, letters: dict[str, float], request: pytest.FixtureRequest) -> None:
    """Measured with the widths of the font's letters, as a program that shows slides breaks lines."""
    path = request.getfixturevalue(deck)
    for slide in slides_of(path / "deck.pptx" if path.is_dir() else path):
        for frame, width, height in boxes(slide):
            tall = sum(paragraph_height(paragraph, width / POINT, letters) for paragraph in frame.paragraphs)
            assert tall <= height / POINT + 0.5, frame.text


def boxes(slide: Any) -> Iterator[tuple[Any, float, float]]:
    """Every text of a slide with the width and the height that it has in its shape or its cell."""
    for shape in slide.shapes:
        if shape.has_text_frame and shape.text_frame.text:
            frame = shape.text_frame
            yield frame, shape.width - frame.margin_left - frame.margin_right, shape.height
        if shape.has_table:
            for row in shape.table.rows:
                for cell, column in zip(row.cells, shape.table.columns, strict=True):
                    yield cell.text_frame, column.width - cell.margin_left - cell.margin_right, row.height


def paragraph_height(paragraph: Any, width: float, letters: dict[str, float]) -> float:
    """Points; words are put on lines one by one."""
    (run,) = paragraph.runs
    size = run.font.size.pt * (1.07 if run.font.bold else 1.0)
    lines, end = 1, 0.0
    for word in run.text.split(" "):
        wide = size * sum(letters.get(letter, 0.6) for letter in word)
        if end and end + wide > width:
            lines, end = lines + 1, 0.0
        end += wide + size * letters[" "]
    return lines * 1.2 * run.font.size.pt + (paragraph.space_before.pt if paragraph.space_before else 0)


def test_widths_of_letters_are_not_underestimated(letters: dict[str, float]) -> None:
    for letter, width in letters.items():
        assert width <= 72 * text_width(letter, 1) <= width + 0.16, letter


def test_a_wide_table_loses_its_last_columns_and_a_fourth_point_is_refused() -> None:
    """As many systems as a slide shows, all with long names."""
    name = "shirg weights.similarity=0.5 scaffold.size=12 decode=fast"
    row = [name, *["50.0\n[40.0, 60.0]"] * 30]
    table = SlideTable(["system", *(f"score {i}" for i in range(30))], [row] * MOST_ROWS)
    narrow = table.narrowed()
    assert 8 < len(narrow.head) < 20 and len(narrow.rows[0]) == len(narrow.head)
    assert sum(narrow.widths(9)) <= BODY.width < sum(table.widths(9))
    _, _, below = arrange(["A point that takes one line."], narrow.aspect)
    assert sum(narrow.heights(9, narrow.widths(9))) <= below.height
    with pytest.raises(UserError, match="4 points"):
        Slides("").add("title", ["a", "b", "c", "d"], narrow)


def test_only_terms_in_use_are_named() -> None:
    weights = {"similarity": 0.65, "neighbor": 0.25, "crop": 0.1, "edge": 0.0}
    assert terms_in_use({"weights": weights, "crop_term": "none"}) == ["similarity 0.65", "neighbor 0.25"]
    assert terms_in_use({"weights": weights, "crop_term": "border"})[-1] == "crop 0.1"


def test_failures_are_of_different_kinds() -> None:
    samples = [{"id": str(i), "subtask": "digit" if i < 8 else "letter", "question": f"q{i % 2}"} for i in range(10)]
    assert [one["id"] for one in varied(samples, 3)] == ["0", "9", "1"]
    assert [one["id"] for one in varied(samples, 3, first={"7": 1.0})] == ["7", "8", "0"]


@pytest.mark.skipif(shutil.which("soffice") is None, reason="LibreOffice is not installed")
def test_the_slides_open_in_libreoffice(study: Path, tmp_path: Path) -> None:
    """A program other than the writer reads every slide as a page."""
    profile = f"-env:UserInstallation={(tmp_path / 'profile').as_uri()}"
    command = ["soffice", profile, "--headless", "--convert-to", "pdf", "--outdir", str(tmp_path), study / "deck.pptx"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr
    pages = re.findall(rb"/Type\s*/Page\b", (tmp_path / "deck.pdf").read_bytes())
    assert len(pages) == len(TITLES)

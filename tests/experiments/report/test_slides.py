"""The slides: nine of them, filled from the study, with everything inside the slide."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from pptx import Presentation
from pptx.enum.shapes import MSO_SHAPE_TYPE

from experiments.analysis.table import collect
from tests.experiments.report.answers import answered, counts


def test_there_are_nine_slides_filled_from_the_study(study: Path) -> None:
    slides = list(Presentation(study / "deck.pptx").slides)
    text = ["\n".join(s.text_frame.text for s in slide.shapes if s.has_text_frame) for slide in slides]
    titles = [slide.shapes.title.text_frame.text for slide in slides]
    assert len(slides) == 9 and titles[0] == "Selected once, read in every step" and titles[6] == "Ablations"
    rows = {row["job"]: row for row in collect(study)}
    full = next(row for row in rows.values() if row["selector"] == "full")
    delta = [row["delta fine vs pooled mean"] for row in rows.values() if row["selector"] == "full"][0]
    assert f"fine {100 * delta:+.1f} [" in text[1]
    assert f"{full['visual tokens mean'] / 88:.1f} times the tokens" in text[1]
    assert "similarity 0.65" in text[3]
    answers = answered(study)
    assert f"{counts(answers, 'pooled', 'shirg')['fixed']} answers fixed" in text[7]
    assert f"{counts(answers, 'pooled', 'shirg')['broken']} broken of 24" in text[7]
    table = next(shape.table for shape in slides[4].shapes if shape.has_table)
    assert len(table.rows) == 7, "six finished rows and a heading"
    for slide in slides:
        graphics = [s for s in slide.shapes if s.has_table or s.shape_type == 13 or s.shape_type == 1]
        assert graphics, slide.shapes.title.text_frame.text
        for shape in slide.shapes:
            assert shape.left >= 0 and shape.left + shape.width <= 12192000 + 9525


@pytest.mark.skipif(shutil.which("soffice") is None, reason="LibreOffice is not installed")
def test_the_slides_open_in_libreoffice(study: Path, tmp_path: Path) -> None:
    """A program other than the writer reads nine slides as nine pages."""
    profile = f"-env:UserInstallation={(tmp_path / 'profile').as_uri()}"
    command = ["soffice", profile, "--headless", "--convert-to", "pdf", "--outdir", str(tmp_path), study / "deck.pptx"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr
    pages = re.findall(rb"/Type\s*/Page\b", (tmp_path / "deck.pdf").read_bytes())
    assert len(pages) == 9


def test_what_stands_on_a_slide_stays_on_it(study: Path) -> None:
    """Every shape lies within its slide, and a picture above its caption starts at the left edge of the caption."""
    deck = Presentation(study / "deck.pptx")
    for slide in deck.slides:
        for shape in slide.shapes:
            assert 0 <= shape.left and shape.left + shape.width <= deck.slide_width
            assert 0 <= shape.top and shape.top + shape.height <= deck.slide_height
    first = deck.slides[0].shapes
    pictures = [shape for shape in first if shape.shape_type == MSO_SHAPE_TYPE.PICTURE]
    captions = [shape for shape in first if shape.has_text_frame and "question: " in shape.text_frame.text]
    assert len(pictures) == 3 == len(captions)
    assert [shape.left for shape in pictures] == [shape.left for shape in captions]
    assert all(a.top + a.height <= b.top for a, b in zip(pictures, captions, strict=True))

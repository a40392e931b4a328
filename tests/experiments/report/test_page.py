"""The page: self-contained, escaped, complete; the overlay: bright where kept."""

import base64
import hashlib
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pptx import Presentation
from pptx.enum.shapes import MSO_SHAPE_TYPE

from experiments.analysis.table import collect
from experiments.data.sample import Sample
from experiments.report.__main__ import main as rewrite
from experiments.report.figures import budget_curve, token_maps
from experiments.report.publish import publish
from experiments.viz.examples import pick_examples
from experiments.viz.kept_tokens import COARSE, DARK, EDGE_COLOUR, SCAFFOLD_COLOUR, TARGET_COLOUR, overlay
from experiments.viz.token_map import MAP, MAPS, load_map
from shirg import Source
from tests.experiments.conftest import ROOT, result_of

Eval = Callable[..., Path]


NASTY = '<script>alert("x")</script> & "quotes" | `pipes` {{ 7 * 7 }} $x_1 \\input{y}\x07'


def test_what_a_dataset_says_stays_text(eval_here: Eval, picture_folder: Callable[..., Path]) -> None:
    folder = picture_folder("p|<b>pictures", [NASTY, "plain"], answers=["<img src=x onerror=alert(1)>", "</script>"])
    for selector in ("pooled", "shirg"):
        study = eval_here(
            f"data.root='{folder}'", "data=folder", "data.name='<i>name</i>'", f"selector={selector}"
        ).parent
    publish(study, files=True)
    page = (study / "report.html").read_text()
    assert page.count("<script") == 2 == page.count("</script>"), "the data and the code, both ours"
    assert "onerror=alert(1)>" not in page.replace("&gt;", "")
    assert "&lt;script&gt;alert(&#34;x&#34;)&lt;/script&gt; &amp; &#34;quotes&#34;" in page
    assert "{{ 7 * 7 }}" in page
    assert "<i>name" not in page and "&lt;i&gt;name&lt;/i&gt;" in page
    stored = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, flags=re.DOTALL)
    assert stored is not None and NASTY in [sample["question"] for sample in json.loads(stored[1])["samples"]]
    lines = (study / "table.md").read_text().splitlines()
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in lines[:3]}) == 1
    said = [
        shape.text_frame.text
        for slide in Presentation(study / "deck.pptx").slides
        for shape in slide.shapes
        if shape.has_text_frame
    ]
    assert any('<script>alert("x")</script>' in text for text in said)


def test_the_page_asks_the_network_for_nothing_and_says_what_it_shows(eval_here: Eval) -> None:
    for selector in ("pooled", "shirg"):
        study = eval_here(f"selector={selector}", "limit=60").parent
    page = (study / "report.html").read_text()
    assert not re.search(r'(?:src|href)=(?!"(?:data:|#))', page)
    assert "@import" not in page and "url(" not in page
    assert page.count('<section class="sample"') == 8
    assert page.count("data:image/jpeg;base64,") == 8 * (1 + 2 + 1), (
        "the picture, what each kept, and what one ranked by"
    )
    assert page.count('alt="scores of shirg"') == 8 and 'alt="scores of pooled' not in page
    assert "Untrained model." in page and "Synthetic data." in page
    for title in ("fine sparse", "fine dense", "guard sparse", "guard dense", "fine vs pooled", "recall", "select ms"):
        assert f">{title}</button></th>" in page
    commands = {result_of(folder.parent)["command"].replace("'", "&#39;") for folder in study.glob("*/result.json")}
    assert all(command in page for command in commands)
    script = re.search(r"<script>(.*)</script>", page, flags=re.DOTALL)
    policy = re.search(r"script-src 'sha256-([^']+)'", page)
    assert script is not None and policy is not None
    assert base64.b64decode(policy[1]) == hashlib.sha256(script[1].encode()).digest()


def test_everything_can_be_written_again_from_the_files_alone(
    eval_here: Eval, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    study = eval_here("selector=random", "limit=5", "shots=0").parent
    eval_here("selector=norm_topk", "limit=5", "shots=0")
    publish(study)
    page, table = ((study / name).read_text() for name in ("report.html", "table.md"))
    for name in ("report.html", "table.md", "table.csv", "table.parquet"):
        (study / name).unlink()
    command = [sys.executable, "-m", "experiments.report", str(study)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert (study / "report.html").read_text() == page
    assert (study / "table.md").read_text() == table
    assert "report.html table.tex table.json figures deck.pptx" in done.stdout
    for folder, sentence in ((tmp_path / "absent", "no such folder"), (tmp_path, "holds no job")):
        with pytest.raises(SystemExit) as stop:
            rewrite([str(folder)])
        assert stop.value.code == 1
        (line,) = capfd.readouterr().err.splitlines()
        assert sentence in line


@pytest.mark.skipif(shutil.which("soffice") is None, reason="LibreOffice is not installed")
def test_the_deck_opens(eval_here: Eval, tmp_path: Path) -> None:
    """In another program than the one that wrote it: nine slides are nine pages."""
    for selector in ("pooled", "full", "shirg"):
        study = eval_here(f"selector={selector}", "limit=30", "shots=2").parent
    publish(study, files=True)
    profile = f"-env:UserInstallation={(tmp_path / 'profile').as_uri()}"
    command = ["soffice", profile, "--headless", "--convert-to", "pdf", "--outdir", str(tmp_path), study / "deck.pptx"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr
    pages = re.findall(rb"/Type\s*/Page\b", (tmp_path / "deck.pdf").read_bytes())
    assert len(pages) == 9


def test_what_stands_on_a_slide_stays_on_it(eval_here: Eval) -> None:
    """Every shape lies within its slide, and a picture above its caption begins where the caption does."""
    for selector in ("pooled", "full", "shirg"):
        study = eval_here(f"selector={selector}", "limit=30", "shots=2").parent
    publish(study, files=True)
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


def test_rows_over_a_part_stand_apart_and_are_in_no_figure(eval_here: Eval) -> None:
    for few in ((), ("limit=8",)):
        for selector in ("pooled", "random"):
            study = eval_here(f"selector={selector}", "data.n=24", "shots=0", *few).parent
    publish(study)
    page = (study / "report.html").read_text()
    whole, limited = re.findall(r"<tbody>(.*?)</tbody>", page.split('<table id="table"')[1], flags=re.DOTALL)[:2]
    assert whole.count("<tr data-equal") == limited.count("<tr data-equal") == 2
    assert "Limited to a part of the samples" in limited and "Limited to" not in whole
    assert " best" in whole and "best" not in limited
    figure = page.split('id="figure-latency"')[1].split("</div>")[0]
    assert figure.count(">random</text>") == 1


def test_jobs_of_a_study_show_the_same_samples(eval_here: Eval) -> None:
    shown = []
    for selector in ("full", "random"):
        job = eval_here(f"selector={selector}", "limit=60", "shots=5")
        shown.append([json.loads(path.read_text())["id"] for path in sorted((job / "shots").glob("*.json"))])
    assert shown[0] == shown[1]
    assert len(set(shown[0])) == 5


def test_tokens_of_a_picture_are_drawn_whoever_asked_about_it_first(eval_here: Eval) -> None:
    """SAINT looks at a picture once for all its questions, SHIRG once for each."""
    words = ("model=tiny", "device=cpu", "data.n=48", "batch_size=16", "shots=2")
    jobs = [eval_here(*words, f"selector={selector}") for selector in ("saint", "random", "shirg")]
    for number in range(MAPS):
        first, *others = (load_map(job / "shots" / MAP.format(number)) for job in jobs)
        assert all(np.array_equal(first.components_NC, other.components_NC) for other in others)
    (jobs[0] / "shots" / MAP.format(1)).unlink()
    figure = token_maps(jobs[0].parent, collect(jobs[0].parent))
    assert figure is not None
    axes = figure.figure.axes
    assert len(axes) == 5 and all(axis.collections for axis in axes), "a panel without tokens"


def test_curves_are_named_by_what_tells_them_apart(eval_here: Eval) -> None:
    for selector in ("random", "shirg"):
        for budget in ("20", "40"):
            job = eval_here(f"selector={selector}", f"budget={budget}", "data.n=24", "shots=0")
    figure = budget_curve(collect(job.parent))
    assert figure is not None
    assert [text.get_text() for text in figure.figure.legends[0].get_texts()] == ["random", "shirg"]


def test_shots_take_kinds_of_question_in_turn_and_new_pictures_first() -> None:
    samples = [
        Sample(
            id=f"{picture}-{kind}",
            dataset="d",
            split="test",
            load_image=lambda: Image.new("RGB", (1, 1)),
            size=None,
            question="?",
            prompt="?",
            answers=("a",),
            subtask=kind,
            meta={"picture": picture},
        )
        for picture in "abc"
        for kind in ("digit", "letter")
    ]
    assert pick_examples(samples, 4) == {"a-digit": 0, "b-letter": 1, "c-digit": 2, "a-letter": 3}
    assert len(pick_examples(samples, 20)) == 6


def test_overlay_lights_what_was_kept() -> None:
    """White, 4 x 4 cells: a fine token, one four times as large, a scaffold over the last quarter."""
    white = Image.new("RGB", (64, 64), (255, 255, 255))
    boxes = [(0, 0, 0.25, 0.25), (0.5, 0, 1, 0.5), (0.5, 0.5, 1, 1), (1, 0, 1, 1)]
    sources = [Source.KEPT, Source.MERGED, Source.SCAFFOLD, Source.NEWLINE]
    drawn = np.asarray(overlay(white, boxes, sources, longest=64)).astype(int)
    assert drawn.shape == (64, 64, 3)
    assert drawn[8, 8].tolist() == [255] * 3
    assert drawn[16, 48].tolist() == [int(255 * (COARSE + (1 - COARSE) * 0.5))] * 3
    assert drawn[48, 8].tolist() == drawn[48, 48].tolist() == [int(255 * DARK)] * 3
    assert drawn[32, 40].tolist() == list(SCAFFOLD_COLOUR)
    assert drawn[63, 63].tolist() == list(SCAFFOLD_COLOUR)
    # The border between kept and dropped is drawn, whatever the picture's own colour is there.
    black = np.asarray(overlay(Image.new("RGB", (64, 64)), boxes[:1], sources[:1], longest=64)).astype(int)
    assert black[8, 16].tolist() == [int(0.6 * c) for c in EDGE_COLOUR]
    assert black[8, 8].tolist() == black[40, 40].tolist() == [0, 0, 0]


def test_overlay_outlines_the_evidence_and_scales() -> None:
    drawn = overlay(Image.new("RGB", (30, 60)), [], [], targets=[(0.5, 0.5, 0.75, 0.75)], longest=120)
    assert drawn.size == (60, 120)
    pixels = np.asarray(drawn)
    assert pixels[58, 30].tolist() == list(TARGET_COLOUR)
    assert pixels[62, 32].tolist() == [0, 0, 0]


@pytest.mark.parametrize("size", [(1, 900), (900, 1), (1, 1)])
def test_overlay_survives_odd_pictures(size: tuple[int, int]) -> None:
    drawn = overlay(Image.new("RGB", size), [(0, 0, 1, 1), (0.999, 0.999, 1.2, 1.2)], [Source.KEPT] * 2)
    assert max(drawn.size) == 448 and min(drawn.size) >= 1

"""What kept tokens show, against the scene cell by cell; the command."""

from pathlib import Path

import pytest

from experiments.data.synthetic.glyphs import draw_scene
from experiments.data.synthetic.glyphs.scene import CHARS, COLOURS, GRID
from experiments.report.kept_glyphs import KINDS, kinds_of, main, table_of
from tests.experiments.conftest import Here, rows_of


def test_kinds_against_the_scene() -> None:
    scene = draw_scene(0, "val", 0, "hard")
    shown = kinds_of(scene, "digit", "red")
    assert len(shown) == GRID * GRID and shown.count("evidence") == 1 and set(shown) <= set(KINDS)
    for cell, kind in enumerate(shown):
        char, colour = CHARS[scene.char_RC.flat[cell]], COLOURS[scene.colour_RC.flat[cell]]
        if kind == "evidence":
            assert char.isdigit() and colour == "red"
        elif kind == "same word":
            assert char and colour == "red" and not char.isdigit()
        elif kind == "same sort":
            assert char.isdigit() and colour != "red"
        else:
            assert (kind == "empty") == (char == "")
    letters = kinds_of(scene, "letter", "C")
    assert letters.count("evidence") == 1 and "same word" not in letters, "an asked letter is there once"


def test_pictures_that_were_drawn_for_their_letters_are_counted(eval_here: Here) -> None:
    only = ["data.only=[red,K]", "data.tasks=[digit,letter]", "data.qa_per_image=2"]
    job = eval_here("selector=full", "data.n=8", "data.density=hard", *only)
    (row,) = table_of(job.parent).to_dict("records")
    assert row["density"] == "hard" and row["evidence"] == 1.0


def test_a_study_is_counted(eval_here: Here, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    jobs = [eval_here(f"selector={name}", "data.n=12", "data.density=sparse") for name in ("full", "random", "pooled")]
    study = jobs[0].parent
    found = table_of(study).set_index("system")
    full = found.loc["full"]
    assert full["evidence"] == 1.0 and full[list(KINDS)].sum() == GRID * GRID
    kept = [row["kept"] for row in rows_of(jobs[1]) if row["group"] == "fine"]
    tiles = sum(sum(token >= 64 for token in tokens) for tokens in kept) / len(kept)
    assert found.loc["random"][list(KINDS)].sum() == pytest.approx(tiles)
    assert found.loc["pooled"][list(KINDS)].sum() == 0
    capsys.readouterr()
    main([str(study)])
    assert capsys.readouterr().out.splitlines()[0].startswith("| system")
    with pytest.raises(SystemExit) as ended:
        main([str(tmp_path / "nothing")])
    assert ended.value.code == 1

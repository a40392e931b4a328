"""The command `experiments.report.overlay`: one's own picture, several selectors, one sentence for bad input."""

from pathlib import Path

import pytest
from PIL import Image

from experiments.report.overlay import main, parse_boxes


def test_the_command_draws(tiny_weights: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    Image.effect_noise((90, 60), 60).convert("RGB").save(tmp_path / "my picture.png")
    model = ["model=tiny", f"model.path={tiny_weights}"]
    arguments = [f"image={tmp_path / 'my picture.png'}", "question=what's {this}, 5=5?", "selector=shirg,full,random"]
    out = tmp_path / "deep" / "panels.png"
    main([*arguments, *model, "boxes=[[0.1,0.1,0.4,0.3]]", f"out={out}", "budget=70"])
    assert capfd.readouterr().out.strip() == str(out)
    with Image.open(out) as drawn:
        assert drawn.width == 14 + 4 * (448 + 14)


@pytest.mark.parametrize("text", ["[[0, 0, 2, 1]]", "[[0.5, 0, 0.5, 1]]", "3", "[[0,0,1,null]]"])
def test_boxes_lie_in_the_picture(text: str) -> None:
    with pytest.raises(ValueError, match="boxes="):
        parse_boxes(text)


def test_help_is_the_usage(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    assert "question=TEXT" in capfd.readouterr().out

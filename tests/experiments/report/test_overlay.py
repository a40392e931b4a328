"""Overlays of one's own pictures: the right counts, the heat at the right place, one sentence for bad input."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from experiments.report.overlay import main, parse_boxes
from experiments.token_stats import TokenGeometry
from experiments.viz.kept_tokens import COLD_TO_HOT, PanelChoice, describe, draw_panels, heat_map
from lavida_adapter import LavidaConfig, VisionConfig
from shirg import Selection, Source

TOY = LavidaConfig(vision=VisionConfig(16, 32, 2, 2, 64, 8), image_grid_pinpoints=((128, 128),))
WHITE = Image.new("RGB", (128, 128), (255, 255, 255))


def chosen(index: list[int], scores: torch.Tensor | None = None) -> Selection:
    """Tokens of the toy layout: a quarter of the picture as scaffold, then these."""
    box_N4 = TokenGeometry(TOY)((128, 128)).box_N4
    boxes = torch.cat([torch.tensor([[0.5, 0.5, 1.0, 1.0]]), box_N4[index]])
    source = [int(Source.SCAFFOLD)] + [int(Source.KEPT)] * len(index)
    return Selection(
        tokens_BTD=torch.zeros(1, len(source), 4),
        index_BT=torch.tensor([[-1, *index]]),
        source_BT=torch.tensor([source]),
        box_BT4=boxes[None],
        mask_BT=torch.ones(1, len(source), dtype=torch.bool),
        scores_BN=scores,
    )


def test_counts_and_retention() -> None:
    geometry = TokenGeometry(TOY)
    # The target is the top left tile's first 2 x 2 cells: tokens 64, 65, 72, 73.
    text = describe(PanelChoice("x", chosen([64, 65, 73, 200])), geometry, (128, 128), [(0, 0, 0.125, 0.125)])
    assert text == "x: 5 tokens (4 kept, 1 scaffold); 75% of the target's tokens kept"
    assert describe(PanelChoice("x", chosen([64])), geometry, (128, 128), []) == "x: 2 tokens (1 kept, 1 scaffold)"


def test_the_best_tile_is_hottest_where_it_sits() -> None:
    geometry = TokenGeometry(TOY)
    scores = torch.arange(320.0)
    scores[64 + 9] = 1000  # second row and column of the first tile: pixels 8 to 16
    scores[:64] = float("-inf")
    drawn = heat_map(WHITE, scores, geometry, longest=128)
    assert drawn is not None and drawn.size == (128, 128)
    pixels = np.asarray(drawn).astype(int)
    assert np.abs(pixels[12, 12] - (0.25 * 255 + 0.75 * COLD_TO_HOT[-1])).max() <= 1
    assert np.abs(pixels[2, 2] - (0.25 * 255 + 0.75 * COLD_TO_HOT[0])).max() <= 1
    assert heat_map(WHITE, torch.full((320,), float("nan")), geometry) is None


def test_a_sheet_has_a_column_for_each_selector_and_wraps() -> None:
    geometry, scored = TokenGeometry(TOY), torch.randn(1, 320)
    few = draw_panels(WHITE, "t", [PanelChoice("a", chosen([64], scored))], geometry, longest=240)
    many = draw_panels(WHITE, "t", [PanelChoice("a", chosen([64], scored))] * 5, geometry, longest=240)
    assert few.width == 14 + 2 * 254 and many.width == 14 + 3 * 254
    assert many.height > 1.8 * few.height


def test_a_sheet_leaves_little_empty() -> None:
    """Few places at its end, and no room for heat maps in a row of selectors that have none."""
    geometry, scored = TokenGeometry(TOY), torch.randn(1, 320)
    ranked, plain = PanelChoice("a", chosen([64], scored)), PanelChoice("b", chosen([64]))

    def size(*choices: PanelChoice) -> tuple[int, int]:
        return draw_panels(WHITE, "t", choices, geometry, longest=240).size

    across = [(size(*[ranked] * n)[0] - 14) // 254 for n in range(1, 11)]
    assert across == [2, 3, 4, 5, 3, 4, 4, 3, 5, 4]
    (_, all_ranked), (_, last_plain) = size(*[ranked] * 7), size(*[ranked] * 3, *[plain] * 4)
    assert all_ranked - last_plain == 240, "as high as one heat map; the words under it stay"


def test_the_command_draws(tiny_weights: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    Image.effect_noise((90, 60), 60).convert("RGB").save(tmp_path / "my picture.png")
    model = ["model=tiny", f"model.path={tiny_weights}"]
    arguments = [f"image={tmp_path / 'my picture.png'}", "question=what's {this}, 5=5?", "selector=shirg,full,random"]
    out = tmp_path / "deep" / "sheet.png"
    main([*arguments, *model, "boxes=[[0.1,0.1,0.4,0.3]]", f"out={out}", "budget=70"])
    assert capfd.readouterr().out.strip() == str(out)
    with Image.open(out) as drawn:
        assert drawn.width == 14 + 4 * (448 + 14)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["question=x"], "image has no value; give image=..."),
        (["image=IMAGE"], "question has no value; give question=..."),
        (["image=absent.png", "question=x"], "image=absent.png: there is no such file"),
        (["image=IMAGE", "question=x", "shirg"], "shirg: give key=value"),
        (
            ["image=IMAGE", "question=x", "selector=foo"],
            "selector=foo: there is no such option; choose one of",
        ),
        (["image=IMAGE", "question=x", "selector=random", "selector.foo=1"], "selector.foo: selector=random has no"),
        (["image=IMAGE", "question=x", "bugdet=3"], "bugdet: there is no such key"),
        (["image=IMAGE", "question=x", "boxes=[[1,2,3]]"], "boxes=[[1,2,3]]: give [[x0,y0,x1,y1],...]"),
        (["image=IMAGE", "question=x", "out=sheet.txt"], "out=sheet.txt: give a name that ends in .png"),
    ],
)
def test_bad_input_is_one_sentence(
    arguments: list[str], sentence: str, tmp_path: Path, tiny_weights: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    Image.new("RGB", (90, 60)).save(tmp_path / "picture.png")
    arguments = [argument.replace("IMAGE", str(tmp_path / "picture.png")) for argument in arguments]
    with pytest.raises(SystemExit) as stop:
        main([*arguments, "model=tiny", f"model.path={tiny_weights}"])
    assert stop.value.code == 1
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("error: ") and sentence in line


@pytest.mark.parametrize("text", ["[[0, 0, 2, 1]]", "[[0.5, 0, 0.5, 1]]", "3", "[[0,0,1,null]]"])
def test_boxes_lie_in_the_picture(text: str) -> None:
    with pytest.raises(ValueError, match="boxes="):
        parse_boxes(text)


def test_help_is_the_usage(capfd: pytest.CaptureFixture[str]) -> None:
    main(["--help"])
    assert "question=TEXT" in capfd.readouterr().out

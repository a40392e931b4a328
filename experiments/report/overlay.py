"""The command `python -m experiments.report.overlay`: one picture, one question, several selectors."""

import argparse
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.data.sample import Box
from experiments.errors import CommandParser, fail, one_sentence
from shirg import MissingFileError, UserError

USAGE = """Draws what each selector keeps: kept tokens bright, scaffold tokens outlined, scores as a heat map.

  image=FILE            the picture
  question=TEXT         what is asked; selectors that rank by relevance need it
  selector=shirg        options of the group selector, separated by commas
  boxes=[[x0,y0,x1,y1]] where the evidence is, in fractions of the picture; retention is then written beside the counts
  out=FILE.png          default outputs/overlay/IMAGE_SELECTORS.png
  model=small           and every other group or key of eval.py: budget=matched, relevance=none, device=cuda, ..."""

_OWN = ("image", "question", "selector", "boxes", "out")


def main(arguments: Sequence[str]) -> None:
    parser = CommandParser(
        prog="python -m experiments.report.overlay",
        usage="%(prog)s image=FILE question=TEXT [selector=a,b,...] [key=value ...]",
        description=USAGE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("words", nargs="*", metavar="key=value", help=argparse.SUPPRESS)
    own, overrides = _split(parser.parse_args(arguments).words)
    selectors = [name for name in own.get("selector", "shirg").split(",") if name]
    with one_sentence():
        print(draw(own, selectors, overrides))


def _split(words: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """Our own keys, taken literally so that a question may hold any character, and the overrides for eval's config."""
    for word in words:
        if "=" not in word:
            fail(f"{word}: give key=value; the keys are {', '.join(_OWN)} and those of eval.py")
    given = dict(word.split("=", 1) for word in words)
    own = {key: given[key] for key in _OWN if key in given}
    for key in ("image", "question"):
        if not own.get(key):
            fail(f"{key} has no value; give {key}=...")
    return own, [word for word in words if word.split("=", 1)[0] not in _OWN]


def draw(own: dict[str, str], selectors: Sequence[str], overrides: Sequence[str]) -> Path:
    """Draws the panels into a file and returns its path."""
    boxes = parse_boxes(own.get("boxes", "[]"))
    path = Path(own["image"])
    if not path.is_file():
        raise MissingFileError(f"image={path}: there is no such file")
    import torch

    from experiments import build, profiling
    from experiments.data.image_io import load_picture
    from experiments.token_stats import TokenGeometry
    from experiments.viz.kept_tokens import PanelChoice, draw_panels

    configs = [build.compose_eval("model=small", *overrides, f"selector={name}") for name in selectors]
    image = load_picture(path)
    cfg = configs[0]
    device = profiling.resolve_device(cfg.device)
    if cfg.threads is not None:
        torch.set_num_threads(cfg.threads)
    model = build.build_model(cfg, device)
    built = [build.build_selector(c, model.config.budgets, model.config).to(device).eval() for c in configs]
    build.adapt(cfg.adapter, model, built[0])
    choices = []
    with torch.inference_mode():
        for name, config, selector in zip(selectors, configs, built, strict=True):
            relevance = build.build_relevance(config, selector, model, cfg.adapter)
            prefix = model.encode([image], [own["question"]], selector, relevance=relevance, ids=[path.name])
            choices.append(PanelChoice(name, prefix.selections[0]))
    weights = "" if model.config.trained else " | random weights: relevance carries no information"
    title = f"{path.name}, {image.width} x {image.height} | {own['question']}{weights}"
    drawn = draw_panels(image, title, choices, TokenGeometry(model.config), boxes=boxes)
    name = re.sub(r"[^\w.-]+", "-", f"{path.stem}_{'_'.join(selectors)}")
    out = Path(own.get("out") or Path("outputs") / "overlay" / f"{name}.png")
    if out.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
        raise UserError(f"out={out}: give a name that ends in .png, .jpg or .webp")
    out.parent.mkdir(parents=True, exist_ok=True)
    drawn.save(out)
    return out


def parse_boxes(text: str) -> tuple[Box, ...]:
    """Boxes from "[[x0, y0, x1, y1], ...]"; raises ValueError unless each lies in the picture."""
    try:
        given: Any = json.loads(text)
        boxes = tuple((float(x0), float(y0), float(x1), float(y1)) for x0, y0, x1, y1 in given)
    except (ValueError, TypeError):
        raise UserError(f"boxes={text}: give [[x0,y0,x1,y1],...] as fractions of the picture") from None
    for x0, y0, x1, y1 in boxes:
        if not (0 <= x0 < x1 <= 1 and 0 <= y0 < y1 <= 1):
            raise UserError(f"boxes={text}: each needs 0 <= x0 < x1 <= 1 and 0 <= y0 < y1 <= 1")
    return boxes


if __name__ == "__main__":
    main(sys.argv[1:])

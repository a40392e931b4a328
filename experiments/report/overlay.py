"""The command behind `python -m experiments.report.overlay`: one picture, one question, several selectors."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from experiments.data.sample import Box
from experiments.errors import explain, fail, is_user_error
from experiments.schema import CONF, VERSION_BASE
from shirg import MissingFileError, UserError

USAGE = """python -m experiments.report.overlay image=FILE question=TEXT [selector=a,b,...] [key=value ...]

Draws what each selector keeps of a picture: kept tokens bright at their place, scaffold outlined, scores as a heat map.

  image=FILE            the picture
  question=TEXT         what is asked; selectors that rank by relevance need it
  selector=shirg        options of the group selector, separated by commas
  boxes=[[x0,y0,x1,y1]] where the evidence is, in fractions of the picture; retention is then written beside the counts
  out=FILE.png          default outputs/overlay/IMAGE_SELECTORS.png
  model=small           and every other group or key of eval.py: budget=matched, relevance=none, device=cuda, ..."""

_OWN = ("image", "question", "selector", "boxes", "out")


def main(arguments: list[str]) -> None:
    if not arguments or any(argument in ("-h", "--help") for argument in arguments):
        print(USAGE)
        return
    own, rest = _split(arguments)
    selectors = [name for name in own.get("selector", "shirg").split(",") if name]
    try:
        print(draw(own, selectors, rest))
    except (HydraException, OmegaConfBaseException) as error:
        fail(explain(error, "eval", [f"selector={','.join(selectors)}", *rest]))
    except (ValueError, OSError) as error:
        if not is_user_error(error):
            raise
        fail(str(error))


def _split(arguments: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """Our own keys, taken literally so that a question may hold any character, and the overrides for eval's config."""
    own: dict[str, str] = {}
    rest: list[str] = []
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if not equals:
            fail(f"{argument}: give key=value; the keys are {', '.join(_OWN)} and those of eval.py")
        if key in _OWN:
            own[key] = value
        else:
            rest.append(argument)
    for key in ("image", "question"):
        if not own.get(key):
            fail(f"{key} has no value; give {key}=...")
    return own, rest


def draw(own: dict[str, str], selectors: Sequence[str], overrides: Sequence[str]) -> Path:
    """Draws the sheet and returns where it lies."""
    boxes = parse_boxes(own.get("boxes", "[]"))
    path = Path(own["image"])
    if not path.is_file():
        raise MissingFileError(f"image={path}: there is no such file")
    configs = [_config(name, overrides) for name in selectors]

    import torch

    from experiments import build, profiling
    from experiments.data.image_io import load_picture
    from experiments.token_stats import TokenGeometry
    from experiments.viz.kept_tokens import PanelChoice, draw_panels

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
            relevance = build.build_relevance(config, selector)
            prefix = model.encode([image], [own["question"]], selector, relevance=relevance, ids=[path.name])
            choices.append(PanelChoice(name, prefix.selections[0]))
    weights = "" if model.config.trained else " | random weights: relevance means nothing"
    title = f"{path.name}, {image.width} x {image.height} | {own['question']}{weights}"
    drawn = draw_panels(image, title, choices, TokenGeometry(model.config), boxes=boxes)
    name = re.sub(r"[^\w.-]+", "-", f"{path.stem}_{'_'.join(selectors)}")
    out = Path(own.get("out") or Path("outputs") / "overlay" / f"{name}.png")
    if out.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
        raise UserError(f"out={out}: give a name that ends in .png, .jpg or .webp")
    out.parent.mkdir(parents=True, exist_ok=True)
    drawn.save(out)
    return out


def _config(selector: str, overrides: Sequence[str]) -> DictConfig:
    with initialize_config_dir(str(CONF), version_base=VERSION_BASE):
        cfg = compose("eval", overrides=["model=small", *overrides, f"selector={selector}"])
    assert isinstance(cfg, DictConfig)
    OmegaConf.set_struct(cfg, True)
    return cfg


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

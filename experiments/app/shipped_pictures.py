"""Pictures to begin with: one from each synthetic dataset, drawn when the page is made. Nothing is downloaded."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from omegaconf import OmegaConf
from PIL import Image

from experiments import build
from experiments.app.picture_question import ANSWER_ONLY
from experiments.data.sample import Box
from experiments.schema import CONF

SHIPPED: dict[str, tuple[str, dict[str, Any]]] = {
    "few": ("synth_glyphs", {"density": ["sparse"]}),
    "many": ("synth_glyphs", {"density": ["dense"]}),
    "hard": ("synth_glyphs", {"density": ["hard"]}),
    "shape": ("synth_glyphs", {"density": ["dense"], "tasks": ["shape"], "qa_per_image": 1}),
    "shapes": ("synth_shapes", {}),
    "chart": ("synth_chart", {}),
    "page": ("synth_doc", {}),
    "board": ("synth_grid", {}),
}
"""Captions; the dataset whose first sample is shown, and options of it."""


@dataclass(frozen=True)
class ShippedPicture:
    """A picture with a question about it."""

    caption: str
    image: Image.Image
    question: str
    answer: str
    boxes: tuple[Box, ...]
    """Where the answer is, in fractions of the picture."""
    longest: int
    """Tokens of the longest answer in its dataset."""


def shipped_pictures() -> list[ShippedPicture]:
    """All of them, in the order of `SHIPPED`."""
    return [_draw(caption, name, options) for caption, (name, options) in SHIPPED.items()]


def _draw(caption: str, name: str, changed: Mapping[str, Any]) -> ShippedPicture:
    # Only the group's own file: composing all of eval.py's config eight times takes longer than the rest of the page.
    spec = OmegaConf.merge(OmegaConf.load(CONF / "data" / f"{name}.yaml"), changed)
    dataset = build.build_dataset(OmegaConf.create({"data": spec}))
    sample = dataset[0]
    return ShippedPicture(
        caption=caption,
        image=sample.load_image(),
        question=sample.question,
        answer=sample.answers[0],
        boxes=sample.boxes,
        longest=dataset.max_new_tokens,
    )


def suffix_for(model: str) -> str:
    """What to put behind a question: the tiny models were trained on bare questions."""
    return "" if model.startswith("tiny") else ANSWER_ONLY


def options(group: str) -> list[str]:
    """The options of a config group, without those that need a file of the user's or a text with gaps."""
    names = [path.stem for path in sorted((CONF / group).glob("*.yaml"))]
    return [name for name in names if name not in ("external", "infill", "lavida_fim")]


def models_offered() -> list[str]:
    """The models that a page offers: small ones first, none that are for benchmarks or a beginning of a training."""
    names = [name for name in options("model") if not name.startswith("bench") and not name.endswith("scratch")]
    return sorted(names, key=lambda name: (name.startswith("lavida"), not name.startswith("tiny"), name))

"""Glyph pictures: small digits and letters in tight clusters, and one big shape."""

from experiments.data.synthetic.glyphs.dataset import SynthGlyphs
from experiments.data.synthetic.glyphs.lookup import Lookups, draw_lookups
from experiments.data.synthetic.glyphs.questions import Question, ask, questions
from experiments.data.synthetic.glyphs.render import Labels, labels, render, to_image
from experiments.data.synthetic.glyphs.scene import BigShape, Scene, draw_patchwork, draw_scene

__all__ = [
    "BigShape",
    "Labels",
    "Lookups",
    "Question",
    "Scene",
    "SynthGlyphs",
    "ask",
    "draw_lookups",
    "draw_patchwork",
    "draw_scene",
    "labels",
    "questions",
    "render",
    "to_image",
]

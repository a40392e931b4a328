"""Glyph pictures: small digits and letters in tight clusters, and one big shape."""

from experiments.data.synthetic.glyphs.glyph_dataset import SynthGlyphs
from experiments.data.synthetic.glyphs.list_dataset import SynthList
from experiments.data.synthetic.glyphs.questions import GlyphQuestion, Lookups, ask, draw_lookups, questions
from experiments.data.synthetic.glyphs.render import Labels, labels, render, to_image
from experiments.data.synthetic.glyphs.scene import BigShape, GlyphScene, draw_patchwork, draw_scene

__all__ = [
    "BigShape",
    "GlyphQuestion",
    "GlyphScene",
    "Labels",
    "Lookups",
    "SynthGlyphs",
    "SynthList",
    "ask",
    "draw_lookups",
    "draw_patchwork",
    "draw_scene",
    "labels",
    "questions",
    "render",
    "to_image",
]

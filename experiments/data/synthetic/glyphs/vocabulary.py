"""Every word, letter and colour of the glyph task; the tokenizer, the renderer and the tests read them from here.

Ids start at 1; 0 means "none" in every table and every label.
"""

DIGITS = tuple("0123456789")
LETTERS = tuple("ACDEFHJKLMNPRTUVWXYZ")
"""Letters that questions ask for."""
FOILS = tuple("BGIOQSabdeghnqrt")
"""Letters that are only ever drawn, to crowd the hard pictures; nobody asks for them and no label names them."""
CHARS = ("", *DIGITS, *LETTERS, *FOILS)
"""By char id."""

FIRST_DIGIT = 1
FIRST_LETTER = FIRST_DIGIT + len(DIGITS)
FIRST_FOIL = FIRST_LETTER + len(LETTERS)
"""Char ids below this one are the labelled glyphs."""

COLOUR_RGB = {
    "red": (0.92, 0.13, 0.13),
    "green": (0.13, 0.78, 0.20),
    "blue": (0.25, 0.36, 1.00),
    "yellow": (0.96, 0.90, 0.15),
    "cyan": (0.15, 0.85, 0.90),
    "magenta": (0.90, 0.25, 0.85),
    "orange": (1.00, 0.52, 0.08),
    "white": (1.00, 1.00, 1.00),
}
COLOURS = ("", *COLOUR_RGB)
"""By colour id; 0 is gray where there is a glyph and nothing where there is none."""
SHAPES = ("", "square", "circle", "triangle")
"""By shape id."""

TASKS = ("digit", "letter", "shape")
"""First word of a question, as in "digit red" -> "7", "letter K" -> "blue", "shape kind" -> "circle"."""
ASPECTS = ("kind", "colour")
"""Second word of a question about the shape."""
FINE = frozenset({"digit", "letter"})
"""Subtasks whose evidence is one cell; the others ("shape_kind", "shape_colour") guard against regressions."""

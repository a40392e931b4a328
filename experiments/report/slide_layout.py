"""The layout of slides: a title, a few points, and one graphic that takes the rest. `slides.py` fills them.

Lengths are in inches, sizes of type in points.
"""

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from pptx import Presentation
from pptx.dml.color import RGBColor
from pptx.enum.text import MSO_ANCHOR, PP_ALIGN
from pptx.util import Inches, Pt

from experiments.atomic_files import write_atomic
from experiments.report.figure_style import INK, SOFT
from shirg import UserError

WIDTH, HEIGHT, MARGIN, GAP = 13.333, 7.5, 0.6, 0.3
MOST_POINTS = 3
TITLE_SIZE, POINT_SIZE, APART = 28, 18, 8
LARGE_POINT_SIZE, LARGE_APART = 22, 20
"""Of points that have a column for themselves."""
CLEARLY = 1.15
TALLEST_POINTS = 0.4
"""Share of a slide's height that points above a graphic take at most."""
SMALLEST = 9
WIDEST_BESIDE = 0.64
"""Share of a slide's width that a graphic beside the points takes at most."""
LINE = 1.2 / 72
"""Height of a line, for each point of its size."""
FONT = "Arial"
_LETTERS = {
    0.23: "ijl'",
    0.29: "ftI .,:;!/\\[]|",
    0.36: 'r(){}-`"',
    0.5: "ckJsvxyz*^",
    0.62: "FTZ+=<>~\u2212",
    0.73: "ABEKPSVXYwCDHNRU&",
    0.8: "GOQ",
    0.9: "mM%",
    1.03: "W@",
}
"""Widths of letters of Arial, rounded up, for a size of 1; all others are 0.56 wide, or 1 beyond Latin ones."""
_WIDTHS = {letter: width for width, letters in _LETTERS.items() for letter in letters}
BOLD = 1.08
"""How much wider bold letters are."""


class Area(NamedTuple):
    """A part of a slide."""

    left: float
    top: float
    width: float
    height: float

    def fit(self, aspect: float) -> "Area":
        """The largest area with this ratio of width to height, in the middle of this one."""
        width = min(self.width, aspect * self.height)
        height = width / aspect
        return Area(self.left + (self.width - width) / 2, self.top + (self.height - height) / 2, width, height)


BODY = Area(MARGIN, 1.3, WIDTH - 2 * MARGIN, 5.55)
"""Between the title and the footer."""
FOOT = 7.0


class Graphic(Protocol):
    """What a slide shows besides its points."""

    @property
    def aspect(self) -> float | None:
        """Ratio of width to height; None for what takes any shape."""
        ...

    def draw(self, slide: "Slide", area: Area) -> None: ...


class Slides:
    """A presentation to which slides are added."""

    def __init__(self, footer: str) -> None:
        self._presentation: Any = Presentation()
        self._presentation.slide_width, self._presentation.slide_height = Inches(WIDTH), Inches(HEIGHT)
        self._footer = footer

    def begin(self, title: str, lines: Sequence[str], picture: bytes | None) -> None:
        """The first slide: what the study is, with a picture of it where there is one."""
        page = self._presentation.slides.add_slide(self._presentation.slide_layouts[0])
        slide = Slide(page)
        side = 5.3
        width = BODY.width - (side + 2 * GAP if picture else 0)
        heading, text = page.placeholders
        slide.fill(heading, title, Area(MARGIN, 1.1, width, 1.6), size=40, bold=True, anchor=MSO_ANCHOR.BOTTOM)
        slide.fill(text, "\n".join(lines), Area(MARGIN, 2.9, width, 3.5), size=20, colour=SOFT, apart=10)
        if picture:
            slide.picture(picture, Area(WIDTH - MARGIN - side, 1.1, side, side))

    def add(self, title: str, points: Sequence[str], graphic: Graphic, notes: str = "") -> None:
        if len(points) > MOST_POINTS:
            raise UserError(f"slide {title!r} has {len(points)} points; {MOST_POINTS} is the limit")
        page = self._presentation.slides.add_slide(self._presentation.slide_layouts[5])
        slide = Slide(page)
        heading = Area(MARGIN, 0.4, BODY.width, 0.75)
        slide.fill(page.shapes.title, title, heading, size=TITLE_SIZE, bold=True, anchor=MSO_ANCHOR.MIDDLE)
        beside, of_points, of_graphic = arrange(points, graphic.aspect)
        text = "\n".join(points)
        if beside:
            slide.text(text, of_points, size=LARGE_POINT_SIZE, apart=LARGE_APART, anchor=MSO_ANCHOR.MIDDLE)
        else:
            slide.text(text, of_points, size=POINT_SIZE, apart=APART)
        graphic.draw(slide, of_graphic)
        number = len(self._presentation.slides)
        slide.text(self._footer, Area(MARGIN, FOOT, BODY.width - 1, 0.3), size=11, colour=SOFT)
        corner = Area(WIDTH - MARGIN - 0.8, FOOT, 0.8, 0.3)
        slide.text(str(number), corner, size=11, colour=SOFT, align=PP_ALIGN.RIGHT)
        if notes:
            page.notes_slide.notes_text_frame.text = notes

    def save(self, path: Path) -> Path:
        buffer = io.BytesIO()
        self._presentation.save(buffer)
        write_atomic(path, buffer.getvalue())
        return path


def arrange(points: Sequence[str], aspect: float | None) -> tuple[bool, Area, Area]:
    """Whether the graphic is beside its points, the area of the points and that of the graphic.

    It is below them, unless it becomes clearly larger beside them.
    """
    tall = min(text_height("\n".join(points), BODY.width, POINT_SIZE, APART), TALLEST_POINTS * BODY.height)
    above = Area(BODY.left, BODY.top, BODY.width, tall)
    below = Area(BODY.left, BODY.top + tall + GAP, BODY.width, BODY.height - tall - GAP)
    if aspect is None:
        return False, above, below
    wide = min(WIDEST_BESIDE * BODY.width, aspect * BODY.height)
    left = Area(BODY.left, BODY.top, BODY.width - wide - 2 * GAP, BODY.height)
    right = Area(BODY.left + BODY.width - wide, BODY.top, wide, BODY.height)
    if right.fit(aspect).width > CLEARLY * below.fit(aspect).width:
        return True, left, right
    return False, above, below


def text_width(text: str, size: float, *, bold: bool = False) -> float:
    """Width of a line."""
    letters = sum(_WIDTHS.get(letter, 0.56 if ord(letter) < ord("\u0250") else 1.0) for letter in text)
    return letters * size / 72 * (BOLD if bold else 1.0)


def n_lines(text: str, width: float, size: float, *, bold: bool = False) -> int:
    """Lines that the text takes in this width; a word that is wider is broken."""
    n, space = 0, text_width(" ", size)
    for paragraph in text.split("\n"):
        n, end = n + 1, 0.0
        for word in paragraph.split(" "):
            wide = text_width(word, size, bold=bold)
            if end and end + wide > width:
                n, end = n + 1, 0.0
            n += max(0, math.ceil(wide / width) - 1)
            end += wide + space
    return n


def text_height(text: str, width: float, size: float, apart: float = 0, *, bold: bool = False) -> float:
    """Height of a text whose paragraphs are `apart` points from each other."""
    return n_lines(text, width, size, bold=bold) * size * LINE + apart / 72 * text.count("\n")


def fitting_size(text: str, area: Area, largest: float, apart: float = 0, *, bold: bool = False) -> float:
    """The largest size, up to `largest`, at which the text stays in its area."""
    size = largest
    while size > SMALLEST and text_height(text, area.width, size, apart * size / largest, bold=bold) > area.height:
        size -= 1
    return size


class Slide:
    """One slide; what is written on it becomes smaller where it would leave its area."""

    def __init__(self, page: Any) -> None:
        self.shapes: Any = page.shapes

    def text(self, text: str, area: Area, **style: Any) -> None:
        """A text box; `fill` has the style."""
        self.fill(self.shapes.add_textbox(0, 0, 0, 0), text, area, **style)

    def fill(
        self,
        shape: Any,
        text: str,
        area: Area,
        *,
        size: float,
        colour: str = INK,
        bold: bool = False,
        align: Any = PP_ALIGN.LEFT,
        anchor: Any = MSO_ANCHOR.TOP,
        apart: float = 0,
    ) -> None:
        """Puts a shape in its place and writes into it; each line is a paragraph, `apart` points from the next."""
        shape.left, shape.top, shape.width, shape.height = map(Inches, area)
        frame = shape.text_frame
        frame.word_wrap = True
        frame.margin_left = frame.margin_right = frame.margin_top = frame.margin_bottom = 0
        frame.vertical_anchor = anchor
        fitting = fitting_size(text, area, size, apart, bold=bold)
        lines = [(line, fitting, colour, bold) for line in text.split("\n")]
        write(frame, lines, align=align, apart=apart * fitting / size)

    def picture(self, image: bytes, area: Area) -> None:
        """A picture as large as the area, which should have its ratio of width to height."""
        self.shapes.add_picture(io.BytesIO(image), *map(Inches, area))


def write(
    frame: Any,
    lines: Sequence[tuple[str, float, str, bool]],
    *,
    align: Any = PP_ALIGN.LEFT,
    apart: float = 0,
) -> None:
    """Writes paragraphs, each a text with its size, its colour and whether it is bold."""
    for number, (text, size, colour, bold) in enumerate(lines):
        paragraph = frame.paragraphs[0] if number == 0 else frame.add_paragraph()
        paragraph.alignment = align
        paragraph.space_before = Pt(apart if number else 0)
        run = paragraph.add_run()
        run.text = text
        run.font.size, run.font.bold, run.font.name = Pt(size), bold, FONT
        run.font.color.rgb = rgb(colour)


def rgb(colour: str) -> RGBColor:
    return RGBColor.from_string(colour.removeprefix("#").upper())

"""What slides show besides their points: pictures, a table, the steps of a method."""

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from PIL import Image
from pptx.enum.shapes import MSO_SHAPE
from pptx.enum.text import MSO_ANCHOR, PP_ALIGN
from pptx.util import Inches

from experiments.report.figure_style import ACCENT, GRID, INK, SOFT
from experiments.report.slide_layout import (
    BODY,
    GAP,
    LINE,
    SMALLEST,
    Area,
    Slide,
    fitting_size,
    n_lines,
    rgb,
    text_height,
    text_width,
    write,
)

CAPTION_SIZE = 14
CELL_SIZE, SECOND = 20, 0.8
"""Largest size of type in a table, and the share of it that the lines below the first of a cell have."""
PADDING = 0.07
"""On the left and the right of a cell; half of it above and below."""
NAME_LETTERS = 30
"""Letters of a line in the first column of a table; the other columns are never broken."""
FEW_ROWS = 2
MOST_STRETCH = 2.2
"""By how much the rows of a short table may be higher than their text."""
STEP_SIZE, TALLEST_STEP = 16, 3.2


@dataclass(frozen=True)
class Pictures:
    """Pictures side by side, equally high; with captions, equally wide, each above its caption."""

    images: Sequence[bytes]
    captions: Sequence[str] = ()

    @cached_property
    def aspects(self) -> list[float]:
        sizes = [Image.open(io.BytesIO(image)).size for image in self.images]
        return [width / height for width, height in sizes]

    @property
    def aspect(self) -> float | None:
        return None if self.captions else sum(self.aspects)

    def draw(self, slide: Slide, area: Area) -> None:
        if self.captions:
            self._draw_captioned(slide, area)
            return
        gaps = GAP * (len(self.images) - 1)
        left, top, width, height = Area(area.left, area.top, area.width - gaps, area.height).fit(sum(self.aspects))
        for image, aspect in zip(self.images, self.aspects, strict=True):
            slide.picture(image, Area(left, top, aspect * height, height))
            left += aspect * height + GAP

    def _draw_captioned(self, slide: Slide, area: Area) -> None:
        """In the middle of the area, all columns as wide as the widest picture."""
        n = len(self.images)
        widest = (area.width - GAP * (n - 1)) / n
        # Captions become narrower with the pictures, and then higher: a line more than in the widest columns.
        tall = max(text_height(f"{caption}\n", widest, CAPTION_SIZE) for caption in self.captions)
        most = area.height - tall - GAP / 3
        each = min(widest, max(self.aspects) * most)
        high = min(most, max(each / aspect for aspect in self.aspects))
        left = area.left + (area.width - n * each - GAP * (n - 1)) / 2
        for image, aspect, caption in zip(self.images, self.aspects, self.captions, strict=True):
            width = min(each, aspect * high)
            slide.picture(image, Area(left, area.top + high - width / aspect, width, width / aspect))
            slide.text(caption, Area(left, area.top + high + GAP / 3, each, tall), size=CAPTION_SIZE)
            left += each + GAP


@dataclass(frozen=True)
class SlideTable:
    """A plain table; the lines of a cell below its first are smaller, and the rows numbered in `bold` stand out."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    bold: Sequence[int] = ()
    aspect = None

    def narrowed(self) -> "SlideTable":
        """Without the last columns that a slide has no room for."""
        table = self
        while len(table.head) > 2 and sum(table.widths(SMALLEST)) > BODY.width:
            table = replace(table, head=table.head[:-1], rows=[row[:-1] for row in table.rows])
        return table

    def turned(self) -> "SlideTable":
        """With rows as columns, and each cell in one line, where there are too few rows to fill a slide."""
        if len(self.rows) > FEW_ROWS:
            return self
        head = [self.head[0], *(row[0] for row in self.rows)]
        columns = list(zip(self.head, *self.rows, strict=True))[1:]
        return SlideTable(head, [[cell.replace("\n", " ") for cell in column] for column in columns])

    def widths(self, size: float) -> list[float]:
        """The least width of each column. Headings may break between words, cells may not."""
        longest_name = text_width("n" * NAME_LETTERS, size)
        found = []
        for j, title in enumerate(self.head):
            texts = [text_width(word, size, bold=True) for word in title.split()]
            for i, row in enumerate(self.rows):
                first, *more = row[j].split("\n")
                texts += [text_width(first, size, bold=i in self.bold)]
                texts += [text_width(line, SECOND * size) for line in more]
            found.append(2 * PADDING + (max(texts) if j else min(longest_name, max(texts))))
        return found

    def heights(self, size: float, widths: Sequence[float]) -> list[float]:
        """The least height of each row, the heading first."""
        return [
            PADDING + size * LINE * max(_lines(text, width, size) for text, width in zip(row, widths, strict=True))
            for row in (self.head, *self.rows)
        ]

    def is_numeric(self, column: int) -> bool:
        """Whether all cells of a column are numbers, with their intervals and ratios, or empty."""
        return all(re.fullmatch(r"[-+\d.,%()x*!±\[\]\s]*", row[column]) for row in self.rows)

    def draw(self, slide: Slide, area: Area) -> None:
        size, widths, heights = self._fitted(area)
        head, *body = heights
        stretch = min(MOST_STRETCH, max(1.0, (area.height - head) / sum(body)))
        heights = [head, *(stretch * height for height in body)]
        frame = slide.shapes.add_table(
            len(heights), len(widths), *map(Inches, (area.left, area.top, area.width, sum(heights)))
        )
        table = frame.table
        table.horz_banding = False
        numeric = [j > 0 and self.is_numeric(j) for j in range(len(widths))]
        for column, width in zip(table.columns, widths, strict=True):
            column.width = Inches(width)
        for i, (values, height) in enumerate(zip((self.head, *self.rows), heights, strict=True)):
            table.rows[i].height = Inches(height)
            for j, value in enumerate(values):
                cell = table.cell(i, j)
                cell.fill.solid()
                cell.fill.fore_color.rgb = rgb(GRID if i == 0 else "#ffffff")
                cell.margin_left = cell.margin_right = Inches(PADDING)
                cell.margin_top = cell.margin_bottom = Inches(PADDING / 2)
                cell.vertical_anchor = MSO_ANCHOR.MIDDLE
                stands_out = i - 1 in self.bold
                tone = ACCENT if stands_out else INK
                # A true minus sign: no line breaks after it.
                first, *more = re.sub(r"(?<![\w)])-(?=\d)", "\u2212", value).split("\n")
                lines = [(first, size, tone, i == 0 or stands_out)]
                lines += [(line, SECOND * size, tone if stands_out else SOFT, False) for line in more]
                write(cell.text_frame, lines, align=PP_ALIGN.RIGHT if numeric[j] else PP_ALIGN.LEFT)

    def _fitted(self, area: Area) -> tuple[float, list[float], list[float]]:
        """The largest size of type at which the table stays in its area, its columns and its rows."""
        for size in range(CELL_SIZE, SMALLEST - 1, -1):
            widths = self.widths(size)
            spare = area.width - sum(widths)
            # What is left is shared out, so that the table is as wide as the slide.
            wide = [width + spare * width / sum(widths) for width in widths]
            heights = self.heights(size, wide)
            if spare >= 0 and sum(heights) <= area.height:
                break
        return size, wide, heights


def _lines(text: str, width: float, size: float) -> float:
    """Height of a cell's text in lines of this size."""
    first, *more = text.split("\n")
    return n_lines(first, width - 2 * PADDING + 1e-6, size, bold=True) + SECOND * len(more)


@dataclass(frozen=True)
class Steps:
    """Boxes from left to right with arrows between them, each with a name and a remark; one stands out."""

    steps: Sequence[tuple[str, str]]
    accent: int
    aspect = None

    def draw(self, slide: Slide, area: Area) -> None:
        n = len(self.steps)
        gap, high = 0.5, min(area.height, TALLEST_STEP)
        wide = (area.width - gap * (n - 1)) / n
        top = area.top + (area.height - high) / 2
        for i, (name, remark) in enumerate(self.steps):
            left = area.left + i * (wide + gap)
            stands_out = i == self.accent
            box = slide.shapes.add_shape(MSO_SHAPE.RECTANGLE, *map(Inches, (left, top, wide, high)))
            box.fill.solid()
            box.fill.fore_color.rgb = rgb(ACCENT if stands_out else GRID)
            box.line.fill.background()
            box.shadow.inherit = False
            frame = box.text_frame
            frame.word_wrap = True
            frame.vertical_anchor = MSO_ANCHOR.MIDDLE
            tone = "#ffffff" if stands_out else INK
            size = fitting_size(remark, Area(0, 0, wide - 0.25, high - 1.1), STEP_SIZE)
            lines = [(name, STEP_SIZE + 2, tone, True), (remark, size, tone, False)]
            write(frame, lines, align=PP_ALIGN.CENTER, apart=10)
            if i:
                place = (left - gap + 0.1, top + high / 2 - 0.15, gap - 0.2, 0.3)
                arrow = slide.shapes.add_shape(MSO_SHAPE.RIGHT_ARROW, *map(Inches, place))
                arrow.fill.solid()
                arrow.fill.fore_color.rgb = rgb(SOFT)
                arrow.line.fill.background()
                arrow.shadow.inherit = False

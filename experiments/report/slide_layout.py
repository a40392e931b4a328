"""The layout of a slide: a title, at most three points, one graphic. `slides.py` fills it."""

import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pptx import Presentation
from pptx.dml.color import RGBColor
from pptx.enum.shapes import MSO_CONNECTOR, MSO_SHAPE
from pptx.enum.text import MSO_ANCHOR, PP_ALIGN
from pptx.util import Emu, Inches, Pt

from experiments.atomic_files import write_atomic
from experiments.report.figure_style import ACCENT, GRID, INK, SOFT
from shirg import UserError

WIDTH, HEIGHT, MARGIN = 13.333, 7.5, 0.6
TOP = 1.25
POINTS_WIDE = 3.7
MOST_POINTS = 3
TALLEST_ROW = 0.42
LETTER = 0.0072
"""Width of a letter in inches, for each point of its size."""
FONT = "Arial"


class Slides:
    """A presentation to which slides are added; lengths are in inches."""

    def __init__(self, footer: str) -> None:
        self._presentation: Any = Presentation()
        self._presentation.slide_width, self._presentation.slide_height = Inches(WIDTH), Inches(HEIGHT)
        self._footer = footer

    def add(self, title: str, points: Sequence[str], notes: str = "") -> "Slide":
        if len(points) > MOST_POINTS:
            raise UserError(f"slide {title!r} has {len(points)} points; {MOST_POINTS} is the limit")
        page = self._presentation.slides.add_slide(self._presentation.slide_layouts[5])
        slide = Slide(page)
        slide.heading(title)
        slide.text("\n".join(points), (MARGIN, TOP + 0.1, POINTS_WIDE, HEIGHT - TOP - 1), size=18, apart=14)
        number = len(self._presentation.slides)
        slide.text(self._footer, (MARGIN, HEIGHT - 0.5, WIDTH - 2, 0.35), size=10, colour=SOFT)
        slide.text(str(number), (WIDTH - 1.2, HEIGHT - 0.5, 0.6, 0.35), size=10, colour=SOFT, align=PP_ALIGN.RIGHT)
        if notes:
            page.notes_slide.notes_text_frame.text = notes
        return slide

    def save(self, path: Path) -> Path:
        buffer = io.BytesIO()
        self._presentation.save(buffer)
        write_atomic(path, buffer.getvalue())
        return path


class Slide:
    """One slide; its graphic is to the right of the points."""

    area = (MARGIN + POINTS_WIDE + 0.4, TOP + 0.1, WIDTH - 2 * MARGIN - POINTS_WIDE - 0.4, HEIGHT - TOP - 0.75)
    """Left, top, width and height of the graphic."""

    def __init__(self, page: Any) -> None:
        self._page = page

    def heading(self, title: str) -> None:
        box = self._page.shapes.title
        box.left, box.top, box.width, box.height = (Inches(x) for x in (MARGIN, 0.4, WIDTH - 2 * MARGIN, 0.8))
        frame = box.text_frame
        frame.margin_left = frame.margin_right = 0
        frame.vertical_anchor = MSO_ANCHOR.MIDDLE
        self._write(frame, title, 28, INK, bold=True)

    def text(
        self,
        text: str,
        area: tuple[float, float, float, float],
        *,
        size: float,
        colour: str = INK,
        bold: bool = False,
        align: Any = PP_ALIGN.LEFT,
        apart: float = 0,
    ) -> None:
        """Each line is a paragraph, `apart` points from the next."""
        frame = self._page.shapes.add_textbox(*(Inches(x) for x in area)).text_frame
        frame.word_wrap = True
        frame.margin_left = frame.margin_right = 0
        self._write(frame, text, size, colour, bold=bold, align=align)
        for paragraph in frame.paragraphs:
            paragraph.space_after = Pt(apart)

    def remark(self, text: str) -> None:
        """A sentence instead of the graphic: why there is none."""
        self.text(text, self.area, size=14, colour=SOFT)

    def stack(self, images: Sequence[bytes]) -> None:
        """Pictures one above the other."""
        left, top, width, height = self.area
        each = height / len(images)
        for i, image in enumerate(images):
            self._picture(image, (left, top + i * each, width, each - 0.1))

    def pictures(self, captioned: Sequence[tuple[bytes, str]]) -> None:
        """Pictures side by side, each with a caption below."""
        left, top, width, height = self.area
        each, tall = width / len(captioned), min(height - 1.3, width / len(captioned))
        for i, (image, caption) in enumerate(captioned):
            self._picture(image, (left + i * each, top, each - 0.15, tall))
            self.text(caption, (left + i * each, top + tall + 0.05, each - 0.15, 1.2), size=12)

    def _picture(self, image: bytes, area: tuple[float, float, float, float]) -> None:
        """As large as fits, at the top left of the area: beside the first point, above its caption."""
        left, top, width, height = area
        shape = self._page.shapes.add_picture(io.BytesIO(image), Inches(left), Inches(top))
        scale = min(Inches(width) / shape.width, Inches(height) / shape.height)
        shape.width, shape.height = Emu(int(shape.width * scale)), Emu(int(shape.height * scale))

    def table(self, head: Sequence[str], rows: Sequence[Sequence[str]], bold: Sequence[int] = ()) -> None:
        """A plain table; the first column is wider, and the rows numbered in `bold` are highlighted."""
        left, top, width, height = self.area
        row_height = min(TALLEST_ROW, height / (len(rows) + 1))
        # Headings may break between words, cells may not.
        longest = [
            2 + max([1 + max(map(len, title.split())), *map(len, column)])
            for title, *column in zip(head, *rows, strict=True)
        ]
        size = max(7, min(14, int(34 * row_height), int(width / (LETTER * sum(longest)))))
        shape = self._page.shapes.add_table(
            len(rows) + 1, len(head), *(Inches(x) for x in (left, top, width, row_height * (len(rows) + 1)))
        )
        table = shape.table
        table.horz_banding = False
        for column, letters in zip(table.columns, longest, strict=True):
            column.width = Inches(width * letters / sum(longest))
        for i, values in enumerate([head, *rows]):
            table.rows[i].height = Inches(row_height)
            for j, value in enumerate(values):
                cell = table.cell(i, j)
                cell.fill.solid()
                cell.fill.fore_color.rgb = _rgb(GRID if i == 0 else "#ffffff")
                cell.margin_left = cell.margin_right = Inches(0.06)
                cell.margin_top = cell.margin_bottom = Inches(0.02)
                cell.vertical_anchor = MSO_ANCHOR.MIDDLE
                tone = ACCENT if i - 1 in bold else INK
                align = PP_ALIGN.LEFT if j == 0 else PP_ALIGN.RIGHT
                # A true minus sign, as in the points beside the table.
                text = re.sub(r"^-(?=\d)", "\u2212", value)
                self._write(cell.text_frame, text, size, tone, bold=i == 0 or i - 1 in bold, align=align)

    def flow(self, steps: Sequence[tuple[str, str]], accent: int) -> None:
        """Boxes from top to bottom, each with a remark on its right; the box numbered `accent` is highlighted."""
        left, top, width, height = self.area
        each = height / len(steps)
        for i, (name, remark) in enumerate(steps):
            y = top + i * each
            box = self._page.shapes.add_shape(
                MSO_SHAPE.ROUNDED_RECTANGLE, *(Inches(x) for x in (left, y, 2.3, each - 0.25))
            )
            box.fill.solid()
            box.fill.fore_color.rgb = _rgb(ACCENT if i == accent else GRID)
            box.line.fill.background()
            box.shadow.inherit = False
            self._write(box.text_frame, name, 14, "#ffffff" if i == accent else INK, bold=True, align=PP_ALIGN.CENTER)
            self.text(remark, (left + 2.55, y + (each - 0.25) / 2 - 0.22, width - 2.55, 0.6), size=15, colour=INK)
            if i:
                ends = (Inches(x) for x in (left + 1.15, y - 0.25, left + 1.15, y))
                line = self._page.shapes.add_connector(MSO_CONNECTOR.STRAIGHT, *ends)
                line.line.color.rgb = _rgb(SOFT)

    @staticmethod
    def _write(
        frame: Any, text: str, size: float, colour: str, *, bold: bool = False, align: Any = PP_ALIGN.LEFT
    ) -> None:
        for number, line in enumerate(text.split("\n")):
            paragraph = frame.paragraphs[0] if number == 0 else frame.add_paragraph()
            paragraph.alignment = align
            run = paragraph.add_run()
            run.text = line
            run.font.size, run.font.bold, run.font.name = Pt(size), bold, FONT
            run.font.color.rgb = _rgb(colour)


def _rgb(colour: str) -> RGBColor:
    return RGBColor.from_string(colour.removeprefix("#").upper())

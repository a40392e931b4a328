"""One colour and one marker for each system, the same in all figures of a study."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from typing import Any

from experiments.analysis.paired import BASELINE, FULL
from experiments.analysis.rows import Row, unequal
from experiments.analysis.system_names import labels
from experiments.report.figure_style import ACCENT, HUES, INK, PAPER, SOFT

MARKERS = "os^DvPX<>*ph"
OURS = "shirg"


@dataclass(frozen=True)
class SystemStyle:
    """How a system is drawn: solid at the baseline's token budget, hollow at another."""

    colour: str
    marker: str
    hollow: bool = False

    @property
    def point(self) -> dict[str, Any]:
        """Properties of a line of one point."""
        return {
            "color": self.colour,
            "marker": self.marker,
            "markerfacecolor": PAPER if self.hollow else self.colour,
            "linestyle": "none",
        }


class SystemStyles:
    """The styles of a study's systems.

    A selector has one colour: black is the baseline, blue are SHIRG and its variants, grey is the one that keeps all
    tokens. A system is a selector with an adapter and other changes: it has a marker of its own among those of its
    colour, and as long as there are enough, among all. The same system on two datasets has one style.

    Args:
        rows: all rows that some figure draws.
        trained: selectors of trainings, which may have no row.
    """

    def __init__(self, rows: Sequence[Row], trained: Iterable[str] = ()) -> None:
        self._colours = selector_colours([*(row["selector"] for row in rows), *trained])
        self._styles: dict[str, SystemStyle] = {}
        markers: dict[str, str] = {}
        taken: set[tuple[str, str]] = set()
        for row, name in zip(rows, labels(rows, with_data=False), strict=True):
            colour = self.colour(row["selector"])
            if name not in markers:
                following = list(islice(cycle(MARKERS), len(markers), len(markers) + len(MARKERS)))
                markers[name] = next((m for m in following if (colour, m) not in taken), following[0])
                taken.add((colour, markers[name]))
            self._styles[row["job"]] = SystemStyle(colour, markers[name], unequal(row))

    def of(self, row: Row) -> SystemStyle:
        return self._styles[row["job"]]

    def colour(self, selector: str) -> str:
        return self._colours[selector]


def selector_colours(selectors: Iterable[str]) -> Mapping[str, str]:
    """A colour for each selector, in their order; from the ninth rival on they are used again."""
    hues = cycle(HUES)
    found: dict[str, str] = {}
    for selector in selectors:
        if selector not in found:
            found[selector] = _known_colour(selector) or next(hues)
    return found


def _known_colour(selector: str) -> str | None:
    if selector.startswith(OURS):
        return ACCENT
    return {BASELINE: INK, FULL: SOFT}.get(selector)

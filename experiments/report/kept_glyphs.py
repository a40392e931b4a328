"""`python -m experiments.report.kept_glyphs STUDY`: what the tokens show that each system keeps of glyph pictures.

For every detail question of `data=synth_glyphs` the kept tokens are counted by what their cell shows: the evidence, a
look-alike that shares the asked word (another glyph of the asked colour, another copy of the asked letter), a
look-alike of the asked sort (another digit, another coloured letter), any other glyph, or none. The scenes are drawn
again from the ids of the samples; no model is needed. Merged and synthesised tokens show no single cell and are not
counted.
"""

import re
import sys
from collections import Counter, defaultdict
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import pandas as pd
import torch

from experiments.analysis.system_names import labels
from experiments.analysis.systems import Result, RunGroup
from experiments.analysis.table import collect, run_groups, to_markdown
from experiments.data.synthetic.glyphs import GlyphScene, ask, draw_scene
from experiments.data.synthetic.glyphs.render import PICTURE_PX
from experiments.data.synthetic.glyphs.scene import CHARS, COLOURS, DIGITS, GRID, LETTERS
from experiments.errors import CommandParser, one_sentence
from experiments.jobs.results import SAMPLES
from experiments.jobs.sample_rows import read_columns
from experiments.schema import local_folder
from experiments.token_stats import TokenGeometry
from shirg import UserError

KINDS = ("evidence", "same word", "same sort", "other glyph", "empty")
_ID = re.compile(
    r"(?P<split>\w+)-(?P<seed>\d+)-(?P<density>\w+)-(?P<index>\d+)(-(?P<least>\d+)of(?P<letters>\w+))?"
    r"-(?P<task>digit|letter)-(?P<word>\w+)$"
)


def kinds_of(scene: GlyphScene, task: str, word: str) -> list[str]:
    """What each of the GRID x GRID cells shows, row by row, for the question "`task` `word`"."""
    x0, y0, _, _ = ask(scene, task, word).box
    evidence = round(y0 * GRID) * GRID + round(x0 * GRID)
    found = []
    for cell, (char_id, colour_id) in enumerate(
        zip(scene.char_RC.flatten().tolist(), scene.colour_RC.flatten().tolist(), strict=True)
    ):
        char, colour = CHARS[char_id], COLOURS[colour_id]
        shares = colour == word if task == "digit" else char == word
        is_sort = char in DIGITS if task == "digit" else bool(char in LETTERS and colour)
        if cell == evidence:
            found.append("evidence")
        elif char and shares:
            found.append("same word")
        elif char and is_sort:
            found.append("same sort")
        else:
            found.append("other glyph" if char else "empty")
    return found


@cache
def _cells_of(sample: str) -> tuple[str, tuple[str, ...]]:
    """The density of a sample, and what its cells show; ("", ()) for one that is no detail question."""
    match = _ID.match(sample)
    if match is None:
        return "", ()
    letters, least = match["letters"] or "", int(match["least"] or 0)
    scene = draw_scene(int(match["seed"]), match["split"], int(match["index"]), match["density"], letters, least)
    return match["density"], tuple(kinds_of(scene, match["task"], match["word"]))


def count_kept(system: RunGroup) -> dict[str, dict[str, float]]:
    """Mean number of kept tokens of each kind in a question, for each density, over questions and seeds.

    Raises:
        UserError: the tokens of the model do not lie on the cells of the pictures.
    """
    totals: dict[str, Counter[str]] = defaultdict(Counter)
    questions: Counter[str] = Counter()
    for folder, result in zip(system.folders, system.results, strict=True):
        cell_of = _cell_of_token(result)
        for row in read_columns(folder / SAMPLES, ("id", "kept")):
            density, shown = _cells_of(row["id"])
            if shown:
                questions[density] += 1
                totals[density].update(shown[cell_of[token]] for token in row["kept"] if token in cell_of)
    return {d: {kind: totals[d][kind] / questions[d] for kind in KINDS} for d in questions}


def _cell_of_token(result: Result) -> dict[int, int]:
    """The cell that each tile token sees."""
    from lavida_adapter.checkpoint import read_config

    geometry = result["config"]["selector"].get("geometry", "lavida_tiles")
    folder = local_folder(str(result["config"]["model"].get("path")))
    if folder is None:
        raise UserError(f"{result['job']}: the config of its model is not here, so its tokens cannot be placed")
    places = TokenGeometry(read_config(folder), geometry)((PICTURE_PX, PICTURE_PX))
    low_N2, high_N2 = places.box_N4[:, :2], places.box_N4[:, 2:]
    fine_N = places.eligible_N
    if not torch.allclose((high_N2 - low_N2)[fine_N], torch.tensor(1 / GRID), atol=1e-4):
        raise UserError(f"{result['job']}: its tokens do not lie on the cells of the pictures, one on each")
    column_N, row_N = ((low_N2 + high_N2) / 2 * GRID).floor().to(torch.int64).unbind(-1)
    return {n: int(row_N[n]) * GRID + int(column_N[n]) for n in fine_N.nonzero()[:, 0].tolist()}


def table_of(study: Path) -> pd.DataFrame:
    """One row for each system and density.

    Raises:
        UserError: no system of the study has answered detail questions about glyph pictures.
    """
    rows = collect(study)
    names = {row["job"]: name for row, name in zip(rows, labels(rows), strict=True)}
    found = [
        {"system": names[group.result["job"]], "density": density, **means}
        for group in run_groups(study)
        if group.finished and group.result["data"]["name"] == "synth_glyphs"
        for density, means in count_kept(group).items()
    ]
    if not found:
        raise UserError(f"{study}: no finished evaluation with detail questions of data=synth_glyphs in this folder")
    return pd.DataFrame(found)


def main(arguments: Sequence[str]) -> None:
    parser = CommandParser(prog="python -m experiments.report.kept_glyphs", description=__doc__)
    parser.add_argument("study", type=Path, help="a study's folder, for example outputs/learned")
    parsed = parser.parse_args(arguments)
    with one_sentence():
        print(to_markdown(table_of(parsed.study).round(2).astype(str), [False, False, *[True] * len(KINDS)]))


if __name__ == "__main__":
    main(sys.argv[1:])

"""The table on terminals of several widths: no line is longer, and what people compare comes first."""

from collections.abc import Callable
from pathlib import Path

import pytest

from experiments.analysis.columns import Cell
from experiments.analysis.table import read_table
from experiments.analysis.terminal_table import Shown, fitting, half_width, lines, print_table, shortened
from tests.experiments.conftest import Command, result_of
from tests.experiments.planting import change_result, plant

Here = Callable[..., Path]


@pytest.fixture
def study(eval_here: Here) -> Path:
    for selector, right in (("pooled", 6), ("shirg", 5), ("saint", 3)):
        job = eval_here(f"selector={selector}", "data.n=48", "batch_size=8", "shots=0", "study=s")
        plant(job, lambda i, right=right: i % 8 < right)
        change_result(job, times=result_of(job)["times"] | {"waited": 0.5 if selector == "saint" else 0.01})
    eval_here("selector=random", "data.n=48", "batch_size=8", "shots=0", "budget=999", "study=s", ok=False)
    return job.parent


def test_no_line_is_longer_than_the_terminal(
    study: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    frame = read_table(study)
    monkeypatch.chdir(study.parent.parent)
    capsys.readouterr()
    shown: dict[int, list[str]] = {}
    for width in (60, 80, 120, 200):
        monkeypatch.setenv("COLUMNS", str(width))
        print_table(frame, study)
        shown[width] = capsys.readouterr().out.splitlines()
        table = shown[width][: shown[width].index("")]
        assert max(map(len, table)) <= width and len(table) == 7, "a title of two lines, a rule, four systems"
        assert [line.split()[0] for line in table[3:]] == ["pooled", "random", "saint", "shirg"]
        assert all(len(line) <= width for line in shown[width] if "outputs/" not in line and "failed" not in line)
    wider = [shown[width][1].split() for width in (60, 80, 120, 200)]
    assert all(set(few) <= set(many) for few, many in zip(wider, wider[1:], strict=False)), "a wider one has more"
    assert {"tokens", "ms", "fine", "guard"} <= set(wider[1]) and "recall" in wider[3]
    text = " ".join(" ".join(shown[80]).split())
    assert "failed eval_" in text and "budget 999 is larger" in text
    assert "The machine was busy while these were timed: saint; their ms are too long." in text
    assert "more columns: widen the terminal, add --wide, or read table.md." in text
    print_table(frame, study, wide=True)
    whole = capsys.readouterr().out
    assert "prefix tokens" in whole and "more columns" not in whole and max(map(len, whole.splitlines())) > 200


def test_columns_are_taken_by_rank_and_widened_with_what_is_left() -> None:
    long, brief = ("1.25 (1.1-1.4)",), ("1.25",)
    candidates = [
        (0.0, Shown("system", (("shirg",),), right=False)),
        (9.0, Shown("much more than fits", (("x",),))),
        (5.0, Shown("ms", (long, brief))),
        (2.0, Shown("score", (("50.0 ±3.1",),))),
    ]
    for width, titles, ms in ((30, ["system", "ms", "score"], brief), (33, ["system", "ms", "score"], long)):
        shown, hidden = fitting(candidates, width)
        assert [column.title for column in shown] == titles and hidden == ["much more than fits"]
        assert shown[1].forms == (ms,) and max(map(len, lines(shown))) <= width
    assert [column.title for column in fitting(candidates, 3)[0]] == ["system"], "the first one in any case"


def test_long_names_leave_room_for_the_scores() -> None:
    """Without the middle of the names, as long as none becomes another's; where they fit, they are whole."""
    names = ("shirg", f"shirg {'allocation.mode=evidence_context ' * 2}K=20", f"shirg {'x' * 60} K=40")
    forms = shortened(names)
    assert forms[0] == names and [max(map(len, form)) for form in forms[1:]] == [48, 36, 28]
    assert forms[-1][0] == "shirg" and forms[-1][2] == "shirg xxxxxxx…xxxxxxxxx K=40"
    twins = tuple(f"{'a' * 30}{i}{'b' * 30}" for i in range(2))
    assert shortened(twins) == (twins,), "cut in the middle they would be equal"
    columns = [(0, Shown("system", forms, False)), (3, Shown("fine", (("80.0 ±4.0",) * 3,)))]
    shown, hidden = fitting(columns, 80)
    assert not hidden and max(map(len, lines(shown))) <= 80
    assert fitting(columns, 200)[0][0].forms[0] == names


def test_cells_in_half() -> None:
    cell = Cell("50.0", 50.0, 44.0, 56.2)
    assert half_width(cell) == "50.0 ±6.1" and half_width(Cell("50.0", 50.0, 30.0, 70.0)) == "50.0 ±20"
    assert half_width(Cell("+5.0", 5.0, 1.0, 9.0, signed=True, tail="*")) == "+5.0 ±4.0*" and half_width(Cell()) == "-"


def test_a_finished_sweep_is_skipped_and_shown(command: Command, tiny_weights: Path) -> None:
    words = ("-m", "study=s", f"model.path={tiny_weights}", "selector=pooled,random", "data.n=12", "shots=0")
    assert command("eval", *words).code == 0
    ended = command("eval", *words, "--wide")
    assert (ended.code, ended.err) == (0, []) and ended.out.count("skip  eval_") == 2
    assert "2 jobs were finished already and kept; overwrite=true starts again" in ended.out
    assert "prefix tokens" in ended.out and "wide" not in ended.out

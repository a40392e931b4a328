"""The metadata of a folder as JSON lines, CSV and Parquet: the same samples, and what is refused in each."""

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from experiments.data.benchmarks import Benchmark
from experiments.data.folder import Folder
from experiments.data.sample import Sample
from shirg import UserError
from tests.refusals import assert_says, message_of

ROWS: list[dict[str, Any]] = [
    {"file_name": "a.png", "question": 'how "many", then?', "answers": ["one", "1"], "question_id": "7"},
    {"file_name": "b.png", "question": "two\nlines, \u2028 é 图", "answers": "[sic] no list"},
    {"file_name": "a.png", "question": "again?", "answers": ["yes, twice"], "draft": "It is [GAP]."},
]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name in "ab":
        Image.new("RGB", (6, 4)).save(tmp_path / f"{name}.png")
    return tmp_path


def write_jsonl(folder: Path, rows: list[dict[str, Any]]) -> None:
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))


def write_csv(folder: Path, rows: list[dict[str, Any]]) -> None:
    names = list(dict.fromkeys(key for row in rows for key in row))
    with open(folder / "metadata.csv", "w", newline="", encoding="utf-8-sig") as file:
        table = csv.DictWriter(file, names)
        table.writeheader()
        lists = ({k: json.dumps(v) if isinstance(v, list) else v for k, v in row.items()} for row in rows)
        table.writerows(lists)


def write_parquet(folder: Path, rows: list[dict[str, Any]]) -> None:
    columns = {key: [row.get(key) for row in rows] for key in dict.fromkeys(key for row in rows for key in row)}
    columns["answers"] = [[value] if isinstance(value, str) else value for value in columns["answers"]]
    pq.write_table(pa.table(columns), folder / "metadata.parquet")


WRITERS: dict[str, Callable[[Path, list[dict[str, Any]]], None]] = {
    "metadata.jsonl": write_jsonl,
    "metadata.csv": write_csv,
    "metadata.parquet": write_parquet,
}


def facts(sample: Sample) -> tuple[object, ...]:
    return sample.id, sample.question, sample.answers, sample.draft, sample.meta


@pytest.mark.parametrize("name", WRITERS)
def test_each_format_gives_the_same_samples(root: Path, name: str) -> None:
    WRITERS[name](root, ROWS)
    assert [facts(sample) for sample in Folder(root=root)] == [  # type: ignore[attr-defined]  # a sequence
        ("7", ROWS[0]["question"], ("one", "1"), "", {"picture": "a.png"}),
        ("b.png#0", ROWS[1]["question"], ("[sic] no list",), "", {"picture": "b.png"}),
        ("a.png#1", "again?", ("yes, twice",), "It is [GAP].", {"picture": "a.png"}),
    ]


@pytest.mark.parametrize("name", WRITERS)
def test_a_benchmark_in_a_folder_reads_each_format(root: Path, name: str) -> None:
    (root / "val").mkdir()
    Image.new("RGB", (6, 4)).save(root / "val/c.png")
    WRITERS[name](root / "val", [{"file_name": "c.png", "question": "?", "answers": ["a"], "type": "human"}])
    options: dict[str, Any] = {"suffix": "", "max_new_tokens": 4, "metrics": ["exact_match"], "source": "folder"}
    found = Benchmark(name="chartqa", split="val", root=str(root), **options)
    assert [(sample.id, sample.subtask) for sample in found] == [("c.png#0", "human")]  # type: ignore[attr-defined]
    message = message_of(lambda: Benchmark(name="chartqa", split="test", root=str(root), **options))
    assert_says(message, "data.split=test does not exist in ... it has val")


def test_several_files_are_refused_unless_one_is_named(root: Path) -> None:
    write_csv(root, ROWS)
    write_jsonl(root, ROWS[:1])
    assert_says(message_of(lambda: Folder(root=root)), "has metadata.jsonl and metadata.csv: remove all but one")
    assert len(Folder(root=root, metadata="metadata.csv")) == 3


CSV: dict[str, tuple[bytes, str]] = {
    "Latin-1": ("file_name,question,answers\na.png,où,là\n".encode("latin-1"), "is not valid CSV in UTF-8"),
    "an open quote": (b'file_name,question,answers\na.png,"what,a\n', "is not valid CSV in UTF-8"),
    "a comma too many": (b"file_name,question,answers\na.png,a,b,c\n", "line 2: more cells than the first line"),
    "a cell too few": (b"file_name,question,answers\na.png,a\n", "line 2: needs 'answers'"),
    "an empty cell": (b"file_name,question,answers\na.png,,b\n", "line 2: needs a non-empty text 'question'"),
    "no names": (b"a.png,what,a\na.png,what,b\n", "line 2: needs a non-empty text 'file_name'"),
    "a list of numbers": (b'file_name,question,answers\na.png,what,"[1, 2]"\n', "line 2: needs 'answers'"),
    "a name alone": (b"file_name,question,answers\n", "metadata.csv is empty"),
    "nothing": (b"", "metadata.csv is empty"),
    "a NUL": (b"file_name,question,answers\na\0.png,a,b\n", "line 2: picture 'a"),
    "10 MB": (b"file_name,question,answers\na.png," + b"why " * 2_500_000 + b",b\n", "is not valid CSV"),
    "outside": (b"file_name,question,answers\n../a.png,a,b\n", "line 2: picture '../a.png' is outside"),
    "Parquet": (b"PAR1\xff\xfe", "is not valid CSV in UTF-8"),
}


@pytest.mark.parametrize("case", CSV)
def test_refused_csv(root: Path, case: str) -> None:
    content, words = CSV[case]
    (root / "metadata.csv").write_bytes(content)
    assert_says(message_of(lambda: Folder(root=root)), words)


GOOD: dict[str, list[Any]] = {"file_name": ["a.png", "b.png"], "question": ["?", "!"], "answers": [["a"], ["b"]]}
PARQUET: dict[str, tuple[dict[str, list[Any]], str]] = {
    "no answers": ({"answers": [["a"], None]}, "row 1: needs 'answers'"),
    "no such column": ({"question": [None, None]}, "row 0: needs a non-empty text 'question'"),
    "numbers": ({"answers": [[1], [2]]}, "row 0: needs 'answers'"),
    "bytes": ({"question": [b"a", b"b"]}, "row 0: needs a non-empty text 'question'"),
    "objects": ({"file_name": [{"a": 1}, {"a": 2}]}, "row 0: needs a non-empty text 'file_name'"),
    "NaN": ({"id": [float("nan"), 1.0]}, "row 0: the id must be a text or a whole number, not nan"),
    "long": ({"question": ["?", "why " * 60_000]}, "row 1: a text of 240,000 characters"),
    "a line break": ({"file_name": ["a.png", "0\n"]}, "row 1: picture '0\\n' does not exist in ... add it"),
    "empty": ({name: [] for name in GOOD}, "metadata.parquet is empty"),
}


@pytest.mark.parametrize("case", PARQUET)
def test_refused_parquet(root: Path, case: str) -> None:
    columns, words = PARQUET[case]
    pq.write_table(pa.table({**GOOD, **columns}), root / "metadata.parquet")
    assert_says(message_of(lambda: Folder(root=root)), words)


@pytest.mark.parametrize("cut", [0, 3, 200, -20])
def test_torn_parquet(root: Path, cut: int) -> None:
    buffer = io.BytesIO()
    pq.write_table(pa.table(GOOD), buffer)
    (root / "metadata.parquet").write_bytes(buffer.getvalue()[:cut])
    assert_says(message_of(lambda: Folder(root=root)), "metadata.parquet cannot be read as Parquet")


@given(st.lists(st.lists(st.text(max_size=12), max_size=4), max_size=4), st.data())
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_csv_is_read_or_refused(root: Path, cells: list[list[str]], data: st.DataObject) -> None:
    head = data.draw(st.permutations(["file_name", "question", "answers", "id"]))
    text = io.StringIO()
    csv.writer(text).writerows([head, *cells, ["a.png"] * 4] if data.draw(st.booleans()) else [head, *cells])
    raw = text.getvalue().encode(errors="surrogatepass")
    (root / "metadata.csv").write_bytes(raw[: data.draw(st.integers(0, len(raw)))] if data.draw(st.booleans()) else raw)
    try:
        read = Folder(root=root)
    except UserError as error:
        assert "\n" not in str(error)
    else:
        assert all(read[i].question.strip() for i in range(len(read)))

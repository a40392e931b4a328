"""Small copies of each benchmark in each form it comes in, with made-up questions about made-up pictures."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
from PIL import Image

BENCHMARKS = ("chartqa", "docvqa", "infovqa", "textvqa", "vqav2")
SOURCES = ("hub", "disk", "folder")
SPLIT = {"chartqa": "test"}
"""The split that is evaluated; "val" for the others."""
N = 12
"""Questions; two consecutive ones share a picture. In ChartQA the first half is human."""


def split_of(name: str) -> str:
    return SPLIT.get(name, "val")


def picture(i: int) -> Image.Image:
    """RGBA, half of it transparent, so that a loader that forgets the white shows black."""
    image = Image.new("RGBA", (40, 30), (0, 0, 0, 0))
    image.paste((20 * (i // 2), 100, 200, 255), (0, 0, 20, 30))
    return image


def question(i: int) -> str:
    return f"What is NUMBER {i}?"


def people(i: int) -> list[str]:
    """Ten answers, seven of them the same."""
    return [str(i)] * 7 + ["two", "none", ""]


def answers(name: str, i: int) -> Any:
    """Those of a question, in the form of the official files; tests put others here."""
    if name == "chartqa":
        return f"{i}%"
    return people(i) if name in ("vqav2", "textvqa") else [str(i), f"page {i}"]


def write(name: str, source: str, root: Path, split: str | None = None, n: int = N) -> list[str]:
    """Writes a benchmark; returns the overrides that read it."""
    split = split or split_of(name)
    if source == "disk":
        DISK[name](root, split, n)
    elif source == "folder":
        _folder(name, root / split, n)
    else:
        return [f"data={name}", "data.source=hub", f"data.hub={hub(name, root, split, n)}", f"data.split={split}"]
    return [f"data={name}", f"data.source={source}", f"data.root={root}", f"data.split={split}"]


def dump(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def save(path: Path, i: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = picture(i)
    (image if path.suffix == ".png" else image.convert("RGB")).save(path)


def _chartqa(root: Path, split: str, n: int) -> None:
    for kind, numbers in (("human", range(n // 2)), ("augmented", range(n // 2, n))):
        rows = [{"imgname": f"{i // 2}.png", "query": question(i), "label": answers("chartqa", i)} for i in numbers]
        # Some releases wrap the list.
        dump(root / "ChartQA Dataset" / split / f"{split}_{kind}.json", rows if kind == "human" else {"data": rows})
    for i in range(n):
        save(root / "ChartQA Dataset" / split / "png" / f"{i // 2}.png", i)


def _docvqa(root: Path, split: str, n: int) -> None:
    rows = [
        {
            "questionId": 100 + i,
            "question": question(i),
            "question_types": ["layout"],
            "image": f"documents/page_{i // 2}.png",
            "ucsf_document_id": f"doc{i // 2}",
            "ucsf_document_page_no": "1",
            "answers": answers("docvqa", i),
        }
        for i in range(n)
    ]
    dump(root / split / f"{split}_v1.0_withQT.json", {"dataset_name": "docvqa", "dataset_split": split, "data": rows})
    for i in range(n):
        # The three places where pictures are found.
        folder = (root / split / "documents", root / "documents", root / "spdocvqa_images")[i // 2 % 3]
        save(folder / f"page_{i // 2}.png", i)


def _infovqa(root: Path, split: str, n: int) -> None:
    rows = [
        {
            "questionId": 100 + i,
            "question": question(i),
            "image_local_name": f"{i // 2}.jpeg",
            "answers": answers("infovqa", i),
        }
        for i in range(n)
    ]
    dump(root / f"infographicsVQA_{split}_v1.0_withQT.json", {"dataset_name": "infographicVQA", "data": rows})
    for i in range(n):
        save(root / "infographicsvqa_images" / f"{i // 2}.jpeg", i)


def _textvqa(root: Path, split: str, n: int) -> None:
    rows = [
        {"question_id": 100 + i, "question": question(i), "image_id": f"ab{i // 2}", "answers": answers("textvqa", i)}
        for i in range(n)
    ]
    dump(root / f"TextVQA_0.5.1_{split}.json", {"dataset_name": "textvqa", "data": rows})
    for i in range(n):
        save(root / "train_images" / f"ab{i // 2}.jpg", i)


def _vqav2(root: Path, split: str, n: int) -> None:
    coco = f"{split}2014"
    asked = [{"image_id": 7 + i // 2, "question": question(i), "question_id": 100 + i} for i in range(n)]
    answered = [
        {
            "question_id": 100 + i,
            "image_id": 7 + i // 2,
            "answer_type": ("number", "other")[i % 2],
            "multiple_choice_answer": str(i),
            "answers": people_rows(i),
        }
        for i in reversed(range(n))
    ]
    dump(root / f"v2_OpenEnded_mscoco_{coco}_questions.json", {"task_type": "Open-Ended", "questions": asked})
    dump(root / f"v2_mscoco_{coco}_annotations.json", {"annotations": answered})
    for i in range(n):
        save(root / coco / f"COCO_{coco}_{7 + i // 2:012d}.jpg", i)


DISK = {"chartqa": _chartqa, "docvqa": _docvqa, "infovqa": _infovqa, "textvqa": _textvqa, "vqav2": _vqav2}


def people_rows(i: int) -> list[dict[str, Any]]:
    texts = answers("vqav2", i)
    return [{"answer": text, "answer_confidence": "yes", "answer_id": k} for k, text in enumerate(texts, 1)]


def _folder(name: str, folder: Path, n: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for i in range(n):
        save(folder / f"{i // 2}.png", i)
        given = answers(name, i)
        row: dict[str, Any] = {"file_name": f"{i // 2}.png", "question": question(i), "question_id": 100 + i}
        row["answers"] = [text or "-" for text in given] if isinstance(given, list) else given
        if name == "chartqa":
            row["type"] = "human" if i < n // 2 else "augmented"
        if name == "vqav2":
            row |= {"multiple_choice_answer": str(i), "answer_type": "number"}
        lines.append(json.dumps(row) + "\n")
    (folder / "metadata.jsonl").write_text("".join(lines))


def table(name: str, n: int) -> dict[str, Sequence[Any]]:
    """The columns of the benchmark's table on the hub."""
    own: dict[str, Callable[[int], Any]] = {
        "chartqa": lambda i: {"type": "human_test" if i < n // 2 else "augmented_test", "answer": answers(name, i)},
        "vqav2": lambda i: {
            "question_id": 100 + i,
            "image_id": 7 + i // 2,
            "answer_type": ("number", "other")[i % 2],
            "multiple_choice_answer": str(i),
            "answers": people_rows(i),
        },
        "textvqa": lambda i: {"question_id": 100 + i, "image_id": f"ab{i // 2}", "answers": answers(name, i)},
        "docvqa": lambda i: {
            "questionId": str(100 + i),
            "question_types": ["layout"],
            "ucsf_document_id": f"doc{i // 2}",
            "ucsf_document_page_no": "1",
            "answers": answers(name, i),
        },
        "infovqa": lambda i: {
            "questionId": str(100 + i),
            "image_url": f"https://x.test/{i // 2}.jpeg",
            "answers": answers(name, i),
        },
    }
    rows = [{"question": question(i), "image": picture(i), **own[name](i)} for i in range(max(n, 1))]
    return {column: [row[column] for row in rows[:n]] for column in rows[0]}


def hub(name: str, root: Path, split: str, n: int, columns: Mapping[str, Sequence[Any]] | None = None) -> str:
    """A dataset repository in a folder: parquet files in row groups, and a card that lists them."""
    data = datasets.Dataset.from_dict(dict(columns or table(name, n))).cast_column("image", datasets.Image())
    official = "validation" if split == "val" and name != "chartqa" else split
    (root / "data").mkdir(parents=True, exist_ok=True)
    half = len(data) // 2
    for part, rows in enumerate((range(half), range(half, len(data)))):
        data.select(rows).to_parquet(root / "data" / f"{official}-{part:05d}-of-00002.parquet", batch_size=4)
    card = f"configs:\n- config_name: default\n  data_files:\n  - split: {official}\n    path: data/{official}-*\n"
    (root / "README.md").write_text(f"---\n{card}---\n")
    return str(root)

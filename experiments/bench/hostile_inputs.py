"""Inputs that somebody else wrote, or that a typing error makes: command lines, and files that a command reads.

`inputs` lists them by kind; what an input needs is written into a folder of its own.
"""

import csv
import io
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from experiments.schema import CONF

NAN, HUGE, DEEP = float("nan"), 10**12, 100_000
WEIGHTS = CONF.parent / "weights" / "tiny"
ROW = {"file_name": "a.png", "question": "what?", "answers": ["one"]}
TALK = {"image": "a.png", "conversations": [{"from": "human", "value": "?"}, {"from": "gpt", "value": "!"}]}

Write = Callable[[Path], list[str]]
"""Writes what the command reads into a folder; returns the overrides that name it."""


@dataclass(frozen=True)
class HostileInput:
    """One command line."""

    kind: str
    name: str
    words: tuple[str, ...] = ()
    write: Write | None = None
    command: str = "eval"


NUMBERS: Mapping[str, tuple[object, ...]] = {
    "limit": (0, -1, HUGE, 1.5, "nan", "[1]", "{a: 1}"),
    "batch_size": (0, -1, HUGE, "nan"),
    "shots": (-1, HUGE, 2**70),
    "seed": (-1, 2**70, "1.5"),
    "threads": (0, -1, 100_000, "[]"),
    "workers": (-1, 10**6, "1.5"),
    "shards": (0, -1, 2**70),
    "shard": (-1, 5),
    "data.n": (0, -1, 10**9, 2**70, "nan", "a", "[1]", "true"),
    "data.qa_per_image": (0, 10**9, 1.5),
    "data.metrics": (3, "[3]", "[[a]]", "null", "[]"),
    "data.max_new_tokens": (0, 10**6, "nan"),
    "budget": (0, -1, "nan", "inf", "[1]", HUGE, "'1/0 base'"),
    "device": ("gpu", "cuda:99", "mps", "meta"),
    "decode.temperature": (-1, "nan", "inf"),
    "decode.threshold": (0, 2, "nan"),
    "decode.top_p": (0, 2, "nan"),
    "decode.top_k": (0, "[1]", "nan"),
    "decode.step_ratio": (0, -1, "nan", "inf"),
    "decode.block_length": (0, HUGE),
    "selector.weights.similarity": ("nan", "inf", 1e308, "[1]", "a"),
    "selector.scaffold.size": (-1, "nan", 10**9, "{a: 1}"),
    "selector.merge.share": (-1, 2, "nan"),
    "model.path": (3, "[1]", "a" * 5000, "'a\0b'", "''"),
    "adapter": (3, "'a\0/b'", "/" + "a" * 5000),
}
TRAINING: Mapping[str, tuple[object, ...]] = {
    "optim.steps": (0, -1, "nan"),
    "optim.lr": (-1, "nan", "inf", 1e308),
    "optim.betas": ("[2,3]", "[nan,0.9]", "[0.9]", 3),
    "optim.weight_decay": (-1, "nan"),
    "optim.lr_floor": (-1, 2),
    "optim.warmup": (-1, HUGE),
    "objective.extra_padding": (-1, "nan"),
    "objective.alignment": (-1, "inf"),
    "batch_size": (0, HUGE),
    "lora.rank": (-1, HUGE, "a"),
    "lora.alpha": (0, "nan"),
    "lora.dropout": (1, "nan"),
    "lora.targets": (3, "[nothing]", "['{0-99999999}']"),
    "mix.budgets": ("[nan]", "[[1]]"),
    "trainer.workers": (-1, 10**6),
    "trainer.precision": ("x", "64-true"),
    "trainer.clip": (-1, "nan"),
    "trainer.log_every": (0, -1),
    "trainer.checkpoint_every": (0, -1),
    "trainer.num_nodes": (0, HUGE),
    "weights": ("/" + "a" * 5000,),
}
WORDS: Mapping[str, str] = {
    **{f"a {sign!r} without quotes": f"data.root=/a{sign}b" for sign in ("(", "[", "{", "=", "#", "!", "'", "é", "图")},
    "a study of 300 letters": f"study={'a' * 300}",
    "a study of 72 CJK letters": f"study='{'語' * 72}'",
    "a NUL in a study": "study='a\0b'",
    "a line break in a study": "study='a\nb'",
    "a study outside": "study=../x",
    "brackets": "data.suffix=" + "[" * DEEP,
    "a group that is null": "data=null",
    "a group that is a number": "selector=3",
    "a group that is a list": "model=[a]",
    "no data": "~data",
    "a word that is no override": "a b=1",
}
CLASSES = ("os.system", "no.such.Class", "logging.FileHandler", "3", "null", "experiments", "shirg.Selector", "...")


def command_lines() -> Iterator[HostileInput]:
    for key, values in NUMBERS.items():
        for value in values:
            few = ("data.n=8",) if key == "limit" else ()
            yield HostileInput("values", f"{key}={value!s:.40}", (*few, f"{key}={value}"))
    for key, values in TRAINING.items():
        for value in values:
            yield HostileInput("values", f"train {key}={value!s:.40}", (f"{key}={value}",), command="train")
    for name, word in WORDS.items():
        yield HostileInput("words", name, (word,))
    for path in CLASSES:
        yield HostileInput("classes", f"selector {path}", ("selector=random", f"selector._target_={path}"))
        yield HostileInput("classes", f"data {path}", (f"data._target_={path}",))


def _folder(content: bytes, name: str = "metadata.jsonl") -> Write:
    def write(root: Path) -> list[str]:
        Image.new("RGB", (90, 60), "red").save(root / "a.png")
        (root / name).write_bytes(content)
        return ["data=folder", f"data.root={root}"]

    return write


def _picture(make: Callable[[Path], object]) -> Write:
    def write(root: Path) -> list[str]:
        make(root / "a.png")
        (root / "metadata.jsonl").write_text(json.dumps(ROW))
        return ["data=folder", f"data.root={root}"]

    return write


def _blank(width: int, height: int, mode: str = "RGB") -> Callable[[Path], object]:
    return lambda path: Image.new(mode, (width, height)).save(path, "PNG")


PICTURES: Mapping[str, Callable[[Path], object]] = {
    **{f"{w} x {h}": _blank(w, h) for w, h in ((60000, 1), (1, 60000), (2000, 60), (1, 1))},
    "90 megapixels": _blank(10001, 9000, "1"),
    "400 megapixels": _blank(20000, 20000, "1"),
    "CMYK": lambda path: Image.new("CMYK", (9, 9)).save(path, "JPEG"),
    "PostScript": lambda path: Image.new("RGB", (9, 9)).save(path, "EPS"),
    "an animation": lambda path: Image.new("P", (9, 9)).save(
        path, "GIF", save_all=True, append_images=[Image.new("P", (9, 9), 1)]
    ),
    "a palette with transparency": lambda path: Image.new("P", (9, 9)).save(path, "PNG", transparency=0),
    "16 bits, a transparent colour": lambda path: Image.new("I;16", (9, 9)).save(path, "PNG", transparency=0),
    "32 bits": lambda path: Image.new("F", (9, 9)).save(path, "TIFF"),
    "text": lambda path: path.write_text("hello"),
    "a header alone": lambda path: path.write_bytes(b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + bytes(17)),
    "nothing": lambda path: path.touch(),
    "a link to a device": lambda path: path.symlink_to("/dev/zero"),
    "a pipe": os.mkfifo,
}


def _each(name: str, *values: Any) -> tuple[dict[str, Any], ...]:
    return tuple({name: value} for value in values)


CHANGES: tuple[dict[str, Any], ...] = (
    *_each("question", None, "", 3, [], NAN, "\ud800", "why " * 2_500_000, "why " * 40_000),
    *_each("answers", None, "", [], 3, [3], {}, "why " * 60_000),
    *_each("file_name", "../a.png", "/etc/hostname", "a\0.png", "x" * 5000, "gone.png", 3),
    *_each("id", True, 1.5, [], "\udfff"),
)
LINES = (b"[" * DEEP, b'{"file_name": "\xff"}', b"3", b"NaN", b'["a.png"]', b'{"file_name": ', b"")
CSVS = ("a,b,c\n1,2,3", 'file_name,question,answers\na.png,"what,x', "file_name,question\na.png,?", "\0", "")
TALKS: tuple[Any, ...] = (
    *({**TALK, **change} for change in _each("image", {}, NAN, 3, [3], "../a.png", ["a.png", "b.png"], None)),
    *({**TALK, **change} for change in _each("conversations", 3, [], [3], [{"from": "cat", "value": "?"}])),
    {**TALK, "conversations": [{"from": "human", "value": "<image>"}, TALK["conversations"][1]]},
    3,
)
CELLS: tuple[dict[str, Any], ...] = (
    *_each("question", None, 3, b"x", {"a": 1}, "why " * 60_000),
    *_each("answer", None, 3, [3], "why " * 60_000),
    *_each("human_or_machine", "human", 7, NAN),
    *_each("image", None, 3, b"hello", {"path": "/dev/zero"}, "x"),
)


def _talks(entry: Any) -> Write:
    def write(root: Path) -> list[str]:
        Image.new("RGB", (90, 60)).save(root / "a.png")
        (root / "talks.json").write_text(json.dumps([entry]))
        return ["data=llava", f"data.json={root}/talks.json", f"data.images={root}"]

    return write


def _table(change: Mapping[str, Any], keep: int | None = None) -> Write:
    def write(root: Path) -> list[str]:
        picture = io.BytesIO()
        Image.new("RGB", (90, 60)).save(picture, "PNG")
        fields = {"question": "?", "answer": "1", "type": "human", "image": {"bytes": picture.getvalue()}, **change}
        (root / "data").mkdir()
        path = root / "data" / "test-0.parquet"
        pq.write_table(pa.table({name: [value] for name, value in fields.items()}), path)
        path.write_bytes(path.read_bytes()[:keep])
        return ["data=chartqa", f"data.hub={root}"]

    return write


def datasets() -> Iterator[HostileInput]:
    for name, make in PICTURES.items():
        yield HostileInput("pictures", name, write=_picture(make))
    for change in CHANGES:
        content = json.dumps({**ROW, **change}).encode()
        yield HostileInput("metadata", f"{change!s:.50}", write=_folder(content))
    for line in LINES:
        yield HostileInput("metadata", f"{line[:40]!s}", write=_folder(line))
    for text in CSVS:
        yield HostileInput("metadata", f"CSV {text[:40]!r}", write=_folder(text.encode(), "metadata.csv"))
    for change in CHANGES:
        if any(isinstance(value, str) and not value.isascii() for value in change.values()):
            continue  # half a character, which a file in UTF-8 cannot hold
        table = io.StringIO()
        csv.writer(table).writerows(zip(*{**ROW, **change}.items(), strict=True))
        yield HostileInput("metadata", f"CSV {change!s:.50}", write=_folder(table.getvalue().encode(), "metadata.csv"))
    yield HostileInput("metadata", "torn Parquet", write=_folder(b"PAR1abc", "metadata.parquet"))
    for entry in TALKS:
        yield HostileInput("conversations", f"{entry!s:.60}", write=_talks(entry))
    for change in CELLS:
        yield HostileInput("benchmarks", f"{change!s:.60}", write=_table(change))
    yield HostileInput("benchmarks", "a torn table", write=_table({}, keep=100))


FIELDS: Mapping[str, tuple[object, ...]] = {
    "n_heads": (0, -4, "4", 1e9),
    "n_layers": (10**6, 0, NAN),
    "d_model": (0, 2**36, "wide"),
    "vocab_size": (0, 3, 2**39),
    "rms_norm_eps": (NAN, -1),
    "rope_theta": (NAN, 0),
    "max_sequence_length": (0, 2**36, 3),
    "image_grid_pinpoints": (3, [], [[64 * 10**6, 64]], "[" * DEEP),
    "vision_config": (3, *({name: n} for name, n in (("patch_size", 0), ("image_size", 0), ("hidden_size", 2**30)))),
    "budgets": ({"base": -1}, {"base": NAN}, [1]),
    "system_prompt": (3, "why " * 20_000, "why " * 2_500_000),
}
TEXTS = (b"[" * DEEP, b"3", b"null", b"", b"\xff")
SPECIAL: Mapping[str, Callable[[Path], object]] = {
    "a pipe": os.mkfifo,
    "a folder": os.mkdir,
    "a link to nothing": lambda path: path.symlink_to("nothing"),
    "a link to a device": lambda path: path.symlink_to("/dev/zero"),
}


def _checkpoint(change: Callable[[Path], object]) -> Write:
    def write(root: Path) -> list[str]:
        for path in WEIGHTS.glob("*.*"):
            shutil.copy(path, root)
        change(root)
        return [f"model.path={root}"]

    return write


def _field(name: str, value: object) -> Callable[[Path], object]:
    def change(root: Path) -> None:
        config = json.loads((root / "config.json").read_text())
        value_ = {**config[name], **value} if isinstance(value, dict) and name == "vision_config" else value
        (root / "config.json").write_text(json.dumps({**config, name: value_}))

    return change


def _replaced(name: str, make: Callable[[Path], object]) -> Callable[[Path], object]:
    def change(root: Path) -> None:
        (root / name).unlink(missing_ok=True)
        make(root / name)

    return change


def _text(content: bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(content)


def checkpoints() -> Iterator[HostileInput]:
    for name, values in FIELDS.items():
        for value in values:
            yield HostileInput("checkpoints", f"{name}={value!s:.40}", write=_checkpoint(_field(name, value)))
    for file in ("config.json", "model.safetensors", "tokenizer.json"):
        for kind, make in SPECIAL.items():
            yield HostileInput("checkpoints", f"{file}: {kind}", write=_checkpoint(_replaced(file, make)))
        for text in TEXTS:
            yield HostileInput("checkpoints", f"{file}: {text[:20]!r}", write=_checkpoint(_replaced(file, _text(text))))
    for kind, make in SPECIAL.items():
        yield HostileInput("checkpoints", f"beside: {kind}", write=_checkpoint(_replaced("x.safetensors", make)))


def inputs() -> list[HostileInput]:
    """All of them."""
    return [*command_lines(), *datasets(), *checkpoints()]

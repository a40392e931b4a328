"""`data=llava`: conversations about pictures in LLaVA's format, as LCS-558K and Open-LLaVA-NeXT are published."""

import os
import random
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pyarrow as pa

from experiments.data.image_io import PictureFile
from experiments.data.sample import MOST_CHARACTERS, Sample
from lavida_adapter.checkpoint_files import parse_json
from shirg import MissingFileError, UserError

PLACEHOLDER = "<image>"
USER, ASSISTANT = ("human", "user"), ("gpt", "assistant")


class _Entry(NamedTuple):
    id: str
    picture: str
    rounds: list[tuple[str, str]]
    """Pairs of a user turn and its answer."""


class Llava:
    """A JSON list (or JSON lines) of conversations, and the folder that their pictures' paths start from.

    An entry has "image" and "conversations", turns {"from": "human" | "gpt", "value": text} in which "<image>" marks
    the picture's place; the picture is put before the text in any case. Entries without a picture, with several,
    without a question (beside "<image>") or without an answer cannot be used for training: they are left out and
    counted in `dropped`.

    Texts are kept as Arrow columns, because there may be a million conversations.

    Args:
        json: the file.
        images: the folder.
        rounds: "one": each epoch a round of every conversation, drawn with the seed, as LaViDa was trained;
            "all": every round once per epoch.
        history: put the rounds before into the prompt, as LaViDa's paper says; without it they are left out, as in its
            code.
        missing: "raise" for a picture that is not there, or "drop".
        limit: use this many conversations, drawn with the seed.
        seed: for `rounds` and `limit`.
        suffix: put after each question.
        max_new_tokens, metrics: for evaluation.
        name: what the dataset is called; the file's name by default.

    Raises:
        MissingFileError: the file, the folder or a picture is not there.
        UserError: the file is not of this format, or nothing in it can be learned from.
    """

    split = "train"
    questions_per_picture = 1

    def __init__(
        self,
        *,
        json: str | Path,
        images: str | Path,
        rounds: Literal["one", "all"] = "one",
        history: bool = False,
        missing: Literal["raise", "drop"] = "raise",
        limit: int | None = None,
        seed: int = 0,
        suffix: str = "",
        max_new_tokens: int = 128,
        metrics: Sequence[str] = ("exact_match",),
        name: str | None = None,
    ) -> None:
        path, self._images = Path(json), Path(images)
        if not os.path.isfile(path):
            raise MissingFileError(f"data.json={path} does not exist: give a JSON file of conversations")
        if not os.path.isdir(self._images):
            raise MissingFileError(f"data.images={images} does not exist: give the folder of the pictures")
        if limit is not None and limit < 1:
            raise UserError(f"data.limit={limit} must be a positive number of conversations, or null for all")
        self.name = name or path.stem
        self.metric_names = tuple(metrics)
        self.max_new_tokens = max_new_tokens
        self.dropped: Counter[str] = Counter()
        self._one, self._history, self._seed, self._suffix = rounds == "one", history, seed, suffix
        raw = _read(path)
        if limit is not None and limit < len(raw):
            raw = [raw[i] for i in sorted(random.Random(seed).sample(range(len(raw)), limit))]
        entries = self._present(self._learnable(raw, path), missing == "drop")
        self._ids = pa.array([entry.id for entry in entries], pa.large_string())
        self._pictures = pa.array([entry.picture for entry in entries], pa.large_string())
        self._texts = pa.array([text for e in entries for both in e.rounds for text in both], pa.large_string())
        """Question and answer of every round, in turns."""
        self._entry_of = array("q", (i for i, entry in enumerate(entries) for _ in entry.rounds))
        """The entry of each round."""
        self._use(array("q", range(len(self._entry_of))))
        if not len(self):
            reasons = ", ".join(f"{n} {reason}" for reason, n in self.dropped.items()) or "it is empty"
            raise UserError(f"{path}: nothing in it can be learned from ({reasons})")

    def __len__(self) -> int:
        return len(self._begin) - 1 if self._one else len(self._usable)

    def __getitem__(self, index: int) -> Sample:
        return self.at(index, 0)

    def at(self, index: int, epoch: int) -> Sample:
        """The sample of an epoch: with `rounds="one"` epochs differ in the round that is drawn."""
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        if not self._one:
            return self._sample(self._usable[index])
        begin, end = self._begin[index], self._begin[index + 1]
        drawn = random.Random(f"{self._seed}|{epoch}|{self._entry_of[self._usable[begin]]}").randrange(begin, end)
        return self._sample(self._usable[drawn])

    def keep(self, fits: Callable[[Sample], bool], reason: str) -> None:
        """Drops the rounds that do not fit, and counts them in `dropped` under the reason."""
        usable = array("q", (number for number in self._usable if fits(self._sample(number))))
        if lost := len(self._usable) - len(usable):
            self.dropped[reason] += lost
        self._use(usable)

    def _use(self, usable: "array[int]") -> None:
        self._usable = usable
        owners = [self._entry_of[number] for number in usable]
        starts = (i for i, owner in enumerate(owners) if i == 0 or owner != owners[i - 1])
        self._begin = array("q", [*starts, len(usable)])

    def _sample(self, number: int) -> Sample:
        """The sample of a round."""
        entry = self._entry_of[number]
        first = number
        while first > 0 and self._entry_of[first - 1] == entry:
            first -= 1
        question, answer = (self._texts[2 * number + i].as_py() for i in (0, 1))
        picture = self._pictures[entry].as_py()
        before = range(2 * first, 2 * number) if self._history else ()
        return Sample(
            id=f"{self._ids[entry].as_py()}#{number - first}",
            dataset=self.name,
            split=self.split,
            load_image=PictureFile(self._images / picture),
            size=None,
            question=question,
            prompt=question + self._suffix,
            answers=(answer,),
            history=tuple(self._texts[i].as_py() for i in before),
            meta={"picture": picture},
        )

    def _learnable(self, raw: Sequence[Any], path: Path) -> Iterator[_Entry]:
        for number, fields in enumerate(raw):
            where = f"{path}, entry {number}"
            if not isinstance(fields, dict):
                raise UserError(f"{where}: must be an object with image and conversations, not {fields!r:.60}")
            pictures = _pictures(fields, where)
            rounds = list(_rounds(fields.get("conversations"), where))
            if len(pictures) != 1:
                self.dropped["with several pictures" if pictures else "without a picture"] += 1
            elif not rounds:
                turns = fields["conversations"]
                answered = any(turn.get("from") in ASSISTANT and turn["value"].strip() for turn in turns)
                self.dropped["without a question" if answered else "without an answer"] += 1
            else:
                yield _Entry(f"{number}:{fields.get('id', '')}", str(pictures[0]), rounds)

    def _present(self, entries: Iterable[_Entry], drop: bool) -> list[_Entry]:
        """The entries whose picture exists. Listing each folder once is faster than a look-up for every file."""
        listed: dict[str, frozenset[str]] = {}
        found: list[_Entry] = []
        absent: list[_Entry] = []
        for entry in entries:
            relative = Path(entry.picture)
            if relative.is_absolute() or ".." in relative.parts:
                raise UserError(f"picture {entry.picture!r} is outside {self._images}: give paths that start there")
            folder = str(relative.parent)
            if folder not in listed:
                inside = self._images / folder
                listed[folder] = frozenset(os.listdir(inside) if inside.is_dir() else ())
            (found if relative.name in listed[folder] else absent).append(entry)
        if absent and not drop:
            raise MissingFileError(
                f"{len(absent)} of {len(absent) + len(found)} pictures are not in {self._images}, the first is "
                f"{absent[0].picture}: add them, or give data.missing=drop"
            )
        if absent:
            self.dropped["whose picture is missing"] = len(absent)
        return found


def _pictures(fields: dict[str, Any], where: str) -> list[str]:
    """The paths in "image", or in "images" as other tools write it; null and "" are none."""
    given = fields.get("image")
    given = fields.get("images") if given in (None, "", []) else given
    given = [] if given in (None, "") else given
    pictures = [given] if isinstance(given, str) else given
    if not isinstance(pictures, list) or not all(isinstance(picture, str) and picture for picture in pictures):
        raise UserError(f"{where}: image must be the path of a picture or a list of paths, not {given!r:.60}")
    return pictures


def _read(path: Path) -> list[Any]:
    """The entries of a JSON list or of JSON lines."""
    try:
        text = path.read_text(encoding="utf-8-sig")
        if text.lstrip().startswith("["):
            entries: list[Any] = parse_json(text)
            return entries
        # Not `splitlines`: a text in JSON may hold other ends of lines, U+2028 for example.
        return [parse_json(line) for line in text.split("\n") if line.strip()]
    except ValueError as error:
        raise UserError(f"{path} is neither a JSON list nor JSON lines ({error})") from None


def _rounds(turns: Any, where: str) -> Iterator[tuple[str, str]]:
    """Pairs of a user turn and the answer that directly follows it; user turns without an answer are left out."""
    if not isinstance(turns, list):
        raise UserError(f"{where}: needs conversations, a list of turns")
    asked = None
    for turn in turns:
        if not isinstance(turn, dict) or not isinstance(turn.get("value"), str):
            raise UserError(f"{where}: a turn must be an object with from and value, not {turn!r:.60}")
        speaker, text = turn.get("from"), turn["value"].replace(PLACEHOLDER, "").strip()
        if len(text) > MOST_CHARACTERS:
            raise UserError(f"{where}: a turn of {len(text):,} characters; give at most {MOST_CHARACTERS:,}")
        if speaker in USER:
            asked = text
        elif speaker in ASSISTANT:
            if asked and text:
                yield asked, text
            asked = None
        elif speaker != "system":
            raise UserError(f"{where}: a turn is from {speaker!r}: it must be from human or gpt")

"""A public benchmark as a dataset, read from the hub, from its official files or from a folder."""

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from experiments.data.benchmarks import hub as hub_source
from experiments.data.benchmarks.official_files import Chartqa, Docvqa, Infovqa, Item, Raw, Reader, Textvqa, Vqav2
from experiments.data.folder import read_folder
from experiments.data.image_io import PictureFile
from experiments.data.metadata_files import DEFAULT, NAMES, find_metadata
from experiments.data.sample import Sample, SampleList
from shirg import MissingFileError, UserError

READERS: Mapping[str, Reader] = {
    "chartqa": Chartqa(),
    "docvqa": Docvqa(),
    "infovqa": Infovqa(),
    "textvqa": Textvqa(),
    "vqav2": Vqav2(),
}

Source = Literal["hub", "disk", "folder"]


class Benchmark(SampleList):
    """One split of a benchmark; docs/data.md has the layouts.

    Args:
        name: which benchmark: chartqa, docvqa, infovqa, textvqa or vqav2.
        source: "hub", a dataset repository; "disk", the official files; "folder", pictures with a metadata.jsonl.
        split: "train", "val", "test" or any other split of the source. A folder that has no subfolders for splits is
            used whole.
        root: the folder of the files, or one that has a folder of the benchmark's name, for "disk" and "folder".
        hub: repositories in order of preference, for "hub"; see `experiments.data.benchmarks.hub.candidates`.
        streaming: fetch pictures one row group at a time instead of downloading the split, for "hub".
        suffix: appended to each question in the prompt.
        capitalise: write the question with one capital letter, the first, as lmms-eval does for TextVQA.
        max_new_tokens: longest answer in tokens.
        metrics: names of `experiments.metrics`; the first is the headline.
        answer_rule: which part of the generated text is the answer: "whole" or "final".

    Raises:
        MissingFileError: the split, its files or a picture is not there.
        UserError: the split does not exist, is empty, or has questions without answers.
    """

    def __init__(
        self,
        *,
        name: str,
        split: str,
        suffix: str,
        max_new_tokens: int,
        metrics: Sequence[str],
        source: Source = "hub",
        root: str | None = None,
        hub: Any = (),
        streaming: bool = True,
        capitalise: bool = False,
        answer_rule: str = "whole",
    ) -> None:
        if name not in READERS:
            raise UserError(f"data.name={name} does not exist: choose one of {', '.join(READERS)}")
        split = "val" if split == "validation" else split
        self.name = name
        self.split = split
        self.metric_names = tuple(metrics)
        self.max_new_tokens = max_new_tokens
        self.answer_rule = answer_rule
        raws, self.provenance = read(READERS[name], name, source, split, root, hub, streaming)
        items = [READERS[name].item(raw) for raw in raws]
        super().__init__(samples(name, split, raws, items, suffix=suffix, capitalise=capitalise))


def read(
    reader: Reader, name: str, source: str, split: str, root: str | None, hub: Any, streaming: bool
) -> tuple[list[Raw], Mapping[str, str]]:
    """The rows of a split, and where they came from."""
    if source == "hub":
        if root is not None:
            raise UserError(f"data.root={root} is not read with data.source=hub: give data.source=disk or folder")
        found = hub_source.find(hub_source.candidates(hub), split)
        raws = hub_source.read_hub(found, reader.columns, streaming)
        where = {"id": found.candidate.id, "split": found.split, "revision": found.revision}
        return _checked(raws, found.name), {"source": source, **where}
    if root is None:
        raise UserError(f"data.source={source} needs data.root=DIR, the folder of the {name} files")
    # One root may hold all benchmarks, each in a folder of its name, so that one sweep can read them all.
    folder = next((f for f in (Path(root) / name, Path(root)) if os.path.isdir(f)), None)
    if folder is None:
        raise MissingFileError(f"data.root={root!s:.200} does not exist: give the folder of the {name} files")
    raws = list(reader.disk(folder, split)) if source == "disk" else _folder_rows(folder, split)
    return _checked(raws, f"{name} ({split}) in {folder}"), {"source": source}


def samples(
    name: str, split: str, raws: Sequence[Raw], items: Sequence[Item], *, suffix: str, capitalise: bool = False
) -> list[Sample]:
    """Samples of the rows; all must have answers and unique ids."""
    silent = [raw.where for raw, item in zip(raws, items, strict=True) if not item.answers]
    if silent:
        raise UserError(
            f"{name} ({split}): {len(silent)} of {len(items)} questions have no answers, the first is {silent[0]}; "
            "choose a split whose answers are public, such as data.split=val"
        )
    numbered: Counter[str] = Counter()
    made: dict[str, Sample] = {}
    for raw, item in zip(raws, items, strict=True):
        number = numbered[item.subtask]
        numbered[item.subtask] += 1
        key = item.id if item.id is not None else "/".join(filter(None, (split, item.subtask, str(number))))
        if key in made:
            raise UserError(f"{raw.where}: the id {key} is taken already; ids must be unique")
        asked = item.question.capitalize() if capitalise else item.question
        made[key] = Sample(
            id=key,
            dataset=name,
            split=split,
            load_image=raw.load_image,
            size=None,
            question=item.question,
            prompt=asked + suffix,
            answers=item.answers,
            target=item.target,
            subtask=item.subtask,
            boxes=item.boxes,
            meta={"picture": item.picture or raw.picture, **item.meta},
        )
    return list(made.values())


def _folder_rows(root: Path, split: str) -> list[Raw]:
    """A folder of the split's name in the root, or the root itself where it is one set of pictures."""
    folder = root / split
    path = find_metadata(folder)
    if path is None:
        folder, path = root, find_metadata(root)
    if path is None:
        others = sorted({found.parent.name for name in NAMES for found in root.glob(f"*/{name}")})
        raise MissingFileError(
            f"data.split={split} does not exist in {root}: "
            + (f"it has {', '.join(others)}" if others else f"there is no {DEFAULT} in it")
        )
    return [
        Raw(
            fields={**row.fields, "id": row.id, "question": row.question, "answers": row.answers},
            where=f"{path}, {row.id}",
            picture=row.file_name,
            load_image=PictureFile(row.path),
        )
        for row in read_folder(folder)
    ]


def _checked(raws: list[Raw], where: str) -> list[Raw]:
    if not raws:
        raise UserError(f"{where} is empty: there are no questions in it")
    return raws

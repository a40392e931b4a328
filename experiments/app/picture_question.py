"""What somebody asks on the page, the folder that it is stored in, and the words of eval.py that mean the same.

A question becomes a dataset of one sample (`data=folder`), so that the page and the command that it prints read the
same file in the same way.
"""

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from experiments.atomic_files import write_atomic
from experiments.data.image_io import digest_of, read_picture
from experiments.data.sample import Box
from experiments.override_grammar import command_line, quote
from experiments.schema import CONF
from shirg import MissingFileError, UserError

MOST_SELECTORS = 4
UNKNOWN = "unknown"
"""Stands in the metadata for the answer to a question that nobody has answered: data=folder needs one."""
DEFAULT_MODEL, DEFAULT_RELEVANCE, DEFAULT_DECODE = "tiny", "lm_embed", "default"
DEFAULT_SELECTORS = ("pooled", "saint", "shirg")
ANSWER_ONLY = "\nAnswer the question using a single word or phrase."
"""What the published models were asked behind a question, the default of data=folder."""
LONGEST_ANSWER = 16
"""Tokens of an answer about a picture of the user's, the default of data=folder."""


@dataclass(frozen=True, kw_only=True)
class PictureQuestion:
    """One picture, one question and the systems that answer it."""

    picture: Path | None
    text: str
    answer: str = ""
    """The right answer; "" where it is not known."""
    boxes: tuple[Box, ...] = ()
    """Where the answer is, in fractions of the picture."""
    model: str = DEFAULT_MODEL
    """An option of the group model; anything else is the folder or the hub id of a checkpoint."""
    selectors: tuple[str, ...] = DEFAULT_SELECTORS
    budget: int = 100
    """Tokens per picture, in per cent of the model's base budget."""
    relevance: str = DEFAULT_RELEVANCE
    decode: str = DEFAULT_DECODE
    longest: int = LONGEST_ANSWER
    """Tokens of the answer."""
    suffix: str = ""
    """Put behind the question in the prompt."""
    adapter: bool = False
    """Whether each selector gets the LoRA adapter that was trained for it."""

    def check(self) -> None:
        """Refuses what can be seen without a model.

        Raises:
            UserError: says what is missing.
        """
        if self.picture is None:
            raise UserError("there is no picture: choose one of the samples or upload one")
        if not self.picture.is_file():
            raise MissingFileError(f"{self.picture.name}: the picture is no longer there; upload it again")
        if not self.text.strip():
            ranks = "" if self.relevance == "none" else f", and relevance={self.relevance} ranks tokens by it"
            raise UserError(f"the question is empty: type one; the model answers it{ranks}")
        if not self.model.strip():
            raise UserError("there is no model: choose one, or type the folder or the hub id of a checkpoint")
        if not 1 <= len(self.selectors) <= MOST_SELECTORS:
            raise UserError(f"{len(self.selectors)} selectors are chosen: choose 1 to {MOST_SELECTORS}")

    @property
    def digest(self) -> str:
        """Names the picture with its question: 8 hex digits."""
        assert self.picture is not None
        texts = "\0".join((self.text, self.answer)).encode()
        return digest_of(digest_of(self.picture.read_bytes()).encode() + texts)[:8]

    def store(self, place: Path) -> Path:
        """Writes the picture and its question into a folder below `place`, as data=folder reads them.

        Raises:
            UserError: a question that cannot be asked, or a file that is no picture.
        """
        self.check()
        assert self.picture is not None
        read_picture(self.picture.read_bytes(), self.picture.name)
        folder = place / self.digest
        folder.mkdir(parents=True, exist_ok=True)
        suffix = self.picture.suffix.lower()
        name = f"picture{suffix}" if suffix[1:].isalnum() else "picture"
        shutil.copyfile(self.picture, folder / name)
        row = {"file_name": name, "question": self.text, "answers": [self.answer.strip() or UNKNOWN]}
        write_atomic(folder / "metadata.jsonl", f"{json.dumps(row)}\n".encode(), durable=False)
        return folder

    def words(self, folder: Path, base: Sequence[str]) -> list[str]:
        """The overrides of eval.py that stand for all but the selector; what is a default there is left out.

        Args:
            folder: where the question is stored.
            base: overrides that the page was started with.
        """
        words = [*self._model_words(), *base]
        if self.budget != 100:
            words.append(f"budget={Fraction(self.budget, 100)} base")
        if self.relevance != DEFAULT_RELEVANCE:
            words.append(f"relevance={quote(self.relevance)}")
        if self.decode != DEFAULT_DECODE:
            words.append(f"decode={quote(self.decode)}")
        if self.adapter:
            words.append("adapter=own")
        words += ["data=folder", f"data.root={quote(str(folder))}"]
        if self.suffix != ANSWER_ONLY:
            words.append(f"data.suffix={quote(self.suffix) if self.suffix else ''}")  # Hydra reads '' as an empty text
        if self.longest != LONGEST_ANSWER:
            words.append(f"data.max_new_tokens={self.longest}")
        return words

    def _model_words(self) -> list[str]:
        model = self.model.strip()
        if "/" not in model and (CONF / "model" / f"{model}.yaml").is_file():
            return [] if model == DEFAULT_MODEL else [f"model={model}"]
        return ["model=lavida_8b", f"model.path={quote(model)}"]

    def command(self, folder: Path, base: Sequence[str]) -> str:
        """The command that answers the question with every selector and writes a table and a report."""
        sweep = ["-m"] if len(self.selectors) > 1 else []
        words = [f"study=app_{folder.name}", "resume=true", *self.words(folder, base)]
        return command_line("eval", [*sweep, *words, f"selector={','.join(self.selectors)}"])

"""`relevance=learned`: a trained head on top of another relevance, and the files that hold it.

    relevance.json          "head": its options; "residual_on": the relevance that it corrects; "base": the fingerprint
                            of the model; "family": the language model
    relevance.safetensors   its parameters, and mean and standard deviation of the encoder states

The folder may be an adapter's: the names of its files are others. The head is never merged into the model.

Shape letters: B prompts, N source tokens, W width of word embeddings.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from lavida_adapter.checkpoint import fingerprint
from lavida_adapter.checkpoint_files import read_json, saving, share_like
from lavida_adapter.modules import LavidaModules
from lavida_adapter.relevance import MeanWord, Relevance, RelevanceContext
from shirg import MissingFileError, UserError, VisionFeatures
from shirg.relevance_head import RelevanceHead, question_vector

META, WEIGHTS = "relevance.json", "relevance.safetensors"


class Learned:
    """Scores of a trained head, which corrects a base relevance or stands alone.

    Args:
        base: the relevance that the head corrects; None for a head without one.
        path: folder of the head, for whoever loads it (`load`); None leaves it to the caller.
    """

    space = "learned"

    def __init__(self, *, base: Relevance | None = None, path: str | Path | None = None) -> None:
        self.base, self.path = base, path
        self._head: RelevanceHead | None = None
        self._mean_word = MeanWord()

    @property
    def head(self) -> RelevanceHead:
        if self._head is None:
            raise UserError("relevance=learned has no head yet: load one (Learned.load), or train it (stage=gate)")
        return self._head

    @property
    def reads_question(self) -> bool:
        return self.head.reads_question or (self.base is not None and self.base.reads_question)

    def __call__(self, features: VisionFeatures, context: RelevanceContext) -> Tensor:
        """Scores [B, N], float32; with a graph where gradients are enabled and the head is trained."""
        base_BN = None if self.base is None else self.base(features, context)
        return self.head(features.tokens_BND, features.valid_BN, self.question(context), base_BN)

    def question(self, context: RelevanceContext) -> Tensor | None:
        """What the head reads of each question [B, W]; None for one that reads none."""
        return self.asked(context) if self.head.reads_question else None

    def asked(self, context: RelevanceContext) -> Tensor:
        """The question vectors [B, W]."""
        with torch.no_grad():
            words = [context.embedding(ids) for ids in context.questions]
            return question_vector(words, self._mean_word(context.embedding.weight))

    def fresh(self, model: LavidaModules, options: Mapping[str, Any]) -> RelevanceHead:
        """An untrained head for a model, which this provider uses from now on; `options`: hidden, question."""
        config = model.config
        self._head = RelevanceHead(
            states=config.vision.hidden_size, words=config.lm.d_model, base=self.base is not None, **options
        ).to(model.device)
        return self._head

    def load(self, folder: str | Path, model: LavidaModules) -> None:
        """Loads the head of a folder that was trained for a model, or for it before it got an adapter.

        Raises:
            MissingFileError: there is no head in the folder.
            UserError: one of another base model or relevance, or damaged files.
        """
        folder = Path(folder)
        if not holds_head(folder):
            raise MissingFileError(
                f"{folder!s:.200} holds no relevance head ({META} and {WEIGHTS}): train one with train.py stage=gate, "
                "and give its folder as relevance.path"
            )
        meta, tensors = _read(folder)
        if meta["residual_on"] != (given := name_of(self.base)):
            raise UserError(
                f"the relevance head in {folder} corrects {meta['residual_on']}, and relevance.base is {given}: give "
                "the same"
            )
        if meta["family"] != model.config.lm.family or meta["base"] != base_of(model):
            raise UserError(
                f"the relevance head in {folder} was trained on another base checkpoint: load that one (model.path=)"
            )
        try:
            with torch.device("meta"):
                head = RelevanceHead(**meta["head"])
        except TypeError as error:
            raise UserError(f"the relevance head in {folder} cannot be read ({error}): train it again") from error
        wanted = {name: t.shape for name, t in head.state_dict().items()}
        sizes = model.config.vision.hidden_size, model.config.lm.d_model
        if {n: t.shape for n, t in tensors.items()} != wanted or sizes != tuple(meta["head"][n] for n in _WIDTHS):
            raise UserError(
                f"the tensors in {folder / WEIGHTS} are not those of a head for states of width {sizes[0]} and words "
                f"of width {sizes[1]}: train one for this model"
            )
        head.load_state_dict(tensors, assign=True)
        self._head = head.to(model.device).eval().requires_grad_(False)

    def save(self, folder: str | Path, model: LavidaModules, *, base: str | None = None) -> None:
        """Writes the head; one that is in the folder is replaced. `base`: the fingerprint of the base, if known."""
        folder, family = Path(folder), model.config.lm.family
        base = base_of(model) if base is None else base
        meta = {"head": self.head.options, "residual_on": name_of(self.base), "base": base, "family": family}
        tensors = {name: t.detach().cpu().contiguous() for name, t in self.head.state_dict().items()}
        with saving(folder) as temporary:
            save_file(tensors, temporary / WEIGHTS, metadata={"format": "pt"})
            (temporary / META).write_text(json.dumps(meta, indent=2) + "\n")
            share_like(temporary / META, temporary / WEIGHTS)
            # Without META a folder holds no head: a kill from here on leaves none, never files of two heads.
            (folder / META).unlink(missing_ok=True)
            for name in (WEIGHTS, META):
                (temporary / name).replace(folder / name)


_WIDTHS = ("states", "words")


def base_of(model: LavidaModules) -> str:
    """The fingerprint of a model as it was before it got an adapter."""
    return fingerprint(model) if model.base is None else model.base


def holds_head(folder: Path) -> bool:
    return os.path.isfile(folder / META) and os.path.isfile(folder / WEIGHTS)


def name_of(base: Relevance | None) -> str:
    """What a head corrects, as its file says it: the provider, and how it sums up the words of a question."""
    if base is None:
        return "nothing"
    agg = getattr(base, "agg", None)
    return type(base).__name__ + ("" if agg is None else f" (agg={agg})")


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The description and the tensors of a head.

    Raises:
        UserError: damaged files; numbers that are not finite.
    """
    try:
        meta, tensors = read_json(folder / META), load_file(folder / WEIGHTS)
        missing = {"head", "residual_on", "base", "family"} - meta.keys()
        if missing or not isinstance(meta["head"], dict) or not set(_WIDTHS) <= meta["head"].keys():
            raise ValueError(f"{META} lacks {', '.join(sorted(missing)) or 'sizes'}")
    except (ValueError, AttributeError, SafetensorError) as error:
        raise UserError(f"the relevance head in {folder} cannot be read ({error}): train it again") from error
    if broken := [n for n, t in tensors.items() if not (t.is_floating_point() and t.isfinite().all())]:
        raise UserError(f"{folder / WEIGHTS} has NaN, infinity or whole numbers in {broken[0]}: train the head again")
    return meta, tensors

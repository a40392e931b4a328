"""Infilling: a text with gaps becomes a draft of token ids, and a filled draft becomes text again.

docs/lavida.md, "Other checkpoints". In the text `[MASK:5]` is a gap of exactly five tokens and `[GAP]` one of any
length up to `GAP_LENGTH` tokens, `[GAP:30]` up to 30; a backslash before the bracket makes it plain text.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lavida_adapter.config import LavidaConfig
from lavida_adapter.decode_config import DecodeConfig
from lavida_adapter.prompt import encode_text, template_of
from shirg import UserError

GAP_LENGTH = 16
"""Most tokens of a gap of free length that does not say it."""
INFILL = DecodeConfig(max_new_tokens=256, schedule="shift", shift=1 / 3)
"""How drafts are filled unless the caller says otherwise, as with the published infilling checkpoint."""

_GAP = re.compile(r"(\\*)\[(MASK|GAP)(?::([^\]\n]*))?\]")


@dataclass(frozen=True)
class Gap:
    """Consecutive masks of a draft."""

    start: int
    """Its first slot."""
    length: int
    is_free: bool
    """Whether it may hold less text than slots; then the infill token follows it."""


@dataclass(frozen=True)
class Infilled:
    """A text whose gaps are filled."""

    text: str
    gaps: tuple[str, ...]
    """What each gap got, without the space around it."""


@dataclass(frozen=True)
class Draft:
    """The beginning of an answer: fixed tokens, masks to fill, and the end of the turn."""

    ids: tuple[int, ...]
    gaps: tuple[Gap, ...]

    def filled(self, ids: Sequence[int], tokenizer: Any, config: LavidaConfig) -> Infilled:
        """The text of a filled draft. What `ids`, an answer, has behind the draft does not belong to it."""
        parts = [ids[gap.start : gap.start + gap.length] for gap in self.gaps]
        return Infilled(
            text_of(ids[: len(self.ids)], tokenizer, config),
            tuple(text_of(part, tokenizer, config) for part in parts),
        )


def make_draft(template: str, tokenizer: Any, config: LavidaConfig) -> Draft:
    """The draft of a text with gaps. Control tokens that are spelled out in it are plain text.

    Raises:
        UserError: a text without a gap, a gap without a usable length, or one of free length for a language model
            without an infill token.
    """
    ids: list[int] = []
    gaps: list[Gap] = []
    for part in _parts(template):
        if isinstance(part, str):
            ids += encode_text(tokenizer, part)
            continue
        length, is_free = part
        gaps.append(Gap(len(ids), length, is_free))
        ids += [config.lm.mask_token_id] * length
        ids += [_infill_id(tokenizer, config)] if is_free else []
    if not gaps:
        raise UserError(f"the draft {template!r} has no gap to fill: write [MASK:5] for five tokens, or [GAP]")
    return Draft((*ids, *encode_text(tokenizer, template_of(config).end, True)), tuple(gaps))


def _parts(template: str) -> list[str | tuple[int, bool]]:
    """Texts and gaps (length, whether it is free) in their order; neighbouring texts are one."""
    parts: list[str | tuple[int, bool]] = []
    text, end = "", 0
    for found in _GAP.finditer(template):
        text += template[end : found.start()] + "\\" * (len(found[1]) // 2)
        end = found.end()
        if len(found[1]) % 2:
            text += found[0].lstrip("\\")
            continue
        parts += [text] if text else []
        parts.append(_gap(found[2], found[3], found[0].lstrip("\\")))
        text = ""
    text += template[end:]
    return [*parts, text] if text else parts


def _gap(kind: str, length: str | None, written: str) -> tuple[int, bool]:
    if kind == "GAP" and length is None:
        return GAP_LENGTH, True
    if length is None or not re.fullmatch(r"[1-9][0-9]{0,5}", length):
        raise UserError(
            f"the draft's gap {written} needs a number of tokens, such as [{kind}:5]; \\{written} is plain text"
        )
    return int(length), kind == "GAP"


def _infill_id(tokenizer: Any, config: LavidaConfig) -> int:
    """The token behind a gap of free length."""
    template = template_of(config)
    vocabulary = tokenizer.get_vocab()
    if template.infill is None or template.infill not in vocabulary:
        raise UserError(
            f"{template.model} has no infill token to end a gap of free length with: write [MASK:5] for a gap of five "
            "tokens, or choose a model that was trained to infill (model=lavida_fim)"
        )
    return int(vocabulary[template.infill])


def text_of(ids: Sequence[int], tokenizer: Any, config: LavidaConfig) -> str:
    """The text of an answer without special tokens, those for infilling included, and without space around it."""
    template = template_of(config)
    spelled = tokenizer.convert_ids_to_tokens(list(ids))
    kept = [i for i, token in zip(ids, spelled, strict=True) if token not in (template.infill, template.fill)]
    text: str = tokenizer.decode(kept, skip_special_tokens=True)
    return text.strip()

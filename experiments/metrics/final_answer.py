"""Which part of a generated text is the answer: all of it, what follows "Answer:", or what was filled in.

docs/data.md, "Answers in longer texts".
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from shirg import UserError

AnswerRule = Literal["whole", "final", "gaps"]

_MARK = re.compile(r"\banswer[ \t]*\**[ \t]*[:：][ \t]*\**", re.IGNORECASE)
"""\"Answer:\" in any case, also as Markdown writes it in bold."""


@dataclass(frozen=True)
class Extracted:
    """An answer, and whether the text had one where the rule looks; None for a rule that always finds one."""

    answer: str
    found: bool | None = None


def check_rule(rule: str) -> AnswerRule:
    """The rule of that name; raises UserError for another name."""
    for known in get_args(AnswerRule):
        if rule == known:
            return known
    raise UserError(f"data.answer_rule={rule!r}: choose one of {', '.join(get_args(AnswerRule))}")


def extract(rule: AnswerRule, text: str, gaps: Sequence[str] = ()) -> Extracted:
    """The answer in a text.

    `whole`: the text. `final`: what follows the last "Answer:" up to the end of that line, or the next line with text
    where that one ends there; without such a mark the last line, which counts as not found. `gaps`: what the gaps of
    the sample's draft got, separated by spaces; a text without a draft counts as not found.
    """
    if rule == "whole":
        return Extracted(text)
    if rule == "gaps":
        return Extracted(" ".join(gaps) if gaps else text, bool(gaps))
    ends = [mark.end() for mark in _MARK.finditer(text)]
    lines = [line.strip() for line in text[ends[-1] if ends else 0 :].splitlines() if line.strip()]
    if not ends:
        return Extracted(lines[-1] if lines else "", False)
    answer = lines[0].removesuffix("**").strip() if lines else ""
    return Extracted(answer, bool(answer))

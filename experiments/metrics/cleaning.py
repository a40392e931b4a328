"""Answers without the wrapping that a metric would trip over; scored beside the raw text, never instead of it."""

import re

CLEANER = "clean_answer/1"
"""Name and version; results carry it. Change the number with the rules."""

_LEAD = re.compile(r"^(?:the answer is|answer is|answer)\s*:?\s+|^answer:", re.IGNORECASE)
_QUOTES = {'"': '"', "'": "'", "“": "”", "‘": "’", "`": "`"}
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
_CURRENCY = re.compile(r"[$€£¥₹]\s*(?=[-+]?[\d.])|(?<=\d)\s*[$€£¥₹]")


def clean_answer(text: str) -> str:
    """The text without a leading "the answer is" or "answer:", one pair of quotes around it, one trailing period,
    commas between thousands, and currency signs next to a number.

    A percent sign stays: without it the value would be another. Numbers keep their digits and signs.
    """
    text = _LEAD.sub("", text.strip()).strip()
    text = _unquote(text)
    if text.endswith(".") and not text.endswith(".."):
        text = _unquote(text[:-1].rstrip())
    return _CURRENCY.sub("", _THOUSANDS.sub("", text)).strip()


def _unquote(text: str) -> str:
    quoted = len(text) >= 2 and _QUOTES.get(text[0]) == text[-1]
    return text[1:-1].strip() if quoted else text

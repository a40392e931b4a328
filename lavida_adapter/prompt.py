"""The prompt: LLaDA's chat template with a placeholder for the picture, and the targets of a training example.

docs/lavida.md, "Prompt". The template is rendered here and not by the tokenizer, because the texts of a dataset must
stay text: the picture is a placeholder id, and control tokens are recognised in the template only. A question that
contains "<image>" or "<|eot_id|>" stays a question.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

from lavida_adapter.config import LavidaConfig
from shirg import UserError

IMAGE = -200
"""Placeholder id that the picture's tokens replace."""
IGNORE = -100
"""Label of positions that are not targets."""

BOS, EOT = "<|startoftext|>", "<|eot_id|>"
CONTROL = (BOS, "<|endoftext|>", "<|mdm_mask|>", "<|start_header_id|>", "<|end_header_id|>", EOT)
"""The control tokens of a LLaDA tokenizer."""


@dataclass(frozen=True)
class Example:
    """Token ids of a prompt and its answer; targets are the answer and the closing end-of-turn."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]


class Piece(NamedTuple):
    """A part of a prompt."""

    text: str
    is_template: bool
    """Whether the text of a control token is that token; in a dataset's text it is ordinary text."""


def header(role: str) -> str:
    """The beginning of a turn of "system", "user" or "assistant"."""
    return f"<|start_header_id|>{role}<|end_header_id|>\n\n"


def render(turns: Sequence[str], config: LavidaConfig) -> tuple[tuple[Piece, ...], tuple[Piece, ...]]:
    """The prompt before and after the picture.

    `turns` alternate between user and assistant and end with the user; the picture is at the beginning of the first.
    """
    if not len(turns) % 2:
        raise UserError(f"a conversation of {len(turns)} turns does not end with the user: drop the last turn")
    before = Piece(BOS + header("system") + config.system_prompt.strip() + EOT + header("user"), True)
    # The line break is part of the user's message: both are tokenised as one text.
    texts = ["\n" + turns[0].rstrip(), *(turn.strip() for turn in turns[1:])]
    after: list[Piece] = []
    for i, text in enumerate(texts):
        after += [Piece(text, False), Piece(EOT + header("user" if i % 2 else "assistant"), True)]
    return (before,), tuple(after)


def prompt_ids(
    tokenizer: Any, question: str, config: LavidaConfig, *, history: Sequence[str] = (), training: bool = False
) -> tuple[int, ...]:
    """Ids of the whole prompt with one `IMAGE` placeholder; `history`: earlier turns of user and assistant.

    At inference the reference drops the first token after the picture (the newline); `config.drop_token_after_image`
    reproduces that. Training keeps it.
    """
    chunks = [encode(tokenizer, pieces) for pieces in render([*history, question], config)]
    return join_at_images(chunks, drop_first=config.drop_token_after_image and not training)


def training_example(
    tokenizer: Any, question: str, answer: str, config: LavidaConfig, *, history: Sequence[str] = ()
) -> Example:
    """Ids of one round of a conversation. The answer is stripped, as the template strips every message."""
    text = answer.strip()
    if not text:
        raise UserError(f"the training example {question!r} has an empty answer: drop it from the data")
    prompt = prompt_ids(tokenizer, question, config, history=history, training=True)
    return Example(prompt, encode(tokenizer, [Piece(text, False), Piece(EOT, True)]))


def encode(tokenizer: Any, pieces: Iterable[Piece]) -> tuple[int, ...]:
    """Ids of consecutive pieces; control tokens are recognised in pieces of the template only."""
    return tuple(token for text, is_template in pieces for token in encode_text(tokenizer, text, is_template))


@lru_cache(maxsize=1 << 16)
def encode_text(tokenizer: Any, text: str, is_template: bool = False) -> tuple[int, ...]:
    """Ids of a piece; cached, since prompts share most of theirs. The tokenizer adds no special tokens."""
    return tuple(tokenizer(text, add_special_tokens=False, split_special_tokens=not is_template)["input_ids"])


def join_at_images(chunks: Sequence[tuple[int, ...]], *, drop_first: bool) -> tuple[int, ...]:
    """Joins tokenised chunks with placeholders; `drop_first` drops the first token of every chunk after a picture."""
    ids = chunks[0]
    for chunk in chunks[1:]:
        ids = (*ids, IMAGE, *(chunk[1:] if drop_first else chunk))
    return ids

"""The prompt: LLaDA's chat template, the picture's place in it, and the label span of a training example.

docs/lavida.md, "Prompt". The template is rendered here and not by the tokenizer's own, because what a dataset says must
stay text: the picture is put in as a placeholder id, and control tokens are control tokens only where the template has
them. A question that contains "<image>" or "<|eot_id|>" stays a question.
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
"""Tokens of its own that every LLaDA tokenizer has."""


@dataclass(frozen=True)
class Example:
    """Token ids of a prompt and its answer; targets are the answer and the closing end-of-turn."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]


class Piece(NamedTuple):
    """A stretch of a prompt."""

    text: str
    is_template: bool
    """Whether the spelling of a control token stands for the token; in a dataset's text it stands for itself."""


def header(role: str) -> str:
    """What opens a turn of "system", "user" or "assistant"."""
    return f"<|start_header_id|>{role}<|end_header_id|>\n\n"


def render(turns: Sequence[str], config: LavidaConfig) -> tuple[tuple[Piece, ...], tuple[Piece, ...]]:
    """The prompt before and after the picture.

    `turns` alternate between user and assistant and end with the user; the picture opens the first one.
    """
    if not len(turns) % 2:
        raise UserError(f"a conversation of {len(turns)} turns does not end with the user: drop the last turn")
    before = Piece(BOS + header("system") + config.system_prompt.strip() + EOT + header("user"), True)
    # The line break belongs to the user's message: the two are tokenised as one text.
    texts = ["\n" + turns[0].rstrip(), *(turn.strip() for turn in turns[1:])]
    after: list[Piece] = []
    for i, text in enumerate(texts):
        after += [Piece(text, False), Piece(EOT + header("user" if i % 2 else "assistant"), True)]
    return (before,), tuple(after)


def prompt_ids(
    tokenizer: Any, question: str, config: LavidaConfig, *, history: Sequence[str] = (), training: bool = False
) -> tuple[int, ...]:
    """Ids of the whole prompt with one `IMAGE` placeholder; `history` are the turns before, user and assistant.

    At inference the reference loses the first token after the picture (the newline); `config.drop_token_after_image`
    decides whether that is reproduced. Training has always kept it.
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
    """Ids of pieces in a row; control tokens are recognised in those of the template alone."""
    return tuple(token for text, is_template in pieces for token in encode_text(tokenizer, text, is_template))


@lru_cache(maxsize=1 << 16)
def encode_text(tokenizer: Any, text: str, is_template: bool = False) -> tuple[int, ...]:
    """Ids of a piece; remembered, since prompts share most of theirs. The tokenizer adds nothing by itself."""
    return tuple(tokenizer(text, add_special_tokens=False, split_special_tokens=not is_template)["input_ids"])


def join_at_images(chunks: Sequence[tuple[int, ...]], *, drop_first: bool) -> tuple[int, ...]:
    """Joins tokenised chunks with placeholders; `drop_first` loses the first token of every chunk after a picture."""
    ids = chunks[0]
    for chunk in chunks[1:]:
        ids = (*ids, IMAGE, *(chunk[1:] if drop_first else chunk))
    return ids

"""The prompt: turns in the language model's chat template with placeholders for pictures, and a training example.

docs/lavida.md, "Prompt". The picture is a placeholder id and control tokens are recognised in the template only: a
question that contains "<image>" or "<|eot_id|>" stays a question.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from lavida_adapter.chat_template import ChatTemplate, Piece
from lavida_adapter.config import LavidaConfig
from lavida_adapter.families import FAMILIES
from shirg import UserError

IMAGE = -200
"""Placeholder id that the picture's tokens replace."""
IGNORE = -100
"""Label of positions that are not targets."""


@dataclass(frozen=True)
class Example:
    """Token ids of a prompt and its answer; targets are the answer and the end of its turn."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]


def template_of(config: LavidaConfig) -> ChatTemplate:
    """The chat template of a model's language model."""
    return FAMILIES[config.lm.family].template


def render(turns: Sequence[str], config: LavidaConfig, *, n_images: int = 1) -> tuple[tuple[Piece, ...], ...]:
    """The prompt, cut at the pictures: `n_images` + 1 chunks.

    `turns` alternate between user and assistant and end with the user; the pictures are at the beginning of the first.
    """
    if not len(turns) % 2:
        raise UserError(f"a conversation of {len(turns)} turns does not end with the user: drop the last turn")
    template = template_of(config)
    system = template.content(config.system_prompt)
    opening = Piece(template.start + template.head("system") + system + template.end, True)
    if n_images:
        # The line break is part of the user's message: both are tokenised as one text.
        first = template.content("<image>\n" + turns[0]).removeprefix("<image>")
        chunks = [[opening, Piece(template.head("user"), True)], *([Piece(" ", False)] for _ in range(n_images - 1))]
        chunks.append([Piece(first, False), Piece(template.end, True)])
    else:
        chunks = [[opening, *template.turn("user", turns[0])]]
    for i, text in enumerate(turns[1:]):
        chunks[-1] += template.turn("user" if i % 2 else "assistant", text)
    chunks[-1].append(Piece(template.head("assistant"), True))
    return tuple(map(tuple, chunks))


def prompt_ids(
    tokenizer: Any, question: str, config: LavidaConfig, *, history: Sequence[str] = (), training: bool = False
) -> tuple[int, ...]:
    """Ids of the whole prompt with one `IMAGE` placeholder; `history`: earlier turns of user and assistant.

    At inference LLaDA's reference drops the first token after the picture (the newline);
    `config.drop_token_after_image` reproduces that. Training keeps it.
    """
    chunks = [encode(tokenizer, pieces) for pieces in render([*history, question], config)]
    return join_at_images(chunks, drop_first=bool(config.drop_token_after_image) and not training)


def answer_pieces(answer: str, config: LavidaConfig) -> tuple[Piece, ...]:
    """The targets of a training example: the answer and the end of its turn."""
    template = template_of(config)
    return Piece(template.content(answer), False), Piece(template.end, True)


def training_example(
    tokenizer: Any, question: str, answer: str, config: LavidaConfig, *, history: Sequence[str] = ()
) -> Example:
    """Ids of one round of a conversation. The answer is stripped where the template strips every content."""
    if not answer.strip():
        raise UserError(f"the training example {question!r} has an empty answer: drop it from the data")
    prompt = prompt_ids(tokenizer, question, config, history=history, training=True)
    return Example(prompt, encode(tokenizer, answer_pieces(answer, config)))


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

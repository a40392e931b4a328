"""The prompt: LLaDA's chat template, the picture's place in it, and the label span of a training example.

docs/lavida.md, "Prompt". The template is rendered here and not by the tokenizer's own, because the picture is put in
as a placeholder id and never as text: a question that contains "<image>" stays a question.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from lavida_adapter.config import LavidaConfig

IMAGE = -200
"""Placeholder id that the picture's tokens replace."""
IGNORE = -100
"""Label of positions that are not targets."""

BOS, EOT = "<|startoftext|>", "<|eot_id|>"


@dataclass(frozen=True)
class Example:
    """Token ids of a prompt and its answer; targets are the answer and the closing end-of-turn."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]


def header(role: str) -> str:
    return f"<|start_header_id|>{role}<|end_header_id|>\n\n"


def render(turns: Sequence[str], config: LavidaConfig) -> tuple[str, str]:
    """The prompt as the two texts before and after the picture.

    `turns` alternate between user and assistant and end with the user; the picture opens the first one.
    """
    if not len(turns) % 2:
        raise ValueError(f"a conversation of {len(turns)} turns does not end with the user: drop the last turn")
    before = BOS + header("system") + config.system_prompt.strip() + EOT + header("user")
    after = "\n" + turns[0].rstrip() + EOT
    for i, turn in enumerate(turns[1:]):
        after += header("user" if i % 2 else "assistant") + turn.strip() + EOT
    return before, after + header("assistant")


def prompt_ids(tokenizer: Any, question: str, config: LavidaConfig, *, training: bool = False) -> tuple[int, ...]:
    """Ids of the whole prompt with one `IMAGE` placeholder.

    At inference the reference loses the first token after the picture (the newline); `config.drop_token_after_image`
    decides whether that is reproduced. Training has always kept it.
    """
    chunks = [encode_text(tokenizer, text) for text in render([question], config)]
    return join_at_images(chunks, drop_first=config.drop_token_after_image and not training)


def training_example(tokenizer: Any, question: str, answer: str, config: LavidaConfig) -> Example:
    """Ids of one round of a conversation. The answer is stripped, as the template strips every message."""
    text = answer.strip()
    if not text:
        raise ValueError(f"the training example {question!r} has an empty answer: drop it from the data")
    prompt = prompt_ids(tokenizer, question, config, training=True)
    return Example(prompt, encode_text(tokenizer, text + EOT))


@lru_cache(maxsize=1 << 16)
def encode_text(tokenizer: Any, text: str) -> tuple[int, ...]:
    """Ids of a text whose special tokens are already written out; remembered, since prompts share most of theirs."""
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])


def join_at_images(chunks: Sequence[tuple[int, ...]], *, drop_first: bool) -> tuple[int, ...]:
    """Joins tokenised chunks with placeholders; `drop_first` loses the first token of every chunk after a picture."""
    ids = chunks[0]
    for chunk in chunks[1:]:
        ids = (*ids, IMAGE, *(chunk[1:] if drop_first else chunk))
    return ids

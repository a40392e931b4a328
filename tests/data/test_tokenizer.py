"""The tiny tokenizer: any text survives it, and glyph questions are short."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from experiments.data.synthetic.glyphs import SynthGlyphs
from experiments.data.synthetic.glyphs.scene import CHARS, COLOURS, LETTERS, SHAPES
from experiments.data.synthetic.tokenizer import CONTROL, build_tokenizer, glyph_tokens

TOKENIZER = build_tokenizer()
WORDS = ["digit ", "letter ", "shape ", "kind", "colour", "red", "triangle", "system", "user", "assistant", "\n\n"]


def encode(text: str) -> list[int]:
    return list(TOKENIZER.encode(text))


@settings(max_examples=200, deadline=None)
@given(st.text() | st.lists(st.sampled_from([*WORDS, " ", "\n", "s", "-", "é", "漢"])).map("".join))
def test_any_text_round_trips(text: str) -> None:
    assert TOKENIZER.decode(encode(text)) == text
    assert TOKENIZER.decode(encode(text), skip_special_tokens=True) == text


def test_byte_ids_are_the_bytes() -> None:
    text = "naïve 漢字 \x00\x7f"
    assert encode(text) == list(text.encode())


@pytest.mark.parametrize("task", ["digit", "letter", "shape"])
def test_questions_are_two_tokens_and_answers_one(task: str) -> None:
    data = SynthGlyphs(split="train", n=200, density="dense", tasks=(task,), qa_per_image=2)
    for sample in (data[i] for i in range(200)):
        assert len(encode(sample.prompt)) == 2, sample.prompt
        (answer,) = encode(sample.answers[0])
        assert TOKENIZER.decode([answer, TOKENIZER.eos_token_id], skip_special_tokens=True) == sample.answers[0]


def test_a_word_in_a_question_is_the_same_token_as_in_an_answer() -> None:
    assert encode("digit red")[1:] == encode("red")
    assert encode("letter K")[1:] == encode("K") == [ord("K")]
    assert encode("shape colour")[1:] == encode("colour")


def test_whole_words_only() -> None:
    assert encode("hundred") == list(b"hundred")
    assert encode("a red, red. red!").count(encode("red")[0]) == 3


@pytest.mark.parametrize(
    ("family", "bos", "mask", "prompt", "length"),
    [
        (
            "llada",
            "<|startoftext|>",
            "<|mdm_mask|>",
            "<|startoftext|><|start_header_id|>user<|end_header_id|>\n\ndigit red<|eot_id|>",
            5,
        ),
        ("dream", "<|beginoftext|>", "<|mask|>", "<|im_start|>user\ndigit red<|im_end|>\n", 4),
    ],
)
def test_special_tokens(family: str, bos: str, mask: str, prompt: str, length: int) -> None:
    words = build_tokenizer(family)
    special = CONTROL[family].special
    assert (words.bos_token, words.mask_token) == (bos, mask)
    assert words.eos_token == words.pad_token == "<|endoftext|>"
    ids = words.convert_tokens_to_ids(list(special))
    assert len(set(ids)) == len(special) and min(ids) >= 256
    assert {bos, mask, "<|endoftext|>"} <= set(special)
    encoded = words.encode(prompt, add_special_tokens=False)
    assert len(encoded) == length
    assert words.decode(encoded) == prompt
    assert words.decode(encoded, skip_special_tokens=True) == "digit red"
    assert [len(words.encode(text, add_special_tokens=False)) for text in CONTROL[family].joined] == [1] * len(
        CONTROL[family].joined
    )


def test_nothing_is_added() -> None:
    batch = TOKENIZER("red")
    assert batch["input_ids"] == encode("red") and len(batch["input_ids"]) == 1
    assert encode("") == []
    padded = TOKENIZER(["red", "K7"], padding=True)
    assert padded["input_ids"][0][1] == TOKENIZER.pad_token_id
    assert padded["attention_mask"] == [[1, 0], [1, 1]]


def test_saved_in_the_published_format(tmp_path: Path) -> None:
    TOKENIZER.save_pretrained(tmp_path)
    assert {"tokenizer.json", "tokenizer_config.json"} <= {path.name for path in tmp_path.iterdir()}
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["mask_token"] == "<|mdm_mask|>"
    text = "<|startoftext|>system\n\nletter K, été 漢<|eot_id|>"
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.encode(text) == encode(text) and loaded.decode(loaded.encode(text)) == text
    assert len(loaded) == len(TOKENIZER) < 330
    assert (loaded.eos_token_id, loaded.mask_token_id) == (TOKENIZER.eos_token_id, TOKENIZER.mask_token_id)
    assert Tokenizer.from_file(str(tmp_path / "tokenizer.json")).encode(text).ids == encode(text)


def test_glyph_tokens() -> None:
    tokens = glyph_tokens(TOKENIZER)
    assert tokens.blank == ord(" ") == tokens.char[0] == tokens.colour[0] == tokens.shape[0]
    assert [TOKENIZER.decode([t]) for t in tokens.char[1:]] == list(CHARS[1:])
    assert [TOKENIZER.decode([t]) for t in tokens.colour[1:]] == list(COLOURS[1:])
    assert [TOKENIZER.decode([t]) for t in tokens.shape[1:]] == list(SHAPES[1:])
    assert [tokens.task[0], tokens.colour[1]] == encode("digit red")
    assert [tokens.task[1], tokens.char[CHARS.index(LETTERS[0])]] == encode(f"letter {LETTERS[0]}")
    assert [tokens.task[2], tokens.aspect[1]] == encode("shape colour")
    every = {*tokens.char[1:], *tokens.colour[1:], *tokens.shape[1:], *tokens.task, *tokens.aspect, tokens.blank}
    assert len(every) == 46 + 8 + 3 + 3 + 2 + 1

"""A tokenizer from vocabulary and merges equals the one that transformers has for Qwen2; what is refused."""

import json
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import ByteLevelBPETokenizer
from transformers import Qwen2Tokenizer

from lavida_adapter import Lavida, LavidaConfig
from lavida_adapter.chat_template import DREAM
from lavida_adapter.families import FAMILIES
from lavida_adapter.tokenizer_files import ADDED, MERGES, SETTINGS, VOCABULARY, from_vocabulary, load_tokenizer, n_rows
from shirg import MissingFileError, UserError
from tests.lavida_adapter.tiny import tiny_config, tiny_model

TEXT = (
    "The student's book, we'll see, they're here, I'd say I'm IT'S DON'T\n\n  two  spaces\t\tand tabs 1234567890 3.14 "
    "été café naïve Ünïcödé 漢字かな交じり文 한국어 русский текст العربية हिन्दी 🙂🙃 == != -> /* code */ "
    "{x: [1, 2]}\r\n end  \n"
) * 3
ADDED_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<tool_call>", "<|beginoftext|>", "<|mask|>")
SPECIAL = tuple(token for token in ADDED_TOKENS if token.startswith("<|"))
PRETOKENS = FAMILIES["dream"].pretokens or ""
PIECES = [
    *("'s", "'S", "'re", "'LL", "'d", "'ſ", "’s", "don't", "\n", "\r\n", "\n\n", " \n", "  ", "\t", "\u00a0", "\u3000"),
    *("é", "e\u0301", "\u0301", "ﬁ", "Å", "\u212b", "각", "ᄀ", "ᅡ", "漢字", "7", "٣", "½", "x²", "🙂", "\u200d"),
    *("...\n", "!?", " a", "_", "\x00"),
    *ADDED_TOKENS,
]


def written(folder: Path) -> Path:
    """Vocabulary, merges and added tokens as a repository of Dream has them, learned from a short text."""
    folder.mkdir(parents=True)
    learned = ByteLevelBPETokenizer()
    learned.train_from_iterator([TEXT], vocab_size=400, min_frequency=1, show_progress=False)
    learned.save_model(str(folder))
    first = len(json.loads((folder / VOCABULARY).read_text()))
    ids = {token: first + i for i, token in enumerate(ADDED_TOKENS)}
    (folder / ADDED).write_text(json.dumps(ids))
    how = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    described = {str(i): {"content": token, **how, "special": token in SPECIAL} for token, i in ids.items()}
    settings = {"tokenizer_class": "DreamTokenizer", "added_tokens_decoder": described, "eos_token": "<|endoftext|>"}
    settings |= {"auto_map": {"AutoTokenizer": ["tokenization_dream.DreamTokenizer", None]}, "mask_token": "<|mask|>"}
    (folder / SETTINGS).write_text(json.dumps(settings))
    (folder / "tokenization_dream.py").write_text("raise RuntimeError('code of a checkpoint was run')\n")
    return folder


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("dream") / "files")


@pytest.fixture
def folder(files: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(files, tmp_path / "tokenizer"))


def config_of(folder: Path) -> LavidaConfig:
    ids = json.loads((folder / ADDED).read_text())
    ids = {"eos_token_id": ids["<|endoftext|>"], "pad_token_id": ids["<|endoftext|>"], "mask_token_id": ids["<|mask|>"]}
    return tiny_config(lm={"family": "dream", **ids})


@cache
def both(folder: Path) -> tuple[Any, Any]:
    """Ours, and transformers' own with the same added tokens."""
    theirs = Qwen2Tokenizer.from_pretrained(folder, extra_special_tokens=list(SPECIAL))
    return from_vocabulary(folder, PRETOKENS, DREAM), theirs


@settings(max_examples=300, deadline=None)
@given(st.text() | st.lists(st.sampled_from(PIECES) | st.text(max_size=3)).map("".join))
def test_the_same_ids_as_qwen2(files: Path, text: str) -> None:
    ours, theirs = both(files)
    ids = ours(text, add_special_tokens=False)["input_ids"]
    assert ids == theirs(text, add_special_tokens=False)["input_ids"]
    assert ours.decode(ids) == theirs.decode(ids, clean_up_tokenization_spaces=False)


def test_the_merges_are_used(files: Path) -> None:
    """And transformers' tokenizer is the one it should be."""
    ours, theirs = both(files)
    assert theirs.get_vocab() == ours.get_vocab() and len(ours) == 400 + len(ADDED_TOKENS)
    ids = ours(TEXT, add_special_tokens=False)["input_ids"]
    assert len(ids) < 0.6 * len(TEXT.encode()) and ours.decode(ids) == TEXT
    assert ours("e\u0301")["input_ids"] == ours("é")["input_ids"]
    assert len(ours("1234")["input_ids"]) == 4
    assert ours("x<|im_end|>\n")["input_ids"] == [*ours("x")["input_ids"], 402, *ours("\n")["input_ids"]]


def test_a_checkpoint_without_a_tokenizer_file(folder: Path, tmp_path: Path) -> None:
    """Loaded, saved with a tokenizer.json, and loaded again."""
    target = tmp_path / "model"
    lm = config_of(folder).lm
    rows = {"vocab_size": 410, "eos_token_id": lm.eos_token_id, "mask_token_id": lm.mask_token_id}
    model = tiny_model(lm={"family": "dream", **rows})
    model.save_pretrained(target)
    for name in ("tokenizer.json", SETTINGS):
        (target / name).unlink()
    for file in folder.iterdir():
        shutil.copy(file, target)
    loaded = Lavida.from_pretrained(target)
    assert loaded.config.lm.vocab_size == 406 == n_rows(loaded.tokenizer)
    assert loaded.lm.embedding.weight.equal(model.lm.embedding.weight[:406])
    assert loaded.tokenizer.mask_token_id == rows["mask_token_id"] and loaded.tokenizer.eos_token == "<|endoftext|>"
    loaded.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again/tokenizer.json").is_file()
    text = f"{TEXT} <|im_start|>user\n"
    again = Lavida.from_pretrained(tmp_path / "again").tokenizer
    for split in (True, False):
        found, expected = (t(text, split_special_tokens=split)["input_ids"] for t in (again, loaded.tokenizer))
        assert found == expected
    assert len(again("<|mask|>", split_special_tokens=True)["input_ids"]) > 1


def test_ids_alone_are_enough(folder: Path) -> None:
    """Without tokenizer_config.json a token between <| and |> is special; so a dataset's text stays text."""
    (folder / SETTINGS).unlink()
    tokenizer = load_tokenizer(folder, config_of(folder))
    assert len(tokenizer("<|im_end|>", split_special_tokens=True)["input_ids"]) > 1
    assert tokenizer("<tool_call>", split_special_tokens=True)["input_ids"] == [403]
    assert tokenizer.decode([400, 401, 402, 403], skip_special_tokens=True) == "<tool_call>"


def test_control_tokens_are_special_whatever_a_copy_says(folder: Path) -> None:
    settings = json.loads((folder / SETTINGS).read_text())
    for fields in settings["added_tokens_decoder"].values():
        fields["special"] = False
    (folder / SETTINGS).write_text(json.dumps(settings))
    config = config_of(folder)
    made = load_tokenizer(folder, config)
    made.save_pretrained(folder)
    raw = json.loads((folder / "tokenizer.json").read_text())
    for token in raw["added_tokens"]:
        token["special"] = False
    (folder / "tokenizer.json").write_text(json.dumps(raw))
    for tokenizer in (made, load_tokenizer(folder, config)):
        for token, i in json.loads((folder / ADDED).read_text()).items():
            split = tokenizer(token, split_special_tokens=True)["input_ids"]
            assert (len(split) > 1) is (token in DREAM.control), token
            assert tokenizer(token)["input_ids"] == [i]
        assert tokenizer.decode([400, 402, 405, *tokenizer("ok")["input_ids"]], skip_special_tokens=True) == "ok"


def rewritten(name: str, change: Any) -> Any:
    def damage(folder: Path) -> None:
        (folder / name).write_text(change((folder / name).read_text()))

    return damage


CASES: dict[str, tuple[Any, list[str]]] = {
    "no merges": (
        lambda folder: (folder / MERGES).unlink(),
        ["has no tokenizer.json, and no vocab.json and merges.txt"],
    ),
    "no vocabulary": (lambda folder: (folder / VOCABULARY).unlink(), ["has no tokenizer.json, and no vocab.json"]),
    "a merge of one": (rewritten(MERGES, lambda t: t + "alone\n"), ["merges.txt: 'alone' is not a pair of symbols"]),
    "a merge of three": (rewritten(MERGES, lambda t: t + "a b c\n"), ["merges.txt: 'a b c' is not a pair of symbols"]),
    "a merge of unknown": (rewritten(MERGES, lambda t: t + "漢 字\n"), ["the tokenizer files in", "cannot be read"]),
    "no JSON": (rewritten(VOCABULARY, lambda t: t[:-2]), ["vocab.json is not valid JSON"]),
    "a list": (rewritten(VOCABULARY, lambda t: "[]"), ["vocab.json is not a JSON object"]),
    "a shorter vocabulary": (
        rewritten(VOCABULARY, lambda t: json.dumps({k: v for k, v in json.loads(t).items() if v != 399})),
        ["the tokenizer files in", "cannot be read"],
    ),
    "a gap": (
        rewritten(ADDED, lambda t: t.replace("405", "409")),
        ["the id", "<|mask|>", "copy the tokenizer files of the checkpoint again"],
    ),
    "two names of an id": (
        rewritten(ADDED, lambda t: t.replace("<|im_end|>", "<|eot_id|>")),
        ["the id 402 is <|eot_id|> in added_tokens.json and <|im_end|> in tokenizer_config.json"],
    ),
    "no mask": (
        lambda folder: (
            rewritten(ADDED, lambda t: t.replace("<|mask|>", "<|pad|>"))(folder),
            rewritten(SETTINGS, lambda t: t.replace("<|mask|>", "<|pad|>"))(folder),
        ),
        ["lacks <|mask|>: it is not Dream's"],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_damaged_tokenizer_files(folder: Path, case: str) -> None:
    damage, words = CASES[case]
    config = config_of(folder)
    damage(folder)
    with pytest.raises(MissingFileError if case in ("no merges", "no vocabulary") else UserError) as error:
        load_tokenizer(folder, config)
    assert "\n" not in str(error.value)
    assert [word for word in words if word not in str(error.value)] == []


def test_llada_needs_its_tokenizer_file(folder: Path) -> None:
    with pytest.raises(MissingFileError, match="has no tokenizer.json: copy the tokenizer files"):
        load_tokenizer(folder, tiny_config())

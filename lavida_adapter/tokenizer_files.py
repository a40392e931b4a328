"""The tokenizer of a checkpoint, from its own files and without its code; the checks of its control tokens.

A checkpoint of Dream may hold a vocabulary and merges only, with Python code that reads them. From these files the same
byte-level BPE is made here: Unicode is composed (NFC), the text is cut by the pattern of the family, and every piece is
merged from its bytes (docs/lavida.md, "Dream").
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lavida_adapter.chat_template import ChatTemplate
from lavida_adapter.checkpoint_files import first_line, read_json
from lavida_adapter.config import LavidaConfig
from lavida_adapter.families import FAMILIES
from shirg import MissingFileError, UserError

WHOLE, VOCABULARY, MERGES = "tokenizer.json", "vocab.json", "merges.txt"
SETTINGS, ADDED = "tokenizer_config.json", "added_tokens.json"


def load_tokenizer(folder: Path, config: LavidaConfig) -> Any:
    """The tokenizer of a checkpoint: its tokenizer.json, or what its vocabulary and merges describe.

    Raises:
        MissingFileError: there are no files of a tokenizer.
        UserError: they cannot be read, or the control tokens are not those of the model.
    """
    family = FAMILIES[config.lm.family]
    try:
        if os.path.isfile(folder / WHOLE):
            tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
        elif family.pretokens is not None and (folder / VOCABULARY).is_file() and (folder / MERGES).is_file():
            tokenizer = from_vocabulary(folder, family.pretokens, family.template)
        else:
            made = "" if family.pretokens is None else f", and no {VOCABULARY} and {MERGES} to make one from"
            raise MissingFileError(f"{folder} has no {WHOLE}{made}: copy the tokenizer files of the checkpoint there")
    except (MissingFileError, UserError):
        raise
    except Exception as error:  # tokenizers raises a bare Exception for a broken file
        raise UserError(f"the tokenizer files in {folder} cannot be read: {first_line(error)}") from error
    check_tokens(config, tokenizer, folder)
    _make_special(tokenizer, family.template)
    return tokenizer


def from_vocabulary(folder: Path, pretokens: str, template: ChatTemplate) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer from vocab.json and merges.txt, with the added tokens of the files beside them.

    `pretokens` is the pattern that cuts a text before merging.
    """
    lines = (folder / MERGES).read_text(encoding="utf-8").split("\n")
    lines = [line for line in lines[lines[0].startswith("#version") :] if line.strip()]
    if wrong := [line for line in lines if line.count(" ") != 1]:
        raise UserError(f"{folder / MERGES}: {wrong[0]!r} is not a pair of symbols")
    merges = [(left, right) for left, _, right in (line.partition(" ") for line in lines)]
    core = Tokenizer(models.BPE(vocab=read_json(folder / VOCABULARY), merges=merges))
    core.normalizer = normalizers.NFC()
    cut = pre_tokenizers.Split(Regex(pretokens), behavior="isolated")
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [cut, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    core.decoder = decoders.ByteLevel()
    for place, token in sorted(_added_tokens(folder).items()):
        core.add_tokens([token])
        if (found := core.token_to_id(token.content)) != place:
            raise UserError(
                f"{folder}: the added token {token.content} should have the id {place}, but {VOCABULARY} and the "
                f"tokens before it end at {found}: copy the tokenizer files of the checkpoint again"
            )
    # A token that is not there would be added here, under an id that the model does not know.
    named = {"eos_token": template.eos, "pad_token": template.eos, "mask_token": template.mask}
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        padding_side="right",
        clean_up_tokenization_spaces=False,
        **{name: token for name, token in named.items() if core.token_to_id(token) is not None},
    )


def _added_tokens(folder: Path) -> dict[int, AddedToken]:
    """Added tokens by id: tokenizer_config.json says how each is matched, added_tokens.json has their ids only."""
    settings, plain = (read_json(folder / n) if (folder / n).is_file() else {} for n in (SETTINGS, ADDED))
    found = {place: AddedToken(text, normalized=False, special=text.startswith("<|")) for text, place in plain.items()}
    described: Mapping[str, Any] = settings.get("added_tokens_decoder") or {}
    for place, fields in described.items():
        given = found.get(int(place))
        if given is not None and given.content != fields["content"]:
            raise UserError(
                f"{folder}: the id {place} is {given.content} in {ADDED} and {fields['content']} in {SETTINGS}: copy "
                "the tokenizer files of the checkpoint again"
            )
        found[int(place)] = AddedToken(**{k: v for k, v in fields.items() if k != "__type"})
    return found


def check_tokens(config: LavidaConfig, tokenizer: Any, folder: Path) -> None:
    """Raises UserError unless the tokenizer has the prompt's control tokens, with the ids in config.json."""
    template, known = FAMILIES[config.lm.family].template, tokenizer.get_added_vocab()
    absent = [token for token in template.control if token not in known]
    if absent:
        raise UserError(f"the tokenizer in {folder} lacks {', '.join(absent)}: it is not {template.model}'s")
    for token, name in ((template.mask, "mask_token_id"), (template.eos, "eos_token_id")):
        if (given := getattr(config.lm, name)) != known[token]:
            raise UserError(f"{folder}: config.json says {name}={given}, but the tokenizer's {token} is {known[token]}")


def _make_special(tokenizer: Any, template: ChatTemplate) -> None:
    """Control tokens are special in every copy: others are recognised in a dataset's text, and stay in an answer's."""
    plain = [t.content for t in tokenizer.added_tokens_decoder.values() if not t.special]
    again = [AddedToken(text, special=True, normalized=False) for text in template.control if text in plain]
    if again:
        tokenizer.add_tokens(again, special_tokens=True)


def n_rows(tokenizer: Any) -> int:
    """How many rows of the embedding the tokenizer can address: its length, unless its added tokens leave gaps."""
    return max(len(tokenizer), 1 + max(tokenizer.get_added_vocab().values()))

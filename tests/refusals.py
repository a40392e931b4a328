"""How the tables of refusals are checked: the error, and words of its one sentence."""

import re
from collections.abc import Callable

import pytest

from shirg import UserError


def message_of(call: Callable[[], object]) -> str:
    """The sentence of the UserError that a call raises."""
    with pytest.raises(UserError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    return message


def assert_says(message: str, words: str) -> None:
    """The message has these words; ` ... ` stands for anything between them."""
    assert re.search(".*".join(re.escape(part) for part in words.split(" ... ")), message), message

"""Errors of commands: which ones are the user's to mend, and how a command ends with one.

Nothing here loads torch, so a command line with a mistake is answered at once.
"""

import sys
from typing import NoReturn

from omegaconf.errors import OmegaConfBaseException


class ConfigError(ValueError):
    """A command line, a config or a stored record that cannot be used; the message says what to do.

    What loads torch raises `shirg.UserError` for the same purpose.
    """


def is_user_error(error: BaseException) -> bool:
    """True for an error that is raised on purpose, with a sentence for the user; False for a bug."""
    if isinstance(error, ConfigError | OmegaConfBaseException):
        return True
    from shirg import UserError

    return isinstance(error, UserError)


def fail(sentence: str, code: int = 1) -> NoReturn:
    """Ends the command with one sentence on standard error."""
    sys.stdout.flush()
    print(f"error: {sentence}", file=sys.stderr)
    sys.exit(code)

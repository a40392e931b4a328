"""The command `python -m experiments.app`: a page in the browser, on this machine."""

import argparse
import os
import sys
from collections.abc import Sequence
from importlib.util import find_spec

from experiments.errors import CommandParser, fail, one_sentence
from shirg import UserError

USAGE = """Opens a page on this machine: a picture, a question, up to four selectors side by side with what they keep,
the answer and its denoising.

  model=tiny            the model that is chosen first
  models=tiny,small     the only ones that can be chosen, for a page that others can reach; any by default
  port=7860             by default the first free one from 7860
  browser=false         does not open a browser
  device=cuda           and other keys of eval.py that hold for every question: threads=2, dtype=bfloat16, ..."""

_OWN = ("model", "models", "port", "browser")


def main(arguments: Sequence[str]) -> None:
    parser = CommandParser(
        prog="python -m experiments.app",
        usage="%(prog)s [key=value ...]",
        description=USAGE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("words", nargs="*", metavar="key=value", help=argparse.SUPPRESS)
    own, base = split(parser.parse_args(arguments).words)
    with one_sentence():
        if find_spec("gradio") is None:
            raise UserError(
                "the page needs Gradio: `make app` installs it into an environment of its own (docs/app.md)"
            )
        os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when Gradio is imported: nothing is sent anywhere
        from experiments import build, profiling
        from experiments.app.picture_question import DEFAULT_MODEL
        from experiments.app.web_page import serve

        cfg = build.compose_eval(*base)
        build.check_numbers(cfg)
        profiling.resolve_device(cfg.device)
        models = own["models"].split(",") if "models" in own else None
        port = int(own["port"]) if "port" in own else None
        model = own.get("model", models[0] if models else DEFAULT_MODEL)
        if models is not None and model not in models:
            raise UserError(f"model={model}: models={own['models']} does not have it; name it there")
        serve(base, model, models, port, browser=own.get("browser", "true") == "true")


def split(words: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """Our own keys, and the overrides of eval.py that hold for every question; ends the command for a wrong one."""
    for word in words:
        if "=" not in word:
            fail(f"{word}: give key=value; the keys are {', '.join(_OWN)} and those of eval.py")
        if word.startswith(("selector", "data", "budget=", "relevance=", "decode=")):
            fail(f"{word}: this is chosen on the page; leave it out")
    given = dict(word.split("=", 1) for word in words)
    own = {key: given[key] for key in _OWN if key in given}
    if "port" in own and not (own["port"].isdecimal() and 0 < int(own["port"]) < 2**16):
        fail(f"port={own['port']}: give a number from 1 to 65535")
    if own.get("browser", "true") not in ("true", "false"):
        fail(f"browser={own['browser']}: give true or false")
    return own, [word for word in words if word.split("=", 1)[0] not in _OWN]


if __name__ == "__main__":
    main(sys.argv[1:])

"""Rebuilds everything that a study shows from the files of its jobs: table.{csv,parquet,md,tex}, report.html, figures/
and deck.pptx. With --lmms instead: lmms/, every finished job in the JSON files that lmms-eval writes.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from experiments.errors import CommandParser, fail, one_sentence
from experiments.jobs.results import RESULT
from experiments.override_grammar import command_in


def main(arguments: Sequence[str]) -> None:
    parser = CommandParser(prog="python -m experiments.report", description=__doc__)
    parser.add_argument(
        "studies", nargs="+", type=Path, metavar="STUDY", help="a study's folder, for example outputs/demo"
    )
    parser.add_argument("--lmms", action="store_true", help="write the jobs in the form of lmms-eval's results")
    parser.add_argument("--wide", action="store_true", help="print every column, however wide the terminal is")
    parsed = parser.parse_args(arguments)
    for study in parsed.studies:
        if not study.is_dir():
            fail(f"{study}: no such folder; give the folder of a study, for example outputs/demo")
        if not any(study.glob(f"*/{RESULT}")):
            fail(f"{study} holds no job with a {RESULT}: evaluate something first, {command_in(study.name)}")
        with one_sentence():
            written = _export(study) if parsed.lmms else _publish(study, parsed.wide)
        print("written:", *(str(path.relative_to(study)) for path in written))


def _publish(study: Path, wide: bool) -> list[Path]:
    from experiments.report.publish import publish

    return publish(study, files=True, show=True, wide=wide)


def _export(study: Path) -> list[Path]:
    from experiments.lmms_eval.lmms_results import export

    return export(study)


if __name__ == "__main__":
    main(sys.argv[1:])

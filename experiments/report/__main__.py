"""python -m experiments.report outputs/STUDY [...]

Rebuilds everything that a study shows from what its jobs left behind: table.{csv,parquet,md,tex}, report.html, figures/
and deck.pptx.
"""

import sys
from pathlib import Path

from experiments.cli import fail
from experiments.study.record import RESULT
from experiments.study.table import print_table


def main(arguments: list[str]) -> None:
    if not arguments or any(argument in ("-h", "--help") for argument in arguments):
        print(__doc__)
        return
    for argument in arguments:
        study = Path(argument)
        if not study.is_dir():
            fail(f"{study}: no such folder; give the folder of a study, for example outputs/demo")
        if not any(study.glob(f"*/{RESULT}")):
            fail(f"{study} holds no job with a {RESULT}: evaluate something first, python eval.py study={study.name}")
        try:
            from experiments.report.writer import publish

            written = publish(study, files=True)
        except ValueError as error:
            fail(str(error))
        print_table(study)
        print("written:", *(str(path.relative_to(study)) for path in written))


if __name__ == "__main__":
    main(sys.argv[1:])

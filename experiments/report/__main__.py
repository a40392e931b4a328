"""`python -m experiments.report outputs/STUDY [...]`: rebuilds tables and pages from what the jobs left behind."""

import sys
from pathlib import Path

from experiments.cli import fail
from experiments.report.page import write_report
from experiments.study.record import RESULT
from experiments.study.table import print_table, refresh


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
            refresh(study)
            write_report(study)
        except ValueError as error:
            fail(str(error))
        print_table(study)


if __name__ == "__main__":
    main(sys.argv[1:])

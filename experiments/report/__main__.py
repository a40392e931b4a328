"""python -m experiments.report outputs/STUDY [...] [--lmms]

Rebuilds everything that a study shows from what its jobs left behind: table.{csv,parquet,md,tex}, report.html, figures/
and deck.pptx. With --lmms instead: lmms/, every finished job in the JSON files that lmms-eval writes.
"""

import sys
from pathlib import Path

from experiments.analysis.table import print_table
from experiments.errors import fail, is_user_error
from experiments.jobs.results import RESULT


def main(arguments: list[str]) -> None:
    if not arguments or any(argument in ("-h", "--help") for argument in arguments):
        print(__doc__)
        return
    to_lmms = "--lmms" in arguments
    for argument in (word for word in arguments if word != "--lmms"):
        study = Path(argument)
        if not study.is_dir():
            fail(f"{study}: no such folder; give the folder of a study, for example outputs/demo")
        if not any(study.glob(f"*/{RESULT}")):
            fail(f"{study} holds no job with a {RESULT}: evaluate something first, python eval.py study={study.name}")
        try:
            written = _export(study) if to_lmms else _publish(study)
        except (ValueError, OSError) as error:
            if not is_user_error(error):
                raise
            fail(str(error))
        print("written:", *(str(path.relative_to(study)) for path in written))


def _publish(study: Path) -> list[Path]:
    from experiments.report.publish import publish

    written = publish(study, files=True)
    print_table(study)
    return written


def _export(study: Path) -> list[Path]:
    from experiments.lmms_eval.lmms_results import export

    return export(study)


if __name__ == "__main__":
    main(sys.argv[1:])

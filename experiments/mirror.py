"""Copies of a finished job for a Lightning logger: numbers for all of them, samples and overlays for wandb.

The job's own files are the record. A logger that fails is named on standard error and takes no result with it.
"""

import io
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image

from experiments.report.shots import load_shots
from experiments.study.job import SHOTS, Job


def mirror(logger: Any, job: Job, sections: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> None:
    """Logs the job's numbers; None does nothing."""
    if logger is None:
        return
    wandb_run = type(logger).__name__ == "WandbLogger"
    status = "failed"
    try:
        logger.log_hyperparams(job.identity.config)
        logger.log_metrics(numbers(sections))
        if wandb_run:
            shots = load_shots(job.folder / SHOTS)
            columns = ["id", "question", "answers", "prediction", "n_visual", "recall"]
            logger.log_text("samples", columns=columns, data=[[_cell(row[c]) for c in columns] for row in rows])
            if shots:
                logger.log_image(
                    "kept tokens",
                    [Image.open(io.BytesIO(shot.overlay)) for shot in shots],
                    caption=[f"{shot.record['question']} -> {shot.record['prediction']}" for shot in shots],
                )
        status = "success"
    except Exception as error:  # whatever a remote service can raise
        print(f"warning: the logger failed ({error}); {job.folder} has everything", file=sys.stderr)
    finally:
        logger.finalize(status)
        close(logger, failed=status != "success")


def close(logger: Any, failed: bool = False) -> None:
    """Ends a wandb run, so that the next job of a sweep gets its own; other loggers have nothing to end."""
    if type(logger).__name__ == "WandbLogger":
        import wandb

        wandb.finish(exit_code=int(failed))


def numbers(sections: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """All numbers of the quality, tokens and times sections, by dotted name."""
    found: dict[str, float] = {}
    for key, value in sections.items():
        if not prefix and key not in ("quality", "tokens", "times"):
            continue
        if isinstance(value, Mapping):
            found |= numbers(value, f"{prefix}{key}.")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            found[prefix + key] = value
    return found


def _cell(value: Any) -> Any:
    return " | ".join(value) if isinstance(value, list) else value

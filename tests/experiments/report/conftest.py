"""One published study that the tests of this folder share; they only read it."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from experiments.report.publish import publish
from tests.experiments.conftest import evaluator, result_of
from tests.experiments.planting import change_result, plant


@pytest.fixture(scope="package")
def study(tmp_path_factory: pytest.TempPathFactory, tiny_weights: Path) -> Iterator[Path]:
    """Six jobs with planted scores, one of them failed; one has memory to show, as on an accelerator."""
    few = ("limit=24", "shots=1")
    with pytest.MonkeyPatch.context() as patch:
        run = evaluator(tmp_path_factory.mktemp("published"), tiny_weights, patch)
        jobs = {
            "pooled": run("selector=pooled", *few),
            "full": run("selector=full", *few),
            "random": run("selector=random", *few),
            "shirg": run("selector=shirg", *few),
            "shirg 40": run("selector=shirg", "budget=40", *few),
            "shirg flipped": run("selector=shirg", "ablation=sign_flip", *few),
        }
        run("selector=random", "budget=999", *few, ok=False)
        eighths = {"pooled": 3, "full": 8, "random": 2, "shirg": 7, "shirg 40": 6, "shirg flipped": 1}
        for name, job in jobs.items():
            # Of the samples that pooled answers right, shirg breaks the first of every eight.
            plant(job, lambda i, name=name: i % 8 < eighths[name] and not (name == "shirg" and i % 8 == 0))
            change_result(job, model=result_of(job)["model"] | {"trained": True})
        change_result(jobs["shirg"], times=result_of(jobs["shirg"])["times"] | {"peak_memory_mib": 12.5})
        publish(jobs["pooled"].parent, files=True)
        yield jobs["pooled"].parent

"""The launchers `local` and `slurm`: they submit as submitit's do, and wait for their jobs in a way of our own.

Hydra finds plug-ins in packages of this name alone, and imports them at every start.
"""

from collections.abc import Sequence
from importlib.util import find_spec

from hydra.core.utils import JobReturn

if find_spec("hydra_plugins.hydra_submitit_launcher") is not None:  # it is optional
    from hydra_plugins.hydra_submitit_launcher.submitit_launcher import LocalLauncher, SlurmLauncher

    class LocalJobs(LocalLauncher):  # type: ignore[misc]
        """Jobs side by side on this machine."""

        def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
            from experiments.jobs.submitted_jobs import on_this_machine

            return on_this_machine(self, job_overrides, initial_job_idx)

        def __call__(self, *words: object) -> JobReturn:
            from experiments.jobs.submitted_jobs import until_terminated

            return until_terminated(super().__call__, *words)

    class SlurmJobs(SlurmLauncher):  # type: ignore[misc]
        """Jobs on a cluster. SIGTERM is left to submitit there: a job that is put back into the queue gets it, too."""

        def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
            from experiments.jobs.submitted_jobs import on_slurm

            return on_slurm(self, job_overrides, initial_job_idx)

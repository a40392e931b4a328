"""Evaluate a model with a selector: `python eval.py -m selector=pooled,full,random,shirg`; `--help` lists the rest."""

import hydra
from omegaconf import DictConfig

from experiments import cli
from experiments.jobs.launchers import JobOutcome, acquire_slot
from experiments.schema import VERSION_BASE


@hydra.main(version_base=VERSION_BASE, config_path="conf", config_name="eval")
def main(cfg: DictConfig) -> JobOutcome | None:
    with acquire_slot(cfg.threads, cfg.device):
        from experiments.evaluate import check_data, evaluate
        from experiments.jobs.job import run_job

        return run_job(cfg, evaluate, cli.update_report, check_data)


if __name__ == "__main__":
    cli.run(main, "eval")

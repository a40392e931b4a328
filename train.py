"""Train a stage, by default a LoRA adapter: `python train.py selector=shirg lora.rank=64`; `--help` lists the rest."""

import hydra
from omegaconf import DictConfig

from experiments import cli
from experiments.jobs.launchers import JobOutcome, acquire_slot
from experiments.schema import VERSION_BASE


@hydra.main(version_base=VERSION_BASE, config_path="conf", config_name="train")
def main(cfg: DictConfig) -> JobOutcome | None:
    if cfg.plan:
        from experiments.training.plan import show

        show(cfg)
        return None
    with acquire_slot(cfg.threads, cfg.device):
        from experiments.jobs.job import run_job
        from experiments.train import check_data, train

        return run_job(cfg, train, cli.update_report, check_data)


if __name__ == "__main__":
    cli.run(main, "train")

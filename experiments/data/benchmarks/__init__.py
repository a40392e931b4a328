"""Public benchmarks from the hub, from their official files, or from a folder; docs/data.md lists the layouts."""

from experiments.data.benchmarks.benchmark import Benchmark

__all__ = ["Benchmark"]

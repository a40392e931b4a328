"""Selectors that SHIRG is compared to: controls first."""

from baselines.controls import Full, Pooled, Random

__all__ = ["Full", "Pooled", "Random"]

"""Timings of single parts at true size: `python -m experiments.bench`."""

"""Datasets: each yields `Sample`s, whatever the pictures come from."""

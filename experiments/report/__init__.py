"""Reports: one self-contained HTML page for a study. `python -m experiments.report outputs/STUDY` writes it again."""

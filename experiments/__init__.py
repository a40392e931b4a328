"""The composition root: configs, datasets, metrics, the two verbs, study tables and reports.

Nothing is imported here, so that the entry points answer `--help` at once.
"""

"""lmms-eval: its tasks answered by our pipelines, and our results in its file format (docs/report.md)."""

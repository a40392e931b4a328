"""Jobs: a folder each, run once, resumed, started here or by a launcher."""

"""From the records of jobs to rows, intervals and tables."""

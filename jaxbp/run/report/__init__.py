"""What is said: the rows of metrics.jsonl, progress, loggers, pictures."""

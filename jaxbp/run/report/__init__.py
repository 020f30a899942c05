"""What is said: the rows of metrics.jsonl, progress, TensorBoard events, pictures."""

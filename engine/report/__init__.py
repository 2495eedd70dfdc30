"""What a run tells: log lines, metrics.jsonl, curves."""

"""What a process tells of its requests: metrics, log lines, spans, paths."""

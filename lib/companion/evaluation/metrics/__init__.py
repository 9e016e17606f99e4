"""What the benchmarks of a task measure, by their own rules, one file a task. Nothing here knows a model or a paper."""

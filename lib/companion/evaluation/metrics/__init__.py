"""Metrics of the benchmarks, by their own rules, one file per task. No module here depends on a model or a paper."""

"""Readers of the real data sets in their real layouts, one file a task."""

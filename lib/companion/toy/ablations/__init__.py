"""What `study=True` runs for a paper: its baselines, tasks, learning-rate grid and seeds, one file a paper."""

"""One training loop for all papers, its callbacks, schedules and checkpoints."""

"""Running and recording: batches of runs, provenance, notebooks, files, progress."""

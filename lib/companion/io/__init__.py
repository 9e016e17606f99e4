"""The bottom: files, configurations, pickles, facts of papers, provenance, progress. Nothing here imports the rest."""

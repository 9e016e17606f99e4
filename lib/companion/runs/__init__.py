"""The top: runs of notebooks, their records and needs, batches of them, and runs made elsewhere."""

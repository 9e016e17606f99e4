"""Small synthetic data sets, written in the layouts of the real ones."""

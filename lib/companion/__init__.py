"""The companion: ten vision-transformer papers of December 2023, each as one notebook that runs."""

__version__ = "0.1.0"

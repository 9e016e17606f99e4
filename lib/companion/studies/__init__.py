"""The runner of the ablation studies, and those on real images."""

"""The live trainings of the notebooks, one module a paper.

Each has `setting(p, out, learning_rates)`: the toy setting at the `pocket` profile, that of the paper's recipe at
`paper`. p: the checked parameters of the notebook; out: the run's folder, below which toy data are written;
learning_rates: by (task, method), as the ablations chose them on validation. It raises `BadParameter`, `MissingData`,
`MissingWeights` or `CorruptFile` with what to change or get.
"""

"""Every test starts from one seed and leaves no figure open."""

import matplotlib.pyplot as plt
import pytest
import torch


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
    yield
    plt.close("all")

"""Quaternion layers against the algebra; the layer's recorded outputs are among DPLQ's cases (tests/parity/dplq)."""

import math

import pytest
import torch

from companion.models.dplq.quaternion import QuaternionLinear


def test_the_start_has_the_released_statistics():
    """s, the spread of the four components and E|w|², as the released initialisation has them."""
    torch.manual_seed(0)
    layer = QuaternionLinear(1024, 512)
    s = 1 / math.sqrt(2 * (256 + 128))
    spread = layer.weight.flatten(1).std(1) / s
    torch.testing.assert_close(spread, torch.tensor([math.sqrt(2)] + [math.sqrt(2 / 3)] * 3), rtol=0.02, atol=0)
    assert layer.weight.flatten(1).mean(1).abs().max() < 1e-3 and not layer.bias.any()
    assert layer.weight.square().sum(0).mean().item() == pytest.approx(4 * s**2, rel=0.02)

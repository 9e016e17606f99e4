"""Attention: its map is that of its output."""

import math

import pytest
import torch

from companion.models.layers.attend import Attend
from tests.models.common import draw


@pytest.mark.parametrize("kind", ["none", "boolean", "added"])
def test_the_map_times_the_values_is_the_output_where_a_query_has_no_key_too(kind):
    attend, (q, k, v) = Attend(), draw(3, 2, 3, 5, 4)
    seen = torch.rand(2, 1, 5, 5, generator=torch.Generator().manual_seed(0)) > 0.4
    seen[:, :, 2] = False
    mask = {"none": None, "boolean": seen, "added": torch.zeros(seen.shape).masked_fill(~seen, -math.inf)}[kind]
    found = attend.attention_map(q, k, v, mask)
    torch.testing.assert_close(found @ v, attend(q, k, v, mask), rtol=1e-4, atol=1e-5)
    assert found[:, :, 2].any() == (kind == "none")

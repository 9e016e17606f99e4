"""Position embeddings and the parts of masked autoencoders that several papers share."""

import pytest
import torch

from companion.models.layers.mae import masked_pixel_loss, normalised, patchify, random_mask, unpatchify
from companion.models.layers.pos_embed import KINDS, sincos_table
from tests.models.common import refuses


@pytest.mark.parametrize("kind", KINDS)
def test_tables_code_columns_and_rows_apart(kind):
    table = sincos_table(16, 3, kind)
    assert table.shape == (1, 10, 16) and not table[:, 0].any()
    grid = table[0, 1:].view(3, 3, 16)
    column, row = (grid[..., 8:], grid[..., :8]) if kind == "mocov3" else (grid[..., :8], grid[..., 8:])
    assert torch.equal(column[0], column[2]) and torch.equal(row[:, 0], row[:, 2])
    angles = torch.tensor([1.0, 10000 ** (-3 / (16 if kind == "ecamp" else 4))])  # the fastest and the slowest
    torch.testing.assert_close(row[1, 0, [0, 3, 4, 7]], torch.cat([angles.sin(), angles.cos()]))
    refuses((lambda: sincos_table(18, 3), "18"))


def test_patches_round_trip_in_order_and_the_loss_reads_hidden_ones_alone():
    images, noise = torch.randn(2, 3, 8, 8), torch.rand(2, 6)
    patches = patchify(images, 4)
    assert patches.shape == (2, 4, 48) and torch.equal(unpatchify(patches, 4), images)
    assert torch.equal(patches[0, 1].view(4, 4, 3), images[0, :, :4, 4:].permute(1, 2, 0))
    keep, hidden = random_mask(noise, 2)
    assert torch.equal(keep, noise.argsort(1)[:, :2])
    assert hidden.sum(1).tolist() == [4, 4] and not hidden.gather(1, keep).any()
    pixels, raw = torch.randn(2, 6, 12), torch.randn(2, 6, 12)
    target = normalised(raw)
    torch.testing.assert_close(
        target, (raw - raw.mean(-1, keepdim=True)) / raw.std(-1, keepdim=True), rtol=1e-3, atol=1e-3
    )
    expected = (pixels - target)[hidden.bool()].square().mean()
    pixels[~hidden.bool()] += 9
    torch.testing.assert_close(masked_pixel_loss(pixels, target, hidden), expected)

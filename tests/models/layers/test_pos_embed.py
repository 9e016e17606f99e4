"""Position embeddings and the parts of masked autoencoders that several papers share."""

import torch

from companion.models.layers.mae import masked_pixel_loss, patchify, random_mask, unpatchify
from companion.models.layers.pos_embed import sincos_table
from tests.models.common import refuses


def test_patches_round_trip_in_order_and_the_loss_reads_hidden_ones_alone():
    images, noise = torch.randn(2, 3, 8, 8), torch.rand(2, 6)
    patches = patchify(images, 4)
    assert torch.equal(unpatchify(patches, 4), images)
    assert torch.equal(patches[0, 1].view(4, 4, 3), images[0, :, :4, 4:].permute(1, 2, 0))
    keep, hidden = random_mask(noise, 2)
    assert torch.equal(keep, noise.argsort(1)[:, :2])
    assert hidden.sum(1).tolist() == [4, 4] and not hidden.gather(1, keep).any()
    pixels, target = torch.randn(2, 6, 12), torch.randn(2, 6, 12)
    expected = (pixels - target)[hidden.bool()].square().mean()
    pixels[~hidden.bool()] += 9
    torch.testing.assert_close(masked_pixel_loss(pixels, target, hidden), expected)
    refuses((lambda: sincos_table(18, 3), "18"))

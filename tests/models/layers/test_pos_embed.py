"""Position embeddings and the parts of masked autoencoders that several papers share."""

import torch
from timm.models.vision_transformer import VisionTransformer

from companion.models.layers.mae import MAE, Decoder, masked_pixel_loss, patchify, random_mask, unpatchify
from companion.models.layers.pos_embed import sincos_table
from tests.models.common import assert_recomputed_gradients_are_equal, draw, refuses


def small(mask_ratio: float = 0.75, **changes) -> MAE:
    torch.manual_seed(0)
    sizes = dict(img_size=32, patch_size=8, embed_dim=48, depth=3, num_heads=4, num_classes=0)
    return MAE(VisionTransformer(**sizes | changes), (32, 3, 4), mask_ratio=mask_ratio)


def test_gradient_checkpointing_of_a_masked_autoencoder_changes_no_gradient():
    images, noise = draw(2, 3, 32, 32), draw(2, 16)
    assert_recomputed_gradients_are_equal(small, lambda model: model(images, noise))


def test_a_decoder_norms_tokens_of_any_size():
    """MAE's eps is 1e-6: tokens of variance 1e-4 have variance 0.99 after the norm, not 0.91."""
    decoder = Decoder(8, 16, 0, 4, 2)
    decoder.pos_embed.data.zero_()
    decoder.embed.bias.data.zero_()
    decoder.embed.weight.data *= 0.01 / decoder.embed(draw(1, 5, 8)).std().item()
    before = decoder.embed(draw(1, 5, 8)).var(-1, correction=0)
    after = decoder(draw(1, 5, 8)).var(-1, correction=0)
    torch.testing.assert_close(after, before / (before + 1e-6), rtol=1e-3, atol=0)


def test_encoders_and_masks_that_would_train_wrongly_are_refused():
    forms = [{"pre_norm": True}, {"reg_tokens": 2}, {"no_embed_class": True}, {"dynamic_img_size": True}]
    forms += [{"class_token": False, "global_pool": "avg"}, {"img_size": (16, 64)}]
    refuses(
        *((lambda form=form: small(**form), "encoder") for form in forms),
        *((lambda ratio=ratio: small(ratio), "mask_ratio") for ratio in (-0.1, 0.0, 1.0)),
    )
    assert small(0.01)(draw(2, 3, 32, 32)).isfinite(), "one of 16 patches is hidden"


def test_patches_round_trip_in_order_and_the_loss_reads_hidden_ones_alone():
    images, noise = torch.randn(2, 3, 8, 8), torch.rand(2, 6)
    patches = patchify(images, 4)
    assert torch.equal(unpatchify(patches, 4), images)
    refuses((lambda: patchify(torch.randn(2, 3, 4, 16), 4), "(2, 3, 4, 16)"))  # of 4 patches, a square number
    assert torch.equal(patches[0, 1].view(4, 4, 3), images[0, :, :4, 4:].permute(1, 2, 0))
    keep, hidden = random_mask(noise, 2)
    assert torch.equal(keep, noise.argsort(1)[:, :2])
    assert hidden.sum(1).tolist() == [4, 4] and not hidden.gather(1, keep).any()
    pixels, target = torch.randn(2, 6, 12), torch.randn(2, 6, 12)
    expected = (pixels - target)[hidden.bool()].square().mean()
    pixels[~hidden.bool()] += 9
    torch.testing.assert_close(masked_pixel_loss(pixels, target, hidden), expected)
    refuses((lambda: sincos_table(18, 3), "18"))

"""Cost of ECAMP's pre-training step compared with the sum of its parts, and of its segmenter compared with its encoder.

The parts are modules of timm and torch on the same number of tokens, one after the other, forward and backward:
ViT-B/16 blocks on the visible patches and blocks of the image decoder's size on all, two convolutions at 448 pixels,
post-norm transformer layers as BERT's, a cross-attention, and the projection to 30,000 words with its cross-entropy.
Everything else in ECAMP (masking, unshuffling, patches to pixels, windows, three losses) should add at most a tenth.
Masks and weights of words are drawn in the data loader, so neither includes them.
"""

from __future__ import annotations

from functools import partial

import bench
import torch
from bench import Step
from timm.models.vision_transformer import Block, VisionTransformer
from torch import nn
from torch.nn import functional as F

from companion.models.ecamp import heads
from companion.models.ecamp import model as ecamp

PAIRS, PATCHES, SEEN, WORDS, LENGTH = 2, 196, 49, 30_000, 256


def batch() -> ecamp.Batch:
    """Pairs with the paper's shapes."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(5, WORDS, (PAIRS, LENGTH), generator=generator)
    return ecamp.Batch(
        images=torch.randn(PAIRS, 3, 448, 448, generator=generator),
        ids=torch.where(torch.rand(PAIRS, LENGTH, generator=generator) < 0.7, 3, labels),
        labels=labels,
        attention=torch.ones(PAIRS, LENGTH, dtype=torch.long),
        weights=torch.ones(PAIRS, LENGTH),
        noise=torch.rand(PAIRS, PATCHES, generator=generator),
        window=torch.ones(PAIRS, 2, dtype=torch.long),
    )


def ours() -> Step:
    """Forward and backward of the whole pre-training model."""
    torch.manual_seed(0)
    model, given = ecamp.build("paper").train(), batch()

    def step() -> None:
        model(given).total.backward()
        model.zero_grad()

    return step


class Parts(nn.Module):
    """The parts, each on random input of the right shape; forward gives the sum of their losses."""

    def __init__(self):
        super().__init__()
        vit = VisionTransformer(img_size=224, num_classes=0)
        self.embed, self.encoder, self.norm = vit.patch_embed, vit.blocks, vit.norm
        norm = partial(nn.LayerNorm, eps=1e-6)
        blocks = (Block(512, 16, qkv_bias=True, norm_layer=norm) for _ in range(4))
        self.decoder = nn.Sequential(nn.Linear(768, 512), *blocks, norm(512), nn.Linear(512, 768))
        self.resolve = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.ReLU(), nn.Conv2d(3, 3, 3, padding=1))
        self.words, self.project = nn.Embedding(WORDS, 768), nn.Linear(768, 768)
        layer = partial(nn.TransformerEncoderLayer, 768, 6, 1536, 0.1, "gelu", 1e-12, batch_first=True)
        self.text = nn.Sequential(*(layer() for _ in range(7)))  # the fusion layer is a BERT layer as well
        self.cross = nn.ModuleList(nn.Linear(768, 768) for _ in range(5))  # q, k, v, the mean, the mix
        self.head = nn.Sequential(nn.Linear(768, 768), nn.GELU(), nn.LayerNorm(768), nn.Linear(768, WORDS))

    def forward(self, given: ecamp.Batch) -> torch.Tensor:
        low = F.interpolate(given.images, scale_factor=0.5, mode="bicubic")
        z = self.norm(self.encoder(self.embed(low)[:, : SEEN + 1]))
        pixels = self.decoder(F.pad(z, (0, 0, 0, PATCHES - SEEN)))
        # the decoded image goes into super-resolution: gradients pass through it
        up = F.interpolate(low.clone().requires_grad_(), scale_factor=2, mode="bilinear")
        loss = pixels.square().mean() + F.relu(up + self.resolve(up)).sub(given.images).square().mean()
        z, x = self.project(z), self.words(given.ids)
        qkv = [
            t.unflatten(-1, (6, 128)).transpose(1, 2) for t in (self.cross[0](x), self.cross[1](z), self.cross[2](z))
        ]
        c = F.scaled_dot_product_attention(*qkv, dropout_p=0.1).transpose(1, 2).flatten(2)
        x = self.text(x + self.cross[4](c + self.cross[3](z.mean(1, keepdim=True))))
        return loss + F.cross_entropy(self.head(x).flatten(0, 1), given.labels.flatten())


def parts() -> Step:
    torch.manual_seed(0)
    model, given = Parts().train(), batch()

    def step() -> None:
        model(given).backward()
        model.zero_grad()

    return step


def segmenter() -> Step:
    """A training step of the segmenter: the encoder is frozen."""
    torch.manual_seed(0)
    model = heads.Segmenter(VisionTransformer(img_size=224, num_classes=0)).train()
    images, masks = torch.randn(PAIRS, 3, 224, 224), (torch.rand(PAIRS, 1, 224, 224) > 0.7).float()

    def step() -> None:
        heads.segmentation_loss(model(images), masks).backward()
        model.zero_grad()

    return step


def segmenter_parts() -> Step:
    """timm's ViT forward without gradients, and the bare decoder forward and back."""
    torch.manual_seed(0)
    vit = VisionTransformer(img_size=224, num_classes=0).train()
    decoder = heads.MapDecoder(768, (512, 256, 128, 64)).train()
    images, features = torch.randn(PAIRS, 3, 224, 224), torch.randn(PAIRS, 768, 14, 14, requires_grad=True)

    def step() -> None:
        with torch.no_grad():
            vit.forward_features(images)
        decoder(features).square().mean().backward()
        decoder.zero_grad()

    return step


def main() -> None:
    makers = {
        "pre-training step, forward and back": ours,
        "its parts, forward and back": parts,
        "segmenter, training step": segmenter,
        "timm's encoder forward, the decoder forward and back": segmenter_parts,
    }
    whole, alone, segment, apart = makers
    bench.run(
        "ecamp",
        f"ViT-B/16, {PAIRS} pairs of 448 px and {LENGTH} words; segmenter at 224 px",
        makers,
        [
            ("pre-training step / the sum of its parts", whole, alone),
            ("training step of the segmenter / frozen encoder and decoder alone", segment, apart),
        ],
        rounds=3,
    )


if __name__ == "__main__":
    main()

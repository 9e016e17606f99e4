"""Classifier and segmenter on ECAMP's pre-trained ViT (sections 5.2 and 5.3), and their losses; `detection` has the
detector.

    classifier   mean of the patch tokens -> a new LayerNorm -> linear; all trained, or the last layer (linear probe)
    segmenter    patch tokens -> linear -> 14 x 14 map -> four times conv, norm, ReLU, x2 -> logits at 224

In segmenter and detector the encoder is frozen, though the authors' README speaks of fine-tuning, and its last norm is
left out. They are the authors' own (after MGCA), not UNETR or ViTDet: there are no skip connections.

Shapes: B images of S x S pixels, D the ViT's width, g = S / patch.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import pairwise

import torch
from einops import rearrange
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from ...backbones import check_input
from ...errors import Count, check_choice, check_range
from ...io.config import configure
from ..layers import heads as shared
from ..layers.heads import like, vit_sizes
from ..layers.predicting import Images, Names, Transform, coloured, grey, named, outputs
from ..layers.state_dicts import OfficialModel, below, check_names, load_official
from . import official
from .transforms import squeeze_transform, test_transform

RIGA = ("decoder_disc", "decoder_cup")


# --- classification ---------------------------------------------------------------------------------------------------


def classifier(
    encoder: VisionTransformer, classes: int, *, probe: bool = False, drop_path: float = 0.1
) -> VisionTransformer:
    """The classifier: MAE's, see `layers.heads.classifier`."""
    given = dict(locals())
    model = shared.classifier(**given)
    vars(model)["predict"] = partial(findings, model)
    return configure(model, given, classifier)


def findings(
    model: VisionTransformer, images: Images, names: Names, transform: Transform = None, exclusive: bool = False
) -> list[dict[str, float]]:
    """The probability of each finding by a classifier, its method `predict`; with `exclusive` they sum to 1."""
    logits = outputs(model, images, transform or test_transform(model.patch_embed.img_size[0]), grey)
    return named(logits.softmax(1) if exclusive else logits.sigmoid(), names)


def classifier_from_official(state: Mapping[str, Tensor], heads: int | None = None) -> VisionTransformer:
    """The classifier of a state dict of the authors, whose names are timm's; in eval mode.

    Raises `BadCheckpoint`: names that are missing, unknown or of another shape, all of them listed.
    """
    check_names(state, ["head.weight"], "ECAMP's classifier")
    encoder = VisionTransformer(**vit_sizes(state, heads), num_classes=0)
    model = classifier(encoder, len(state["head.weight"]), drop_path=0.0).eval()
    load_official(model, state, None, "ECAMP's classifier")
    return model


def classification_loss(logits: Tensor, target: Tensor) -> Tensor:
    """BCE for multi-label targets (B, classes), cross-entropy for class indices (B,)."""
    if target.ndim == 1 and logits.ndim == 2:
        return F.cross_entropy(logits, target)
    return F.binary_cross_entropy_with_logits(logits, target.to(logits.dtype))


# --- segmentation -----------------------------------------------------------------------------------------------------


class PatchMap(nn.Module):
    """From images (B, 3, H, W) to a map (B, D, g, g'): a linear layer on an encoder's tokens before its last norm."""

    def __init__(self, encoder: VisionTransformer, frozen: bool = True):
        super().__init__()
        self.encoder, self.frozen = like(encoder), frozen
        self.encoder.norm = self.encoder.fc_norm = self.encoder.head = nn.Identity()
        self.encoder.requires_grad_(not frozen)
        self.project = nn.Linear(encoder.embed_dim, encoder.embed_dim)

    def forward(self, images: Tensor) -> Tensor:
        check_input(self.encoder, images)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            x = self.encoder.forward_features(images)[:, self.encoder.num_prefix_tokens :]  # (B, g g', D)
        rows, _ = self.encoder.patch_embed.dynamic_feat_size(images.shape[-2:])
        return rearrange(self.project(x), "b (h w) d -> b d h w", h=rows)


class MapDecoder(nn.Sequential):
    """(B, D, g, g) to logits (B, classes, S, S): for each of `channels` a 3x3 conv, norm, ReLU, x2; then a 3x3 conv."""

    def __init__(self, inputs: int, channels: Sequence[int], classes: int = 1):
        super().__init__()
        for i, (a, b) in enumerate(pairwise([inputs, *channels]), 1):
            upsample = nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True)
            step = nn.Sequential(nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b), nn.ReLU(), upsample)
            self.add_module(f"decoder_{i}", step)
        self.add_module("final_out", nn.Conv2d(channels[-1], classes, 3, padding=1))


class Segmenter(OfficialModel):
    """Images (B, 3, H, W) to logits (B, outputs x classes, H, W).

    Args:
        encoder: `ECAMP.encoder`, or any ViT of timm; it is copied.
        outputs: decoders, one for each structure to segment: 1, or 2 for RIGA's disc and cup.
        channels: of the decoder's steps, each of which doubles the side. None: of 512, 256, 128, 64 the last ones, as
            many as the patch needs. What the steps do not bring to the images' size is resized to it, bilinear.
        frozen: as released; False is the README's description, and the authors' setting for a random encoder on RIGA.
        classes: logits of a decoder; more than 1 only to load a file that has them.
    """

    rules = official.NAMES["segmenter"]

    def __init__(
        self,
        encoder: VisionTransformer,
        outputs: Count = 1,
        channels: Sequence[Count] | None = None,
        frozen: bool = True,
        classes: Count = 1,
    ):
        configure(self, locals())
        super().__init__()
        check_choice("outputs", outputs, (1, 2))
        self.map = PatchMap(encoder, frozen)
        if channels is None:
            channels = (512, 256, 128, 64)[-int(math.log2(encoder.patch_embed.patch_size[0])) :]
        check_range("channels", len(channels), 1)
        names = ("decoder",) if outputs == 1 else RIGA
        self.decoders = nn.ModuleDict({name: MapDecoder(encoder.embed_dim, channels, classes) for name in names})

    def forward(self, images: Tensor) -> Tensor:
        x, size = self.map(images), images.shape[-2:]  # (B, D, g, g')
        logits = torch.cat([decoder(x) for decoder in self.decoders.values()], 1)
        return logits if logits.shape[-2:] == size else F.interpolate(logits, size, mode="bilinear")

    def predict(self, images: Images, names: Names, transform: Transform = None) -> list[Tensor]:
        """Probabilities (outputs, S, S) of each image; disc and cup are those of RIGA's images in colour."""
        transform = transform or squeeze_transform(self.map.encoder.patch_embed.img_size[0])
        return list(outputs(self, images, transform, coloured if len(self.decoders) == 2 else grey).sigmoid())

    @classmethod
    def from_official(cls, state: Mapping[str, Tensor], heads: int | None = None) -> Segmenter:
        """The segmenter of a state dict of the authors, in eval mode: with one decoder, or RIGA's two.

        Raises `BadCheckpoint`: names that are missing, unknown or of another shape, all of them listed.
        """
        encoder = VisionTransformer(**vit_sizes(below(state, "encoder."), heads), num_classes=0)
        outputs = 2 if below(state, f"{RIGA[1]}.") else 1
        decoder = below(state, f"{RIGA[0] if outputs == 2 else 'decoder'}.")
        biases = sorted(name for name in decoder if re.fullmatch(r"decoder_\d\.0\.bias", name))
        classes = len(decoder.get("final_out.bias", [0]))
        model = cls(encoder, outputs, [len(decoder[name]) for name in biases], classes=classes)
        return model.loaded(state, "ECAMP's segmenter")


def focal_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Mean of (1 - p_t)^2 BCE with p_t = sigmoid(x (2 t - 1)); the target may be soft."""
    easy = F.logsigmoid(-logits * (2 * target - 1))
    return ((2 * easy).exp() * F.binary_cross_entropy_with_logits(logits, target, reduction="none")).mean()


def soft_dice(logits: Tensor, target: Tensor) -> Tensor:
    """(2 sum(p t) + 1) / (sum(p) + sum(t) + 1), with sums over the whole batch."""
    p = logits.sigmoid()
    return (2 * (p * target).sum() + 1) / (p.sum() + target.sum() + 1)


def segmentation_loss(logits: Tensor, target: Tensor) -> Tensor:
    """10 focal - log(soft Dice), the mean over outputs; logits and target (B, outputs, S, S), target in 0 ... 1."""
    pairs = zip(logits.unbind(1), target.unbind(1), strict=True)
    return torch.stack([10 * focal_loss(x, t) - soft_dice(x, t).log() for x, t in pairs]).mean()

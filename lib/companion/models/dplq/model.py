"""DPLQ: Domain Prompt Learning with Quaternion Networks (Cao et al., CVPR 2024, arXiv 2312.08878).

A frozen foundation model of the domain (remote sensing, medical) encodes each image; a small net maps its pooled
feature to a bias; the bias is added to the prompts of a frozen CLIP before quaternion linear layers: to the context of
the text, and to the deep prompts of the image tower. Only the prompts, the net and those layers are trained.

The paper's full text was not available: every formula here was read from the authors' code (github caoql98/DPLQ, commit
3d78bb5, no licence stated) and written from scratch; outputs are checked against ones recorded from it. The quaternion
layers are ours (`.quaternion`), since the package bundled there is GPL.

Shapes: b images, C classes, n context tokens, J prompted layers, F the width of the domain feature, Wt and Wv the
widths of the text and the image tower.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from open_clip.model import CLIP
from torch import Tensor, nn
from torch.nn import functional as F

from ...errors import BadParameter, Count, check_choice, check_images
from ...io.config import configure
from ..layers import mae
from ..layers.clip_prompting import (
    LEARNER,
    Classes,
    ImageFeatures,
    PromptLearner,
    Tokenizer,
    check_depth,
    encode_image,
    encode_text,
    similarity,
)
from ..layers.frozen import frozen_copy
from ..layers.precision import without_autocast
from ..layers.state_dicts import depth as depth_of
from .baselines import DEEP_PROJECTIONS, DEEP_TEXT, META_NET, meta_net
from .quaternion import QuaternionLinear

NOISE = ("always", "train", "off")
PROMPT = "a photo of a {}."
TEST_BATCH = 24  # as released: the noise of an image's prompts depends on its batch, also at test time


def loss(model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
    """Loss for `fit`: cross-entropy. batch: images or their features, labels, and domain features where cached."""
    images, labels, *domain = batch
    return F.cross_entropy(model(images, *domain), labels)


class Prompts(NamedTuple):
    """The prompts of both towers for a batch of images."""

    bias: Tensor  # β (b, Wt), of the small net
    context: Tensor  # (b, n, Wt), at text positions 1 to n
    deep_text: Tensor  # P (J - 1, n, Wt), the same for every image
    first_image: Tensor  # V_0 (n, Wv), the same for every image
    deep_image: Tensor  # V_1 ... (J - 1, b, n, Wv)


class DPLQ(PromptLearner):
    """DPLQ on an open_clip CLIP of any size.

        β = W2 relu(W1 f + b1) + b2             f (b, F): the domain feature
        context = Q_L(0, ctx + β + μ ε)         ε ~ N(0, 1) (b, Wt), μ the mean of all entries of f in the batch
        V_0 = W ctx + b                         real and unconditioned
        V_l = Q_l(0, P_l + β), l = 1 ... J - 1  one quaternion layer each

    Args: as `clip_prompting.PromptLearner`, and
        domain: the domain model, images to (b, F) with F its `num_features` (see `domain_model`), of which a frozen
            copy is kept; or F when the features are passed in every call.
        depth: J, the prompted layers: 9 as released for base-to-novel, 3 for cross-dataset runs. Prompts deeper than
            the text tower act on the image tower alone.
        hidden: width of the small net; None for E / 16.
        noise: when μ ε is added: "always", as released, which makes predictions random and dependent on the other
            images of the batch; "train"; or "off".

    Raises `BadParameter`: an option outside its choices, or towers whose widths are no multiples of 4.
    """

    # left over from the authors' earlier method, in no forward pass; and the domain models, which are separate
    # arguments
    unused = ("visual_net.", "remote_model.", "medical_model.")

    def __init__(
        self,
        clip: CLIP,
        classes: Classes,
        tokenizer: Tokenizer | None,
        domain: nn.Module | Count,
        *,
        tokens: Count = 2,
        depth: Count = 9,
        template: str = PROMPT,
        hidden: Count | None = None,
        noise: str = "always",
    ):
        configure(self, locals())
        super().__init__(clip, classes, tokenizer, tokens, template)
        check_depth(clip, depth)
        check_choice("noise", noise, NOISE)
        self.domain = frozen_copy(domain) if isinstance(domain, nn.Module) else None
        self.noise = noise
        features: int = domain if isinstance(domain, int) else domain.num_features
        text, image = self.ctx.shape[1], clip.visual.conv1.out_channels
        self.meta_net = meta_net(features, hidden or max(1, clip.visual.output_dim // 16), text)
        self.mix_text = self.mixing_layer(text, text)
        self.proj = nn.Linear(text, image)
        self.deep_text = nn.Parameter(torch.randn(depth - 1, tokens, text) * 0.02)
        self.mix_image = self.mixing_layer(text, image, depth - 1)

    def mixing_layer(self, inputs: int, outputs: int, layers: int | None = None) -> nn.Module:
        """A layer from the sum of prompt and bias (..., inputs) to a prompt; or a stack of `layers`."""
        return QuaternionLinear(2 * inputs, outputs, layers)

    def mixed(self, layer: nn.Module, prompt: Tensor, bias: Tensor) -> Tensor:
        """Q(0, prompt + bias): zeros are the components r and i, the sum is j and k. Shapes that broadcast."""
        total = prompt + bias  # (..., Wt)
        return layer(F.pad(total, (total.shape[-1], 0)))

    def train(self, mode: bool = True):
        super().train(mode)
        if self.domain is not None:
            self.domain.eval()
        return self

    def domain_features(self, images: Tensor) -> Tensor:
        """The domain feature f (b, F) of images (b, 3, H, W), without autograd.

        It does not change in training: `fit.outputs_of(model.domain, data)` computes it once.
        """
        if self.domain is None:
            raise BadParameter("domain", None, "features (b, F) in the call: the model was made without a domain model")
        with torch.no_grad():
            return self.domain(images)

    def prompts(self, features: Tensor, eps: Tensor | None = None) -> Prompts:
        """The prompts for a batch of domain features (b, F); `eps` (b, Wt) replaces the random draw."""
        bias = noisy = self.meta_net(features)  # β (b, Wt)
        if eps is None and (self.noise == "always" or (self.noise == "train" and self.training)):
            eps = torch.randn_like(bias)
        if eps is not None:
            noisy = bias + features.mean() * eps
        context = self.mixed(self.mix_text, self.ctx, noisy[:, None])  # (b, n, Wt)
        deep = self.mixed(self.mix_image, self.deep_text[:, None], bias[:, None])  # (J - 1, b, n, Wv)
        return Prompts(bias, context, self.deep_text, self.proj(self.ctx), deep)

    def forward(self, images: Tensor, domain: Tensor | None = None, eps: Tensor | None = None) -> Tensor:
        """Logits (b, C) of images (b, 3, H, W). `domain` (b, F): their domain features, where they are cached."""
        check_images(images, 3, *self.clip.visual.image_size)
        domain, features = self.domain_features(images) if domain is None else domain, self.meta_net[0].in_features
        if domain.shape != (len(images), features):
            raise BadParameter("domain", tuple(domain.shape), f"features ({len(images)}, {features})")
        prompts = self.prompts(domain, eps)
        return similarity(self.clip, *self.encode(images, prompts))

    def encode(self, images: Tensor, prompts: Prompts) -> tuple[Tensor, Tensor]:
        """Features of the images (b, E) and of the classes for each image (b, C, E), not normalised."""
        image = encode_image(self.clip, images, prompts.first_image, prompts.deep_image)
        return image, encode_text(self.clip, self.prompted(prompts.context), self.ends, prompts.deep_text)

    def learner_names(self) -> dict[str, str | list]:
        layers, parts = range(len(self.deep_text)), [f"{part}_weight" for part in "rijk"]
        names = dict[str, str | list]()
        names |= {name: LEARNER + name for name in ("ctx", "proj.weight", "proj.bias", *META_NET)}
        return names | {
            "mix_text.weight": [f"{LEARNER}visual_net_orthogonality.{part}" for part in parts],
            "mix_text.bias": f"{LEARNER}visual_net_orthogonality.bias",
            "deep_text": [f"{DEEP_TEXT}.{i}" for i in layers],
            "mix_image.weight": [[f"{DEEP_PROJECTIONS}.{i}.{part}" for part in parts] for i in layers],
            "mix_image.bias": [f"{DEEP_PROJECTIONS}.{i}.bias" for i in layers],
        }

    @staticmethod
    def _sizes(state: Mapping[str, Tensor]) -> dict[str, int]:
        hidden, features = state[LEARNER + "meta_net.linear1.weight"].shape
        depth = 1 + depth_of(state, f"{DEEP_TEXT}.")
        return {"tokens": len(state[LEARNER + "ctx"]), "depth": depth, "hidden": hidden, "domain": features}


# --- domain models ----------------------------------------------------------------------------------------------------


class MAEFeatures(nn.Module):
    """The domain feature (b, F) of a masked autoencoder with nothing masked: the mean of its patches' decoder tokens.

    The file with this pass is missing from DPLQ's repository: that the tokens are the decoder's, 512 wide, before the
    pixel head is inferred from a comment with their shape. `num_features` is F.
    """

    def __init__(self, model: mae.MAE):
        configure(self, locals())
        super().__init__()
        self.model, self.num_features = model, model.pixels.in_features

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.model.decoder(self.model.encode(images))  # (b, 1 + N, F)
        return tokens[:, 1:].mean(1)


class CLIPFeatures(ImageFeatures):
    """A control: CLIP's own image feature instead of the domain's, scaled to a mean square of 1."""

    def forward(self, images: Tensor) -> Tensor:
        return F.normalize(super().forward(images), dim=-1) * math.sqrt(self.num_features)


class NoFeatures(nn.Module):
    """A control: zeros (b, F). The small net gives its biases for every image, and the noise vanishes with μ."""

    def __init__(self, num_features: Count):
        configure(self, locals())
        super().__init__()
        self.num_features = num_features

    def forward(self, images: Tensor) -> Tensor:
        return images.new_zeros(len(images), self.num_features)


class DomainModel(nn.Module):
    """A frozen encoder for images of another size, normalised for CLIP as in the released code.

    Args:
        encoder: images to (b, F), with `num_features` F; a frozen copy is kept.
        size: images are resized to this (nearest neighbour, as released); None: unchanged.
        batch: images at once; None: all of them. At 1024 pixels SAM's attention takes gigabytes per image.
    """

    def __init__(self, encoder: nn.Module, size: Count | None = None, batch: Count | None = None):
        configure(self, locals())
        super().__init__()
        self.encoder, self.size, self.batch = frozen_copy(encoder), size, batch
        self.num_features = encoder.num_features

    def train(self, mode: bool = True):
        super().train(mode)
        self.encoder.eval()
        return self

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """The feature (b, F) of images (b, 3, H, W), in float32 also under autocast, as in the authors' code."""
        parts = images.split(self.batch) if self.batch else [images]
        with without_autocast(images.device):
            return torch.cat([self.encoder(x if self.size is None else F.interpolate(x, self.size)) for x in parts])

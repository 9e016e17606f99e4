"""The baselines of CLIP-prompting papers, on a frozen CLIP: zero-shot, CoOp, CoCoOp, MaPLe.

    ZeroShot    the prompt "a photo of <class>."                                        (Radford et al., ICML 2021)
    CoOp        n learned token embeddings before the class name                        (Zhou et al., IJCV 2022)
    CoCoOp      the same, plus a bias that a small network computes from the image feature  (Zhou et al., CVPR 2022)
    MaPLe       learned tokens in J layers of both towers; those of the image tower     (Khattak et al., CVPR 2023)
                are projections of those of the text tower

Written from the papers' equations and checked against outputs recorded from the authors' code (KaiyangZhou/CoOp and
muzairkhattak/multimodal-prompt-learning, both MIT, as shipped with caoql98/DCPL at 7630aa0). Shapes are named as in
`clip_prompting`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping

import torch
from open_clip.model import CLIP
from torch import Tensor, nn
from torch.nn import functional as F

from ...errors import Count
from ...io.config import configure
from ..layers.clip_prompting import (
    LEARNER,
    Classes,
    PromptedCLIP,
    PromptLearner,
    Tokenizer,
    check_depth,
    encode_image,
    encode_text,
    similarity,
)
from ..layers.state_dicts import depth as depth_of

DEEP_TEXT, DEEP_PROJECTIONS = LEARNER + "compound_prompts_text", LEARNER + "compound_prompt_projections"


class ZeroShot(PromptedCLIP):
    """CLIP unchanged: nothing is trained, the classes' text features are computed once. Arguments as `PromptedCLIP`."""

    constants = ("embedded", "text_features")

    def __init__(self, clip: CLIP, classes: Classes, tokenizer: Tokenizer, template: str = "a photo of {}."):
        configure(self, locals())
        super().__init__(clip, classes, tokenizer, template)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (b, C) of images (b, 3, H, W), or of their features (b, E)."""
        return similarity(self.clip, self.image_features(images), self.text_features)


class CoOp(PromptLearner):
    """Context optimisation: n learned tokens, the same for every class and image. Arguments as `PromptLearner`."""

    def __init__(
        self, clip: CLIP, classes: Classes, tokenizer: Tokenizer | None, *, tokens: Count = 16, template: str = "{}."
    ):
        configure(self, locals())
        super().__init__(clip, classes, tokenizer, tokens, template)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (b, C) of images (b, 3, H, W), or of their features (b, E): nothing in the image tower is trained."""
        text = encode_text(self.clip, self.prompted(self.ctx), self.ends)
        return similarity(self.clip, self.image_features(images), text)


def meta_net(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    """The two-layer network W2 relu(W1 f + b1) + b2 from an image feature to a bias on the context."""
    return nn.Sequential(
        OrderedDict(linear1=nn.Linear(inputs, hidden), relu=nn.ReLU(), linear2=nn.Linear(hidden, outputs))
    )


META_NET = [f"meta_net.linear{i}.{kind}" for i in (1, 2) for kind in ("weight", "bias")]


class CoCoOp(PromptLearner):
    """Conditional context optimisation: the context plus a bias that a small network computes from the image feature.

    Args: as `PromptLearner`, and
        hidden: width of the network; None for E / 16.
    """

    def __init__(
        self,
        clip: CLIP,
        classes: Classes,
        tokenizer: Tokenizer | None,
        *,
        tokens: Count = 4,
        template: str = "a photo of a {}.",
        hidden: Count | None = None,
    ):
        configure(self, locals())
        super().__init__(clip, classes, tokenizer, tokens, template)
        shared = clip.visual.output_dim
        self.meta_net = meta_net(shared, hidden or max(1, shared // 16), self.ctx.shape[1])

    def forward(self, images: Tensor) -> Tensor:
        """Logits (b, C) of images (b, 3, H, W), or of their features (b, E). The text tower runs b · C times."""
        features = F.normalize(self.image_features(images), dim=-1)
        ctx = self.ctx + self.meta_net(features)[:, None]
        return similarity(self.clip, features, encode_text(self.clip, self.prompted(ctx), self.ends))

    def learner_names(self) -> dict[str, str | list]:
        return {name: LEARNER + name for name in ("ctx", *META_NET)}

    @staticmethod
    def _sizes(state: Mapping[str, Tensor]) -> dict[str, int]:
        return {"tokens": len(state[LEARNER + "ctx"]), "hidden": len(state[LEARNER + "meta_net.linear1.weight"])}


class LinearStack(nn.Module):
    """`layers` linear layers of one size in parallel, in one batched product; they are initialised equally.

    x (layers, ..., inputs) to (layers, ..., outputs); `weight` (layers, outputs, inputs), `bias` (layers, outputs).
    """

    def __init__(self, inputs: int, outputs: int, layers: int):
        super().__init__()
        one = nn.Linear(inputs, outputs)
        self.weight = nn.Parameter(one.weight.detach().repeat(layers, 1, 1))
        self.bias = nn.Parameter(one.bias.detach().repeat(layers, 1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.baddbmm(self.bias[:, None], x.flatten(1, -2), self.weight.mT).unflatten(1, x.shape[1:-1])


class MaPLe(PromptLearner):
    """Multi-modal prompt learning: text prompts in J layers, and for each a linear layer that projects them to image
    prompts.

    Args: as `PromptLearner`, and
        depth: J, the prompted layers: 9 in the released settings, 3 for cross-dataset runs. Prompts deeper than the
            text tower act on the image tower alone.
    """

    def __init__(
        self,
        clip: CLIP,
        classes: Classes,
        tokenizer: Tokenizer | None,
        *,
        tokens: Count = 2,
        depth: Count = 9,
        template: str = "a photo of a {}.",
    ):
        configure(self, locals())
        super().__init__(clip, classes, tokenizer, tokens, template)
        check_depth(clip, depth)
        text, image = self.ctx.shape[1], clip.visual.conv1.out_channels
        self.proj = nn.Linear(text, image)
        self.deep_text = nn.Parameter(torch.randn(depth - 1, tokens, text) * 0.02)
        self.deep_proj = LinearStack(text, image, depth - 1)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (b, C) of images (b, 3, H, W)."""
        image = encode_image(self.clip, images, self.proj(self.ctx), self.deep_proj(self.deep_text))
        text = encode_text(self.clip, self.prompted(self.ctx), self.ends, self.deep_text)
        return similarity(self.clip, image, text)

    def learner_names(self) -> dict[str, str | list]:
        layers, names = range(len(self.deep_text)), dict[str, str | list]()
        names |= {name: LEARNER + name for name in ("ctx", "proj.weight", "proj.bias")}
        names["deep_text"] = [f"{DEEP_TEXT}.{i}" for i in layers]
        return names | {f"deep_proj.{k}": [f"{DEEP_PROJECTIONS}.{i}.{k}" for i in layers] for k in ("weight", "bias")}

    @staticmethod
    def _sizes(state: Mapping[str, Tensor]) -> dict[str, int]:
        return {"tokens": len(state[LEARNER + "ctx"]), "depth": 1 + depth_of(state, f"{DEEP_TEXT}.")}

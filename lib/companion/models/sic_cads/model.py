"""SIC-CADS: image-level classes refine open-vocabulary detection (Fang, Pang, Bai; AAAI 2024, arXiv 2312.10439).

An open-vocabulary detector scores each box from its own pixels and ignores the rest of the scene. Here a small
multi-label classifier (MLR) predicts the probability of each class in the whole image, p (C,), from two branches on one
trained ResNet: the **text** branch learns from labels of the base classes, the **visual** branch is distilled from
CLIP's image encoder, which covers the novel ones ("visual MLR+" uses that encoder itself). The detector is unchanged:
its probabilities (R, C) of R boxes and all classes become

    p_refined = p ** gamma * p_detector ** (1 - gamma)

before any threshold, non-maximum suppression or top-k. Boxes never move.

The formulas are those of the paper's method section and of the authors' code (mala-lab/SIC-CADS at c9f28e1, without a
licence: nothing is copied); where the two differ the code is followed. The paper's experiments could not be read.

Shapes: B images, C classes, P patches (1, or 1 + 4 on two levels), D CLIP's shared width, R boxes.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from open_clip.model import CLIP
from open_clip.transformer import QuickGELU, VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.detection._utils import BoxCoder
from torchvision.ops import FeaturePyramidNetwork, batched_nms, clip_boxes_to_image
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from ...backbones import Input, build, per_channel
from ...errors import BadParameter, check_choice
from ...ops.recorded import recorded
from ..layers.clip_prompting import Tokenizer, tokenise
from ..layers.precision import without_autocast
from ..layers.state_dicts import OfficialModel, check_names, depth, load_official

PROMPT = "There is a {}"  # as released: no article choice, no stop, the class name exactly as in the annotation file
IMAGENET = Input(416, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # 416: the shorter side at test
OPENAI = Input(224, (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
OVER = ("image", "batch", "none")
ACTIVATIONS = ("sigmoid", "softmax")
CROSS_DATASET = 0.8  # weight of the text branch for every class of a foreign vocabulary, constant in the code


# --- patches and scores -----------------------------------------------------------------------------------------------


def patches(levels: int = 2) -> list[tuple[float, float, float, float]]:
    """Top, bottom, left and right of each patch as fractions of the image: level l has (l + 1)² overlapping crops.

    Level 0 is the whole image, level 1 its four corners of two thirds a side, row by row.
    """
    return [
        (i / (level + 2), (i + 2) / (level + 2), j / (level + 2), (j + 2) / (level + 2))
        for level in range(levels)
        for i in range(level + 1)
        for j in range(level + 1)
    ]


def windows(height: int, width: int, levels: int = 2) -> list[tuple[int, int, int, int]]:
    """Left, top, right and bottom, in pixels, of each of `patches` in an image."""
    return [
        (int(left * width), int(top * height), int(right * width), int(bottom * height))
        for top, bottom, left, right in patches(levels)
    ]


def pool(cosines: Tensor, levels: int) -> Tensor:
    """One score a class (..., C) of those of all patches (..., P, C): the largest of each level, then their mean."""
    parts = cosines.split([(level + 1) ** 2 for level in range(levels)], dim=-2)
    return torch.stack([part.amax(-2) for part in parts]).mean(0)


def normalise(scores: Tensor, over: str = "image", scale: float = 1.0) -> Tensor:
    """Probabilities sigmoid((s - mean) / std) of scores (B, C), with the unbiased std.

    Args:
        over: "image", the paper's formula; "batch", mean and std over all B · C scores, as in the released code (which
            tests one image at a time, where the two are equal); "none", sigmoid(scale · s), a control of ours.
    """
    check_choice("over", over, OVER)
    if over == "none":
        return (scale * scores).sigmoid()
    if over == "batch":
        return ((scores - scores.mean()) / scores.std()).sigmoid()
    return ((scores - scores.mean(-1, keepdim=True)) / scores.std(-1, keepdim=True)).sigmoid()


def text_share(novel: Tensor, lambda_base: float = 0.8, lambda_novel: float = 0.8) -> Tensor:
    """The exponent of the text branch for each class (C,): lambda_base, and for novel classes 1 - lambda_novel."""
    for name, value in (("lambda_base", lambda_base), ("lambda_novel", lambda_novel)):
        if not 0 <= value <= 1:
            raise BadParameter(name, value, "0 to 1")
    return torch.where(novel, 1 - lambda_novel, lambda_base)


def fuse(p_text: Tensor, p_image: Tensor, share: Tensor | float) -> Tensor:
    """Eq. 6: p_text ** share * p_image ** (1 - share), (B, C); `share` from `text_share`, or one for all classes."""
    return p_text**share * p_image ** (1 - share)


def refine(probabilities: Tensor, p: Tensor, gamma: float = 0.5) -> Tensor:
    """Eq. 7: the detector's probabilities (R, C) refined by the image-level ones (C,).

    `gamma` 0 gives the detector's, 1 the image's for every box. Call it on the full matrix, background column dropped,
    before threshold, non-maximum suppression and top-k: within one image and one class it changes no order.
    """
    if not 0 <= gamma <= 1:
        raise BadParameter("gamma", gamma, "0 to 1")
    if probabilities.ndim != 2 or p.shape != probabilities.shape[1:]:
        raise BadParameter("p", tuple(p.shape), f"one score for each class of {tuple(probabilities.shape)}")
    return probabilities.pow(1 - gamma).mul(p.to(probabilities.dtype).pow(gamma))


# --- losses -----------------------------------------------------------------------------------------------------------


def rank_loss(scores: Tensor, positives: Tensor, columns: Tensor | None = None) -> Tensor:
    """Mean of max(0, 1 + s_k - s_p) over an image's positives p and all classes k, then over the images.

    As released, k runs over the positives as well, p itself among them, which gives a lower bound of |p| / |k|; an
    image without positives counts with 0.

    Args:
        scores: (B, C), cosines times the logit scale.
        positives: (B, C) bool.
        columns: (C,) bool or indices, the classes used, as positives too: the base ones for boxes. None: all.
    """
    if columns is not None:
        scores, positives = scores[:, columns], positives[:, columns]
    image, label = positives.nonzero(as_tuple=True)
    each = (1 + scores[image] - scores[image, label, None]).clamp_min(0).mean(1)
    return (each / positives.sum(1).clamp_min(1)[image]).sum() / len(scores)


def distillation_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """The L1 distance of normalised embeddings (..., D), summed over D, averaged over the embeddings."""
    return (student - teacher).abs().sum(-1).mean()


# --- image-level recognition ------------------------------------------------------------------------------------------


class Heads(nn.Module):
    """Feature maps to the embeddings of each patch in both branches.

    Level l takes the maximum of every map over a grid of (l + 1)²: quarters that do not overlap, unlike the teacher's
    crops. One shared linear layer, then one a branch, no non-linearity; in float32 also under autocast.
    """

    def __init__(self, inputs: int, dim: int, levels: int = 2):
        super().__init__()
        self.levels = levels
        self.shared = nn.Linear(inputs, dim)
        self.to_text = nn.Linear(dim, dim)
        self.to_image = nn.Linear(dim, dim)

    def pooled(self, maps: Sequence[Tensor]) -> Tensor:
        """The maxima (B, P, sum of widths) of maps (B, width, h, w), one or more, concatenated on the channels."""
        levels = [
            torch.cat([F.adaptive_max_pool2d(m, level + 1).flatten(2).mT for m in maps], -1)
            for level in range(self.levels)
        ]
        return torch.cat(levels, 1)

    def forward(self, maps: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """The embeddings e_text and e_image, (B, P, D) each, of length 1."""
        pooled = self.pooled(maps)
        with without_autocast(pooled.device):
            x = self.shared(pooled.float())
            return F.normalize(self.to_text(x), dim=-1), F.normalize(self.to_image(x), dim=-1)


_HEADS = {"shared": "mlr_lin", "to_text": "mlr_lin2", "to_image": "image_embedding"}


class Recognition(NamedTuple):
    """The image-level scores of B images."""

    text: Tensor  # (B, P, C) cosines of each patch
    image: Tensor  # (B, P, C)
    p_text: Tensor  # (B, C) probabilities of each branch
    p_image: Tensor  # (B, C)
    p: Tensor  # (B, C) both fused: the input of `refine`, one row an image


class MLR(OfficialModel):
    """Multi-modal multi-label recognition on a backbone of any size. Body and teacher are copied, not changed in place.

        maps = FPN(body(image))                      P3 ... P7
        e_text, e_image = heads(maps)                (B, P, D), or for the second CLIP's own embedding of the P crops
        s = pool(e · t)                              t (C, D): the embedded class names
        p = fuse(normalise(s_text), normalise(s_image))

    Args:
        body: a timm model with intermediate feature maps, ResNet-50 as published; with `channels`, any module from
            images to a list of maps, such as a detector's own backbone.
        text: embedded class names (C, D), from `vocabulary`; used as they are, and frozen.
        novel: (C,) bool: classes without boxes in training.
        teacher: CLIP's image tower, crops (N, 3, s, s) to (N, D), frozen. None: only the student's scores are
            available, and the distillation needs cached embeddings.
        channels: of the body's maps, when it is not timm's.
        indices: which of a timm body's maps; 2, 3, 4 are strides 8, 16, 32 of a ResNet.
        width: of the pyramid.
        extra: P6 and P7 on top of the pyramid.
        levels: of patches; 1 is the whole image alone, as in the paper, 2 what all released configurations use.
        lambda_base, lambda_novel: see `text_share`. 0.8 and 0.8 for LVIS, 0.8 and 0.5 for COCO.
        tau: logit scale of the rank loss: 50 for LVIS, 20 for COCO. Not used in testing.
        distill: weight of the distillation loss.
        over: see `normalise`.
        image_input: normalisation of the body's input, `size` being the shorter side at test; sides are padded to
            multiples of 32.
        teacher_input: size and normalisation of the teacher's crops.
        antialias: of the resizing of crops. False as released; newer torchvision would smooth, which changes scores.
        freeze_norms: the body's batch norms keep their statistics, weights and biases. A body of random weights needs
            them trained.
    """

    def __init__(
        self,
        body: nn.Module,
        text: Tensor,
        novel: Tensor,
        *,
        teacher: nn.Module | None = None,
        channels: Sequence[int] | None = None,
        indices: Sequence[int] = (2, 3, 4),
        width: int = 256,
        extra: bool = True,
        levels: int = 2,
        lambda_base: float = 0.8,
        lambda_novel: float = 0.8,
        tau: float = 50.0,
        distill: float = 0.01,
        over: str = "image",
        image_input: Input = IMAGENET,
        teacher_input: Input = OPENAI,
        antialias: bool = False,
        freeze_norms: bool = True,
    ):
        super().__init__()
        if text.ndim != 2 or len(text) < 2:
            raise BadParameter("text", tuple(text.shape), "embeddings (C, D) of two classes or more")
        if novel.shape != text.shape[:1] or novel.dtype != torch.bool:
            raise BadParameter("novel", (tuple(novel.shape), novel.dtype), f"one bool for each of {len(text)} classes")
        if levels < 1:
            raise BadParameter("levels", levels, "1 or more")
        check_choice("over", over, OVER)
        self.indices = None if channels else tuple(indices)
        if channels is None:
            if not hasattr(body, "forward_intermediates") or max(indices) >= len(body.feature_info):
                raise BadParameter(
                    "body", type(body).__name__, f"a timm model with maps {tuple(indices)}, or `channels`"
                )
            channels = [body.feature_info[i]["num_chs"] for i in indices]
        self.body, self.freeze_norms = copy.deepcopy(body), freeze_norms
        self.pyramid = FeaturePyramidNetwork(list(channels), width, LastLevelP6P7(width, width) if extra else None)
        self.heads = Heads(width * (len(channels) + 2 * extra), text.shape[1], levels)
        self.text = nn.Parameter(text.detach().float().clone(), requires_grad=False)
        self.register_buffer("novel", novel.clone(), persistent=False)
        self._base: Tensor | None = None
        self.teacher = None if teacher is None else copy.deepcopy(teacher).requires_grad_(False)
        self.lambda_base, self.lambda_novel = lambda_base, lambda_novel
        text_share(novel, lambda_base, lambda_novel)  # refuses values outside 0 to 1 now, not at the first image
        self.tau, self.distill, self.over = tau, distill, over
        self.image_input, self.teacher_input, self.antialias = image_input, teacher_input, antialias
        if freeze_norms:
            for norm in self._norms():
                norm.requires_grad_(False)
        self.train(self.training)

    @property
    def levels(self) -> int:
        return self.heads.levels

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """As in timm, for the body."""
        self.body.set_grad_checkpointing(enable)

    def _norms(self) -> list[nn.Module]:
        return [m for m in self.body.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]

    def train(self, mode: bool = True):
        super().train(mode)
        if self.freeze_norms:
            for norm in self._norms():
                norm.eval()
        if self.teacher is not None:
            self.teacher.eval()
        return self

    # --- inputs

    def prepared(self, images: Tensor, resize: bool = True) -> Tensor:
        """The body's input from images (B, 3, H, W), uint8, RGB: resized to the nearest pixel so that the shorter side
        is `image_input.size` (not in training), normalised, padded right and below with zeros."""
        _check_pixels(images)
        if resize:
            scale = self.image_input.size / min(images.shape[-2:])
            images = F.interpolate(images, scale_factor=scale, recompute_scale_factor=True)
        height, width = images.shape[-2:]
        return F.pad(_standardised(images, self.image_input), (0, -width % 32, 0, -height % 32))

    def crops(self, images: Tensor) -> Tensor:
        """The teacher's crops (B, P, 3, s, s) of images (B, 3, H, W), uint8: resized to a square, bilinear, rounded to
        whole grey values as released, normalised."""
        _check_pixels(images)
        size, found = self.teacher_input.size, []
        height, width = images.shape[-2:]
        for left, top, right, bottom in windows(height, width, self.levels):
            crop = images[..., top:bottom, left:right].float()
            options = {"mode": "bilinear", "antialias": self.antialias, "align_corners": False}
            found.append(F.interpolate(crop, (size, size), **options))
        return _standardised(torch.stack(found, 1).round_(), self.teacher_input)

    @torch.no_grad()
    def teacher_embeddings(self, images: Tensor) -> Tensor:
        """CLIP's embeddings (B, P, D), of length 1, of the crops of images (B, 3, H, W), in one pass of the tower."""
        if self.teacher is None:
            raise BadParameter("teacher", None, "CLIP's image tower: the model was made without one")
        return F.normalize(self.teacher(self.crops(images).flatten(0, 1)), dim=-1).unflatten(0, (len(images), -1))

    # --- outputs

    def forward_features(self, x: Tensor) -> list[Tensor]:
        """The pyramid's maps, finest first, of prepared images."""
        if self.indices is None:
            found = self.body(x)
        else:
            found = self.body.forward_intermediates(x, indices=list(self.indices), intermediates_only=True)
        return list(self.pyramid({str(i): m for i, m in enumerate(found)}).values())

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The embeddings e_text and e_image, (B, P, D) each, of prepared images."""
        return self.heads(self.forward_features(x))

    @property
    def base(self) -> Tensor:
        """The indices of the base classes: unlike a mask, a step can select by them without a wait for the GPU."""
        if self._base is None or self._base.device != self.novel.device:
            self._base = (~self.novel).nonzero().flatten()
        return self._base

    def cosines(self, embeddings: Tensor) -> Tensor:
        """The cosines (B, P, C) of embeddings (B, P, D) and the texts, in float32 also under autocast."""
        with without_autocast(embeddings.device):
            return embeddings.float() @ self.text.mT

    def recognised(self, e_text: Tensor, e_image: Tensor, share: Tensor | float | None = None) -> Recognition:
        """Both branches' embeddings (B, P, D) to scores. `share`: see `fuse`; `CROSS_DATASET` for a vocabulary that
        the text branch was not trained for; None: `text_share` with the model's lambdas."""
        text, image = self.cosines(e_text), self.cosines(e_image)
        p_text, p_image = (normalise(pool(s, self.levels), self.over, self.tau) for s in (text, image))
        if share is None:
            share = text_share(self.novel, self.lambda_base, self.lambda_novel)
        return Recognition(text, image, p_text, p_image, fuse(p_text, p_image, share))

    @torch.no_grad()
    def recognise(self, images: Tensor, student: bool = False, share: Tensor | float | None = None) -> Recognition:
        """The image-level scores of images (B, 3, H, W), uint8, RGB, of one size.

        Args:
            student: of the visual branch, False takes the embeddings of CLIP's own image tower (visual MLR+, as all
                released configurations test), True the learned ones (visual MLR).
            share: as in `recognised`.
        """
        e_text, e_image = self(self.prepared(images))
        return self.recognised(e_text, e_image if student else self.teacher_embeddings(images), share)

    def loss(
        self, images: Tensor, positives: Tensor, *, boxes: bool = True, teacher: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The rank and the distillation loss of one batch, weighted; training minimises their sum.

        Args:
            images: (B, 3, H, W) uint8, augmented, of the training size.
            positives: (B, C) bool.
            boxes: whether the labels are those of boxes, which rank over the base classes alone. Image labels
                (captions, ImageNet) rank over all classes, novel names included, as in the released configurations.
            teacher: the teacher's embeddings (B, P, D) of these images, where they were cached.
        """
        e_text, e_image = self(self.prepared(images, resize=False))
        scores = self.tau * pool(self.cosines(e_text), self.levels)
        ranked = rank_loss(scores, positives, self.base if boxes else None)
        teacher = self.teacher_embeddings(images) if teacher is None else teacher
        return ranked, self.distill * distillation_loss(e_image, teacher)

    # --- the authors' files

    @classmethod
    def from_official(cls, state: Mapping[str, Tensor], novel: Tensor, **options):
        """The model of a state dict of the authors' code (ResNet-50, CLIP's image tower when it is there).

        A merged file, in which the names start with "ovmlr_model.", is accepted; the detector in it is not read. The
        text embeddings are those stored: call `F.normalize` on raw ones.

        Raises `BadCheckpoint`: names that are missing, unknown or of another shape, all of them listed.
        """
        merged = {n.removeprefix("ovmlr_model."): t for n, t in state.items() if n.startswith("ovmlr_model.")}
        state, what = merged or state, "SIC-CADS' image-level model (ResNet-50)"
        check_names(state, {"text_embedding.weight", "mlr_lin.weight"}, what)
        tower = {n.removeprefix("clip_model."): t for n, t in state.items() if n.startswith("clip_model.")}
        body = build("resnet50", "random")
        teacher = _tower(tower) if tower else None
        model = cls(body, state["text_embedding.weight"], novel, teacher=teacher, **options).eval()
        load_official(model, state, model.official_names(), what, ignored=("backbone.bottom_up.base.fc.",))
        return model

    def official_names(self) -> dict[str, str]:
        """Our names to the authors', without the classifier `fc` of their files, which is never used."""
        names = {}
        for name in self.state_dict():
            part, _, rest = name.partition(".")
            if part == "body" and not rest.endswith("num_batches_tracked"):
                names[name] = f"backbone.bottom_up.base.{rest}"
            elif part == "pyramid":
                kind, index, *_, value = rest.split(".")
                kinds = {"inner_blocks": "fpn_lateral", "layer_blocks": "fpn_output"}
                official = f"top_block.{index}" if kind == "extra_blocks" else f"{kinds[kind]}{int(index) + 3}"
                names[name] = f"backbone.{official}.{value}"
            elif part == "heads":
                layer, value = rest.split(".")
                names[name] = f"{_HEADS[layer]}.{value}"
            elif part == "teacher":
                names[name] = f"clip_model.{rest}"
        return names | {"text": "text_embedding.weight"}


def _check_pixels(images: Tensor) -> None:
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
        raise BadParameter("images", (tuple(images.shape), images.dtype), "a batch (B, 3, H, W) of uint8, RGB")


def _standardised(pixels: Tensor, target: Input) -> Tensor:
    mean, std = (per_channel(values, pixels.device) for values in (target.mean, target.std))
    return (pixels / 255 - mean) / std


@recorded()
def _tower(state: Mapping[str, Tensor]) -> VisionTransformer:
    """CLIP's image tower (QuickGELU) of the size that a state dict has."""
    width, _, patch, _ = state["conv1.weight"].shape
    side = round((len(state["positional_embedding"]) - 1) ** 0.5)
    return VisionTransformer(
        image_size=side * patch,
        patch_size=patch,
        width=width,
        layers=depth(state, "transformer.resblocks."),
        heads=width // 64,
        mlp_ratio=len(state["transformer.resblocks.0.mlp.c_fc.weight"]) / width,
        output_dim=state["proj"].shape[1],
        act_layer=QuickGELU,
    ).eval()


@torch.no_grad()
def vocabulary(clip: CLIP, tokenizer: Tokenizer, names: Sequence[str], prompt: str = PROMPT, batch: int = 64) -> Tensor:
    """Class names embedded by CLIP's text tower (C, D), of length 1.

    The detector's own classifier has another table, of another prompt ("a {}" in Detic), in the same order of classes.
    """
    ids = tokenise(tokenizer, clip, [prompt.format(name) for name in names])
    return F.normalize(torch.cat([clip.encode_text(part) for part in ids.split(batch)]), dim=-1)


# --- the detector -----------------------------------------------------------------------------------------------------


class ZeroShotClassifier(nn.Module):
    """The classifier of open-vocabulary detectors of Detic's family: scale · cos(linear(x), class), background 0.

    Args:
        inputs: width of a box's feature.
        classes: (C, D), any length.
        scale: of the cosines; 50 in Detic.
        bias: initial value of a learned bias on all logits; None for no bias, as released.
    """

    def __init__(self, inputs: int, classes: Tensor, scale: float = 50.0, bias: float | None = None):
        super().__init__()
        self.linear = nn.Linear(inputs, classes.shape[1])
        self.register_buffer("classes", F.normalize(classes.float(), dim=-1))
        self.scale = scale
        self.bias = None if bias is None else nn.Parameter(torch.tensor(float(bias)))

    def forward(self, x: Tensor, classes: Tensor | None = None) -> Tensor:
        """Logits (R, C + 1) of features (R, inputs), the last column the background's; of other `classes` (K, D),
        of any length, (R, K) without one. The cosines are in float32 also under autocast."""
        with without_autocast(x.device):
            x = self.scale * F.normalize(self.linear(x.float()), dim=-1)
            logits = x @ (self.classes if classes is None else F.normalize(classes.float(), dim=-1)).mT
        logits = logits if self.bias is None else logits + self.bias
        return F.pad(logits, (0, 1)) if classes is None else logits


def detector_scores(stages: Sequence[Tensor], objectness: Tensor | None = None, activation: str = "sigmoid") -> Tensor:
    """Probabilities (R, C + 1) of a detector with one or more stages of logits (R, C + 1): the mean over the stages.

    With `objectness` (R,), the proposals' scores, the root of the product (CenterNet2 on OV-LVIS); without, as Faster
    R-CNN on OV-COCO. `activation`: "sigmoid", as the released detectors; "softmax", the paper's Eq. 1. Drop the last
    column, the background's, before `refine`.
    """
    check_choice("activation", activation, ACTIVATIONS)
    given = [logits.sigmoid() if activation == "sigmoid" else logits.softmax(-1) for logits in stages]
    mean = sum(given) / len(given)
    return mean if objectness is None else (mean * objectness[:, None]).sqrt()


def cascade_boxes(
    proposals: Tensor, deltas: Sequence[Tensor], weights: Sequence[Sequence[float]], image_size: tuple[int, int]
) -> Tensor:
    """Boxes (R, 4), xyxy in pixels, after one or more stages of offsets (R, 4), each on the clipped boxes before it.

    `weights`: what each stage divides its offsets by, ((10, 10, 5, 5),) in Faster R-CNN. `image_size`: height, width.
    """
    boxes = proposals
    for offsets, stage in zip(deltas, weights, strict=True):
        boxes = clip_boxes_to_image(BoxCoder(tuple(stage)).decode(offsets, [boxes])[:, 0], image_size)
    return boxes


class Detections(NamedTuple):
    """The detections of one image, best first."""

    boxes: Tensor  # (n, 4) xyxy, pixels
    scores: Tensor  # (n,)
    classes: Tensor  # (n,) index of the class
    rows: Tensor  # (n,) which of the R boxes given


def detect(
    boxes: Tensor, probabilities: Tensor, threshold: float = 0.0, nms: float | None = 0.5, top: int = 100
) -> Detections:
    """Threshold, non-maximum suppression within each class, top-k: the steps after the refinement.

    Args:
        boxes: (R, 4), shared by all classes. probabilities: (R, C), refined or not.
        threshold: lowest score, itself excluded. Refinement raises low scores, since p is near 0.5 for most classes: at
            gamma 0.5 a threshold T keeps p_detector · p > T².
        nms: IoU from which a box is suppressed; None for no suppression, for detectors that predict sets.
        top: largest number of detections.
    """
    rows, classes = (probabilities > threshold).nonzero(as_tuple=True)
    scores = probabilities[rows, classes]
    if nms is None:
        best = scores.argsort(descending=True, stable=True)[:top]
    else:
        best = batched_nms(boxes[rows], scores, classes, nms)[:top]
    return Detections(boxes[rows[best]], scores[best], classes[best], rows[best])

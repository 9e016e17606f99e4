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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from einops import rearrange
from open_clip.model import CLIP
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import FeaturePyramidNetwork, batched_nms
from torchvision.ops.feature_pyramid_network import LastLevelP6P7
from torchvision.transforms.v2.functional import pil_to_tensor

from ...backbones import Input, build, per_channel
from ...errors import Amount, BadParameter, Count, Share, Whole, check_choice, typed
from ...io.config import configure, reconfigure
from ..layers.clip_prompting import Tokenizer, tokenise
from ..layers.precision import without_autocast
from ..layers.predicting import Images, Names, named, picture
from ..layers.state_dicts import OfficialModel, below, check_names, load_official, renamed
from . import official

PROMPT = "There is a {}"  # as released: no article choice, no stop, the class name exactly as in the annotation file
IMAGENET = Input(416, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # 416: the shorter side at test
OPENAI = Input(224, (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
CROSS_DATASET = 0.8  # weight of the text branch for every class of a foreign vocabulary, constant in the code


# --- patches and scores -----------------------------------------------------------------------------------------------


def windows(height: int, width: int, levels: int = 2) -> list[tuple[int, int, int, int]]:
    """Left, top, right and bottom, in pixels, of an image's patches: level l has (l + 1)² overlapping crops.

    Level 0 is the whole image, level 1 its four corners of two thirds a side, row by row.
    """
    crops = []
    for level in range(levels):
        x, y = ([int(i / (level + 2) * side) for i in range(level + 3)] for side in (width, height))
        crops += [(x[j], y[i], x[j + 2], y[i + 2]) for i in range(level + 1) for j in range(level + 1)]
    return crops


def pool(cosines: Tensor, levels: int) -> Tensor:
    """One score a class (..., C) of those of all patches (..., P, C): the largest of each level, then their mean."""
    parts = cosines.split([(level + 1) ** 2 for level in range(levels)], dim=-2)
    return torch.stack([part.amax(-2) for part in parts]).mean(0)


def normalise(scores: Tensor, over: str = "image") -> Tensor:
    """Probabilities sigmoid((s - mean) / std) of scores (B, C), with the unbiased std; 0.5 where all scores are equal.

    `over`: "image", the paper's formula; "batch", mean and std over all B · C scores, as in the released code (which
    tests one image at a time, where the two are equal).
    """
    check_choice("over", over, ("image", "batch"))
    dims = (-2, -1) if over == "batch" else -1
    return ((scores - scores.mean(dims, keepdim=True)) / scores.std(dims, keepdim=True).clamp_min(1e-6)).sigmoid()


@typed
def text_share(novel: Tensor, lambda_base: Share = 0.8, lambda_novel: Share = 0.8) -> Tensor:
    """The exponent of the text branch for each class (C,): lambda_base, and for novel classes 1 - lambda_novel."""
    return torch.where(novel, 1 - lambda_novel, lambda_base)


@typed
def fuse(p_text: Tensor, p_image: Tensor, share: Tensor | Share) -> Tensor:
    """Eq. 6: p_text ** share * p_image ** (1 - share), (B, C); `share` from `text_share`, or one for all classes."""
    return p_text**share * p_image ** (1 - share)


@typed
def refine(probabilities: Tensor, scores: Tensor, gamma: Share = 0.5) -> Tensor:
    """Eq. 7: the detector's probabilities (R, C) refined by the image-level ones (C,).

    `gamma` 0 gives the detector's, 1 the image's for every box. Call it on the full matrix, background column dropped,
    before threshold, non-maximum suppression and top-k: within one image and one class it changes no order.
    """
    if probabilities.ndim != 2 or scores.shape != probabilities.shape[1:]:
        raise BadParameter("scores", tuple(scores.shape), f"one score for each class of {tuple(probabilities.shape)}")
    return probabilities.pow(1 - gamma).mul(scores.to(probabilities.dtype).pow(gamma))


# --- losses -----------------------------------------------------------------------------------------------------------


def rank_loss(scores: Tensor, positives: Tensor, columns: Tensor | None = None) -> Tensor:
    """Mean of max(0, 1 + s_k - s_p) over an image's positives p and all classes k, then over the images.

    As released, k runs over the positives as well, p itself among them, which gives a lower bound of |p| / |k|; an
    image without positives among the classes used counts with 0.

    Args:
        scores: (B, C), cosines times the logit scale.
        positives: (B, C) bool.
        columns: (C,) bool, the classes used, as positives too: the base ones for boxes. None: all.
    """
    if positives.shape != scores.shape or positives.dtype != torch.bool:
        raise BadParameter("positives", (tuple(positives.shape), positives.dtype), f"bool, {tuple(scores.shape)}")
    columns = torch.ones_like(positives[0]) if columns is None else columns
    # The k that count for p are those with s_k >= s_p - 1, the last ones in order: their number and their sum suffice.
    # All classes are taken for p, and weigh 0 if they are no positives: to select these would wait for the GPU.
    ordered = scores.masked_fill(~columns, -torch.inf).sort(-1).values  # (B, C)
    count = (scores.shape[1] - torch.searchsorted(ordered, scores.detach() - 1)).clamp_min(1)  # (B, C)
    sums = ordered.flip(-1).cumsum(-1).gather(-1, count - 1)  # (B, C), of the `count` largest
    hinge = (count * (1 - scores) + sums) / columns.sum().clamp_min(1)  # (B, C), of each class p the mean over k
    positives = positives & columns
    weights = positives.to(scores.dtype) / positives.sum(1, keepdim=True).clamp_min(1)
    # not weights * hinge: without a column in use the hinge is infinite
    return (weights * hinge.where(positives, 0)).sum() / len(scores)


def distillation_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """The L1 distance of normalised embeddings (..., D), summed over D, averaged over the embeddings."""
    if student.shape != teacher.shape:
        raise BadParameter("teacher", tuple(teacher.shape), f"embeddings {tuple(student.shape)}, as the student's")
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
        levels = []
        for side in range(1, self.levels + 1):
            maxima = [rearrange(F.adaptive_max_pool2d(m, side), "b w i j -> b (i j) w") for m in maps]
            levels.append(torch.cat(maxima, -1))  # (B, side², sum of widths)
        return torch.cat(levels, 1)

    def forward(self, maps: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """The embeddings e_text and e_image, (B, P, D) each, of length 1."""
        pooled = self.pooled(maps)  # (B, P, sum of widths)
        with without_autocast(pooled.device):
            x = self.shared(pooled.to(self.shared.weight.dtype))  # (B, P, D)
            return F.normalize(self.to_text(x), dim=-1), F.normalize(self.to_image(x), dim=-1)


class Recognition(NamedTuple):
    """The image-level scores of B images."""

    text: Tensor  # (B, P, C) cosines of each patch
    image: Tensor  # (B, P, C)
    p_text: Tensor  # (B, C) probabilities of each branch
    p_image: Tensor  # (B, C)
    p: Tensor  # (B, C) both fused: the input of `refine`, one row an image


@typed
@dataclass(frozen=True)
class Settings:
    """Sizes and constants of a recogniser; the defaults are those of OV-LVIS.

    Attributes:
        indices: which maps of the body; 2, 3, 4 are strides 8, 16, 32 of a ResNet.
        width: of the pyramid.
        levels: of patches; 1 is the whole image alone, as in the paper, 2 what all released configurations use.
        lambda_base, lambda_novel: see `text_share`. 0.8 and 0.8 for LVIS, 0.8 and 0.5 for COCO.
        tau: logit scale of the rank loss: 50 for LVIS, 20 for COCO. Not used in testing.
        distill: weight of the distillation loss.
        image_input: normalisation of the body's input, `size` being the shorter side at test; sides are padded to
            multiples of 32.
        teacher_input: size and normalisation of the teacher's crops.
        freeze_norms: the body's batch norms keep their statistics, weights and biases. A body of random weights needs
            them trained.
    """

    indices: tuple[Whole, ...] = (2, 3, 4)
    width: Count = 256
    levels: Count = 2
    lambda_base: Share = 0.8
    lambda_novel: Share = 0.8
    tau: Amount = 50.0
    distill: Amount = 0.01
    image_input: Input = IMAGENET
    teacher_input: Input = OPENAI
    freeze_norms: bool = True


class MLR(OfficialModel):
    """Multi-modal multi-label recognition on a backbone of any size. Body and teacher are copied, not changed in place.

        maps = FPN(body(image))                      P3 ... P7
        e_text, e_image = heads(maps)                (B, P, D), or for the second CLIP's own embedding of the P crops
        s = pool(e · t)                              t (C, D): the embedded class names
        p = fuse(normalise(s_text), normalise(s_image))

    Args:
        body: a timm model with intermediate feature maps, ResNet-50 as published.
        text: embedded class names (C, D), from `vocabulary`; used as they are, and frozen. At least three: `normalise`
            has no std for one, and gives the same two probabilities for any two scores.
        novel: (C,) bool: classes without boxes in training.
        teacher: CLIP's image tower, crops (N, 3, s, s) to (N, D), frozen. None: only the student's scores are
            available, and the distillation needs cached embeddings.
    """

    top: Callable[[int, int], nn.Module] | None = LastLevelP6P7  # P6 and P7 on top of the pyramid

    def __init__(
        self,
        body: nn.Module,
        text: Tensor,
        novel: Tensor,
        settings: Settings = Settings(),
        *,
        teacher: nn.Module | None = None,
    ):
        configure(self, locals())
        super().__init__()
        self.settings = s = settings
        known = range(len(body.feature_info))
        if not s.indices or list(s.indices) != sorted(set(s.indices) & set(known)):
            raise BadParameter(
                "indices", s.indices, f"rising ones of the body's {len(known)} maps, 0 to {len(known) - 1}"
            )
        self.body = copy.deepcopy(body)
        channels = [body.feature_info[i]["num_chs"] for i in s.indices]
        top = self.top and self.top(s.width, s.width)
        self.pyramid = FeaturePyramidNetwork(channels, s.width, top)
        self.heads = Heads(s.width * (len(channels) + 2 * (top is not None)), text.shape[1], s.levels)
        self.reset_classifier(text, novel)
        self.teacher = copy.deepcopy(teacher)
        for part in self._frozen():
            part.requires_grad_(False)
        self.train(self.training)

    @property
    def num_classes(self) -> int:
        return len(self.text)

    def reset_classifier(self, text: Tensor, novel: Tensor) -> None:
        """Exchange the embedded class names (C, D), and which of them have no boxes (C,); no other weight changes."""
        if novel.shape != text.shape[:1] or novel.dtype != torch.bool:
            raise BadParameter("novel", (tuple(novel.shape), novel.dtype), f"one bool for each of {len(text)} classes")
        if len(text) < 3:
            raise BadParameter("text", tuple(text.shape), "three classes or more: fewer have no image-level scores")
        device = next(self.heads.parameters()).device
        self.text = nn.Parameter(text.detach().float().clone().to(device), requires_grad=False)
        self.register_buffer("novel", novel.clone().to(device), persistent=False)
        reconfigure(self, text=text, novel=novel)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """As in timm, for the body."""
        self.body.set_grad_checkpointing(enable)

    def _frozen(self) -> list[nn.Module]:
        """The parts without trainable parameters, which stay in eval mode."""
        parts = [] if self.teacher is None else [self.teacher]
        if self.settings.freeze_norms:
            parts += [m for m in self.body.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        return parts

    def train(self, mode: bool = True) -> MLR:
        """As `nn.Module.train`, but frozen norms and the teacher stay in eval mode."""
        super().train(mode)
        for part in self._frozen():
            part.eval()
        return self

    # --- inputs

    def prepared(self, images: Tensor, resize: bool = True) -> Tensor:
        """The body's input from images (B, 3, H, W), uint8, RGB: resized to the nearest pixel so that the shorter side
        is `image_input.size`, for some sizes a pixel less as released (not in training), normalised, padded right and
        below with zeros."""
        check_pixels(images)
        target = self.settings.image_input
        if resize:
            scale = target.size / min(images.shape[-2:])  # a float: the shorter side of 669 x 1333 becomes 415, not 416
            images = F.interpolate(images, [int(side * scale) for side in images.shape[-2:]])
        height, width = images.shape[-2:]
        return F.pad(_standardised(images, target), (0, -width % 32, 0, -height % 32))

    def crops(self, images: Tensor) -> Tensor:
        """The teacher's crops (B, P, 3, s, s) of images (B, 3, H, W), uint8: resized to a square, bilinear without
        antialiasing, rounded to whole grey values as released, normalised."""
        check_pixels(images)
        target, crops = self.settings.teacher_input, []
        height, width = images.shape[-2:]
        for left, top, right, bottom in windows(height, width, self.settings.levels):
            crop = images[..., top:bottom, left:right].float()
            crops.append(F.interpolate(crop, (target.size, target.size), mode="bilinear", align_corners=False))
        return _standardised(torch.stack(crops, 1).round_(), target)

    @torch.no_grad()
    def teacher_embeddings(self, images: Tensor) -> Tensor:
        """CLIP's embeddings (B, P, D), of length 1, of the crops of images (B, 3, H, W), in one pass of the tower."""
        if self.teacher is None:
            raise BadParameter("teacher", None, "CLIP's image tower: the model was made without one")
        crops = rearrange(self.crops(images), "b p c h w -> (b p) c h w")
        return rearrange(F.normalize(self.teacher(crops), dim=-1), "(b p) d -> b p d", b=len(images))

    # --- outputs

    def forward_features(self, x: Tensor) -> list[Tensor]:
        """The pyramid's maps, finest first, of prepared images."""
        indices = list(self.settings.indices)
        maps = self.body.forward_intermediates(x, indices=indices, intermediates_only=True)
        return list(self.pyramid({str(i): m for i, m in enumerate(maps)}).values())

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The embeddings e_text and e_image, (B, P, D) each, of prepared images."""
        return self.heads(self.forward_features(x))

    def cosines(self, embeddings: Tensor) -> Tensor:
        """The cosines (B, P, C) of embeddings (B, P, D) and the texts, in float32 also under autocast."""
        with without_autocast(embeddings.device):
            return embeddings.float() @ self.text.mT

    def recognised(self, e_text: Tensor, e_image: Tensor, share: Tensor | float | None = None) -> Recognition:
        """Both branches' embeddings (B, P, D) to scores. `share`: see `fuse`; `CROSS_DATASET` for a vocabulary that
        the text branch was not trained for; None: `text_share` with the model's lambdas."""
        s, text, image = self.settings, self.cosines(e_text), self.cosines(e_image)
        p_text, p_image = (normalise(pool(cosines, s.levels)) for cosines in (text, image))  # (B, C) each
        if share is None:
            share = text_share(self.novel, s.lambda_base, s.lambda_novel)
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

    def predict(self, images: Images, names: Names, detector: Callable | None = None, **options: Any) -> list[Any]:
        """The score of each class; with a `detector` refined detections, options as of `refined`."""
        device, found = next(self.parameters()).device, list[Any]()
        known = names or [str(i) for i in range(self.num_classes)]
        for image in images:
            pixels = pil_to_tensor(picture(image)).to(device)
            scores = self.recognise(pixels[None], student=self.teacher is None).p.float().cpu()  # (1, C)
            rows: list[Any] = named(scores, names)
            if detector is not None:
                best = refined(detector(pixels), scores[0], **options)
                parts = zip(best.classes.tolist(), best.scores.tolist(), best.boxes.tolist(), strict=True)
                rows = [[{"class": known[c], "score": score, "box": box} for c, score, box in parts]]
            found += rows
        return found

    def loss(
        self, images: Tensor, positives: Tensor, *, boxes: Tensor | bool = True, teacher: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The rank and the distillation loss of one batch, weighted; training minimises their sum.

        Args:
            images: (B, 3, H, W) uint8, augmented, of the training size.
            positives: (B, C) bool.
            boxes: whether the labels are those of boxes, which rank over the base classes alone; (B,) bool where images
                differ. Image labels (captions, ImageNet) rank over all classes, novel names included, as in the
                released configurations.
            teacher: the teacher's embeddings (B, P, D) of these images, where they were cached.
        """
        e_text, e_image = self(self.prepared(images, resize=False))
        scores = self.settings.tau * pool(self.cosines(e_text), self.settings.levels)  # (B, C)
        ranked = self.ranked(scores, positives, boxes)
        teacher = self.teacher_embeddings(images) if teacher is None else teacher
        return ranked, self.settings.distill * distillation_loss(e_image, teacher)

    def ranked(self, scores: Tensor, positives: Tensor, boxes: Tensor | bool) -> Tensor:
        """The rank loss of scores (B, C); arguments as in `loss`."""
        if isinstance(boxes, bool):
            return rank_loss(scores, positives, ~self.novel if boxes else None)
        with_boxes = rank_loss(scores, positives & boxes[:, None], ~self.novel)  # images without positives count with 0
        return with_boxes + rank_loss(scores, positives & ~boxes[:, None])

    # --- the authors' files

    @classmethod
    def from_official(cls, state: Mapping[str, Tensor], novel: Tensor, settings: Settings = Settings()) -> MLR:
        """The model of a state dict of the authors' code (ResNet-50, CLIP's image tower when it is there).

        A merged file, in which the names start with "ovmlr_model.", is accepted; the detector in it is not read. The
        text embeddings are those stored: call `F.normalize` on raw ones.

        Raises `BadCheckpoint`: names that are missing, unknown or of another shape, all of them listed.
        """
        state = official.cleaned(state)
        check_names(state, {"text_embedding.weight", "mlr_lin.weight"}, official.WHAT)
        tower = below(state, "clip_model.")
        teacher = official.tower(tower) if tower else None
        model = cls(
            build("resnet50", "random"), state["text_embedding.weight"], novel, settings, teacher=teacher
        ).eval()
        load_official(model, state, model.official_names(), official.WHAT, ignored=(official.CLASSIFIER,))
        return model

    def official_names(self) -> dict[str, str]:
        """Our names to the authors', without the classifier `fc` of their files, which is never used."""
        return renamed((name for name in self.state_dict() if not name.endswith("num_batches_tracked")), official.NAMES)


class BatchLoss(nn.Module):
    """The loss of a batch as one forward pass, which training on several devices requires.

    A batch is of images, as `Crops` gives them, or of groups of images, as `Turns` does. Images with boxes rank the
    base classes, those with labels alone all classes.
    """

    def __init__(self, model: MLR):
        super().__init__()
        self.model = model

    def forward(self, images: Tensor, positives: Tensor, boxes: Tensor) -> dict[str, Tensor]:
        """The loss and its two terms, "rank" and "distill", as weighted in it."""
        images, positives = images.flatten(0, -4), positives.flatten(0, -2)
        rank, distill = self.model.loss(images, positives, boxes=boxes.flatten())
        return {"loss": rank + distill, "rank": rank, "distill": distill}


def check_pixels(images: Tensor) -> None:
    """Raise `BadParameter` unless `images` are (B, 3, H, W), uint8."""
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3 or not len(images):
        accepted = "a batch (B, 3, H, W) of one or more, uint8, RGB"
        raise BadParameter("images", (tuple(images.shape), images.dtype), accepted)


def _standardised(pixels: Tensor, target: Input) -> Tensor:
    mean, std = (per_channel(values, pixels.device) for values in (target.mean, target.std))
    return (pixels / 255 - mean) / std


@torch.no_grad()
def vocabulary(clip: CLIP, tokenizer: Tokenizer, names: Names) -> Tensor:
    """Class names embedded by CLIP's text tower (C, D), of length 1.

    The detector's own classifier has another table, of another prompt ("a {}" in Detic), in the same order of classes.
    """
    ids = tokenise(tokenizer, clip, [PROMPT.format(name) for name in names])
    return F.normalize(torch.cat([clip.encode_text(part) for part in ids.split(64)]), dim=-1)


# --- the detector -----------------------------------------------------------------------------------------------------


FLOOR = 1e-3  # lower bound of scores: a set predictor has R · C of them


class Output(NamedTuple):
    """A detector's output for one image, before threshold, suppression and top-k."""

    boxes: Tensor  # (R, 4) xyxy, pixels of the image
    probabilities: Tensor  # (R, C), each in 0 to 1: every class of every box
    size: tuple[int, int]  # height and width of the image


Detector = Callable[[Tensor], Output]
"""An image (3, H, W), uint8, RGB, to an `Output`."""


class Detections(NamedTuple):
    """The detections of one image, best first."""

    boxes: Tensor  # (n, 4) xyxy, pixels
    scores: Tensor  # (n,)
    classes: Tensor  # (n,) index of the class
    rows: Tensor  # (n,) which of the R boxes given


@typed
def detect(
    boxes: Tensor, probabilities: Tensor, threshold: float = 0.0, nms: Share | None = 0.5, top: Count = 100
) -> Detections:
    """Threshold, non-maximum suppression within each class, top-k: the steps after the refinement.

    Args:
        boxes: (R, 4), shared by all classes. probabilities: (R, C), refined or not.
        threshold: lowest score, itself excluded. Refinement raises low scores, since p is near 0.5 for most classes: at
            gamma 0.5 a threshold T keeps p_detector · p > T².
        nms: IoU from which a box is suppressed; None for no suppression, for detectors that predict sets.
        top: largest number of detections.
    """
    found = probabilities > threshold
    if nms is None:  # only the `top` best are sorted; `topk` alone leaves open which of equal scores it takes
        kept = probabilities.masked_fill(~found, -torch.inf).flatten()
        least = kept.topk(min(top, len(kept))).values[-1:]
        found &= (kept >= least).view_as(found)
    rows, classes = found.nonzero(as_tuple=True)
    scores = probabilities[rows, classes]
    if nms is None:
        best = scores.argsort(descending=True, stable=True)[:top]
    else:
        best = batched_nms(boxes[rows], scores, classes, nms)[:top]
    return Detections(boxes[rows[best]], scores[best], classes[best], rows[best])


def refined(
    output: Output,
    scores: Tensor | None = None,
    gamma: float = 0.5,
    *,
    threshold: float = FLOOR,
    nms: float | None = 0.5,
    top: int = 300,
) -> Detections:
    """The best boxes of an image: refinement by image-level scores (C,), then threshold, suppression, top-k.

    Args:
        output: of the detector.
        scores: those of the same image; None for the detector alone.
        gamma, threshold, nms, top: see `refine` and `detect`. Set predictors (the three families of `detectors`)
            need no suppression, and 0.5 changes little.

    Raises `BadParameter`: probabilities outside 0 to 1.
    """
    probabilities = output.probabilities
    if probabilities.numel() and not (probabilities.min() >= 0 and probabilities.max() <= 1):
        accepted = "probabilities in 0 to 1: take the sigmoid of logits first"
        raise BadParameter("output", f"{probabilities.min():g} to {probabilities.max():g}", accepted)
    if scores is not None:
        probabilities = refine(probabilities, scores.to(probabilities), gamma)
    return detect(output.boxes, probabilities, threshold, nms, top)

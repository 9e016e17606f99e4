"""DINO (Caron et al., ICCV 2021) and iBOT (Zhou et al., ICLR 2022): self-distillation of a ViT without labels.

A student receives all crops of an image, its EMA teacher the large ones; the student's prototype distribution of one
crop must match the teacher's of another. iBOT also masks patches of the student's large crops and matches their
distributions with those of the teacher, which receives them unmasked. One module holds student, teacher and loss;
`training.fit` trains it, with the callbacks of this file.

    model = SelfDistillation(encoder, outputs=65_536)
    fit(model, lambda model, batch: model(views(batch[0])), data, callbacks=[model.ema(steps), ...], ...)

The crops are those of images (`ImageViews`) or of grids of patch embeddings (`GridViews`).

Reimplemented from facebookresearch/dino at 7c446df, bytedance/ibot at da316d8 and computationalpathologygroup/
hvit at 444bb72, and checked against outputs recorded from them.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Annotated

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.transforms import InterpolationMode, v2

from ...data.images import as_float
from ...errors import Amount, BadParameter, Count, Positive, Range, Share, Whole, check_range, typed
from ...training.callbacks import EMA, Callback, ema_copy
from ...training.fit import Loop
from ...training.hardware import average_over_devices
from ...training.schedules import learning_rates
from ..layers.mae import random_mask
from ..layers.state_dicts import check_names, load_official

MASKED = 0.3  # share of a large crop's patches that iBOT masks for the student, at random


# --- head and loss ----------------------------------------------------------------------------------------------------


class Head(nn.Module):
    """The projection head: a three-layer MLP to a bottleneck of unit length, then a weight-normed layer without bias.

    Args:
        norm_last_layer: keep the norm of each prototype's weights at 1 (off in HIPT's released settings, on in iBOT's).
    """

    @typed
    def __init__(
        self,
        dim: Count,
        outputs: Count = 65_536,
        hidden: Count = 2048,
        bottleneck: Count = 256,
        norm_last_layer: bool = False,
    ):
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU(), nn.Linear(hidden, bottleneck)
        )
        for layer in self.mlp[::2]:
            nn.init.trunc_normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)
        self.direction = nn.Parameter(nn.Linear(bottleneck, outputs, bias=False).weight.detach().clone())
        self.length = nn.Parameter(torch.ones(outputs, 1), requires_grad=not norm_last_layer)

    def forward(self, x: Tensor) -> Tensor:
        """Prototype logits (..., outputs) of tokens (..., D)."""
        return F.linear(F.normalize(self.mlp(x), dim=-1), self.length * F.normalize(self.direction, dim=1))

    def official_names(self) -> dict[str, str]:
        """Our name -> the authors', for every tensor."""
        last = {"direction": "last_layer.weight_v", "length": "last_layer.weight_g"}
        return {name: last.get(name, name) for name in self.state_dict()}

    @classmethod
    def from_official(cls, state: Mapping[str, Tensor]) -> Head:
        """The head of the authors' tensors. Raises `BadCheckpoint` with the names that do not match."""
        needed = ["mlp.0.weight", "mlp.4.weight", "last_layer.weight_g"]
        check_names(state, needed, "DINO's head")
        first, third, last = (state[name] for name in needed)
        head = cls(first.shape[1], len(last), len(first), len(third))
        load_official(head, state, head.official_names(), "DINO's head")
        return head


class Loss(nn.Module):
    """Cross-entropy between teacher and student prototype distributions, on [CLS] tokens and on masked patch tokens.

    The teacher's logits are centred by a running mean and sharpened by a low temperature: without either, the
    distributions of all images would collapse to the same one. The centres are updated after each loss in training
    mode, by the mean over all devices.

    Args:
        outputs: number of prototypes.
        student, teacher: temperatures.
        momentum: of the centres.
    """

    @typed
    def __init__(self, outputs: Count, *, student: Positive = 0.1, teacher: Positive = 0.04, momentum: Share = 0.9):
        super().__init__()
        self.student, self.teacher, self.momentum = student, teacher, momentum
        self.centre: Tensor
        self.patch_centre: Tensor
        self.register_buffer("centre", torch.zeros(1, outputs))
        self.register_buffer("patch_centre", torch.zeros(1, 1, outputs))

    def teacher_probs(self, logits: Tensor, centre: Tensor) -> Tensor:
        """The teacher's centred and sharpened distributions, without gradient."""
        return ((logits.detach().float() - centre) / self.teacher).softmax(-1)

    def forward(self, student_logits: Tensor, teacher_logits: Tensor, crops: int) -> Tensor:
        """DINO's loss: the mean over all pairs of different crops.

        Args:
            student_logits: (crops B, W), crop after crop, the two large ones first.
            teacher_logits: (2 B, W), of the large ones.
        """
        student = (student_logits.float() / self.student).log_softmax(-1).chunk(crops)
        teacher = self.teacher_probs(teacher_logits, self.centre).chunk(2)
        pairs = [-(t * s).sum(-1).mean() for i, t in enumerate(teacher) for j, s in enumerate(student) if i != j]
        self.centre = self._moved(self.centre, teacher_logits, 0)
        return torch.stack(pairs).mean()

    def patches(self, student_logits: Tensor, teacher_logits: Tensor, masks: Tensor) -> Tensor:
        """iBOT's loss on patches: the mean over an image's masked patches, then over images.

        Args:
            student_logits, teacher_logits: (2 B, L, W), of the large crops.
            masks: (2 B, L) bool, the patches that were masked for the student.
        """
        masked = masks.flatten(1).float()
        teacher = self.teacher_probs(teacher_logits, self.patch_centre)
        each = -(teacher * (student_logits.float() / self.student).log_softmax(-1)).sum(-1)
        self.patch_centre = self._moved(self.patch_centre, teacher_logits, (0, 1))
        return ((each * masked).sum(1) / masked.sum(1).clamp_min(1)).mean()

    @torch.no_grad()
    def _moved(self, centre: Tensor, teacher_logits: Tensor, over: int | tuple[int, ...]) -> Tensor:
        if not self.training:
            return centre
        mean = average_over_devices(teacher_logits.float().mean(over, keepdim=True))
        return centre * self.momentum + mean * (1 - self.momentum)


class SelfDistillation(nn.Module):
    """Student, EMA teacher and loss of DINO, or with `patch_weight` of iBOT: crops of each image to the loss.

    Args:
        encoder: copied as the student. From images, or grids, to an embedding (B, D) or to tokens (B, N, D) with the
            [CLS] token first. It names D `dim`, or `embed_dim` as timm; iBOT's also has `patches` and takes `masked`,
            see `models.dmt.vit.ViT`.
        outputs, hidden, bottleneck, norm_last_layer: of the head, one for [CLS] and patch tokens. (iBOT: 8192
            prototypes and a normed last layer; DINO: 65,536.)
        patch_weight: of the loss on masked patches; 0: DINO.
        teacher: temperature, see `Loss`.
    """

    @typed
    def __init__(
        self,
        encoder: nn.Module,
        outputs: int = 65_536,
        hidden: int = 2048,
        bottleneck: int = 256,
        *,
        norm_last_layer: bool = False,
        patch_weight: Amount = 0.0,
        teacher: float = 0.04,
    ):
        super().__init__()
        self.patch_weight = patch_weight
        width = encoder.embed_dim if hasattr(encoder, "embed_dim") else encoder.dim
        head = Head(width, outputs, hidden, bottleneck, norm_last_layer)
        self.student = nn.ModuleDict({"encoder": copy.deepcopy(encoder), "head": head})
        self.teacher = ema_copy(self.student)
        self.loss = Loss(outputs, teacher=teacher)

    def train(self, mode: bool = True) -> SelfDistillation:
        """The teacher stays in eval mode: stochastic depth is the student's alone."""
        super().train(mode)
        self.teacher.eval()
        return self

    def forward(self, crops: Sequence[Tensor], masks: Tensor | None = None) -> dict[str, Tensor]:
        """Named losses of crops, each (B, 3, s, s), the two large ones first, the others of one size.

        Args:
            masks: (2 B, L) bool, the masked patches of the large crops; None: drawn.

        Returns:
            "loss"; of iBOT also its parts "class loss" and "patch loss"; and "entropy", that of the teacher's mean
            distribution over the batch, divided by its largest value: near 0 or 1 the training has collapsed.
        """
        check_range("crops", len(crops), 2)
        large = torch.cat(list(crops[:2]))
        student, teacher, masked = self.student, self.teacher, {}
        if self.patch_weight:
            if masks is None:
                noise = torch.rand(len(large), student["encoder"].patches, device=large.device)
                masks = random_mask(noise, round(MASKED * noise.shape[1]))[1] == 0  # the patches of the least noise
            masked = {"masked": masks}
        with torch.no_grad():
            targets = teacher["encoder"](large)
            teacher_logits = teacher["head"](_cls(targets))
            probs = average_over_devices(self.loss.teacher_probs(teacher_logits, self.loss.centre).mean(0))
            entropy = -(probs * probs.clamp_min(1e-12).log()).sum() / math.log(len(probs))
        tokens = student["encoder"](large, **masked)
        small = [_cls(student["encoder"](torch.cat(list(crops[2:]))))] if len(crops) > 2 else []
        student_logits = student["head"](torch.cat([_cls(tokens), *small]))
        loss = self.loss(student_logits, teacher_logits, len(crops))
        if not self.patch_weight:
            return {"loss": loss, "entropy": entropy}
        with torch.no_grad():
            teacher_patches = teacher["head"](targets[:, 1:])
        patch = self.loss.patches(student["head"](tokens[:, 1:]), teacher_patches, masks) * self.patch_weight
        return {"loss": loss + patch, "class loss": loss, "patch loss": patch, "entropy": entropy}

    @typed
    def ema(self, steps: Whole, momentum: Share = 0.996) -> EMA:
        """The callback that updates the teacher after the student's step, its momentum rising to 1 over `steps`."""
        return EMA([(self.teacher, self.student)], lambda step: half_cosine(momentum, 1.0, step - 1, steps))

    def export(self) -> nn.Module:
        """A copy of the teacher's encoder in eval mode, the released model."""
        encoder = copy.deepcopy(self.student["encoder"])
        encoder.load_state_dict(self.teacher["encoder"].state_dict())
        return encoder.eval()


def _cls(output: Tensor) -> Tensor:
    """The [CLS] token (B, D) of tokens, or the embedding."""
    return output[:, 0] if output.ndim == 3 else output


# --- schedules --------------------------------------------------------------------------------------------------------


def cosine(base: float, final: float, epochs: int, steps: int, warmup: int = 0) -> np.ndarray:
    """One value per step: linear from 0 to `base` over `warmup` epochs of `steps` steps, then half a cosine to
    `final`."""
    return learning_rates("cosine", base, epochs * steps, warmup * steps, final)


def half_cosine(start: float, end: float, step: int, steps: int) -> float:
    """The value at a step of half a cosine from `start` to `end`, constant after `steps`."""
    return end - (end - start) * (1 + math.cos(math.pi * min(step / max(steps, 1), 1))) / 2


class WeightDecay(Callback):
    """Schedule the weight decay by half a cosine; the parameter group of vectors and biases is unchanged."""

    def __init__(self, start: float, end: float):
        self.start, self.end = start, end

    def on_gradients(self, loop: Loop) -> None:
        """Set the weight decay of the step."""
        for group in loop.optimizer.param_groups:
            if any(p.ndim >= 2 for p in group["params"]):  # the value may be 0 at the start
                group["weight_decay"] = half_cosine(self.start, self.end, loop.step, loop.steps)


class FreezeLastLayer(Callback):
    """Keep the last layer of a `Head` fixed during the first epochs."""

    def __init__(self, head: Head, epochs: int = 1):
        self.head, self.epochs = head, epochs

    def on_gradients(self, loop: Loop) -> None:
        """Remove its gradient: the optimiser skips tensors without one."""
        if loop.epoch < self.epochs:
            for parameter in (self.head.direction, self.head.length):
                parameter.grad = None


# --- crops ------------------------------------------------------------------------------------------------------------


class ImageViews:
    """Two large crops and some small ones of each image, with colour jitter.

    Args:
        sizes: sides of the large and the small crops, in pixels.
        scales: ranges of the crop's share of the image's area.
        small: number of small crops.
        colours: strength of the colour jitter; 1 is DINO's.
        mean, std: the encoder's normalisation.
    """

    @typed
    def __init__(
        self,
        sizes: tuple[Count, Count] = (224, 96),
        scales: tuple[tuple[Share, Share], tuple[Share, Share]] = ((0.4, 1.0), (0.05, 0.4)),
        small: Whole = 8,
        colours: Annotated[float, Range(0, 5)] = 1.0,
        mean: tuple[float, float, float] = (0.485, 0.456, 0.406),
        std: tuple[Positive, Positive, Positive] = (0.229, 0.224, 0.225),
    ):
        def crop(size: int, scale: tuple[float, float], blur: float, solarise: float) -> v2.Compose:
            cubic = InterpolationMode.BICUBIC
            steps = [v2.RandomResizedCrop(size, scale, interpolation=cubic, antialias=True), v2.RandomHorizontalFlip()]
            if colours:
                strength = (0.4 * colours, 0.4 * colours, 0.2 * colours, 0.1 * colours)
                steps += [v2.RandomApply([v2.ColorJitter(*strength)], 0.8), v2.RandomGrayscale(0.2 * colours)]
                width = max(3, size // 10 | 1)
                steps += [v2.RandomApply([v2.GaussianBlur(width, (0.1, 2.0))], blur)]
                steps += [v2.RandomSolarize(0.5, solarise)] if solarise else []
            return v2.Compose([*steps, v2.Normalize(list(mean), list(std))])

        large = [crop(sizes[0], scales[0], 1.0, 0.0), crop(sizes[0], scales[0], 0.1, 0.2)]
        self.crops = [*large, *[crop(sizes[1], scales[1], 0.5, 0.0)] * small]

    def __call__(self, images: Tensor) -> list[Tensor]:
        """From images (B, 3, H, W) in [0, 1] to a list of (B, 3, s, s), the two large ones first.

        Values beyond, as interpolation gives them, are clipped. Raises `BadParameter`: floats in 0 ... 255.
        """
        pixels = as_float(images).clamp(0, 1)
        return [torch.stack([crop(x) for x in pixels]) for crop in self.crops]


class GridViews:
    """Two large square crops of each grid and some small ones, flipped left to right or not.

    Args:
        patches: side n of the grids.
        small: number of small crops.
        shares: of the side: 7 and 3 of 8, 14 and 6 of 16, 3 and 1 of 4.
    """

    @typed
    def __init__(self, patches: Count, small: Whole = 8, shares: tuple[Share, Share] = (0.875, 0.375)):
        self.patches = patches
        self.sides = [max(int(shares[0] * patches), 1)] * 2 + [max(int(shares[1] * patches), 1)] * small

    def __call__(self, grids: Tensor) -> list[Tensor]:
        """From grids (B, D, n, n) to a list of (B, D, s, s), the two large ones first."""
        if grids.shape[2:] != (self.patches, self.patches):
            raise BadParameter("grids", tuple(grids.shape), f"(B, D, {self.patches}, {self.patches})")
        views, image = [], torch.arange(len(grids), device=grids.device)[:, None, None]
        for side in self.sides:
            line = torch.arange(side)
            y, x = torch.randint(self.patches - side + 1, (2, len(grids), 1))
            columns = torch.where(torch.rand(len(grids), 1) < 0.5, line, line.flip(0)) + x
            rows = line + y
            crop = grids[image, :, rows[:, :, None].to(grids.device), columns[:, None].to(grids.device)]
            views.append(crop.movedim(-1, 1))
        return views

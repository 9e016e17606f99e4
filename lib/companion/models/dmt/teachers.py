"""The self-supervised teachers of DMT: how MAE, MoCo v3, iBOT and DINO are trained, and where released ones come from.

    MAE      hides three quarters of the patches and fills in their pixels           (He et al., CVPR 2022)
    MoCo v3  tells which two views are of one picture, among those of a batch        (Chen et al., ICCV 2021)
    iBOT     says of one crop what a running mean of itself says of another, and of
             hidden patches what that mean says of them when it sees them            (Zhou et al., ICLR 2022)
    DINO     iBOT without hidden patches                                             (Caron et al., ICCV 2021)

All four are facts of their official codes, written anew and checked against outputs recorded from them: mae at efb2a80
and moco-v3 at c349e6e of facebookresearch (CC BY-NC 4.0), ibot at da316d8 of bytedance and dino at 7c446df of
facebookresearch (Apache 2.0). That DMT's three teachers are MAE, MoCo v3 and iBOT is inferred from its successor.

The encoder is `dmt.ViT` in all of them. Each is a module from a batch to its loss, which `fit.fit` trains; running
means are buffers, so that a resumed training gives the same bits.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...backbones import find_weights, hub_file, read_state
from ...errors import BadCheckpoint, BadParameter, CorruptFile, MissingWeights
from ...ops import unpickle
from ..layers import dino
from ..layers.clip_prompting import load_official, official_state
from .model import Decoder, ViT, build, visible

# how a released ViT-Base/16 is had: table of positions, timm's name or the hub's repository, and its file or link
RELEASED = {
    "MAE": ("mae", "vit_base_patch16_224.mae", "facebookresearch/mae, mae_pretrain_vit_base.pth"),
    "MoCo v3": ("mocov3", "nyu-visionx/moco-v3-vit-b", "facebookresearch/moco-v3, vit-b-300ep.pth.tar"),
    "iBOT": ("learned", "", "bytedance/ibot, vitb_16/checkpoint_teacher.pth"),
    "DINO": ("learned", "vit_base_patch16_224.dino", "facebookresearch/dino, dino_vitbase16_pretrain.pth"),
}


# --- released teachers ------------------------------------------------------------------------------------------------


def released(name: str, weights: str | Path = "pretrained", *, download: bool = False) -> ViT:
    """A teacher at paper size, ViT-Base/16, by its name in `RELEASED`, in eval mode.

    Args:
        weights: "pretrained": timm's release of MAE and DINO; of MoCo v3 an unofficial mirror on the hub; iBOT has
            neither. "random" (torch's current seed), or an official file, see `read`.
        download: fetch what is not in the cache.

    Raises:
        BadParameter: unknown name, or a file that is not there.
        MissingWeights: they are not cached, and not to be downloaded or out of reach.
        CorruptFile, BadCheckpoint: the file cannot be read, or is of something else.
    """
    if name not in RELEASED:
        raise BadParameter("teacher", name, tuple(RELEASED))
    positions, place, source = RELEASED[name]
    if weights == "random":
        return build("base", positions=positions).eval()
    if weights != "pretrained":
        if not Path(weights).is_file():
            raise BadParameter("weights", str(weights), "'pretrained', 'random' or an existing file")
        return ViT.from_official(read(weights), what=f"{name}, ViT-Base/16")
    if not place:
        way = f"the file of {source}: give its path as weights"
        raise MissingWeights(f"{name}, ViT-Base/16", Path(), [way])
    if place.startswith("vit_"):
        path = find_weights(place, download=download)
    else:
        path = hub_file(name, place, ["model.safetensors"], download)
    return ViT.from_official(read(path), what=f"{name}, ViT-Base/16")


def read(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a released file: MAE's (under "model"), MoCo v3's and iBOT's backbone ("state_dict"), iBOT's and
    DINO's full checkpoint (its "teacher"), or a plain state dict. Raises `CorruptFile`."""
    try:
        return read_state(path)
    except CorruptFile:
        if Path(path).suffix == ".safetensors":
            raise
    whole = unpickle.load_torch(path)
    state = whole.get("teacher") if isinstance(whole, dict) else None
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise CorruptFile(path, "no 'model', 'state_dict' or 'teacher' with named tensors in it")
    return state


# --- masked modelling of pixels ---------------------------------------------------------------------------------------


def patchify(images: Tensor, patch: int) -> Tensor:
    """(B, 3, h p, w p) to (B, h w, p p 3): row, column, channel."""
    x = images.unfold(2, patch, patch).unfold(3, patch, patch)
    return x.permute(0, 2, 3, 4, 5, 1).flatten(3).flatten(1, 2)


class MAE(nn.Module):
    """A masked autoencoder: pictures to the loss on their hidden patches.

    Args:
        encoder: trained; it sees the visible patches.
        decoder: its width, depth and heads.
        mask_ratio: share of hidden patches.
        normalise: judge pixels after each patch's own mean and deviation (norm_pix_loss, on in the released training).
    """

    def __init__(
        self,
        encoder: ViT,
        decoder: tuple[int, int, int] = (512, 8, 16),
        *,
        mask_ratio: float = 0.75,
        normalise: bool = True,
    ):
        super().__init__()
        positions = "mae" if encoder.positions == "learned" else encoder.positions
        self.encoder, self.mask_ratio, self.normalise = encoder, mask_ratio, normalise
        self.decoder = Decoder(encoder.width, *decoder, encoder.grid, positions)
        self.pixels = nn.Linear(decoder[0], 3 * encoder.patch**2)
        nn.init.xavier_uniform_(self.pixels.weight)
        nn.init.zeros_(self.pixels.bias)
        visible(encoder.patches, mask_ratio)

    def forward(self, images: Tensor, noise: Tensor | None = None, trace: dict | None = None) -> Tensor:
        """The loss of pictures (B, 3, S, S).

        Args:
            noise: (B, L) the patches with the least of it are visible; None: drawn.
            trace: receives "keep" (B, V), "hidden" (B, L), "latent" (B, 1 + V, D), "pixels" and "target" (B, L, p p 3).
        """
        patches = self.encoder.patches
        noise = torch.rand(len(images), patches, device=images.device) if noise is None else noise
        keep = noise.argsort(1)[:, : visible(patches, self.mask_ratio)]
        hidden = torch.ones_like(noise).scatter(1, keep, 0)
        latent = self.encoder(images, keep)
        pixels = self.pixels(self.decoder(latent, keep)[:, 1:])
        target = patchify(images, self.encoder.patch)
        if self.normalise:
            target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()
        if trace is not None:
            trace |= {"keep": keep, "hidden": hidden, "latent": latent, "pixels": pixels, "target": target}
        return ((pixels - target).square().mean(-1) * hidden).sum() / hidden.sum()

    def official_names(self) -> dict[str, str]:
        """Our names -> the authors'."""
        names = {}
        for name in self.state_dict():
            official = name.removeprefix("encoder.").replace("pixels.", "decoder_pred.")
            official = official.replace("decoder.mask_token", "mask_token").replace("decoder.", "decoder_")
            names[name] = official
        return names

    @classmethod
    def from_official(cls, state: Mapping[str, Tensor], heads: int | None = None, decoder_heads: int = 16) -> MAE:
        """The model of an official pre-training file, decoder included, in eval mode. Raises `BadCheckpoint`.

        Args:
            heads, decoder_heads: tensors do not say them. None: one for 64 channels of the encoder.
        """
        encoder = ViT.from_official(state, heads, "MAE's encoder")
        if missing := {"decoder_embed.weight", "decoder_blocks.0.norm1.weight"} - state.keys():
            raise BadCheckpoint("MAE with its decoder (files of the encoder alone have none)", missing)
        depth = len({name.split(".")[1] for name in state if name.startswith("decoder_blocks.")})
        model = cls(encoder, (len(state["decoder_embed.weight"]), depth, decoder_heads))
        load_official(model, state, model.official_names(), "MAE with its decoder")
        return model.eval()

    def to_official(self) -> dict[str, Tensor]:
        """The state dict under the authors' names."""
        return official_state(self.state_dict(), self.official_names())


# --- running means ----------------------------------------------------------------------------------------------------


def average(model: nn.Module) -> nn.Module:
    """A copy of a model whose parameters are buffers: stored with a checkpoint, and no gradient's."""
    twin = copy.deepcopy(model)
    for module in twin.modules():
        for name, value in list(module.named_parameters(recurse=False)):
            del module._parameters[name]
            module.register_buffer(name, value.detach().clone())
    return twin


@torch.no_grad()
def follow(mean: nn.Module, model: nn.Module, momentum: float) -> None:
    """Move the running mean of parameters: momentum of what it is, the rest of what the model is now."""
    own = dict(mean.named_buffers())
    for name, value in model.named_parameters():
        own[name].lerp_(value, 1 - momentum)


def rising(base: float, step: int, steps: int) -> float:
    """The momentum at a step: half a cosine from `base` to 1."""
    return 1 - (1 - base) * (1 + math.cos(math.pi * min(step / max(steps, 1), 1))) / 2


# --- contrast ---------------------------------------------------------------------------------------------------------


def mlp(inputs: int, hidden: int, outputs: int, layers: int) -> nn.Sequential:
    """MoCo v3's heads: linear layers without bias, batch norm and ReLU between, a last batch norm without affine."""
    steps: list[nn.Module] = []
    for i in range(layers):
        last = i == layers - 1
        steps.append(nn.Linear(inputs if i == 0 else hidden, outputs if last else hidden, bias=False))
        steps += [nn.BatchNorm1d(outputs, affine=False)] if last else [nn.BatchNorm1d(hidden), nn.ReLU()]
    return nn.Sequential(*steps)


def contrastive_loss(queries: Tensor, keys: Tensor, temperature: float = 0.2) -> Tensor:
    """Cross-entropy of each query (B, E) with its key among all of the batch, of all workers, times 2 T."""
    q, k = F.normalize(queries.float(), dim=1), F.normalize(keys.float(), dim=1).detach()
    rank = 0
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        rank, parts = (
            torch.distributed.get_rank(),
            [torch.empty_like(k) for _ in range(torch.distributed.get_world_size())],
        )
        torch.distributed.all_gather(parts, k.contiguous())
        k = torch.cat(parts)
    labels = torch.arange(len(q), device=q.device) + rank * len(q)
    return F.cross_entropy(q @ k.T / temperature, labels) * (2 * temperature)


class MoCo(nn.Module):
    """MoCo v3: two views of each picture to the loss.

    Args:
        encoder: trained, and kept: what the official linear probe loads.
        steps: of the training, over which the momentum rises to 1.
        hidden, outputs: of the projector (three layers) and the predictor (two).
        temperature: T.
        momentum: of the key encoder at the start.
        frozen_patches: keep the patch projection as it started, as released; a pocket model trains it.
    """

    def __init__(
        self,
        encoder: ViT,
        steps: int,
        hidden: int = 4096,
        outputs: int = 256,
        *,
        temperature: float = 0.2,
        momentum: float = 0.99,
        frozen_patches: bool = True,
    ):
        super().__init__()
        if not 0 < momentum <= 1 or temperature <= 0:
            raise BadParameter("momentum, temperature", (momentum, temperature), "0 to 1; above 0")
        self.encoder, self.steps, self.temperature, self.momentum = encoder, steps, temperature, momentum
        self.projector = mlp(encoder.width, hidden, outputs, 3)
        self.predictor = mlp(outputs, hidden, outputs, 2)
        encoder.patch_embed.requires_grad_(not frozen_patches)
        self.key_encoder, self.key_projector = average(encoder), average(self.projector)
        self.register_buffer("step", torch.zeros((), dtype=torch.long))

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        """The symmetric loss of two views (B, 3, S, S). The key encoder follows first, as released."""
        views = (first, second)
        q = [self.predictor(self.projector(self.encoder(x)[:, 0])) for x in views]
        with torch.no_grad():
            if self.training:
                momentum = rising(self.momentum, int(self.step), self.steps)
                follow(self.key_encoder, self.encoder, momentum)
                follow(self.key_projector, self.projector, momentum)
                self.step += 1
            k = [self.key_projector(self.key_encoder(x)[:, 0]) for x in views]
        return contrastive_loss(q[0], k[1], self.temperature) + contrastive_loss(q[1], k[0], self.temperature)


# --- self-distillation ------------------------------------------------------------------------------------------------


class SelfDistillationLoss(nn.Module):
    """iBOT's loss: DINO's on class tokens, and the same on hidden patches of one crop.

    Both have a running centre of the teacher's words, moved after the loss.

    Args:
        outputs: words of the head.
        student, teacher, patch_teacher: temperatures.
        class_weight, patch_weight: of the two losses (lambda 1 and 2).
        momentum: of both centres.
    """

    def __init__(
        self,
        outputs: int,
        *,
        student: float = 0.1,
        teacher: float = 0.04,
        patch_teacher: float = 0.04,
        class_weight: float = 1.0,
        patch_weight: float = 1.0,
        momentum: float = 0.9,
    ):
        super().__init__()
        self.classes = dino.Loss(outputs, student=student, teacher=teacher, momentum=momentum)
        self.patch_teacher, self.momentum = patch_teacher, momentum
        self.class_weight, self.patch_weight = class_weight, patch_weight
        self.register_buffer("patch_centre", torch.zeros(1, 1, outputs))

    def forward(
        self,
        student: Tensor,
        teacher: Tensor,
        crops: int,
        student_patches: Tensor | None = None,
        teacher_patches: Tensor | None = None,
        masks: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Both losses, weighted.

        Args:
            student: (crops B, W), crop after crop, the two large ones first. teacher: (2 B, W), of the large ones.
            student_patches, teacher_patches: (2 B, L, W) of the large ones; None for DINO.
            masks: (2 B, L) bool, the patches that were hidden from the student.
        """
        said = self.classes(student, teacher, crops) * self.class_weight
        if student_patches is None:
            return said, said.new_zeros(())
        hidden = masks.flatten(1).float()
        wanted = ((teacher_patches.detach() - self.patch_centre) / self.patch_teacher).softmax(-1)
        each = -(wanted * (student_patches / self.classes.student).log_softmax(-1)).sum(-1)
        patch = ((each * hidden).sum(1) / hidden.sum(1).clamp_min(1)).mean()
        mean = teacher_patches.detach().mean((0, 1), keepdim=True)
        self.patch_centre = self.patch_centre * self.momentum + mean * (1 - self.momentum)
        return said, patch * self.patch_weight


def warm(step: float, length: float, start: float = 0.04, end: float = 0.07) -> float:
    """A teacher's temperature: linear from `start` to `end`, which is reached at `length` - 1 and kept; 0: `end`."""
    if length <= 0:
        return end
    return start + (end - start) * min(step / max(length - 1, 1), 1)


class SelfDistillation(nn.Module):
    """iBOT, or with `patch_weight` 0 DINO: crops of each picture to the loss.

    Args:
        encoder: the student. iBOT's has `masked=True`. What is kept is its running mean, `teacher()`.
        steps: of the training, over which the mean's momentum rises to 1.
        outputs, hidden, bottleneck: of the head, one for class and patch tokens. (iBOT: 8192; DINO: 65,536.)
        mask_ratio: share of a large crop's patches that are hidden from the student (random masks).
        momentum: of the running mean at the start.
        temperature: student's; temperatures: teacher's at the start and after `warmup` steps, for both losses.
        frozen_steps: in which the head's last layer does not move.
    """

    def __init__(
        self,
        encoder: ViT,
        steps: int,
        outputs: int = 8192,
        hidden: int = 2048,
        bottleneck: int = 256,
        *,
        patch_weight: float = 1.0,
        mask_ratio: float = 0.3,
        momentum: float = 0.996,
        temperature: float = 0.1,
        temperatures: tuple[float, float] = (0.04, 0.07),
        warmup: int = 0,
        frozen_steps: int = 0,
    ):
        super().__init__()
        if patch_weight and encoder.masked_embed is None:
            raise BadParameter("encoder", "without masked_embed", "ViT(masked=True), or patch_weight = 0 for DINO")
        if patch_weight and not 0 < mask_ratio < 1:
            raise BadParameter("mask_ratio", mask_ratio, "above 0, less than 1")
        self.encoder, self.steps, self.momentum, self.mask_ratio = encoder, steps, momentum, mask_ratio
        self.temperatures, self.warmup, self.frozen_steps = temperatures, warmup, frozen_steps
        self.head = dino.Head(encoder.width, outputs, hidden, bottleneck, fixed_norm=True)
        self.mean_encoder, self.mean_head = average(encoder), average(self.head)
        self.loss = SelfDistillationLoss(outputs, student=temperature, patch_weight=patch_weight)
        self.register_buffer("step", torch.zeros((), dtype=torch.long))

    def forward(self, crops: Sequence[Tensor], masks: Tensor | None = None) -> Tensor:
        """The loss of crops, each (B, 3, s, s), the two large ones first (see `dino.ImageViews`).

        Args:
            masks: (2 B, L) bool, what is hidden of the large ones; None: drawn.
        """
        step = int(self.step)
        if self.training:
            if step:  # the last step's move: the released codes move the mean after the student
                momentum = rising(self.momentum, step - 1, self.steps)
                follow(self.mean_encoder, self.encoder, momentum)
                follow(self.mean_head, self.head, momentum)
            self.step += 1
        self.loss.classes.teacher = self.loss.patch_teacher = warm(step, self.warmup, *self.temperatures)
        large, patches = torch.cat(list(crops[:2])), self.loss.patch_weight > 0
        if patches and masks is None:
            count = round(self.mask_ratio * self.encoder.patches)
            noise = torch.rand(len(large), self.encoder.patches, device=large.device)
            masks = torch.zeros_like(noise, dtype=torch.bool).scatter(1, noise.argsort(1)[:, :count], True)
        with torch.no_grad():
            self.mean_encoder.train(False)
            seen = self.mean_encoder(large)
            wanted, wanted_patches = self.mean_head(seen[:, 0]), self.mean_head(seen[:, 1:]) if patches else None
        # in its first steps the last layer stands still: without a gradient the optimiser passes it over
        self.head.direction.requires_grad_(not self.training or step >= self.frozen_steps)
        own = self.encoder(large, masked=masks if patches else None)
        said = [self.head(own[:, 0])]
        if len(crops) > 2:
            said.append(self.head(self.encoder(torch.cat(list(crops[2:])))[:, 0]))
        said_patches = self.head(own[:, 1:]) if patches else None
        self.head.direction.requires_grad_(True)
        both = self.loss(torch.cat(said), wanted, len(crops), said_patches, wanted_patches, masks)
        return both[0] + both[1]

    def teacher(self) -> ViT:
        """The running mean as a ViT of its own, in eval mode: what is released, and distilled."""
        model = copy.deepcopy(self.encoder)
        model.load_state_dict(self.mean_encoder.state_dict())
        return model.eval()

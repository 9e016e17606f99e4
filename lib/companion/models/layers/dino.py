"""DINO (Caron et al., ICCV 2021): a ViT learns without labels that crops of one picture belong together.

A student sees all crops, a teacher only the large ones; the student has to say what the teacher said of another crop.
The teacher's weights are a running mean of the student's. H-ViT pre-trains two levels so: patches of pixels, and then
regions, which are grids of patch embeddings. `pretrain` does both; only the crops differ (`ImageViews`, `GridViews`).

Written from the facts of computationalpathologygroup/hvit at 444bb72 (section 4 and 5 of its description).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.transforms import InterpolationMode, v2

from ...errors import BadParameter, CorruptFile
from ...ops.files import atomic
from ...ops.progress import progress
from ...training.fit import launcher
from ...training.schedules import learning_rates
from ..hvit.model import Encoder
from .state_dicts import load_official

Views = Callable[[Tensor], list[Tensor]]


class Head(nn.Module):
    """The projection head: three layers to a bottleneck of unit length, then weight-normed outputs without bias.

    Args:
        fixed_norm: keep the length of each output's weights at 1 (norm_last_layer; off in the released settings).
    """

    def __init__(
        self, dim: int, outputs: int = 65_536, hidden: int = 2048, bottleneck: int = 256, fixed_norm: bool = False
    ):
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU(), nn.Linear(hidden, bottleneck)
        )
        for layer in self.mlp[::2]:
            nn.init.trunc_normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)
        self.direction = nn.Parameter(nn.Linear(bottleneck, outputs, bias=False).weight.detach().clone())
        self.length = nn.Parameter(torch.ones(outputs, 1), requires_grad=not fixed_norm)

    def forward(self, x: Tensor) -> Tensor:
        """From (B, D) to (B, outputs)."""
        return F.linear(F.normalize(self.mlp(x), dim=-1), self.length * F.normalize(self.direction, dim=1))

    def official_names(self) -> dict[str, str]:
        """Our name -> the authors', for every tensor."""
        last = {"direction": "last_layer.weight_v", "length": "last_layer.weight_g"}
        return {name: last.get(name, name) for name in self.state_dict()}

    @classmethod
    def from_official(cls, state: Mapping[str, Tensor]) -> Head:
        """The head of the authors' tensors. Raises `BadCheckpoint` with the names that do not fit."""
        sizes = {
            key: state[name].shape
            for key, name in (("first", "mlp.0.weight"), ("last", "mlp.4.weight"))
            if name in state
        }
        hidden, dim = sizes.get("first", (1, 1))
        head = cls(dim, len(state.get("last_layer.weight_g", [0])), hidden, sizes.get("last", (1, 1))[0])
        load_official(head, state, head.official_names(), "DINO's head")
        return head


class Loss(nn.Module):
    """Cross-entropy of the teacher's and the student's words over all pairs of different crops.

    The teacher's outputs are centred by a running mean, which is updated after the loss, and sharpened by a low
    temperature: without either all pictures would soon get the same word.
    """

    def __init__(self, outputs: int, *, student: float = 0.1, teacher: float = 0.04, momentum: float = 0.9):
        super().__init__()
        self.student, self.teacher, self.momentum = student, teacher, momentum
        self.register_buffer("centre", torch.zeros(1, outputs))

    def forward(self, student: Tensor, teacher: Tensor, crops: int) -> Tensor:
        """The loss of student outputs (crops B, N) and teacher outputs (2 B, N), crop after crop."""
        said = (student / self.student).log_softmax(-1).chunk(crops)
        wanted = ((teacher.detach() - self.centre) / self.teacher).softmax(-1).chunk(2)
        pairs = [-(w * s).sum(-1).mean() for i, w in enumerate(wanted) for j, s in enumerate(said) if i != j]
        mean = teacher.detach().mean(0, keepdim=True)
        self.centre = self.centre * self.momentum + mean * (1 - self.momentum)
        return torch.stack(pairs).mean()


def cosine(base: float, final: float, epochs: int, steps: int, warmup: int = 0) -> np.ndarray:
    """A value a step: linear from 0 to `base` over `warmup` epochs of `steps` steps, then half a cosine to `final`."""
    return learning_rates("cosine", base, epochs * steps, warmup * steps, final)


# --- crops ------------------------------------------------------------------------------------------------------------


class ImageViews:
    """Two large crops and some small ones of each picture, in other colours (section 5.1).

    Args:
        sizes: sides of the large and the small crops, in pixels.
        scales: shares of the picture's area that each may show.
        small: how many small crops.
        colours: strength of the changes of colour; 1 is DINO's.
        mean, std: what the encoder's pixels are normalised with.
    """

    def __init__(
        self,
        sizes: tuple[int, int] = (224, 96),
        scales: tuple[tuple[float, float], tuple[float, float]] = ((0.4, 1.0), (0.05, 0.4)),
        small: int = 8,
        colours: float = 1.0,
        mean: Sequence[float] = (0.485, 0.456, 0.406),
        std: Sequence[float] = (0.229, 0.224, 0.225),
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
            return v2.Compose([v2.Lambda(lambda x: x.clamp(0, 1)), *steps, v2.Normalize(list(mean), list(std))])

        large = [crop(sizes[0], scales[0], 1.0, 0.0), crop(sizes[0], scales[0], 0.1, 0.2)]
        self.crops = [*large, *[crop(sizes[1], scales[1], 0.5, 0.0)] * small]

    def __call__(self, pictures: Tensor) -> list[Tensor]:
        """From pictures (B, 3, H, W) in [0, 1] to a list of (B, 3, s, s), the two large ones first."""
        return [torch.stack([crop(x) for x in pictures]) for crop in self.crops]


class GridViews:
    """Two large square cuts of each grid and some small ones, flipped left to right or not (section 5.2).

    Args:
        patches: side n of the grids.
        small: how many small cuts.
        shares: of the side: 7 and 3 of 8, 14 and 6 of 16, 3 and 1 of 4.
    """

    def __init__(self, patches: int, small: int = 8, shares: tuple[float, float] = (0.875, 0.375)):
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
            cut = grids[image, :, rows[:, :, None].to(grids.device), columns[:, None].to(grids.device)]
            views.append(cut.movedim(-1, 1))
        return views


# --- training ---------------------------------------------------------------------------------------------------------


def pretrain(
    encoder: Encoder,
    pictures: Tensor,
    views: Views,
    *,
    epochs: int = 100,
    batch: int = 128,
    lr: float | None = None,
    warmup: int = 10,
    weight_decay: tuple[float, float] = (0.04, 0.4),
    momentum: float = 0.996,
    clip: float | None = 3.0,
    outputs: int = 65_536,
    hidden: int = 2048,
    bottleneck: int = 256,
    frozen_epochs: int = 1,
    seed: int = 0,
    accelerator: str = "auto",
    precision: str = "32-true",
    checkpoint: str | Path | None = None,
    checkpoint_every: int = 200,
    resume: bool = False,
    name: str = "DINO",
) -> tuple[Encoder, list[dict[str, float]]]:
    """Train `encoder` without labels; return the teacher, which is what is kept, and the history.

    Args:
        encoder: the student; a patch or a region encoder, with stochastic depth as it was built.
        pictures: (N, 3, H, W) uint8 or float in [0, 1], or (N, D, n, n) grids of patch embeddings.
        views: from a batch of them to crops, the two large ones first.
        epochs, batch: passes, and pictures a step; the last partial batch is left out.
        lr: by default 5e-4 for each 256 pictures of a batch. Warmed up over `warmup` epochs, then a cosine to 1e-6.
        weight_decay: at the start and the end of a cosine; vectors and biases do not decay.
        momentum: of the teacher, rising to 1 by a cosine.
        clip: largest norm of each tensor's gradient.
        frozen_epochs: in which the head's last layer is not changed.
        checkpoint, checkpoint_every, resume: as in `fit.fit`; a resumed run gives the bits of one that was not killed.

    Returns:
        The teacher's encoder in eval mode on the CPU, and one row a step: {"step", "lr", "loss", "entropy"}. Entropy
        is that of the teacher's words over the batch, divided by its largest value: near 0 or 1 the training has
        collapsed.

    Raises:
        BadParameter: a value outside its range, or a checkpoint written under other settings.
        CorruptFile: the checkpoint cannot be read.
    """
    if not all(p.requires_grad for p in encoder.parameters()):
        raise BadParameter("encoder", "frozen tensors in it", "one whose tensors all ask for a gradient")
    if not 1 <= batch <= len(pictures):
        raise BadParameter("batch", batch, f"1 to {len(pictures)}, the pictures there are")
    if not 0 <= warmup <= epochs:
        raise BadParameter("warmup", warmup, f"0 to {epochs} epochs")
    per_epoch = len(pictures) // batch
    steps = epochs * per_epoch
    lr = 5e-4 * batch / 256 if lr is None else lr
    rates = cosine(lr, 1e-6, epochs, per_epoch, warmup)
    decays, momenta = cosine(*weight_decay, epochs, per_epoch), cosine(momentum, 1.0, epochs, per_epoch)
    settings = {
        "steps": steps,
        "batch": batch,
        "lr": lr,
        "warmup": warmup,
        "weight_decay": list(weight_decay),
        "momentum": momentum,
        "clip": clip,
        "outputs": outputs,
        "hidden": hidden,
        "bottleneck": bottleneck,
        "frozen_epochs": frozen_epochs,
        "seed": seed,
        "pictures": list(pictures.shape),
    }

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        head = Head(encoder.dim, outputs, hidden, bottleneck)
        student = nn.ModuleDict({"encoder": copy.deepcopy(encoder), "head": head})
        teacher = copy.deepcopy(student).requires_grad_(False)
        for block in teacher["encoder"].blocks:  # stochastic depth is the student's alone
            block.drop_path1 = block.drop_path2 = nn.Identity()
        fabric = launcher(accelerator=accelerator, devices=1, precision=precision)
        matrices = [p for p in student.parameters() if p.ndim >= 2 and p.requires_grad]
        vectors = [p for p in student.parameters() if p.ndim < 2 and p.requires_grad]
        optimizer = torch.optim.AdamW([{"params": matrices}, {"params": vectors, "weight_decay": 0.0}], lr)
        criterion, history = Loss(outputs), []
        parts = {"student": student, "teacher": teacher, "loss": criterion, "optimizer": optimizer}
        wrapped, optimizer = fabric.setup(student, optimizer)
        for part in (teacher, criterion):
            part.to(fabric.device)
        if resume and checkpoint and Path(checkpoint).is_file():
            # not before: the optimiser's moments go where the tensors are
            history = _resume(checkpoint, settings, parts)
        wrapped.train()
        for step in progress(range(len(history), steps), name, steps, len(history)):
            epoch, i = divmod(step, per_epoch)
            order = np.random.default_rng((seed, epoch)).permutation(len(pictures))[i * batch : (i + 1) * batch]
            torch.manual_seed(int(np.random.SeedSequence((seed, step)).generate_state(1, np.uint64)[0] >> 1))
            chosen = pictures[torch.from_numpy(order)]
            crops = views(chosen.float() / 255 if chosen.dtype == torch.uint8 else chosen)
            crops = [crop.to(fabric.device) for crop in crops]
            for group, decay in zip(optimizer.param_groups, (decays[step], 0.0), strict=True):
                group["lr"], group["weight_decay"] = float(rates[step]), float(decay)
            with fabric.autocast():
                with torch.no_grad():
                    wanted = teacher["head"](teacher["encoder"](torch.cat(crops[:2])))
                said = student["head"](torch.cat([student["encoder"](x) for x in _by_size(crops)]))
                value = criterion(said.float(), wanted.float(), len(crops))
            fabric.backward(value)
            if epoch < frozen_epochs:
                head.direction.grad = head.length.grad = None
            if clip is not None:
                for p in student.parameters():
                    if p.grad is not None:
                        nn.utils.clip_grad_norm_([p], clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            with torch.no_grad():
                for mine, theirs in zip(teacher.parameters(), student.parameters(), strict=True):
                    mine.lerp_(theirs, 1 - float(momenta[step]))
            words = ((wanted.float() - criterion.centre) / criterion.teacher).softmax(-1).mean(0)
            entropy = -(words * words.clamp_min(1e-12).log()).sum() / math.log(outputs)
            history.append({"step": step, "lr": float(rates[step]), "loss": value.detach(), "entropy": entropy})
            if checkpoint and ((step + 1) % checkpoint_every == 0 or step + 1 == steps):
                _save(checkpoint, settings, parts, history)
    return teacher["encoder"].cpu().eval(), _plain(history)


def _by_size(crops: list[Tensor]) -> list[Tensor]:
    """Neighbouring crops of one size as one batch; the order stays."""
    groups: list[list[Tensor]] = []
    for crop in crops:
        if groups and groups[-1][0].shape == crop.shape:
            groups[-1].append(crop)
        else:
            groups.append([crop])
    return [torch.cat(group) for group in groups]


def _plain(history: list[dict]) -> list[dict[str, float]]:
    return [{key: float(value) if key != "step" else value for key, value in row.items()} for row in history]


def _save(path: str | Path, settings: dict, parts: dict, history: list[dict]) -> None:
    with atomic(path) as temporary:
        states = {key: part.state_dict() for key, part in parts.items()}
        torch.save(states | {"settings": settings, "history": _plain(history)}, temporary)


def _resume(path: str | Path, settings: dict, parts: dict) -> list[dict]:
    """Put a checkpoint back into `parts`; its history."""
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        written = saved["settings"]
    except Exception as error:
        raise CorruptFile(path, f"not a checkpoint of DINO ({type(error).__name__})") from error
    for key, value in settings.items():
        if written.get(key) != value:
            raise BadParameter(key, value, f"{written.get(key)!r}, as in the checkpoint to resume ({path})")
    for key, part in parts.items():
        part.load_state_dict(saved[key])
    return saved["history"]

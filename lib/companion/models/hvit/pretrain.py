"""The pre-training of H-ViT's two lower levels without labels: DINO's recipe (Caron et al., ICCV 2021).

    patch, _ = pretrain(PatchEncoder(), images, dino.ImageViews())
    region, _ = pretrain(RegionEncoder(), grids, dino.GridViews(8))    # grids of patch embeddings

Both levels are trained alike; only the crops differ. Written from computationalpathologygroup/hvit at 444bb72 and
facebookresearch/dino at 7c446df.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from ...errors import Amount, BadParameter, Count, Whole, typed
from ...training.callbacks import ClipNorm
from ...training.fit import History
from ...training.hardware import WORKERS, Hardware
from ...training.recipe import Training, run
from ...training.schedules import adamw
from .dino import FreezeLastLayer, SelfDistillation, WeightDecay, cosine

WEIGHT_DECAY = (0.04, 0.4)  # at the start and the end of a cosine; vectors and biases do not decay
MAX_NORM = 3.0  # of each tensor's gradient


class Crops(Dataset):
    """The crops of each image, drawn by the process that loads it: item i is a tuple of them, as floats.

    Arguments as of `pretrain`.
    """

    def __init__(self, images: Tensor, views: Callable[[Tensor], list[Tensor]]):
        self.images, self.views = images, views

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        image = self.images[index : index + 1]
        return tuple(crop[0] for crop in self.views(image.float() / 255 if image.dtype == torch.uint8 else image))


@typed
def pretrain(
    encoder: nn.Module,
    images: Tensor,
    views: Callable[[Tensor], list[Tensor]],
    *,
    epochs: Count = 100,
    batch: Count = 128,
    lr: Amount | None = None,
    warmup: Whole = 10,
    momentum: float = 0.996,
    frozen_epochs: int = 1,
    outputs: int = 65_536,
    hidden: int = 2048,
    bottleneck: int = 256,
    seed: Whole = 0,
    out: Path | None = None,
    hardware: Hardware = Hardware(workers=WORKERS),
    name: str = "DINO",
) -> tuple[nn.Module, History]:
    """Train a copy of `encoder` by DINO; return the teacher's encoder, in eval mode on the CPU, and the history.

    The defaults are the released settings.

    Args:
        encoder: the student, see `SelfDistillation`, with stochastic depth as it was built.
        images: (N, 3, H, W) uint8 or float in [0, 1], or (N, D, n, n) grids of patch embeddings.
        views: from a batch of them, here always of one image, to crops, the two large ones first.
        epochs, batch: passes, and images per step; the last partial batch is dropped.
        lr: by default 5e-4 for each 256 images of a batch. Warmed up over `warmup` epochs, then a cosine to 1e-6.
        momentum: of the teacher, rising to 1 by a cosine.
        frozen_epochs: epochs with a fixed last layer of the head.
        outputs, hidden, bottleneck: sizes of the head.
        out: folder of the run, see `training.recipe.run`; None: nothing is written.
        hardware: its `workers` draw the crops: ten of an image take a core about 0.1 s.

    Raises `BadParameter`: an encoder without a parameter that requires a gradient, or a value outside its range.
    """
    if not any(p.requires_grad for p in encoder.parameters()):
        raise BadParameter("encoder", "a frozen one", "one with parameters that require a gradient")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = SelfDistillation(encoder, outputs, hidden, bottleneck)

    options = {
        "epochs": epochs,
        "batch": batch,
        "optimizer": adamw(5e-4 * batch / 256 if lr is None else lr, WEIGHT_DECAY[0]),
        "schedule": lambda base, steps, per_epoch: cosine(base, 1e-6, epochs, per_epoch, warmup),
        "callbacks": [
            WeightDecay(*WEIGHT_DECAY),
            FreezeLastLayer(model.student["head"], frozen_epochs),
            ClipNorm(MAX_NORM, per_tensor=True),
            model.ema(epochs * (len(images) // batch), momentum),
        ],
        "seed": seed,
        "hardware": hardware,
    }
    crops = {name: str(value) for name, value in getattr(views, "__dict__", {}).items()}
    facts = {"images": images, "views": type(views).__name__, "crops": crops}
    training = Training(
        name,
        build=lambda: model,
        loss=lambda model, crops: model(crops),
        data=Crops(images, views),
        fit=options,
        facts=facts,
        weights=lambda model: model.export().state_dict(),
    )
    _, history = run(training, out)
    return model.export(), history

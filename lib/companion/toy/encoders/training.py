"""The training that most small encoders share."""

from __future__ import annotations

from torch import nn
from torch.utils.data import Dataset

from ...training.callbacks import ClipNorm
from ...training.fit import History, Loss, fit
from ...training.hardware import CPU
from ...training.schedules import Schedule, adamw


def fit_steps(
    model: nn.Module,
    loss: Loss,
    data: Dataset,
    steps: float,
    batch: int,
    learning_rate: float,
    seed: int,
    name: str,
    *,
    clip: float = 1.0,
    schedule: Schedule | None = None,
) -> History:
    """`fit` for a number of steps on the CPU: AdamW with weight decay 0.05, gradients clipped to the norm `clip`."""
    return fit(
        model,
        loss,
        data,
        epochs=steps / (len(data) // batch),
        batch=batch,
        optimizer=adamw(learning_rate, 0.05),
        schedule=schedule,
        callbacks=[ClipNorm(clip)],
        seed=seed,
        hardware=CPU,
        name=name,
    )

"""One model of each paper is an ordinary module: trained in a plain loop, under Lightning and under transformers."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, default_collate

from companion.models import dmt, dplq, ecamp, hvit, metasegnet, promptpar, sa2vp
from companion.models.bat import recipe as bat_recipe
from companion.models.tip.recipe import Learner
from tests.models.common import draw
from tests.papers.common import of_all
from tests.papers.tip import small_pipe

MODELS = {name: make for models in of_all("MODELS").values() for name, make in models.items()}
IMAGES, LABELS = draw(4, 3, 32, 32), torch.tensor([0, 1, 2, 0])
MANY = torch.tensor([[0, 1, 0], [1, 0, 0], [0, 0, 1], [1, 1, 0]])
PIXELS = (draw(4, 3, 64, 64).sigmoid() * 255).to(torch.uint8)
BOXES = torch.tensor([[0.3, 0.3, 0.3, 0.3]]).repeat(4, 1)
IDS = torch.ones(4, 77, dtype=torch.long)


def distillation() -> nn.Module:
    teachers = {"MAE": dmt.build("pocket", heads=2)}
    return dmt.DMT(dmt.build("pocket", heads=2), dmt.Teachers(teachers), decoder="pocket")


Task = tuple[Callable[[], nn.Module], tuple[Tensor, ...], Callable[[Any, Any], Any]]
TASKS: dict[str, Task] = {
    # the model, the tensors of four images, the loss of a batch of them
    "sa2vp": (MODELS["SA²VP"], (IMAGES, LABELS), sa2vp.loss),
    "dplq": (MODELS["DPLQ"], (IMAGES, LABELS), dplq.loss),
    "sic_cads": (MODELS["MLR"], (PIXELS, MANY.bool()), lambda model, batch: sum(model.loss(*batch))),
    "bat": (MODELS["BAT"], (draw(4, 6, 32, 32), draw(4, 6, 64, 64), BOXES), bat_recipe.loss),
    "promptpar": (
        MODELS["PromptPAR, embedded"],
        (IMAGES, MANY),
        lambda model, batch: promptpar.loss(model(batch[0]), batch[1], torch.full((3,), 0.5)),
    ),
    "tip": (lambda: Learner(small_pipe()), (IMAGES, IMAGES, IDS, IDS), lambda model, batch: model(*batch)),
    "dmt": (distillation, (IMAGES,), dmt.loss),
    "hvit": (
        lambda: hvit.build("pocket", "global", classes=3, levels=("slide",)),
        (draw(4, 5, 48), LABELS),
        lambda model, batch: hvit.loss(model.slide.head, model(batch[0]), batch[1], classes=3),
    ),
    "metasegnet": (
        MODELS["MetaSegNet"],
        (draw(4, 3, 64, 64), LABELS[:, None, None].expand(4, 64, 64)),
        lambda model, batch: metasegnet.loss(model, (*batch, ["wet forest"])),
    ),
    "ecamp": (
        MODELS["ECAMP's classifier"],
        (IMAGES, MANY),
        lambda model, batch: ecamp.classification_loss(model(batch[0]), batch[1]),
    ),
}


def value(loss: Any) -> Tensor:
    return loss["loss"] if isinstance(loss, Mapping) else loss


def plain(model: nn.Module, data: list[tuple[Tensor, ...]], loss: Callable, folder: Path) -> None:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model.train()
    for batch in DataLoader(data, 2):
        optimizer.zero_grad()
        value(loss(model, batch)).backward()
        optimizer.step()


def lightning(model: nn.Module, data: list[tuple[Tensor, ...]], loss: Callable, folder: Path) -> None:
    import pytorch_lightning  # imported here because it takes seconds

    class Module(pytorch_lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def training_step(self, batch: Any) -> Tensor:
            return value(loss(self.model, batch))

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1)

    off = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = pytorch_lightning.Trainer(accelerator="cpu", max_epochs=1, default_root_dir=folder, **off)
    trainer.fit(Module().train(), DataLoader(data, 2))


def transformers(model: nn.Module, data: list[tuple[Tensor, ...]], loss: Callable, folder: Path) -> None:
    from transformers import Trainer, TrainingArguments  # imported here because it takes seconds

    class Wrapped(nn.Module):  # Trainer takes `config` of a model for one of transformers
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, batch: Any) -> dict[str, Tensor]:
            return {"loss": value(loss(self.model, batch))}

    options = {"save_strategy": "no", "report_to": "none", "use_cpu": True, "remove_unused_columns": False}
    options |= {"per_device_train_batch_size": 2, "num_train_epochs": 1, "learning_rate": 0.1, "disable_tqdm": True}
    arguments = TrainingArguments(str(folder), optim="sgd", **options)
    Trainer(Wrapped(), arguments, lambda items: {"batch": default_collate(items)}, data).train()


@pytest.mark.parametrize("way", [plain, lightning, transformers])
@pytest.mark.parametrize("name", TASKS)
def test_it_trains_as_any_module_does(name: str, way: Callable, tmp_path: Path) -> None:
    make, tensors, loss = TASKS[name]
    torch.manual_seed(0)
    model = make()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the frameworks: few workers, few batches
        way(model, list(zip(*tensors, strict=True)), loss, tmp_path)
    changed = {n: not torch.equal(p, before[n]) for n, p in model.named_parameters()}
    frozen = [n for n, p in model.named_parameters() if changed[n] and not p.requires_grad]
    trained = [changed[n] for n, p in model.named_parameters() if p.requires_grad]
    assert not frozen and any(trained) and all(p.isfinite().all() for p in model.parameters())

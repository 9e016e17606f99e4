"""SA²VP's study: differences between the methods, the content of a row, and the maps of the notebook."""

import pytest
import torch
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from companion.models.layers import vpt
from companion.models.sa2vp import SA2VP
from companion.toy.ablations import sa2vp as study
from companion.toy.datasets import classification


def test_what_the_methods_change():
    models = {method: study.build(method, 4, 0) for method in study.METHODS}
    first = models["SA²VP"].backbone.state_dict()
    for model in models.values():
        assert all(torch.equal(first[name], t) for name, t in model.backbone.state_dict().items())
        assert not any(m.p for m in model.modules() if isinstance(m, torch.nn.Dropout))  # nor in the frozen blocks
    ours = {method.removeprefix("SA²VP, "): m for method, m in models.items() if isinstance(m, SA2VP)}
    # the scale, how many of its 8 x 8 positions a central position attends to, and the new maps
    found = {k: (m.scale, int(m.cross.mask[1 + 3 * 8 + 3, 1:].sum()), len(m.new_projs)) for k, m in ours.items()}
    assert found == {
        "SA²VP": (1.5, 9, 2),
        "global attention": (1.5, 64, 2),
        "s = 0.1": (0.1, 9, 2),
        "same position only": (1.5, 1, 2),
        "no new maps": (1.5, 9, 0),
    }
    shallow, deep = (sum(p.numel() for p in models[f"VPT-{kind}"].prompts) for kind in ("shallow", "deep"))
    assert deep == 6 * shallow == 6 * study.TOKENS * 48
    assert isinstance(models["full fine-tuning"], vpt.FineTuning)


def test_a_row_holds_the_loss_the_accuracy_and_the_parameters_without_the_head(monkeypatch):
    """At a learning rate of 0 they are those of the model before training."""
    images = torch.randn(20, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    classes = len(classification.TASKS["where"].classes)
    data = TensorDataset(images, torch.arange(20) % classes)
    monkeypatch.setattr(study, "images", lambda *_: data)
    row = study.train("SA²VP", "where", 0.0, 0, "", epochs=1, batch=2)
    model = study.build("SA²VP", classes, 0).eval()
    assert row["trained"] == sum(p.numel() for p in model.parameters() if p.requires_grad) - 49 * classes
    with torch.no_grad():
        image, prompt = model(images)
    losses = [F.cross_entropy(logits, data.tensors[1]).item() for logits in (image, prompt)]
    assert row["loss"] == pytest.approx(0.8 * losses[0] + 0.2 * losses[1], abs=2e-4)
    assert row["accuracy"] == 5 * (image.argmax(1) == data.tensors[1]).sum()

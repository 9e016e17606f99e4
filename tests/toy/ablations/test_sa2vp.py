"""SA²VP's ablations: differences between the methods, and the content of a row."""

import pytest
import torch
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from companion.models.layers import vpt
from companion.models.sa2vp import SA2VP
from companion.toy.ablations import sa2vp as study
from companion.toy.datasets import classification as pocket


def test_what_the_methods_change():
    models = {method: study.build(method, 4, 0) for method in study.METHODS}
    first = models["SA²VP"].backbone.state_dict()
    for model in models.values():
        assert all(torch.equal(first[name], t) for name, t in model.backbone.state_dict().items())
        # no dropout for anyone, not in the frozen blocks either
        assert not any(m.p for m in model.modules() if isinstance(m, torch.nn.Dropout))
    ours = {method: model for method, model in models.items() if isinstance(model, SA2VP)}
    assert len(ours) == 5 and {model.prompt.shape[-1] for model in ours.values()} == {8}
    assert [ours[m].scale for m in ("SA²VP", "SA²VP, s = 0.1", "SA²VP, global attention")] == [1.5, 0.1, 1.5]
    # how many of its 8 x 8 positions a central position attends to
    reach = {method: int(model.cross.mask[1 + 3 * 8 + 3, 1:].sum()) for method, model in ours.items()}
    assert reach == dict.fromkeys(ours, 9) | {"SA²VP, global attention": 64, "SA²VP, same position only": 1}
    assert {method: len(model.new_projs) for method, model in ours.items()} == dict.fromkeys(ours, 2) | {
        "SA²VP, no new maps": 0
    }
    shallow, deep = (sum(p.numel() for p in models[f"VPT-{kind}"].prompts) for kind in ("shallow", "deep"))
    assert deep == len(models["VPT-deep"].backbone.blocks) * shallow == 6 * study.TOKENS * 48
    assert isinstance(models["full fine-tuning"], vpt.FineTuning)


@pytest.mark.parametrize("method", ["linear probing", "SA²VP"])
def test_a_row_holds_the_loss_the_accuracy_and_the_parameters_without_the_head(method, monkeypatch):
    """At a learning rate of 0 they are those of the model before training."""
    images = torch.randn(20, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    classes = len(pocket.TASKS["where"].classes)
    data = TensorDataset(images, torch.arange(20) % classes)
    monkeypatch.setattr(study, "images", lambda *_: data)
    row = study.train(method, "where", 0.0, 0, "", epochs=1, batch=2)
    model = study.build(method, classes, 0).eval()
    assert row["trained"] == sum(p.numel() for p in model.parameters() if p.requires_grad) - 49 * classes
    with torch.no_grad():
        output = model(images)
    image, prompt = output if isinstance(output, tuple) else (output, output)
    losses = [F.cross_entropy(logits, data.tensors[1]).item() for logits in (image, prompt)]
    assert row["loss"] == pytest.approx(0.8 * losses[0] + 0.2 * losses[1], abs=2e-4)
    assert row["accuracy"] == 5 * (image.argmax(1) == data.tensors[1]).sum()

"""The pocket tracker: what ships is what its card says, it tracks what it never saw, and its training learns."""

import torch

from companion.models.bat import model as bat
from companion.toy import encoders
from companion.toy.encoders import tracker
from companion.training.fit import fit


def test_the_shipped_tracker_is_as_good_as_its_card_says():
    card = encoders.read_card("pocket_ostrack")
    model = bat.foundation("pocket_ostrack")
    assert sum(p.numel() for p in model.parameters()) == card["parameters"]
    assert (encoders.WEIGHTS / "pocket_ostrack.safetensors").stat().st_size == card["bytes"] < 2_000_000
    found = tracker.measure(model, 250, seed=7)
    for stream in ("RGB", "thermal"):
        assert abs(found[stream]["IoU"] - card["quality"][stream]["IoU"]) < 0.05
    assert found["chance"]["IoU"] < 0.2


def test_streams_come_two_to_one():
    template, _, boxes = tracker.pairs(60, 3, "val").tensors
    grey = (template.float().amax(1) - template.float().amin(1)).mean((1, 2)) < 4
    assert 10 <= int(grey.sum()) <= 30
    assert (boxes[:, 2:] > 0).all()


def test_a_short_training_learns():
    torch.manual_seed(0)
    model = bat.foundation("pocket_ostrack", "random")
    data = tracker.pairs(256, 0, "train")
    history = fit(model, tracker.loss, data, epochs=5, batch=32, lr=2e-3, clip=1.0, accelerator="cpu", name="test")
    assert sum(r["loss"] for r in history[-5:]) < 0.5 * sum(r["loss"] for r in history[:5])

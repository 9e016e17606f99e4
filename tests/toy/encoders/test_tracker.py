"""The pocket tracker: shipped weights match the model card, it tracks unseen objects, and its training learns."""

from companion.toy import encoders
from companion.toy.encoders import tracker


def test_the_shipped_tracker_is_as_good_as_its_card_says():
    card = encoders.read_card("pocket_ostrack")
    model = tracker.build()
    assert sum(p.numel() for p in model.parameters()) == card["parameters"]
    found = tracker.measure(model, 250, seed=7)
    for stream in ("RGB", "thermal"):
        assert abs(found[stream]["IoU"] - card["quality"][stream]["IoU"]) < 0.05
    assert found["chance"]["IoU"] < 0.2
    template, _, boxes = tracker.pairs(60, 3, "val").tensors  # two to one of RGB and thermal
    grey = (template.float().amax(1) - template.float().amin(1)).mean((1, 2)) < 4
    assert 10 <= int(grey.sum()) <= 30 and (boxes[:, 2:] > 0).all()


def test_a_short_training_learns(monkeypatch):
    histories, fit = [], tracker.fit_steps
    monkeypatch.setattr(tracker, "fit_steps", lambda *args, **options: histories.append(fit(*args, **options)))
    assert not tracker.train(256, 5).training
    losses = [row["loss"] for row in histories[0]]
    assert len(losses) == 40 and sum(losses[-5:]) < 0.5 * sum(losses[:5])

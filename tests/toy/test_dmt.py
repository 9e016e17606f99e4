"""DMT's collages, of which grey hides two factors, and its study."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from companion.models.dmt import Teachers
from companion.toy.ablations import dmt as study
from companion.toy.datasets import collage
from companion.toy.encoders import teachers as taught
from companion.toy.encoders.teachers import grey

SEED = 5


def draw(shape=0, hue=0, quadrant=0, seed=0):
    return collage.collage(np.random.default_rng(seed), "train", (1, shape, hue, quadrant)).image.astype(float) / 255


def test_factors_are_drawn_evenly_and_independently():
    drawn = np.array([c.factors for c in collage.collages(800, "train", 7)])
    for i, (name, count) in enumerate(collage.FACTORS.items()):
        assert abs(np.bincount(drawn[:, i], minlength=count) / 800 - 1 / count).max() < 0.06, name
    assert abs(np.corrcoef(drawn.T) - np.eye(4)).max() < 0.12


def test_grey_hides_the_hue_and_the_square_but_not_the_shape():
    def as_grey(**factors):
        return grey(torch.from_numpy(draw(**factors)).permute(2, 0, 1)[None])[0, 0].numpy()

    # what is left of the colours is what rounding and clipping do to them
    for other in ({"hue": 4}, {"quadrant": 3}):
        assert abs(as_grey() - as_grey(**other)).mean() < 0.001 and abs(draw() - draw(**other)).mean() > 0.02
    assert abs(as_grey() - as_grey(shape=1)).mean() > 0.003


def test_the_square_lies_in_its_quadrant_and_the_object_has_its_hue():
    for quadrant in range(4):
        drawn = [[draw(quadrant=(quadrant + i) % 4, seed=s) for s in range(20)] for i in (0, 1)]
        mean = np.mean(np.subtract(*drawn), 0)
        assert (mean[..., 0] - mean[..., 1]).reshape(2, 16, 2, 16).mean((1, 3)).argmax() == quadrant
    red, cyan = (np.array([draw(0, hue, seed=s)[14:18, 14:18].mean((0, 1)) for s in range(12)]) for hue in (0, 4))
    assert (red[:, 0] - red[:, 1]).min() > 0 > (cyan[:, 0] - cyan[:, 1]).max()


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    path = tmp_path_factory.mktemp("study")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(collage, "COUNTS", {"train": 320, "val": 60, "test": 60})
        study.write(path, SEED)
        yield str(path)
    study.part.cache_clear()


def test_all_students_start_alike_and_differ_in_what_their_names_say(root):
    trained = [m for m in study.METHODS if m not in study.UNTRAINED]
    models, first = {m: study.assemble(m, SEED, root)[0] for m in trained}, study.student(SEED).state_dict()
    for method, model in models.items():
        encoder = model.student if method in study.STUDENTS else model.encoder
        assert all(torch.equal(first[name], value) for name, value in encoder.state_dict().items()), method
    assert [len(models[m].target_norms) for m in ("DMT", "MAE only", "MAE + iBOT", "gate")] == [3, 1, 2, 3]
    assert [len(models[m].adapters) for m in ("DMT", "averaged teachers", "gate")] == [3, 1, 1]
    assert models["LN targets"].target_norms[0].kind == "ln" and models["DMT"].target_norms[0].kind == "channel"
    assert models["token loss only"].decoder is None and not models["map loss only"].adapters
    assert list(models["same view"].teachers.models) == list(taught.TEACHERS) and models["DMT"].teachers is None


def test_fused_targets_and_narrow_views():
    """Cosines with the student 1, 0, 0.71; mean ones with the other two teachers 0.35, 0.35, 0.71; temperature 0.1."""
    gate, mean = (kind(study.student(0), [48] * 3, **study.SETTINGS) for kind in (study.Gated, study.Averaged))
    targets = torch.tensor([[3.0, 0.0], [0.0, 3.0], [3.0, 3.0]])[:, None, None]
    weights = torch.tensor([np.exp(10 * 0.5**1.5), 1, np.exp(5)]).float()
    expected = (weights[:, None] / weights.sum() * targets[:, 0, 0]).sum(0)
    student = torch.tensor([[[7.0, 0.0]]])
    torch.testing.assert_close(gate.fused(targets, student)[0, 0], expected)
    torch.testing.assert_close(mean.fused(targets, student)[0, 0], torch.tensor([2.0, 2.0]))
    images, noise = torch.rand(2, 3, 32, 32), torch.rand(2, 16)
    same = study.SameView(study.student(0), Teachers(taught.load()), mask_ratio=0.5, decoder="pocket")
    hidden = F.interpolate(noise.argsort(1).argsort(1).ge(8).float().view(2, 1, 4, 4), scale_factor=8)
    losses = [same(x, noise=noise).total for x in (images, images + hidden)]
    torch.testing.assert_close(*losses)  # teachers and student do not see the hidden patches


def test_cached_tokens_are_those_of_the_teachers(root):
    cache, data = study.cached_tokens(root, SEED), study.part(root, SEED, "train")
    for cached, tokens in zip(cache.tensors(), Teachers(taught.load())(data.images[:20]), strict=True):
        assert cached.shape == (320, 17, 48)
        torch.testing.assert_close(cached[:20], tokens, rtol=1e-4, atol=1e-4)
    pair = study.assemble("MAE + iBOT", SEED, root)[2].tensors
    assert torch.equal(pair[1], cache.tensors()[0]) and torch.equal(pair[2], cache.tensors()[2])


def test_a_training_changes_every_tensor_of_the_student_and_none_of_a_teacher(root):
    first = study.student(SEED).state_dict()
    student, whole, history = study.train_model("same view", 2e-3, SEED, root, 3)
    assert len(history) == 3 and not student.training
    assert all(not torch.equal(first[name], p) for name, p in student.named_parameters() if p.requires_grad)
    for name, shipped in taught.load().items():
        found = whole.teachers.models[name].state_dict()
        assert all(torch.equal(value, found[key]) for key, value in shipped.state_dict().items())


def test_a_row_holds_the_mean_of_the_factors_and_the_best_lead_of_a_teacher(root):
    rows = {m: study.train(m, study.TASK, 0.0, SEED, root) for m in ("untrained", *study.THEMSELVES)}
    mean = np.mean([rows["untrained"][name] for name in collage.FACTORS])
    assert rows["untrained"]["mean"] == pytest.approx(mean, abs=0.02) and "own-probe lead" not in rows["untrained"]
    assert "mean all" not in study.train("untrained", study.TASK, 0.0, SEED, root, "select")
    for method in study.THEMSELVES:
        others = [rows[m] for m in study.THEMSELVES if m != method]
        lead = max(rows[method][name] - max(other[name] for other in others) for name in collage.FACTORS)
        assert rows[method]["own-probe lead"] == pytest.approx(lead, abs=0.02)

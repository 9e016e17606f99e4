"""SIC-CADS' scenes, whose background tells what a novel thing is, and its study: branches, sweeps and controls."""

import itertools
from collections import Counter

import numpy as np
import pytest
import torch
from torchvision.ops import box_iou

from companion.toy.ablations import sic_cads as study
from companion.toy.ablations import study_root
from companion.toy.datasets import detection

SEED = 5


def test_every_place_has_three_base_things_and_a_novel_one_with_a_double_in_the_next():
    places, by_name = list(detection.PLACES), {thing.name: thing for thing in detection.THINGS}
    assert [*detection.BASE, *detection.NOVEL] == list(range(16)) and len(detection.NOVEL) == 4
    for number, place in enumerate(places):
        *base, novel = [thing for thing in detection.THINGS if thing.place == place]
        double = by_name[novel.like]
        assert [thing.like for thing in base] == [""] * 3 and double.place == places[(number + 1) % 4]
        assert double.shape == novel.shape and (novel.hue - double.hue) % 1 == pytest.approx(0.03)
    # any two base things of one shape differ in hue by far more
    for one, other in itertools.combinations(detection.THINGS[:12], 2):
        assert one.shape != other.shape or min((one.hue - other.hue) % 1, (other.hue - one.hue) % 1) > 0.08


def test_things_are_where_they_belong_and_novel_ones_are_hard():
    drawn = detection.scenes(300, "test", 7)
    here = Counter(detection.THINGS[label].place == shown.place for shown in drawn for label in shown.labels)
    # an eighth is drawn from everywhere, of which a quarter matches the background by chance
    assert here[True] / here.total() == pytest.approx(1 - 0.125 * 0.75, abs=0.04)
    looks = Counter((k in detection.NOVEL, look) for s in drawn for k, look in zip(s.labels, s.looks, strict=True))
    for novel, hard in ((True, 0.8), (False, 0.35)):
        plain, soft, hidden = (looks[novel, look] for look in detection.LOOKS)
        assert 1 - plain / (plain + soft + hidden) == pytest.approx(hard, abs=0.07)
        assert hidden / (soft + hidden) == pytest.approx(0.5, abs=0.1)


def test_the_texture_alone_tells_the_place():
    """Neither brightness nor colour does: the spread of each mean is far larger than the backgrounds' difference."""
    rng = np.random.default_rng(0)
    means = [[detection.backdrop(rng, p, "train").mean((0, 1)) for _ in range(40)] for p in detection.PLACES]
    assert (np.std(np.mean(means, 1), axis=0) < np.std(means, 1).mean(0) / 2).all()


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Few images; the caches of the study are cleared after."""
    path = tmp_path_factory.mktemp("study")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(detection, "COUNTS", {"train": 96, "val": 24, "test": 24})
        patch.setattr(study, "EPOCHS", 1)
        detection.write(study_root(path, SEED), SEED)
        yield str(path)
    for function in (study.images_of, study.foundation, study.detected, study.trained):
        function.cache_clear()


def test_training_holds_no_novel_box(root):
    for split in ("train", "val", "test"):
        novel = study.images_of(root, SEED, split)[0].positives[:, list(detection.NOVEL)]
        assert novel.any() == (split != "train")


def test_gains_are_over_the_detector_alone_and_the_sweeps_meet_the_methods(root):
    row, other, plain = (
        study.train(method, "shipped detector", 3e-3 * (method != "no refinement"), SEED, root)
        for method in ("SIC-CADS", "SIC-CADS, gamma 0.7", "no refinement")
    )
    assert row["novel gain"] == pytest.approx(row["AP50 novel"] - plain["AP50 novel"], abs=0.02)
    assert row["novel gain beyond base gain"] == pytest.approx(row["novel gain"] - row["base gain"], abs=0.02)
    assert row["novel, gamma 0.5"] == row["AP50 novel"] and row["base, lambda_base 0.8"] == row["AP50 base"]
    assert row["novel, gamma 0.0"] == plain["AP50 novel"] and row["novel, gamma 0.7"] == other["AP50 novel"]


def test_scores_by_branch_and_control(root):
    embedded, last, count = study.trained("shipped detector", 0.0, 2, root, SEED, "test")
    text, plus = study.scores(embedded, "text"), study.scores(embedded, "visual+")
    # lambda_N = 1 - lambda_B: one formula for all classes
    mixed = study.scores(embedded, lambda_base=0.3, lambda_novel=0.7)
    torch.testing.assert_close(mixed, text**0.3 * plus**0.7, rtol=1e-4, atol=1e-5)
    assert torch.equal(study.scores(embedded, control="other"), study.scores(embedded).roll(1, 0))
    average = study.scores(embedded, control="average")
    torch.testing.assert_close(average, study.scores(embedded).mean(0).expand(24, -1))
    single = study.trained("shipped detector", 0.0, 1, root, SEED, "test")[0]
    assert single.teacher.shape[1] == 1 and embedded.teacher.shape[1] == 5 and (last, count) == (0, 0)
    torch.testing.assert_close(single.teacher[:, 0], embedded.teacher[:, 0], rtol=1e-4, atol=1e-4)


def test_where_in_the_detector_refinement_acts():
    """One box, two classes: finished results and one class a box have lost the weaker one, Eq. 7 has not."""
    probabilities, p = torch.zeros(1, 1, 16), torch.full((1, 16), 0.1)
    probabilities[0, 0, 0], probabilities[0, 0, 4], p[0, 4] = 0.7, 0.04, 0.9
    detected = study.Detected(torch.tensor([[[10.0, 10, 20, 20]]]), probabilities)

    def found(method):
        return {row["category_id"]: row["score"] for row in study.rows_of(method, detected, p, (7,))}

    assert found("no refinement") == pytest.approx({1: 0.7, 5: 0.04})
    assert found("SIC-CADS") == pytest.approx({1: (0.7 * 0.1) ** 0.5, 5: (0.04 * 0.9) ** 0.5})
    assert set(found("SIC-CADS, on finished results")) == {1} == set(found("SIC-CADS, one class a box"))


def test_named_right_counts_every_object_once(root):
    found, _ = study.images_of(root, SEED, "test")
    detected = study.detected("shipped detector", root, SEED, "test")
    perfect = torch.zeros_like(detected.probabilities)
    for number in range(len(found)):
        target = found.target(number)
        perfect[number, box_iou(target.boxes, detected.boxes[number]).argmax(1), target.labels] = 1
    shares = study.named_right(detected, perfect, found)
    assert set(shares) == {f"{g} {look}" for g in ("base", "novel") for look in detection.LOOKS}
    assert min(shares.values()) > 90  # two objects may share their best box
    assert max(study.named_right(detected, 1 - perfect, found).values()) < 10

"""SIC-CADS' ablations on the synthetic scenes, and the live run of the notebook."""

import weakref
from dataclasses import replace

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from torchvision.ops import box_iou

import companion
from companion.data import detection
from companion.errors import BadParameter
from companion.evaluation import ablations
from companion.models.sic_cads import figures, recipe, refine
from companion.ops import record
from companion.ops.papers import paper
from companion.toy.ablations import sic_cads as ablation
from companion.toy.ablations import study_root
from companion.toy.datasets import detection as synthetic
from companion.toy.encoders import detector as encoders
from companion.toy.live import sic_cads as live_run
from tests.conftest import parameters
from tests.viz.test_plots import overlapping_text, visible_texts

COUNTS = {"train": 96, "val": 24, "test": 40}
SEED = 5


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """A run's folder with few images; the caches of the ablation are cleared after."""
    path = tmp_path_factory.mktemp("run")
    caches = (ablation.images_of, ablation.foundation, ablation.detected, ablation.trained)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(synthetic, "COUNTS", COUNTS)
        patch.setattr(ablation, "EPOCHS", 6)
        synthetic.write(study_root(path / "data", SEED), SEED)
        yield path
    for function in caches:
        function.cache_clear()


@pytest.fixture(scope="module")
def live(out):
    """A setting, its recogniser, its history, and the predictions for the test images."""
    found = live_run.setting(parameters("sic_cads", seed=SEED), out, {("shipped detector", "SIC-CADS"): 3e-3})
    model, history = recipe.train(found)
    return found, model, history, recipe.predict(found, model)


def test_the_live_run_is_the_ablations(out, live):
    """The same images, initial weights and steps as the ablation's row of this seed and learning rate."""
    found, model, history, outputs = live
    row = ablation.train("SIC-CADS", "shipped detector", 3e-3, SEED, str(out / "data"))
    scores = recipe.ap50(found, outputs)
    # images one by one against batches: the last bits may differ, and with them a rank
    assert scores["novel"] == pytest.approx(row["AP50 novel"], abs=0.5)
    assert scores["base"] == pytest.approx(row["AP50 base"], abs=0.5)
    assert len(history) == 12 and sum(p.numel() for p in model.parameters() if p.requires_grad) == row["trained"]
    assert recipe.recognition(found.test, outputs.p["SIC-CADS"])["novel"] == pytest.approx(row["mAP novel"], abs=0.5)
    plain = ablation.train("no refinement", "shipped detector", 0.0, SEED, str(out / "data"))
    assert recipe.ap50(found, outputs, gamma=0.0)["novel"] == pytest.approx(plain["AP50 novel"], abs=0.01)
    assert row["novel gain"] == pytest.approx(row["AP50 novel"] - plain["AP50 novel"], abs=0.02)
    assert row["novel gain beyond base gain"] == pytest.approx(row["novel gain"] - row["base gain"], abs=0.02)


def test_training_learns_and_touches_nothing_frozen(live):
    found, model, history, _ = live
    losses = [row["loss"] for row in history]
    assert np.mean(losses[-3:]) < 0.8 * np.mean(losses[:3])
    again, same = recipe.train(found)
    assert [row["loss"] for row in same] == losses
    start = found.build()
    assert torch.equal(model.text, start.text)
    for a, b in zip(model.teacher.state_dict().values(), start.teacher.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(model.heads.to_text.weight, start.heads.to_text.weight)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_branches_and_their_ends(live):
    found, model, _, outputs = live
    assert set(paper("sic_cads")["parameters"]["branch"]["choices"]) == set(recipe.BRANCHES)
    assert tuple(outputs.p) == recipe.BRANCHES and all(p.shape == (40, 16) for p in outputs.p.values())
    assert torch.equal(recipe.refined(found, outputs, 3, gamma=0.0), outputs.probabilities[3])
    assert torch.equal(recipe.refined(found, outputs, 3, "text", 1.0), outputs.p["text"][3].expand(30, 16))
    image, _ = found.test[7]
    own = model.recognise(image[None])
    torch.testing.assert_close(own.p[0], outputs.p["SIC-CADS"][7])
    torch.testing.assert_close(model.recognise(image[None], student=True).p[0], outputs.p["fused"][7])
    torch.testing.assert_close(own.p_image[0], outputs.p["visual+"][7])
    few = recipe.predict(found, model, 5)
    assert len(few.boxes) == 5 and set(recipe.ap50(found, few)) == {"novel", "base", "all"}
    rows = recipe.detections(found, few)
    assert {row["image_id"] for row in rows} <= set(found.test.image_ids[:5])
    assert min(row["score"] for row in rows) > found.threshold
    with pytest.raises(BadParameter, match="gamma"):
        recipe.refined(found, outputs, 0, gamma=1.5)
    with pytest.raises(BadParameter, match="one score for each class"):
        refine(torch.rand(3, 16), torch.rand(15))


def test_memory_holds_few_matrices_of_probabilities(live, monkeypatch):
    found, model, _, outputs = live
    given: list[weakref.ref] = []
    alive: list[int] = []

    def detect(image):
        boxes, probabilities = found.detect(image)
        probabilities = probabilities.clone()
        given.append(weakref.ref(probabilities))
        alive.append(sum(matrix() is not None for matrix in given))
        return boxes, probabilities

    assert len(outputs.probabilities) == 40  # a small test is held
    monkeypatch.setattr(recipe, "KEPT", 3 * outputs.probabilities[0].nbytes)
    watched = replace(found, detect=detect)
    again = recipe.predict(watched, model)
    assert len(again.probabilities) == 3 and max(alive) <= 3 + 2
    size = sum(values.nbytes for images in again.best.values() for image in images for values in image)
    assert size <= 40 * found.top * 12 * (1 + len(recipe.BRANCHES))  # whatever the classes and boxes
    for branch, gamma in (("", None), ("text", None), ("", 0.0), ("visual", 0.25)):
        rows = recipe.detections(watched, again, branch, gamma)
        assert rows == recipe.detections(found, outputs, branch, gamma) and len(rows) > 100
    before = len(given)
    for index in (2, 7, 7):
        assert torch.equal(recipe.refined(watched, again, index), recipe.refined(found, outputs, index))
    assert len(given) == before + 1 and max(alive) <= 3 + 2


def test_a_model_without_a_teacher_has_the_learned_branches(live, monkeypatch):
    found, model, _, _ = live
    monkeypatch.setattr(model, "teacher", None)
    assert tuple(recipe.branch_scores(model, found.test[0][0])) == ("text", "visual", "fused")


def test_real_results_join_those_that_the_tables_show(live, tmp_path):
    found, _, _, outputs = live
    options = {"profile": "paper", "dataset": "detection/ov-coco", "images": 0}
    options["detector"] = "google/owlvit-base-patch32"
    for seed in (0, 1):
        recipe.record(tmp_path / "measured.csv", parameters("sic_cads", seed=seed, **options), found, outputs)
    table = recipe.tables(tmp_path / "measured.csv")["OV-COCO, generalised"].set_index("method")
    ours = recipe.ap50(found, outputs)
    assert table.loc["owlvit-base-patch32 + SIC-CADS, gamma 0.5", "novel"] == f"– / {ours['novel']:.2f}"
    assert table.loc["owlvit-base-patch32", "base"] == f"– / {recipe.ap50(found, outputs, gamma=0.0)['base']:.2f}"


def test_every_method_gives_a_row(out):
    """Columns of the test stage: scores, gains, objects named right by look; curves where they are measured."""
    for method in ablation.METHODS:
        learning_rate = 0.0 if method in ablation.UNTRAINED else 3e-3
        row = ablation.train(method, "shipped detector", learning_rate, SEED, str(out / "data"))
        assert 0 <= row[ablation.METRIC] <= 100 and (row["trained"] > 0) == (learning_rate > 0) == (row["loss"] > 0)
        assert {f"right {g} {look}" for g in ("base", "novel") for look in synthetic.LOOKS} <= set(row)
        assert ("mAP novel" in row) == (method != "no refinement")
        assert (f"novel, gamma {ablation.GAMMAS[3]}" in row) == (method in ablation.BRANCHES)
        assert ("base, lambda_novel 0.4" in row) == (method == "SIC-CADS")
        if method in ablation.BRANCHES:
            assert row["novel, gamma 0.0"] == pytest.approx(row["AP50 novel"] - row["novel gain"], abs=0.02)
    named = {*ablation.TASKS["detector from scratch"], *ablation.UNTRAINED}
    assert named <= set(ablation.METHODS)


def test_the_average_scores_of_all_images_change_no_ap(out):
    """One factor a class for all images keeps every order within the class: the gain is the image's own scores'."""
    root = str(out / "data")
    plain = ablation.train("no refinement", "shipped detector", 0.0, SEED, root, "select")
    average = ablation.train("average scores", "shipped detector", 3e-3, SEED, root, "select")
    for group in ("novel", "base"):
        assert average[f"AP50 {group}"] == pytest.approx(plain[f"AP50 {group}"], abs=1.0)  # the threshold still bites


def test_the_sweeps_meet_the_methods(out):
    root = str(out / "data")
    row = ablation.train("SIC-CADS", "shipped detector", 3e-3, SEED, root)
    assert row["novel, gamma 0.5"] == row["AP50 novel"]
    other = ablation.train("SIC-CADS, gamma 0.7", "shipped detector", 3e-3, SEED, root)
    assert row["novel, gamma 0.7"] == other["AP50 novel"] and row["base, gamma 0.7"] == other["AP50 base"]
    lvis = ablation.train("SIC-CADS, lambdas of LVIS", "shipped detector", 3e-3, SEED, root)
    assert row["novel, lambda_novel 0.8"] == lvis["AP50 novel"]
    assert row["base, lambda_base 0.8"] == row["AP50 base"]


def test_scores_by_branch_and_control(out):
    root = str(out / "data")
    embedded, _, _ = ablation.trained("shipped detector", 3e-3, 2, root, SEED, "test")
    text, plus = ablation.scores(embedded, "text"), ablation.scores(embedded, "visual+")
    # lambda_N = 1 - lambda_B: one formula for all classes
    torch.testing.assert_close(ablation.scores(embedded, lambda_base=0.3, lambda_novel=0.7), text**0.3 * plus**0.7)
    torch.testing.assert_close(ablation.scores(embedded, lambda_base=1.0, lambda_novel=0.0), text)
    other = ablation.scores(embedded, control="other")
    assert torch.equal(other, ablation.scores(embedded).roll(1, 0))
    average = ablation.scores(embedded, control="average")
    assert torch.equal(average[0], average[1]) and average.shape == other.shape
    single, _, _ = ablation.trained("shipped detector", 3e-3, 1, root, SEED, "test")
    assert single.teacher.shape[1] == 1 and embedded.teacher.shape[1] == 5
    torch.testing.assert_close(single.teacher[:, 0], embedded.teacher[:, 0])


def test_where_in_the_detector_refinement_acts():
    """One box, two classes: finished results and one class a box have lost the weaker one, Eq. 7 has not."""
    probabilities = torch.zeros(1, 1, 16)
    probabilities[0, 0, 0], probabilities[0, 0, 4] = 0.7, 0.04
    detected = ablation.Detected(torch.tensor([[[10.0, 10, 20, 20]]]), probabilities)
    p = torch.full((1, 16), 0.1)
    p[0, 4] = 0.9
    found = {
        method: {row["category_id"]: row["score"] for row in ablation.rows_of(method, detected, p, (7,))}
        for method in ("SIC-CADS", "SIC-CADS, on finished results", "SIC-CADS, one class a box", "no refinement")
    }
    assert found["no refinement"] == pytest.approx({1: 0.7, 5: 0.04})
    assert found["SIC-CADS"] == pytest.approx({1: (0.7 * 0.1) ** 0.5, 5: (0.04 * 0.9) ** 0.5})
    assert set(found["SIC-CADS, on finished results"]) == {1} == set(found["SIC-CADS, one class a box"])


def test_named_right_counts_every_object_once(out):
    root = str(out / "data")
    found, _ = ablation.images_of(root, SEED, "test")
    detected = ablation.detected("shipped detector", root, SEED, "test")
    perfect = torch.zeros_like(detected.probabilities)
    for number in range(len(found)):
        target = found.target(number)
        best = box_iou(target.boxes, detected.boxes[number]).argmax(1)
        perfect[number, best, target.labels] = 1
    shares = ablation.named_right(detected, perfect, found)
    assert set(shares) == {f"{g} {look}" for g in ("base", "novel") for look in synthetic.LOOKS}
    assert min(shares.values()) > 90  # two objects may share their best box


def test_detector_and_clip_trained_anew_are_the_seeds_own(monkeypatch):
    monkeypatch.setattr(ablation.made.train_clip, "__defaults__", (64, 2, 0))
    monkeypatch.setattr(ablation.made.train_detector, "__defaults__", (32, 2, 0, None))
    ablation.foundation.cache_clear()
    (one, first), (other, second) = (ablation.foundation("detector from scratch", seed) for seed in (0, 1))
    assert not torch.equal(one.text_projection.weight, other.text_projection.weight)
    assert not torch.equal(first.dense.weight, second.dense.weight)
    ablation.foundation.cache_clear()


# --- the notebook's tables and figures --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def study():
    return ablations.read(record.root() / "reports" / "pocket" / "sic_cads")


def test_the_live_tables_hold_the_scores_of_the_run(live, tmp_path, capsys):
    found, _, history, outputs = live
    p = parameters("sic_cads", seed=SEED)
    assert live_run.meaningful(p, history, outputs) == list(recipe.BRANCHES)
    assert live_run.meaningful(p, [], outputs) == ["visual+"]
    table = live_run.scores(found, outputs, ["text", "SIC-CADS"]).set_index("image-level scores")
    assert list(table.index) == ["none: the detector alone", "text", "SIC-CADS"]
    alone, ours = recipe.ap50(found, outputs, gamma=0.0), recipe.ap50(found, outputs)
    assert table["AP50 novel"].iloc[[0, 2]].tolist() == [alone["novel"], ours["novel"]]
    assert table["mAP base"].isna().tolist() == [True, False, False]
    live_run.check(p, tmp_path, found, outputs)
    assert capsys.readouterr().out.count("as expected") == 3 and not list(tmp_path.iterdir())
    options = {"profile": "paper", "dataset": "detection/ov-coco", "detector": "google/owlvit-base-patch32"}
    assert live_run.measured(tmp_path) == {}
    live_run.check(parameters("sic_cads", **options, dry_run=True), tmp_path, found, outputs)
    assert live_run.measured(tmp_path) == {}, "a dry run measures nothing"
    live_run.check(parameters("sic_cads", **options), tmp_path, found, outputs)
    assert list(live_run.measured(tmp_path)) == ["OV-COCO, generalised"]


def test_the_images_shown_are_those_that_refinement_corrects(live):
    found, _, _, outputs = live
    chosen = live_run.most_refined(found, outputs, 3)

    def corrected(index):
        target = found.test.target(index)
        best = box_iou(target.boxes, outputs.boxes[index]).argmax(1)
        right = [(recipe.refined(found, outputs, index, gamma=g)[best].argmax(1) == target.labels) for g in (0.0, 0.5)]
        return (right[1] & found.novel[target.labels]).sum() - (right[0] & found.novel[target.labels]).sum()

    assert len(set(chosen)) == 3 and corrected(chosen[0]) > 0
    few = recipe.Predictions(outputs.boxes[:2], outputs.p, outputs.best, outputs.probabilities[:2])
    assert sorted(live_run.most_refined(found, few, 4)) == [0, 0, 1, 1]  # a dry run has two images


def test_lookalikes_are_counted_by_look(live):
    found, _, _, outputs = live
    table = live_run.lookalikes(found, outputs).set_index("look")
    novel = [a for a in found.test.truth["annotations"] if a["category_id"] - 1 in synthetic.NOVEL]
    assert table.objects.to_dict() == {look: sum(a["look"] == look for a in novel) for look in table.index}
    assert ((table["own class (%)"] + table["look-alike (%)"]) <= 100).all()
    assert table.loc["plain", "look-alike (%)"] > 90 and table.loc["plain", "detector: look-alike / own"] > 1
    truth = found.test.truth["annotations"][0]
    look = truth.pop("look")
    assert live_run.lookalikes(found, outputs).empty  # as of COCO
    truth["look"] = look


def test_thresholds_and_finished_results(live):
    found, _, _, outputs = live
    table = live_run.above_threshold(found, outputs).set_index("threshold")
    assert (table["refined, gamma 0.5"] >= table["detector alone"]).all() and table[
        "detector alone"
    ].is_monotonic_decreasing
    facts = live_run.finished_results(found, outputs).set_index("of the finished results").value
    assert facts["lowest score"] >= found.threshold
    assert facts["AP50 novel, full matrix"] == recipe.ap50(found, outputs)["novel"]
    assert facts["AP50 novel, as they are"] == pytest.approx(recipe.ap50(found, outputs, gamma=0.0)["novel"])


def test_reasons_and_best_gammas_follow_the_rows(study):
    claims = {claim["id"] for claim in paper("sic_cads")["claims"]}
    said = live_run.reasons(study)
    assert set(said) <= claims and "seed 204" in said["novel-more"]
    changed = study.copy()
    ours = (changed.task == "shipped detector") & (changed.method == "SIC-CADS") & (changed.stage == "test")
    for gamma in ablation.GAMMAS[1:]:
        changed.loc[ours, f"base, gamma {gamma}"] = changed.loc[ours, "base, gamma 0.0"] - (gamma > 0.2)
    assert live_run.best_gammas(changed[ours])["gamma"].iloc[-1] == 0.2
    assert "up to gamma 0.2 no seed loses" in live_run.reasons(changed)["base"]


def test_an_own_folder_trains_a_model_that_is_saved_and_loaded(tmp_path):
    folder = live_run.example_folder(tmp_path / "own", 6)
    data = detection.own_folder(folder / "annotations.json", folder, novel=["ball", "flag", "flare", "tile"])
    assert len(data) == 6 and not data.positives[:, data.unseen].any()
    clip = live_run.clip()
    model = live_run.recogniser(encoders.texts(clip), data.unseen, clip.visual)
    companion.save(model, tmp_path / "own.safetensors", class_names=data.class_names)
    images, options = [folder / "000001.png"], {"detector": live_run.detect, "gamma": 0.5, "top": 3}
    (found,) = companion.predict(companion.load(tmp_path / "own.safetensors"), images, **options)
    assert [found] == companion.predict(model, images, class_names=data.class_names, **options)
    assert len(found) == 3 and {row["class"] for row in found} <= set(synthetic.CLASSES)


FIGURES = {
    "architecture": lambda live, rows: figures.architecture(),
    "scenes": lambda live, rows: figures.scenes(live[0]),
    "image scores": lambda live, rows: figures.image_scores(live[0], live[3], 1, ["text", "visual+", "SIC-CADS"]),
    "before and after": lambda live, rows: figures.before_after(live[0], live[3], [0, 1, 2, 3]),
    "at a gamma": lambda live, rows: figures.refined_at(live[0], live[3], 2, 0.5),
    "patches": lambda live, rows: figures.patch_cosines(live[0], 1, torch.rand(5, 16)),
    "one patch": lambda live, rows: figures.patch_cosines(live[0], 1, torch.rand(1, 16), levels=1),
    "gamma": lambda live, rows: figures.gamma_curves(rows),
    "lambdas": lambda live, rows: figures.lambda_curves(rows[rows.method == "SIC-CADS"]),
}


@pytest.mark.parametrize("name", FIGURES)
def test_figures_are_legible(name, live, study):
    figure = FIGURES[name](live, study[(study.stage == "test") & (study.task == "shipped detector")])
    texts = visible_texts(figure)
    assert all(text.get_fontsize() >= 8 for text in texts)
    on_images = name in ("before and after", "at a gamma")  # the names of neighbouring boxes may touch
    if not on_images and not any(text.get_rotation() % 90 for text in texts):
        assert overlapping_text(figure) == []
    for text in texts:
        box = text.get_window_extent()
        assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1, text.get_text()
    plt.close(figure)


def test_sweeps_draw_the_means_of_the_study(live, study):
    rows = study[(study.stage == "test") & (study.task == "shipped detector")]
    ours = rows[rows.method == "SIC-CADS"]
    lines = {line.get_label(): line for line in figures.gamma_curves(rows).axes[0].lines}
    for x, y in lines["SIC-CADS"].get_xydata():
        assert y == pytest.approx(ours[f"novel, gamma {x:.1f}"].mean())
    novel, base = figures.lambda_curves(ours).axes[1].containers
    gain = ours["novel, lambda_novel 1.0"] - ours["novel, gamma 0.0"]
    assert novel.lines[0].get_xydata()[-1] == pytest.approx([1.0, gain.mean()])
    assert base.get_label() == "base classes"
    plt.close("all")


def test_boxes_are_marked_correct_where_an_object_of_their_class_is(live):
    found, _, _, outputs = live
    for index in range(4):
        target = found.test.target(index)
        best = figures.best_boxes(found, outputs, index, 0.0)
        assert len(best) <= len(target.labels) and [b[2] for b in best] == sorted((b[2] for b in best), reverse=True)
        for row, label, score, correct in best:
            assert score == outputs.probabilities[index][row, label]
            same = target.boxes[target.labels == label]
            assert correct == (len(same) > 0 and box_iou(outputs.boxes[index][row, None], same).max() >= 0.5)

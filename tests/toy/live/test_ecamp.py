"""What ECAMP's notebook shows: roles of words, trained models, use of the image, tables of the ablations."""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

from companion.evaluation import ablations
from companion.models.ecamp import model as ecamp
from companion.models.ecamp import recipe
from companion.models.ecamp import text as report_text
from companion.ops.papers import paper
from companion.toy.ablations import ecamp as study
from companion.toy.datasets import chests
from companion.toy.encoders import chest_ecamp
from companion.toy.live import ecamp as live
from tests.conftest import parameters
from tests.small import shrink

CLAIMS = [claim for claim in paper("ecamp")["claims"] if claim["kind"] == "synthetic result"]


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    path = tmp_path_factory.mktemp("clinic")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chests, "COUNTS", {"train": 160, "val": 40, "test": 60})
        live.data(parameters("ecamp"), path)
        yield path
    study.part.cache_clear()


@pytest.fixture(scope="module")
def toy(out):
    return live.data(parameters("ecamp"), out)


@pytest.fixture(scope="module")
def model():
    return chest_ecamp.build()


def rows(metric: str = "AUROC 50") -> pd.DataFrame:
    """Two seeds; each method is one point better than the one before it, and ECAMP loses the second seed."""
    table = []
    for i, method in enumerate(study.METHODS):
        for seed in (200, 201):
            row = {"stage": "test", "task": "chests", "method": method, "learning_rate": 0.1, "seed": seed}
            values = dict.fromkeys([*live.METRICS, "AUROC", *live.LOSSES, *live.SHARES, "attention lead"], 50.0 + i)
            if method == "ECAMP":
                values = {name: value - 20 * (seed == 201) for name, value in values.items()}
            if method == "raw pixels":
                values = {name: value if "AUROC" in name else np.nan for name, value in values.items()}
            table.append(row | values)
    chosen = [row | {"stage": "select", "seed": 100} for row in table if row["seed"] == 200]
    return ablations.frame([*table, *(row for row in chosen if row["method"] not in study.UNTRAINED)], metric)


def test_roles_of_words():
    known = ["there", "is", "no", "evidence", "of", "small", "left", "effusion", "nodule"]
    words = report_text.Vocabulary.from_words(known)
    ids = words.encode("there is small left effusion. there is no evidence of nodule.", 14)
    expected = ["other"] * 3 + ["descriptor"] * 2 + ["entity", "other"] + ["boiler-plate"] * 3 + ["descriptor"] * 2
    assert live.roles(ids, words) == [*expected, "entity", "other"]


def test_the_gallery_has_a_column_for_each_finding(toy):
    picked = live.gallery(toy.test, 2)
    assert toy.test.labels[picked].argmax(1).tolist() == [0, 1, 2, 3] * 2 and len(set(picked)) == 8
    assert live.caption("there is a left nodule . there is no effusion .") == (
        "there is a left nodule\nthere is no effusion"
    )


def test_a_batch_is_masked_as_in_training(toy):
    batch = live.batch(toy, [3, 5], 0)
    assert torch.equal(batch.images[:, :1], toy.test.images[[3, 5]]) and batch.noise.shape == (2, 64)
    assert (batch.ids != batch.labels).any(1).all() and (batch.window == 1).all()
    again, other = live.batch(toy, [3, 5], 0), live.batch(toy, [3, 5], 1)
    assert torch.equal(batch.noise, again.noise) and not torch.equal(batch.noise, other.noise)


def test_short_trainings_are_probed(out, toy, monkeypatch, capsys):
    monkeypatch.setattr(live, "STEPS", 12)
    monkeypatch.setattr(study, "PROBES", {50: 1, 200: 1})
    p = parameters("ecamp")
    trained = live.train(p, out, {("chests", method): 1e-3 for method in study.METHODS})
    assert list(trained.models) == list(live.LIVE) and trained.setting.title == "synthetic chests"
    assert list(trained.curves["MIM only"]) == ["total", "mim"]
    assert [len(values) for values in trained.curves["ECAMP"].values()] == [12] * 4
    probed = live.probed(p, toy, trained).set_index("encoder")
    assert list(probed.index) == ["random init", "MIM only", "ECAMP", "pocket_ecamp"]
    assert list(probed.columns) == ["labels: 50", "labels: 200"]
    assert probed.loc["pocket_ecamp", "labels: 200"] > probed.loc["random init", "labels: 200"]
    assert capsys.readouterr().out.count("expected") == 5
    assert live.downstream(p, out).empty
    example = live.example(p, toy, trained)
    first = [toy.test.labels.argmax(1).tolist().index(chests.FINDINGS.index(name)) for name in example.titles]
    assert torch.equal(example.batch.images[:, :1], toy.test.images[first]) and len(first) == 4


def test_tasks_of_the_paper_profile(out, toy, tmp_path, monkeypatch):
    shrink("ecamp", monkeypatch)
    monkeypatch.setattr(study, "PROBES", {200: 1})
    p = parameters("ecamp", profile="paper", dry_run=True, accelerator="cpu")
    trained = live.train(p, tmp_path, {})
    assert list(trained.models) == ["ECAMP"] and len(trained.curves["ECAMP"]["mlm"]) == 2
    example = live.example(p, toy, trained)
    assert example.model is trained.models["ECAMP"] and example.batch.images.shape == (2, 3, 448, 448)
    seen = []

    class Work:
        title, metric, data = "a task", "AUROC", {"test": "test images"}

        def build(self):
            return "model"

        def learn(self, model):
            return [0, 1]

        def score(self, model, part):
            assert (model, part) == ("model", "test images")
            return 75.0

    monkeypatch.setattr(recipe, "downstream", lambda own, folder: seen.append(own) or Work())
    done = live.downstream(SimpleNamespace(**vars(p) | {"devices": 4}), tmp_path)
    assert {own.task: own.dataset for own in seen} == live.DRY_TASKS and {own.devices for own in seen} == {1}
    assert done.values.tolist() == [["a task", 2, "AUROC", 75.0]] * 4
    assert not (tmp_path / "measured.csv").exists(), "a dry run measures nothing"
    p.dry_run, p.task, p.dataset = False, "segment", "xrays/rsna"
    assert len(live.downstream(p, tmp_path)) == 1
    assert recipe.measured(tmp_path / "measured.csv").score.tolist() == [75]
    nothing = live.train(p, tmp_path, {})
    assert nothing.setting is None and not nothing.models and not nothing.curves
    assert len(live.example(p, toy, nothing).titles) == 4
    assert list(live.probed(p, toy, nothing).encoder) == ["random init", "pocket_ecamp"]


def test_shown_chests_have_the_positions_of_their_words(toy):
    shown = live.shown(toy)
    pieces = [[toy.words.pieces[i] for i in ids] for ids in shown.ids.tolist()]
    for k, words in enumerate(pieces):
        assert words[shown.finding[k]] == chests.FINDINGS[k] and words[shown.side[k]] in chests.SIDES
        absent = words[shown.absent[k]]
        assert (
            absent in chests.FINDINGS
            and absent != chests.FINDINGS[k]
            and f"no {absent}" in " ".join(words).replace("evidence of ", "")
        )
    masked = (shown.ids != shown.hidden).nonzero()[:, 1].unflatten(0, (4, 2))
    assert torch.equal(masked, torch.stack([shown.side, shown.finding], 1))


def test_probabilities_follow_the_image(toy, model):
    shown = live.shown(toy)
    found = live.probabilities(model, shown, toy.words)
    assert found["own"].shape == (4, 6)
    assert found["own"][:, 2:].argmax(1).tolist() == [0, 1, 2, 3]
    assert found["another"][:, 2:].argmax(1).tolist() == [1, 2, 3, 0], "the finding of the next chest"
    sums = torch.stack([found["own"][:, :2].sum(1), found["own"][:, 2:].sum(1)])
    assert (sums > 0.9).all() and (sums <= 1.0001).all()


def test_the_right_image_lowers_the_loss(toy, model, capsys):
    table = live.right_or_wrong(model, toy).set_index("masked word")
    losses = study.word_losses(model, toy.test, toy.words)
    assert table.loc["side", "right image"] == pytest.approx(float(losses["side, right"].mean()))
    assert table.loc["finding", "another image"] == pytest.approx(float(losses["finding, other"].mean()))
    assert table["chance level"].tolist() == pytest.approx([np.log(2), np.log(4)])
    assert capsys.readouterr().out.count(": as expected") == 2
    live.right_or_wrong(study.build("random init", 0, chest_ecamp.WORDS), toy)
    assert "NOT as expected" in capsys.readouterr().out


def test_released_attention_is_scrambled(toy, model):
    shown = live.shown(toy)
    maps, apart = live.attention_maps(model, shown, 0)
    assert apart < 1e-5 and [found.shape for found in maps.values()] == [(4, 8, 8)] * 4
    masked, visible, ours, released = maps.values()
    torch.testing.assert_close(masked.sum((1, 2)), torch.ones(4))
    torch.testing.assert_close(visible.sum((1, 2)), torch.ones(4))
    assert not torch.allclose(ours, released, atol=0.1)
    torch.testing.assert_close(ours.flatten(1).sort().values, released.flatten(1).sort().values, atol=1e-4, rtol=0)
    for chest, word, hide, expected in ((0, "finding", True, masked), (2, "finding", False, visible)):
        torch.testing.assert_close(live.word_map(model, shown, chest, word, hide), expected[chest], atol=1e-5, rtol=0)
    side = live.word_map(model, shown, 0, "side", True)
    assert not torch.allclose(side, masked[0], atol=1e-3) and side.sum() == pytest.approx(1, abs=1e-4)


def test_attention_shares_are_those_of_the_ablations(toy, model, capsys):
    table = live.attention_shares(model, toy)
    expected = study.lesion_share(model, toy.test, toy.words)
    counts = toy.test.labels.sum(0).numpy()
    for column, name in zip(
        table.columns[1:], ("box area", "attention in box, hidden", "attention in box"), strict=True
    ):
        assert np.average(table[column], weights=counts) == pytest.approx(expected[name], abs=1e-3)
    assert "as expected (at least 2)" in capsys.readouterr().out


def test_loss_by_kind_of_word(toy):
    batch = live.batch(toy, range(4), 0)
    table = live.loss_by_kind(batch, torch.where(batch.ids != batch.labels, 2.0, 0.5)).set_index("words")
    assert table.iloc[:, [0, 2]].sum().tolist() == pytest.approx([100, 100], rel=1e-5)
    assert table["mean cross-entropy"].tolist() == pytest.approx([2, 0.5, 0.5])
    assert table.loc["padding", "of all positions (%)"] == pytest.approx(
        100 * float((batch.labels == toy.words.pad).float().mean()), rel=1e-5
    )


def test_tables_of_the_ablations():
    frame = rows()
    table = live.study_table(frame).set_index("method")
    assert list(table.index) == list(study.METHODS) and table.loc["raw pixels", "Dice"] == "–"
    assert table.loc["ECAMP", "AUROC 50"] == "44.0 ± 14.1" and table.loc["random init", "learning rate"] == "–"
    words = live.study_table(frame, live.LOSSES, ["raw pixels", "ECAMP", "MRM-like"])
    assert words.method.tolist() == ["ECAMP", "MRM-like"], "methods without words have no row"


@pytest.mark.parametrize("metric", ["AUROC 50", "AUROC"])
def test_leads_and_reasons(metric):
    frame = rows(metric)
    leads = live.leads(frame, CLAIMS)
    assert set(leads.claim) == {claim["id"] for claim in CLAIMS}
    first = leads[leads.claim == "over-mim"]
    assert first.metric.tolist() == ["AUROC 50", "AUROC 200"]
    assert first[["seed 200", "seed 201"]].values.tolist() == [[2, -18]] * 2
    attention = leads[leads.claim == "attention"].iloc[0]
    assert attention.worse == "0" and [attention["seed 200"], attention["seed 201"]] == [54, 34]
    assert leads[leads.claim == "distillation"].metric.tolist() == [metric]
    reasons = live.reasons(frame, 84.4)
    assert set(reasons) <= {claim["id"] for claim in CLAIMS}
    assert reasons["super-resolution"].startswith("84 % ") and reasons["super-resolution"].count("0 of 2 seeds") == 2
    assert "34.0 to 54.0 % with, 57.0 to 57.0 % without" in reasons["distillation"]
    over = live.over_untrained(frame)
    assert "1 of 2 with 50 labels, 1 of 2 with 200 labels, 1 of 2 with 1,500 labels" in over and over.endswith("1 of 2")


def test_released_heat_is_that_of_the_model(toy, model):
    shown = live.shown(toy)
    maps, _ = live.attention_maps(model, shown, 0)
    low = ecamp.shrink(study.colours(shown.images[:1]))
    whole = model.attention(low, shown.ids[:1], shown.attention[:1])[0, :, shown.finding[0]]
    strongest = whole.amax(0) ** 0.25
    scaled = (strongest - strongest.min()) / (strongest.max() - strongest.min())
    torch.testing.assert_close(maps["visible, released recipe"][0].flatten(), scaled, atol=1e-4, rtol=0)

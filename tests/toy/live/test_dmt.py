"""What DMT's notebook shows: the live training, tables of the ablations, students compared with teachers."""

from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch

from companion.errors import MissingWeights
from companion.evaluation import ablations
from companion.models import dmt
from companion.models.dmt import recipe, vit
from companion.toy import encoders
from companion.toy.ablations import dmt as study
from companion.toy.datasets import collage
from companion.toy.encoders import photo_student
from companion.toy.encoders import teachers as taught
from companion.toy.live import dmt as live
from tests.conftest import parameters

RATES = {(study.TASK, method): 1e-2 for method in live.METHODS}


@pytest.fixture(autouse=True)
def _closed():
    yield
    plt.close("all")


@pytest.fixture
def rows() -> pd.DataFrame:
    """Two seeds. The pair without MAE leads DMT by 2 points on the first; teachers are at 40, 50 and 60 %."""
    found = []
    for i, method in enumerate(study.METHODS):
        for seed in (200, 201):
            value = {"DMT": 50.0, live.PAIR: 52.0 if seed == 200 else 49.0, "untrained": 20.0}.get(method, 30.0 + i)
            if method in study.THEMSELVES:
                value = 40.0 + 10 * list(study.THEMSELVES).index(method)
            measures = {name: value for name in (*collage.FACTORS, "mean")}
            measures |= {f"{name} all": value + 10 for name in measures}
            row = {"task": study.TASK, "method": method, "learning_rate": 0.01, "own-probe lead": 1.0}
            found += [row | {"stage": "test", "seed": seed} | measures, row | {"stage": "select", "seed": 9} | measures]
    return ablations.frame(found, "mean")


def few(count: int = 120) -> dict[str, collage.Part]:
    return {split: taught.collages(count, split, 5) for split in ("train", "test")}


def test_the_live_training_is_that_of_the_ablations(tmp_path, monkeypatch):
    monkeypatch.setattr(study.pocket, "COUNTS", {"train": 128, "val": 16, "test": 16}, raising=False)
    monkeypatch.setattr(live, "STEPS", 2)
    found = live.setting(parameters("dmt", seed=3), tmp_path, RATES)
    assert set(found.learning_rates) == set(live.METHODS) and found.trained is None
    model = found.build("iBOT only")
    history = found.learn(model, "iBOT only")
    student, _, expected = study.train_model("iBOT only", 1e-2, 3, str(tmp_path / "data"), steps=2)
    assert [row["loss"] for row in history] == [row["loss"] for row in expected]
    assert all(torch.equal(a, b) for a, b in zip(model.student.parameters(), student.parameters(), strict=True))


def test_only_distillation_has_a_student_to_train_live(tmp_path):
    """A downstream task of the `paper` profile trains no student; distillation takes the recipe's setting."""
    p = parameters("dmt", profile="paper", dry_run=True, task="segment")
    assert live.setting(p, tmp_path, {}).learning_rates == {}
    assert not len(live.downstream_tasks(parameters("dmt"), tmp_path))
    assert not len(live.downstream_tasks(parameters("dmt", profile="paper", task="distil"), tmp_path))


def test_scores_of_a_downstream_task_are_kept_unless_it_is_a_dry_run(tmp_path, monkeypatch):
    asked = []

    def downstream(p, out):
        asked.append(p.task)
        return SimpleNamespace(
            title=f"{p.task}, made up", build=list, learn=lambda model: [{}] * 3, score=lambda model: {"miou": 41.5}
        )

    monkeypatch.setattr(recipe, "downstream", downstream)
    dry = live.downstream_tasks(parameters("dmt", profile="paper", dry_run=True), tmp_path)
    assert asked == [task for task in recipe.USUAL if task != "distil"] and not (tmp_path / "measured.csv").exists()
    assert dry.steps.tolist() == [3] * 4
    found = live.downstream_tasks(parameters("dmt", profile="paper", task="segment"), tmp_path)
    assert asked[4:] == ["segment"] and found.test.tolist() == [41.5]
    measured = recipe.measured(tmp_path / "measured.csv")
    assert measured.task.tolist() == ["segment"] and measured.score.tolist() == [41.5]


def test_examples_are_of_different_textures():
    part = few()["test"]
    shown, titles = live.examples(part)
    assert part.factors[shown, 0].tolist() == list(range(8))
    texture, shape, _, quadrant = part.factors[shown[3]].tolist()
    assert titles[3] == f"{collage.TEXTURES[texture]}, {collage.SHAPES[shape]}, {collage.QUADRANTS[quadrant]}"


def test_the_tables_of_the_ablations(rows):
    table = live.study_table(rows).set_index("method")
    assert table.index[0] == "DMT" and table.loc["DMT", "mean"] == "50.0 ± 0.0"
    assert table.loc[live.PAIR, "lead of DMT, mean"] == "-0.5 ± 2.1" and table.loc[live.PAIR, "seeds won"] == "1 of 2"
    assert table.loc["DMT", "mean all"] == "60.0 ± 0.0"
    assert [len(live.of_teachers(n)) for n in (1, 2, 3)] == [3, 3, 1] and live.of_teachers(3) == ["DMT"]
    known = live.knows(rows, "DMT", all_labels=True)
    assert known.loc["hue"].tolist() == [60, 0, 30, 70]
    assert live.knows(rows, live.PAIR, all_labels=False).loc["hue", ["mean", "best teacher"]].tolist() == [50.5, 60]
    (ax,) = live.bars(rows, ["DMT", "untrained", "not run"]).axes
    assert [bar.get_width() for bars in ax.containers for bar in getattr(bars, "patches", ())] == [50, 60, 20, 30]


def test_reasons_quote_the_rows(rows):
    why = live.reasons(rows)
    assert set(why) <= {claim["id"] for claim in recipe.paper("dmt")["claims"]}
    assert "With all labels three teachers lead by -2.0 to +1.0 points" in why["beats-moco-ibot"]
    assert "with 10 labels 50.0 % with MAE, 50.5 % without" in why["beats-moco-ibot"]
    assert (
        f"with all labels the lead is {50 - rows[rows.method == 'token loss only']['mean'].iloc[0]:+.1f}"
        in why["both-token"]
    )


def test_probes_say_when_a_teacher_is_not_as_expected(capsys):
    known = live.teachers_known(few(400))
    assert list(known) == [*taught.TEACHERS, "untrained"] and known["MoCo v3"].keys() == {*collage.FACTORS, "mean"}
    assert "MoCo v3 on texture" in capsys.readouterr().out


def test_cka_is_one_for_rotated_features_and_compares_all_blocks():
    torch.manual_seed(0)
    a = torch.randn(50, 6)
    assert live.cka(a, 3 * a @ torch.linalg.qr(torch.randn(6, 6))[0] + 1) == pytest.approx(1, abs=1e-5)
    assert live.cka(a, torch.randn(50, 6)) < 0.4
    teachers, images = taught.load(), few(40)["test"].images
    grids = live.cka_grids(teachers, {"itself": teachers["MAE"], "student": study.student(0)}, images)
    assert grids["itself"].shape == (9, 3) and grids["student"].shape == (9, 2)
    np.testing.assert_allclose(np.diag(grids["itself"][:3]), 1, atol=1e-5)


@pytest.mark.slow
def test_downstream_tasks_at_toy_scale(capsys):
    students, parts = {name: study.student(0) for name in ("DMT", "untrained")}, few(480)
    tuned = live.fine_tuned(students, parts, 0)
    assert tuned.encoder.tolist() == ["DMT", "untrained"] and tuned.steps.tolist() == [80, 80]
    table, shown = live.segmented(students, 0)
    assert (table["last loss"] < table["first loss"]).all() and len(shown["images"]) == len(shown["predicted"]) == 6
    history = live.detected(students["DMT"], 0)
    assert len(history) == 15 and history[-1]["loss"] < history[0]["loss"]
    assert "Mask R-CNN" in capsys.readouterr().out


def test_photographs_compare_the_shipped_student_with_an_untrained_one(monkeypatch, capsys):
    torch.manual_seed(0)
    tokens = {name: torch.randn(4, 256, width) for name, width in (("ViT-S/14", 9), ("EfficientNet-Lite0", 7))}
    students = {"student": tokens["ViT-S/14"] * 2, "untrained": torch.randn(4, 256, 5)}
    quality = encoders.read_card(photo_student.NAME)["quality"]
    looks = {"student": torch.rand(4, 16, 16)}
    photos = live.Photographs(torch.rand(4, 3, 256, 256), tokens | students, looks, quality)
    table = photos.table().set_index(["teacher", "student"])
    assert table.loc[("ViT-S/14", "student"), "agreement"] == "1.00 ± 0.00"
    assert len(table) == 4 and abs(float(table.loc[("ViT-S/14", "untrained"), "agreement"].split()[0])) < 0.1
    assert len(photos.components().axes) == 4 * 5 and len(photos.by_position().axes) == 4 * 3 + 1
    assert len(photos.looks().axes) == 4 * 2 + 1

    def missing():
        raise MissingWeights("vit", "somewhere", ["install the extra `real`"])

    monkeypatch.setattr(photo_student, "teachers", missing)
    assert live.on_photographs(parameters("dmt"), {}) is None and "left out" in capsys.readouterr().out


def test_at_the_paper_profile_the_photographs_compare_teachers_and_student_of_the_run(monkeypatch, capsys):
    torch.manual_seed(0)
    p = parameters("dmt", profile="paper", teachers="MAE, DINO")
    assert live.on_photographs(p, {}) is None and "no student" in capsys.readouterr().out
    options = {"image": 224, "patch": 16, "depth": 2, "heads": 2}
    known = {name: vit.build("pocket", width=24, **options).eval() for name in ("MAE", "DINO")}
    untrained = vit.build("pocket", width=16, **options)
    monkeypatch.setattr(vit, "build", lambda size: untrained)
    student = known["DINO"]  # it agrees with itself as teacher
    photos = live.on_photographs(p, {"DMT": dmt.DMT(student, dmt.Teachers(known), decoder="pocket")})
    assert list(photos.tokens) == ["MAE", "DINO", "student", "untrained"] == list(photos.attention)
    assert photos.grid == (14, 14) and "MAE, DINO" in capsys.readouterr().out
    agreed = {pair: float(values.mean()) for pair, values in photos.agreement.items()}
    assert agreed["student", "DINO"] > 0.95 > 0.9 > agreed["student", "MAE"]  # all have the same position embedding
    assert list(photos.table()) == ["teacher", "student", "agreement"]
    monkeypatch.setattr(recipe, "teachers", lambda p: dmt.Teachers(known))  # where the model has only cached tokens
    cached = live.on_photographs(p, {"DMT": dmt.DMT(student, [24, 24], decoder="pocket")})
    assert torch.equal(cached.tokens["MAE"], photos.tokens["MAE"])
    for found in photos.attention.values():
        assert found.shape == (4, 14, 14)
    assert len(photos.components().axes) == 4 * 5 and len(photos.by_position().axes) == 4 * 3 + 1

"""Parameters are converted by their rules in paper.yaml, and the rules match the code."""

from importlib import import_module
from pathlib import Path

import pandas as pd
import pytest

from companion import climate
from companion.data import DATASETS
from companion.errors import BadParameter
from companion.evaluation import ablations
from companion.evaluation.tables import findings_table
from companion.ops.papers import FINDINGS, accepted, convert, findings, paper, rules, slugs
from companion.ops.report import start
from tests.conftest import ROOT


@pytest.mark.parametrize(
    ("rule", "value", "expected"),
    [
        ({"type": "switch"}, "false", False),
        ({"type": "switch"}, "True", True),
        ({"type": "switch"}, 1, True),
        ({"type": "integer", "low": 0}, "12", 12),
        ({"type": "integer", "low": 1, "high": 9}, 1, 1),
        ({"type": "integer", "low": 1, "high": 9}, "9", 9),
        ({"type": "number", "low": 0}, "1e-4", 1e-4),
        ({"type": "choice", "choices": ["a", "b"]}, "a", "a"),
        ({"type": "choice", "choices": ["2023", "2025"]}, 2025, "2025"),
        ({"type": "choice", "choices": [1024, 2048]}, "2048", 2048),
        ({"type": "integer", "low": 1, "zero": True}, 0, 0),
        ({"type": "text"}, " x ", "x"),
        ({"type": "text", "examples": ["a"]}, "b", "b"),
        ({"type": "list", "choices": ["a", "b"]}, "b,a ", "b, a"),
        ({"type": "list", "choices": ["a", "b"]}, "", ""),
    ],
)
def test_parameters_are_converted(rule, value, expected):
    assert convert("name", value, rule) == expected


@pytest.mark.parametrize(
    ("rule", "value", "message"),
    [
        ({"type": "switch"}, "maybe", "True, False"),
        ({"type": "integer", "low": 0, "high": 9}, "1.5", "a whole number from 0 to 9"),
        ({"type": "integer", "low": 0, "high": 9}, 10, "from 0 to 9"),
        ({"type": "integer", "low": 0}, True, "a whole number"),
        ({"type": "number", "low": 0}, "nan", "a number"),
        ({"type": "choice", "choices": ["a", "b"]}, "c", "'a', 'b'"),
        ({"type": "text"}, 3, "text"),
        ({"type": "list", "choices": ["a", "b"]}, "a, c", "name = 'c' is not accepted. Accepted: 'a', 'b'"),
        ({"type": "choice", "choices": [*"abcdefgh", "i/svhn", "svh"]}, "svhn", "Accepted: 'i/svhn', 'svh', 'a'"),
    ],
)
def test_a_bad_parameter_says_what_is_accepted(rule, value, message):
    with pytest.raises(BadParameter, match=message) as caught:
        convert("name", value, rule)
    assert caught.value.name == "name"


def sets(task):
    """The names of a task's real data sets, in the order of the register."""
    return [name for name, found in DATASETS.items() if found.task == task and found.group != "pocket"]


def of(slug, module, name):
    return [*getattr(import_module(f"companion.models.{slug}.{module}"), name)]


TASKS = {"dplq": "domains", "ecamp": "xrays", "hvit": "slides", "metasegnet": "landcover", "promptpar": "attributes"}
TASKS |= {"sa2vp": "classification", "tip": "restoration"}
IN_CODE = {
    **{(slug, "dataset"): [*sets(task), "folder"] for slug, task in TASKS.items()},
    ("bat", "dataset"): sets("tracking"),
    ("bat", "method"): of("bat", "recipe", "METHODS"),
    ("dmt", "dataset"): ["", *sets("pretraining"), "folder"],
    ("dmt", "teachers"): of("dmt", "teachers", "RELEASED"),
    ("dmt", "losses"): of("dmt", "recipe", "LOSSES"),
    ("dmt", "task"): of("dmt", "recipe", "USUAL"),
    ("dmt", "teacher_view"): of("dmt", "model", "VIEWS"),
    ("dmt", "fusion"): of("dmt", "model", "FUSIONS"),
    ("dplq", "targets"): sets("domains"),
    ("dplq", "protocol"): ["base to novel", *of("dplq", "recipe", "TRANSFERS")],
    ("hvit", "method"): of("hvit", "recipe", "METHODS"),
    ("hvit", "head"): of("hvit", "model", "HEADS"),
    ("hvit", "position"): [kind for kind in of("hvit", "model", "POSITIONS") if not kind.startswith("2d")],
    ("metasegnet", "method"): of("metasegnet", "recipe", "LEVELS"),
    ("metasegnet", "prompt"): climate.LEVELS,
    ("metasegnet", "held_out"): ["", *climate.Prompts.read().zones],
    ("metasegnet", "augmentation"): of("metasegnet", "model", "AUGMENTATIONS"),
    ("promptpar", "method"): of("promptpar", "recipe", "METHODS"),
    ("sic_cads", "dataset"): sets("detection"),
    ("tip", "method"): of("tip", "recipe", "METHODS"),
}


@pytest.mark.parametrize(("slug", "name"), IN_CODE)
def test_accepted_values_are_those_of_the_code(slug, name):
    assert sorted(paper(slug)["parameters"][name]["choices"]) == sorted(IN_CODE[slug, name])


@pytest.mark.parametrize("slug", slugs())
def test_an_unknown_data_set_is_refused_with_the_accepted_ones(slug):
    rule = rules(slug)["dataset"]
    assert rule["type"] == "choice" and accepted(rule)
    for wrong in ("nowhere", "pocket/where"):
        with pytest.raises(BadParameter, match=f"dataset = '{wrong}' is not accepted. Accepted: '") as caught:
            start(slug, profile="paper", dataset=wrong)
        assert caught.value.accepted == rule["choices"]


def test_the_readme_counts_the_findings():
    found = [row["kind"] for slug in slugs() for row in findings(slug)]
    text = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    assert f"turned up {len(found)} findings: {found.count('fault')} faults" in text
    assert f"{found.count('surprise')} surprises, and {found.count('recipe')} settings" in text


@pytest.mark.parametrize("slug", slugs())
def test_findings_are_whole_and_name_recorded_cases(slug):
    found = findings(slug)
    recorded = {path.name for root in ("parity", "recipes") for path in (ROOT / "tests" / root / slug).glob("*/")}
    assert len(found) >= 5
    for row in found:
        assert row.keys() == {"topic", "kind", "paper", "code", "here", "where", "effect", "case"}, row
        assert row["kind"] in FINDINGS and row["topic"] and row["code"] and row["here"], row
        assert isinstance(row["where"], list) and (not row["case"] or row["case"] in recorded), row
    assert len({row["topic"] for row in found}) == len(found)
    assert len(findings_table(slug)) == len(found)


def leads(folder: Path, task: str, metric: str, better: str, worse: str) -> pd.Series:
    """The lead of a method over another in a committed study, one value a seed."""
    rows = ablations.read(folder)
    tested = rows[(rows.stage == "test") & (rows.task == task)].set_index(["method", "seed"])[metric]
    return tested[better] - tested[worse]


def findings_shown(slug, claim):
    """The text of the finding on the first screen that belongs to a claim."""
    return next(found["text"] for found in paper(slug)["findings"] if found.get("claim") == claim)


def test_findings_that_are_no_claims_are_true_of_the_studies(root):
    pocket, real = root / "reports" / "pocket", root / "reports" / "real"
    lost = leads(pocket / "bat", "videos", "SR", "BAT", "BAT, from zeros")
    assert f"SR is {lost.mean():.1f} ± {lost.std():.1f} points lower" in findings("bat")[0]["effect"]
    behind = (leads(pocket / "metasegnet", "left out", "mIoU", "MiniLM text", "MetaSegNet") < 0).sum()
    words = ("none", "one", "two", "three", "four", "five")
    assert any(f"in {words[behind]} of five zones" in found["text"] for found in paper("metasegnet")["findings"])
    assert any("is behind that of the EfficientNet alone" in found["text"] for found in paper("dmt")["findings"])
    assert "beats BAT with every seed" in findings_shown("bat", "over-full")
    assert (leads(pocket / "bat", "videos", "SR", "full fine-tuning", "BAT") > 0).all()
    assert "without them lesions are segmented better with every seed" in findings_shown("ecamp", "distillation")
    assert (leads(pocket / "ecamp", "chests", "Dice", "ECAMP, no distillation", "ECAMP") > 0).all()
    assert "neither reaches the PSNR of the degraded image" in findings_shown("tip", "restoration")
    mild = ablations.read(pocket / "tip").query("stage == 'test' and task == 'mild'")
    assert (mild["PSNR"] < mild["PSNR input"])[mild.method.isin(["TIP", "blind prompt"])].all()
    for task in ("CIFAR-10, 1,000 images", "RSSCN7, 350 images"):
        assert (leads(real / "dmt", task, "accuracy", "DMT", "EfficientNet-Lite0 only") < 0).all()

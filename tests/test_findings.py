"""Findings and recorded cases cite lines that exist: `tools/findings.py`, on repositories of a few lines."""

from __future__ import annotations

import subprocess

import pytest

from companion.io.papers import slugs
from tools import findings


@pytest.fixture
def cited(tmp_path, monkeypatch):
    """A repository with one file of three lines, and a function that runs the check of what one finding cites."""
    work, bare = tmp_path / "work", tmp_path / "repos" / "them+code" / "repo"
    (work / "src").mkdir(parents=True)
    (work / "src" / "train.py").write_text("import torch\nlr = 0.05\nseed = 1\n")
    git = ("git", "-c", "user.name=a", "-c", "user.email=a@b", "-C")
    for words in (("init", "-q"), ("add", "."), ("commit", "-qm", "one")):
        subprocess.run([*git, work, *words], check=True)
    (work / "src" / "train.py").write_text("moved\n")  # what is not at the commit does not count
    subprocess.run(["git", "clone", "-q", "--bare", work, bare], check=True)
    commit = subprocess.run([*git, work, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout
    facts = {"code": {"repositories": {"them/code": commit.strip()[:7]}}}
    monkeypatch.setattr(findings, "paper", lambda slug: facts)
    monkeypatch.setattr(findings, "CASES", tmp_path / "cases")

    def check(where, repos=tmp_path / "repos"):
        monkeypatch.setattr(findings, "findings", lambda slug: [{"topic": "rate", "where": where}])
        return findings.main(["--repos", str(repos), "bat"])

    return check


def test_places_that_hold_their_token_pass(cited, capsys):
    assert cited({"src/train.py:2": "0.05", "src/train.py:1-3": "seed", "them/code:src/train.py": "", "src/": ""}) == 0
    assert "bat: 4 of 4 places are right" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("place", "token", "said"),
    [
        ("src/train.py:3", "0.05", "no 0.05 at src/train.py:3-3"),
        ("src/train.py:2-9", "lr", "src/train.py has 3 lines"),
        ("src/test.py:1", "lr", "no src/test.py at"),
        ("src/gone/", "", "no src/gone/ at"),
    ],
)
def test_places_that_hold_something_else_are_named(place, token, said, cited, capsys):
    wrong = cited({place: token, "src/train.py:1": "torch"})
    out = capsys.readouterr().out
    assert wrong == 1 and said in out and f"bat: {2 - wrong} of 2 places are right" in out


@pytest.mark.parametrize(
    "where",
    [
        *(
            {"a:b:c": "x"},
            {"x.py:1": ""},
            {"x.py:1": "a = 1"},
            {"x.py:1": 0.05},
            {"x.py": "a"},
            {"our/code:x.py:1": "a"},
        ),
        ["x.py:1"],
    ],
)
def test_a_place_or_token_of_another_form_is_refused(where, cited, capsys):
    assert cited(where) == 1 and "bat: rate: " in capsys.readouterr().out


def test_a_repository_that_is_not_there_is_named(cited, tmp_path, capsys):
    assert cited({"src/train.py:2": "0.05"}, tmp_path) == 1
    out = capsys.readouterr().out
    assert "0 of 1" in out and f"git clone --bare https://github.com/them/code {tmp_path}/them+code/repo" in out


@pytest.mark.parametrize("slug", slugs())
def test_every_place_that_a_paper_cites_has_its_form(slug):
    assert list(findings.places(slug))

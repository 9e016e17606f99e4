"""The command line that all makers of pocket weights share."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from companion.toy.encoders import card


@pytest.fixture
def threads():
    """The command sets the number of threads of its process, which here is pytest's."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def run(monkeypatch, words: list[str], *arguments, **options) -> list[tuple]:
    """Call the command with `words`; what the maker was called with."""
    calls = []

    def make(*given, **named):
        calls.append((given, named))
        path = Path(named["folder"]) / "weights.safetensors"
        path.with_suffix(".md").write_text("its card", encoding="utf-8")
        return path

    monkeypatch.setattr(sys, "argv", ["maker.py", *words])
    card.command(make, *arguments, **options)
    return calls


def test_a_maker_gets_name_folder_and_seed_and_its_card_is_printed(monkeypatch, tmp_path, capsys, threads):
    words = ["second", "--folder", str(tmp_path), "--seed", "5"]
    assert run(monkeypatch, words, ["first", "second"]) == [(("second",), {"folder": tmp_path, "seed": 5})]
    assert capsys.readouterr().out == "its card\n"
    assert torch.get_num_threads() == 1


def test_a_maker_of_one_model_has_no_name_and_one_without_a_seed_no_seed(monkeypatch, tmp_path, threads):
    assert run(monkeypatch, ["--folder", str(tmp_path)], seed=None) == [((), {"folder": tmp_path})]


def test_shipped_weights_are_measured_and_not_made(monkeypatch, tmp_path, capsys, threads):
    (tmp_path / "first.md").write_text("measured", encoding="utf-8")
    words = ["first", "--measure"]
    assert run(monkeypatch, words, ["first"], measure=lambda name: tmp_path / f"{name}.safetensors") == []
    assert capsys.readouterr().out == "measured\n"


@pytest.mark.parametrize("words", [["third"], [], ["first", "--seeds", "1"]])
def test_a_wrong_word_is_refused_with_what_is_accepted(monkeypatch, words, capsys):
    with pytest.raises(SystemExit):
        run(monkeypatch, words, ["first", "second"])
    assert "usage: python -m companion.toy.maker" in capsys.readouterr().err

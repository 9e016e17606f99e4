"""Model cards of the shipped encoders, how they are written, and the command line of all encoders."""

import hashlib
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from companion.errors import CorruptFile, MissingWeights
from companion.toy import encoders
from companion.toy.encoders import card

SHIPPED = sorted(path.stem for path in encoders.WEIGHTS.glob("*.safetensors"))


@pytest.mark.parametrize("name", SHIPPED)
def test_the_card_of_shipped_weights_describes_them(name):
    head, path = encoders.read_card(name), encoders.WEIGHTS / f"{name}.safetensors"
    assert encoders.weights_file(name) == path and head["bytes"] == path.stat().st_size < 2_500_000
    assert head["license"] == "mit" and head["quality"] and head["recipe"]
    assert head["parameters"] <= sum(tensor.numel() for tensor in load_file(path).values())
    module = head["command"].removeprefix("python -m companion.toy.encoders.").split()[0]
    assert (Path(encoders.__file__).parent / f"{module}.py").is_file()


def test_saved_weights_have_a_card_and_a_damaged_file_is_refused(tmp_path, monkeypatch):
    before, prose = encoders.read_card("pocket_vit"), (encoders.WEIGHTS / "pocket_vit.md").read_text().split("---\n")[2]
    path = card.save(tmp_path, "pocket_vit", {"a": torch.ones(2, 3).T}, {"x": 1}, {"steps": 2}, 3.4, tasks=7)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["pocket_vit.md", "pocket_vit.safetensors"]
    monkeypatch.setattr(encoders, "WEIGHTS", tmp_path)
    head = encoders.read_card("pocket_vit")
    assert path.with_suffix(".md").read_text().endswith(f"---\n{prose}") and list(head) == list(before)
    own = {"recipe": {"steps": 2}, "seconds": 3, "parameters": 6, "quality": {"x": 1}, "tasks": 7}
    own |= {"bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    assert {key: head[key] for key in own} == own and head["data"] == before["data"]
    assert encoders.weights_file("pocket_vit") == path
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CorruptFile):
        encoders.weights_file("pocket_vit")
    path.unlink()
    with pytest.raises(MissingWeights):
        encoders.weights_file("pocket_vit")


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
    assert capsys.readouterr().out == "its card\n" and torch.get_num_threads() == 1
    # a maker of one model has no name, and one without a seed no seed
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
    assert "usage: python -m companion.toy.encoders.maker" in capsys.readouterr().err

"""The texts of the climate zones."""

import yaml

from companion.data.climate import codes
from companion.errors import CorruptFile
from companion.models.metasegnet.prompts import PROMPTS, Prompts, headless
from companion.models.metasegnet.text import split
from tests.models.common import refuses


def test_every_zone_has_a_text_of_its_own_that_bert_can_hold():
    prompts = Prompts.read()
    assert sorted(prompts.zones) == codes()
    full = {prompts.text(code) for code in prompts.zones}
    assert len(full) == len(prompts.zones) and max(len(split(text)) for text in full) <= 64  # half of 128 word pieces


def test_levels_of_the_texts():
    prompts = Prompts.read()
    assert prompts.text("Cfa", "code") == "Cfa"
    assert prompts.text("Cfa", "name") == "climate zone Cfa, humid subtropical"
    assert prompts.text("Cfa").startswith("climate zone Cfa, humid subtropical. ")
    assert prompts.text("Cfa", "constant") == prompts.text("Aw", "constant") and prompts.text("Aw", "empty") == ""
    assert prompts.text(None) == prompts.text(None, "name") == prompts.unknown
    zones = ["Cfa", "Aw", None, "BWh", "Cfa"]
    right = [prompts.text(z) for z in zones]
    for seed in range(5):
        wrong = prompts.texts(prompts.exchanged(zones, "wrong", seed))
        assert wrong[0] == wrong[4] and wrong[2] == prompts.unknown and set(wrong) == set(right)
        assert all(w != r for i, (w, r) in enumerate(zip(wrong, right, strict=True)) if i != 2)
        shuffled = prompts.texts(prompts.exchanged(zones, "shuffled", seed))
        assert sorted(shuffled) == sorted(right) and shuffled[2] == prompts.unknown
    single = Prompts({"Cfa": prompts.zones["Cfa"]}, "constant", "unknown")
    refuses(
        (lambda: prompts.texts(["Cfa"], "poem"), "level = 'poem'"),
        (lambda: prompts.exchanged(zones, "mixed"), "kind = 'mixed'"),
        (lambda: single.exchanged(["Cfa", None], "wrong"), "Cfa"),
    )
    # the only zone gets the text of one that is not there
    alone = prompts.texts(prompts.exchanged(["Cfa", None, "Cfa"], "wrong"))
    assert alone[0] == alone[2] != right[0] and alone[0] in map(prompts.text, prompts.zones) and alone[1] == right[2]


def test_a_file_of_ones_own_is_read_and_a_broken_one_refused(tmp_path):
    raw = yaml.safe_load(PROMPTS.read_text(encoding="utf-8"))
    raw["zones"] = {"Cfb": {"name": "here", "text": "roofs are red."}}
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump(raw))
    prompts = Prompts.read(file)
    assert prompts.text("Cfb") == "climate zone Cfb, here. roofs are red."
    refuses((lambda: prompts.text("Af"), "zone = 'Af'.*'Cfb'"))
    for content, entry in (
        ("zones: {Cfb: {name: here}}\nconstant: a\nunknown: b", "text"),
        ("zones: {}\nconstant: a\nunknown: b", ""),
        ("zones: {Cfb: {name: here, text: 3}}\nconstant: a\nunknown: b", "text"),
    ):
        file.write_text(content)
        refuses((lambda: Prompts.read(file), rf"mine\.yaml.*{entry}"), error=CorruptFile)


def test_a_text_without_its_header_keeps_its_description():
    prompts = Prompts.read()
    text = prompts.text("Cfa")
    assert headless(text) == "climate zone unknown, unknown unknown." + text.partition(".")[2]
    assert headless(prompts.text("Dfb", "name"), "[UNK]") == "climate zone [UNK], [UNK] [UNK] [UNK] [UNK] [UNK]"
    assert [headless(t) for t in (prompts.constant, prompts.unknown, "")] == [prompts.constant, prompts.unknown, ""]

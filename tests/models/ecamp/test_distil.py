"""Distillation: the rules' statements, refused answers with reasons, the cache, a model of transformers."""

import importlib.util
import sqlite3

import pytest

from companion.data import openi
from companion.errors import CorruptFile, MissingWeights
from companion.models.ecamp import distil as ecamp_distil
from companion.models.ecamp.distil import Generator, Malformed, Rules, check, distil, entities_in
from tests.conftest import interrupted
from tests.models.common import refuses

REPORT = (
    "There is a small right pleural effusion. No evidence of pneumothorax. "
    "Patchy opacities at the left base may represent pneumonia."
)


class Scripted:
    """A back end that gives prepared answers and counts the questions."""

    name = "scripted"

    def __init__(self, *answers):
        self.answers, self.asked = answers, 0

    def __call__(self, report, entities, attempt):
        self.asked += 1
        return self.answers[min(attempt, len(self.answers) - 1)]


def test_entities_are_found_in_order_plurals_too():
    assert entities_in(REPORT) == ["effusion", "pneumothorax", "opacity", "pneumonia"]
    assert entities_in("Masses, metastases and sarcoidosis; COPD.") == ["mass", "sarcoidosis", "COPD"]
    assert entities_in("The lungs are well expanded.") == []


def test_rules():
    said = Rules()(REPORT, entities_in(REPORT))
    assert said == (
        "There is small right pleural effusion. There is no pneumothorax. There is patchy opacity. "
        "There may be pneumonia."
    )
    assert check(said, REPORT, entities_in(REPORT)) == said
    for report, expected in (
        ("No mass in the right lung. There is a large mass in the left lung.", "is large mass"),
        ("A mass cannot be excluded.", "may be mass"),
        ("Lungs are clear of mass; the heart is large.", "is no mass"),
        ("The mass has resolved.", "is no mass"),
        ("No effusion, but there is a large mass.", "is large mass"),
        ("There is edema but no mass.", "is no mass"),
    ):
        assert Rules()(report, ["mass"]) == f"There {expected}."


def test_each_finding_of_a_list_has_its_own_statement():
    report = "No consolidation, effusion, or pneumothorax. The cardiomediastinal silhouette is normal."
    named = entities_in(report)
    said = check(Rules()(report, named), report, named)
    assert said.startswith("There is no consolidation. There is no effusion. There is no pneumothorax.")


@pytest.mark.skipif(importlib.util.find_spec(openi.PACKAGE) is None, reason="torchxrayvision is not installed")
def test_the_rules_never_contradict_the_check():
    for report in openi.reports()[:500]:
        if named := entities_in(report.text):
            check(Rules()(report.text, named), report.text, named)


def test_malformed_answers_are_refused():
    def said(answer):
        return lambda: check(answer, "Small effusion. No pneumothorax.", ["effusion", "pneumothorax"])

    refuses(
        (said(""), "empty"),
        (said("Sure! There is effusion."), "not of the form"),
        (said("- There is effusion."), "not of the form"),
        (said("There is effusion"), "not of the form"),
        (said("There is effusion. There is lung."), "names 0"),
        (said("There is effusion and pneumothorax."), "names 2"),
        (said("There is effusion. There is no pneumothorax. There is no effusion."), "twice: effusion"),
        (said("There is large effusion. There is no pneumothorax."), "has not: large"),
        (said("There is effusion."), "left out: pneumothorax"),
        error=Malformed,
    )


def test_accepted_answers():
    report, named = "Small effusion. Effusions are new. No pneumothorax.", ["effusion", "pneumothorax"]
    for answer in (
        "There is small effusion.\nThere is no pneumothorax.",
        "there may be effusions. there is no pneumothorax .",
    ):
        assert check(answer, report, named) == " ".join(answer.split())


def test_answers_are_kept_and_asked_for_once(tmp_path):
    back_end = Scripted("There is edema.")
    reports = ["Edema.", "Clear lungs.", "Edema."]
    first = distil(reports, back_end, tmp_path / "a" / "kept.sqlite")
    assert first.statements == ["There is edema.", "", "There is edema."] and not first.refused
    assert back_end.asked == 1
    again = distil([*reports, "New edema."], back_end, tmp_path / "a" / "kept.sqlite")
    assert again.statements[:3] == first.statements and back_end.asked == 2


def test_a_run_that_was_stopped_goes_on(tmp_path, monkeypatch):
    reports, back_end = [f"Edema number {word}." for word in ("one", "two", "three")], Scripted("There is edema.")
    with interrupted(monkeypatch, Scripted, "__call__", 2):
        distil(reports, back_end, tmp_path / "kept.sqlite")
    assert distil(reports, back_end, tmp_path / "kept.sqlite").statements == ["There is edema."] * 3
    assert back_end.asked == 3


def test_refused_answers_are_asked_for_again_and_told(tmp_path):
    second = Scripted("I think so.", "There is edema.")
    assert distil(["Edema."], second, tmp_path / "a.sqlite").statements == ["There is edema."]
    assert second.asked == 2
    never = Scripted("I think so.")
    for _ in range(2):  # refused answers are cached too
        found = distil(["Edema."], never, tmp_path / "b.sqlite")
        assert found.statements == [""] and "not of the form" in found.refused[0]
    assert never.asked == ecamp_distil.TRIES


def test_another_prompt_or_back_end_asks_anew(tmp_path, monkeypatch):
    back_end = Scripted("There is edema.")
    distil(["Edema."], back_end, tmp_path / "kept.sqlite")
    monkeypatch.setattr(ecamp_distil, "PROMPT", "Say it: {entities} {report}")
    distil(["Edema."], back_end, tmp_path / "kept.sqlite")
    assert back_end.asked == 2
    distil(["Edema."], Rules(), tmp_path / "kept.sqlite")
    with sqlite3.connect(tmp_path / "kept.sqlite") as file:
        assert file.execute("SELECT count(*) FROM answers").fetchone() == (3,)
    file.close()


@pytest.fixture
def tiny(tmp_path):
    """The folder of a random tiny model, whose tokenizer begins each text with [CLS]."""
    transformers = pytest.importorskip("transformers")
    from tokenizers.processors import TemplateProcessing

    from companion.models.ecamp.text import Vocabulary

    words = Vocabulary.train([REPORT, ecamp_distil.PROMPT] * 3, 200)
    begins = ("[CLS]", words.tokenizer.token_to_id("[CLS]"))
    words.tokenizer.post_processor = TemplateProcessing(single="[CLS] $A", special_tokens=[begins])
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words.tokenizer, unk_token="[UNK]", pad_token="[PAD]", bos_token="[CLS]", eos_token="[SEP]"
    )
    config = transformers.GPT2Config(
        vocab_size=len(words), n_positions=512, n_embd=16, n_layer=1, n_head=2, bos_token_id=2, eos_token_id=4
    )
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "tiny")
    tokenizer.save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


def test_a_model_of_transformers(tiny, tmp_path):
    """Its babble is refused, sampled answers are the same every time, and a longer limit asks anew."""
    generator = Generator(str(tiny), tokens=8)
    named = entities_in(REPORT)
    assert generator(REPORT, named, 1) == generator(REPORT, named, 1)
    found = distil([REPORT], generator, tmp_path / "kept.sqlite")
    assert found.statements == [""] and 0 in found.refused
    assert generator.name != Generator(str(tiny), tokens=16).name


@pytest.mark.parametrize("template", [None, "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}"])
def test_a_prompt_begins_with_one_special_token(template, tiny, monkeypatch):
    generator = Generator(str(tiny), tokens=1)
    generator.tokenizer.chat_template = template
    asked = []
    generate = generator.model.generate
    monkeypatch.setattr(generator.model, "generate", lambda **given: asked.append(given) or generate(**given))
    generator(REPORT, entities_in(REPORT))
    begins = (asked[0]["input_ids"][0] == generator.tokenizer.bos_token_id).nonzero().flatten().tolist()
    assert begins == [0]


def test_a_model_that_is_not_here_and_a_cache_that_is_none(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(MissingWeights, match="download=True"):
        Generator("nobody/nothing")
    (tmp_path / "bad.sqlite").write_text("a text file, longer than the header of a database, which is sixteen bytes")
    with pytest.raises(CorruptFile, match=r"bad\.sqlite"):
        distil(["Edema."], Rules(), tmp_path / "bad.sqlite")

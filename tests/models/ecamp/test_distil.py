"""Distillation: the rules' statements, refused answers, the cache, a model of transformers."""

import contextlib
import sqlite3
from types import SimpleNamespace

import numpy as np
import pytest

from companion.data.openi import Report
from companion.errors import CorruptFile, MissingWeights
from companion.models.ecamp import distil as ecamp_distil
from companion.models.ecamp.distil import Generator, Malformed, Rules, check, distil, entities_in
from companion.models.ecamp.text import Vocabulary
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


@pytest.mark.parametrize(
    ("report", "expected"),
    [
        (REPORT, "small right pleural effusion.no pneumothorax.patchy opacity.may be pneumonia"),
        ("No mass in the right lung. There is a large mass in the left lung.", "large mass"),
        ("A mass cannot be excluded.", "may be mass"),
        ("Lungs are clear of mass; the heart is large.", "no mass"),
        ("The mass has resolved.", "no mass"),
        ("No effusion, but there is a large mass.", "no effusion.large mass"),
        ("There is edema but no mass.", "edema.no mass"),
        ("No consolidation, effusion, or pneumothorax.", "no consolidation.no effusion.no pneumothorax"),
        ("No change in the right pleural effusion.", "right pleural effusion"),
        ("There is no significant change in effusion, or increase in edema.", "effusion.edema"),
        ("Without interval change of the catheter.", "catheter"),
        ("No definite changes of edema.", "no edema"),
        ("Pneumothorax is no longer seen.", "no pneumothorax"),
        ("Pneumothorax is not visualized.", "no pneumothorax"),
        ("Interval resolution of effusion. Removal of the catheter.", "no effusion.no catheter"),
        ("The edema has not resolved. The effusion has cleared.", "edema.no effusion"),
        ("Neither effusion nor pneumothorax.", "no effusion.no pneumothorax"),
        ("Compared to May 12, there is a small effusion.", "small effusion"),
        ("Since the radiograph of May 2012 large effusion. No edema on May 3.", "large effusion.no edema"),
        ("Pneumonia cannot be ruled out.", "may be pneumonia"),
        ("This does not exclude pneumonia.", "may be pneumonia"),
        ("Pneumonia is unlikely.", "may be pneumonia"),
        ("Opacity, atelectasis vs. edema.", "opacity.may be atelectasis.may be edema"),
        ("No opacity to suggest pneumonia.", "no opacity.no pneumonia"),
        ("No suspicious nodule.", "no suspicious nodule"),
        ("No 1.5 cm nodule.", "no cm nodule"),
        ("The effusion is small, and pneumothorax is absent.", "effusion.no pneumothorax"),
        ("Effusion and pneumothorax are absent.", "no effusion.no pneumothorax"),
    ],
)
def test_the_rules_state_each_finding_of_a_report(report, expected):
    kinds = [what if what.startswith("may be") else f"is {what}" for what in expected.split(".")]
    stated = Rules()(report, entities_in(report))
    assert stated == " ".join(f"There {kind}." for kind in kinds)
    assert check(stated, report, entities_in(report)) == stated


def test_entities_that_the_report_does_not_name_are_refused(tmp_path):
    refuses(
        (lambda: Rules()("Lungs are clear.", ["mass"]), "mass"),
        (lambda: distil("Edema.", Rules(), tmp_path / "answers.sqlite"), "Edema"),  # its letters are no reports
    )


def test_malformed_answers_are_refused():
    def answer(text):
        return lambda: check(text, "Small effusion. No pneumothorax.", ["effusion", "pneumothorax"])

    refuses(
        (answer(""), "empty"),
        (answer("Sure! There is effusion."), "Sure"),
        (answer("There is effusion. There is lung."), "lung"),
        (answer("There is effusion and pneumothorax."), "2"),
        (answer("There is effusion. There is no pneumothorax. There is no effusion."), "effusion"),
        (answer("There is large effusion. There is no pneumothorax."), "large"),
        (answer("There is effusion."), "pneumothorax"),
        error=Malformed,
    )
    accepted = "there may be\neffusions. there is no pneumothorax ."
    assert answer(accepted)() == " ".join(accepted.split())


def test_answers_are_cached_by_report_prompt_and_back_end(tmp_path, monkeypatch):
    back_end, file = Scripted("There is edema."), tmp_path / "a" / "answers.sqlite"
    reports = ["Edema.", "Clear lungs.", "Edema.", "New edema.", "Old edema."]
    with interrupted(monkeypatch, Scripted, "__call__", 2):
        distil(reports, back_end, file)
    found = distil(reports, back_end, file)
    assert found.statements == ["There is edema.", "", *["There is edema."] * 3] and not found.refused
    assert back_end.asked == 3, "the killed run's two answers are not asked for again"
    monkeypatch.setattr(ecamp_distil, "PROMPT", "Say it: {entities} {report}")
    distil(["Edema."], back_end, file)
    assert back_end.asked == 4
    distil(["Edema."], Rules(), file)
    with sqlite3.connect(file) as cache:
        assert cache.execute("SELECT count(*) FROM answers").fetchone() == (5,)
    cache.close()
    file.write_text("a text file, longer than the header of a database, which is sixteen bytes")
    refuses((lambda: distil(["Edema."], Rules(), file), r"answers\.sqlite"), error=CorruptFile)


@pytest.mark.parametrize(("seconds", "lost"), [(0.0625, 15), (3.0, 0)])
def test_a_kill_loses_a_second_of_answers(seconds, lost, tmp_path, monkeypatch):
    """Of 100 answers: those of the rules wait for the disk once a second, slow ones are written one by one."""

    def answer(report, entities, attempt):
        if file.is_file():
            with contextlib.closing(sqlite3.connect(file)) as cache:  # what a process killed here would leave
                unwritten.append(len(unwritten) - cache.execute("SELECT count(*) FROM answers").fetchone()[0])
        clock[0] += seconds
        return "There is edema."

    answer.name = "timed"
    file, clock, unwritten = tmp_path / "a.sqlite", [0.0], []
    monkeypatch.setattr(ecamp_distil, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    reports = [f"Edema. {'I' * i}" for i in range(100)]
    assert distil([*reports, reports[-1]], answer, file).statements == ["There is edema."] * 101
    assert len(unwritten) == 100 and max(unwritten) == lost
    with contextlib.closing(sqlite3.connect(file)) as cache:
        assert cache.execute("SELECT count(*) FROM answers").fetchone() == (100,)


def test_refused_answers_are_asked_for_again_and_told(tmp_path):
    second = Scripted("I think so.", "There is edema.")
    assert distil(["Edema."], second, tmp_path / "a.sqlite").statements == ["There is edema."]
    assert second.asked == 2
    never = Scripted("I think so.")
    for _ in range(2):  # refused answers are cached too
        found = distil(["Edema."], never, tmp_path / "b.sqlite")
        assert found.statements == [""] and "I think so" in found.refused[0]
    assert never.asked == ecamp_distil.TRIES


@pytest.fixture
def tiny(tmp_path):
    """The folder of a random tiny model, whose tokenizer begins each text with [CLS]."""
    transformers = pytest.importorskip("transformers")
    from tokenizers.processors import TemplateProcessing

    words = Vocabulary.train([REPORT, ecamp_distil.PROMPT] * 3, 200)
    begins = ("[CLS]", words.tokenizer.token_to_id("[CLS]"))
    words.tokenizer.post_processor = TemplateProcessing(single="[CLS] $A", special_tokens=[begins])
    tokens = {"unk_token": "[UNK]", "pad_token": "[PAD]", "bos_token": "[CLS]", "eos_token": "[SEP]"}
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words.tokenizer, **tokens)
    sizes = {"vocab_size": len(words), "n_positions": 512, "n_embd": 16, "n_layer": 1, "n_head": 2}
    config = transformers.GPT2Config(**sizes, bos_token_id=2, eos_token_id=4)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "tiny")
    tokenizer.save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


@pytest.mark.parametrize("template", [None, "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}"])
def test_a_model_of_transformers(template, tiny, tmp_path, monkeypatch):
    """Sampled answers are the same every time; a prompt has one special token, at its beginning."""
    generator, asked = Generator(str(tiny), tokens=8), []
    generator.tokenizer.chat_template = template
    generate = generator.model.generate
    monkeypatch.setattr(generator.model, "generate", lambda **given: asked.append(given) or generate(**given))
    assert generator(REPORT, ["mass"], 1) == generator(REPORT, ["mass"], 1)
    begins = (asked[0]["input_ids"][0] == generator.tokenizer.bos_token_id).nonzero().flatten().tolist()
    assert begins == [0] and asked[0]["do_sample"]
    found = distil([REPORT], generator, tmp_path / "answers.sqlite")
    assert found.statements == [""] and not asked[2]["do_sample"]
    assert generator.name != Generator(str(tiny), tokens=16).name, "a longer answer may be complete"


def test_a_model_that_is_not_cached_is_not_downloaded(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    refuses((lambda: Generator("nobody/nothing"), "nobody/nothing"), error=MissingWeights)


# --- agreement with coded headings, by counting on reports that are made up -------------------------------------------

REPORTS = [
    Report("1", "There is a small effusion. No edema.", frozenset({"Pleural Effusion"})),
    Report("2", "No effusion. There may be edema.", frozenset({"Pleural Effusion", "Pulmonary Edema"})),
    Report("3", "Effusions on both sides.", frozenset({"normal"})),
    Report("4", "Fluid in the pleura.", frozenset({"Hydropneumothorax"})),
]


def test_statements_precision_and_recall():
    assert set(ecamp_distil.HEADINGS) <= set(ecamp_distil.ENTITIES)
    rows = ecamp_distil.statements(REPORTS)
    stated = rows.set_index(["report", "entity"]).stated
    assert list(stated[:, "effusion"]) == ["is", "is no", "is", ""]
    assert list(stated[:, "edema"]) == ["is no", "may be", "", ""]
    table = ecamp_distil.agreement(rows).set_index("entity")
    expected = {
        "effusion": [3, 2, 1, 50, 100 / 3],
        "edema": [1, 1, 1, 100, 100],
        "hernia": [0, 0, 0, np.nan, np.nan],
        "all": [5, 3, 2, 200 / 3, 40],  # hydropneumothorax counts twice
    }
    for entity, values in expected.items():
        np.testing.assert_allclose(table.loc[entity].astype(float), values)
    assert (table.index[0], table.index[-1]) == ("effusion", "all")

"""Open-i's reports: read in memory from their archive, whole, and refused by name when they are not there."""

import importlib.util
import tarfile
from importlib.metadata import PackageNotFoundError

import pytest

from companion.data import openi
from companion.errors import CorruptFile, MissingData

XML = """<?xml version="1.0" encoding="utf-8"?>
<eCitation><Abstract>
<AbstractText Label="INDICATION">cough</AbstractText>
<AbstractText Label="FINDINGS">{findings}</AbstractText>
<AbstractText Label="IMPRESSION">No edema.</AbstractText>
</Abstract><MeSH><major>Cardiomegaly/mild</major><major>Opacity </major><automatic>Edema</automatic></MeSH></eCitation>
"""


def archive(path, files):
    folder = path.parent / "xml"
    folder.mkdir(exist_ok=True)
    with tarfile.open(path, "w:gz") as file:
        for name, text in files.items():
            (folder / name).write_text(text, encoding="utf-8")
            file.add(folder / name, f"ecgen-radiology/{name}")
    return path


def test_text_and_headings(tmp_path):
    empty = XML.replace("No edema.", "").format(findings="")
    files = {
        "10.xml": XML.format(findings="Large heart."),
        "9.xml": XML.format(findings=""),
        "8.xml": empty,
        "a.txt": "",
    }
    ninth, tenth = openi.reports(archive(tmp_path / "reports.tgz", files))  # the eighth has no text
    assert (ninth.name, ninth.text) == ("9", "No edema.")
    assert (tenth.name, tenth.text) == ("10", "Large heart. No edema.")
    assert tenth.headings == {"Cardiomegaly", "Opacity"}


def test_what_is_not_an_archive_of_reports_is_refused(tmp_path, monkeypatch):
    bad = tmp_path / "bad.tgz"
    bad.write_bytes(b"not an archive")
    cut = archive(tmp_path / "cut.tgz", {"1.xml": XML.format(findings="x" * 5000)})
    cut.write_bytes(cut.read_bytes()[:150])
    for path in (bad, cut, archive(tmp_path / "xml.tgz", {"1.xml": "<a>"})):
        with pytest.raises(CorruptFile, match=path.name):
            openi.reports(path)
    with pytest.raises(MissingData, match="none"):
        openi.reports(tmp_path / "none.tgz")

    def absent(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(openi, "distribution", absent)
    with pytest.raises(MissingData, match="torchxrayvision"):
        openi.reports()


def test_the_reports_of_the_package():
    if importlib.util.find_spec(openi.PACKAGE) is None:
        pytest.skip("torchxrayvision, of the extra `real`, is not installed")
    found = openi.reports()
    assert len(found) == 3927 and len({report.name for report in found}) == 3927
    words = sum(len(report.text.split()) for report in found) / len(found)
    assert 30 < words < 45
    assert sum("normal" in report.headings for report in found) > 1000

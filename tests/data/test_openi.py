"""Open-i's reports: read in memory from their archive, whole, and refused by name when they are not there."""

import importlib.util
import tarfile

import pytest

from companion.data import openi
from companion.errors import CorruptFile, MissingData
from tests.data.conftest import refused

XML = """<?xml version="1.0" encoding="utf-8"?>
<eCitation><Abstract>
<AbstractText Label="INDICATION">cough</AbstractText>
<AbstractText Label="FINDINGS">{}</AbstractText>
<AbstractText Label="IMPRESSION">{}</AbstractText>
</Abstract><MeSH><major>Cardiomegaly/mild</major><major>Opacity </major><automatic>Edema</automatic></MeSH></eCitation>
"""


def archive(path, files):
    with tarfile.open(path, "w:gz") as file:
        for name, text in files.items():
            (path.parent / name).write_text(text, encoding="utf-8")
            file.add(path.parent / name, f"ecgen-radiology/{name}")
    return path


def test_text_and_headings(tmp_path):
    texts = {"10": ("Large heart.", "No edema."), "9": ("", "No edema."), "8": ("", "")}  # the last has no text
    files = {f"{name}.xml": XML.format(*parts) for name, parts in texts.items()} | {"a.txt": ""}
    found = openi.reports(archive(tmp_path / "reports.tgz", files))
    assert [(report.name, report.text) for report in found] == [("9", "No edema."), ("10", "Large heart. No edema.")]
    assert found[1].headings == {"Cardiomegaly", "Opacity"}


def test_a_file_that_is_no_archive_of_reports_is_refused(tmp_path):
    cut = archive(tmp_path / "cut.tgz", {"1.xml": XML.format("x" * 5000, "")})
    cut.write_bytes(cut.read_bytes()[:150])
    for path in (cut, archive(tmp_path / "xml.tgz", {"1.xml": "<a>"})):
        refused(CorruptFile, path.name, openi.reports, path)
    refused(MissingData, "none", openi.reports, tmp_path / "none.tgz")


def test_the_reports_of_the_package():
    if importlib.util.find_spec(openi.PACKAGE) is None:
        pytest.skip("torchxrayvision, of the extra `real`, is not installed")
    found = openi.reports()
    assert len(found) == 3927 and len({report.name for report in found}) == 3927
    assert sum("normal" in report.headings for report in found) > 1000

"""3,955 real radiology reports with MeSH headings, from the PyPI package `torchxrayvision` (extra `real`).

The Indiana University chest X-ray collection (Open-i; D. Demner-Fushman et al., "Preparing a collection of radiology
examinations for distribution and retrieval", JAMIA 2016), de-identified: removed words are "XXXX". Two coders assigned
the headings to each report. The reports are licensed CC BY-NC-ND: they are read from the package and never copied.
"""

from __future__ import annotations

import contextlib
import tarfile
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from xml.etree import ElementTree

from ..errors import CorruptFile, MissingData

PACKAGE, FILE = "torchxrayvision", "torchxrayvision/data/NLMCXR_reports.tgz"
SECTIONS = ("FINDINGS", "IMPRESSION")
LIMIT = 200_000  # bytes of a report's XML; the largest has 8,967


@dataclass(frozen=True)
class Report:
    """A report: findings and impression as one text, and the MeSH headings assigned by coders."""

    name: str
    text: str
    headings: frozenset[str]  # without qualifiers: "Cardiomegaly" of "Cardiomegaly/mild"


def reports(path: str | Path = "") -> list[Report]:
    """The reports that have a text, by number.

    Args:
        path: of NLMCXR_reports.tgz; empty for the one in the package.

    Raises:
        MissingData: the package is not installed, or there is no such file.
        CorruptFile: not an archive of such reports.
    """
    if not path:
        with contextlib.suppress(PackageNotFoundError):
            path = Path(str(distribution(PACKAGE).locate_file(FILE)))
    if not path or not Path(path).is_file():
        source, where = f"the PyPI package {PACKAGE}: pip install -e '.[real]'", path or FILE
        raise MissingData("Open-i's reports", Path(where).parent, Path(where).name, source, "CC BY-NC-ND")
    found = []
    try:
        with tarfile.open(path) as archive:  # read in memory: nothing is unpacked
            for member in archive:
                if member.isfile() and member.name.endswith(".xml") and member.size < LIMIT:
                    file = archive.extractfile(member)
                    assert file is not None
                    found.append(_read(Path(member.name).stem, ElementTree.fromstring(file.read())))
    except (tarfile.TarError, ElementTree.ParseError, EOFError, OSError) as error:
        raise CorruptFile(path, f"not an archive of Open-i's reports ({error})") from error
    return sorted((report for report in found if report.text), key=lambda report: int(report.name))


def _read(name: str, root: ElementTree.Element) -> Report:
    parts = {part.get("Label"): (part.text or "").strip() for part in root.iter("AbstractText")}
    headings = (heading.text or "" for heading in root.iter("major"))
    text = " ".join(parts[section] for section in SECTIONS if parts.get(section))
    return Report(name, text, frozenset(heading.partition("/")[0].strip() for heading in headings))

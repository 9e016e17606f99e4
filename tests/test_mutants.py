"""The faults of `make mutants`: each can be put into the library as it is now, and still gives Python; its tests
exist."""

import ast
import re
from pathlib import Path

import companion
from tests.mutants import ROOT, faults


def test_every_fault_can_be_put_in(tmp_path: Path) -> None:
    lib = Path(companion.__file__).parents[1]
    listed = faults()
    assert len(listed) >= 120
    for fault in listed:
        copy = tmp_path / "companion" / fault.file
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes((lib / "companion" / fault.file).read_bytes())
        fault.put_in(tmp_path)  # raises when its text does not occur exactly once
        if copy.suffix == ".py":
            ast.parse(copy.read_text(encoding="utf-8"))


def test_the_tests_of_every_fault_exist() -> None:
    missing = []
    for tests in dict.fromkeys(fault.tests for fault in faults()):
        paths, _, words = tests.partition(" -k ")
        for path in paths.split():
            file, _, name = path.partition("::")
            known = re.findall(r"def (test_\w+)", (ROOT / file).read_text(encoding="utf-8"))
            if name and name.partition("[")[0] not in known:
                missing.append(path)
            missing += [f"{file} -k {w}" for w in re.findall(r"\((\w+)\)", words) if not any(w in n for n in known)]
    assert not missing

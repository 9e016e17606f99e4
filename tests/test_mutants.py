"""The faults that `make mutants` puts in: each can be put into the library as it is now, and still gives Python."""

import ast
from pathlib import Path

import companion
from tests.mutants import faults


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

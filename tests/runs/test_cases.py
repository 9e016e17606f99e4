"""The recorded cases in a notebook: compared where there is a checkout, "not run" where there is only the package."""

import nbformat
import pytest

from companion.io import record
from companion.runs import report
from tests.conftest import ROOT, parameters


@pytest.mark.parametrize(("slug", "checkout"), [("promptpar", True), ("promptpar", False), ("hvit", False)])
def test_the_claim_of_the_cases_is_not_run_without_them(slug, checkout, tmp_path, monkeypatch, capsys):
    if not checkout:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(record, "root", lambda: tmp_path)
    # their cells need no other
    run = report.start(slug, vars(parameters(slug, out=str(tmp_path / "out"), data_root=str(tmp_path))))
    cells = nbformat.read(ROOT / "notebooks" / f"{slug}.ipynb", as_version=4).cells
    (cell,) = [cell for cell in cells if f'agreement("{slug}"' in cell.source]
    exec(cell.source, {"run": run})
    assert run.claims["parity"]["status"] == ("holds" if checkout else "not run")
    assert ("tests/parity" in capsys.readouterr().out) is not checkout

"""From a finished run to a pull request, on two checkouts, and contributions whose form is wrong."""

import csv
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from companion import cli
from companion.errors import BadParameter
from companion.runs import report
from companion.runs.pack import FILES, ROWS, pack
from tests.conftest import ROOT, parameters
from tests.data import test_classification as layouts
from tests.data.conftest import picture
from tests.papers.common import shrink
from tests.runs.common import contribution, git, small_checkout
from tools import contributed

PLACE = "reports/contributed/sa2vp"
WORKFLOW = yaml.safe_load((ROOT / ".github/workflows/contributed.yml").read_text(encoding="utf-8"))
ENV = os.environ | {
    "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    "PYTHONPATH": str(ROOT / "lib"),
    "NUMBER": "7",
    "GITHUB_STEP_SUMMARY": os.devnull,
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of a finished run: a linear probe of a small ViT on a miniature of SVHN, 100 epochs of one step."""
    with pytest.MonkeyPatch.context() as patch:
        place = tmp_path_factory.mktemp("someone")
        svhn = place / "data" / "vtab-1k" / "svhn"
        layouts.shrink(patch, "vtab/svhn", 2, 64, 16, 40)
        for name, first, last in (("train800", 0, 64), ("val200", 64, 80), ("train800val200", 0, 80), ("test", 0, 40)):
            folder = "test" if name == "test" else "trainval"
            rows = [f"images/{folder}/{i}.png {i % 2}\n" for i in range(first, last)]
            for i in range(first, last):
                picture(svhn / f"images/{folder}/{i}.png", i + 100 * (name == "test"))
            (svhn / f"{name}.txt").write_text("".join(rows))
        recipe = shrink("sa2vp", patch)
        patch.chdir(small_checkout(place / "checkout"))
        patch.setattr(report.needs, "check", lambda *_: None)  # the full-size model's memory
        given = parameters(
            "sa2vp", profile="paper", accelerator="cpu", dataset="vtab/svhn", method="linear probing",
            data_root=str(place / "data"), out=str(place / "out"),
        )  # fmt: skip
        started = report.start("sa2vp", vars(given))
        recipe.run(started.parameters, started.out)
        started.close()
        yield place / "out"


def today(run: Path) -> str:
    return json.loads((run / "run.json").read_text(encoding="utf-8"))["date"]


def test_three_commands_lead_from_a_run_to_a_pull_request_that_its_workflow_accepts(run: Path, tmp_path: Path) -> None:
    """On the checkout of the run and a clone of it, by the commands of the page and the step of the workflow."""
    base, fork = run.parent / "checkout", tmp_path / "fork"
    git(tmp_path, "clone", "-q", str(base), str(fork))
    text = (ROOT / "site/docs/gpu.md").read_text(encoding="utf-8")
    commands = [line for line in re.search(r"```\n(companion pack .*?)```", text, re.S)[1].splitlines() if line]
    assert len(commands) == 3 and commands[2].startswith("gh pr create")
    folder = f"{PLACE}/{today(run)}-svhn"
    first = commands[0].replace("reports/paper/sa2vp/dataset=vtab-svhn", str(run))
    first = re.sub(rf"{PLACE}/\S+", folder, first)
    for command in (first, commands[1]):
        done = subprocess.run(command, shell=True, cwd=fork, env=ENV, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    git(fork, "add", "-A")
    git(fork, "commit", "-q", "-m", "row")
    git(fork, "push", "-q", "origin", "HEAD:refs/pull/7/head")
    (check,) = (step["run"] for step in WORKFLOW["jobs"]["check"]["steps"] if step.get("name") == "Check")

    def outcome() -> subprocess.CompletedProcess[str]:
        git(base, "remote", "remove", "origin") if git(base, "remote") else None
        git(base, "remote", "add", "origin", str(base))
        return subprocess.run(["bash", "-e", "-c", check], cwd=base, env=ENV, capture_output=True, text=True)

    assert outcome().returncode == 0, outcome().stdout + outcome().stderr
    assert sorted(file.name for file in (base / folder).iterdir()) == sorted(FILES)
    text = "".join((base / folder / name).read_text(encoding="utf-8") for name in FILES)
    assert "your name, if you wish" in text and "linear probing" in text and '"test": 40' in text
    assert str(run.parent) not in text and "someone" not in text
    (fork / "lib" / "companion" / "more.py").write_text("raise SystemExit('run')\n")
    (fork / folder / "measured.csv").write_text("accuracy\n80\n")
    git(fork, "add", "-A")
    git(fork, "commit", "-q", "-m", "more")
    git(fork, "push", "-q", "origin", "HEAD:refs/pull/7/head")
    refused = outcome()
    assert refused.returncode and f"{folder}/measured.csv:2: " in refused.stdout


def test_a_long_history_is_thinned_to_its_last_step(run: Path, tmp_path: Path) -> None:
    (history,) = (run / "checkpoints").glob("*.csv")
    before = history.read_text()
    try:
        head, *_ = before.splitlines()
        names = head.split(",")
        lines = [",".join(str(step if name == "step" else 0.1) for name in names) for step in range(1, 5001)]
        history.write_text("\n".join([head, *lines]))
        pack(run, tmp_path / "long")
    finally:
        history.write_text(before)
    rows = list(csv.DictReader((tmp_path / "long" / "history.csv").open()))
    assert len(rows) == ROWS and rows[0]["step"] == "1" and rows[-1]["step"] == "5000"
    assert (tmp_path / "long" / "history.csv").stat().st_size < contributed.LARGEST


def test_what_cannot_be_packed_leaves_no_folder(run: Path, tmp_path: Path) -> None:
    with pytest.raises(BadParameter, match="by = "):
        pack(run, tmp_path / "a", by="<b>")
    (empty := tmp_path / "run").mkdir()
    assert cli.main(["pack", str(empty), "-o", str(tmp_path / "a")]) == 1
    (empty / "run.json").write_text('{"slug": "sa2vp", "parameters": {"profile": "paper", "dry_run": true}}')
    assert cli.main(["pack", str(empty), "-o", str(tmp_path / "a")]) in (1, 2)
    assert [file.name for file in tmp_path.iterdir()] == ["run"]


# --- contributions whose form is wrong --------------------------------------------------------------------------------


def edit(name: str, old: str, new: str) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        text = (folder / name).read_text(encoding="utf-8")
        assert old in text
        (folder / name).write_text(text.replace(old, new, 1), encoding="utf-8")

    return change


def nowhere(folder: Path) -> None:
    facts = json.loads((folder / JSON).read_text(encoding="utf-8")) | {"commit": "0" * 40}
    (folder / JSON).write_text(json.dumps(facts, indent=1), encoding="utf-8")


def link(folder: Path) -> None:
    (folder / "history.csv").unlink()
    (folder / "history.csv").symlink_to("/etc/hostname")


JSON, CSV, HISTORY = FILES
ROW = "SA²VP,vit_b16,vtab/svhn,0,80"
# by the file and line or key that is named: what is changed
HOSTILE: dict[str, tuple[str, Callable[[Path], object]]] = {
    "a role in the name": (r"run.json:\d+: by", edit(JSON, "A. Person", "{download}`/etc/hostname`")),
    "HTML in the GPU": (r"run.json:\d+: device", edit(JSON, "Tesla T4", "<script>alert(1)</script>")),
    "a line break in the name": (r"run.json:\d+: by", edit(JSON, "A. Person", "A\\n# Title")),
    "a role in a version": (r"run.json:\d+: versions.torch", edit(JSON, "2.9.1", "{raw}`x`")),
    "a role in a data set": (r"run.json:\d+: items", edit(JSON, "vtab/svhn\": {", "{download}`/etc/passwd`\": {")),
    "a path": (r"run.json:\d+: parameters.weights", edit(JSON, '"weights": ""', '"weights": "C:\\\\secret"')),
    "a formula": (r"run.json:\d+: by", edit(JSON, "A. Person", "$\\\\LaTeX$")),
    "an unknown key": (r"run.json:\d+: verified", edit(JSON, '"slug"', '"verified": true, "slug"')),
    "a key twice": (r"run.json:\d+: by: a second time", edit(JSON, '"slug"', '"by": "B", "slug"')),
    "an unknown parameter": (r"run.json:\d+: parameters", edit(JSON, '"dry_run"', '"dryrun": 1, "dry_run"')),
    "a missing parameter": (r"run.json:\d+: parameters: dry_run", edit(JSON, '"dry_run": false,', "")),
    "a dry run": (r"run.json:\d+: parameters.dry_run", edit(JSON, '"dry_run": false', '"dry_run": true')),
    "a pocket run": (r"run.json:\d+: parameters.profile", edit(JSON, '"profile": "paper"', '"profile": "pocket"')),
    "no data": (r"run.json:\d+: items", edit(JSON, '"vtab/svhn": {', '"vtab/dtd": {')),
    "a commit of nowhere": (r"run.json:\d+: commit", nowhere),
    "a day to come": (r"run.json:\d+: date", edit(JSON, '"date": "20', '"date": "29')),
    "an infinite time": (r"run.json:\d+: ", edit(JSON, "3000.0", "1e999")),
    "not a number": (r"run.json:\d+: the file", edit(JSON, "3000.0", "NaN")),
    "no JSON": (r"run.json:\d+: the file", edit(JSON, "{", "&a [*a]")),
    "nested deeply": (r"run.json:\d+: the file", edit(JSON, "{", "[" * 50_000)),
    "no UTF-8": (r"run.json:\d+: the file", lambda folder: (folder / JSON).write_bytes(b"\xff\xfe")),
    "an impossible score": (r"measured.csv:2: accuracy", edit(CSV, ",80", ",170")),
    "an infinite score": (r"measured.csv:2: accuracy", edit(CSV, ",80", ",inf")),
    "a score with a role": (r"measured.csv:2: accuracy", edit(CSV, ",80", ",{raw}`80`")),
    "no score": (r"measured.csv:2: columns", edit(CSV, ",80", ",")),
    "an unknown method": (r"measured.csv:2: method", edit(CSV, "SA²VP,", "SA3VP,")),
    "a role behind a method": (r"measured.csv:2: method", edit(CSV, "SA²VP,", '"SA²VP, {download}`/etc/passwd`",')),
    "a row of another run": (r"measured.csv:2: ", edit(CSV, ",0,80", ",1,80")),
    "a row twice": (r"measured.csv:3: ", edit(CSV, ROW, f"{ROW}\n{ROW}.5")),
    "another column": (r"measured.csv:2: columns", edit(CSV, "accuracy\n" + ROW, "accuracy,claim\n" + ROW + ",holds")),
    "a cell too many": (r"measured.csv:2: ", edit(CSV, ROW, ROW + ",1")),
    "an open quote": (r"measured.csv:\d: ", edit(CSV, "SA²VP,", '"SA²VP,')),
    "no row": (r"measured.csv:1: ", edit(CSV, ROW + "\n", "")),
    "a loss that is none": (r"history.csv:2: loss", edit(HISTORY, "3.0", "nan")),
    "steps out of order": (r"history.csv:3: ", edit(HISTORY, "0,50", "0,1")),
    "a large file": (r"history.csv: ", lambda folder: (folder / HISTORY).write_bytes(b"0" * 200_001)),
    "a link": (r"history.csv: ", link),
    "a further file": (r"2026-01-01-a: ", lambda folder: (folder / "run.py").write_text("raise SystemExit")),
    "a missing file": (r"2026-01-01-a: ", lambda folder: (folder / HISTORY).unlink()),
}  # fmt: skip


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_checkout(tmp_path_factory.mktemp("checkout") / "small")


@pytest.mark.parametrize("name", ["", *HOSTILE])
def test_a_wrong_form_is_named_with_its_place(
    name: str, checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(contributed, "ROOT", checkout)
    folder = tmp_path / PLACE / "2026-01-01-a"
    contribution(folder, "A. Person", "Tesla T4", 0, 80, git(checkout, "rev-parse", "HEAD"))
    assert not [*contributed.check(folder)]
    if name:
        where, change = HOSTILE[name]
        change(folder)
        found = [*contributed.check(folder)]
        assert any(re.search(f"{where}(?s:.*); accepted: |second time", line) for line in found), found


def test_a_folder_in_another_place_is_named(tmp_path: Path) -> None:
    for place in ("sa2vp/today", "sa3vp/2026-01-01-a", "sa2vp/2026-01-01-`a`"):
        assert [line.partition(":")[0] for line in contributed.check(tmp_path / place)] == [str(tmp_path / place)]

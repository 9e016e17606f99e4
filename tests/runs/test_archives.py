"""A run of the `paper` profile, packed on one checkout and adopted on another; forged and damaged archives."""

import csv
import hashlib
import io
import json
import random
import stat
import subprocess
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import nbformat
import pandas as pd
import pytest

from companion import cli
from companion.errors import BadParameter, CompanionError, CorruptFile
from companion.io.files import read_json
from companion.io.provenance import code_hash, sources
from companion.runs import adopt, archives, report
from tests.conftest import ROOT, parameters
from tests.data import test_classification as layouts
from tests.data.conftest import picture
from tests.papers.common import shrink
from tests.runs.common import small_checkout

Files = dict[str, str]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of a finished run: a linear probe of a small ViT on a miniature of SVHN, 100 epochs of one step."""
    with pytest.MonkeyPatch.context() as patch:
        place = tmp_path_factory.mktemp("measured")
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
        executed = nbformat.read(ROOT / "notebooks" / "sa2vp.ipynb", as_version=4)
        injected = nbformat.v4.new_code_cell(f"# Parameters\ndata_root = {str(place / 'data')!r}")
        said = f"read {place}/data/vtab-1k and C:\\Users\\someone\\data, 12 / 40 images"
        injected.outputs = [nbformat.v4.new_output("stream", text=said)]
        executed.cells.insert(2, injected)
        nbformat.write(executed, place / "out" / "sa2vp.ipynb")
        yield place / "out"


@pytest.fixture
def packed(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Its archive, on another checkout."""
    assert cli.main(["pack", str(run), "-o", str(tmp_path / "run.zip"), "--by", "A. Person"]) == 0
    monkeypatch.chdir(small_checkout(tmp_path / "elsewhere"))
    return tmp_path / "run.zip"


def unzip(file: Path) -> Files:
    with zipfile.ZipFile(file) as packed:
        return {name: packed.read(name).decode() for name in packed.namelist()}


def zipped(file: Path, files: Files, record: dict | None = None) -> Path:
    """The archive of these files; with a record, the hashes in it are right."""
    if record is not None:
        hashed = {n: hashlib.sha256(text.encode()).hexdigest() for n, text in files.items() if n != "run.json"}
        files = {**files, "run.json": json.dumps(record | {"files": hashed})}
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as packed:
        for name, text in files.items():
            packed.writestr(name, text)
    return file


def test_a_packed_run_is_small_and_names_no_folder_and_nobody(packed: Path, run: Path) -> None:
    files = unzip(packed)
    facts, text = json.loads(files["run.json"]), "".join(files.values())
    assert packed.stat().st_size < archives.LARGEST and set(files) >= {
        "measured.csv",
        "history/0.csv",
        "notebook.ipynb",
    }
    for secret in (str(run.parent), "Users", "someone", "image/png", "base64"):
        assert secret not in text
    assert "12 / 40 images" in text and facts["by"] == "A. Person" and "data_root" not in facts["parameters"]
    split = facts["data"]["vtab/svhn"]["test"]
    assert (split["items"], split["labels"]) == (40, [20, 20]) and facts["steps"] == [100]


@pytest.mark.parametrize("path", sorted((ROOT / "notebooks").glob("*.ipynb")), ids=lambda path: path.stem)
def test_a_notebook_as_it_was_executed_passes(path: Path) -> None:
    """BAT's parameters name a path as an example."""
    packed = archives.anonymous(archives._bare(read_json(path)))
    assert archives.anonymous(packed) == packed
    assert adopt._cells_of(packed) == archives.anonymous(adopt._cells_of(read_json(path)))


def test_outside_of_a_checkout_it_is_said_where_to_call(packed: Path, tmp_path: Path) -> None:
    Path("notebooks/sa2vp.ipynb").unlink()
    with pytest.raises(CorruptFile, match="in the project's checkout"):
        adopt.adopt(packed)


def test_a_long_history_is_thinned_to_its_last_step(packed: Path, run: Path, tmp_path: Path) -> None:
    (history,) = (run / "checkpoints").glob("*.csv")
    before = history.read_text()
    rows = [f"{step},0.1,{1 / (step + 1)}" for step in range(1, 1001)]
    try:
        history.write_text("\n".join([before.splitlines()[0], *rows]))
        archives.pack(run, tmp_path / "long.zip")
    finally:
        history.write_text(before)
    thinned = list(csv.DictReader(io.StringIO(unzip(tmp_path / "long.zip")["history/0.csv"])))
    assert len(thinned) == archives.ROWS and thinned[0]["step"] == "1" and thinned[-1]["step"] == "1000"


def test_an_adopted_run_is_shown_with_mean_and_spread_of_all_runs(
    packed: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert cli.main(["adopt", str(packed), "--check"]) == 0
    said = capsys.readouterr().out
    assert "holds together" in said and "Linear, svhn" in said and not Path("reports").exists()
    assert cli.main(["adopt", str(packed)]) == 0
    (kept,) = Path("reports/contributed/sa2vp").glob("*.zip")
    assert kept.read_bytes() == packed.read_bytes()
    assert "holds together" in adopt.adopt(kept, only_check=True), "its own place is no second run"
    files = unzip(packed)
    facts, score = json.loads(files["run.json"]), float(files["measured.csv"].split(",")[-1])
    other = facts | {"by": "B", "device": "Tesla T4", "parameters": facts["parameters"] | {"seed": 1}}
    other["data"] = {
        "vtab/svhn": facts["data"]["vtab/svhn"] | {"val": facts["data"]["vtab/svhn"]["val"] | {"names": "0"}}
    }
    table = pd.read_csv(io.StringIO(files["measured.csv"])).assign(seed=1, accuracy=score + 2)
    again = zipped(tmp_path / "b.zip", files | {"measured.csv": table.to_csv(index=False)}, other)
    assert "another copy of vtab/svhn" in adopt.adopt(again)
    (cell,) = adopt.measured_cells("sa2vp")
    assert (cell["row"], cell["column"]) == ("Linear", "svhn")
    assert sorted(cell["values"]) == pytest.approx([score, score + 2])
    assert cell["mean"] == pytest.approx(score + 1) and cell["spread"] == pytest.approx(2**0.5)
    assert {*cell["by"]} == {"A. Person", "B"} and len(cell["gpus"]) == 2
    assert adopt.judged("sa2vp") == {}, "no claim is about one task of the linear probe"


def test_contributed_runs_judge_a_claim(packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adopt.adopt(packed)
    claim = {"id": "one", "measured": [{"of": ["Linear", "vtab/svhn"], "at_least": 1}]}
    missing = {"id": "two", "measured": [{"of": ["Linear", "vtab/svhn"], "over": ["SA2VP", "vtab/svhn"], "by": 0}]}
    facts = adopt.paper("sa2vp") | {"claims": [claim, missing]}
    monkeypatch.setattr(adopt, "paper", lambda slug: facts)
    found = adopt.judged("sa2vp")
    assert found["one"].startswith("holds (n = 1, 1 GPU, contributed)") and "not all" in found["two"]


def test_code_of_an_earlier_commit_is_named(packed: Path, tmp_path: Path) -> None:
    def git(*words: str) -> str:
        identity = ("-c", "user.name=a", "-c", "user.email=a@b.c")
        return subprocess.run(["git", *identity, *words], capture_output=True, text=True, check=True).stdout.strip()

    package, name = Path("lib/companion"), "notebooks/sa2vp.ipynb"
    (package / "__init__.py").write_text("VALUE = 1\n")
    git("init")
    git("add", "-A")
    git("commit", "-m", "first")
    facts = json.loads(unzip(packed)["run.json"])
    facts |= {"commit": git("rev-parse", "HEAD"), "code": code_hash([name, *sources(name, package)], package)}
    (package / "__init__.py").write_text("VALUE = 2\n")
    git("commit", "-am", "second")
    old = zipped(tmp_path / "old.zip", unzip(packed), facts)
    assert f"commit {facts['commit'][:10]}" in adopt.adopt(old, only_check=True)
    with pytest.raises(CorruptFile, match="code: "):
        adopt.adopt(zipped(tmp_path / "none.zip", unzip(packed), facts | {"commit": git("rev-parse", "HEAD")}))


def test_what_is_no_run_is_not_packed(run: Path, tmp_path: Path) -> None:
    with pytest.raises(CorruptFile, match=r"run\.json"):
        archives.pack(tmp_path, tmp_path / "a.zip")
    with pytest.raises(BadParameter, match="letters"):
        archives.pack(run, tmp_path / "a.zip", "<b>")
    facts, measured = (run / "run.json").read_text(), (run / "measured.csv").read_text()
    try:
        (run / "run.json").write_text(json.dumps(json.loads(facts) | {"parameters": {"dry_run": True}}))
        with pytest.raises(BadParameter, match="dry run"):
            archives.pack(run, tmp_path / "a.zip")
        (run / "run.json").write_text(facts)
        (run / "measured.csv").write_text(measured.replace("5", "6"))
        with pytest.raises(CorruptFile, match=r"measured\.csv"):
            archives.pack(run, tmp_path / "a.zip")
    finally:
        (run / "run.json").write_text(facts)
        (run / "measured.csv").write_text(measured)
    assert not (tmp_path / "a.zip").exists()


# --- damaged: the form ------------------------------------------------------------------------------------------------


def with_entry(name: str, text: str = "x", mode: int = stat.S_IFREG) -> Callable[[Path], None]:
    def damage(file: Path) -> None:
        entry = zipfile.ZipInfo(name)
        entry.external_attr = (mode | 0o644) << 16
        with zipfile.ZipFile(file, "a", zipfile.ZIP_DEFLATED) as packed:
            packed.writestr(entry, text, zipfile.ZIP_DEFLATED)

    return damage


def changed(name: str, change: Callable[[str], str]) -> Callable[[Path], None]:
    """Another text of a file, whose hash in the record stays."""

    def damage(file: Path) -> None:
        files = unzip(file)
        zipped(file, files | {name: change(files[name])})

    return damage


def rehashed(name: str, change: Callable[[str], str]) -> Callable[[Path], None]:
    """Another text of a file, and its hash."""

    def damage(file: Path) -> None:
        files = unzip(file)
        zipped(file, files | {name: change(files[name])}, json.loads(files["run.json"]))

    return damage


def recorded(**facts: object) -> Callable[[Path], None]:
    """Another record."""

    def damage(file: Path) -> None:
        files = unzip(file)
        zipped(file, files, json.loads(files["run.json"]) | facts)

    return damage


def given(**parameters: object) -> Callable[[Path], None]:
    """Other parameters in the record."""

    def damage(file: Path) -> None:
        files = unzip(file)
        facts = json.loads(files["run.json"])
        zipped(file, files, facts | {"parameters": facts["parameters"] | parameters})

    return damage


def without(name: str) -> Callable[[Path], None]:
    def damage(file: Path) -> None:
        files = unzip(file)
        del files[name]
        zipped(file, files)

    return damage


def flipped(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 255
    file.write_bytes(content)


def many(file: Path) -> None:
    for number in range(archives.FILES + 1):
        with_entry(f"tables/t{number}.csv")(file)


def measured(**columns: object) -> Callable[[Path], None]:
    """Other values in the measured row."""
    return rehashed("measured.csv", lambda text: pd.read_csv(io.StringIO(text)).assign(**columns).to_csv(index=False))


def shortened(file: Path) -> None:
    files = unzip(file)
    history = "".join(files["history/0.csv"].splitlines(keepends=True)[:11])
    zipped(file, files | {"history/0.csv": history}, json.loads(files["run.json"]) | {"steps": [10]})


def counted(items: int) -> Callable[[Path], None]:
    def damage(file: Path) -> None:
        files = unzip(file)
        facts = json.loads(files["run.json"])
        facts["data"]["vtab/svhn"]["test"]["items"] = items
        zipped(file, files, facts)

    return damage


def untrained(file: Path) -> None:
    files = unzip(file)
    del files["history/0.csv"]
    zipped(file, files, json.loads(files["run.json"]) | {"steps": []})


def another_cell(text: str) -> str:
    notebook = json.loads(text)
    cell = next(cell for cell in notebook["cells"][5:] if cell["cell_type"] == "code")
    cell["source"] += "\nscore = 99"
    return json.dumps(notebook)


NOISE = random.Random(0).randbytes(archives.LARGEST + 1)
FORGED: dict[str, tuple[Callable[[Path], object], str]] = {
    "not there": (Path.unlink, "no such file"),
    "empty": (lambda file: file.write_bytes(b""), "no archive"),
    "a text": (lambda file: file.write_text("<html>not found</html>"), "no archive"),
    "cut off": (lambda file: file.write_bytes(file.read_bytes()[:-60]), "no archive"),
    "a flipped byte": (flipped, "no archive"),
    "too large": (lambda file: file.write_bytes(NOISE), "at most 1,000,000"),
    "a bomb": (with_entry("tables/zeros.csv", "0" * (archives.UNPACKED + 1)), "bytes unpacked"),
    "too many files": (many, "more than 200 files"),
    "a link": (with_entry("tables/link.csv", "/etc/passwd", stat.S_IFLNK), "a link"),
    "a path outside": (with_entry("../run.json"), "no file of an archive"),
    "an absolute path": (with_entry("/tmp/x.csv"), "no file of an archive"),
    "a pickle": (with_entry("weights.pkl"), "no file of an archive"),
    "a script": (with_entry("tables/setup.py"), "no file of an archive"),
    "a file twice": (with_entry("measured.csv"), "a second one"),
    "nothing measured": (without("measured.csv"), "without measured.csv"),
    "no record": (without("run.json"), "without run.json"),
    "a file less": (without("history/0.csv"), "history/0.csv is missing"),
    "a file more": (with_entry("tables/more.csv", "a\n1\n"), "tables/more.csv"),
    "an edited score": (changed("measured.csv", lambda text: text.replace("vtab/svhn,0", "vtab/svhn,1")), "hashed"),
    "no JSON": (changed("run.json", lambda text: text[:-2]), "strict JSON"),
    "NaN": (changed("run.json", lambda text: text.replace('"seconds": ', '"seconds": NaN, "x": ')), "strict JSON"),
    "a key twice": (changed("run.json", lambda text: text.replace("{", '{"slug": "bat", ', 1)), "a key stands twice"),
    "a list": (changed("run.json", lambda text: f"[{text}]"), "no JSON object"),
    "deep JSON": (changed("run.json", lambda text: "[" * 100_000), "strict JSON"),
    "a text for a number": (recorded(seconds="1"), "seconds of the right type"),
    "steps that are texts": (recorded(steps=["100"]), "another type"),
    "counts that are texts": (recorded(data={"vtab/svhn": {"test": {"items": "40", "labels": []}}}), "another type"),
    "a list for a data set": (recorded(data={"vtab/svhn": [1]}), "another type"),
    "cells that are none": (rehashed("notebook.ipynb", lambda text: '{"cells": [1]}'), "another type"),
    "a key more": (recorded(user="someone"), "user, which no record has"),
    "a folder": (recorded(device="GPU of /home/someone/data"), "holds a path"),
    "a ragged CSV": (rehashed("measured.csv", lambda text: text + "1\n"), "strict CSV"),
    "a column twice": (rehashed("measured.csv", lambda text: text.replace("seed", "method")), "strict CSV"),
    # --- forged: the content, with hashes that are right
    "another paper": (recorded(slug="vgg"), "none of bat"),
    "a dry run": (given(dry_run=True), "dry run"),
    "a pocket run": (given(profile="pocket"), "`paper` profile"),
    "an unknown parameter": (given(cheat=True), "cheat"),
    "an unknown method": (given(method="SA2VPP"), "SA2VPP"),
    "markup for a name": (recorded(by="<script>"), "by: "),
    "a role of the site for a GPU": (recorded(device="{download}`run.json`"), "device: "),
    "tomorrow": (recorded(date="2999-01-01"), "date: "),
    "no day": (recorded(date="yesterday"), "date: "),
    "other code": (recorded(code="0" * 64), "code: 000000"),
    "code that a shell would run": (recorded(code="0" * 64, commit="--output=x"), "code: 000000"),
    "an edited notebook": (rehashed("notebook.ipynb", another_cell), "notebook.ipynb: its code"),
    "other data": (counted(41), "41 items in test, and 40"),
    "data of another name": (recorded(data={"vtab/dtd": {}}), "of vtab/dtd"),
    "no data": (recorded(data={"vtab/svhn": {}}), "None items"),
    "another set's row": (measured(dataset="vtab/dtd"), "other parameters"),
    "another seed's row": (measured(seed=3), "other parameters"),
    "a dry run's row": (measured(dry_run=True), "rows of a dry run"),
    "a row twice": (rehashed("measured.csv", lambda text: text + text.splitlines()[1] + "\n"), "a row twice"),
    "no published cell": (measured(backbone="vit_l16"), "other parameters"),
    "too good": (measured(accuracy=97.0), "too good"),
    "more than all": (measured(accuracy=100.5), "possible are"),
    "less than chance": (measured(accuracy=12.0), "possible are 50"),
    "no number": (measured(accuracy="good"), "no number"),
    "infinite": (measured(accuracy="inf"), "no number"),
    "a training of ten steps": (shortened, "10 steps, and the published"),
    "no training": (untrained, "0 steps"),
    "trainings that are not told": (recorded(steps=[100, 100]), "of 1 trainings"),
    "steps that are not there": (recorded(steps=[150]), "not the thinned history"),
    "a loss that is NaN": (rehashed("history/0.csv", lambda text: text.rpartition(",")[0] + ",nan\n"), "no number"),
    "steps out of order": (rehashed("history/0.csv", lambda text: text.replace("\n3,", "\n1,")), "not the thinned"),
}  # fmt: skip


@pytest.mark.parametrize("name", FORGED)
def test_what_does_not_hold_is_refused_and_nothing_is_kept(packed: Path, name: str) -> None:
    forge, words = FORGED[name]
    forge(packed)
    with pytest.raises(CompanionError, match=r"run\.zip") as error:
        adopt.adopt(packed)
    assert words in str(error.value), error.value
    assert not Path("reports").exists()


def test_the_same_run_is_not_counted_twice(packed: Path) -> None:
    adopt.adopt(packed)
    recorded(by="Another Person", date="2026-01-02")(packed)
    with pytest.raises(CorruptFile, match="the same run"):
        adopt.adopt(packed)


def test_all_that_is_wrong_is_said(packed: Path) -> None:
    files = unzip(packed)
    facts = json.loads(files["run.json"]) | {"code": "1" * 64, "steps": [3]}
    zipped(packed, files | {"measured.csv": files["measured.csv"].replace("linear probing", "SA²VP")}, facts)
    with pytest.raises(CorruptFile) as error:
        adopt.adopt(packed)
    assert all(part in str(error.value) for part in ("code: 1111", "history/0.csv", "other parameters"))

"""`make reports` in a small workspace: what runs, what does not run again, what a failure or a kill leaves behind."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

ROOT = Path(__file__).resolve().parent.parent
PARAMETERS = "profile = 'pocket'  # scale\nseed = 0  # of the run\nout = ''  # folder of the results"
WRITES = """
import json, os
os.makedirs(out, exist_ok=True)
with open(f"{out}/claims.json", "w") as file:
    json.dump([profile, os.environ.get("OMP_NUM_THREADS")], file)
"""


class Workspace:
    """A checkout in small: the real Snakefile and provenance, three notebooks, and a site of one line."""

    def __init__(self, folder: Path, root: Path):
        self.folder = folder
        for name in (".gitignore", "Makefile", "Snakefile", "pyproject.toml"):
            shutil.copy(root / name, folder / name)
        package = folder / "lib" / "companion"
        package.mkdir(parents=True)
        for name in ("__init__", "errors", "ops/__init__", "ops/batch", "ops/files", "ops/papers", "ops/provenance"):
            (package / f"{name}.py").parent.mkdir(exist_ok=True)
            shutil.copy(root / "lib" / "companion" / f"{name}.py", package / f"{name}.py")
        for name in ("one", "two"):
            (package / f"{name}.py").write_text("VALUE = 1\n", encoding="utf-8")
        (folder / "site").mkdir()
        (folder / "site" / "build.py").write_text(
            "import pathlib, sys\nout = pathlib.Path(sys.argv[-1])\nout.mkdir(parents=True, exist_ok=True)\n"
            "(out / 'index.html').write_text('site')\n",
            encoding="utf-8",
        )
        (folder / "notebooks").mkdir()

    def notebook(self, name: str, *cells: str) -> None:
        parameters = new_code_cell(PARAMETERS)
        parameters.metadata["tags"] = ["parameters"]
        cells = [new_markdown_cell(f"# {name}"), parameters, *map(new_code_cell, (WRITES, *cells))]
        kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
        nbformat.write(new_notebook(cells=cells, metadata={"kernelspec": kernel}), self.path(f"notebooks/{name}.ipynb"))

    def path(self, name: str) -> Path:
        return self.folder / name

    def start(self, command: tuple[str, ...] = ()) -> subprocess.Popen[str]:
        outer = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")}
        return subprocess.Popen(
            # no INSTALLED: the packages are those that run this test
            command or ("make", "reports", f"BIN={shlex.quote(sys.executable)}", "INSTALLED="),
            cwd=self.folder,
            env={**outer, "PYTHONPATH": str(self.folder / "lib"), "MPLBACKEND": "agg"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def run(self, *command: str) -> tuple[int, str, set[str]]:
        """Exit status, everything printed, and the names of the steps that were started."""
        process = self.start(command)
        text, _ = process.communicate(timeout=120)
        # side by side, jobs may begin a line in another's; a failed one's shell script is quoted, and is no start
        names = "|".join(["site", r"slides \d+", *(path.stem for path in self.path("notebooks").glob("*.ipynb"))])
        return process.returncode, text, set(re.findall(rf'(?<!")((?:{names})(?:/[\w=]+)?): started', text))


@pytest.fixture
def workspace(tmp_path: Path, root: Path) -> Workspace:
    folder = tmp_path / "a checkout"  # with a space, as people's folders have
    folder.mkdir()
    return Workspace(folder, root)


def test_only_what_changed_reruns(workspace: Workspace) -> None:
    workspace.notebook("first", "import companion.one\nprint(companion.one.VALUE)")
    workspace.notebook("second", "from companion import two")
    committed = workspace.path("reports/pocket/first/claims.json")
    committed.parent.mkdir(parents=True)
    committed.write_text("[]", encoding="utf-8")
    author = ("-c", "user.name=a", "-c", "user.email=a@b.c")
    for words in (("init", "-q"), ("add", "."), (*author, "commit", "-q", "-m", "a checkout")):
        subprocess.run(["git", *words], cwd=workspace.folder, check=True)
    status, text, started = workspace.run()
    assert status == 0, text
    assert started == {"first", "second", "site"}
    status = subprocess.run(["git", "status", "--short"], cwd=workspace.folder, capture_output=True, text=True)
    assert (status.stdout, status.stderr) == ("", "")
    assert len([line for line in text.splitlines() if "first" in line]) == 2, text  # started, done in N s
    executed = workspace.path("build/reports/pocket/first/first.ipynb").read_text(encoding="utf-8")
    assert str(workspace.folder) not in executed
    threads = min(4, max(1, len(os.sched_getaffinity(0)) // 2))  # two notebooks share the cores
    assert json.loads(workspace.path("build/reports/pocket/first/claims.json").read_text()) == ["pocket", str(threads)]

    status, text, started = workspace.run()
    assert (status, text, started) == (0, "reports/site/index.html is up to date\n", set())

    workspace.path("lib/companion/one.py").write_text("VALUE = 2\n", encoding="utf-8")
    assert workspace.run()[2] == {"first", "site"}

    # as in a fresh clone, where the records are there but no executed notebook
    workspace.path("build/reports/pocket/second/second.ipynb").unlink()
    assert workspace.run()[2] == {"second", "site"}

    study = workspace.path("reports/pocket/second/study.csv")
    study.parent.mkdir(parents=True)
    study.write_text("method,seed\n", encoding="utf-8")
    assert workspace.run()[2] == {"second", "site"}
    assert study.exists()


def test_one_failure_stops_neither_the_others_nor_takes_the_record(workspace: Workspace) -> None:
    workspace.notebook("bad", "import companion.one", "raise ValueError('the reason')")
    workspace.notebook("good", "import companion.two")
    record = workspace.path("build/reports/pocket/bad/run.json")
    record.parent.mkdir(parents=True)
    record.write_text("{}", encoding="utf-8")
    status, text, _ = workspace.run()
    assert status != 0
    assert "ValueError: the reason" in text
    assert "bad: FAILED" in text
    assert workspace.path("build/reports/pocket/good/good.ipynb").exists()
    assert not workspace.path("build/reports/pocket/bad/bad.ipynb").exists()
    assert "the reason" in workspace.path("build/pocket/bad.ipynb").read_text(encoding="utf-8")
    assert not workspace.path("reports/site/index.html").exists()
    assert record.exists()

    workspace.notebook("bad", "import companion.one")
    status, text, started = workspace.run()
    assert (status, started) == (0, {"bad", "site"}), text


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_a_killed_run_leaves_nothing_that_looks_finished(workspace: Workspace, how: signal.Signals) -> None:
    workspace.notebook("long", "import time\nopen('running', 'w').close()\ntime.sleep(100)")
    process = workspace.start()
    deadline = time.monotonic() + 60
    while not workspace.path("running").exists():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
        time.sleep(0.1)
    os.killpg(process.pid, how)
    process.communicate(timeout=60)
    assert not workspace.path("build/reports/pocket/long/long.ipynb").exists()

    workspace.notebook("long", "x = 1")
    status, text, started = workspace.run()
    if how == signal.SIGKILL:  # Snakemake cannot know that nobody works here any more, and says what to do
        assert status != 0 and "--unlock" in text
        workspace.run(sys.executable, "-m", "snakemake", "--unlock")
        status, text, started = workspace.run()
    assert (status, started) == (0, {"long", "site"}), text


def test_a_notebook_that_is_not_python_is_named(workspace: Workspace) -> None:
    workspace.notebook("first", "def broken(")
    status, text, _ = workspace.run()
    assert status != 0
    assert "first.ipynb" in text and "code cell 3" in text


def test_more_parameters_reach_the_notebook_and_count(workspace: Workspace) -> None:
    workspace.notebook("first")
    target = "reports/paper/first/first.ipynb"

    def run(parameters: str) -> tuple[int, set[str]]:
        config = ("--config", "profile=paper", f"parameters={parameters}", "--", target)
        status, _, started = workspace.run(sys.executable, "-m", "snakemake", "--cores", "1", *config)
        return status, {name for name in started if name == "first"}

    assert run("-p seed 3") == (0, {"first"})
    assert "seed = 3" in workspace.path(target).read_text(encoding="utf-8")
    assert run("-p seed 3") == (0, set())
    assert run("-p seed 4") == (0, {"first"})


def test_features_of_slides_are_made_in_parts(workspace: Workspace) -> None:
    workspace.notebook("one")
    stub = "import sys\nprint(sys.argv[1:])\nsys.exit('--part 1/3' in ' '.join(sys.argv) and {fails})\n"
    workspace.path("lib/companion/cli.py").write_text(stub.format(fails="'the reason'"), encoding="utf-8")
    words = [
        sys.executable,
        "-m",
        "snakemake",
        "--cores",
        "2",
        "--keep-going",
        "--quiet",
        "all",
        "--config",
        "parts=3",
        "slides=slides/panda --data-root /data",
        "--",
        "features",
    ]
    status, text, started = workspace.run(*words)
    assert status != 0 and "the reason" in text and len(started) == 3
    assert "'slides/panda', '--data-root', '/data', '--part', '0/3'" in workspace.path(
        "build/slides/0-of-3.log"
    ).read_text(encoding="utf-8")
    # the part that failed is run again, alone
    workspace.path("lib/companion/cli.py").write_text(stub.format(fails="0"), encoding="utf-8")
    assert workspace.run(*words)[2] == {"slides 1/3"}
    assert workspace.run(*words)[2] == set()


GRID = """
parameters: {seed: 5}
runs:
- {paper: good, seed: [0, 1]}
- {paper: bad, seed: [0, 1]}
"""


def test_a_grid_runs_what_it_lists_and_one_failure_is_told_in_the_summary(workspace: Workspace) -> None:
    workspace.notebook("good", "import companion.one\nprint(seed)")
    workspace.notebook("bad", "import companion.two\nif seed == 1:\n    raise ValueError('seed one\\nmore')")
    workspace.path("grid.yaml").write_text(GRID, encoding="utf-8")
    shutil.copytree(ROOT / "profiles", workspace.path("profiles"))
    command = (sys.executable, "-m", "snakemake", "--profile", "profiles/local", "--configfile", "grid.yaml")

    status, text, started = workspace.run(*command, "--dry-run")
    assert (status, started) == (0, set()), text
    assert text.count("rule run:") == 4 and not workspace.path("reports").exists()

    status, text, started = workspace.run(*command)
    assert status != 0
    assert started == {f"{paper}/seed={seed}" for paper in ("good", "bad") for seed in (0, 1)}
    assert "3 done, 1 failed" in text and "bad/seed=1  ValueError: seed one" in text
    summary = workspace.path("reports/pocket/summary.csv").read_text(encoding="utf-8")
    assert [line.split(",")[0] for line in summary.splitlines()[1:]] == ["good", "good", "bad", "bad"]
    assert workspace.path("reports/pocket/good/seed=1/good.ipynb").exists()
    assert not workspace.path("reports/pocket/bad/seed=1/bad.ipynb").exists()
    assert "seed one" in workspace.path("build/pocket/bad/seed=1.ipynb").read_text(encoding="utf-8")

    workspace.path("lib/companion/one.py").write_text("VALUE = 2\n", encoding="utf-8")
    assert workspace.run(*command)[2] == {"good/seed=0", "good/seed=1", "bad/seed=1"}

    grid = GRID.replace("- {paper: bad, seed: [0, 1]}", "- {paper: bad, seed: [0]}").replace("[0, 1]", "[1, 2]")
    workspace.path("grid.yaml").write_text(grid, encoding="utf-8")
    status, text, started = workspace.run(*command)
    assert (status, started) == (0, {"good/seed=2"}), text
    assert "3 done;" in text


def test_a_bad_grid_is_told_before_anything_runs(workspace: Workspace) -> None:
    workspace.notebook("good")
    workspace.path("grid.yaml").write_text("runs: [{paper: goood}]", encoding="utf-8")
    status, text, started = workspace.run(
        sys.executable, "-m", "snakemake", "--cores", "1", "--configfile", "grid.yaml"
    )
    assert status != 0 and started == set()
    assert "Accepted: 'good'" in text
    for fields, said in (("run=x", "Accepted: 'profile', 'parameters', 'runs'"), ("papers=x", "papers = 'x'")):
        words = (sys.executable, "-m", "snakemake", "--cores", "1", "--config", fields)
        status, text, started = workspace.run(*words)
        assert status != 0 and started == set() and said in text


def test_a_study_chooses_rates_once_runs_its_seeds_apart_and_merges_them(workspace: Workspace) -> None:
    for name in ("one", "two"):
        workspace.notebook(name)
    studies = workspace.path("lib/companion/toy/ablations")
    studies.mkdir(parents=True)
    for name in ("__init__", "one", "two"):
        (studies / f"{name}.py").write_text("SEEDS = [3, 8]\n", encoding="utf-8")
    stub = (
        "import sys\nwords = ' '.join(sys.argv[1:])\nopen('said', 'a').write(words + '\\n')\n"
        "sys.exit('--seeds 8' in words and {})"
    )
    workspace.path("lib/companion/toy/ablation.py").write_text(stub.format("'the reason'"), encoding="utf-8")
    words = [
        sys.executable,
        "-m",
        "snakemake",
        "--cores",
        "2",
        "--keep-going",
        "--quiet",
        "all",
        "--config",
        "papers=one",
        "--",
        "studies",
    ]
    status, text, _ = workspace.run(*words)
    assert status != 0 and "the reason" in text
    said = workspace.path("said").read_text().splitlines()
    assert said[0] == "one build/study/one/rates --seeds --data build/study/one/data --workers 2"
    part = "--start build/study/one/rates --data build/study/one/data --workers 1"
    assert sorted(said[1:]) == [f"one build/study/one/seed{seed} --seeds {seed} {part}" for seed in (3, 8)]

    # as in a killed run: what is done stays, the rest continues
    workspace.path("lib/companion/toy/ablation.py").write_text(stub.format(0), encoding="utf-8")
    assert workspace.run(*words)[0] == 0
    parts = "build/study/one/seed3 build/study/one/seed8"
    assert workspace.path("said").read_text().splitlines()[3:] == [
        said[1 + ("--seeds 3" in said[1])],
        f"one reports/pocket/one --merge {parts}",
    ]
    assert workspace.run(*words)[0] == 0
    assert len(workspace.path("said").read_text().splitlines()) == 5

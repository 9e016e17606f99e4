"""`make reports` in a small workspace: which jobs run or rerun, and the state after a failure or a kill."""

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

from tests.conftest import ROOT, cores

PARAMETERS = "profile = 'pocket'  # scale\nseed = 0  # of the run\nout = ''  # folder of the results"
WRITES = """
import json, os
os.makedirs(out, exist_ok=True)
with open(f"{out}/claims.json", "w") as file:
    json.dump([profile, os.environ.get("OMP_NUM_THREADS")], file)
"""
SITE = """
import pathlib, sys
out = pathlib.Path(sys.argv[-1])
out.mkdir(parents=True, exist_ok=True)
(out / 'index.html').write_text('site')
"""


class Workspace:
    """A checkout in small: the real Snakefile and provenance, three notebooks, and a site of one line."""

    def __init__(self, folder: Path, root: Path):
        self.folder = folder
        for name in (".gitignore", "Makefile", "Snakefile", "pyproject.toml"):
            shutil.copy(root / name, folder / name)
        package = folder / "lib" / "companion"
        package.mkdir(parents=True)
        for name in (
            "__init__",
            "errors",
            "io/__init__",
            "io/files",
            "io/papers",
            "io/provenance",
            "runs/__init__",
            "runs/batch",
        ):
            (package / f"{name}.py").parent.mkdir(exist_ok=True)
            shutil.copy(root / "lib" / "companion" / f"{name}.py", package / f"{name}.py")
        (package / "models").mkdir()
        shutil.copy(root / "lib" / "companion" / "models" / "parameters.yaml", package / "models")
        self.write("site/build.py", SITE)
        for name in ("lib/companion/one.py", "lib/companion/two.py"):
            self.write(name, "VALUE = 1\n")
        (folder / "notebooks").mkdir()

    def notebook(self, name: str, *cells: str) -> None:
        parameters = new_code_cell(PARAMETERS)
        parameters.metadata["tags"] = ["parameters"]
        cells = [new_markdown_cell(f"# {name}"), parameters, *map(new_code_cell, (WRITES, *cells))]
        kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
        nbformat.write(new_notebook(cells=cells, metadata={"kernelspec": kernel}), self.path(f"notebooks/{name}.ipynb"))
        self.write(f"lib/companion/models/{name}/paper.yaml", "parameters: {}\n")

    def path(self, name: str) -> Path:
        return self.folder / name

    def read(self, name: str) -> str:
        return self.path(name).read_text(encoding="utf-8")

    def write(self, name: str, text: str) -> None:
        self.path(name).parent.mkdir(parents=True, exist_ok=True)
        self.path(name).write_text(text, encoding="utf-8")

    def start(self, command: tuple[str, ...] = ()) -> subprocess.Popen[str]:
        # what a calling make hands down is not this one's: its flags, and its choice of papers
        handed_down = ("MAKEFLAGS", "MAKELEVEL", "MFLAGS", "PAPERS")
        outer = {name: value for name, value in os.environ.items() if name not in handed_down}
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

    def snakemake(self, *words: str) -> tuple[int, str, set[str]]:
        """The same for Snakemake itself; words of one string are split, later ones are as they are."""
        return self.run(sys.executable, "-m", "snakemake", *shlex.split(words[0]), *words[1:])


@pytest.fixture
def workspace(tmp_path: Path, root: Path) -> Workspace:
    folder = tmp_path / "a checkout"  # with a space, as people's folders have
    folder.mkdir()
    return Workspace(folder, root)


def test_only_what_changed_reruns_and_git_tracks_no_output(workspace: Workspace) -> None:
    workspace.notebook("first", "import companion.one\nprint(companion.one.VALUE)")
    workspace.notebook("second", "from companion import two")
    workspace.notebook("third", "from companion import two")
    workspace.write("reports/pocket/first/claims.json", "[]")
    author = ("-c", "user.name=a", "-c", "user.email=a@b.c")
    for words in (("init", "-q"), ("add", "."), (*author, "commit", "-q", "-m", "a checkout")):
        subprocess.run(["git", *words], cwd=workspace.folder, check=True)
    status, text, started = workspace.run()
    assert (status, started) == (0, {"first", "second", "third", "site"}), text
    status = subprocess.run(["git", "status", "--short"], cwd=workspace.folder, capture_output=True, text=True)
    assert (status.stdout, status.stderr) == ("", "")
    assert str(workspace.folder) not in workspace.read("build/reports/pocket/first/first.ipynb")
    threads = min(4, max(1, cores() // 3))  # the notebooks share the cores
    assert json.loads(workspace.read("build/reports/pocket/first/claims.json")) == ["pocket", str(threads)]

    status, _, started = workspace.run()
    assert (status, started) == (0, set())

    workspace.write("lib/companion/one.py", "VALUE = 2\n")
    workspace.write("reports/real/third/study.csv", "method,seed\n")
    assert workspace.run()[2] == {"first", "third", "site"}
    for name in ("reports/bench/first.json", "reports/gpu/a.json", "notebooks/figures/first.jpg", "README.md"):
        workspace.write(name, "{}")
        assert workspace.run()[2] == {"site"}, name
    assert workspace.path("reports/real/third/study.csv").exists()
    workspace.write("lib/companion/two.py", "VALUE = 2\n")
    some = ("make", "reports", f"BIN={shlex.quote(sys.executable)}", "INSTALLED=", "PAPERS=second")
    assert workspace.run(*some)[2] == {"second", "site"}


@pytest.mark.slow
def test_a_killed_run_leaves_nothing_that_looks_finished(workspace: Workspace) -> None:
    workspace.notebook("long", "import time\nopen('running', 'w').close()\ntime.sleep(100)")
    process = workspace.start()
    deadline = time.monotonic() + 240
    while not workspace.path("running").exists():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate(timeout=60)
    assert not workspace.path("build/reports/pocket/long/long.ipynb").exists()

    workspace.notebook("long", "x = 1")
    status, text, _ = workspace.run()
    assert status != 0 and "--unlock" in text  # Snakemake cannot know that the lock is stale
    workspace.snakemake("--unlock")
    status, text, started = workspace.run()
    assert (status, started) == (0, {"long", "site"}), text


PARTS = "--cores 2 --keep-going --quiet all --config"


@pytest.mark.slow
def test_features_of_slides_are_made_in_parts_and_a_failed_part_alone_reruns(workspace: Workspace) -> None:
    workspace.notebook("one")
    stub = "import sys\nprint(sys.argv[1:])\nsys.exit('--part 1/3' in ' '.join(sys.argv) and {fails})\n"
    workspace.write("lib/companion/cli.py", stub.format(fails="'the reason'"))
    words = f"{PARTS} parts=3 'slides=slides/panda --data-root /data' -- features"
    status, text, started = workspace.snakemake(words)
    assert status != 0 and "the reason" in text and len(started) == 3
    given = "'slides/panda', '--data-root', '/data', '--part', '0/3'"
    assert given in workspace.read("build/slides/0-of-3.log")
    workspace.write("lib/companion/cli.py", stub.format(fails="0"))
    assert workspace.snakemake(words)[2] == {"slides 1/3"}


GRID = """
parameters: {seed: 5}
runs:
- {paper: good, seed: [0, 1]}
- {paper: bad, seed: [0, 1]}
"""


@pytest.mark.slow
def test_a_grid_runs_what_it_lists_and_its_summary_names_the_failure(workspace: Workspace) -> None:
    workspace.notebook("good", "import companion.one\nprint(seed)")
    workspace.notebook("bad", "import companion.two\nif seed == 1:\n    raise ValueError('seed one\\nmore')")
    workspace.write("grid.yaml", GRID)
    shutil.copytree(ROOT / "profiles", workspace.path("profiles"))
    command = "--profile profiles/local --configfile grid.yaml"
    status, text, started = workspace.snakemake(command)
    assert status != 0
    assert started == {f"{paper}/seed={seed}" for paper in ("good", "bad") for seed in (0, 1)}
    assert "seed one" in text
    summary = workspace.read("reports/pocket/summary.csv").splitlines()
    assert [line.split(",")[:3] for line in summary[1:]] == [
        ["good", "seed=0", "done"], ["good", "seed=1", "done"], ["bad", "seed=0", "done"], ["bad", "seed=1", "failed"]
    ]  # fmt: skip
    assert workspace.path("reports/pocket/good/seed=1/good.ipynb").exists()
    assert not workspace.path("reports/pocket/bad/seed=1/bad.ipynb").exists()

    workspace.write("lib/companion/one.py", "VALUE = 2\n")
    assert workspace.snakemake(command)[2] == {"good/seed=0", "good/seed=1", "bad/seed=1"}

    workspace.write("grid.yaml", "runs: [{paper: goood}]")
    status, text, started = workspace.snakemake(command)
    assert status != 0 and started == set() and "'good'" in text


@pytest.mark.slow
def test_the_profile_of_a_cluster_plans_the_grid(workspace: Workspace) -> None:
    pytest.importorskip("snakemake_executor_plugin_slurm", reason="the extra `cluster` is not installed")
    workspace.notebook("good")
    workspace.notebook("bad")
    workspace.write("grid.yaml", GRID)
    shutil.copytree(ROOT / "profiles", workspace.path("profiles"))
    status, text, started = workspace.snakemake("--profile profiles/slurm --configfile grid.yaml --dry-run")
    assert (status, started) == (0, set()), text
    assert text.count("rule run:") == 4 and not workspace.path("reports").exists()

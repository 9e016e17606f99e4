"""The grid on a real SLURM: one node on the loopback, two notebooks through sbatch, and their results."""

import contextlib
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT, cores
from tests.test_snakefile import Workspace

NEEDED = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "sinfo")
CONF = """
ClusterName=loopback
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MpiDefault=none
ReturnToService=2
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} RealMemory={memory} State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""
GRID = """
runs:
- {paper: good, seed: [0, 1]}
- {paper: bad}
"""


TRAINS = """
import torch
from torch.utils.data import TensorDataset
from companion.training.fit import fit
from companion.training.hardware import Hardware
from companion.training.schedules import adamw

data = TensorDataset(torch.randn(8, 3), torch.randn(8, 1))
loss = lambda model, batch: (model(batch[0]) - batch[1]).square().mean()
for devices in (1, 2):
    model, on = torch.nn.Linear(3, 1), Hardware("cpu", devices)
    history = fit(model, loss, data, epochs=1, batch=4, optimizer=adamw(0.1), hardware=on)
    print(f"{len(history)} steps on {devices}")
"""


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        opened = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [one.getsockname()[1] for one in opened]


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A cluster of one node, its daemons started here and stopped at the end."""
    monkeypatch.setenv("PATH", f"{os.environ['PATH']}{os.pathsep}/usr/sbin")
    if missing := [name for name in NEEDED if shutil.which(name) is None]:
        pytest.skip(f"no SLURM here ({', '.join(missing)}): install Debian's slurm-wlm and munge")
    if os.geteuid() != 0:
        pytest.skip("only root can start SLURM's node daemon")
    folder = tmp_path / "slurm"
    for name in ("state", "spool"):
        (folder / name).mkdir(parents=True)
    # munged wants a key that no other can read, and a path that no other can write
    key = folder / "munge.key"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o400)
    conf = folder / "slurm.conf"
    host, memory = socket.gethostname().split(".")[0], os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") >> 21
    facts = dict(host=host, ports=free_ports(2), folder=folder, cpus=cores(), memory=memory)
    conf.write_text(CONF.format(**facts), encoding="utf-8")
    (folder / "cgroup.conf").write_text("CgroupPlugin=disabled\n", encoding="utf-8")
    monkeypatch.setenv("SLURM_CONF", str(conf))
    # Snakemake submits jobs without SLURM's variables, and a cluster has its settings below /etc: this one does not
    srun = folder / "bin" / "srun"
    srun.parent.mkdir()
    srun.write_text(f'#!/bin/sh\nSLURM_CONF={conf} exec {shutil.which("srun")} "$@"\n', encoding="utf-8")
    srun.chmod(0o755)
    monkeypatch.setenv("PATH", f"{srun.parent}{os.pathsep}{os.environ['PATH']}")
    files = [f"--{name}-file={folder}/munge.{name}" for name in ("key", "pid", "log", "seed")]
    daemons = [
        ("munged", "--foreground", "--force", f"--socket={folder}/munge.socket", *files),
        ("slurmctld", "-D", "-i", "-f", conf),
        ("slurmd", "-D", "-f", conf),
    ]
    started = []
    try:
        for words in daemons:
            with (folder / f"{words[0]}.out").open("w") as out:
                started.append(subprocess.Popen(words, stdout=out, stderr=subprocess.STDOUT))
            time.sleep(0.5)
        deadline = time.monotonic() + 60
        while subprocess.run(["sinfo", "-h", "-o", "%T"], capture_output=True, text=True).stdout.strip() != "idle":
            logs = "\n".join(path.read_text(errors="replace")[-2000:] for path in folder.glob("*.[lo][ou][gt]"))
            assert time.monotonic() < deadline, f"the node did not come up:\n{logs}"
            time.sleep(0.5)
        yield folder
    finally:
        for process in reversed(started):
            process.terminate()
            process.wait(timeout=30)


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    pytest.importorskip("snakemake_executor_plugin_slurm", reason="the extra `cluster` is not installed")
    folder = tmp_path / "a checkout"
    folder.mkdir()
    workspace = Workspace(folder, ROOT)
    job = "import os, subprocess, sys\nprint('job', os.environ['SLURM_JOB_ID'], 'tasks', os.environ['SLURM_NTASKS'])"
    trains = f"""
found = subprocess.run(
    [sys.executable, "-c", {TRAINS!r}],
    env=os.environ | {{"PYTHONPATH": {str(ROOT / "lib")!r}}},
    capture_output=True,
    text=True,
)
assert found.returncode == 0, found.stderr[-2000:]
print("seed", seed, found.stdout)
"""
    workspace.notebook("good", job + trains)
    workspace.notebook("bad", "raise ValueError('the reason')")
    workspace.write("grid.yaml", GRID)
    shutil.copytree(ROOT / "profiles", workspace.path("profiles"))
    return workspace


COMMAND = (
    "--profile profiles/slurm --configfile grid.yaml --slurm-no-account --slurm-status-command squeue "
    "--slurm-init-seconds-before-status-checks 3"
)


@pytest.mark.slow
def test_a_grid_runs_on_a_cluster(workspace: Workspace, cluster: Path) -> None:
    status, text, _ = workspace.snakemake(COMMAND)
    assert status != 0 and "the reason" in text
    for seed in (0, 1):
        executed = workspace.read(f"reports/pocket/good/seed={seed}/good.ipynb")
        assert all(text in executed for text in (f"seed {seed}", "job ", "2 steps on 1", "2 steps on 2"))
    assert not workspace.path("reports/pocket/bad/run/bad.ipynb").exists()

    workspace.notebook("bad", "x = 1")
    status, text, _ = workspace.snakemake(COMMAND)
    assert status == 0 and workspace.path("reports/pocket/bad/run/bad.ipynb").exists(), text

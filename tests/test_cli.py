"""The `companion` command: missing files are listed, checkpoints compared, only verified runs imported."""

import json
import os
import shutil
import signal
import subprocess
import sys

import nbformat
import pandas as pd
import psutil
import pytest
import torch

from companion import cli, data
from companion.io import record
from companion.io.files import write_json
from companion.io.papers import paper
from companion.runs import batch, needs
from tests.conftest import ROOT, kill_when
from tests.papers import bat
from tests.parity.runner import ROOT as CASES
from tests.parity.runner import Case


def call(capture, *words) -> tuple[int, str, str]:
    code = cli.main([str(w) for w in words])
    said = capture.readouterr()
    return code, said.out, said.err


# --- requirements -----------------------------------------------------------------------------------------------------


def test_doctor_names_missing_data_and_weights_and_accepted_values(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    code, out, _ = call(capsys, "doctor", "sa2vp", "--data-root", tmp_path)
    assert code == 1
    for name in ("0 of 19", "vit_base_patch16_224.orig_in21k", "train800val200", "aligned | padded", "vtab/svhn"):
        assert name in out
    code, out, _ = call(capsys, "doctor", "bat", "--data-root", tmp_path, "--gpu", "T4", "--precision", "16-mixed")
    assert code == 1 and "OSTrack_ep0300.pth.tar" in out and "rgbe/visevent" in out and "65 TFLOP/s" in out
    products = "312 TFLOP/s at 16-mixed"  # its precision is 32-true, its products are nearly all CLIP's
    assert products in " ".join(
        call(capsys, "doctor", "promptpar", "--data-root", tmp_path, "--gpu", "A100")[1].split()
    )
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "BAT_rgbt.pth").write_bytes(b"x")
    assert "BAT_rgbt.pth (MIT): here" in call(capsys, "doctor", "bat", "--data-root", tmp_path)[1]


@pytest.mark.parametrize(
    ("card", "known"),
    [
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA RTX A1000", "A100"),
        ("NVIDIA T400 4GB", "A100"),
        ("Tesla T4", "T4"),
        ("NVIDIA L40S", "L40S"),
    ],
)
def test_doctor_knows_a_gpu_by_its_whole_name(card, known, capsys, tmp_path, monkeypatch):
    for name, value in (("is_available", True), ("mem_get_info", (16e9, 16e9)), ("get_device_name", card)):
        monkeypatch.setattr(torch.cuda, name, lambda *given, value=value: value)
    out = call(capsys, "doctor", "dplq", "--data-root", tmp_path)[1]
    assert f"h on one {known} " in out


def test_doctor_reads_what_is_there_and_says_how_a_step_is_divided(capsys, tmp_path, monkeypatch):
    """Counts and a decoded item; a frame in the middle that is none; devices that do not divide the batch; hours by a
    step that a dry run measured."""
    bat.write("rgbt/lasher", tmp_path, monkeypatch)
    monkeypatch.setattr(record, "root", lambda: tmp_path)
    step = {"images": 10, "seconds": 0.36, "device": "a GPU"}
    write_json(tmp_path / "runs/paper/bat/dry_run/step.json", step)
    words = ("doctor", "bat", "--data-root", tmp_path, "--devices", 5)
    monkeypatch.setattr(needs, "_free", lambda: 3.4e9)
    out = " ".join(call(capsys, *words)[1].split())
    (lasher,) = (run for run in paper("bat")["runs"] if run["id"] == "lasher")
    wanted = needs.memory("bat", lasher, "32-true", "cpu")[0]
    assert (
        f"memory {wanted:.3g} GB needed for a step of 96 images at 32-true" in out and "3 GB free (no GPU here)" in out
    )
    assert f"disk {lasher['disk_gb']} GB of data, {needs.disk('bat', lasher):.3g} GB in `out`" in out
    assert "train: ready: 1 videos, 24 frame pairs, an item of 24 x 32 x 6 val: ready: 1" in out
    assert "96 images a step = 32 images x 3 devices" in out and "WARNING: 5 devices x 1 parts" in out
    assert "36.0 h of training by the last dry run: 0.36 s for a step of 10 images on a GPU" in out  # 60 x 60,000 pairs
    for path in tmp_path.rglob("TestingSet/*/*/visible/v000.png"):
        path.write_bytes(b"")
    out = call(capsys, *words[:-1], 4)[1]
    assert "v000.png" in out and "at once 24 = 96 / (4 devices x 1 parts)" in " ".join(out.split())


def test_run_prints_the_tables_of_this_run_alone(capsys, tmp_path, monkeypatch):
    """What Snakemake measures now, not what an earlier run left."""
    monkeypatch.setattr(record, "root", lambda: tmp_path)
    grid = tmp_path / "reports/paper/bat/grid.csv"
    keys = {"method": "BAT", "weights": "trained here", "dataset": "rgbt/lasher", "seed": 0}

    def measure(words, folder):
        grid.parent.mkdir(parents=True, exist_ok=True)
        pd.DataFrame([keys | {"PR": 71.25}]).to_csv(grid, index=False)
        return 0

    words = ("run", "bat", "lasher", "--data-root", tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    monkeypatch.setattr(batch, "run_group", measure)
    assert "71.25" in call(capsys, *words)[1]
    os.utime(grid, (0, 0))
    monkeypatch.setattr(batch, "run_group", lambda words, folder: 0)
    assert "71.25" not in call(capsys, *words)[1]
    asked = json.loads((tmp_path / "build/runs/bat, lasher.json").read_text())
    assert asked["runs"][0]["dataset"] == ["rgbt/lasher"] and call(capsys, "run", "bat", "no table")[0] == 2


SNAKEFILE = """
import sys
rule all:
    shell: "{sys.executable} -m papermill long.ipynb out.ipynb -k python3 --no-progress-bar"
"""


def test_run_ends_with_all_that_it_started(tmp_path):
    """SIGTERM, as a batch system sends it: Snakemake, papermill and the kernel."""
    (tmp_path / "lib" / "companion").mkdir(parents=True)
    (tmp_path / "pyproject.toml").touch()
    (tmp_path / "Snakefile").write_text(SNAKEFILE)
    shutil.copytree(ROOT / "profiles", tmp_path / "profiles")
    cell = nbformat.v4.new_code_cell("import time\nopen('running', 'w').close()\ntime.sleep(600)")
    nbformat.write(nbformat.v4.new_notebook(cells=[cell]), tmp_path / "long.ipynb")
    words = [sys.executable, "-m", "companion.cli", "run", "bat", "lasher", "--data-root", str(tmp_path)]
    process, started = subprocess.Popen(words, cwd=tmp_path), []

    def running():
        started[:] = psutil.Process(process.pid).children(recursive=True)
        return (tmp_path / "running").exists()

    kill_when(process, running, signal.SIGTERM)
    _, left = psutil.wait_procs(started, timeout=20)
    for one in left:
        one.kill()
    assert len(started) > 2 and not left


def test_data_lists_every_set_also_to_a_reader_who_leaves(capsys, tmp_path):
    code, out, _ = call(capsys, "data", "--data-root", tmp_path)
    assert code == 0 and all(name in out for name in ("fgvc/nabirds", "vtab/kitti_distance", "rgbt/lasher"))
    command = f"{sys.executable} -m companion.cli data --data-root {tmp_path} | head -1"
    said = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    assert len(said.stdout.splitlines()) == 1 and said.stderr == ""


def test_fetch_takes_the_data_set_that_is_named(capsys, tmp_path, monkeypatch):
    fetched = []
    monkeypatch.setattr(data, "fetch", lambda name, root: fetched.append(name))
    monkeypatch.setattr(cli, "_weights", lambda *given: [])
    assert call(capsys, "fetch", "sa2vp", "--dataset", "hta/cifar10")[0] == 0 and fetched == ["hta/cifar10"]
    code, _, error = call(capsys, "fetch", "sa2vp", "--dataset", "remote/aid")
    assert code == 2 and "remote/aid" in error and "hta/cifar10" in error


def test_the_memory_of_a_step_is_that_of_all_its_images_and_hours_count_training_and_test(monkeypatch, tmp_path):
    counted = "bat: {lasher: {fixed_gb: 2.0, image_gb: 0.5, image_half_gb: 0.25, images: 8}}"
    (tmp_path / "memory.yaml").write_text(counted, encoding="utf-8")
    monkeypatch.setattr(needs, "MODELS", tmp_path)
    run = {"id": "lasher", "memory_gb": 77}
    found = [needs.memory("bat", run, precision)[0] for precision in ("32-true", "16-mixed", "bf16-mixed")]
    assert [needs.peak("A100", precision) for precision in ("16-mixed", "tf32", "32-true")] == [312, 156, 19.5]
    assert found == [6.0, 4.0, 4.0] and needs.memory("bat", run | {"id": "another"}, "32-true")[0] == 77
    # a CPU computes in float32
    assert needs.memory("bat", run, "16-mixed", "cpu", 4)[0] == (2 + 4 * 0.5) * needs.CPU_COPIES
    assert needs.disk("bat", run | {"out_gb": 16}) == 20 and needs.disk("bat", run | {"id": "another"}) == 0
    run = {"data": "rgbt/lasher", "images": {"train": 1000, "test": 500}, "epochs": 2, "gflop": 10}
    flop = 10e9 * (3 * 1000 * 2 + 500)
    assert needs.hours(run, 100) == pytest.approx((flop / (0.3 * 100e12) / 3600, flop))


def test_wrong_calls_name_what_is_accepted(capfd, tmp_path):
    (tmp_path / "file").write_text("")
    for words, said in (
        (("doctor", "nothing"), "sa2vp"),
        (("parity", "sa2vp", "--case", "nothing"), "tiny_vit_full"),
        (("parity", "vgg", "--recipe"), "sa2vp"),
        (("fetch", "sa2vp", "--data-root", tmp_path / "file"), str(tmp_path / "file")),
    ):
        code, _, err = call(capfd, *words)
        assert code == 2 and said in err, words


# --- parity -----------------------------------------------------------------------------------------------------------


def test_a_paper_without_recorded_cases_of_its_recipe_is_said_to_have_none(capfd):
    code, _, err = call(capfd, "parity", "dmt", "--recipe")
    assert code == 1 and "dmt/<case>/case.json" in err


def test_parity_of_a_changed_and_an_unreadable_checkpoint(capfd, tmp_path):
    state = {n: t.clone() for n, t in Case(CASES / "sa2vp" / "tiny_vit_full").state.items()}
    state["vit_base.transformer.encoder.layer.8.attn.value.weight"] += 0.1
    torch.save(state, tmp_path / "changed.pth")
    (tmp_path / "broken.pth").write_bytes(b"PK")
    for name, said in (("changed.pth", "image_tokens_into_block9"), ("broken.pth", "broken.pth")):
        code, out, err = call(capfd, "parity", "sa2vp", "--checkpoint", tmp_path / name)
        assert code == 1 and said in out + err, name


def test_parity_of_the_recipe_is_a_table(capfd, tmp_path):
    shutil.copytree(CASES.parent / "recipes" / "sa2vp" / "metric_top1", tmp_path / "sa2vp" / "metric_top1")
    changed = tmp_path / "sa2vp" / "metric_top1" / "case.json"
    facts = json.loads(changed.read_text())
    facts["expected"]["acc1"] += 1
    changed.write_text(json.dumps(facts))
    code, out, _ = call(capfd, "parity", "sa2vp", "--recipe", "--fixtures", tmp_path)
    assert code == 1 and next(row for row in out.splitlines() if "acc1" in row).endswith("DIFFERS")


# --- runs of other machines -------------------------------------------------------------------------------------------

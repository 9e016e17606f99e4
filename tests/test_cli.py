"""The `companion` command: missing files are listed, errors name the accepted values, only verified runs are
imported."""

import json
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
import yaml
from safetensors.torch import save_file

from companion import __version__, cli
from companion.evaluation import recipe_parity
from companion.evaluation.parity import Case, folder
from companion.ops import adopt, needs, record, report
from companion.ops.papers import MODELS, paper, slugs


def call(capsys, *words) -> tuple[int, str, str]:
    code = cli.main([str(w) for w in words])
    said = capsys.readouterr()
    return code, said.out, said.err


def test_doctor_names_what_is_missing(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    code, out, _ = call(capsys, "doctor", "sa2vp", "--data-root", tmp_path)
    assert code == 1
    assert "0 of 19 sets are present" in out and "0 of 5 sets" in out and "0 of 10 sets" in out
    assert "vit_base_patch16_224.orig_in21k" in out and "never released" in out
    assert "train800val200" in out and "licence" in out and "TFLOP/s" in out
    assert "  attention       aligned | padded\n" in out and "  dataset         fgvc/cub200 | fgvc/nabirds" in out


@pytest.mark.parametrize(
    ("here", "words", "said"),
    [
        ("", [], "on one A100 (not measured): 1.3e+18 operations of forward and\n"
                 "           backward passes, 30% of its peak of 156 TFLOP/s at 32-true"),
        ("NVIDIA L40S", [], "one L40S"),
        ("NVIDIA L40S", ["--gpu", "T4", "--precision", "16-mixed"], "30% of its peak of 65 TFLOP/s at 16-mixed"),
    ],
)  # fmt: skip
def test_doctor_reckons_hours_of_a_gpu_and_a_precision(capsys, tmp_path, monkeypatch, here, words, said):
    monkeypatch.setattr("torch.cuda.is_available", lambda: bool(here))
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: here)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda i: SimpleNamespace(total_memory=48e9))
    out = call(capsys, "doctor", "bat", "--data-root", tmp_path, *words)[1]
    assert said in out, out
    wanted = 0.375 + 96 * (0.165 if "16-mixed" in words else 0.281)
    assert f"{wanted:.3g} GB needed for a step of 96 images" in out and "8 GB needed (estimated)" in out


@pytest.mark.slow
@pytest.mark.large
def test_the_memory_that_doctor_names_is_what_is_counted(root):
    command = [sys.executable, "benchmarks/memory.py", "hvit"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    known = yaml.safe_load((MODELS / "memory.yaml").read_text(encoding="utf-8"))
    assert yaml.safe_load(done.stdout) == {"hvit": known["hvit"]["local"]}
    assert all(set(runs) <= {run["id"] for run in paper(slug)["runs"]} for slug, runs in known.items())


def test_the_memory_of_a_step_is_that_of_all_its_images(monkeypatch, tmp_path):
    counted = "bat: {lasher: {fixed_gb: 2.0, image_gb: 0.5, image_half_gb: 0.25, images: 8}}"
    (tmp_path / "memory.yaml").write_text(counted, encoding="utf-8")
    monkeypatch.setattr(needs, "MODELS", tmp_path)
    run = {"id": "lasher", "memory_gb": 77}
    found = {precision: needs.memory("bat", run, precision)[0] for precision in ("32-true", "16-mixed", "bf16-mixed")}
    assert found == {"32-true": 6.0, "16-mixed": 4.0, "bf16-mixed": 4.0}
    assert needs.memory("bat", run | {"id": "another"}, "32-true") == (77, " (estimated)")


def test_doctor_knows_weights_that_only_a_person_can_get(capsys, tmp_path):
    code, out, _ = call(capsys, "doctor", "bat", "--data-root", tmp_path)
    assert code == 1
    assert "OSTrack_ep0300.pth.tar" in out and "by hand" in out
    names = ("rgbt/lasher", "rgbt/rgbt234", "rgbe/visevent")
    assert all(f"0 of 1 sets are present\n    {name}" in out for name in names)
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "BAT_rgbt.pth").write_bytes(b"x")
    assert "BAT_rgbt.pth (MIT): here" in call(capsys, "doctor", "bat", "--data-root", tmp_path)[1]


def test_unknown_papers_and_cases(capsys):
    for words, said in ((("doctor", "nothing"), "sa2vp"), (("parity", "sa2vp", "--case", "nothing"), "tiny_vit_full")):
        code, _, err = call(capsys, *words)
        assert code == 2 and said in err


def test_data_lists_every_set(capsys, tmp_path):
    code, out, _ = call(capsys, "data", "--data-root", tmp_path)
    assert code == 0
    assert all(name in out for name in ("fgvc/nabirds", "vtab/kitti_distance", "hta/gtsrb"))
    assert "missing" in out


def test_parity_of_a_good_and_a_changed_checkpoint(capsys, tmp_path):
    case = Case(folder() / "sa2vp" / "tiny_vit_full")
    state = {n: t.clone() for n, t in case.state.items()}
    save_file(state, tmp_path / "good.safetensors")
    code, out, _ = call(capsys, "parity", "sa2vp", "--checkpoint", tmp_path / "good.safetensors")
    assert code == 0 and "tiny_vit_full: agrees" in out
    state["vit_base.transformer.encoder.layer.8.attn.value.weight"] += 0.1
    torch.save(state, tmp_path / "changed.pth")
    code, out, _ = call(capsys, "parity", "sa2vp", "--checkpoint", tmp_path / "changed.pth")
    assert code == 1 and "DIFFERS; first at image_tokens_into_block9" in out


def test_parity_of_a_checkpoint_in_two_parts(capsys, tmp_path):
    case = Case(folder() / "promptpar" / "small_whole_wider")
    parts = {"ViT_model": "clip_model.", "model_state_dict": "model."}
    parts = {k: {n.removeprefix(p): t for n, t in case.state.items() if n.startswith(p)} for k, p in parts.items()}
    torch.save(parts, tmp_path / "PAR.pth")
    code, out, _ = call(capsys, "parity", "promptpar", "--checkpoint", tmp_path / "PAR.pth")
    assert code == 0 and "small_whole_wider: agrees" in out


def test_parity_of_the_recipe_is_a_table(capsys, tmp_path):
    code, out, _ = call(capsys, "parity", "sa2vp", "--recipe", "--case", "metric_top1")
    head, *rows = out.splitlines()
    assert code == 0 and head == "metric_top1 (metric, ran)" and "DIFFERS" not in out
    assert rows[0].split()[0] == "acc1" and len(rows) >= 2
    shutil.copytree(recipe_parity.folder() / "sa2vp" / "metric_top1", tmp_path / "sa2vp" / "metric_top1")
    changed = tmp_path / "sa2vp" / "metric_top1" / "case.json"
    facts = json.loads(changed.read_text())
    facts["expected"]["acc1"] += 1
    changed.write_text(json.dumps(facts))
    code, out, _ = call(capsys, "parity", "sa2vp", "--recipe", "--fixtures", tmp_path)
    assert code == 1 and next(row for row in out.splitlines() if "acc1" in row).endswith("DIFFERS")
    code, _, err = call(capsys, "parity", "dmt", "--recipe")
    assert code == 2 and "sa2vp" in err


def test_parity_refuses_other_files(capsys, tmp_path):
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    (tmp_path / "broken.pth").write_bytes(b"PK")
    for name, said in (("other.safetensors", "tensor names"), ("broken.pth", "broken.pth")):
        code, _, err = call(capsys, "parity", "sa2vp", "--checkpoint", tmp_path / name)
        assert code == 1 and said in err


@pytest.mark.parametrize("words", [[], ["doctor"], ["fetch"], ["parity"]])
def test_help_names_commands_and_papers(capsys, words):
    with pytest.raises(SystemExit):
        cli.main([*words, "--help"])
    said = capsys.readouterr().out
    assert words or all(word in said for word in ("doctor", "fetch", "data", "parity", "adopt"))
    assert all(slug in said for slug in slugs())


def test_the_version_is_printed(capsys):
    with pytest.raises(SystemExit):
        cli.main(["--version"])
    assert capsys.readouterr().out == f"companion {__version__}\n"


@pytest.fixture
def made_elsewhere(tmp_path, monkeypatch):
    """Where a checkout keeps a run (nothing yet), and such a run's folder, made by the checkout's code elsewhere."""
    checkout = tmp_path / "checkout"
    (checkout / "notebooks").mkdir(parents=True)
    (checkout / "pyproject.toml").write_text("")
    source = record.root() / "notebooks" / "sa2vp.ipynb"
    (checkout / "notebooks" / "sa2vp.ipynb").write_bytes(source.read_bytes())
    monkeypatch.chdir(checkout)
    run = report.start("sa2vp", profile="paper", seed=0, out=str(tmp_path / "away"))
    run.table("t", pd.DataFrame({"a": [1]}))
    run.close()
    return checkout / "reports" / "paper" / "sa2vp", tmp_path / "away"


def test_adopt_takes_in_an_honest_run_and_keeps_the_study(capsys, made_elsewhere):
    target, away = made_elsewhere
    target.mkdir(parents=True)
    (target / "study.csv").write_text("kept")
    code, out, _ = call(capsys, "adopt", away)
    assert code == 0 and "adopted 2 files" in out
    assert (target / "tables" / "t.csv").read_text() == (away / "tables" / "t.csv").read_text()
    assert (target / "run.json").exists() and (target / "study.csv").read_text() == "kept"
    assert not list(target.parent.glob(".*"))


def test_adopt_refuses_what_is_not_as_recorded(capsys, made_elsewhere):
    target, away = made_elsewhere
    table = away / "tables" / "t.csv"
    honest = table.read_text()
    table.write_text("a\n2\n")
    code, _, err = call(capsys, "adopt", away)
    assert code == 1 and "t.csv" in err
    table.write_text(honest)
    facts = json.loads((away / "run.json").read_text())
    for key, value, said in (
        ("code", "0" * 64, "other code"),
        ("outputs", {"../../x": "0"}, "outside"),
        ("outputs", [1], "not a run record"),
        ("slug", "../x", "sa2vp"),
        ("profile", "../x", "pocket"),
    ):
        (away / "run.json").write_text(json.dumps(facts | {key: value}))
        code, _, err = call(capsys, "adopt", away)
        assert code != 0 and said in err, key
    (away / "run.json").write_text("{")
    code, _, err = call(capsys, "adopt", away)
    assert code == 1 and "run.json" in err
    assert not target.parents[1].exists()
    code, _, err = call(capsys, "adopt", away / "tables")
    assert code == 1 and "not the output folder" in err


def test_adopt_leaves_a_run_that_is_in_its_place(capsys, made_elsewhere):
    target, away = made_elsewhere
    call(capsys, "adopt", away)

    def files():
        return {path: path.read_bytes() for path in target.rglob("*") if path.is_file()}

    before = files()
    code, out, _ = call(capsys, "adopt", target)
    assert code == 0 and "is already in place" in out and files() == before


def test_adopt_that_fails_leaves_what_was_there(capsys, made_elsewhere, monkeypatch):
    target, away = made_elsewhere
    target.mkdir(parents=True)
    (target / "study.csv").write_text("kept")

    def fails(source, new):
        raise PermissionError(13, "Permission denied", str(new))

    monkeypatch.setattr("shutil.copyfile", fails)
    code, _, err = call(capsys, "adopt", away)
    assert code == 1 and "Permission denied" in err and str(target.parent) in err
    assert [path.name for path in target.parent.rglob("*")] == ["sa2vp", "study.csv"]


def test_adopt_replaces_the_run_before_and_gathers_what_was_measured(capsys, made_elsewhere):
    target, away = made_elsewhere
    call(capsys, "adopt", away)
    (target / "sa2vp.ipynb").write_text("of the run before")
    columns = ["dataset", "seed", "accuracy"]
    pd.DataFrame([("a", 0, 1.0), ("b", 0, 2.0)], columns=columns).to_csv(target / "measured.csv", index=False)
    pd.DataFrame([("b", 0, 3.0), ("b", 1, 4.0)], columns=columns).to_csv(away / "measured.csv", index=False)
    run = report.start("sa2vp", profile="paper", seed=0, out=str(away))
    run.table("other", pd.DataFrame({"a": [1]}))
    run.close()
    code, out, _ = call(capsys, "adopt", away)
    assert code == 0 and "no executed sa2vp.ipynb" in out
    assert not (target / "sa2vp.ipynb").exists() and not (target / "tables" / "t.csv").exists()
    assert (target / "tables" / "other.csv").exists()
    rows = pd.read_csv(target / "measured.csv").to_records(index=False).tolist()
    assert rows == [("a", 0, 1.0), ("b", 0, 3.0), ("b", 1, 4.0)]
    shutil.copytree(target, away / "again")
    assert call(capsys, "adopt", away / "again")[0] == 0  # its record fits its files


@pytest.mark.parametrize(
    ("slug", "columns", "before", "new"),
    [
        (
            "tip",
            ["base", "mid", "dataset", "degradation", "method", "texts", "guidance", "scale", "SSIM"],
            [(*"abcdef", 1.0, 0.5, 1.0), (*"abcdef", 2.5, 0.5, 2.0)],
            (*"abcdef", 1.0, 0.5, 3.0),
        ),
        ("dmt", ["task", "mask_ratio", "score"], [("a", 0.75, 1.0), ("a", 0.5, 2.0)], ("a", 0.75, 3.0)),
        ("hvit", ["method", "seed", "kappa", "fold"], [("a", 0, 1.0, 2), ("a", 1, 2.0, 3)], ("a", 0, 3.0, 4)),
    ],
)
def test_measured_rows_are_identified_by_the_keys_of_the_recipe(tmp_path, slug, columns, before, new):
    pd.DataFrame(before, columns=columns).to_csv(tmp_path / "before.csv", index=False)
    pd.DataFrame([new], columns=columns).to_csv(tmp_path / "new.csv", index=False)
    adopt._gather(slug, tmp_path / "before.csv", tmp_path / "new.csv")
    rows = pd.read_csv(tmp_path / "new.csv")[columns]  # a recipe may add those that older rows lack
    assert rows.to_records(index=False).tolist() == [before[1], new]


def test_adopt_keeps_the_folder_of_a_run_of_a_grid(capsys, made_elsewhere):
    target, away = made_elsewhere
    source = away.parent / "sa2vp" / "dataset=vtab-svhn,seed=0"
    shutil.copytree(away, source)
    code, out, _ = call(capsys, "adopt", source)
    assert code == 0 and "reports/paper/sa2vp/dataset=vtab-svhn,seed=0" in out
    assert (target / source.name / "tables" / "t.csv").is_file()


def test_a_file_where_a_folder_belongs_and_a_reader_who_leaves(capsys, tmp_path):
    (tmp_path / "file").write_text("")
    for words in (("doctor", "sa2vp"), ("fetch", "sa2vp"), ("data",)):
        code, _, err = call(capsys, *words, "--data-root", tmp_path / "file")
        assert code == 2 and "this is a file" in err
    command = f"{sys.executable} -m companion.cli data --data-root {tmp_path} | head -1"
    said = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    assert len(said.stdout.splitlines()) == 1 and said.stderr == ""

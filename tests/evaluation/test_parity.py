"""Every paper's model against outputs recorded from its authors' code; `PARITY_EXTRA=<folder>` adds fixtures."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from companion.errors import BadParameter, CorruptFile, MissingData
from companion.evaluation import fill, parity
from companion.models.sa2vp import parity as sa2vp_cases

FULL_SIZE = {
    *("vit_b16_full", "vit_b16_full_acc", "swin_b_full", "model_256", "track_loop", "model_vitb16", "domain_mae"),
    *("full_l14_pa100k", "hipt_1024", "heatmap_blend", "heatmap_blend_smoothed", "model_full", "attention_map"),
    *("classifier", "detector", "mlr_lvis_r50", "ft_unetformer_swin_b"),
    *("dino_vitb", "g2sd_generic_vits", "ibot_vitb", "mae_vitb", "mocov3_vitb", "tinymim_relation"),
}


def _cases():
    for paper in parity.papers():
        for case in parity.cases(paper):
            marks = [pytest.mark.slow, pytest.mark.large] if case.name in FULL_SIZE else []
            yield pytest.param(paper, case, id=f"{paper}-{case.name}", marks=marks)


@pytest.mark.parametrize(("paper", "case"), list(_cases()))
def test_same_outputs_as_the_authors_code(paper, case):
    differences = parity.compare(paper, case)
    assert [d for d in differences if not d.agrees] == []


def test_schedule_is_the_authors():
    case = next(c for c in parity.cases("sa2vp") if c.name == "loss_and_schedule")
    for ours, theirs in sa2vp_cases.schedules(case).values():
        np.testing.assert_allclose(ours, theirs, rtol=1e-9, atol=1e-15)


def test_extra_fixtures_are_run_too(tmp_path, monkeypatch):
    shutil.copytree(parity.folder() / "sa2vp" / "tiny_cross_attention", tmp_path / "sa2vp" / "tiny_cross_attention_2")
    monkeypatch.setenv("PARITY_EXTRA", str(tmp_path))
    names = [c.name for c in parity.cases("sa2vp")]
    assert "tiny_cross_attention_2" in names and "tiny_cross_attention" in names


@pytest.mark.parametrize("name", ["seed", "weights_seed", "inputs_seed"])
def test_a_seed_under_any_of_its_names(name, tmp_path):
    (tmp_path / "case.json").write_text(json.dumps({name: 3}))
    assert parity.Case(tmp_path).seed == 3
    (tmp_path / "case.json").write_text(json.dumps({"seed": 3, "weights_seed": 4}))
    with pytest.raises(CorruptFile, match="one seed"):
        _ = parity.Case(tmp_path).seed


def test_missing_and_broken_fixtures(tmp_path):
    with pytest.raises(BadParameter, match="sa2vp"):
        list(parity.cases("nothing"))
    with pytest.raises(MissingData, match=r"names\.json"):
        list(parity.cases("sa2vp", tmp_path))
    shutil.copytree(parity.folder() / "sa2vp" / "tiny_cross_attention", tmp_path / "sa2vp" / "broken")
    (tmp_path / "sa2vp" / "broken" / "outputs.safetensors").write_bytes(b"no")
    with pytest.raises(CorruptFile, match="broken"):
        parity.compare("sa2vp", next(iter(parity.cases("sa2vp", tmp_path))))


def test_fill_is_fixed_for_ever():
    """Values recorded once: another NumPy or machine must give the same weights."""
    np.testing.assert_allclose(fill.values("a", (3,)), [3.0030537, 1.4173826, 1.7369606], rtol=1e-6)
    assert fill.parameter("x.weight", (4, 8)).std() < 0.6
    assert abs(fill.parameter("norm.weight", (512,)).mean() - 1) < 0.02
    assert (fill.parameter("bn.running_var", (64,)) >= 1).all()


def test_fill_as_a_command(tmp_path):
    (tmp_path / "names.json").write_text(json.dumps({"a.weight": [2, 3]}))
    words = [sys.executable, Path(__file__).parents[1] / "parity" / "fill.py", tmp_path / "names.json"]
    total, name, *_ = subprocess.run(words, capture_output=True, text=True, check=True).stdout.split()
    assert name == "a.weight" and int(total, 16) > 0

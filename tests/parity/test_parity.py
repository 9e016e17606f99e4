"""Every paper's model against outputs recorded from its authors' code; `PARITY_EXTRA=<folder>` adds cases."""

import shutil

import numpy as np
import pytest

from companion.errors import CorruptFile

from . import fill, runner

FULL_SIZE = {
    *("vit_b16_full", "vit_b16_full_acc", "swin_b_full", "model_256", "track_loop", "model_vitb16", "domain_mae"),
    *("full_l14_pa100k", "hipt_1024", "heatmap_blend", "heatmap_blend_smoothed", "model_full", "attention_map"),
    *("classifier", "detector", "mlr_lvis_r50", "ft_unetformer_swin_b"),
    *("dino_vitb", "g2sd_generic_vits", "ibot_vitb", "mae_vitb", "mocov3_vitb", "tinymim_relation"),
}


def _cases():
    for paper in runner.papers():
        for case in runner.cases(paper):
            marks = [pytest.mark.slow, pytest.mark.large] if case.name in FULL_SIZE else []
            yield pytest.param(case, id=f"{paper}-{case.name}", marks=marks)


@pytest.mark.parametrize("case", list(_cases()))
def test_same_outputs_as_the_authors_code(case):
    differences = runner.compare(case)
    assert differences and [d for d in differences if not d.agrees] == []


def test_extra_cases_are_compared_and_a_broken_one_is_refused(tmp_path, monkeypatch):
    copy = tmp_path / "sa2vp" / "extra"
    shutil.copytree(runner.ROOT / "sa2vp" / "tiny_cross_attention", copy)
    monkeypatch.setenv("PARITY_EXTRA", str(tmp_path))
    (case,) = [case for case in runner.cases("sa2vp") if case.name == "extra"]
    state = {name: 1.1 * value for name, value in case.state.items()}
    assert not all(d.agrees for d in runner.compare(runner.Case(copy, state)))
    (copy / "outputs.safetensors").write_bytes(b"no")
    with pytest.raises(CorruptFile, match="extra"):
        runner.compare(case)


def test_fill_is_fixed_for_ever():
    """Values recorded once: another NumPy or machine must give the same weights."""
    np.testing.assert_allclose(fill.values("a", (3,)), [3.0030537, 1.4173826, 1.7369606], rtol=1e-6)
    assert fill.parameter("x.weight", (4, 8)).std() < 0.6
    assert abs(fill.parameter("norm.weight", (512,)).mean() - 1) < 0.02
    assert (fill.parameter("bn.running_var", (64,)) >= 1).all()

"""A real ViT in place of the patch level gives the same outputs, and its views measure what they say."""

import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch

from companion.data import real
from companion.data.photographs import PHOTOGRAPHS
from companion.errors import BadParameter
from companion.models.hvit import pretrained, recipe
from companion.slides import Tiling, read_features


def small(**changes):
    torch.manual_seed(0)
    options = {"img_size": 56, "patch_size": 14, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 0}
    model = timm.models.VisionTransformer(**options | changes).eval()
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if "ls" in name or "pos_embed" in name:
                tensor.normal_()
    return model


@pytest.mark.parametrize("init_values", [None, 1e-5])
def test_layer_scale_is_folded_into_the_linear_layers(init_values):
    vit, images = small(init_values=init_values), torch.randn(2, 3, 56, 56)
    level = pretrained.patch_level(vit)
    assert (level.image, level.token, level.dim) == (56, 14, 48) and not level.training
    with torch.no_grad():
        torch.testing.assert_close(level.forward_features(images), vit.forward_features(images), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(level(images), vit.forward_features(images)[:, 0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("changes", [{"reg_tokens": 2}, {"class_token": False, "global_pool": "avg"}])
def test_other_tokens_than_cls_are_refused(changes):
    with pytest.raises(BadParameter, match=r"one \[CLS\] token"):
        pretrained.patch_level(small(**changes))


def test_a_view_covers_the_photograph(tmp_path, monkeypatch):
    monkeypatch.setenv("COMPANION_REAL_DATA", str(tmp_path / "none"))
    patch = pretrained.patch_level(small())
    (view,) = pretrained.views(patch, tmp_path).values()
    assert view.maps.patch.shape == (1, 8, 8) and view.components.shape == (1, 8, 8, 3)
    panels = view.panels()
    assert list(panels)[:3] == ["tissue", "patch level", "patch tokens, PCA"] and len(panels) == 4  # one region
    assert all(panel.shape[:2] == (512, 512) and not np.isnan(panel).any() for panel in panels.values())
    again = pretrained.view(patch, tmp_path / "glands.tiff", 128, seed=1)
    assert again.tiles.coords.tolist() == [[0, 0], [0, 256], [256, 0], [256, 256]] and len(again.panels()) == 5
    assert again.components.shape == (4, 8, 8, 3)
    assert not np.allclose(pretrained.views(patch, tmp_path, normalise="half")["glands"].maps.patch, view.maps.patch)
    scores = view.scores()
    assert {values.shape for values in scores.values()} == {(8, 8)}
    found = pretrained.stain_auroc(PHOTOGRAPHS["tissue"](), scores).set_index("score").AUROC
    assert found.between(0.5, 1).all() and found.iloc[-1] > 0.9, "brown is a colour"


def test_the_auroc_of_the_stain_itself_is_one():
    image = PHOTOGRAPHS["tissue"]()
    brown = pretrained.rgb2hed(image)[..., 2]
    stained = (brown > pretrained.threshold_otsu(brown)).reshape(64, 8, 64, 8).mean((1, 3))
    noise = np.random.default_rng(0).random((64, 64))
    found = pretrained.stain_auroc(image, {"share": stained, "its negative": -stained, "noise": noise}).AUROC
    assert found[0] == found[1] == 1 and found[2] == pytest.approx(0.5, abs=0.03)


def test_a_real_svs_goes_through_the_extraction_of_companion_slides(tmp_path):
    """The Aperio slide of COMPANION_REAL_DATA, by the function behind `companion slides`."""
    folder = real.root() / "slides"
    found = sorted(folder.glob("*.svs"))
    if not found:
        pytest.skip(f"no .svs file in {folder}; COMPANION_REAL_DATA names the folder above it")
    shutil.copy(found[0], tmp_path)
    patch = pretrained.patch_level(small())
    p = SimpleNamespace(dataset="folder", data_root=str(tmp_path), features="", region=1120, normalise="imagenet")
    ((name, path),) = recipe.store(SimpleNamespace(**vars(p), accelerator="cpu"), patch, tiling=Tiling(area=4))
    stored = read_features(path)
    assert name == found[0].stem and len(stored["coords"]) >= 2
    assert stored["features"].shape == (len(stored["coords"]), 400, 48)
    assert stored["features"].flatten(0, 1).std(0).min() > 1e-3, "patches of tissue differ"

"""Views of the three levels on real tissue measure what they say."""

import numpy as np
import pytest
import timm
import torch

from companion.data.photographs import PHOTOGRAPHS
from companion.models.hvit import figures


def small():
    torch.manual_seed(0)
    options = {"img_size": 56, "patch_size": 14, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 0}
    model = timm.models.VisionTransformer(**options).eval()
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if "ls" in name or "pos_embed" in name:
                tensor.normal_()
    return model


def test_the_auroc_of_the_stain_itself_is_one():
    image = PHOTOGRAPHS["tissue"]()
    brown = figures.rgb2hed(image)[..., 2]
    stained = (brown > figures.threshold_otsu(brown)).reshape(64, 8, 64, 8).mean((1, 3))
    noise = np.random.default_rng(0).random((64, 64))
    found = figures.stain_auroc(image, {"share": stained, "its negative": -stained, "noise": noise}).AUROC
    assert found[0] == found[1] == 1 and found[2] == pytest.approx(0.5, abs=0.03)

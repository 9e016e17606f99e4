"""Scores of restored images against the clean ones (TIP, section 7), all by torchmetrics.

    psnr(restored, clean)                     (B,), dB
    ssim(restored, clean)                     (B,)
    found, reasons = perceptual()             LPIPS and FID if their networks' weights exist, else the reasons

A summary of the paper names FID and LPIPS, without the LPIPS network and the number of images: here AlexNet and all
images of the set.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.functional.image import structural_similarity_index_measure
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity
from torchvision.models import AlexNet_Weights

from ...errors import check_range
from . import checked

INCEPTION = "weights-inception-2015-12-05-6726825d.pth"  # torch-fidelity's


def psnr(restored: Tensor, clean: Tensor) -> Tensor:
    """-10 log10 of the mean squared error of each image (B, 3, H, W) in [0, 1]: (B,) dB, at most 100, also where equal:
    a mean over images is finite."""
    restored, clean = _pair(restored, clean)
    return -10 * (restored - clean).square().flatten(1).mean(1).clamp_min(1e-10).log10()


def _pair(restored: Tensor, clean: Tensor) -> list[Tensor]:
    """Both as floats. Raises `BadParameter`: other shapes than (B, 3, H, W), or values outside of [0, 1]."""
    clean = checked("clean", clean, axes=4, low=0, high=1)
    both = checked("restored", restored, clean.shape, low=0, high=1), clean
    return [images if images.is_floating_point() else images.float() for images in both]


def ssim(restored: Tensor, clean: Tensor) -> Tensor:
    """Structural similarity of each image (B, 3, H, W) in [0, 1]: (B,); Gaussian windows of sigma 1.5, borders in."""
    restored, clean = _pair(restored, clean)
    check_range("sides of the images in pixels, of which SSIM's windows have 11,", min(clean.shape[-2:]), 11)
    return structural_similarity_index_measure(restored, clean, data_range=1.0, reduction="none").reshape(-1)


def perceptual(download: bool = False) -> tuple[dict[str, Metric], dict[str, str]]:
    """LPIPS (`update(restored, clean)`) and FID (`update(images, real=)`), both of floats in [0, 1].

    Args:
        download: download the weights of their networks if torch's cache lacks them.

    Returns:
        The available metrics, and for the others the reason as text, for tables.
    """
    makers = {
        "LPIPS": (
            Path(AlexNet_Weights.DEFAULT.url).name,
            lambda: LearnedPerceptualImagePatchSimilarity("alex", normalize=True),
        ),
        "FID": (INCEPTION, lambda: FrechetInceptionDistance(2048, normalize=True)),
    }
    found, reasons = {}, {}
    cache = Path(torch.hub.get_dir()) / "checkpoints"
    for name, (file, make) in makers.items():
        if not download and not (cache / file).is_file():
            reasons[name] = f"not run: {file} is not in {cache}; `perceptual(download=True)` fetches it"
            continue
        try:
            found[name] = make()
        except (OSError, ImportError, RuntimeError) as error:
            reasons[name] = f"not run: {file} could not be had ({type(error).__name__})"
    return found, reasons

"""PSNR and SSIM against scikit-image; LPIPS and FID with and without their networks' weights."""

import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from companion.evaluation.metrics.restoration import perceptual, psnr, ssim
from tests.models.common import refuses


@pytest.fixture
def pair() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    clean = torch.rand(3, 3, 48, 40, generator=generator)
    noise = torch.randn(clean.shape, generator=generator) * torch.tensor([0.02, 0.1, 0.3])[:, None, None, None]
    return (clean + noise).clamp(0, 1), clean


def test_psnr_and_ssim_are_scikit_images(pair) -> None:
    restored, clean = (t.movedim(1, -1).numpy() for t in pair)
    wanted = [peak_signal_noise_ratio(c, r, data_range=1) for r, c in zip(restored, clean, strict=True)]
    torch.testing.assert_close(psnr(*pair), torch.tensor(wanted).float(), rtol=1e-4, atol=1e-4)
    options = dict(channel_axis=-1, data_range=1, gaussian_weights=True, sigma=1.5, use_sample_covariance=False)
    # the mean over the whole map: scikit-image's own leaves out a border of 5 pixels, torchmetrics does not
    wanted = [structural_similarity(c, r, **options, full=True)[1].mean() for r, c in zip(restored, clean, strict=True)]
    torch.testing.assert_close(ssim(*pair), torch.tensor(wanted).float(), rtol=1e-3, atol=1e-3)
    assert psnr(pair[1], pair[1]).tolist() == [100] * 3
    refuses((lambda: psnr(pair[1], pair[1][:2]), r"\(2, 3, 48, 40\)"))


def test_images_smaller_than_a_window_of_ssim_are_named() -> None:
    refuses((lambda: ssim(torch.rand(1, 3, 10, 20), torch.rand(1, 3, 10, 20)), "= 10"))


def test_metrics_without_their_networks_weights_have_a_reason(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    found, reasons = perceptual()
    assert not found and set(reasons) == {"LPIPS", "FID"}

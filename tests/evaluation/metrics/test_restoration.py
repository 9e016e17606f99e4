"""PSNR and SSIM against scikit-image; the reasons given when LPIPS and FID lack their networks' weights."""

import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from companion.errors import BadParameter
from companion.evaluation.metrics import restoration
from companion.evaluation.metrics.restoration import perceptual, psnr, ssim


@pytest.fixture
def pair() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    clean = torch.rand(3, 3, 48, 40, generator=generator)
    noise = torch.randn(clean.shape, generator=generator) * torch.tensor([0.02, 0.1, 0.3])[:, None, None, None]
    return (clean + noise).clamp(0, 1), clean


def test_are_scikit_images(pair) -> None:
    restored, clean = (t.movedim(1, -1).numpy() for t in pair)
    wanted = [peak_signal_noise_ratio(c, r, data_range=1) for r, c in zip(restored, clean, strict=True)]
    torch.testing.assert_close(psnr(*pair), torch.tensor(wanted).float(), rtol=1e-4, atol=1e-4)
    options = dict(channel_axis=-1, data_range=1, gaussian_weights=True, sigma=1.5, use_sample_covariance=False)
    # the mean over the whole map: scikit-image's own leaves out a border of 5 pixels, torchmetrics does not
    wanted = [structural_similarity(c, r, **options, full=True)[1].mean() for r, c in zip(restored, clean, strict=True)]
    torch.testing.assert_close(ssim(*pair), torch.tensor(wanted).float(), rtol=1e-3, atol=1e-3)


def test_of_equal_pictures_and_of_one(pair) -> None:
    clean = pair[1]
    assert torch.isinf(psnr(clean, clean)).all()
    torch.testing.assert_close(ssim(clean, clean), torch.ones(3))
    assert ssim(pair[0][:1], clean[:1]).shape == psnr(pair[0][:1], clean[:1]).shape == (1,)
    with pytest.raises(BadParameter, match="alike"):
        psnr(clean, clean[:2])


def test_what_cannot_be_had_is_said(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    found, reasons = perceptual()
    assert not found and set(reasons) == {"LPIPS", "FID"}
    assert all(text.startswith("not run: ") and "download=True" in text for text in reasons.values())


def test_metrics_that_can_be_had_are_torchmetrics(tmp_path, monkeypatch, pair) -> None:
    """With random weights in the cache: tests the inputs of the metrics, not their values."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    import torchvision
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    monkeypatch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
    torch.save(torchvision.models.alexnet().state_dict(), tmp_path / "checkpoints" / "alexnet-owt-7be5be79.pth")
    torch.save({}, tmp_path / "checkpoints" / restoration.INCEPTION)
    found, reasons = perceptual()
    assert set(found) == {"LPIPS", "FID"} and not reasons
    restored, clean = pair
    found["LPIPS"].update(restored.repeat(1, 1, 2, 2), clean.repeat(1, 1, 2, 2))
    assert found["LPIPS"].compute() > 0
    found["FID"].update(clean, real=True), found["FID"].update(clean, real=False)
    assert abs(float(found["FID"].compute())) < 1e-2

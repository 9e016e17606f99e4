"""Scales, crops with several classes, flips, mosaics within a zone."""

import torch
from torchvision import tv_tensors
from torchvision.transforms import v2

from companion.data import landcover
from companion.data.landcover import OEM
from companion.data.rasters import MEAN, STD
from companion.errors import BadParameter
from companion.models.metasegnet import augmentation as transforms
from tests.data.conftest import refused
from tests.data.test_landcover import earth


def pair(labels: torch.Tensor) -> tuple[tv_tensors.Image, tv_tensors.Mask]:
    """An image whose colour is the label, so that both can be followed together."""
    return tv_tensors.Image((20 * labels).to(torch.uint8).expand(3, -1, -1).clone()), tv_tensors.Mask(labels)


def test_image_and_labels_stay_together(monkeypatch):
    torch.manual_seed(1)
    monkeypatch.setattr(transforms, "Scale", v2.Identity)
    transform = transforms.train_transform(32, ignore=9)
    for _ in range(10):
        image, labels = transform(*pair(torch.arange(60).remainder(8).expand(48, -1).clone()))
        back = image.as_subclass(torch.Tensor)[0] * STD[0] + MEAN[0]
        assert image.shape == (3, 32, 32) and image.dtype == torch.float32 and labels.dtype == torch.int64
        torch.testing.assert_close(back * 255 / 20, labels.as_subclass(torch.Tensor).float(), atol=1e-3, rtol=0)


def test_a_scaled_label_is_that_of_the_pixel_under_its_centre():
    labels = torch.arange(60).expand(40, -1)
    scaled = transforms.Scale([0.75])(*pair(labels))[1]  # as the image's bicubic interpolation has it
    assert scaled[0].tolist() == [int((i + 0.5) / 0.75) for i in range(45)]


def test_a_mosaic_is_of_one_zone(tmp_path, monkeypatch):
    earth(tmp_path, ("tokyo", "el_rodeo", "kyoto", "lima"))
    data = landcover.load(OEM, tmp_path, "train")
    zones, used, plain = data.zones(), [], data.pair
    monkeypatch.setattr(data, "pair", lambda i: used.append(i) or plain(i))
    torch.manual_seed(0)
    for index, (image, labels) in enumerate(transforms.Mosaic(data, 1.0, zones)):
        assert image.shape == (3, 70, 90) and labels.shape == (70, 90) and not torch.equal(image, plain(index)[0])
        assert {zones[i] for i in used} == {zones[index]} and used[0] == index and len(used) == 4
        used.clear()
    assert all(map(torch.equal, transforms.Mosaic(data, 0.0, zones)[0], plain(0)))
    refused(BadParameter, "groups", transforms.Mosaic, data, 0.5, zones[1:])
    image, _ = transforms.Mosaic(data, 0.5, zones, transforms.train_transform(64, data.ignore))[0]  # at the end
    assert image.shape == (3, 64, 64)

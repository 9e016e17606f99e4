"""Scales, crops with several classes, flips, mosaics within a zone."""

import torch
from torchvision import tv_tensors

from companion.data import landcover
from companion.data import landcover_transforms as transforms
from companion.data.landcover_sets import OEM
from companion.errors import BadParameter
from companion.geotiff import MEAN, STD
from tests.data.conftest import refused
from tests.data.test_landcover import earth


def pair(labels: torch.Tensor) -> tuple[tv_tensors.Image, tv_tensors.Mask]:
    """An image whose colour is the label, so that both can be followed together."""
    return tv_tensors.Image((20 * labels).to(torch.uint8).expand(3, -1, -1).clone()), tv_tensors.Mask(labels)


def halves(height: int = 40, width: int = 60) -> torch.Tensor:
    labels = torch.zeros(height, width, dtype=torch.int64)
    labels[:, width // 2 :] = 1
    return labels


def test_normalised():
    image, labels = transforms.test_transform()(*pair(halves()))
    wanted = (torch.tensor([0.0, 20 / 255])[:, None] - torch.tensor(MEAN)) / torch.tensor(STD)
    assert image.dtype == torch.float32 and labels.dtype == torch.int64 and torch.equal(labels, halves())
    torch.testing.assert_close(image[:, 0, [0, -1]].T.as_subclass(torch.Tensor), wanted)


def test_scales():
    torch.manual_seed(0)
    seen = set()
    for _ in range(40):
        image, labels = transforms.Scale()(*pair(halves()))
        assert image.shape[1:] == labels.shape and set(labels.unique().tolist()) == {0, 1}  # nothing between classes
        seen.add(tuple(labels.shape))
    assert seen == {(30, 45), (40, 60), (50, 75), (60, 90)}
    # the label of the pixel that the new pixel's centre is in, as the image's bicubic interpolation has it
    _, labels = transforms.Scale([0.75])(*pair(torch.arange(60).expand(40, -1)))
    assert labels[0].tolist() == [int((i + 0.5) / 0.75) for i in range(45)]
    refused(BadParameter, "scales", transforms.Scale, [])


def test_crops_with_several_classes():
    labels = torch.zeros(100, 100, dtype=torch.int64)
    labels[:, 96:] = 1  # four columns at the edge
    torch.manual_seed(0)
    crop = transforms.SmartCrop(10, ignore=2)
    plain = transforms.SmartCrop(10, ignore=2, tries=1)
    mixed = [sum(len(c(*pair(labels))[1].unique()) > 1 for _ in range(100)) for c in (crop, plain)]
    assert mixed[0] > 2 * mixed[1] > 0
    many = transforms.SmartCrop(40, ignore=2, tries=100)
    largest = [many(*pair(halves(100, 100)))[1].flatten().bincount().max() / 40**2 for _ in range(20)]
    assert min(largest) >= 0.5 and max(largest) < 0.75
    labels[:, :96] = 2  # a single class and what is ignored: none is good, the last one stays
    assert crop(*pair(labels))[1].shape == (10, 10)
    image, found = transforms.SmartCrop(64, ignore=5)(*pair(halves()))
    assert image.shape == (3, 64, 64) and (found == 5).any() and not image[:, found == 5].any()
    refused(BadParameter, "size", transforms.SmartCrop, 0, 5)


def test_brightness_and_contrast_are_albumentations():
    image = tv_tensors.Image(torch.tensor([0, 51, 102, 153, 204, 255], dtype=torch.uint8).expand(3, 1, -1))
    changed = transforms.BrightnessContrast(0.25)
    assert changed.transform(image, {"alpha": 1.1, "beta": -0.2})[0, 0].tolist() == [0, 5, 61, 117, 173, 229]
    torch.manual_seed(0)
    drawn = [changed.make_params([]) for _ in range(200)]
    alphas, betas = ([d[name] for d in drawn] for name in ("alpha", "beta"))
    assert 0.75 <= min(alphas) < 0.77 and 1.23 < max(alphas) <= 1.25 and -0.25 <= min(betas) < -0.23
    labels = tv_tensors.Mask(torch.ones(1, 6, dtype=torch.int64))
    assert torch.equal(changed(image, labels)[1], labels)


def test_image_and_labels_stay_together():
    torch.manual_seed(1)
    transform = transforms.train_transform(32, ignore=9, scales=[1.0], brightness=0.0)
    for _ in range(10):
        image, labels = transform(*pair(torch.arange(60).remainder(8).expand(48, -1).clone()))
        back = image.as_subclass(torch.Tensor)[0] * STD[0] + MEAN[0]
        assert image.shape == (3, 32, 32)
        torch.testing.assert_close(back * 255 / 20, labels.as_subclass(torch.Tensor).float(), atol=1e-3, rtol=0)
    changed = transforms.train_transform(32, ignore=9, scales=[1.0], brightness=0.25)
    assert changed(*pair(halves()))[0].shape == (3, 32, 32)


def test_a_mosaic_is_of_one_zone(tmp_path):
    earth(tmp_path, ("tokyo", "el_rodeo", "kyoto", "lima", "pisco"))
    data = landcover.load(OEM, tmp_path, "train")
    zones = data.zones()
    torch.manual_seed(0)
    mosaic = transforms.Mosaic(data, 1.0, zones)
    used, plain = [], data.pair
    data.pair = lambda i: used.append(i) or plain(i)
    for index in range(len(data)):
        used.clear()
        image, labels = mosaic[index]
        assert image.shape == (3, 70, 90) and labels.shape == (70, 90)
        assert {zones[i] for i in used} == {zones[index]} and used[0] == index and len(used) == 4
    # el_rodeo is alone in its zone: all four quarters are of it
    image, labels = mosaic[1]
    colours = {tuple(c) for c in plain(1)[0].flatten(1).T.tolist()}
    assert {tuple(c) for c in image.flatten(1).T.tolist()} <= colours and not torch.equal(image, plain(1)[0])
    same = transforms.Mosaic(data, 0.0, zones)[0]
    assert torch.equal(same[0], plain(0)[0]) and torch.equal(same[1], plain(0)[1])
    refused(BadParameter, "groups", transforms.Mosaic, data, 0.5, zones[1:])
    refused(BadParameter, "p = 2", transforms.Mosaic, data, 2, zones)
    changed = transforms.Mosaic(data, 0.5, zones, transforms.train_transform(64, data.ignore))  # at the end
    for _ in range(4):
        image, labels = changed[0]
        assert image.shape == (3, 64, 64) and image.dtype == torch.float32 and labels.max() <= 8
        assert type(image) is type(labels) is torch.Tensor

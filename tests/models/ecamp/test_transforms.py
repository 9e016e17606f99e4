"""The transforms of segmentation: image and mask together, and masks of any size."""

import pytest
import torch

from companion.models.ecamp import transforms


def test_image_and_mask_are_warped_together_or_the_image_alone():
    torch.manual_seed(0)
    image = torch.zeros(1, 64, 64)
    image[:, 4:14, 36:60] = 1
    for dataset, together in (("fundus/riga", True), ("xrays/siim", False)):
        moved = [transforms.MaskTransform(dataset, True, 64)(image, image) for _ in range(20)]
        found = [(x[:1] * transforms.STD + transforms.MEAN, mask) for x, mask in moved]
        assert 2 < sum((x - image).abs().max() > 0.5 for x, _ in found) < 18  # half of them
        assert all((x - mask).abs().mean() < 0.02 for x, mask in found) is together
        assert all(torch.equal(mask, image) for _, mask in found) is not together


@pytest.mark.parametrize(("dataset", "nearest"), [("xrays/rsna", True), ("fundus/riga", False)])
def test_masks_of_another_size_than_their_image(dataset, nearest):
    torch.manual_seed(0)
    transform, mask = transforms.MaskTransform(dataset, True, 32), (torch.rand(1, 5, 5) > 0.5).float()
    found = torch.stack([transform(torch.zeros(1, 48, 48), mask)[1] for _ in range(9)])
    assert (len(found.unique()) == 2) is nearest
    for side in range(33, 66):  # images of many sizes do not fill the memory
        transforms.MaskTransform("fundus/riga", False, 32)(torch.zeros(1, 8, 8), torch.zeros(1, side, side))
    assert transforms._shares.cache_info().currsize < 20

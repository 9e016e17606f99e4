"""The square images of PromptPAR."""

from PIL import Image

from companion.errors import BadParameter
from companion.models.promptpar import square_transform
from tests.data.conftest import refused


def test_an_image_is_padded_in_either_colour():
    black, white = (square_transform(32, padding=padding)(Image.new("RGB", (10, 20))) for padding in ("black", "white"))
    assert (black == -1).all() and (white[:, :, 8:24] == -1).all()
    assert (white[:, :, :8] == 1).all() and (white[:, :, 24:] == 1).all()
    refused(BadParameter, "white", square_transform, padding="grey")

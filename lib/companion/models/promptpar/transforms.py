"""PromptPAR's images: padded to a square."""

from __future__ import annotations

from types import SimpleNamespace

from PIL import Image
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from ...data.images import as_rgb, normalised
from ...errors import Count, check_choice, typed
from ...io.config import configure


class PadToSquare:
    """Scales an image to `size` rows and centres it on a black or white square.

    This is inferred: the authors of PromptPAR read images that were padded by code they did not release. Commented-out
    code of theirs, which this follows, has both colours; black is what they answered when asked (OpenPAR issue 45).

    Resized bilinearly without antialiasing, as OpenCV does. The result may be one or two pixels narrower than high,
    like theirs. An image that would be wider than high is not padded (the resize that follows changes its aspect
    ratio).

    Args:
        antialias: resize with antialiasing, by Pillow.
        padding: "black" or "white".

    Raises `BadParameter`: another colour.
    """

    @typed
    def __init__(self, size: Count, antialias: bool = False, padding: str = "black"):
        check_choice("padding", padding, ("black", "white"))
        self.size, self.antialias, self.padding = size, antialias, padding

    def __call__(self, picture: Image.Image | Tensor) -> Image.Image:
        picture = as_rgb(picture)
        picture = F.to_pil_image(picture) if isinstance(picture, Tensor) else picture
        wide = picture.width / (picture.height / self.size)
        if wide > self.size:
            return picture
        width, edge = max(1, int(wide)), int((self.size - wide) / 2)
        if self.antialias:
            resized = picture.resize((width, self.size), Image.Resampling.BILINEAR)
        else:
            pixels = F.pil_to_tensor(picture.convert("RGB"))
            resized = F.to_pil_image(F.resize(pixels, [self.size, width], antialias=False))
        square = Image.new("RGB", (width + 2 * edge, self.size), self.padding)
        square.paste(resized, (edge, 0))
        return square


@typed
def square_transform(
    size: Count = 224, train: bool = False, antialias: bool = False, padding: str = "black"
) -> v2.Transform:
    """PromptPAR's transform: padded to a square, resized (bilinear), normalised by 0.5, not by CLIP's statistics.

    Args:
        antialias, padding: see `PadToSquare`.
        train: adds 10 pixels of black padding, a random crop of `size`, and a flip with probability 0.5.

    Returns:
        From a PIL image or a uint8 tensor (3, H, W) to a float32 tensor (3, size, size).
    """
    cut = [v2.Pad(10), v2.RandomCrop(size), v2.RandomHorizontalFlip(0.5)] if train else []
    halves = SimpleNamespace(size=size, mean=(0.5,) * 3, std=(0.5,) * 3)
    steps = [PadToSquare(size, antialias, padding), v2.Resize((size, size)), *cut, *normalised(halves)]
    arguments = {"size": size, "train": train, "antialias": antialias, "padding": padding}
    return configure(v2.Compose(steps), arguments, square_transform)

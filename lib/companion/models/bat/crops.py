"""Crops of videos of two streams, and the pairs of them on which a tracker is trained.

    patch, scale = crop(image, box, 2, 128)                # uint8 (128, 128, 6)
    pairs = Pairs(load("rgbt/lasher", "data", "train"), 60_000)
    template, search, box = pairs[0]                       # uint8 (6, 128, 128), (6, 256, 256); float32 (4,)

Boxes are x, y, w, h in pixels. Crops and pairs follow BAT (Cao et al., AAAI 2024), which uses those of OSTrack (Ye et
al., ECCV 2022).
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset, get_worker_info

from ...backbones import per_channel
from ...data.tracking import Annotated
from ...errors import BadParameter, CompanionError, check_choice, extra

MEAN = (0.485, 0.456, 0.406)  # ImageNet's, for both streams
STD = (0.229, 0.224, 0.225)


def crop(image: np.ndarray, box: Iterable[float], factor: float, size: int) -> tuple[np.ndarray, float]:
    """The square around a box, resized: the tracker's input (BAT's code, `sample_target`).

    The side is s = ceil(sqrt(w h) * factor) pixels; pixels outside the image are black. As in the official code the
    image's last row and column are never used: a crop that crosses the right or lower border loses one real pixel.

    Args:
        image: uint8 (H, W, C).
        box: x, y, w, h in pixels.
        factor: side of the crop over the side of the box; 2 for templates, 4 for searches.
        size: side of the result.

    Returns:
        The patch, uint8 (size, size, C), resized bilinearly by OpenCV, and its scale: size / s.

    Raises `BadParameter`: the box has no area or is not finite, or the crop lies wholly outside the image.
    """
    x, y, w, h = (float(value) for value in box)
    if not (w > 0 and h > 0 and math.isfinite(x + y + w + h)):
        raise BadParameter("box", [x, y, w, h], "x, y, w, h in pixels with w and h above 0")
    check_choice("image", image.dtype, (np.uint8,))
    side = math.ceil(math.sqrt(w * h) * factor)
    height, width, channels = image.shape
    left, top = round(x + w / 2 - side / 2), round(y + h / 2 - side / 2)
    x1, x2 = max(left, 0), min(left + side, width - 1)
    y1, y2 = max(top, 0), min(top + side, height - 1)
    if x1 >= x2 or y1 >= y2:
        raise BadParameter("box", [x, y, w, h], f"a box whose crop meets the image, which has {width}x{height} pixels")
    square = np.zeros((side, side, channels), np.uint8)
    square[y1 - top : y2 - top, x1 - left : x2 - left] = image[y1:y2, x1:x2]
    return _opencv().resize(square, (size, size)), size / side


def _opencv():
    with extra("tracking"):
        import cv2
    if get_worker_info():
        cv2.setNumThreads(0)  # a loader already uses one process per core
    return cv2


def box_in_crop(box: Iterable[float], centre_box: Iterable[float], scale: float, size: int) -> np.ndarray:
    """A box in the coordinates of the crop around `centre_box`: x, y, w, h in units of the crop, (4,) float64.

    The centre of `centre_box` falls on (size - 1) / 2, half a pixel off the middle, as in the official training code.
    """
    box, around = _box(box), _box(centre_box)
    centre = (size - 1) / 2 + (box[:2] + box[2:] / 2 - around[:2] - around[2:] / 2) * scale
    extent = box[2:] * scale
    return np.concatenate([centre - extent / 2, extent]) / size


def box_from_crop(box: Iterable[float], centre_box: Iterable[float], scale: float, size: int) -> np.ndarray:
    """A predicted box in image coordinates: from CX, CY, w, h in units of the crop to x, y, w, h in pixels, (4,)
    float64.

    The tracker's head predicts box centres. As in the official test loop the middle of the crop around `centre_box` is
    size / 2 here, half a pixel of the crop from the one that `box_in_crop` uses in training.
    """
    predicted, around = _box(box) * size / scale, _box(centre_box)
    centre = around[:2] + around[2:] / 2 + predicted[:2] - size / 2 / scale
    return np.concatenate([centre - predicted[2:] / 2, predicted[2:]])


def clip_box(box: Iterable[float], height: int, width: int, margin: float = 10) -> np.ndarray:
    """Clip a box to the image: at least `margin` pixels remain inside, and no side is shorter than that. (4,)
    float64."""
    box, limit = _box(box), np.array([width, height])
    first = np.minimum(np.maximum(box[:2], 0), limit - margin)
    last = np.minimum(np.maximum(box[:2] + box[2:], margin), limit)
    return np.concatenate([first, np.maximum(last - first, margin)])


def _box(values: Iterable[float]) -> np.ndarray:
    box = np.array([*values], float)
    if not np.isfinite(box).all():
        raise BadParameter("box", values, "finite numbers")
    return box


def normalise(patches: np.ndarray | Tensor) -> Tensor:
    """Six-channel crops for a network: to 0..1, then ImageNet's mean and standard deviation for each stream.

    Args:
        patches: an array (..., H, W, 6) or a tensor (..., 6, H, W), uint8.

    Returns:
        float32 (..., 6, H, W), on the device of a tensor given.
    """
    if isinstance(patches, np.ndarray):
        patches = torch.from_numpy(np.ascontiguousarray(np.moveaxis(patches, -1, -3)))
    check_choice("patches", patches.dtype, (torch.uint8,))
    mean, std = (per_channel(values * 2, patches.device) for values in (MEAN, STD))
    return (patches.to(torch.float32) / 255 - mean) / std


_ATTEMPTS = 100  # attempts to draw a pair before giving up
JITTER = (3, 0.25)  # of the search box, see `Pairs`
SHOWN = 4  # a video has more frames than these that show the object
WIDENED = 5  # frames by which the gap of template and search grows where there is no pair
FLIP, BRIGHTNESS = 0.5, (0.8, 1.2)  # probability of each flip, range of the factor


class Pairs(Dataset):
    """Template and search crops of the same object, drawn at random, as BAT is trained (rgbt.yaml; OSTrack's sampler).

    A sequence is drawn uniformly, then a frame that shows the object for the template and a later one for the search,
    fewer than `max_gap` frames later; if there is none, both are redrawn with the gap widened by 5. The search box is
    jittered before the crop. With `augment` the frames are flipped together, then each crop gets its own brightness
    factor in 0.8..1.2 (the same for both streams) and another flip, all flips with probability 1/2.

    The official pipeline also lists a conversion to grey with probability 0.05. It fails on six channels, and the pair
    is dropped and redrawn whenever it is applied: it never takes effect in training, so it is left out here.

    Args:
        sequences: videos with frames.
        samples: the length of an epoch; `pairs[i]` is a new draw, from torch's random state.
        template, search: factor of the crop and its side in pixels.
        max_gap: see above.
        min_frames: sequences with fewer frames, or with 4 frames or fewer that show the object, are not drawn.
        jitter: of the search box: its centre moves by up to jitter[0] / 2 of its size, its sides by a factor
            exp(jitter[1] * N(0, 1)) each.
        min_side: frames whose box is not wider and higher than this count as absent (VisEvent: 5).
        augment: flips and brightness; without it the pairs are still jittered.

    Raises:
        BadParameter: no sequence can be drawn from.
        CompanionError (on indexing): the crops of 100 consecutive draws were outside their frames.
        CorruptFile (on indexing): as `read_frame`.
    """

    def __init__(
        self,
        sequences: Iterable[Annotated],
        samples: int,
        template: tuple[float, int] = (2, 128),
        search: tuple[float, int] = (4, 256),
        max_gap: int = 200,
        min_frames: int = 20,
        jitter: tuple[float, float] = JITTER,
        min_side: float = 0,
        augment: bool = True,
    ):
        self.samples, self.template, self.search = samples, template, search
        self.max_gap, self.jitter, self.augment = max_gap, jitter, augment
        self.sequences, self.shown = [], []
        for sequence in sequences:
            shown = np.flatnonzero(~sequence.absent & (sequence.boxes[:, 2:] > min_side).all(1))
            if len(sequence) >= min_frames and len(shown) > SHOWN:
                self.sequences.append(sequence)
                self.shown.append(shown)
        if not self.sequences:
            rule = f"at least one with {min_frames} frames or more, and the object in more than {SHOWN}"
            raise BadParameter("sequences", "none to draw from", rule)

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        """Template (6, t, t) and search (6, s, s), the object's box in the search crop, x, y, w, h, (4,).

        Crops are uint8, not normalised, as in `draw`; the box is float32. `index` only bounds the epoch: the draw
        depends on torch's random state.
        """
        if not 0 <= index < self.samples:
            raise IndexError(index)
        return self._tensors(np.random.default_rng(int(torch.randint(2**63 - 1, ()))))

    def draw(self, seed: int, count: int) -> TensorDataset:
        """`count` pairs in memory: uint8 (count, 6, t, t), uint8 (count, 6, s, s), float32 (count, 4).

        Augmented but not normalised: `normalise` does that for a batch. The same seed gives the same pairs.
        """
        rng = np.random.default_rng(seed)
        return TensorDataset(*map(torch.stack, zip(*(self._tensors(rng) for _ in range(count)), strict=True)))

    def _tensors(self, rng: np.random.Generator) -> tuple[Tensor, Tensor, Tensor]:
        template, search, box = self._pair(rng)
        template, search = (torch.from_numpy(np.ascontiguousarray(x.transpose(2, 0, 1))) for x in (template, search))
        return template, search, torch.from_numpy(box.astype(np.float32))

    def _pair(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Two crops, uint8 (side, side, 6), and the box in the second. Redraws when a crop is outside its frame."""
        for _ in range(_ATTEMPTS):
            which = int(rng.integers(len(self.sequences)))
            sequence, frames = self.sequences[which], self._frames(rng, self.shown[which])
            boxes = [sequence.boxes[frame] for frame in frames]
            around = [boxes[0], self._jittered(rng, boxes[1])]
            images = [sequence.frame(frame) for frame in frames]
            if self.augment and rng.random() < FLIP:
                images = [image[:, ::-1] for image in images]
                width = images[0].shape[1]
                boxes, around = ([_flipped(box, width - 1) for box in group] for group in (boxes, around))
            try:
                template, _ = crop(images[0], around[0], *self.template)
                search, scale = crop(images[1], around[1], *self.search)
            except BadParameter:  # the jitter moved the crop out of the frame
                continue
            box = box_in_crop(boxes[1], around[1], scale, self.search[1])
            if self.augment:
                template, _ = self._augmented(rng, template, box)
                search, box = self._augmented(rng, search, box)
            return template, search, box
        raise CompanionError(
            f"{_ATTEMPTS} draws in a row gave no pair: the crops lay outside the frames; the last was of "
            f"'{sequence.name}', frames {frames[0]} and {frames[1]}. Do the boxes fit the images?"
        )

    def _frames(self, rng: np.random.Generator, shown: np.ndarray) -> tuple[int, int]:
        gap = self.max_gap
        while True:
            template = rng.choice(shown[:-1])
            later = shown[(shown > template) & (shown < template + gap)]
            if len(later):
                return int(template), int(rng.choice(later))
            gap += WIDENED

    def _jittered(self, rng: np.random.Generator, box: np.ndarray) -> np.ndarray:
        extent = box[2:] * np.exp(self.jitter[1] * rng.standard_normal(2))
        reach = self.jitter[0] * math.sqrt(extent.prod())
        centre = box[:2] + box[2:] / 2 + reach * (rng.random(2) - 0.5)
        return np.concatenate([centre - extent / 2, extent])

    def _augmented(self, rng: np.random.Generator, patch: np.ndarray, box: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        # rounded to integers, so that pairs can be stored as uint8: an error of at most half a level of 255
        patch = np.rint(np.clip(patch * np.float32(rng.uniform(*BRIGHTNESS)), 0, 255)).astype(np.uint8)
        if rng.random() < FLIP:
            patch, box = np.ascontiguousarray(patch[:, ::-1]), _flipped(box, 1)
        return patch, box


def _flipped(box: np.ndarray, width: float) -> np.ndarray:
    """A box in the mirrored image. As in the official code, `width` is the number of columns - 1 in a frame and 1 in a
    crop."""
    return np.array([width - box[0] - box[2], *box[1:]])

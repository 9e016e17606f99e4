"""The tokens of DMT's teachers for every image, on disk, so that later epochs run the student alone.

    views = Views(images, augment, seed=0)                   # one fixed augmentation of each image
    cache = build("cache", teachers, views)                  # runs the teachers, the first time
    fit(DMT(student, teachers.widths), loss, cache, ...)

Tokens are stored before they are normalised, one memory-mapped file per teacher. A killed build resumes: cache.json
says how far it was a minute ago. At paper size an image takes 0.9 MB in float16 for three ViT-B (197 x 768 values
each), ImageNet-1k 1.2 TB.

A cache of other teachers, images, augmentations or settings is refused and not overwritten; the folder of the images
may have moved.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d
from torch.utils.data import Dataset

from ...data import spaced
from ...errors import BadParameter, CompanionError, Count, check_choice, check_range, typed
from ...io.files import read_json
from ...io.progress import progress
from ...training import stored
from ...training.checkpoints import checkpoint_key
from ...training.hardware import AUTO, Hardware, evaluating, loader
from .model import Teachers

SAMPLED, CLOSE = 32, 0.02  # views in a cache's sample, and their largest difference on another machine


class Views(Dataset):
    """Images under a random augmentation that is always the same for an image.

    Args:
        images: (N, 3, H, W), a `TensorDataset` of them, or a dataset with the paths of its images, `sources`.
        augment: from an image to the input of student and teachers; it draws from torch's generator. None: unchanged.
        seed: of the augmentations.
    """

    def __init__(self, images: Tensor | Dataset, augment: Callable | None = None, seed: int = 0):
        self.images, self.augment, self.seed = images, augment, seed

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        seed = int(np.random.SeedSequence((self.seed, index)).generate_state(1, np.uint64)[0] >> 1)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            item = self.images[index]
            image = item[0] if isinstance(item, (tuple, list)) else item
            return image if self.augment is None else self.augment(image)

    def key(self) -> str:
        """A hash of the images, or of their paths below the folder that they share, and of the seed."""
        content = self._content()
        if not isinstance(content, Tensor):
            shared = os.path.commonpath([min(content), max(content)])
            content = [path.removeprefix(shared) for path in content]
        return checkpoint_key(images=len(self.images), seed=self.seed, content=content)

    def first_key(self) -> str | None:
        """The key in caches without a sample: of the paths as they were given, and the augmentation's name. None for a
        lambda, whose name is that of any other."""
        augment = getattr(self.augment, "__qualname__", repr(self.augment))  # a function's repr contains its address
        facts = {"images": len(self.images), "augment": augment, "seed": self.seed, "content": self._content()}
        return None if "<lambda>" in augment else checkpoint_key(**facts)

    def _content(self) -> Tensor | list[str]:
        pixels = getattr(self.images, "tensors", [self.images])[0]
        return pixels if isinstance(pixels, Tensor) else [str(path) for path in self.images.sources]

    def sample(self) -> list[list[float]]:
        """Some views as the means of their quarters, by which an augmentation is known: functions have no identity."""
        chosen = [self[i].float() for i in spaced(len(self), SAMPLED)]
        return [adaptive_avg_pool2d(view, 2).flatten().tolist() for view in chosen]


class Cache(Dataset):
    """A finished cache, opened: items (image, tokens of teacher 1, ..., K) for `model.loss`.

    Args:
        views, folder: as given to `build`.
        teachers: K.
    """

    def __init__(self, views: Views, folder: str | Path, teachers: int):
        self.views, self.folder = views, Path(folder)
        self.maps = stored.opened(self.folder, teachers)

    def __reduce__(self) -> tuple:
        return Cache, (self.views, self.folder, len(self.maps))  # a loader's process opens the files itself

    def __len__(self) -> int:
        return len(self.views)

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        return (self.views[index], *(torch.from_numpy(np.array(tokens[index])) for tokens in self.maps))

    def tensors(self) -> list[Tensor]:
        """Each teacher's tokens of all images, (rows, N, D_k), still on disk: read where they are indexed."""
        return [torch.from_numpy(tokens) for tokens in self.maps]


@typed
def fill(
    folder: str | Path,
    teachers: Teachers,
    views: Views,
    *,
    dtype: str = "float16",
    batch: Count = 64,
    hardware: Hardware = AUTO,
) -> Cache:
    """The cache in `folder`, opened; what lacks of it is built first.

    Args:
        dtype: of the stored tokens, "float16" or "float32".
        batch: images that go through the teachers at once.
        hardware: as in `fit`, of one device.

    Raises:
        BadParameter: a cache of other teachers, images or settings is there; they are named.
        CompanionError: not enough disk space, or values outside the range of the dtype.
        CorruptFile: a file of the cache cannot be read.
    """
    check_choice("dtype", dtype, ("float16", "float32"))
    check_range("views", len(views), 1)
    folder, (height, width) = Path(folder), views[0].shape[-2:]
    side = next(iter(teachers.models.values())).patch_embed.patch_size[0]
    settings = {
        "tokens": 1 + (height // side) * (width // side),
        "widths": list(teachers.widths),
        "dtype": dtype,
        "images": views.key(),
        "sample": views.sample(),
        # heads are not in the tensors
        "teachers": {
            name: checkpoint_key(model=model, heads=[block.attn.num_heads for block in model.blocks])
            for name, model in teachers.models.items()
        },
    }
    note = folder / stored.NOTE
    if note.is_file():
        written, sample = read_json(note), settings.pop("sample")
        if "sample" not in written:
            settings["images"] = views.first_key()
        differing = {key: value for key, value in settings.items() if written.get(key) != value}
        if not differing and not np.allclose(written.get("sample", sample), sample, atol=CLOSE):
            differing = {"augment": views.augment}
        if differing:
            raise BadParameter(
                "cache", differing, f"the {', '.join(differing)} of the cache in {folder}, or another folder"
            )
        settings = written  # a sample differs in its last digits on another machine

    def tokens(done: int) -> Iterator[list[Tensor]]:
        with evaluating(hardware, teachers) as device:
            stream = loader(views, batch, hardware, device, done)
            for images in progress(stream, "teachers", len(stream) + done // batch, done // batch):
                found = [output.to(getattr(torch, dtype)).cpu() for output in teachers(images.to(device))]
                for name, values in zip(teachers.models, found, strict=True):
                    if not values.isfinite().all():
                        raise CompanionError(f"{name} returns values that {dtype} cannot hold: dtype = 'float32'")
                yield found

    stored.fill(folder, len(views), tokens, arrays=len(teachers.models), facts=settings)
    return Cache(views, folder, len(teachers.models))


def size(rows: int, tokens: int, widths: Sequence[int]) -> int:
    """The size of a cache in float16, in bytes."""
    return 2 * rows * tokens * sum(widths)

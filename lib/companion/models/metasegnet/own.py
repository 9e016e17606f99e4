"""Maps of your own images by a trained network, `companion landcover`."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from ...data import landcover
from ...errors import BadParameter
from ...training.hardware import Hardware, evaluating
from .maps import augmented, label, preview
from .prompts import PROMPTS, Prompts
from .recipe import network


def maps(
    folder: str | Path,
    out: str | Path = "",
    *,
    checkpoint: str,
    method: str = "MetaSegNet",
    prompts: str = "",
    data_root: str = "data",
    accelerator: str = "auto",
    augmentation: str = "none",
    tile: int = 1024,
    overlap: int = 256,
) -> Iterator[tuple[Path, str | None]]:
    """Segment the images of your own folder (see `landcover.own`, with its `classes.txt`), one after the other.

    Args:
        out: folder of the maps <image>.tif and their previews <image>.png; empty: `<folder>/maps`.
        checkpoint: weights that a training saved; `method`: that of the training.
        prompts: file of the texts; empty for the included one.
        data_root: BERT is in <data_root>/weights.
        augmentation, tile, overlap: see `augmented` and `bands`.

    Yields:
        The path of each map and the climate zone of its text.

    Raises `BadParameter`: a map would overwrite an image or its labels.
    """
    data, texts = landcover.own(folder, landcover.read_classes(folder))["all"], Prompts.read(prompts or PROMPTS)
    targets = [Path(out or Path(folder) / "maps") / f"{picture.image.stem}.tif" for picture in data.pictures]
    inputs = {path.resolve() for picture in data.pictures for path in (picture.image, picture.label) if path}
    written = [file for target in targets for file in (target, target.with_suffix(".png"))]
    if taken := [file for file in written if file.resolve() in inputs]:
        raise BadParameter("out", str(out), f"another folder: a map or its preview would overwrite {taken[0]}")
    model = network(method, texts, len(data.classes), data_root=data_root, checkpoint=checkpoint)
    zones = data.zones()
    prompted = texts.of_method(method, zones, own=data.texts())
    with evaluating(Hardware(accelerator), model) as device:
        for i, (picture, target) in enumerate(zip(data.pictures, targets, strict=True)):
            ids = None if prompted is None else model.ids([prompted[i]]).to(device)

            def views(x: Tensor, ids: Tensor | None = ids) -> Tensor:
                return augmented(functools.partial(model.forward, texts=ids), x.to(device), augmentation)

            label(views, picture.image, target, data.palette, data.classes, tile=tile, overlap=overlap, batch=1)
            preview(target)
            yield target, zones[i]

"""Patch embeddings of whole slides, stored as HDF5, one file a slide: what the levels above the patch level train on.

    extract("slide.tiff", model.embed_patches, "slide.h5", encoder=model.patch)    # resumes after a kill

`data.slides.Features` reads the files.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file, save_file
from torch import Tensor, nn

from ...data import slides as data
from ...data.pyramids import Slide
from ...errors import BadParameter, Count, extra, typed
from ...io.files import atomic, read_json, write_json
from ...io.progress import progress
from ...training.checkpoints import checkpoint_key
from .slides import PANDA, Tiles, Tiling, read_mask, tensor, tile, tissue_mask, write_preview

READERS = 4  # threads that read regions ahead, each for one step


@typed
@torch.inference_mode()
def extract(
    path: str | Path,
    encode: Callable[[Tensor], Tensor],
    out: str | Path,
    *,
    encoder: nn.Module | str | Mapping[str, Any],
    tiling: Tiling = PANDA,
    normalise: str = "unit",
    batch: Count = 1,
    mpp: float | None = None,
    masks: str | Path | None = None,
    preview: bool = False,
    device: str | torch.device = "cpu",
) -> Path:
    """Features of a slide's regions, as HDF5: `features` (M, ...) float32, `coords` (M, 2), the settings as attributes.

    Threads read the next regions while the current ones are encoded. Each step's features are written to a folder next
    to `out` and merged at the end: a run killed at any moment resumes and gives the same file. A slide without tissue
    gives a file without rows. Of a finished one only the settings are read, unless masks may have changed.

    Args:
        encode: regions (b, 3, R, R) to features (b, ...): for H-ViT, `embed_patches`, or `embed_regions` after it.
        encoder: what distinguishes the features of two encoders: the module used by `encode`, by a hash of its tensors
            and its numbers of attention heads; or a name; or the `identity` of either, for many slides.
        batch: regions per step.
        mpp: see `Slide`.
        masks: a folder of tissue masks, see `read_mask`; None: tissue is detected by colour.
        preview: write the slide with its regions next to `out`, as PNG, see `write_preview`.

    Raises:
        BadParameter: `out` or its unfinished parts were made with other settings; a mask of other proportions.
        MissingData: the slide has no mask.
        CorruptFile: the slide or its mask cannot be read.
    """
    out, parts = Path(out), Path(f"{out}.parts")
    with Slide(path, mpp) as slide:
        settings = {
            "slide": slide.path.name,
            "size": list(slide.size),
            "slide_mpp": slide.mpp,
            **(encoder if isinstance(encoder, Mapping) else identity(encoder)),
            "normalise": normalise,
            "masks": bool(masks),
            **dataclasses.asdict(tiling),
        }
        if out.is_file():
            written = json.loads(data.read_settings(out))
            _same(settings, written, out)
            # the regions follow from these settings where tissue is detected by colour; a mask may have been changed
            detected = not masks and written.get("masks") is False and written.get("downsample") == tiling.downsample
            if detected and (not preview or out.with_suffix(".png").is_file()):
                shutil.rmtree(parts, ignore_errors=True)  # of a run killed after it had written `out`
                return out
        mask = read_mask(masks, slide, tiling.downsample) if masks else None
        tiles = tile(slide, tiling, mask)
        settings |= {
            "step": tiles.step,
            "level": tiles.level,
            "pixels": tiles.pixels,
            "coords": hashlib.sha256(tiles.coords.tobytes()).hexdigest()[:16],
        }
        if out.is_file():
            _same(settings, written, out)
        elif (plan := parts / "plan.json").is_file():
            _same(settings | {"batch": batch}, read_json(plan), parts)
        else:
            write_json(plan, settings | {"batch": batch})
        if preview:
            shown = tissue_mask(slide.thumbnail(tiling.downsample)[0], tiling) if mask is None else mask
            write_preview(out.with_suffix(".png"), slide, tiles, shown)
        if out.is_file():
            shutil.rmtree(parts, ignore_errors=True)  # of a run killed after it had written `out`
            return out
        starts = [i for i in range(0, len(tiles), batch) if not (parts / f"{i:06d}.safetensors").is_file()]

        def pixels(start: int) -> np.ndarray:
            return np.stack([tiles.read(slide, x, y) for x, y in tiles.coords[start : start + batch]])

        threads = READERS if slide.backend == "openslide" else 1  # declared safe for several threads
        with ThreadPoolExecutor(threads) as reader:
            ahead = deque(reader.submit(pixels, start) for start in starts[:threads])
            count = -(-len(tiles) // batch)
            for i, start in enumerate(progress(starts, slide.path.stem, count, count - len(starts))):
                regions = ahead.popleft().result()
                ahead += [reader.submit(pixels, following) for following in starts[i + threads : i + threads + 1]]
                features = encode(tensor(regions, normalise, device)).float().cpu().numpy()
                if features.shape[:1] != (len(regions),):
                    raise BadParameter("encode", features.shape, f"({len(regions)}, ...), of so many regions")
                with atomic(parts / f"{start:06d}.safetensors") as temporary:
                    save_file({"features": np.ascontiguousarray(features)}, temporary)
    _assemble(out, parts, tiles, batch, settings)
    shutil.rmtree(parts)
    return out


def identity(encoder: nn.Module | str) -> dict[str, Any]:
    """What `extract` writes of an encoder: the hash of its tensors or its name, and its numbers of attention heads."""
    if isinstance(encoder, str):
        return {"encoder": encoder, "heads": []}
    # no tensor depends on the number of attention heads, so the hash does not either
    heads = [module.num_heads for module in encoder.modules() if hasattr(module, "num_heads")]
    return {"encoder": checkpoint_key(encoder=encoder), "heads": heads}


def _same(settings: dict, written: dict, where: Path) -> None:
    # files of earlier versions lack these
    written = {"jpeg": False, "heads": settings["heads"], "slide_mpp": settings["slide_mpp"]} | written
    for key, value in settings.items():
        # where tissue is looked for only matters through the coordinates
        if key not in ("downsample", "masks") and written.get(key) != value:
            raise BadParameter(key, value, f"{written.get(key)!r}, as in {where}; delete that to start from scratch")


def _assemble(out: Path, parts: Path, tiles: Tiles, batch: int, settings: dict) -> None:
    with extra("slides"):
        import h5py

    with atomic(out) as temporary, h5py.File(temporary, "w") as file:
        file.create_dataset("coords", data=tiles.coords)
        file.create_dataset("shares", data=tiles.shares)
        file.attrs["settings"] = json.dumps(settings)
        if not len(tiles):
            file.create_dataset("features", shape=(0,), dtype="float32")
        for start in range(0, len(tiles), batch):
            features = load_file(parts / f"{start:06d}.safetensors")["features"]
            if not start:
                shape = (len(tiles), *features.shape[1:])
                file.create_dataset("features", shape=shape, dtype="float32", chunks=(1, *features.shape[1:]))
            file["features"][start : start + len(features)] = features

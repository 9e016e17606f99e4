"""`predict`: predictions of any paper's model from image files, with class names.

model                                              of each image
SA²VP, DPLQ, their baselines, DMT's classifier     {class: probability}, the most probable first
PromptPAR                                          {attribute: probability}
ECAMP's classifier                                 {finding: probability}; with `exclusive` they sum to 1
ECAMP's segmenter, detector                        probabilities (outputs, S, S); boxes (n, 7), see `detection.suppress`
ECAMP, DMT's student                               features (D,)
MetaSegNet                                         the class of each pixel, (H, W) uint8, 255 where there is no data
SIC-CADS' recogniser                               {class: score}; with a `detector`, refined detections
H-ViT                                              the grade of a slide, by name if names are known
BAT                                                for a pair of videos: `bat.tracking.Track`, boxes and scores
TIP's pipeline                                     the restored image, a PIL image
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as F

from .backbones import input_of
from .data import attributes, classification, decoding, domains, own_set, xrays
from .errors import BadParameter, CorruptFile, check_names
from .ops.recorded import made_by, make

BATCH = 16

Picture = str | Path | Image.Image


def predict(
    model: Any, images: Any, *, class_names: Sequence[str] = (), transform: Callable | None = None, **options: Any
) -> Any:
    """Predictions for images, see the table above: a list with one entry per image.

    The model is set to eval mode and runs on its device.

    Args:
        model: of any paper, trained here or loaded.
        images: paths or PIL images, or one of them. For X-rays DICOM too. For H-ViT: files of `companion slides`, or
            tensors (M, ...) of a slide's regions, as in `HViT.forward`. For BAT: two folders or two video files, RGB
            and the second stream.
        class_names, transform: as in `save`. By default those saved with a loaded model; else class numbers, and the
            paper's transform for the backbone.
        options: for MetaSegNet `texts`, one for each image or one for all, and `tile`, `overlap`; for SIC-CADS
            `detector`, `gamma` and others of `sic_cads.detectors.refined`; for ECAMP `exclusive`; for BAT `box`, x, y,
            w, h in the first frame, and others of `bat.tracking.track`, such as `video`, a file to write; for TIP
            `prompt`, `restoration` and others of the pipeline.

    Raises:
        BadParameter: no image; a model, option or number of names that does not match.
        CorruptFile: an image that is missing or cannot be read.
    """
    name = "TIPPipeline" if type(model).__name__ == "TIPPipeline" else _name(model)
    if name not in _PREDICT:
        raise BadParameter("model", type(model).__name__, sorted(_PREDICT))
    if isinstance(model, nn.Module):
        model.eval()
    given = [images] if isinstance(images, (str, Path, Image.Image, Tensor)) else list(images)
    if not given:
        raise BadParameter("images", "an empty list", "at least one image")
    check_names(class_names)
    names, of_model = tuple(class_names or getattr(model, "class_names", ())), _PREDICT[name]
    if "transform" in (known := inspect.signature(of_model)).parameters:
        options["transform"] = transform or getattr(model, "transform", None)
    elif transform is not None:
        raise BadParameter("transform", type(transform).__name__, f"None: {type(model).__name__} has its own")
    try:
        known.bind(model, given, names, **options)
    except TypeError as error:
        raise BadParameter("options", sorted(options), f"those of {name} ({error})") from error
    with torch.no_grad():  # not inference mode: tensors that a model caches in it could not be used in training
        return of_model(model, given, names, **options)


def _name(model: nn.Module) -> str:
    """The class of a recorded model, or "<paper>.<function>" for one built by a function."""
    note = made_by(model)
    module, _, name = str(note.get("by", "") if isinstance(note, Mapping) else "").partition(":")
    return name if name[:1].isupper() else f"{'.'.join(module.split('.')[2:3])}.{name}"


def _noted(model: nn.Module, name: str) -> tuple[str, ...]:
    """The texts that a model was built with; none if they were given as embeddings."""
    found = make(made_by(model)["args"][name])
    return tuple(found) if isinstance(found, (list, tuple)) else ()


# --- images -----------------------------------------------------------------------------------------------------------


def _picture(image: Picture) -> Image.Image:
    """An RGB image, read like those of your own folders."""
    if isinstance(image, Image.Image):
        return decoding.in_memory(image)
    return classification.Images(_own(image), Path(), [str(image)], [0], 1).picture(0)


def _grey(image: Picture) -> Tensor:
    """A grey image (1, H, W) in 0 to 1, read like X-rays."""
    if isinstance(image, Image.Image):
        return torch.from_numpy(decoding.unit_in_memory(image))[None]
    return xrays.Pictures(_own(image), ".", [str(Path(image).absolute())]).grey(0)


def _coloured(image: Picture) -> Tensor:
    """An RGB image (3, H, W) in 0 to 1, read like RIGA's fundus photographs."""
    return F.to_dtype(F.pil_to_tensor(_picture(image)), torch.float32, scale=True)


def _own(image: str | Path) -> Any:
    if not Path(image).is_file():
        raise CorruptFile(image, "there is no such file")
    return own_set(Path(image).parent, "classification", "")


def _outputs(
    model: nn.Module, images: Sequence[Picture], transform: Callable, read: Callable = _picture, run: Any = None
) -> Iterator[Any]:
    """The outputs of a model for batches of images; of several outputs the first. `run` replaces the model's
    forward."""
    device = next(model.parameters()).device
    for start in range(0, len(images), BATCH):
        batch = torch.stack([transform(read(image)) for image in images[start : start + BATCH]]).to(device)
        found = (run or model)(batch)
        yield found[0] if isinstance(found, tuple) else found


def _named(rows: Tensor, names: Sequence[str]) -> list[dict[str, float]]:
    """Each row of (n, C) as name -> value, the largest first."""
    check_names(names, rows.shape[1])  # equal ones would be one entry
    names = names or [str(i) for i in range(rows.shape[1])]
    order = rows.argsort(dim=1, descending=True, stable=True).tolist()
    return [{names[i]: row[i] for i in best} for best, row in zip(order, rows.tolist(), strict=True)]


# --- by model ---------------------------------------------------------------------------------------------------------


def _classes(model, images, names, transform) -> list[dict[str, float]]:
    if hasattr(model, "clip"):
        names = names or _noted(model, "classes")
        transform = transform or domains.clip_transform(input_of(model.clip))
    backbone = getattr(model, "backbone", model)
    transform = transform or classification.resize_transform(input_of(backbone))
    logits = torch.cat([x.float().cpu() for x in _outputs(model, images, transform)])
    return _named(logits.softmax(1), names)


def _fine_tuned(model, images, names, transform) -> list[dict[str, float]]:
    from .models.dmt.downstream import test_transform

    return _classes(model, images, names, transform or test_transform(model.patch_embed.img_size[0]))


def _attributes(model, images, names, transform) -> list[dict[str, float]]:
    transform = transform or attributes.square_transform(model.clip.visual.image_size[0])
    logits = torch.cat([x.float().cpu() for x in _outputs(model, images, transform)])
    return _named(logits.sigmoid(), names or _noted(model, "sentences"))


def _findings(model, images, names, transform, exclusive: bool = False) -> list[dict[str, float]]:
    transform = transform or xrays.test_transform(model.patch_embed.img_size[0])
    logits = torch.cat([x.float().cpu() for x in _outputs(model, images, transform, _grey)])
    return _named(logits.softmax(1) if exclusive else logits.sigmoid(), names)


def _masks(model, images, names, transform) -> list[Tensor]:
    transform = transform or xrays.squeeze_transform(model.map.encoder.patch_embed.img_size[0])
    read = _coloured if len(model.decoders) == 2 else _grey  # disc and cup are those of RIGA
    return list(torch.cat([x.float().cpu() for x in _outputs(model, images, transform, read)]).sigmoid())


def _boxes(model, images, names, transform, **options) -> list[Tensor]:
    transform = transform or xrays.squeeze_transform(model.size)
    heads = _outputs(model, images, transform, _grey)
    return [boxes.cpu() for found in heads for boxes in model.decode([x.float() for x in found], **options)]


def _chest_features(model, images, names, transform) -> list[Tensor]:
    transform = transform or xrays.test_transform(model.image)
    run = model.encoder.forward_features
    found = _outputs(model, images, transform, _grey, run)
    return list(torch.cat([x[:, 1:].mean(1).float().cpu() for x in found]))


def _features(model, images, names, transform) -> list[Tensor]:
    from .models.dmt.downstream import test_transform

    transform = transform or test_transform(model.patch_embed.img_size[0])
    return list(torch.cat([x.float().cpu() for x in _outputs(model, images, transform, run=model.features)]))


def _land_cover(model, images, names, texts=None, tile: int = 512, overlap: int = 128) -> list[Tensor]:
    from .data.rasters import Raster, pixels
    from .models.metasegnet import segment
    from .models.metasegnet.geotiff import NODATA

    texts = [texts] if texts is None or isinstance(texts, str) else list(texts)
    if len(texts) not in (1, len(images)):
        raise BadParameter("texts", f"{len(texts)} of them", f"1, or one for each of {len(images)} images")
    device, found = next(model.parameters()).device, []
    for image, text in zip(images, texts * (len(images) // len(texts)), strict=True):
        there = True
        if isinstance(image, Image.Image):
            raw = F.pil_to_tensor(image.convert("RGB")).numpy()
        else:
            with Raster(image) as raster:
                raw, there = raster.read(), torch.from_numpy(raster.valid(0, 0, *raster.size))
        ids = () if text is None else (model.ids([text]).to(device),)
        x = torch.from_numpy(np.asarray(pixels(raw))).to(device)

        def network(part: Tensor, ids: tuple[Tensor, ...] = ids) -> Tensor:
            return model(part, *ids)

        labels = segment(network, x, tile=tile, overlap=overlap)
        found.append(labels.masked_fill(~there, NODATA) if isinstance(there, Tensor) else labels)
    return found


def _recognised(model, images, names, detector=None, **options) -> list[Any]:
    from .models.sic_cads.detectors import refined

    device = next(model.parameters()).device
    found: list[Any] = []
    for image in images:
        pixels = F.pil_to_tensor(_picture(image)).to(device)
        scores = model.recognise(pixels[None], student=model.teacher is None).p[0].float().cpu()
        named = _named(scores[None], names)[0]
        if detector is None:
            found.append(named)
            continue
        best = refined(detector(pixels), scores, **options)
        known = names or [str(i) for i in range(len(scores))]
        rows = zip(best.classes.tolist(), best.scores.tolist(), best.boxes.tolist(), strict=True)
        found.append([{"class": known[c], "score": score, "box": box} for c, score, box in rows])
    return found


def _grades(model, images, names) -> list[Any]:
    from .data.slides import read_features
    from .models.hvit import predict as grade

    device, slide, found = next(model.parameters()).device, model.slide, []
    for regions in images:
        x = regions if isinstance(regions, Tensor) else read_features(regions)["features"]
        i = int(grade(slide.head, model(x[None].to(device)).float().cpu(), slide.classes))
        if names and len(names) != slide.classes:
            raise BadParameter("class_names", f"{len(names)} names", f"{slide.classes}, one for each grade")
        found.append(names[i] if names else i)
    return found


def _track(model, images, names, *, box, **options) -> Any:
    from .models.bat.tracking import track

    if len(images) != 2:
        raise BadParameter("images", f"{len(images)} of them", "two folders or two video files, RGB and thermal")
    visible, infrared = images
    return track(visible, infrared, box, model, **options)


def _restored(pipe, images, names, **options) -> list[Image.Image]:
    pixels = [F.to_dtype(F.pil_to_tensor(_picture(image)), torch.float32, scale=True)[None] for image in images]
    return [pipe(x, **{"output": "pil"} | options).images[0] for x in pixels]


_PREDICT: dict[str, Callable[..., Any]] = {
    **dict.fromkeys(("SA2VP", "SA2VPSwin", "VPT", "LinearProbe", "FineTuning"), _classes),
    **dict.fromkeys(("DPLQ", "ZeroShot", "CoOp", "CoCoOp", "MaPLe"), _classes),
    "dmt.classifier": _fine_tuned,
    "ViT": _features,
    "PromptPAR": _attributes,
    **dict.fromkeys(("ecamp.classifier", "ecamp.classifier_from_official"), _findings),
    "Segmenter": _masks,
    "Detector": _boxes,
    "ECAMP": _chest_features,
    "MetaSegNet": _land_cover,
    "MLR": _recognised,
    "HViT": _grades,
    **dict.fromkeys(("BAT", "FullFineTuning", "SingleStream", "FeatureFusion", "HigherPeak"), _track),
    "TIPPipeline": _restored,
}

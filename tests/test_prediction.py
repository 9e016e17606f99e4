"""`companion.predict`: predictions for image files equal the model's for their tensors, with names."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.ops import box_iou
from torchvision.transforms.v2 import functional as F

import companion
from companion import backbones, detectors, geotiff
from companion.data import attributes, classification, domains, xrays
from companion.errors import CorruptFile
from companion.models import ecamp, hvit, metasegnet
from companion.models.dmt import downstream
from tests.models.common import refuses
from tests.small import small_pipe
from tests.test_saving import CLASSES, picture, trained


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """Three images: a JPEG, a grey PNG and a palette PNG."""
    kinds = {"a.jpg": picture(1), "b.png": picture(2).convert("L"), "c.png": picture(3).convert("P")}
    for name, image in kinds.items():
        image.save(tmp_path / name)
    return [tmp_path / name for name in kinds]


def stacked(files: list[Path], transform: Callable, grey: bool = False) -> torch.Tensor:
    def read(path: Path) -> Any:
        return torch.from_numpy(xrays.read_image(path))[None] if grey else Image.open(path).convert("RGB")

    return torch.stack([transform(read(path)) for path in files])


def input_of(model: Any) -> backbones.Input:
    return backbones.input_of(getattr(model, "clip", None) or model.backbone)


CLASSIFIERS: dict[str, tuple[Callable, Callable, bool]] = {
    # the transform of the paper, the probabilities of its outputs, whether images are grey
    "SA²VP": (lambda m: classification.resize_transform(input_of(m)), lambda x: x[0].softmax(1), False),
    "VPT": (lambda m: classification.resize_transform(input_of(m)), lambda x: x.softmax(1), False),
    "DPLQ": (lambda m: domains.clip_transform(input_of(m)), lambda x: x.softmax(1), False),
    "CoOp": (lambda m: domains.clip_transform(input_of(m)), lambda x: x.softmax(1), False),
    "PromptPAR": (lambda m: attributes.square_transform(64), lambda x: x.logits.sigmoid(), False),
    "DMT's classifier": (lambda m: downstream.test_transform(32), lambda x: x.softmax(1), False),
    "ECAMP's classifier": (lambda m: xrays.test_transform(32), lambda x: x.sigmoid(), True),
}


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_classes_findings_and_attributes_by_name(name: str, files: list[Path]) -> None:
    model, (transform, probabilities, grey) = trained(name), CLASSIFIERS[name]
    if name == "PromptPAR":  # a CLIP of images higher than wide has no transform of the paper's
        options: dict[str, Any] = {"transform": _narrow}
    else:
        options = {"transform": None}
    with torch.no_grad():
        expected = probabilities(model(stacked(files, options["transform"] or transform(model), grey)))
    found = companion.predict(model, files, class_names=CLASSES, **options)
    assert len(found) == 3
    for row, true in zip(found, expected.float(), strict=True):
        assert list(row.values()) == sorted(row.values(), reverse=True)
        assert [row[n] for n in CLASSES] == pytest.approx(true.tolist(), abs=1e-6)
    one = companion.predict(model, Image.open(files[0]) if not grey else files[0], class_names=CLASSES, **options)
    assert one[0] == pytest.approx(found[0], abs=1e-6) and len(one) == 1


@pytest.mark.parametrize("kind", ["I;16", "F", "rotated"])
@pytest.mark.parametrize("name", ["VPT", "ECAMP's classifier"])
def test_a_pil_image_is_read_as_its_file(name: str, kind: str, tmp_path: Path) -> None:
    values = np.asarray(picture(2).convert("L"), np.float32) / 255
    path, exif = tmp_path / ("a.tif" if kind == "F" else "a.png"), Image.Exif()
    image = Image.fromarray(values if kind == "F" else (values * 65535).astype(np.uint16))
    if kind == "rotated":
        exif[0x0112], image = 6, picture(2)
    image.save(path, **({"exif": exif} if exif else {}))
    model = trained(name)
    with Image.open(path) as opened:
        assert companion.predict(model, opened) == companion.predict(model, path)
    if kind != "rotated":
        assert companion.predict(model, image) == companion.predict(model, path)
        refuses((lambda: companion.predict(model, Image.fromarray(values * 1e6)), "images.*full scale"))


def _narrow(image: Image.Image) -> torch.Tensor:
    return F.normalize(F.to_dtype(F.pil_to_tensor(image.resize((32, 64))), torch.float32, scale=True), [0.5], [0.5])


def test_names_are_those_of_the_prompts_the_file_or_numbers(files: list[Path], tmp_path: Path) -> None:
    assert companion.predict(trained("DPLQ"), files[0])[0].keys() == set(CLASSES)
    assert companion.predict(trained("VPT"), files[0])[0].keys() == {"0", "1", "2"}
    saved = companion.save(trained("VPT"), tmp_path / "m.safetensors", class_names=CLASSES)
    assert companion.predict(companion.load(saved), str(files[0]))[0].keys() == set(CLASSES)
    assert sum(companion.predict(trained("ECAMP's classifier"), files[0], exclusive=True)[0].values()) == pytest.approx(
        1
    )


def test_masks_boxes_and_features(files: list[Path]) -> None:
    segmenter, detector = trained("ECAMP's segmenter"), trained("ECAMP's detector")
    x, squeezed = (stacked(files, t, True) for t in (xrays.test_transform(32), xrays.squeeze_transform(32)))
    student = trained("DMT's student")
    with torch.no_grad():
        masks, boxes = segmenter(squeezed).sigmoid(), detector.decode(detector(squeezed), confidence=0.4)
        chests = trained("ECAMP").encoder.forward_features(x)[:, 1:].mean(1)
        features = student.features(stacked(files, downstream.test_transform(32)))
    torch.testing.assert_close(torch.stack(companion.predict(segmenter, files)), masks)
    fundus, seen = ecamp.Segmenter(segmenter.map.encoder, outputs=2).eval(), []  # disc and cup, in colour
    companion.predict(fundus, files, transform=lambda image: seen.append(image) or xrays.squeeze_transform(32)(image))
    assert any((image[0] != image[1]).any() for image in seen)
    for found, true in zip(companion.predict(detector, files, confidence=0.4), boxes, strict=True):
        torch.testing.assert_close(found, true)
    assert max(len(found) for found in boxes) > 0
    torch.testing.assert_close(torch.stack(companion.predict(trained("ECAMP"), files)), chests)
    torch.testing.assert_close(torch.stack(companion.predict(student, files)), features)


@pytest.mark.parametrize("name", ["MetaSegNet", "MetaSegNet with BERT"])
def test_land_cover_with_a_text_for_each_image(name: str, files: list[Path], tmp_path: Path) -> None:
    pytest.importorskip("rasterio")
    model, texts = trained(name), ["hot sand", "wet forest", "dry"]
    for i, path in enumerate(files):
        picture(i).save(path)
    found = companion.predict(model, files, texts=texts, tile=32, overlap=8)
    for labels, path, text in zip(found, files, texts, strict=True):
        pixels = geotiff.pixels(np.moveaxis(np.array(Image.open(path).convert("RGB")), -1, 0))
        with torch.no_grad():
            network = lambda x, text=text: model(x, [text])  # noqa: E731
            assert torch.equal(labels, metasegnet.segment(network, pixels, tile=32, overlap=8))
    loaded = companion.load(companion.save(model, tmp_path / "m.safetensors"))
    assert np.array_equal(companion.predict(loaded, files, texts=texts), companion.predict(model, files, texts=texts))
    refuses((lambda: companion.predict(model, files, texts=["a", "b"]), "1, or one for each of 3"))
    refuses((lambda: companion.predict(model, files), "a text for each image"))


def test_image_level_scores_and_refined_detections(files: list[Path], tmp_path: Path) -> None:
    model = trained("MLR")
    pixels = F.pil_to_tensor(Image.open(files[0]).convert("RGB"))
    boxes, probabilities = (
        torch.tensor([[0.0, 0, 20, 20], [20, 20, 40, 40]]),
        torch.tensor([[0.9, 0.1, 0.2], [0, 0.3, 0]]),
    )
    output = detectors.Output(boxes, probabilities, (50, 40))
    scores = model.recognise(pixels[None]).p[0]
    loaded = companion.load(companion.save(model, tmp_path / "m.safetensors", class_names=CLASSES))
    found = companion.predict(loaded, files[0])
    assert [found[0][name] for name in CLASSES] == pytest.approx(scores.tolist(), abs=1e-6)
    best = companion.predict(model, files[0], class_names=CLASSES, detector=lambda image: output, gamma=0.3)[0]
    expected = detectors.refined(output, scores, 0.3)
    assert [row["class"] for row in best] == [CLASSES[i] for i in expected.classes]
    assert [row["score"] for row in best] == pytest.approx(expected.scores.tolist())
    assert box_iou(torch.tensor([row["box"] for row in best]), expected.boxes).diagonal().min() == 1


def test_grades_of_slides() -> None:
    model = trained("H-ViT")
    slides = [torch.randn(m, 16, 48, generator=torch.Generator().manual_seed(m)) for m in (1, 3)]
    with torch.no_grad():
        expected = [int(hvit.predict("regression", model(x[None]), 3)) for x in slides]
    assert companion.predict(model, slides) == expected
    assert companion.predict(model, slides, class_names=CLASSES) == [CLASSES[i] for i in expected]


def test_tracks_and_restored_images(files: list[Path], tmp_path: Path) -> None:
    pytest.importorskip("cv2")
    pytest.importorskip("diffusers")
    from companion import tracking

    for name in ("rgb", "thermal"):
        (tmp_path / name).mkdir()
        for i in range(3):
            picture(i).save(tmp_path / name / f"{i}.png")
    model, box = trained("BAT"), (5, 5, 12, 10)
    videos = tmp_path / "rgb", tmp_path / "thermal"
    found, expected = companion.predict(model, videos, box=box), tracking.track(*videos, box, model)
    assert np.array_equal(found.boxes, expected.boxes) and found.boxes.shape == (3, 4)

    pipe = small_pipe()
    options = {"prompt": "image", "restoration": "deblur", "steps": 2}
    folder = companion.save(pipe, tmp_path / "pipe")
    noise = {"latents": torch.randn(1, 4, 13, 10, generator=torch.Generator().manual_seed(0))}
    images = [companion.predict(p, files[:1], **options, **noise)[0] for p in (pipe, companion.load(folder))]
    assert np.array_equal(*map(np.array, images)) and images[0].size == (40, 50)
    refuses((lambda: companion.load(tmp_path / "rgb"), "model_index.json"), error=CorruptFile)
    refuses((lambda: companion.save(pipe, tmp_path / "rgb"), "model_index.json"), error=CorruptFile)
    refuses((lambda: companion.predict(model, videos), "missing a required"))


def test_what_does_not_fit_is_refused(files: list[Path], tmp_path: Path) -> None:
    model = trained("VPT")
    (tmp_path / "bad.jpg").write_bytes(files[0].read_bytes()[:300])
    refuses(
        (lambda: companion.predict(torch.nn.Linear(2, 2), files), "SA2VP"),
        (lambda: companion.predict(model, files, class_names=["a"]), "3, one for each output"),
        (lambda: companion.predict(model, files, class_names="abc"), "a list of names"),
        (lambda: companion.predict(model, files, class_names=["a", "b", "a"]), "'a' is there twice"),
        (lambda: companion.predict(model, files, texts=["a"]), "texts"),
        (lambda: companion.predict(trained("H-ViT"), [torch.zeros(1)], transform=F.hflip), "has its own"),
        (lambda: companion.predict(model, []), "at least one image"),
    )
    refuses((lambda: companion.predict(model, tmp_path / "none.jpg"), "none.jpg: there is no such"), error=CorruptFile)
    refuses((lambda: companion.predict(model, tmp_path / "bad.jpg"), "bad.jpg"), error=CorruptFile)

"""`companion.predict`: predictions for image files equal the model's for their tensors, with names."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import functional as F

import companion
from companion import backbones
from companion.data import classification, decoding, domains, rasters
from companion.errors import CorruptFile
from companion.models import dmt, ecamp, hvit, metasegnet, sic_cads
from companion.models.ecamp.detection import decode
from companion.models.ecamp.transforms import squeeze_transform
from companion.models.ecamp.transforms import test_transform as xray_transform
from tests.models.common import refuses
from tests.papers.common import picture
from tests.papers.tip import small_pipe
from tests.test_saving import CLASSES, trained


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """Three images: a JPEG, a grey PNG and a palette PNG."""
    kinds = {"a.jpg": picture(1), "b.png": picture(2).convert("L"), "c.png": picture(3).convert("P")}
    for name, image in kinds.items():
        image.save(tmp_path / name)
    return [tmp_path / name for name in kinds]


def stacked(files: list[Path], transform: Callable, grey: bool = False) -> torch.Tensor:
    def read(path: Path) -> Any:
        return torch.from_numpy(decoding.unit(path))[None] if grey else Image.open(path).convert("RGB")

    return torch.stack([transform(read(path)) for path in files])


def input_of(model: Any) -> backbones.Input:
    return backbones.input_of(getattr(model, "clip", None) or model.backbone)


def narrow(image: Image.Image) -> torch.Tensor:
    return F.normalize(F.to_dtype(F.pil_to_tensor(image.resize((32, 64))), torch.float32, scale=True), [0.5], [0.5])


OUTPUTS: dict[str, tuple[Callable, Callable, bool]] = {
    # the transform of the paper, its outputs for the transformed images, whether images are grey
    "SA²VP": (lambda m: classification.resize_transform(input_of(m)), lambda m, x: m(x).softmax(1), False),
    "VPT": (lambda m: classification.resize_transform(input_of(m)), lambda m, x: m(x).softmax(1), False),
    "DPLQ": (lambda m: domains.clip_transform(input_of(m)), lambda m, x: m(x).softmax(1), False),
    "PromptPAR": (lambda m: narrow, lambda m, x: m(x).sigmoid(), False),
    "DMT's classifier": (lambda m: dmt.vit.test_transform(32), lambda m, x: m(x).softmax(1), False),
    "DMT's student": (lambda m: dmt.vit.test_transform(32), lambda m, x: m.features(x), False),
    "ECAMP": (lambda m: xray_transform(32), lambda m, x: m.encoder.forward_features(x)[:, 1:].mean(1), True),
    "ECAMP's classifier": (lambda m: xray_transform(32), lambda m, x: m(x).sigmoid(), True),
    "ECAMP's segmenter": (lambda m: squeeze_transform(32), lambda m, x: m(x).sigmoid(), True),
}


@pytest.mark.parametrize("name", OUTPUTS)
def test_predictions_for_files_are_the_models_for_their_tensors(name: str, files: list[Path]) -> None:
    model, (transform, outputs, grey) = trained(name), OUTPUTS[name]
    # a CLIP of images higher than wide has no transform of the paper's
    given = {"transform": narrow} if name == "PromptPAR" else {}
    with torch.no_grad():
        expected = outputs(model, stacked(files, transform(model), grey)).float()
    rows = companion.predict(model, files, class_names=CLASSES, **given)
    if isinstance(rows[0], dict):
        assert all(list(row.values()) == sorted(row.values(), reverse=True) for row in rows)
        rows = [torch.tensor([row[n] for n in CLASSES]) for row in rows]
    torch.testing.assert_close(torch.stack(rows), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_images_have_the_precision_of_the_model(dtype: torch.dtype, files: list[Path]) -> None:
    plain, other = trained("VPT"), trained("VPT").to(dtype)
    for one, expected in zip(companion.predict(other, files), companion.predict(plain, files), strict=True):
        assert one == pytest.approx(expected, abs=0.05 if dtype is torch.bfloat16 else 1e-5)


@pytest.mark.parametrize("name", ["VPT", "ECAMP's classifier"])
def test_a_pil_image_is_read_as_its_file(name: str, tmp_path: Path) -> None:
    model, exif, grey = trained(name), Image.Exif(), np.asarray(picture(2).convert("L"), np.float32) / 255
    exif[0x0112] = 6  # rotated
    picture(2).save(tmp_path / "rotated.png", exif=exif)
    Image.fromarray((grey * 65535).astype(np.uint16)).save(tmp_path / "deep.png")
    Image.fromarray(grey).save(tmp_path / "float.tif")
    black = companion.predict(model, Image.new("RGB", (40, 50)))
    for path in tmp_path.iterdir():
        with Image.open(path) as opened:
            assert companion.predict(model, opened) == companion.predict(model, path) != black


def test_names_are_those_of_the_prompts_or_numbers(files: list[Path]) -> None:
    assert companion.predict(trained("DPLQ"), files[0])[0].keys() == set(CLASSES)
    assert companion.predict(trained("VPT"), str(files[0]))[0].keys() == {"0", "1", "2"}
    (exclusive,) = companion.predict(trained("ECAMP's classifier"), files[0], exclusive=True)
    assert sum(exclusive.values()) == pytest.approx(1)


def test_boxes_of_x_rays_and_masks_of_photographs_in_colour(files: list[Path]) -> None:
    detector, seen = trained("ECAMP's detector"), []
    with torch.no_grad():
        boxes = decode(detector(stacked(files, squeeze_transform(32), True)), 32, confidence=0.4)
    assert max(map(len, boxes)) > 0
    torch.testing.assert_close(companion.predict(detector, files, confidence=0.4), boxes)
    fundus = ecamp.Segmenter(trained("ECAMP").encoder, outputs=2).eval()  # disc and cup
    companion.predict(fundus, files, transform=lambda image: seen.append(image) or squeeze_transform(32)(image))
    assert any((image[0] != image[1]).any() for image in seen)


def test_land_cover_with_a_text_for_each_image(files: list[Path]) -> None:
    pytest.importorskip("rasterio")
    model, texts = trained("MetaSegNet with BERT"), ["hot sand", "wet forest", "dry"]
    for i, path in enumerate(files):
        picture(i).save(path)
    found = companion.predict(model, files, texts=texts, tile=32, overlap=8)
    for labels, path, text in zip(found, files, texts, strict=True):
        pixels = rasters.pixels(np.moveaxis(np.array(Image.open(path).convert("RGB")), -1, 0))
        with torch.no_grad():
            expected = metasegnet.segment(lambda x, text=text: model(x, [text]), pixels, tile=32, overlap=8)
        assert torch.equal(labels, expected)
    refuses(
        (lambda: companion.predict(model, files, texts=["a", "b"]), "2"),
        (lambda: companion.predict(model, files), "text"),
    )


def test_image_level_scores_and_refined_detections(files: list[Path]) -> None:
    model = trained("MLR")
    pixels = F.pil_to_tensor(Image.open(files[0]).convert("RGB"))
    boxes = torch.tensor([[0.0, 0, 20, 20], [20, 20, 40, 40]])
    output = sic_cads.Output(boxes, torch.tensor([[0.9, 0.1, 0.2], [0, 0.3, 0]]), (50, 40))
    scores = model.recognise(pixels[None]).p[0]
    (found,) = companion.predict(model, files[0], class_names=CLASSES)
    assert [found[name] for name in CLASSES] == pytest.approx(scores.tolist(), abs=1e-5)
    (best,) = companion.predict(model, files[0], class_names=CLASSES, detector=lambda image: output, gamma=0.3)
    expected = sic_cads.refined(output, scores, 0.3)
    assert [row["class"] for row in best] == [CLASSES[i] for i in expected.classes]
    assert [row["score"] for row in best] == pytest.approx(expected.scores.tolist())
    assert [row["box"] for row in best] == expected.boxes.tolist()


def test_grades_of_slides() -> None:
    model = trained("H-ViT")
    slides = [torch.randn(m, 16, 48, generator=torch.Generator().manual_seed(m)) for m in (1, 3)]
    with torch.no_grad():
        expected = [int(hvit.graded("regression", model(x[None]), 3)) for x in slides]
    assert companion.predict(model, slides) == expected
    assert companion.predict(model, slides, class_names=CLASSES) == [CLASSES[i] for i in expected]


def test_restored_images_of_a_saved_pipeline(files: list[Path], tmp_path: Path) -> None:
    pytest.importorskip("diffusers")
    pipe, options = small_pipe(), {"prompt": "image", "restoration": "deblur", "steps": 2}
    folder = companion.save(pipe, tmp_path / "pipe")
    options["latents"] = torch.randn(1, 4, 13, 10, generator=torch.Generator().manual_seed(0))
    images = [companion.predict(p, files[:1], **options)[0] for p in (pipe, companion.load(folder))]
    assert np.array_equal(*map(np.array, images)) and images[0].size == (40, 50)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").touch()
    refuses(
        (lambda: companion.load(tmp_path / "other"), "config.json"),
        (lambda: companion.save(pipe, tmp_path / "other"), "model_index.json"),
        error=CorruptFile,
    )


def test_what_does_not_fit_is_refused(files: list[Path], tmp_path: Path) -> None:
    model = trained("VPT")
    (tmp_path / "bad.jpg").write_bytes(files[0].read_bytes()[:300])
    refuses(
        (lambda: companion.predict(torch.nn.Linear(2, 2), files), "Linear"),
        (lambda: companion.predict(model, files, class_names=["a"]), "3"),
        (lambda: companion.predict(model, files, class_names=["a", "b", "a"]), "'a'"),
        (lambda: companion.predict(model, files, texts=["a"]), "texts"),
        (lambda: companion.predict(model, []), "images"),
    )
    for name in ("none.jpg", "bad.jpg"):
        refuses((lambda name=name: companion.predict(model, tmp_path / name), name), error=CorruptFile)

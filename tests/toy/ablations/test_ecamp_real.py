"""ECAMP's probe on real X-rays: which images each stage sees, what is drawn, and a row of every method."""

import numpy as np
import pytest
import torch
from PIL import Image
from timm.models.vision_transformer import VisionTransformer

from companion.errors import CompanionError, CorruptFile, MissingData
from companion.models.ecamp import heads
from companion.toy.ablations import ecamp_real as study
from companion.toy.ablations import selecting

COUNTS = {"train": 60, "val": 24, "test": 24}


def small(name, weights="pretrained", *, img_size):
    return VisionTransformer(img_size, 56, embed_dim=24, depth=2, num_heads=2, num_classes=0).eval()


@pytest.fixture
def made(tmp_path, monkeypatch):
    """Grey images with every other finding in turn; "Pneumonia" is bright."""
    folder = tmp_path / "nih_xrays_small"
    (folder / "images").mkdir(parents=True)
    lines, n = ["image,split,patient,age,sex,view,findings"], 0
    for split, count in COUNTS.items():
        for i in range(count):
            own = [name for k, name in enumerate(study.FINDINGS) if (i >> k) & 1]
            value = 200 if "Pneumonia" in own else 20 + n % 50
            Image.fromarray(np.full((32, 32), value, np.uint8)).save(folder / "images" / f"{n}.png")
            lines.append(f"{n}.png,{split},{n},50,F,PA,{'|'.join(own) or 'No Finding'}")
            n += 1
    (folder / "labels.csv").write_text("\n".join(lines), encoding="utf-8")
    monkeypatch.setenv("COMPANION_REAL_DATA", str(tmp_path))
    monkeypatch.setattr(study.backbones, "build", small)
    monkeypatch.setattr(study, "STEPS", 20)
    caches = (study.features, study._encoder)
    for cache in caches:
        cache.cache_clear()
    yield folder
    for cache in caches:
        cache.cache_clear()


def test_splits_and_labels(made):
    for split, count in COUNTS.items():
        paths, labels = study.table(split)
        assert len(paths) == count and labels.shape == (count, 5)
    assert labels[3].tolist() == [1, 1, 0, 0, 0]
    with selecting(), pytest.raises(CompanionError, match="without the test split"):
        study.train("raw pixels", "100 %", 1e-3, 100, "", "test")


def test_a_tenth_has_every_finding_and_follows_the_seed(made):
    labels = study.table("train")[1]
    draws = [study.drawn(labels, seed) for seed in range(20)]
    assert all(len(set(draw.tolist())) == 6 and labels[draw].any(0).all() for draw in draws)
    assert torch.equal(draws[3], study.drawn(labels, 3)) and not torch.equal(draws[3], draws[4])


def test_the_features_give_the_logits_of_the_papers_classifier(made):
    """The cached features and a linear layer are `heads.classifier(probe=True)` on the image."""
    x = study.features("ViT-S/14", "val").tensors[0]
    encoder = small("", img_size=study.SIZE)
    encoder.load_state_dict(study._encoder("ViT-S/14").state_dict(), strict=False)  # without the last norm
    model = heads.classifier(encoder, 5, probe=True, drop_path=0.0).eval()
    path = study.table("val")[0][4]
    image = study.xrays.test_transform(study.SIZE)(torch.from_numpy(study.xrays.read_image(path))[None])
    torch.nn.init.normal_(model.head.weight)
    with torch.no_grad():
        assert torch.allclose(model(image[None])[0], model.head(x[4]), atol=1e-4)


@pytest.mark.parametrize("method", study.METHODS)
def test_a_row_of_every_method(made, method):
    row = study.train(method, "100 %", 1e-2, 200, "", "select")
    assert all(0 <= value <= 100 for name, value in row.items() if name.startswith("AUROC"))
    assert row["trained"] == 5 * (study.features(method, "val").tensors[0].shape[1] + 1)


def test_missing_images_and_other_tables_are_named(made, monkeypatch, tmp_path):
    study.prepare("", 0)
    (made / "images" / "70.png").unlink()
    with pytest.raises(CorruptFile, match="70"):
        study.prepare("", 0)
    (made / "labels.csv").write_text("image,label\na.png,0\n", encoding="utf-8")
    with pytest.raises(CorruptFile, match="findings"):
        study.table("train")
    monkeypatch.setenv("COMPANION_REAL_DATA", str(tmp_path / "none"))
    with pytest.raises(MissingData, match="COMPANION_REAL_DATA"):
        study.prepare("", 0)

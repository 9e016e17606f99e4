"""H-ViT's patch level on real cells: annotations, splits by smear, and a row of every method; on drawn smears."""

import numpy as np
import pytest
from PIL import Image
from timm.models.vision_transformer import VisionTransformer

from companion.errors import CompanionError, CorruptFile, MissingData
from companion.toy.ablations import hvit_real as study
from companion.toy.ablations import selecting

COLOURS = {"RBC": (220, 120, 120), "WBC": (120, 60, 160), "Platelets": (60, 120, 200)}


def annotation(cells):
    boxes = "".join(
        f"<object><name>{name}</name><bndbox><xmin>{x - 20}</xmin><ymin>{y - 20}</ymin><xmax>{x + 20}</xmax>"
        f"<ymax>{y + 20}</ymax></bndbox></object>"
        for name, x, y in cells
    )
    return f"<annotation>{boxes}</annotation>"


def small(*_, img_size):
    vit = VisionTransformer(img_size, 14, embed_dim=24, depth=2, num_heads=2, num_classes=0, init_values=1e-5)
    vit.pretrained_cfg = {"input_size": (3, img_size, img_size), "mean": (0.5,) * 3, "std": (0.5,) * 3}
    return vit.eval()


@pytest.fixture
def made(tmp_path, monkeypatch):
    """Eighty smears with a cell of each class, whose colour is the class, at places that differ."""
    rng = np.random.default_rng(0)
    for name in ("JPEGImages", "Annotations"):
        (tmp_path / "bccd_small" / name).mkdir(parents=True)
    for i in range(80):
        pixels = np.full((200, 320, 3), 230, np.uint8)
        cells = [(name, 50 + 100 * n, int(rng.integers(30, 170))) for n, name in enumerate(COLOURS)]
        for name, x, y in cells:
            pixels[y - 20 : y + 20, x - 20 : x + 20] = COLOURS[name]
        Image.fromarray(pixels).save(tmp_path / "bccd_small" / "JPEGImages" / f"s{i:02}.jpg", quality=95)
        (tmp_path / "bccd_small" / "Annotations" / f"s{i:02}.xml").write_text(annotation(cells), encoding="utf-8")
    monkeypatch.setenv("COMPANION_REAL_DATA", str(tmp_path))
    monkeypatch.setattr(study.backbones, "build", small)
    for cache in (study._patches, study._embedded):
        cache.cache_clear()
    yield tmp_path / "bccd_small"
    for cache in (study._patches, study._embedded):
        cache.cache_clear()


@pytest.mark.parametrize("method", study.METHODS)
def test_a_row_of_every_method(made, method):
    row = study.train(method, "blood cells", 1e-2, 200, "", "test")
    assert row.keys() == {"recall", *(f"recall {name}" for name in study.CLASSES.values()), "loss"}
    assert row["recall"] == pytest.approx(np.mean([row[f"recall {name}"] for name in study.CLASSES.values()]), abs=0.01)
    assert (row["loss"] == 0) == (method in study.UNTRAINED)
    if method.startswith("raw pixels"):
        assert row["recall"] == 100  # the colour of the centre


def test_a_patch_shows_its_cell_in_the_middle(made):
    patches, labels, _ = study._patches()
    middle = (255 * patches[:, :, 50:62, 50:62].mean((2, 3))).numpy()
    expected = np.array(list(COLOURS.values()))[labels.numpy()]
    assert patches.shape == (240, 3, 112, 112) and np.abs(middle - expected).max() < 12


def test_no_smear_is_in_two_splits(made):
    cells = {split: study.cells("raw pixels", 100, split).tensors for split in study.SPLITS}
    assert [len(labels) for _, labels in cells.values()] == [120, 60, 60]
    rows = [{tuple(x.tolist()) for x in features} for features, _ in cells.values()]
    assert not rows[0] & rows[1] and not rows[0] & rows[2] and not rows[1] & rows[2]
    with selecting(), pytest.raises(CompanionError, match="without the test split"):
        study.train("raw pixels, linear", "blood cells", 1e-3, 100, "", "test")


def test_at_most_four_cells_of_a_class(tmp_path):
    (tmp_path / "a.xml").write_text(annotation([("RBC", n, n) for n in range(30, 50)] + [("WBC", 99, 98)]))
    assert study.cells_of(tmp_path / "a.xml") == [("RBC", n, n) for n in range(30, 34)] + [("WBC", 99, 98)]


@pytest.mark.parametrize(
    ("text", "said"),
    [("<annotation>", "Pascal VOC"), (annotation([("Cat", 1, 2)]), "Cat"), ("<a><object/></a>", "Pascal VOC|None")],
)
def test_bad_annotations_are_named(text, said, tmp_path):
    (tmp_path / "a.xml").write_text(text, encoding="utf-8")
    with pytest.raises(CorruptFile, match=rf"(?s)a\.xml.*({said})"):
        study.cells_of(tmp_path / "a.xml")


def test_what_is_missing_is_named(made, monkeypatch, tmp_path):
    study.prepare("", 0)
    (made / "JPEGImages" / "s03.jpg").unlink()
    with pytest.raises(CorruptFile, match="s03"):
        study.prepare("", 0)
    (made / "Annotations" / "s03.xml").unlink()
    with pytest.raises(CorruptFile, match="79 annotations, not 80"):
        study.prepare("", 0)
    monkeypatch.setenv("COMPANION_REAL_DATA", str(tmp_path / "nowhere"))
    with pytest.raises(MissingData, match="COMPANION_REAL_DATA"):
        study.prepare("", 0)

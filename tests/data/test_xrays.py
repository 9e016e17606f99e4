"""Readers of radiographs: every layout with its lists, 8 and 16 bits, DICOM, masks, boxes, reports; errors."""

import csv
import json
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from companion import data
from companion.data import DATASETS, xrays, xrays_sets
from companion.data.xrays import MaskTransform, load, read_image, reports, rle_mask
from companion.errors import BadParameter, CompanionError, CorruptFile, MissingData
from tests.data.conftest import picture, refused


@pytest.fixture
def any_length(monkeypatch):
    """Lists of any length are taken: the real ones are thousands of lines long."""
    monkeypatch.setattr(xrays, "SIZES", {key: {} for key in xrays_sets.SIZES})


picture = partial(picture, size=(20, 16), mode="L")


def table(path, columns, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([columns, *rows])


def dicom(path, values, bits=12, photometric="MONOCHROME2", signed=0):
    import pydicom
    from pydicom.uid import ExplicitVRLittleEndian

    file = pydicom.Dataset()
    file.file_meta = pydicom.dataset.FileMetaDataset()
    file.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    file.file_meta.MediaStorageSOPClassUID = file.SOPClassUID = pydicom.uid.SecondaryCaptureImageStorage
    file.file_meta.MediaStorageSOPInstanceUID = file.SOPInstanceUID = "1.2.3"
    file.Rows, file.Columns = values.shape
    file.BitsAllocated, file.BitsStored, file.HighBit, file.SamplesPerPixel = 16, bits, bits - 1, 1
    file.PhotometricInterpretation, file.PixelRepresentation = photometric, signed
    file.PixelData = values.astype(np.int16 if signed else np.uint16).tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    file.save_as(path, enforce_file_format=True)


def test_grey_values_of_8_and_16_bits(tmp_path):
    ramp = np.linspace(0, 65535, 256).round().astype(np.uint16).reshape(16, 16)
    Image.fromarray(ramp).save(tmp_path / "16.png")
    Image.fromarray(ramp).save(tmp_path / "16.tif")
    Image.fromarray((ramp >> 8).astype(np.uint8)).save(tmp_path / "8.png")
    for name, expected in {"16.png": ramp / 65535, "16.tif": ramp / 65535, "8.png": (ramp >> 8) / 255}.items():
        np.testing.assert_allclose(read_image(tmp_path / name), expected, atol=1e-6)
    picture(tmp_path / "colour.png", (255, 0, 0), mode="RGB")
    assert read_image(tmp_path / "colour.png").mean() == pytest.approx(76 / 255)
    assert read_image(tmp_path / "colour.png").dtype == np.float32
    Image.fromarray(np.array([[0.25, 1.0]], np.float32)).save(tmp_path / "a.tif")  # stored as shares: left
    assert read_image(tmp_path / "a.tif").tolist() == [[0.25, 1.0]]
    for name in ("cut.png", "cut.dcm"):
        (tmp_path / name).write_bytes((tmp_path / "8.png").read_bytes()[:50])
        refused(CorruptFile, name, read_image, tmp_path / name)
    with pytest.raises(FileNotFoundError):
        read_image(tmp_path / "none.png")


def test_dicom_says_what_white_is(tmp_path):
    values = np.arange(64).reshape(8, 8) * 65
    dicom(tmp_path / "2.dcm", values)
    dicom(tmp_path / "1.dcm", values, photometric="MONOCHROME1")
    np.testing.assert_allclose(read_image(tmp_path / "2.dcm"), values / 4095, atol=1e-6)
    np.testing.assert_allclose(read_image(tmp_path / "1.dcm"), 1 - values / 4095, atol=1e-6)
    dicom(tmp_path / "signed.dcm", values - 2048, signed=1)
    np.testing.assert_allclose(read_image(tmp_path / "signed.dcm"), values / 4095, atol=1e-6)


def test_runs_as_siim_has_them():
    mask = rle_mask("2 3 4 1", 5)
    expected = np.zeros(25, bool)
    expected[[2, 3, 4, 9]] = True  # the second run begins 4 after the end of the first
    assert (mask == expected.reshape(5, 5).T).all()
    assert not rle_mask("-1").any() and rle_mask("-1").shape == (1024, 1024)
    for text in ("1", "a b", "24 5", "-3 2"):
        with pytest.raises(ValueError):
            rle_mask(text, 5)


@pytest.mark.parametrize("name", ["xrays/chestx-ray14", "xrays/chexpert", "xrays/rsna", "fundus/odir", "fundus/mured"])
def test_labels_of_several_classes(name, tmp_path, any_length):
    classes, folder = DATASETS[name].classes, tmp_path / name
    assert len(xrays_sets.CLASSES[name]) == classes
    lines = [" ".join([f"images_006/{i}.png", *(str(int(c == i)) for c in range(classes))]) + " " for i in range(2)]
    picture(folder / "images_006" / "0.png")
    for file in ("train_list", "val_list", "test_list"):
        (folder / f"{file}.txt").write_text("\n".join(lines) + "\n\n")
    for share in (1, 10):  # other images than those of the whole list
        (folder / f"train_list_{share}.txt").write_text("\n".join(lines[:1] * share))
    assert [len(load(name, tmp_path, "train", share=share)) for share in xrays.SHARES] == [1, 10, 2]
    for split in ("train", "val", "test"):
        images = load(name, tmp_path, split, transform=xrays.test_transform(8))
        assert len(images) == 2 and torch.equal(images.labels, torch.eye(2, classes))
    image, labels = images[0]
    assert image.shape == (3, 8, 8) and torch.equal(image[0], image[1]) and labels.dtype == torch.float32
    assert image.mean().item() == pytest.approx((100 / 255 - 0.4722) / 0.3028, abs=1e-5)
    refused(MissingData, "listed but not there", lambda: images[1])
    (folder / "val_list.txt").write_text("a.png 0 2" + " 0" * classes)
    refused(CorruptFile, r"val_list\.txt.*line 1", load, name, tmp_path, "val")


@pytest.mark.parametrize("name", xrays_sets.ONE_OF)
def test_labels_of_one_class(name, tmp_path, any_length):
    folder = tmp_path / name
    picture(folder / "train" / "COVID(163).png")
    (folder / "train_list.txt").write_text("train/COVID(163).png 2\n")
    image, label = load(name, tmp_path, "train")[0]
    assert image.shape == (1, 16, 20) and label == 2 and label.ndim == 0
    (folder / "train_list.txt").write_text("train/COVID(163).png 9\n")
    refused(CorruptFile, "line 1", load, name, tmp_path, "train")


def rsna(folder):
    picture(folder / "train_images" / "a.png", size=(1024, 1024))
    dicom(folder / "train_images" / "b.dcm", np.full((32, 32), 2000))
    rows = [
        ("train_images/a.png", "[[256.0, 512.0, 512.0, 1024.0], [0.0, 0.0, 128.0, 128.0]]"),
        ("train_images/b.png", "[[0.0, 0.0, 0.0, 0.0]]"),
    ]
    for file in ("train_list", "val_list", "test_list"):
        table(folder / f"{file}.csv", ("image_path", "bbox"), rows)


def test_boxes_and_their_masks(tmp_path, any_length):
    rsna(tmp_path / "xrays" / "rsna")
    images = load("xrays/rsna", tmp_path, "test", task="detection", transform=xrays.squeeze_transform(64))
    image, boxes = images[0]
    assert image.shape == (3, 64, 64) and boxes.shape == (10, 5)
    assert boxes[0].tolist() == [0, 0.375, 0.75, 0.25, 0.5] and boxes[1].tolist() == [0, 0.0625, 0.0625, 0.125, 0.125]
    assert not boxes[2:].any()
    boxes *= 0
    assert torch.equal(images[0][1][0], torch.tensor([0, 0.375, 0.75, 0.25, 0.5]))  # asked for again it is the same
    image, boxes = images[1]  # listed as PNG, there as DICOM
    assert image.shape == (3, 64, 64) and not boxes.any()
    image, mask = load("xrays/rsna", tmp_path, "test", task="segmentation", transform=MaskTransform(64))[0]
    assert image.shape == (3, 64, 64) and mask.shape == (1, 64, 64)
    assert mask[0, 33:63, 17:31].min() == 1 and mask[0, 0:7, 0:7].min() == 1
    assert mask.sum().item() == pytest.approx(16 * 32 + 8 * 8, rel=0.02)
    table(tmp_path / "xrays" / "rsna" / "val_list.csv", ("image_path", "bbox"), [("a.png", "[[1, 2")])
    refused(CorruptFile, r"val_list\.csv.*line 2", load, "xrays/rsna", tmp_path, "val", task="detection")


def siim(folder, negatives=5):
    rows = [("p1", "0 1024"), ("p1", "2048 1024"), ("p2", "1048575 1")] + [(f"n{i}", "-1") for i in range(negatives)]
    table(folder / "train_list_10.csv", ("ImageId", "EncodedPixels"), rows)
    for name in dict.fromkeys(row[0] for row in rows):
        picture(folder / "train" / "images" / "1024" / "dicom" / f"{name}.png")


def test_masks_of_runs(tmp_path, any_length, monkeypatch):
    siim(tmp_path / "xrays" / "siim")
    monkeypatch.setitem(xrays.SIZES, ("xrays/siim", "segmentation"), {"10": 7})  # before the draw
    images = load("xrays/siim", tmp_path, "train", share="10", transform=MaskTransform(64))
    assert len(images) == 4  # two with a mask, and two of the five without
    mask = images[0][1]
    # two columns of 1024 that are three apart: column 0 and column 3, soft in a sixteenth of the width
    assert mask.shape == (1, 64, 64) and mask.sum().item() == pytest.approx(2 * 64 / 16, rel=0.05)
    assert images[2][1].sum() == 0
    again = load("xrays/siim", tmp_path, "train", share="10")
    assert again.paths == images.paths
    assert load("xrays/siim", tmp_path, "train", share="10", seed=1).paths[:2] == images.paths[:2]
    assert len(load("xrays/siim", tmp_path, "train", share="10", balanced=False)) == 7
    # only the training list is balanced: a score counts all images
    for split in ("val", "test"):
        (tmp_path / f"xrays/siim/{split}_list.csv").write_text((tmp_path / "xrays/siim/train_list_10.csv").read_text())
        assert len(load("xrays/siim", tmp_path, split)) == 7
    table(tmp_path / "xrays/siim/train_list_1.csv", ("ImageId", "EncodedPixels"), [("p1", "9 9 9")])
    refused(CorruptFile, "p1: an odd number", lambda: load("xrays/siim", tmp_path, "train", share="1")[0])


def test_disc_and_cup(tmp_path, any_length):
    folder = tmp_path / "fundus" / "riga"
    values = np.zeros((64, 64), np.uint8)
    values[16:48, 16:48] = 128
    values[24:40, 24:40] = 255
    picture(folder / "Image" / "a.tif", (90, 60, 30), size=(64, 64), mode="RGB")
    (folder / "FinalLabel").mkdir()
    Image.fromarray(values).save(folder / "FinalLabel" / "a.tif")
    table(folder / "test_list.csv", ("img_path", "mask_path"), [("Image/a.tif", "FinalLabel/a.tif")])
    _, mask = load("fundus/riga", tmp_path, "test", transform=MaskTransform(32))[0]
    assert mask.shape == (2, 32, 32) and set(mask.unique().tolist()) == {0, 1}
    assert mask[0].sum() >= 16 * 16 and 0 < mask[1].sum() <= 8 * 8 and (mask[1] <= mask[0]).all()
    # colours stay, as released for segmentation
    image, _ = load("fundus/riga", tmp_path, "test", transform=MaskTransform(32))[0]
    expected = [(value / 255 - xrays.MEAN) / xrays.STD for value in (90, 60, 30)]
    torch.testing.assert_close(image.mean((1, 2)), torch.tensor(expected), atol=1e-4, rtol=0)
    # what rounds to 0 of 255 is no disc, what rounds to 255 is cup
    shares = torch.tensor([0.4, 0.6, 254.4, 254.6])[None, None] / 255
    assert xrays._disc_and_cup(shares).tolist() == [[[0, 1, 1, 1]], [[0, 0, 0, 1]]]


def test_images_and_masks_are_reduced_as_opencv_does():
    """Four pixels are read whatever the reduction, unless `antialias`; areas are exact between pixels too."""
    stripes = torch.zeros(1, 64, 64)
    stripes[..., ::4] = 1
    back = [
        t(stripes)[0] * xrays.STD + xrays.MEAN for t in (xrays.squeeze_transform(16), xrays.squeeze_transform(16, True))
    ]
    assert back[0].unique().numel() == 1 and back[0].mean() < 1e-5  # of each four columns those in the middle
    assert back[1].mean() == pytest.approx(0.25, abs=0.02)
    mask = torch.zeros(1, 6, 6)
    mask[:, :, :3] = 1
    reduced = {kind: MaskTransform(4, mask=kind)(mask, mask)[1] for kind in xrays.MASKS}
    assert reduced["area"][0, 0].tolist() == [1, 1, 0, 0] and reduced["nearest"][0, 0].tolist() == [1, 1, 0, 0]
    mask[:, :, 3] = 1
    assert MaskTransform(4)(mask, mask)[1][0, 0].tolist() == pytest.approx([1, 1, 2 / 3, 0])
    assert MaskTransform(4, mask="nearest")(mask, mask)[1][0, 0].tolist() == [1, 1, 1, 0]
    refused(BadParameter, "nearest", MaskTransform, mask="linear")


def test_warping():
    torch.manual_seed(0)
    image = torch.zeros(1, 64, 64)
    image[:, 4:14, 36:60] = 1
    both, alone = MaskTransform(64, train=True), MaskTransform(64, train=True, warp_mask=False)
    back = v2.Lambda(lambda x: x[:1] * xrays.STD + xrays.MEAN)
    for transform, together in ((both, True), (alone, False)):
        moved = [transform(image, image) for _ in range(20)]
        changed = [(back(x) - image).abs().max() > 0.5 for x, _ in moved]
        assert 2 < sum(changed) < 18  # half of them
        near = [(back(x) - m).abs().mean().item() < 0.02 for x, m in moved]
        assert all(near) if together else any(not n for n in near)
        assert all(torch.equal(m, image) for _, m in moved) is not together


def test_transforms():
    # a ramp from left to right, and 2 above and below it: it shows the crop and the flip
    ramp = torch.linspace(0, 1, 400).expand(1, 800, 400).clone()
    ramp[:, :180] = ramp[:, 620:] = 2

    def back(image, mean=0.4722, std=0.3028):
        assert image.shape == (3, 32, 32) and torch.equal(image[0], image[2])
        return image[0] * std + mean

    centre = back(xrays.test_transform(32)(ramp))  # the middle square of 400 pixels
    expected = ((torch.arange(32) + 0.5) * 12.5 - 0.5) / 399
    torch.testing.assert_close(centre[:, 1:-1], expected[1:-1].expand(32, -1), atol=2e-3, rtol=0)
    squeezed = back(xrays.squeeze_transform(32)(ramp))  # all of it
    assert (squeezed[[0, -1]] > 1.5).all() and (squeezed[9:23] <= 1).all()
    whole = torch.linspace(0, 1, 256).expand(1, 256, 256)
    for transform, least, statistics in (
        (xrays.pretrain_transform(32), 0.2, (0.4721, 0.3037)),
        (xrays.train_transform(32), 0.08, (0.4722, 0.3028)),
    ):
        torch.manual_seed(0)
        steps = [(row[-1] - row[0]).item() for row in (back(transform(whole), *statistics)[0] for _ in range(200))]
        assert 70 < sum(step > 0 for step in steps) < 130, "a half is flipped"
        # of the width a crop has at least the root of the smallest area, less for the narrow ones
        widths = [abs(step) for step in steps]
        assert 0.8 * (0.75 * least) ** 0.5 < min(widths) < 1.35 * least**0.5 and max(widths) > 0.9
    # bicubic interpolation overshoots at an edge, such as that of a letter that is burnt in: values are clamped
    edge = torch.zeros(1, 40, 40)
    edge[:, 10:20, 10:30] = 1
    torch.manual_seed(0)
    found = [xrays.pretrain_transform(64)(edge) * 0.3037 + 0.4721 for _ in range(4)]
    assert all(image.min() > -1e-6 and image.max() < 1 + 1e-6 for image in found)


def test_chestmnist(tmp_path, any_length, monkeypatch):
    monkeypatch.setitem(xrays.SIZES, ("xrays/chestmnist", "classification"), {"100": 200, "val": 3, "test": 2})
    folder = tmp_path / "xrays" / "chestmnist"
    folder.mkdir(parents=True)
    counts = {"train": 200, "val": 3, "test": 2}
    arrays = {f"{split}_images": np.full((count, 8, 8), 51, np.uint8) for split, count in counts.items()}
    arrays |= {f"{split}_labels": np.zeros((count, 14), np.uint8) for split, count in counts.items()}
    arrays["train_labels"][100, 3] = arrays["train_labels"][50, 5] = 1
    np.savez(folder / "chestmnist_224.npz", **arrays)
    images = load("xrays/chestmnist", tmp_path, "train", share="1")
    assert len(images) == 2 and images[0][0].mean() == pytest.approx(0.2)
    assert images.labels.nonzero().tolist() == [[1, 3]], "every hundredth image, each with its own labels"
    assert len(load("xrays/chestmnist", tmp_path, "train", share="10")) == 20
    assert [len(load("xrays/chestmnist", tmp_path, split, share="1")) for split in ("val", "test")] == [3, 2]
    assert data.status("xrays/chestmnist", tmp_path).state == "present"
    (folder / "chestmnist_224.npz").write_bytes(b"PK")
    refused(CorruptFile, r"chestmnist_224\.npz", load, "xrays/chestmnist", tmp_path, "test")


def test_reports(tmp_path):
    folder = tmp_path / "xrays" / "mimic-cxr"
    paths = [f"files/p10/p1000/s{study}/{i}.jpg" for study, i in ((77, 0), (77, 1), (88, 2))]
    for path in paths:
        picture(folder / path)
    (tmp_path / "MIMIC-Vicuna.json").write_text(json.dumps({"s77": "There is edema.", "88": "There is no mass."}))
    said = xrays.read_statements(tmp_path / "MIMIC-Vicuna.json")
    written = xrays.write_reports(folder / xrays_sets.REPORTS[1], paths, ["Edema.", 'A "mass", none.', "X"], said)
    found = reports("xrays/mimic-cxr", tmp_path, xrays.pretrain_transform(32))
    assert found.texts == ["Edema.", 'A "mass", none.', "X"] and found.windows is None
    assert found.statements == ["There is edema.", "There is edema.", "There is no mass."]
    assert len(found.images) == 3 and found.images[2].shape == (3, 32, 32)
    assert data.status("xrays/mimic-cxr", tmp_path).state == "present"
    table(folder / xrays_sets.WINDOWS[0], ("label_i", "label_j"), [(0, 1), (2, 2), (1, 1)])
    assert reports("xrays/mimic-cxr", tmp_path).windows.tolist() == [[0, 1], [2, 2], [1, 1]]
    table(folder / xrays_sets.WINDOWS[0], ("label_i", "label_j"), [(0, 1)])
    refused(CorruptFile, "1 windows for 3 images", reports, "xrays/mimic-cxr", tmp_path)
    (folder / xrays_sets.WINDOWS[0]).unlink()
    table(written, ("img_path", "report"), [(paths[0], "Edema.")])
    assert reports("xrays/mimic-cxr", tmp_path).statements is None
    table(written, ("path", "text"), [])
    refused(CorruptFile, "no column img_path, report", reports, "xrays/mimic-cxr", tmp_path)


def test_statements_of_two_forms_and_no_other(tmp_path):
    path = tmp_path / "x.json"
    path.write_text(json.dumps([{"study_id": 5, "llm_output": "There is edema."}]))
    assert xrays.read_statements(path) == {"5": "There is edema."}
    for bad in ([1], {"a": 2}, [{"study_id": 1}]):
        path.write_text(json.dumps(bad))
        refused(CorruptFile, r"x\.json", xrays.read_statements, path)
    refused(BadParameter, "1, one for each path", xrays.write_reports, tmp_path / "y.csv", ["a"], ["t"], [])
    assert not list(tmp_path.glob("*y*"))


def test_openi(tmp_path):
    folder = tmp_path / "xrays" / "openi"
    refused(MissingData, r"indiana_reports\.csv is not there", reports, "xrays/openi", tmp_path)
    rows = [("1", "The heart is large. ", "Cardiomegaly."), ("2", "", ""), ("3", "", "No mass.")]
    table(folder / "indiana_reports.csv", ("uid", "findings", "impression"), rows)
    views = [("1", "1_a.png", "Frontal"), ("1", "1_b.png", "Lateral"), *((i, f"{i}.png", "Frontal") for i in "23")]
    table(folder / "indiana_projections.csv", ("uid", "filename", "projection"), views)
    for name in ("1_a.png", "3.png"):
        picture(folder / "images" / "images_normalized" / name)
    found = reports("xrays/openi", tmp_path, xrays.pretrain_transform(16))
    assert found.texts == ["The heart is large. Cardiomegaly.", "No mass."] and found.statements is None
    assert found.images[1].shape == (3, 16, 16)
    assert data.status("xrays/openi", tmp_path).state == "present"


def test_a_folder_of_ones_own(tmp_path):
    for i in range(2):
        picture(tmp_path / f"{i}.png")
        picture(tmp_path / "masks" / f"{i}.png", 255 * i)
    (tmp_path / "train_list.txt").write_text("0.png 0 1\n1.png 1 0\n")
    table(tmp_path / "val_list.csv", ("img_path", "mask_path"), [(f"{i}.png", f"masks/{i}.png") for i in range(2)])
    table(tmp_path / "test_list.csv", ("image_path", "bbox"), [("0.png", "[[0, 0, 512, 512]]")])
    table(tmp_path / "pretrain.csv", ("img_path", "report"), [("0.png", "No mass.")])
    mine = xrays.own(tmp_path, ["mass", "edema"])
    assert load(mine, tmp_path, "train").labels.tolist() == [[0, 1], [1, 0]]
    assert [m.mean().item() for _, m in load(mine, tmp_path, "val", task="segmentation")] == [0, 1]
    assert load(mine, tmp_path, "test", task="detection")[0][1][0].tolist() == [0, 0.25, 0.25, 0.5, 0.5]
    assert reports(mine, tmp_path).texts == ["No mass."]
    refused(MissingData, r"test_list\.txt", load, mine, tmp_path, "test")


def test_lists_as_people_write_them(tmp_path):
    """Blanks and umlauts in names, the byte order mark of a CSV; and errors of unreadable lists."""
    picture(tmp_path / "bücher 1.png")
    mine = xrays.own(tmp_path, ["mass", "edema"])
    (tmp_path / "train_list.txt").write_text(" bücher 1.png  0 1\n", encoding="utf-8")
    image, labels = load(mine, tmp_path, "train")[0]
    assert image.shape == (1, 16, 20) and labels.tolist() == [0, 1]
    table(tmp_path / "pretrain.csv", ("img_path", "report"), [("bücher 1.png", "No mass.")])
    (tmp_path / "pretrain.csv").write_bytes(b"\xef\xbb\xbf" + (tmp_path / "pretrain.csv").read_bytes())
    assert reports(mine, tmp_path).texts == ["No mass."]
    (tmp_path / "train_list.txt").write_bytes("bücher 1.png 0 1\n".encode("latin-1"))
    refused(CorruptFile, "not text in UTF-8", load, mine, tmp_path, "train")
    (tmp_path / "train_list.txt").write_text("a.png 0 1 1\n")
    refused(CorruptFile, "line 1", load, mine, tmp_path, "train")
    refused(BadParameter, r"own\(root, classes\)", load, xrays.own(tmp_path), tmp_path, "train")
    (tmp_path / "train_list.txt").write_text("\n")
    refused(CorruptFile, "lists no image", load, mine, tmp_path, "train")
    table(tmp_path / "pretrain.csv", ("img_path", "report"), [])
    refused(CorruptFile, "lists no image", reports, mine, tmp_path)


def test_pocket_chests_are_read_by_the_same_readers(tmp_path, monkeypatch):
    pocket = pytest.importorskip("companion.toy.datasets.chests")
    monkeypatch.setattr(pocket, "COUNTS", {"train": 12, "val": 6, "test": 8})
    sizes = {"100": 12, "val": 6, "test": 8}
    for task in ("classification", "segmentation", "detection"):
        monkeypatch.setitem(xrays.SIZES, ("pocket/chests", task), sizes)
    pocket.write(tmp_path, 3)
    part = pocket.read(tmp_path, "test")
    standard = v2.Normalize([pocket.MEAN], [pocket.STD])
    images = load("pocket/chests", tmp_path, "test", transform=standard)
    torch.testing.assert_close(torch.stack([image for image, _ in images]), part.images)
    assert torch.equal(images.labels.long(), part.labels)
    masks = load("pocket/chests", tmp_path, "test", task="segmentation")
    assert torch.equal(torch.stack([masks[i][1] for i in range(8)]), part.masks)
    boxes = load("pocket/chests", tmp_path, "test", task="detection").boxes[:, 0]
    corners = torch.cat([boxes[:, 1:3] - boxes[:, 3:] / 2, boxes[:, 1:3] + boxes[:, 3:] / 2], 1) * 64
    assert torch.equal(corners.round().long(), part.boxes)
    found = reports("pocket/chests", tmp_path)
    train = pocket.read(tmp_path, "train")
    assert tuple(found.texts) == train.reports and tuple(found.statements) == train.distilled
    assert found.windows.tolist() == [[1, 1]] * 12
    assert data.status("pocket/chests", tmp_path).state == "present"


def test_bad_parameters_and_lists_of_another_length(tmp_path, monkeypatch):
    folder = tmp_path / "xrays" / "covidx"
    picture(folder / "test" / "a.png")
    (folder / "test_list.txt").write_text("test/a.png 1\ntest/b.png 0\n")
    refused(MissingData, "has 2 images, 400 are known", load, "xrays/covidx", tmp_path, "test")
    monkeypatch.setitem(xrays.SIZES, ("xrays/covidx", "classification"), {"test": 2})
    found = data.status("xrays/covidx", tmp_path)
    assert found.state == "incomplete" and found.detail == "1 listed images are not there, the first is test/b.png"
    for options, said in (
        ({"split": "trainval"}, "'train', 'val', 'test'"),
        ({"split": "test", "task": "detection"}, "classification"),
        ({"split": "train", "share": "5"}, "'1', '10', '100'"),
    ):
        refused(BadParameter, said, load, "xrays/covidx", tmp_path, **options)
    refused(BadParameter, "see `reports`", load, "xrays/mimic-cxr", tmp_path, "train")


def test_a_download_that_fails_leaves_nothing(tmp_path, monkeypatch):
    def fails(url, folder, name, md5):
        (tmp_path / "xrays" / "chestmnist" / name).write_bytes(b"half")
        raise OSError("no route")

    monkeypatch.setattr(xrays, "download_url", fails)
    refused(CompanionError, "no route", data.fetch, "xrays/chestmnist", tmp_path)
    assert not list((tmp_path / "xrays" / "chestmnist").iterdir())

"""CPU seconds and memory of long data sets: opening, an item, an epoch's order, a worker, `status` and `doctor`.

Each set is made in a temporary folder at a tenth of its published length (`--full`: at its own), with one small image
behind all names. Beside it stands a usual reader on the same files: torchvision's `ImageFolder` and `CocoDetection` on
faster-coco-eval, pandas, SciPy, or plain `listdir` and `loadtxt`. Each measurement has a process of its own.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import dataclasses
import gc
import io
import itertools
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import bench
import numpy as np
import pandas as pd
from PIL import Image
from scipy.io import loadmat, savemat

from companion import cli, data
from companion.data import classification, detection, domains, tracking, xrays
from companion.io import record
from companion.io.files import write_json
from companion.io.papers import paper, slugs
from companion.io.provenance import code_hash, sources
from companion.training.fit import _batches

READ = 20_000  # items of a worker
WIDTH, HEIGHT = 32, 24  # of the image behind all names
LINKS = 60_000  # names of one file; ext4 allows 65,000


# --- the files --------------------------------------------------------------------------------------------------------


class Files:
    """Names below a folder for one small image, or for an empty file."""

    def __init__(self, root: Path):
        self.root, self.made, self.known = root, itertools.count(), set[Path]()

    def __call__(self, names: Iterable[Path], mode: str | None = "RGB") -> None:
        for number, path in enumerate(names):
            if number % LINKS == 0:
                (pixels := self.root / ".pixels").mkdir(parents=True, exist_ok=True)
                source = pixels / f"{next(self.made)}{path.suffix}"
                if mode:
                    Image.new(mode, (WIDTH, HEIGHT), 1 if mode == "L" else (90, 60, 30)).save(source)
                else:
                    source.touch()
            if path.parent not in self.known:
                path.parent.mkdir(parents=True, exist_ok=True)
                self.known.add(path.parent)
            os.link(source, path)


def folders(files: Files, place: Path, names: Sequence[str], count: int, end: str = "jpg") -> None:
    files(place / names[i % len(names)] / f"{names[i % len(names)]}_{i}.{end}" for i in range(count))


def imagenet(root: Path, share: float) -> None:
    files, names = Files(root), [f"n{i:08d}" for i in range(1000)]
    for split, count in {"train": 1_281_167, "val": 50_000}.items():
        folders(files, root / "imagenet" / split, names, int(count * share), "JPEG")


def coco_file(path: Path, images: Sequence[tuple[int, str]], ids: Sequence[int], each: float, points: int, key: str):
    """Annotations of COCO's length: `each` boxes an image, with polygons of `points` numbers."""
    path.parent.mkdir(parents=True, exist_ok=True)
    polygon = [[round(1 + i * 29.37 % 20, 2) for i in range(points)]]
    of = {"frequency": "f", "synonyms": ["a"], "image_count": 9, "instance_count": 9, "def": "a"}
    with path.open("w") as file:
        file.write('{"info": {}, "images": [')
        sizes = {"width": WIDTH, "height": HEIGHT, "license": 1, "date_captured": "2013-11-14 17:02:52"}
        lists = {"neg_category_ids": [], "not_exhaustive_category_ids": []}
        file.write(", ".join(json.dumps({"id": i, key: name} | sizes | lists) for i, name in images))
        file.write('], "annotations": [')
        for row in range(int(len(images) * each)):
            text = {"id": row + 1, "image_id": images[row % len(images)][0], "category_id": ids[row % len(ids)]}
            text |= {"bbox": [1.25, 1.5, 20.75, 18.5], "area": 383.87, "iscrowd": 0, "segmentation": polygon}
            file.write(", " * (row > 0) + json.dumps(text))
        file.write('], "categories": ')
        file.write(
            json.dumps(
                [{"id": i, "name": detection_names().get(i, str(i)), "supercategory": "a"} | of for i in sorted(ids)]
            )
            + "}"
        )


def detection_names() -> dict[int, str]:
    return {i: name for name, i in (detection.COCO_BASE | detection.COCO_NOVEL | detection.COCO_OTHER).items()}


def coco(root: Path, share: float) -> None:
    files, ids = Files(root), sorted(detection_names())
    for split, count in {"train": 118_287, "val": 5_000}.items():
        images = [(i, f"{i:012d}.jpg") for i in range(int(count * share))]
        files(root / "coco" / f"{split}2017" / name for _, name in images)
        coco_file(root / f"coco/annotations/instances_{split}2017.json", images, ids, 7.27, 44, "file_name")
        rows = [{"image_id": i, "id": 5 * i + k, "caption": "A man rides a dog."} for i, _ in images for k in range(5)]
        of = [{"id": i, "file_name": name, "width": WIDTH, "height": HEIGHT} for i, name in images]
        write_json(root / f"coco/annotations/captions_{split}2017.json", {"images": of, "annotations": rows})


def lvis(root: Path, share: float) -> None:
    files, ids = Files(root), [category["id"] for category in detection.lvis_categories()]
    for split, count, folder in (("train", 100_170, "train2017"), ("val", 19_809, "val2017")):
        names = [(i, f"{folder}/{i:012d}.jpg") for i in range(int(count * share))]
        files(root / "coco" / name for _, name in names)
        images = [(i, f"http://images.cocodataset.org/{name}") for i, name in names]
        coco_file(root / f"lvis/lvis_v1_{split}.json", images, ids, 12.68, 100, "coco_url")


def ade20k(root: Path, share: float) -> None:
    files, folder = Files(root), root / "ade/ADEChallengeData2016"
    for split, count in {"training": 20_210, "validation": 2_000}.items():
        files(folder / f"images/{split}/ADE_{i:08d}.jpg" for i in range(int(count * share)))
        files((folder / f"annotations/{split}/ADE_{i:08d}.png" for i in range(int(count * share))), "L")


def lasher(root: Path, share: float) -> None:
    files, folder, lists = Files(root), root / "rgbt/LasHeR", root / "lists"
    lists.mkdir(parents=True, exist_ok=True)
    for split, part in {
        "train": "TrainingSet/trainingset",
        "val": "TrainingSet/trainingset",
        "test": "TestingSet/testingset",
    }.items():
        known = tracking.lasher_list(split)
        names = known[: max(1, int(len(known) * share))]
        (lists / f"lasher_{split}.txt").write_text("\n".join(names))
        for name in names:
            frames = 600  # LasHeR's 1,224 videos have 730 thousand pairs
            files(folder / part / name / "visible" / f"v{i:06d}.jpg" for i in range(frames))
            files(folder / part / name / "infrared" / f"i{i:06d}.jpg" for i in range(frames))
            for boxes in ("init", "visible", "infrared"):
                (folder / part / name / f"{boxes}.txt").write_text("10,8,12,9\n" * frames)
            (folder / "AttriSeqsTxt").mkdir(exist_ok=True)
            (folder / f"AttriSeqsTxt/{name}.txt").write_text("1" + ",0" * 18)


def mimic(root: Path, share: float) -> None:
    folder = root / data.DATASETS["xrays/mimic-cxr"].folders[0]
    paths = [f"files/p{10 + i % 10}/p{i // 5}/s{i // 2}/{i}.jpg" for i in range(int(377_110 * share))]
    Files(root)((folder / path for path in paths), "L")
    text = "The heart is large. There is a small right effusion, and no pneumothorax. " * 8
    xrays.write_reports(folder / xrays.REPORTS[0], paths, [text] * len(paths), ["There is an effusion."] * len(paths))


def chests(root: Path, share: float) -> None:
    files, folder = Files(root), root / "xrays/chestx-ray14"
    for key, file in xrays.lists("classification").items():
        count = int(xrays.SIZES["xrays/chestx-ray14", "classification"][key] * share)
        names = [f"images_{1 + i % 12:03d}/{key}_{i:08d}_000.png" for i in range(count)]
        files((folder / name for name in names), "L")
        (folder / file).write_text("".join(f"{name} {'0 1 ' * 7}\n" for name in names))


def pedestrians(root: Path, share: float) -> None:
    folder, start, fields = root / "par/PA100k", 0, {}
    for split in ("train", "val", "test"):
        count = int(data.DATASETS["par/pa100k"].sizes[split] * share)
        names = [f"{i + 1:06}.jpg" for i in range(start, start + count)]
        start += count
        fields[f"{split}_images_name"] = np.array([[np.array([name])] for name in names], dtype=object)
        fields[f"{split}_label"] = np.indices((count, 26)).sum(0) % 2
        Files(root / split)(folder / "data" / name for name in names)
    names = [[np.array([f"raw {i}"])] for i in range(26)]
    savemat(folder / "annotation.mat", fields | {"attributes": np.array(names, dtype=object)})


def scenes(root: Path, share: float) -> None:
    name = "remote/mlrsnet"
    place = root / data.DATASETS[name].folders[0] / "Images"
    folders(Files(root), place, sorted(domains.CLASSES[name]), int(data.DATASETS[name].sizes["all"] * share))


def slides(root: Path, share: float) -> None:
    folder, names = data.DATASETS["slides/panda"].folder(root), [f"{i:032x}" for i in range(int(10_616 * share))]
    files, scores = Files(root), ("0+0", "3+3", "3+4", "4+3", "4+4", "4+5")
    files((folder / "train_images" / f"{name}.tiff" for name in names), None)
    files((folder / "train_label_masks" / f"{name}_mask.tiff" for name in names), None)
    rows = [f"{name},{('radboud', 'karolinska')[i % 2]},{i % 6},{scores[i % 6]}" for i, name in enumerate(names)]
    (folder / "train.csv").write_text("\n".join(["image_id,data_provider,isup_grade,gleason_score", *rows]) + "\n")


# --- the usual readers ------------------------------------------------------------------------------------------------


def image_folder(place: str) -> Callable[[Path], Any]:
    def read(root: Path) -> Any:
        from torchvision.datasets import ImageFolder

        return ImageFolder(root / place)

    return read


def coco_detection(file: str, folder: str) -> Callable[[Path], Any]:
    def read(root: Path) -> Any:
        import faster_coco_eval

        faster_coco_eval.init_as_pycocotools()
        from torchvision.datasets import CocoDetection

        found = CocoDetection(root / folder, root / file)
        for image in found.coco.imgs.values():
            image.setdefault("file_name", "/".join(image.get("coco_url", "").split("/")[-2:]))
        return found

    return read


def videos(root: Path) -> Any:
    found = []
    for name in (root / "lists/lasher_train.txt").read_text().splitlines():
        folder = root / "rgbt/LasHeR/TrainingSet/trainingset" / name
        frames = [sorted(os.listdir(folder / stream)) for stream in ("visible", "infrared")]  # noqa: PTH208
        found.append((frames, np.loadtxt(folder / "init.txt", delimiter=",")))
    return found


def reports(root: Path) -> Any:
    return pd.read_csv(root / data.DATASETS["xrays/mimic-cxr"].folders[0] / xrays.REPORTS[0])


def table(path: str, **options: Any) -> Callable[[Path], Any]:
    return lambda root: pd.read_csv(root / path, **options)


class Kind(NamedTuple):
    """How a set is made; the part that is opened, or how; and the usual reader, its name first."""

    write: Callable[[Path, float], None]
    part: str | Callable[[Path], Any]
    by: str
    read: Callable[[Path], Any]


def own(root: Path) -> Any:
    return classification.own(root / "imagenet/train")["trainval"]


BY_COCO, INSTANCES = "CocoDetection", "coco/annotations/instances_train2017.json"
COCO = Kind(coco, "train", BY_COCO, coco_detection(INSTANCES, "coco/train2017"))
CAPTIONS = coco_detection("coco/annotations/captions_train2017.json", "coco/train2017")
IMAGENET = "ImageFolder", image_folder("imagenet/train")
NIH = table("xrays/chestx-ray14/train_list.txt", sep=" ", header=None)
KINDS = {
    "pretraining/imagenet-1k": Kind(imagenet, "train", *IMAGENET),
    "a folder of your own": Kind(imagenet, own, *IMAGENET),
    "pretraining/coco": COCO,
    "detection/ov-coco": COCO,
    "detection/ov-lvis": Kind(lvis, "train", BY_COCO, coco_detection("lvis/lvis_v1_train.json", "coco")),
    "restoration/coco": Kind(coco, "train", BY_COCO, CAPTIONS),
    "pretraining/ade20k": Kind(ade20k, "train", "ImageFolder", image_folder("ade/ADEChallengeData2016/images")),
    "remote/mlrsnet": Kind(scenes, "all", "ImageFolder", image_folder("remote/MLRSNet/Images")),
    "rgbt/lasher": Kind(lasher, "train", "listdir, loadtxt", videos),
    "par/pa100k": Kind(pedestrians, "trainval", "loadmat", lambda root: loadmat(root / "par/PA100k/annotation.mat")),
    "xrays/mimic-cxr": Kind(mimic, "pairs", "pandas", reports),
    "xrays/chestx-ray14": Kind(chests, "classification train 100 %", "pandas", NIH),
    "slides/panda": Kind(slides, "train", "pandas", table("slides/panda/train.csv")),
}


# --- measurements, each in a process of its own -----------------------------------------------------------------------


def resident(key: str = "VmRSS") -> float:
    """MB of this process; "VmHWM": at its peak."""
    line = next(row for row in Path("/proc/self/status").read_text().splitlines() if row.startswith(key))
    return int(line.split()[1]) / 1024


def private() -> float:
    """MB that this process shares with no other."""
    rows = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(row.split()[1]) for row in rows if row.startswith(("Private_Dirty", "Private_Clean"))) / 1024


@contextlib.contextmanager
def measured(found: dict[str, float], name: str):
    """CPU seconds of a block, and the memory above that before: at the peak, and at the end."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before, start = resident(), time.process_time()
    with contextlib.redirect_stdout(io.StringIO()):
        yield
    found[f"{name}seconds"] = time.process_time() - start
    found[f"{name}peak"] = resident("VmHWM") - before
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    found[f"{name}held"] = resident() - before


def scaled(root: Path, share: float) -> None:
    """Expect so much of each set as was made."""
    if share == 1:
        return
    for name, dataset in data.DATASETS.items():
        sizes = {split: int(count * share) for split, count in dataset.sizes.items()}
        data.DATASETS[name] = dataclasses.replace(dataset, sizes=sizes, usual={})
    for name, sizes in (("par/pa100k", ("train", "val")), ("rgbt/lasher", ("train", "val"))):
        known = data.DATASETS[name].sizes
        data.DATASETS[name].sizes["trainval"] = sum(known[split] for split in sizes)
    for key, lengths in xrays.SIZES.items():
        xrays.SIZES[key] = {split: int(count * share) for split, count in lengths.items()}
    if (root / "lists").is_dir():
        tracking._LISTS = root / "lists"


def opening(name: str, root: Path, share: float, ours: bool) -> dict[str, float]:
    """Opens a part, reads an item, orders an epoch, and reads `READ` items in a process that is forked off."""
    scaled(root, share)
    kind, found = KINDS[name], dict[str, float]()
    read = kind.read if not ours else kind.part if callable(kind.part) else data.parts(data.find(name))[kind.part]
    with measured(found, ""):
        items = read(root)
    found["items"] = len(items)
    if not ours and kind.by not in ("ImageFolder", BY_COCO):  # a table has no images
        return found
    with measured(found, "first_"):
        first = items[0]
        if hasattr(first, "frame"):
            first.frame(0)
    if ours and not isinstance(items, list):
        with measured(found, "order_"):
            orders = _batches(_Numbers(len(items)), 32, 1, 0, 0, len(items) // 32, 0, 1, 0)
            sum(1 for _ in orders)
    reading, writing = os.pipe()
    if not (child := os.fork()):
        before, order = private(), np.random.default_rng(0).integers(0, len(items), READ)
        for i in order:
            one = items[int(i)]
            if hasattr(one, "frame"):
                one.frame(0)
        os.write(writing, f"{private() - before}".encode())
        os._exit(0)
    os.close(writing)
    found["worker"] = float(os.read(reading, 100))
    os.waitpid(child, 0)
    return found


class _Numbers:
    """Items that cost nothing."""

    def __init__(self, length: int):
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> int:
        return index


def looking(name: str, root: Path, share: float, command: str) -> dict[str, float]:
    """`status`, or `companion doctor` of the first paper that reads the set; "reads": the most openings of one list."""
    scaled(root, share)
    found, opened = dict[str, float](), dict[str, int]()
    ends = (".json", ".csv", ".txt", ".mat")

    def hook(event: str, args: tuple) -> None:
        if event == "open" and str(args[0]).startswith(str(root)) and str(args[0]).endswith(ends):
            opened[str(args[0])] = opened.get(str(args[0]), 0) + 1

    sys.addaudithook(hook)
    slug = next(s for s in slugs() if name in {n for run in paper(s)["runs"] for n in cli.needs.sets(run["data"])})
    with measured(found, ""):
        if command == "status":
            state = data.status(name, root)
            assert state.state == "present", f"{name}: {state.detail}"
        else:
            cli.main(["doctor", slug, "--data-root", str(root)])
    return found | {"reads": max(opened.values(), default=0)}


def apart(function: Callable, *args: Any) -> Any:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, args)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--full", action="store_true", help="sets of their own length: 2.5 million files, an hour")
    parser.add_argument("--sets", nargs="*", choices=KINDS, default=list(KINDS))
    parser.add_argument("--folder", help="where the sets are made (default: the system's temporary folder)")
    given = parser.parse_args()
    share, rows = 1.0 if given.full else 0.1, []
    for name in given.sets:
        with tempfile.TemporaryDirectory(dir=given.folder) as folder:
            KINDS[name].write(root := Path(folder), share)
            ours, other = (apart(opening, name, root, share, of) for of in (True, False))
            row = {"name": name, "by": KINDS[name].by, "ours": ours, "reference": other}
            for command in ("status", "doctor") if name in data.DATASETS else ():
                row[command] = apart(looking, name, root, share, command)
        row["time_ratio"], row["memory_ratio"] = (ours[key] / other[key] for key in ("seconds", "peak"))
        rows.append(row)
        print(f"{name} / {row['by']}: time x {row['time_ratio']:.2f}, memory x {row['memory_ratio']:.2f}", flush=True)
        for key in row.keys() & {"ours", "reference", "status", "doctor"}:
            print(f"    {key}: " + ", ".join(f"{k} {v:.4g}" for k, v in row[key].items()), flush=True)
    code = code_hash(sources(Path(__file__)))
    facts = {"share": share, "rows": rows, "versions": record.versions(), "device": record.device(), "code": code}
    if given.sets == list(KINDS):
        write_json(bench.RESULTS / "scale.json", facts)


if __name__ == "__main__":
    main()

"""Images per second of each reader, compared with torchvision's `ImageFolder` with the same resizing or cropping.

Files of smooth noise are written to a temporary folder, in sizes that the real sets have. One process reads them, like
a loader's worker. Ours also validates its input and returns labels, boxes, masks or texts.
"""

from __future__ import annotations

import csv
import json
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import bench
import numpy as np
import torch
from bench import Step
from PIL import Image
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from companion.data import attributes, classification, detection, domains, landcover, restoration, tracking, xrays
from companion.data.images import Images
from companion.data.pyramids import Slide, write_pyramid
from companion.data.radiographs import Radiographs
from companion.io.files import read_json, write_json
from companion.models.bat import crops
from companion.models.ecamp import transforms
from companion.models.hvit.slides import PANDA, Tiles

COUNT = 16
SEEN = SimpleNamespace(size=224, mean=(0.5,) * 3, std=(0.5,) * 3)
KINDS = {  # files: the set that they imitate, file ending, height, width, grey
    "photographs": ("jpg", 375, 500, False),
    "satellite": ("jpg", 256, 256, False),
    "scenes": ("jpg", 480, 640, False),
    "pedestrians": ("png", 160, 64, False),
    "tiles": ("png", 1024, 1024, False),
    "masks": ("png", 1024, 1024, True),
    "radiographs": ("png", 1024, 1024, True),
    "regions": ("png", 2048, 2048, False),
}


def noise(seed: int, height: int, width: int) -> np.ndarray:
    """Smooth noise (h, w, 3) that compresses about as well as a photograph."""
    generator, found = torch.Generator().manual_seed(seed), torch.zeros(1, 3, height, width)
    for coarse, share in ((64, 0.5), (8, 0.3), (2, 0.1)):
        small = torch.rand(1, 3, height // coarse, width // coarse, generator=generator)
        found += share * torch.nn.functional.interpolate(small, (height, width), mode="bicubic")
    return found[0].clamp(0, 1).mul(255).byte().permute(1, 2, 0).numpy()


def write(root: Path) -> None:
    """The files of `KINDS`, <kind>/<class>/<number>, and the list files that some readers need."""
    for kind, (end, height, width, grey) in KINDS.items():
        for i in range(2 if kind == "regions" else COUNT):
            path = root / kind / "ab"[i % 2] / f"{i}.{end}"
            path.parent.mkdir(parents=True, exist_ok=True)
            image = Image.fromarray(noise(i, height, width))
            if kind == "masks":
                image = Image.fromarray(np.asarray(image)[..., 0] // 64)
            (image.convert("L") if grey else image).save(path, **({"quality": 90} if end == "jpg" else {}))
    photographs = [f"{'ab'[i % 2]}/{i}" for i in range(COUNT)]
    with (root / "pedestrians" / "labels.csv").open("w", newline="") as file:
        rows = [(f"{name}.png", ("train", "test")[i == 0], i % 2) for i, name in enumerate(photographs)]
        csv.writer(file).writerows([("image", "split", "hat"), *rows])
    (root / "radiographs" / "train_list.txt").write_text("".join(f"{name}.png 1\n" for name in photographs))
    (root / "scenes" / "annotations.json").write_text(json.dumps({
        "images": [{"id": i, "width": 640, "height": 480, "file_name": f"{n}.jpg"} for i, n in enumerate(photographs)],
        "categories": [{"id": 1, "name": "a"}],
        "annotations": [{"id": i + 1, "image_id": i, "category_id": 1, "bbox": [9, 9, 50, 50]} for i in range(COUNT)],
    }))  # fmt: skip
    with Image.open(root / "regions" / "a" / "0.png") as image:
        pixels = np.asarray(image)
    write_pyramid(root / "slide.tiff", np.hstack([pixels] * 2), 0.5)


def land(root: Path) -> landcover.LandCover:
    pictures = [
        landcover.AerialImage(root / "tiles" / "ab"[i % 2] / f"{i}.png", root / "masks" / "ab"[i % 2] / f"{i}.png", "a")
        for i in range(COUNT)
    ]
    own = landcover.own_set(root, "landcover", "")
    return landcover.LandCover(
        own, pictures, dict.fromkeys("abcd", (0, 0, 0)), partial(landcover.plain_or_coloured, [(0, 0, 0)] * 4)
    )


def pairs(root: Path) -> crops.Pairs:
    frames = sorted((root / "scenes").glob("*/*.jpg"))
    boxes = np.tile([300.0, 220.0, 60.0, 60.0], (COUNT, 1))
    videos = [tracking.Video("a", tuple(frames), tuple(frames), boxes, None, np.zeros(COUNT, bool))]
    return crops.Pairs(videos, COUNT // 4, min_frames=COUNT)


def region(root: Path, number: int) -> np.ndarray:
    """One of the two regions of a slide."""
    tiles = Tiles(np.array([[0, 0], [2048, 0]]), np.ones(2), np.zeros(2), 2048, 0, 2048, PANDA.region)
    with Slide(root / "slide.tiff") as slide:
        return tiles.read(slide, *tiles.coords[number])


def plain(root: Path, *kinds: str, transform: Callable) -> Step:
    """torchvision's `ImageFolder`, PIL and the transform."""
    sets = [ImageFolder(root / kind, transform) for kind in kinds]
    return lambda: all(sets[k][i] is not None for k in range(len(sets)) for i in range(len(sets[k])))


def reading(make: Callable[[Path], Sequence], root: Path, transform: Callable | None = None) -> Step:
    """A reader, item by item, whose image goes through `transform`."""
    data = make(root)
    return lambda: [transform(data[i][0]) if transform else data[i] for i in range(len(data))] and None


def slides(root: Path) -> Step:
    return lambda: [region(root, i) for i in range(2)] and None


def folder(root: Path) -> Images:
    return classification.own(root / "photographs", classification.resize_transform(SEEN))["trainval"]


def domain(root: Path) -> Images:
    return domains.own(root / "satellite", domains.clip_transform(SEEN))["all"]


def boxes(root: Path) -> detection.Boxes:
    return detection.own(root / "scenes")["train"]


def people(root: Path) -> attributes.Pedestrians:
    return attributes.own(root / "pedestrians", attributes.square_transform())["trainval"]


def captioned(root: Path) -> restoration.Captioned:
    sources = sorted(str(path) for path in (root / "scenes").glob("*/*.jpg"))
    return restoration.Captioned(restoration.own_set(root, "restoration", ""), root, sources, [""] * len(sources))


def chests(root: Path) -> Radiographs:
    return xrays.own(root / "radiographs", ["a"], transforms.test_transform())["train"]


SCALED = v2.ToDtype(torch.float32, scale=True)
SQUARE = partial(v2.functional.resize, size=[512, 512], interpolation=v2.InterpolationMode.BICUBIC)


def tensor(after: Callable, grey: bool, image: Image.Image) -> Any:
    """A tensor of PIL's image, before `after`."""
    return after(v2.functional.pil_to_tensor(image.convert("L") if grey else image))


def same(x: Any) -> Any:
    return x


def scaled(after: Callable, x: torch.Tensor) -> torch.Tensor:
    return after(SCALED(x))


def main() -> None:
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        write(root)
        resize = v2.Resize(640)
        cut = v2.Compose([v2.Resize((256, 256)), v2.PILToTensor()])
        clip, square = domains.clip_transform(SEEN), attributes.square_transform()
        radiograph = partial(tensor, partial(scaled, transforms.test_transform()), True)
        readers = {
            "classification": (
                partial(reading, folder, root),
                partial(plain, root, "photographs", transform=classification.resize_transform(SEEN)),
            ),
            "domains": (partial(reading, domain, root), partial(plain, root, "satellite", transform=clip)),
            "detection": (
                partial(reading, boxes, root, resize),
                partial(plain, root, "scenes", transform=partial(tensor, resize, False)),
            ),
            "attributes": (partial(reading, people, root), partial(plain, root, "pedestrians", transform=square)),
            "tracking pairs": (partial(reading, pairs, root), partial(plain, root, "scenes", transform=cut)),
            "restoration": (
                partial(reading, captioned, root, SQUARE),
                partial(plain, root, "scenes", transform=partial(tensor, partial(scaled, SQUARE), False)),
            ),
            "land cover, image and labels": (
                partial(reading, land, root),
                partial(plain, root, "tiles", "masks", transform=partial(tensor, same, False)),
            ),
            "radiographs": (partial(reading, chests, root), partial(plain, root, "radiographs", transform=radiograph)),
            "slides": (partial(slides, root), partial(plain, root, "regions", transform=partial(tensor, same, False))),
        }
        kinds = ("photographs", "satellite", "scenes", "pedestrians", "scenes", "scenes", "tiles", "radiographs")
        what = {name: kind for name, kind in zip(readers, (*kinds, "regions"), strict=True)}
        labels = {}
        for name, kind in what.items():
            end, height, width, _ = KINDS[kind]
            labels[name] = f"{name}, {end.upper()} {width} x {height} / ImageFolder"
        makers = {f"{name}: {side}": make for name, both in readers.items()
                  for side, make in zip(("ours", "ImageFolder"), both, strict=True)}  # fmt: skip
        rows = [(labels[name], f"{name}: ours", f"{name}: ImageFolder") for name in readers]
        bench.run("readers", f"{COUNT} generated files of each kind, one process", makers, rows)
    path = bench.RESULTS / "readers.json"
    facts = read_json(path)
    for row in facts["rows"]:
        count = 2 if row["what"].startswith("slides") else COUNT
        row |= {"fps": round(count / max(row["seconds"], 1e-3), 1), "fps_ratio": round(1 / row["time_ratio"], 2)}
        print(f"{row['what']}: {row['fps']} images/s, x {row['fps_ratio']}")
    write_json(path, facts)


if __name__ == "__main__":
    main()

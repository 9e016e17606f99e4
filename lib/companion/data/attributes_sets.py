"""The pedestrian attribute sets as facts: layouts, splits, sentences, licences. `attributes` reads them.

Each is a set of pictures of people, one person a picture, with a 0 or 1 for each attribute.

* PETA: 19,000 pictures from ten older sets; 35 of 105 attributes are scored. Deng et al., ACM MM 2014.
* PA100K: 100,000 from outdoor cameras, 26 attributes. Liu et al., ICCV 2017.
* RAPv1: 41,585 from a shopping mall, 51 of 92 attributes. Li et al., arXiv 1603.07054.
* RAPv2: 84,928 from the same mall, 54 of 152 attributes. Li et al., IEEE TIP 2019.
* WIDER: 57,491 people cut from 13,789 photographs, 14 attributes. Li et al., ECCV 2016, have 57,524 boxes; the cuts and
  the text files that are read here are those of the authors of PromptPAR.
* PETA-ZS, RAP-ZS: PETA and RAPv2 split anew, so that nobody is in two splits. Jia et al., arXiv 2107.03576.
* pocket: small pictures made on this machine, in PA100K's layout.

Label order: that of the authors of PromptPAR (Event-AHU/OpenPAR at 210ff55, dataset/preprocess), who group PETA's and
RAPv2's attributes by body part, as valencebond/Rethinking_of_PAR does. Where a set has five random partitions, the
first is taken, as there.
"""

from __future__ import annotations

from collections.abc import Iterator

from . import DataSet


def _entries(text: str) -> tuple[str, ...]:
    """What stands between commas."""
    return tuple(" ".join(entry.split()) for entry in text.split(","))


def _sentences(text: str) -> tuple[str, ...]:
    """The same; what begins with a small letter goes on after "A pedestrian"."""
    return tuple(entry if entry[0].isupper() else f"A pedestrian {entry}" for entry in _entries(text))


_PETA = _sentences("""
        wearing a hat, wearing a muffler, with no headwear, wearing sunglasses, with long hair, in casual upper
        wear, in formal upper wear, in a jacket, in upper wear with a logo, in plaid upper wear, in a
        short-sleeved top, in upper wear with thin stripes, in a t-shirt, in other upper wear, in upper wear
        with a V-neck, in casual lower wear, in formal lower wear, in jeans, in shorts, in a short skirt, in
        trousers, in leather shoes, in sandals, in other types of shoes, in sneakers, with a backpack, with
        other types of attachments, with a messenger bag, with no attachments, with plastic bags, under the age
        of 30, between the ages of 30 and 45, between the ages of 45 and 60, over the age of 60, A male
        pedestrian""")
_RAPV2 = _sentences("""
        with a bald head, with long hair, with black hair, wearing a hat, wearing glasses, in a shirt, in a
        sweater, in a vest, in a t-shirt, in cotton clothing, in a jacket, dressed in a suit, in tight-fitting
        clothes, in a short-sleeved top, with other upper wear, in long trousers, in a skirt, in a short skirt,
        in a dress, in jeans, in tight trousers, in leather shoes, in sports shoes, wearing boots, in cloth
        shoes, in casual shoes, in other footwear, carrying a backpack, with a shoulder bag, with a handbag,
        with a box, with a plastic bag, with a paper bag, carrying a hand trunk, with other attachments, under
        the age of 16, between the ages of 17 and 30, between the ages of 31 and 45, between the ages of 46 and
        60, A female pedestrian, with a larger body build, with a normal body build, with a slender body build,
        A customer, An employee, making a call, engaged in conversation, gathered with others, holding
        something, pushing something, pulling something, carrying something in their arm, carrying something in
        their hand, engaged in other actions""")

SENTENCES: dict[str, tuple[str, ...]] = {
    "par/peta": _PETA,
    "par/pa100k": _sentences("""
        A female pedestrian, over the age of 60, between the ages of 18 and 60, under the age of 18, seen from
        the front, seen from the side, seen from the back, wearing a hat, wearing glasses, with a handbag, with
        a shoulder bag, with a backpack, holding objects in front, in short-sleeved upper wear, in long-sleeved
        upper wear, in stride upper wear, in upper wear with a logo, in plaid upper wear, in splice upper wear,
        in striped lower wear, in patterned lower wear, in a long coat, in trousers, in shorts, in skirts and
        dresses, wearing boots"""),
    "par/rapv1": _sentences("""
        A female pedestrian, under the age of 16, between the ages of 17 and 30, between the ages of 31 and 45,
        with a larger body build, with a normal body build, with a slender body build, A customer, A clerk, with
        a bald head, with long hair, with black hair, wearing a hat, wearing glasses, wearing a muffler, in a
        shirt, in a sweater, in a vest, in a t-shirt, in cotton clothing, in a jacket, in a suit, in
        tight-fitting clothes, in a short-sleeved top, in long trousers, in a skirt, in a short skirt, in a
        dress, in jeans, in tight trousers, in leather shoes, in sports shoes, in boots, in cloth shoes, in
        casual shoes, carrying a backpack, with a shoulder bag, with a handbag, with a box, with a plastic bag,
        with a paper bag, carrying a hand trunk, with other attachments, making a call, engaged in conversation,
        gathered with others, holding something, pushing something, pulling something, carrying something in
        their arm, carrying something in their hand"""),
    "par/rapv2": _RAPV2,
    "par/wider": (
        *("A pedestrian whose gender is male", "A pedestrian whose hair is long", "pedestrian wearing sunglasses"),
        *(
            " pedestrian wearing a hat",
            "A pedestrian whose upper is t-shirt",
            "A pedestrian whose upper is long sleeve",
        ),
        *("A pedestrian whose upper is formal suits", "A pedestrian whose lower is shorts"),
        *("A pedestrian whose lower is jeans", "A pedestrian whose lower is long pants"),
        *("A pedestrian whose lower is skirt", "A pedestrian who is face mask", "A pedestrian who is logo"),
        "A pedestrian who is plaid",
    ),
    "par-zs/peta": _PETA,
    "par-zs/rap": tuple(sentence for sentence in _RAPV2 if "46" not in sentence),
}
"""The sentence of each attribute, in label order, as the authors' preparation has them, slips included."""

PHRASES: dict[str, tuple[str, ...]] = {
    "par/rapv1": _entries("""
        female, age less 16, age 17 30, age 31 45, body fat, body normal, body thin, customer, clerk, head bald
        head, head long hair, head black hair, head hat, head glasses, head muffler, upper shirt, upper sweater,
        upper vest, upper t-shirt, upper cotton, upper jacket, upper suit up, upper tight, upper short sleeve,
        lower long trousers, lower skirt, lower short skirt, lower dress, lower jeans, lower tight trousers,
        shoes leather, shoes sport, shoes boots, shoes cloth, shoes casual, attach backpack, attach shoulder
        bag, attach hand bag, attach box, attach plastic bag, attach paper bag, attach hand trunk, attach other,
        action calling, action talking, action gathering, action holding, action pushing, action pulling, action
        carry arm, action carry hand""")
}
"""Of RAPv1 the authors' script gives CLIP these phrases, and keeps the sentences beside them; which of the two the
paper used was not found. `SENTENCES` has the sentences, as for all other sets and as the abstract says."""

_PETA_ORDER = (
    *(10, 18, 19, 30, 15),  # head
    *(7, 9, 11, 14, 21, 26, 29, 32, 33, 34),  # upper body
    *(6, 8, 12, 25, 27, 31),  # lower body
    *(13, 23, 24, 28),  # feet
    *(4, 5, 17, 20, 22),  # bags
    *(0, 1, 2, 3, 16),  # age, gender
)
_RAPV2_ORDER = (*range(10, 45), 1, 2, 3, 4, 0, *range(5, 10), *range(45, 54))

COLUMNS: dict[str, tuple[int, ...]] = {
    "par/peta": _PETA_ORDER,
    "par/pa100k": tuple(range(26)),
    "par/rapv1": tuple(range(51)),
    "par/rapv2": _RAPV2_ORDER,
    "par/wider": tuple(range(14)),
    "par-zs/peta": _PETA_ORDER,
    "par-zs/rap": tuple(i for i in _RAPV2_ORDER if i != 4),  # 4 is Age46-60
}
"""Which columns of the raw labels are scored, in label order: of PETA after its first four, of RAPv2 among the 54 that
its annotation selects."""

ZERO_SHOT = {"par-zs/peta": "par/peta", "par-zs/rap": "par/rapv2"}
"""The sets that are another one split anew."""

ZERO_SHOT_FILES = ("dataset_zs_run0.pkl", "dataset_zs_pad.pkl")
"""Where the new split is: Rethinking_of_PAR's file, or the one that PromptPAR's script makes of it."""

IMAGES: dict[str, tuple[str, ...]] = {
    "par/peta": ("images", "Pad_datasets"),
    "par/pa100k": ("data", "release_data/release_data", "release_data", "Pad_datasets"),
    "par/rapv1": ("RAP_dataset", "Pad_datasets"),
    "par/rapv2": ("RAP_dataset", "Pad_datasets"),
    "par/wider": ("split_image", "Pad_datasets"),
}
"""Where the pictures may be: as released, or padded to squares by the authors of PromptPAR."""

_TRAINVAL = {"par/rapv1": (33_268, 8_317), "par/wider": (28_330, 29_161)}
_SIZES = {
    "par/peta": (9_500, 1_900, 7_600),
    "par/pa100k": (80_000, 10_000, 10_000),
    "par/rapv2": (50_957, 16_986, 16_985),
    "par-zs/peta": (11_241, 3_826, 3_933),
    "par-zs/rap": (17_062, 4_628, 4_928),
}

_RAP = "on request from the site of its authors, rapdataset.com; github.com/Event-AHU/OpenPAR links a bundle"
_RETHINKING = "dataset_zs_run0.pkl from github.com/valencebond/Rethinking_of_PAR"

# name: title, folders (the authors' spelling first), where to get it, licence, citation
_FACTS = {
    "par/peta": (
        "PETA",
        ("par/PETA", "PETA"),
        "mmlab.ie.cuhk.edu.hk/projects/PETA.html; prepared, by the links in the README of github.com/Event-AHU/OpenPAR",
        "none found",
        "Deng et al., Pedestrian attribute recognition at far distance, ACM MM 2014",
    ),
    "par/pa100k": (
        "PA-100K",
        ("par/PA100k", "PA100k", "PA-100K"),
        "the link in the README of github.com/xh-liu/HydraPlus-Net (a personal cloud drive)",
        "none found",
        "Liu et al., HydraPlus-Net: attentive deep features for pedestrian analysis, ICCV 2017",
    ),
    "par/rapv1": (
        "RAP v1",
        ("par/RAPV1", "RAPV1", "RAP"),
        _RAP,
        "on request",
        "Li et al., A richly annotated dataset for pedestrian attribute recognition, arXiv 1603.07054, 2016",
    ),
    "par/rapv2": (
        "RAP v2",
        ("par/RAPV2", "RAPV2", "RAP2"),
        _RAP,
        "on request",
        "Li et al., A richly annotated pedestrian dataset for person retrieval in real surveillance scenarios, "
        "IEEE TIP 28, 2019",
    ),
    "par/wider": (
        "WIDER attributes, cut out",
        ("par/WIDER", "WIDER"),
        "the cuts and their text files: the link in the README of github.com/Event-AHU/OpenPAR",
        "none found",
        "Li et al., Human attribute recognition by deep hierarchical contexts, ECCV 2016",
    ),
    "par-zs/peta": (
        "PETA, zero-shot identities",
        ("par/PETA", "PETA"),
        f"PETA, and {_RETHINKING}",
        "none found",
        "Jia et al., Rethinking of pedestrian attribute recognition, arXiv 2107.03576, 2021",
    ),
    "par-zs/rap": (
        "RAP v2, zero-shot identities",
        ("par/RAPV2", "RAPV2", "RAP2"),
        f"RAP v2, and {_RETHINKING}",
        "on request",
        "Jia et al., Rethinking of pedestrian attribute recognition, arXiv 2107.03576, 2021",
    ),
}

ANNOTATIONS = {
    "par/peta": "PETA.mat",
    "par/pa100k": "annotation.mat",
    "par/rapv1": "RAP_annotation/RAP_annotation.mat",
    "par/rapv2": "RAP_annotation/RAP_annotation.mat",
}
"""The file with labels and splits; WIDER has five text files."""

WIDER_FILES = {
    "names": "Annotations/attr_name.txt",
    "trainval": ("Annotations/trainval_name.txt", "Annotations/trainval_gt_label.txt"),
    "test": ("Annotations/test_name.txt", "Annotations/test_gt_label.txt"),
}


def _layout(name: str) -> str:
    own = ZERO_SHOT.get(name, name)
    ending = "png" if own in ("par/peta", "par/rapv1", "par/rapv2") else "jpg"
    first, *others = IMAGES[own]
    lines = [(f"{first}/*.{ending}", f"the pictures; also accepted: {', '.join(f'{other}/' for other in others)}")]
    if own == "par/wider":
        lines += [(WIDER_FILES["names"], "one attribute a line")]
        for split in ("trainval", "test"):
            names, labels = WIDER_FILES[split]
            lines += [(names, "one picture a line"), (labels, "[1, -1, 0, ...], 14 numbers a line")]
    else:
        lines += [(ANNOTATIONS[own], "labels and splits, as released")]
    if name in ZERO_SHOT:
        lines += [(ZERO_SHOT_FILES[0], f"partition.train, .val, .test; or {ZERO_SHOT_FILES[1]}")]
    width = max(len(path) for path, _ in lines) + 4
    return "\n".join(f"{path:{width}}{note}" for path, note in lines)


def sets() -> Iterator[DataSet]:
    """All of them, in the order of the authors' tables."""
    for name, (title, folders, source, licence, citation) in _FACTS.items():
        if name in _SIZES:
            train, val, test = _SIZES[name]
            sizes = {"train": train, "val": val, "trainval": train + val, "test": test}
        else:
            sizes = dict(zip(("trainval", "test"), _TRAINVAL[name], strict=True))
        yield DataSet(
            name=name,
            title=title,
            group="Pedestrian attributes",
            task="attributes",
            classes=len(SENTENCES[name]),
            sizes=sizes,
            folders=folders,
            layout=_layout(name),
            source=source,
            licence=licence,
            citation=citation,
        )
    yield DataSet(
        name="pocket/pedestrians",
        title="pocket pedestrians",
        group="pocket",
        task="attributes",
        classes=None,
        sizes={},
        folders=("pocket/pedestrians",),
        layout="as par/pa100k: annotation.mat, data/*.png",
        source="made on this machine: `companion.toy.datasets.pedestrians.write(root)`",
        licence="made here, from pictures bundled with scikit-image and scikit-learn",
        citation="this project",
    )

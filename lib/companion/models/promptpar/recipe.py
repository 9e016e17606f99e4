"""PromptPAR: what the notebook trains live, at pocket scale or with the published settings."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import open_clip
import pandas as pd
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from ... import backbones
from ...data import DATASETS, attributes
from ...data.attributes_sets import PHRASES, SENTENCES
from ...errors import BadParameter, MissingWeights
from ...evaluation.metrics.attributes import Scores, evaluate
from ...evaluation.tables import compare_published, published_table, upsert_rows
from ...ops.papers import paper
from ...toy.ablations import promptpar as study
from ...toy.datasets import pedestrians as pocket
from ...training import checkpoints as kept
from ...training.fit import fit, predict
from . import model as promptpar
from .model import THRESHOLD, PromptPAR

TASK, LIVE = "street", ("heads only", "PromptPAR, not masked", "PromptPAR")
# what differs from PromptPAR: arguments of the model, and the weight of the similarity in the loss
METHODS: dict[str, dict] = {
    "PromptPAR": {},
    "PromptPAR, not masked": {"masked": False},
    "regions, no similarity loss": {"similarity": 0.0},
    "deep prompts": {"regions": 0},
    "heads only": {"regions": 0, "prompts": 0},
    "full fine-tuning": {"regions": 0, "prompts": 0, "tuned": "all"},
}
COLUMNS = {
    "par/peta": "PETA",
    "par/pa100k": "PA100K",
    "par/rapv1": "RAPv1",
    "par/rapv2": "RAPv2",
    "par/wider": "WIDER",
    "par-zs/peta": "PETA-ZS",
    "par-zs/rap": "RAP-ZS",
}
"""The sets that can be trained on, and what the tables call them."""

RESULTS = ("sota_peta_pa100k_rapv1", "rapv2_promptpar", "jgel_rerun_zs")  # tables that measured numbers go into
CLIP, FUSION = "ViT-L-14-quickgelu/openai", "vit_base_patch16_224.orig_in21k_ft_in1k"
TEST_BATCH = 64
WORKERS = min(8, os.cpu_count() or 1)


@dataclass(frozen=True)
class Setting:
    """What is trained on what, and tested on what.

    Attributes:
        names: the attributes, as tables show them.
        sentences: the attributes, as CLIP reads them.
        ratio: (A,) the share of training pictures with each attribute.
        parts: "train" and "test": items (picture (3, H, W), labels (A,)).
        methods: the methods to run; those in `trained` are trained.
        rates: their learning rates at pocket scale; the published recipe has two for every method.
        build: the model of a method, before training.
        learn: trains a model in place: (model, method, arguments of `fit`) to the history.
        probabilities: of a model and a part, (n, A).
    """

    title: str
    names: tuple[str, ...]
    sentences: tuple[str, ...]
    ratio: Tensor
    parts: dict[str, Dataset]
    methods: tuple[str, ...]
    trained: tuple[str, ...]
    rates: dict[str, float]
    build: Callable[[str], PromptPAR]
    learn: Callable[..., list[dict]]
    probabilities: Callable[[PromptPAR, Dataset], Tensor]


def setting(p: SimpleNamespace, out: Path, rates: Mapping[tuple[str, str], float]) -> Setting:
    """The setting that the notebook's parameters ask for.

    Args:
        p: the checked parameters of the notebook.
        out: the run's folder; pocket pictures, and what a training of the paper profile keeps, are written below it.
        rates: learning rates by (task, method), as the study chose them on validation.

    Raises:
        BadParameter, MissingData, MissingWeights, CorruptFile: with what to change or get.
    """
    if p.profile == "pocket":
        return _pocket(p, out, rates)
    if p.texts == "phrases" and p.dataset not in PHRASES:
        raise BadParameter("texts", p.texts, f"'sentences'; phrases are known of {', '.join(PHRASES)}")
    if p.checkpoint and p.method != "PromptPAR":
        raise BadParameter("method", p.method, ["PromptPAR with a checkpoint: it holds PromptPAR's weights"])
    return _dry(p) if p.dry_run else _paper(p, out)


def _pocket(p: SimpleNamespace, out: Path, rates: Mapping[tuple[str, str], float]) -> Setting:
    """The street's pedestrians of the run's seed, trained on training and validation pictures as the study does."""
    root = str(out / "data")
    pocket.write(study.folder(root, p.seed), p.seed)
    parts = {part: study.pictures(root, p.seed, part) for part in ("trainval", "test")}
    train, chosen = parts.pop("trainval"), {method: rates[TASK, method] for method in LIVE}

    def learn(model: PromptPAR, method: str, **options) -> list[dict]:
        return study.train_model(model, method, train, chosen[method], p.seed, **options)

    return Setting(
        title="pocket pedestrians",
        names=pocket.ATTRIBUTES,
        sentences=tuple(pocket.SENTENCES.values()),
        ratio=train.tensors[1].mean(0),
        parts={"train": train} | parts,
        methods=LIVE,
        trained=LIVE,
        rates=chosen,
        build=functools.partial(study.build, seed=p.seed),
        learn=learn,
        probabilities=lambda model, data: study.probabilities(model, data.tensors[0]),
    )


# --- the published recipe ---------------------------------------------------------------------------------------------


def recipe() -> pd.DataFrame:
    """The authors' settings of the two sides, "heads" and "prompts" (the paper's YAML)."""
    return published_table("promptpar", "code-recipe").set_index("method")


def sides(model: PromptPAR, epochs: int, steps: int) -> dict[str, tuple[list[nn.Parameter], np.ndarray]]:
    """For `fit`: the tensors of each side, and their rate at each of `steps` steps an epoch."""
    found = {}
    for side, parameters in model.sides().items():
        settings = recipe()[side]
        rates = promptpar.learning_rates(epochs, settings["learning rate"], int(settings["warm-up epochs"]))
        if parameters:
            found[side] = (parameters, np.repeat(rates, steps))
    return found


def learn(p: SimpleNamespace, data: Dataset, ratio: Tensor, model: PromptPAR, method: str, **changes) -> list[dict]:
    """Train by the authors' recipe, in place; `changes` are arguments of `fit`, `epochs` and `batch` among them."""
    settings = recipe()["heads"]
    # a folder of one's own may hold fewer pictures than a batch; numbers of NumPy's cannot be read from a checkpoint
    options = {
        "epochs": int(settings["epochs"]),
        "batch": min(int(settings["batch"]), len(data)),
        "seed": p.seed,
        "optimizer": "sgd",
        "momentum": 0.9,
        "weight_decay": float(settings["weight decay"]),
        "decay": "all",
        "clip": float(settings["gradient clipping"]),
        "accelerator": p.accelerator,
        "devices": p.devices,
        "precision": p.precision,
        "name": method,
    } | changes
    weight = METHODS[method].get("similarity", 0.5)

    def value(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        images, labels = batch
        return promptpar.loss(model(images), labels, ratio.to(labels.device), weight)

    steps = len(data) // options["batch"]
    return fit(model, value, data, sides=sides(model, options["epochs"], steps), **options)


def build(p: SimpleNamespace, method: str, sentences: tuple[str, ...], clip: nn.Module, fusion: nn.Module) -> PromptPAR:
    """A method at full size."""
    torch.manual_seed(p.seed)
    if p.release == "2023" and clip.visual.output_dim != fusion.embed_dim:
        accepted = f"'2025' with {p.clip}, whose {clip.visual.output_dim} channels the fusion of {fusion.embed_dim} "
        raise BadParameter("release", p.release, accepted + "cannot take as they are")
    tokenizer = open_clip.get_tokenizer(p.clip.partition("/")[0])
    options = {"visual_embed": p.release == "2025", "official_quirks": p.quirks} | METHODS[method]
    options.pop("similarity", None)
    return PromptPAR(clip, sentences, tokenizer, fusion, **options)


def weights(p: SimpleNamespace) -> str | Path:
    """What CLIP is loaded from: the parameter, the usual file below `<data_root>/weights`, or what the cache has."""
    file = next(w["file"] for w in paper("promptpar")["weights"] if w["name"] == "clip")
    usual = Path(p.data_root) / "weights" / file
    return p.weights or (usual if p.clip == CLIP and usual.is_file() else "pretrained")


def _backbones(p: SimpleNamespace, clip: str | Path, fusion: str) -> tuple[nn.Module, nn.Module]:
    """The CLIP that is prompted and the ViT of the fusion, each from what it is to be loaded from."""
    return backbones.build(f"openclip:{p.clip}", clip), backbones.build(FUSION, fusion)


def _released(p: SimpleNamespace, sentences: tuple[str, ...]) -> PromptPAR:
    """A trained model from the file `checkpoint`: the authors', or what a training here kept."""
    if not Path(p.checkpoint).is_file():
        files = "PETA_Checkpoint.pth, PA100k_Checkpoint.pth or RAP1.pth"
        ways = [
            f"give the path of {files}, which the README of github.com/Event-AHU/OpenPAR links (folder PromptPAR)",
            "or that of a training here, `trained/PromptPAR, ....safetensors` in its run's folder",
            "leave `checkpoint` empty to train",
        ]
        raise MissingWeights("PromptPAR's checkpoint", p.checkpoint, ways)
    ours = Path(p.checkpoint).suffix == ".safetensors"
    state = backbones.read_state(p.checkpoint) if ours else promptpar.read_checkpoint(p.checkpoint)
    tokenizer = open_clip.get_tokenizer(p.clip.partition("/")[0])
    return PromptPAR.from_official(state, sentences, tokenizer, official_quirks=p.quirks)


def _paper(p: SimpleNamespace, out: Path) -> Setting:
    """The published recipe on real pictures, trained on trainval; or trained weights, named by `checkpoint`.

    A training leaves its checkpoint in `out`/trained, to go on from, and `<what was trained>.safetensors`, the weights
    under the authors' names.
    """
    own = p.dataset == "folder"
    sets = attributes.own_folder(p.data_root) if own else attributes.splits(p.dataset, p.data_root)
    train, test = sets["trainval"], sets["test"]
    sentences = PHRASES[p.dataset] if p.texts == "phrases" else train.sentences
    if p.checkpoint:
        released = _released(p, sentences)
        clip, made = released.clip, lambda method: released
    else:
        clip, fusion = _backbones(p, weights(p), "pretrained")
        made = functools.partial(build, p, sentences=sentences, clip=clip, fusion=fusion)

    def learned(model: PromptPAR, method: str, **options) -> list[dict]:
        folder, name = out / "trained", f"{label(p)}, {p.dataset}, seed {p.seed}"
        resumed = kept.checkpoint(folder, name, model, train.sources, train.labels)
        history = learn(p, train, train.ratio, model, method, **({"workers": WORKERS} | resumed | options))
        kept.save(folder, name, model.to_official())
        return history

    size = clip.visual.image_size[0]
    train.transform, test.transform = (attributes.square_transform(size, train=flag) for flag in (True, False))
    return Setting(
        title=COLUMNS.get(p.dataset, train.name),
        names=train.names,
        sentences=sentences,
        ratio=train.ratio,
        parts={"train": train, "test": test},
        methods=(p.method,),
        trained=() if p.checkpoint else (p.method,),
        rates={},
        build=made,
        learn=learned,
        probabilities=functools.partial(probabilities, p, workers=WORKERS),
    )


def _dry(p: SimpleNamespace) -> Setting:
    """Full-size models with random weights, two optimiser steps on generated pictures of the real shape."""
    sentences = PHRASES[p.dataset] if p.texts == "phrases" else SENTENCES.get(p.dataset, SENTENCES["par/peta"])
    torch.manual_seed(p.seed)
    clip, fusion = _backbones(p, "random", "random")
    batch = int(recipe()["heads"]["batch"]) if p.accelerator != "cpu" and torch.cuda.is_available() else 2
    size, generator = clip.visual.image_size[0], torch.Generator().manual_seed(p.seed)

    def generated(count: int) -> TensorDataset:
        pictures = torch.randn(count, 3, size, size, generator=generator)
        return TensorDataset(pictures, (torch.rand(count, len(sentences), generator=generator) < 0.3).float())

    train, ratio = generated(2 * batch), torch.full((len(sentences),), 0.3)
    return Setting(
        title="generated pictures (dry run: the scores mean nothing)",
        names=sentences,
        sentences=sentences,
        ratio=ratio,
        parts={"train": train, "test": generated(4)},
        methods=(p.method,),
        trained=(p.method,),
        rates={},
        build=functools.partial(build, p, sentences=sentences, clip=clip, fusion=fusion),
        learn=functools.partial(learn, p, train, ratio, batch=batch, epochs=1),
        probabilities=functools.partial(probabilities, p),
    )


# --- training and testing ---------------------------------------------------------------------------------------------


def train(found: Setting, method: str, **options) -> tuple[PromptPAR, list[dict]]:
    """Build a method of a setting and train it; weights of a file are trained already, their history is empty."""
    model = found.build(method)
    if method not in found.trained:
        return model.eval(), []
    return model, found.learn(model, method, **options)


def probabilities(p: SimpleNamespace, model: PromptPAR, data: Dataset, **options) -> Tensor:
    """(n, A), what a model says of each picture; `options` are for `companion.training.fit.predict`."""
    usual = {"batch": TEST_BATCH, "accelerator": p.accelerator, "precision": p.precision}
    return predict(model, data, **(usual | options)).sigmoid()


def scores(model: PromptPAR, found: Setting, part: str = "test", threshold: float = THRESHOLD) -> Scores:
    """A model's scores on a part of a setting."""
    data = found.parts[part]
    return evaluate(labels(data).numpy(), found.probabilities(model, data).numpy(), threshold)


def labels(data: Dataset) -> Tensor:
    """Those of all pictures of a part, (n, A)."""
    return data.tensors[1] if isinstance(data, TensorDataset) else data.labels


def first(found: Setting, part: str, count: int) -> tuple[Tensor, Tensor]:
    """The first pictures of a part, (n, 3, H, W), and their labels, (n, A)."""
    data = found.parts[part]
    images, truth = zip(*(data[i] for i in range(min(count, len(data)))), strict=True)
    return torch.stack(images), torch.stack([torch.as_tensor(labels) for labels in truth])


# --- results that gather ----------------------------------------------------------------------------------------------


def label(p: SimpleNamespace) -> str:
    """The method's name in the tables, with what is not as published."""
    changed = [p.method]
    changed += [f"weights of {Path(p.checkpoint).name}"] if p.checkpoint else []
    changed += [f"code of {p.release}"] if p.release != "2023" and not p.checkpoint else []
    changed += [] if p.quirks else ["as meant"]
    changed += ["phrases"] if p.texts == "phrases" else []
    changed += [p.clip] if p.clip != CLIP else []
    return ", ".join(changed)


def measured(path: Path, new: Mapping[str, object] | None = None) -> pd.DataFrame:
    """The real results in `path`, a row a (method, dataset, seed) with the totals of `Scores`; `new` is added."""
    return upsert_rows(path, ["method", "dataset", "seed"], ["mA", "Acc", "Prec", "Rec", "F1"], [new] if new else ())


def row(p: SimpleNamespace, found: Scores) -> dict[str, object]:
    """What `scores` gave as a row for `measured`."""
    return {"method": label(p), "dataset": p.dataset, "seed": p.seed} | found.totals


def cells(rows: pd.DataFrame) -> dict[tuple[str, str], float]:
    """Means over seeds by (method, column), as `report.beside` takes them: columns are "PETA mA", "PETA Recall", ...

    F1 is the mean of the images', which PromptPAR reports; "PETA F1 of means" has a column of its own nowhere.
    """
    found = {}
    for (method, dataset), group in rows.groupby(["method", "dataset"]):
        name = COLUMNS.get(dataset, DATASETS[dataset].title if dataset in DATASETS else dataset)
        for metric in ("mA", "Acc", "Prec", "Rec", "F1"):
            found[method, f"{name} {'Recall' if metric == 'Rec' else metric}"] = float(group[metric].mean())
    return found


def tables(rows: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Published beside measured, by title, in the layout of each published table of results."""
    here, found = cells(rows), {}
    for name in RESULTS:
        frame = published_table("promptpar", name)
        own = {key: value for key, value in here.items() if key[1] in frame.columns}
        found[frame.attrs["title"]] = compare_published(frame, own)
    return found

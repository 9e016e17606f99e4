"""PromptPAR's published training and its tests on the pedestrian attribute datasets; or a dry run on noise."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

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
from ...evaluation.metrics.attributes import THRESHOLD, Scores, evaluate
from ...evaluation.tables import compare_published, published_table, upsert_rows
from ...ops.papers import paper
from ...training import checkpoints
from ...training.callbacks import Callback, ClipNorm
from ...training.checkpoints import Checkpoint
from ...training.fit import Batch, Hardware, History, Loop, device, fit, predict
from ...training.schedules import Schedule, sgd
from .model import PromptPAR, loss, read_checkpoint

# differences from PromptPAR: arguments of the model, and the weight of the similarity in the loss
METHODS: dict[str, dict] = {
    "PromptPAR": {},
    "PromptPAR, not masked": {"masked": False},
    "regions, no similarity loss": {"similarity": 0.0},
    "deep prompts": {"regions": 0},
    "heads only": {"regions": 0, "prompts": 0},
    "full fine-tuning": {"regions": 0, "prompts": 0, "tuned": "all"},
}
# in these the loss does not reach a norm, a temperature or empty prompts, which are trainable tensors
UNUSED_PARAMETERS = ("regions, no similarity loss", "heads only", "full fine-tuning")
COLUMNS = {
    "par/peta": "PETA",
    "par/pa100k": "PA100K",
    "par/rapv1": "RAPv1",
    "par/rapv2": "RAPv2",
    "par/wider": "WIDER",
    "par-zs/peta": "PETA-ZS",
    "par-zs/rap": "RAP-ZS",
}
"""The datasets of the training, and their names in the tables."""

RESULTS = ("sota_peta_pa100k_rapv1", "rapv2_promptpar", "jgel_rerun_zs")  # tables with a column of measurements
CLIP, FUSION = "ViT-L-14-quickgelu/openai", "vit_base_patch16_224.orig_in21k_ft_in1k"
TEST_BATCH = 64
LAST = "train"  # the last images of an epoch, see `fit`
MOMENTUM = 0.9
SIMILARITY = 0.5  # weight of the similarity in the loss
TEXTS = {"par/rapv1": "phrases"}  # the texts that the authors' script passes to CLIP instead of the sentences
MAXIMA = ("mA", "Acc", "F1")  # metrics of which the authors' code prints the maximum over epochs
MAXIMUM = "maxima over epochs"
F1_KNOWN = (
    "VTB",
    "PromptPAR",
    "DRFormer",
    "DAFL",
    "OAGCN",
    "SSPNet",
    "PARformer",
    "LLM-PAR",
)  # rows of `f1_definitions`
WORKERS = min(8, os.cpu_count() or 1)


@dataclass(frozen=True)
class Setting:
    """The data and methods of a run, their training and prediction.

    Attributes:
        names: the attributes, as in the tables.
        parts: "train" and "test": items (image (3, H, W), labels (A,)).
        build: from a method's name to its model before training.
        train: builds a method and trains it: from its name to the model and the history, empty if nothing is trained.
        probabilities: from a model and a part to (n, A).
        epochs: filled in training if `select` is "maxima": the totals of the test images after each epoch.
    """

    title: str
    names: tuple[str, ...]
    parts: Mapping[str, Dataset]
    methods: tuple[str, ...]
    build: Callable[[str], PromptPAR]
    train: Callable[[str], tuple[PromptPAR, History]]
    probabilities: Callable[[PromptPAR, Dataset], Tensor]
    epochs: list[dict[str, float]] = field(default_factory=list)

    def scores(self, model: PromptPAR, part: str = "test", threshold: float = THRESHOLD) -> Scores:
        """A model's scores on a part."""
        data = self.parts[part]
        labels = data.tensors[1] if isinstance(data, TensorDataset) else data.labels
        return evaluate(labels.numpy(), self.probabilities(model, data).numpy(), threshold)

    def first(self, part: str, count: int) -> tuple[Tensor, Tensor]:
        """The first images of a part, (n, 3, H, W), and their labels, (n, A)."""
        data = self.parts[part]
        images, labels = zip(*(data[i] for i in range(min(count, len(data)))), strict=True)
        return torch.stack(images), torch.stack([torch.as_tensor(row) for row in labels])


def setting(p: SimpleNamespace, out: Path) -> Setting:
    """The setting of the `paper` profile: the published training on trainval, trained weights, or a dry run.

    A training resumes from its checkpoint in `out`/checkpoints; its weights are saved under the authors' names as
    `out`/trained/<method, dataset, seed>.safetensors, for the parameter `checkpoint`.

    Args:
        p: the checked parameters of the notebook.
        out: the run's folder.

    Raises `BadParameter`, `MissingData`, `MissingWeights`, `CorruptFile`: with the change or download needed.
    """
    if p.texts == "phrases" and p.dataset not in PHRASES:
        raise BadParameter("texts", p.texts, f"'released' or 'sentences'; phrases are known of {', '.join(PHRASES)}")
    if p.checkpoint and p.method != "PromptPAR":
        raise BadParameter("method", p.method, ["PromptPAR with a checkpoint: it holds PromptPAR's weights"])
    return _dry_run(p) if p.dry_run else _paper(p, out)


# --- the published recipe ---------------------------------------------------------------------------------------------


def recipe() -> pd.DataFrame:
    """The authors' settings of the parameter groups "heads" and "prompts" (the paper's YAML)."""
    return published_table("promptpar", "code-recipe").set_index("method")


def by_epoch(warmup: int) -> Schedule:
    """The authors' schedule: one learning rate for each epoch, with a linear warm-up of `warmup` epochs.

    From lr / 100 during the warm-up, then a cosine to lr / 500 that starts at the first epoch. Published: 100 epochs,
    heads 8e-3 with a warm-up of 5, prompts 4e-3 with 10.
    """

    def of(base: float, steps: int, per_epoch: int) -> np.ndarray:
        epochs = steps // per_epoch
        epoch, low, start = np.arange(1, epochs + 1), 0.002 * base, 0.01 * base
        cosine = np.where(epoch < epochs, low + (base - low) * (1 + np.cos(np.pi * epoch / epochs)) / 2, low)
        return np.repeat(np.where(epoch < warmup, start + epoch * (base - start) / warmup, cosine), per_epoch)

    return of


def decay_only(prompts: Tensor, learning_rates: np.ndarray, decay: float) -> None:
    """The effect of the authors' SGD on the text tower's prompts, in place: weight decay alone, since their gradient is
    0."""
    scale, speed = 1.0, 0.0
    for rate in learning_rates:
        speed = MOMENTUM * speed + decay * scale
        scale -= float(rate) * speed
    with torch.no_grad():
        prompts.mul_(scale)


class Epochs(Callback):
    """The totals of `score` after each epoch, in `rows`. The authors' code prints the maximum of each."""

    def __init__(self, score: Callable[[nn.Module], dict[str, float]], rows: list[dict[str, float]]):
        self.score, self.rows = score, rows

    def on_epoch_end(self, loop: Loop) -> None:
        """Score; one of several devices does."""
        loop.model.eval()
        if loop.fabric.global_rank == 0:
            with torch.no_grad():
                self.rows.append(self.score(loop.model))
        loop.fabric.barrier()
        loop.model.train()

    def state_dict(self) -> dict[str, Any]:
        """The rows."""
        return {"rows": list(self.rows)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the rows."""
        self.rows[:] = state["rows"]


def maxima(epochs: list[dict[str, float]]) -> dict[str, float]:
    """The maximum over epochs of each of `MAXIMA`, which may come from different epochs; nan of the other totals."""
    return {name: max(row[name] for row in epochs) if name in MAXIMA else np.nan for name in epochs[0]}


def half(p: SimpleNamespace) -> bool:
    """Whether CLIP is in float16, as released: with the authors' precision on a CUDA GPU; not for full fine-tuning,
    which the authors do not run."""
    on_gpu = p.profile == "paper" and p.precision == "paper" and device(p.accelerator) == "cuda"
    return on_gpu and METHODS[p.method].get("tuned") != "all"


def hardware(p: SimpleNamespace) -> Hardware:
    """The hardware of the parameters; full fine-tuning uses autocast where the other methods have CLIP in float16."""
    found = Hardware.of(p, "promptpar", workers=WORKERS)
    on_gpu = p.profile == "paper" and p.precision == "paper" and device(p.accelerator) == "cuda"
    return replace(found, precision="16-mixed") if on_gpu and not half(p) else found


def learn(
    p: SimpleNamespace,
    model: PromptPAR,
    data: Dataset,
    ratio: Tensor,
    *,
    epochs: int,
    batch: int,
    settings: pd.DataFrame | None = None,
    score: Epochs | None = None,
    checkpoint: Checkpoint | None = None,
) -> History:
    """Train a model of `p.method` in place by the authors' settings.

    Args:
        ratio: (A,) as in `loss`.
        settings: None: those of `recipe`.
        score: scores each epoch.

    Raises `BadParameter`: a batch too small for the micro-batches and devices, as each needs two images.
    """
    settings, weight = recipe() if settings is None else settings, METHODS[p.method].get("similarity", SIMILARITY)
    rates, decay = ({k: float(v) for k, v in settings.loc[n].items()} for n in ("learning rate", "weight decay"))

    def groups(model: PromptPAR) -> list[dict]:
        return [g | {"lr": rates[g["name"]], "weight_decay": decay[g["name"]]} for g in model.param_groups()]

    shares = functools.cache(ratio.to)  # copied to a GPU once, not at each step

    def value(model: nn.Module, batch: Batch) -> Tensor:
        images, labels = batch
        return loss(model(images), labels, shares(labels.device), weight, unclear=p.quirks)

    schedules = {name: by_epoch(int(settings[name]["warm-up epochs"])) for name in ("heads", "prompts")}
    on = hardware(p)
    # a batch norm cannot train on a single image; no data set of the paper has such a last batch
    parts, remainder = on.accumulate * on.devices, len(data) % batch
    if batch < 2 * parts:
        accepted = f"one that leaves two images of a batch of {batch} for each part (devices = {on.devices})"
        raise BadParameter("accumulate", on.accumulate, f"{accepted}: batch norms cannot train on one")
    last = "drop" if 0 < remainder < 2 * parts else LAST
    history = fit(
        model,
        value,
        data,
        epochs=epochs,
        batch=batch,
        optimizer=sgd(rates["heads"], decay["heads"], groups=groups),
        schedule=schedules,
        callbacks=[ClipNorm(float(settings["heads"]["gradient clipping"])), *([score] if score else [])],
        last=last,
        checkpoint=checkpoint,
        seed=p.seed,
        hardware=on,
        find_unused_parameters=p.method in UNUSED_PARAMETERS,
        name=p.method,
    )
    if model.text_prompts.numel() and history:
        found = schedules["prompts"](rates["prompts"], len(history), len(history) // epochs)
        decay_only(model.text_prompts, found, decay["prompts"])
    return history


def build(p: SimpleNamespace, sentences: tuple[str, ...], clip: nn.Module, fusion: nn.Module) -> PromptPAR:
    """The method `p.method` at full size."""
    torch.manual_seed(p.seed)
    if p.release == "2023" and clip.visual.output_dim != fusion.embed_dim:
        accepted = f"'2025' with {p.clip}, whose {clip.visual.output_dim} channels the fusion of {fusion.embed_dim} "
        raise BadParameter("release", p.release, accepted + "cannot take as they are")
    tokenizer = open_clip.get_tokenizer(p.clip.partition("/")[0])
    options = {"visual_embed": p.release == "2025", "official_quirks": p.quirks} | METHODS[p.method]
    options.pop("similarity", None)
    model = PromptPAR(clip, sentences, tokenizer, fusion, **options)
    return model.half_clip() if half(p) else model


def weights(p: SimpleNamespace) -> str | Path:
    """The weights of CLIP: the parameter, the usual file below `<data_root>/weights`, or the cache."""
    file = next(w["file"] for w in paper("promptpar")["weights"] if w["name"] == "clip")
    usual = Path(p.data_root) / "weights" / file
    return p.weights or (usual if p.clip == CLIP and usual.is_file() else "pretrained")


def _backbones(p: SimpleNamespace, clip: str | Path, fusion: str) -> tuple[nn.Module, nn.Module]:
    """The CLIP and the ViT of the fusion, each with the named weights."""
    return backbones.build(f"openclip:{p.clip}", clip), backbones.build(FUSION, fusion)


def _released(p: SimpleNamespace, sentences: tuple[str, ...]) -> PromptPAR:
    """A trained model from the file `checkpoint`: the authors', or the weights of a training here."""
    if not Path(p.checkpoint).is_file():
        files = "PETA_Checkpoint.pth, PA100k_Checkpoint.pth or RAP1.pth"
        ways = [
            f"give the path of {files}, which the README of github.com/Event-AHU/OpenPAR links (folder PromptPAR)",
            "or that of a training here, `trained/PromptPAR, ....safetensors` in its run's folder",
            "leave `checkpoint` empty to train",
        ]
        raise MissingWeights("PromptPAR's checkpoint", p.checkpoint, ways)
    ours = Path(p.checkpoint).suffix == ".safetensors"
    state = backbones.read_state(p.checkpoint) if ours else read_checkpoint(p.checkpoint)
    tokenizer = open_clip.get_tokenizer(p.clip.partition("/")[0])
    model = PromptPAR.from_official(state, sentences, tokenizer, official_quirks=p.quirks).eval()
    return model.half_clip() if half(p) else model


def read_by_clip(p: SimpleNamespace, sentences: tuple[str, ...]) -> tuple[str, ...]:
    """The texts of the attributes that CLIP encodes: the sentences, or the phrases of the authors' script."""
    kind = TEXTS.get(p.dataset, "sentences") if p.texts == "released" else p.texts
    return PHRASES[p.dataset] if kind == "phrases" else sentences


def _paper(p: SimpleNamespace, out: Path) -> Setting:
    own = p.dataset == "folder"
    splits = attributes.own_folder(p.data_root) if own else attributes.splits(p.dataset, p.data_root)
    data, test = splits["trainval"], splits["test"]
    sentences = read_by_clip(p, data.sentences)
    epochs: list[dict[str, float]] = []
    released = _released(p, sentences) if p.checkpoint else None
    clip, fusion = (released.clip, None) if released else _backbones(p, weights(p), "pretrained")
    size = clip.visual.image_size[0]
    data.transform, test.transform = (attributes.square_transform(size, train=flag) for flag in (True, False))
    ratio, truth = data.ratio, np.asarray(test.labels)
    if not p.quirks:
        ratio = torch.as_tensor(np.asarray(data.labels) == 1).float().mean(0)

    def made(method: str) -> PromptPAR:
        return released or build(p, sentences, clip, fusion)

    def train(method: str) -> tuple[PromptPAR, History]:
        if released:
            return released, []
        model, name = made(method), f"{label(p)}, {p.dataset}, seed {p.seed}"
        published = recipe()["heads"]
        facts: dict[str, Any] = {"model": model, "images": data.sources, "labels": data.labels, "method": method}
        facts |= {"select": p.select, "quirks": p.quirks}

        def score(model: nn.Module) -> dict[str, float]:
            return evaluate(truth, _probabilities(p, model, test).numpy()).totals

        scored = Epochs(score, epochs) if p.select == "maxima" else None
        history = learn(
            p,
            model,
            data,
            ratio,
            score=scored,
            epochs=int(published["epochs"]),
            batch=min(int(published["batch"]), len(data)),  # your own folder may have fewer images
            checkpoint=Checkpoint.of(out / "checkpoints", name, **facts),
        )
        checkpoints.save(out / "trained", name, model.to_official())
        return model, history

    return Setting(
        title=COLUMNS.get(p.dataset, data.name),
        names=data.names,
        parts={"train": data, "test": test},
        methods=(p.method,),
        build=made,
        train=train,
        probabilities=lambda model, part: _probabilities(p, model, part),
        epochs=epochs,
    )


def _dry_run(p: SimpleNamespace) -> Setting:
    """Full-size models with random weights, two optimiser steps on generated images of the real shape."""
    sentences = read_by_clip(p, SENTENCES.get(p.dataset, SENTENCES["par/peta"]))
    torch.manual_seed(p.seed)
    clip, fusion = _backbones(p, "random", "random")
    batch = int(recipe()["heads"]["batch"]) if p.accelerator != "cpu" and torch.cuda.is_available() else 2
    size, generator = clip.visual.image_size[0], torch.Generator().manual_seed(p.seed)

    def generated(count: int) -> TensorDataset:
        images = torch.randn(count, 3, size, size, generator=generator)
        return TensorDataset(images, (torch.rand(count, len(sentences), generator=generator) < 0.3).float())

    def made(method: str) -> PromptPAR:
        return build(p, sentences, clip, fusion)

    def train(method: str) -> tuple[PromptPAR, History]:
        model = made(method)
        return model, learn(p, model, parts["train"], torch.full((len(sentences),), 0.3), epochs=1, batch=batch)

    parts = {"train": generated(2 * batch), "test": generated(4)}
    return Setting(
        title="generated images (dry run: the scores mean nothing)",
        names=sentences,
        parts=parts,
        methods=(p.method,),
        build=made,
        train=train,
        probabilities=lambda model, part: _probabilities(p, model, part),
    )


def _probabilities(p: SimpleNamespace, model: PromptPAR, data: Dataset) -> Tensor:
    """The probability of each attribute in each image, (n, A)."""
    return predict(model, data, batch=TEST_BATCH, hardware=hardware(p)).sigmoid()


# --- tables of results ------------------------------------------------------------------------------------------------


def label(p: SimpleNamespace) -> str:
    """The method's name in the tables, with every difference from the published settings."""
    changed = [p.method]
    changed += [f"weights of {Path(p.checkpoint).name}"] if p.checkpoint else []
    changed += [f"code of {p.release}"] if p.release != "2023" and not p.checkpoint else []
    changed += [] if p.quirks else ["as meant"]
    usual = TEXTS.get(p.dataset, "sentences")
    changed += [p.texts] if p.texts not in ("released", usual) else []
    changed += [p.clip] if p.clip != CLIP else []
    changed += [MAXIMUM] if p.select == "maxima" else []
    return ", ".join(changed)


def measured(path: Path, new: Mapping[str, object] | None = None) -> pd.DataFrame:
    """The real results in `path`, one row per (method, dataset, seed) with the totals of `Scores`; `new` is added."""
    return upsert_rows(path, ["method", "dataset", "seed"], ["mA", "Acc", "Prec", "Rec", "F1"], [new] if new else ())


def row(p: SimpleNamespace, found: Scores, epochs: list[dict[str, float]] | None = None) -> dict[str, Any]:
    """Scores as a row for `measured`: those of the last epoch, or, if `epochs` has rows, their maxima."""
    totals = maxima(epochs) if epochs else found.totals
    return {"method": label(p), "dataset": p.dataset, "seed": p.seed} | totals


def cells(rows: pd.DataFrame) -> dict[tuple[str, str], float]:
    """Means over seeds by (method, column), in the format of `compare_published`: "PETA mA", "PETA Recall", ...

    F1 is the mean over images, which PromptPAR reports; no table has a column for "F1 of means".
    """
    found = {}
    for (method, dataset), group in rows.groupby(["method", "dataset"]):
        name = COLUMNS.get(dataset, DATASETS[dataset].title if dataset in DATASETS else dataset)
        for metric in ("mA", "Acc", "Prec", "Rec", "F1"):
            if (value := float(group[metric].mean())) == value:  # nan: not among the maxima
                found[method, f"{name} {'Recall' if metric == 'Rec' else metric}"] = value
    return found


def claim_cells(rows: pd.DataFrame) -> dict[tuple[str, str], float]:
    """As `cells`, for the claims: PromptPAR's maxima over epochs, which the authors print, before its last epoch."""
    found = cells(rows)
    ending = f", {MAXIMUM}"
    return found | {(m.removesuffix(ending), c): v for (m, c), v in found.items() if m.endswith(ending)}


def tables(rows: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Published and measured results, by title, in the layout of each published table."""
    here, found = cells(rows), {}
    for name in RESULTS:
        frame = published_table("promptpar", name)
        own = {key: value for key, value in here.items() if key[1] in frame.columns}
        found[frame.attrs["title"]] = compare_published(frame, own)
    return found


def f1_definitions() -> pd.DataFrame:
    """The printed F1 of published methods, and the F1 of means that follows from their printed Prec and Recall."""
    frame = published_table("promptpar", RESULTS[0])
    found = pd.DataFrame({"method": frame.method})
    for name in ("PETA", "PA100K", "RAPv1"):
        precision, recall, printed = (frame[f"{name} {metric}"] for metric in ("Prec", "Recall", "F1"))
        found[f"{name} F1"] = printed
        found[f"{name} F1 of means"] = 2 * precision * recall / (precision + recall)
        found[f"{name} difference"] = found[f"{name} F1 of means"] - printed
    return found[found.method.isin(F1_KNOWN)]


def protocol() -> dict[str, str]:
    """The settings of the profile, one per row, by the authors' code; few of the paper's own settings were found."""
    settings = recipe()

    def both(name: str) -> str:
        found = {kind: f"{settings[kind][name]:g}" for kind in ("heads", "prompts")}
        same = len(set(found.values())) == 1
        return found["heads"] if same else ", ".join(f"{kind} {value}" for kind, value in found.items())

    phrases = ", ".join(DATASETS[name].title for name, kind in TEXTS.items() if kind == "phrases")
    return {
        "data": "trained on trainval, tested on test; of several random partitions the first",
        "texts": f"one sentence an attribute; {phrases}: phrases (`texts`)",
        "optimiser": f"SGD, momentum {MOMENTUM:g}, not Nesterov; all trained tensors decay, text prompts do only that",
        "learning rate": both("learning rate"),
        "weight decay": both("weight decay"),
        "schedule": f"constant within an epoch: linear warm-up ({both('warm-up epochs')} epochs), cosine since epoch 0",
        "epochs": both("epochs"),
        "batch": f"{both('batch')}; the last partial batch: {LAST}",
        "loss": f"weighted cross-entropy of the heads + {SIMILARITY:g} of the similarity, summed over attributes",
        "gradient clipping": f"norm {both('gradient clipping')}, heads and prompts each",
        "precision": "CLIP in float16 without loss scaling on a GPU, the rest float32; or `precision` = '16-mixed'",
        "augmentation": "10 black pixels around, random crop of 224, flip; mean and std 0.5, not CLIP's",
        "resolution": "224; padded with black to squares, resized without antialiasing, as OpenCV does",
        "test": f"threshold {THRESHOLD:g}; mA, and Acc, Prec, Rec and F1 by image; RAP's unclear labels not in mA",
        "selection": "the last epoch; `select` = 'maxima', as the authors print: each maximum over epochs on TEST",
        "seeds": "the authors' code: 605, one run; here the parameter `seed`",
        "sweep": "none found",
    }

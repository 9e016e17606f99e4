"""PromptPAR's published training and its tests on the pedestrian attribute datasets."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import open_clip
import pandas as pd
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, default_collate

from ... import backbones
from ...data import attributes, few, find, present
from ...data.attributes import PHRASES, SENTENCES
from ...errors import BadParameter, MissingWeights
from ...evaluation.metrics.attributes import THRESHOLD, Scores, evaluate
from ...evaluation.tables import Results, published_table
from ...io import papers
from ...training.callbacks import Callback, ClipNorm, Loop
from ...training.fit import Batch, History, outputs_of
from ...training.hardware import WORKERS, Hardware, RunParameters, device
from ...training.recipe import Opened, Training, dry_items, opened, train
from ...training.schedules import Schedule, sgd
from .model import PromptPAR, Settings, loss, read_checkpoint
from .transforms import square_transform

# differences from PromptPAR: settings of the model, and the weight of the similarity in the loss
METHODS: dict[str, dict] = {
    "PromptPAR": {},
    "PromptPAR, not masked": {"masked": False},
    "regions, no similarity loss": {"similarity": 0.0},
    "deep prompts": {"regions": 0},
    "heads only": {"regions": 0, "prompts": 0},
}
RESULTS = Results.of("promptpar")
tables = RESULTS.tables  # published and measured, by title
CLIP, FUSION = "ViT-L-14-quickgelu/openai", "vit_base_patch16_224.orig_in21k_ft_in1k"
TEST_BATCH = 64
LAST = "train"  # the last images of an epoch, see `fit`
MOMENTUM = 0.9
SIMILARITY = 0.5  # weight of the similarity in the loss
MAXIMA = ("mA", "Acc", "F1")  # metrics of which the authors' code prints the maximum over epochs
TEXT_PROMPTS = "clip_model.transformer.prompt_text_deep"


class Parameters(RunParameters, Protocol):
    """The parameters of the notebook that the recipe reads."""

    method: str
    dataset: str
    clip: str
    release: str
    quirks: bool
    texts: str
    padding: str
    select: str
    checkpoint: str


class Tested(NamedTuple):
    """A model of the `paper` profile, the history of its training, the test images (labels `test`) and its scores."""

    title: str
    names: tuple[str, ...]
    model: PromptPAR
    history: History
    test: attributes.Pedestrians
    scores: Scores

    def examples(self, count: int) -> tuple[Tensor, Tensor]:
        """The first test images, (n, 3, H, W), and their labels, (n, A)."""
        images, labels = default_collate([self.test[i] for i in range(min(count, len(self.test)))])
        return images, labels


def prepare(p: Parameters, out: Path) -> tuple[str, attributes.Pedestrians, list[dict[str, float]], Opened]:
    """A title, the test images, the list that a training with `select` = "maxima" fills with the scores of its epochs,
    and the training with model and checkpoint: all that a run reads is opened, nothing is computed.

    Raises `BadParameter`, `MissingData`, `MissingWeights`, `CorruptFile`: with the change or download needed.
    """
    if p.checkpoint and p.method != "PromptPAR":
        raise BadParameter("method", p.method, ["PromptPAR with a checkpoint: it holds PromptPAR's weights"])
    heads = published()["heads"]
    epochs, batch = int(heads["epochs"]), int(heads["batch"])
    title, learn, test = pedestrians(p, batch)
    texts = read_by_clip(p, learn.sentences)
    released = load(p, texts) if p.checkpoint else None
    clip, fusion = (released.clip, None) if released else _backbones(p)
    ratio = learn.ratio if p.quirks else torch.as_tensor(learn.labels).eq(1).float().mean(0)
    for data, varied in ((learn, True), (test, False)):
        data.transform = square_transform(clip.visual.image_size[0], train=varied, padding=p.padding)
    totals: list[dict[str, float]] = []
    callbacks = [Epochs(lambda model: score(p, model, test).totals, totals)] if p.select == "maxima" else []
    chosen = training(
        p,
        lambda: released or build(p, texts, clip, fusion),
        learn,
        ratio,
        epochs=epochs,
        batch=min(batch, len(learn)),
        callbacks=callbacks,
    )
    return title, test, totals, opened(replace(chosen, data=None) if released else chosen, out)


def run(p: Parameters, out: Path) -> Tested:
    """Train on trainval as published, or load trained weights, and test; a row of `out`/measured.csv.

    A training resumes from its checkpoint in `out`/checkpoints; its weights are saved under the authors' names as
    `out`/trained/<method, dataset, seed>.safetensors, for the parameter `checkpoint`. A dry run trains for two steps on
    a few images of the dataset, or on generated ones where it is not below `data_root`. Raises as `prepare`.
    """
    title, test, totals, ready = prepare(p, out)
    model, history = train(ready)
    scores = score(p, model, test)
    RESULTS.measured(out / "measured.csv", row(p, scores, totals), dry_run=p.dry_run)
    return Tested(title, test.names, model, history, test, scores)


def score(p: Parameters, model: nn.Module, test: attributes.Pedestrians) -> Scores:
    """The scores of a model on the test images."""
    return evaluate(np.asarray(test.labels), probabilities(p, model, test).numpy())


def pedestrians(p: Parameters, batch: int) -> tuple[str, attributes.Pedestrians, attributes.Pedestrians]:
    """A title, the training and the test images; in a dry run a few of them, or generated ones.

    Raises `BadParameter`, `MissingData`, `CorruptFile`: with the change or download needed.
    """
    count = dry_items(p, batch)
    if p.dry_run and not present(p.dataset, p.data_root, "trainval", "test"):
        rng, dataset = np.random.default_rng(p.seed), find("par/peta" if p.dataset == "folder" else p.dataset)
        texts = SENTENCES[dataset.name]
        learn, test = (
            attributes.Pedestrians(
                dataset,
                Path(p.data_root),
                rng.integers(0, 256, (count, 160, 64, 3), dtype=np.uint8),
                (rng.random((count, len(texts))) < 0.3).astype(np.float32),
                names=texts,
                sentences=texts,
                transform=None,
            )
            for _ in range(2)
        )
        return f"generated images in place of {p.dataset} (dry run)", learn, test
    own = p.dataset == "folder"
    splits = attributes.own(p.data_root) if own else attributes.splits(p.dataset, p.data_root)
    chosen = {"train": splits["trainval"], "test": splits["test"]}
    chosen = few(chosen, count) if p.dry_run else chosen
    return RESULTS.names["dataset"].get(p.dataset, chosen["train"].name), chosen["train"], chosen["test"]


def probabilities(p: Parameters, model: nn.Module, data: Dataset) -> Tensor:
    """The probability of each attribute, (n, A), of images."""
    return outputs_of(model, data, batch=TEST_BATCH, hardware=hardware(p)).sigmoid()


def read_by_clip(p: Parameters, sentences: tuple[str, ...]) -> tuple[str, ...]:
    """The texts of the attributes that CLIP encodes: the sentences, or the phrases of the authors' script."""
    return PHRASES.get(p.dataset, sentences) if p.texts == "released" else sentences


# --- the model --------------------------------------------------------------------------------------------------------


def weights(p: Parameters) -> str | Path:
    """The weights of CLIP: the parameter, the usual file below `<data_root>/weights`, or the cache."""
    file = next(w["file"] for w in papers.paper("promptpar")["weights"] if w["name"] == "clip")
    usual = Path(p.data_root) / "weights" / file
    return p.weights or (usual if p.clip == CLIP and usual.is_file() else "pretrained")


def _backbones(p: Parameters) -> list[nn.Module]:
    """The CLIP and the ViT of the fusion; random ones in a dry run without their weights."""
    torch.manual_seed(p.seed)  # of random ones
    chosen = {f"openclip:{p.clip}": weights(p), FUSION: "pretrained"}
    either = backbones.or_random if p.dry_run else lambda name, source: source
    return [backbones.build(name, either(name, source)) for name, source in chosen.items()]


def build(p: Parameters, sentences: Sequence[str], clip: nn.Module, fusion: nn.Module) -> PromptPAR:
    """The method `p.method` at full size."""
    torch.manual_seed(p.seed)
    if p.release == "2023" and clip.visual.output_dim != fusion.embed_dim:
        accepted = f"'2025' with {p.clip}, whose {clip.visual.output_dim} channels the fusion of {fusion.embed_dim} "
        raise BadParameter("release", p.release, accepted + "cannot take as they are")
    options = {name: value for name, value in METHODS[p.method].items() if name != "similarity"}
    settings = Settings(visual_embed=p.release == "2025", official_quirks=p.quirks, **options)
    tokenizer = open_clip.get_tokenizer(p.clip.partition("/")[0])
    model = PromptPAR(clip, sentences, tokenizer, fusion, settings)
    return model.half_clip() if half(p) else model


def load(p: Parameters, sentences: Sequence[str]) -> PromptPAR:
    """A trained model from the file `checkpoint`: the authors', or the weights of a training here."""
    path = Path(p.checkpoint)
    if not path.is_file():
        files = "PETA_Checkpoint.pth, PA100k_Checkpoint.pth or RAP1.pth"
        ways = [
            f"give the path of {files}, which the README of github.com/Event-AHU/OpenPAR links (folder PromptPAR)",
            "or that of a training here, `trained/PromptPAR, ....safetensors` in its run's folder",
            "leave `checkpoint` empty to train",
        ]
        raise MissingWeights("PromptPAR's checkpoint", p.checkpoint, ways)
    state = backbones.read_state(path) if path.suffix == ".safetensors" else read_checkpoint(path)
    tokenizer = open_clip.get_tokenizer(p.clip.partition("/")[0])
    model = PromptPAR.from_official(state, sentences, tokenizer, official_quirks=p.quirks)
    return model.half_clip() if half(p) else model


def half(p: Parameters) -> bool:
    """Whether CLIP is in float16, as released: with the authors' precision on a CUDA GPU."""
    return p.profile == "paper" and p.precision == "paper" and device(p.accelerator) == "cuda"


def hardware(p: Parameters) -> Hardware:
    """The hardware of trainings and tests."""
    return Hardware.of(p, "promptpar", workers=WORKERS)


# --- the training -----------------------------------------------------------------------------------------------------


def published() -> pd.DataFrame:
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


def training(
    p: Parameters,
    build: Callable[[], PromptPAR],
    data: Dataset,
    ratio: Tensor,
    *,
    epochs: int,
    batch: int,
    settings: pd.DataFrame | None = None,
    callbacks: Sequence[Callback] = (),
) -> Training:
    """The training of `p.method` by the authors' settings.

    Args:
        ratio: (A,) as in `loss`.
        settings: None: `published`.
    """
    settings, weight = published() if settings is None else settings, METHODS[p.method].get("similarity", SIMILARITY)
    rates, decay = (settings.loc[name].astype(float) for name in ("learning rate", "weight decay"))
    schedules = {name: by_epoch(int(settings[name]["warm-up epochs"])) for name in ("heads", "prompts")}
    on_device = functools.cache(ratio.to)  # copied to a GPU once, not at each step

    def value(model: nn.Module, batch: Batch) -> Tensor:
        images, labels = batch
        return loss(model(images), labels, on_device(labels.device), weight, unclear=p.quirks)

    def groups(model: PromptPAR) -> list[dict]:
        return [
            group | {"lr": float(rates[group["name"]]), "weight_decay": float(decay[group["name"]])}
            for group in model.param_groups()
        ]

    machine = hardware(p)
    # a batch norm cannot train on a single image; no data set of the paper has such a last batch
    remainder, smallest = len(data) % batch, 2 * machine.accumulate * machine.devices
    last = "drop" if 0 < remainder < smallest else LAST
    per_epoch = len(data) // batch + (last == LAST and remainder > 0)

    def final(model: nn.Module) -> dict[str, Tensor]:
        state, rate = model.to_official(), float(rates["prompts"])
        each_step = schedules["prompts"](rate, epochs * per_epoch, per_epoch)
        return state | {n: decayed(t, each_step, decay["prompts"]) for n, t in state.items() if n == TEXT_PROMPTS}

    return Training(
        name=f"{label(p)}, {p.dataset}, seed {p.seed}",
        build=build,
        loss=value,
        data=data,
        fit={
            "name": p.method,
            "epochs": epochs,
            "batch": batch,
            "last": last,
            "optimizer": sgd(rates["heads"], decay["heads"], groups=groups),
            "schedule": schedules,
            "callbacks": [ClipNorm(float(settings["heads"]["gradient clipping"])), *callbacks],
            "seed": p.seed,
            "hardware": machine,
        },
        facts={
            "images": getattr(data, "sources", ()),
            "labels": getattr(data, "labels", ()),
            "method": p.method,
            "select": p.select,
            "quirks": p.quirks,
        },
        weights=final,
        dry_run=p.dry_run,
    )


def decayed(prompts: Tensor, learning_rates: np.ndarray, decay: float) -> Tensor:
    """The text tower's prompts as the authors' SGD leaves them: their gradient is 0, so that they only decay."""
    scale, speed = 1.0, 0.0
    for rate in learning_rates:
        speed = MOMENTUM * speed + decay * scale
        scale -= float(rate) * speed
    return prompts * scale


# --- the selection ----------------------------------------------------------------------------------------------------


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
        return {"rows": list(self.rows)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.rows[:] = state["rows"]


def maxima(epochs: list[dict[str, float]]) -> dict[str, float]:
    """The maximum over epochs of each of `MAXIMA`, which may come from different epochs; nan of the other totals."""
    return {name: max(row[name] for row in epochs) if name in MAXIMA else np.nan for name in epochs[0]}


# --- results ----------------------------------------------------------------------------------------------------------


def label(p: Parameters) -> str:
    """The method's name in the tables, with every difference from the published settings."""
    changes = {
        f"weights of {Path(p.checkpoint).name}": p.checkpoint,
        f"code of {p.release}": p.release != "2023" and not p.checkpoint,
        "as meant": not p.quirks,
        p.texts: p.texts != "released" and p.dataset in PHRASES,
        p.clip: p.clip != CLIP,
        f"{p.padding} padding": p.padding != "black",
        "maxima over epochs": p.select == "maxima" and not p.checkpoint,
    }
    return RESULTS.label(p.method, changes)


def row(p: Parameters, scores: Scores, epochs: list[dict[str, float]] | None = None) -> dict[str, Any]:
    """Scores as a row of `RESULTS`: those of the last epoch, or, if `epochs` has rows, their maxima."""
    totals = maxima(epochs) if epochs else scores.totals
    return {"method": label(p), "dataset": p.dataset, "seed": p.seed} | totals


def f1_definitions() -> pd.DataFrame:
    """The printed F1 of published methods, and the F1 of means that follows from their printed Prec and Recall."""
    published = published_table("promptpar", "sota_peta_pa100k_rapv1")
    methods = ("VTB", "PromptPAR", "DRFormer", "DAFL", "OAGCN", "SSPNet", "PARformer", "LLM-PAR")
    table = published[["method"]].copy()
    for name in ("PETA", "PA100K", "RAPv1"):
        precision, recall, printed = (published[f"{name} {metric}"] for metric in ("Prec", "Recall", "F1"))
        table[f"{name} F1"] = printed
        table[f"{name} F1 of means"] = 2 * precision * recall / (precision + recall)
        table[f"{name} difference"] = table[f"{name} F1 of means"] - printed
    return table[table.method.isin(methods)]


def protocol() -> dict[str, str]:
    """The settings of the profile, one per row, by the authors' code; few of the paper's own settings were found."""
    heads, prompts = (published()[part] for part in ("heads", "prompts"))
    return {
        "data": "trained on trainval, tested on test; of several random partitions the first",
        "texts": "one sentence an attribute; RAP v1: phrases (texts)",
        "optimiser": f"SGD, momentum {MOMENTUM:g}, not Nesterov; all trained tensors decay, text prompts do only that",
        "learning rate": f"heads {heads['learning rate']:g}, prompts {prompts['learning rate']:g}",
        "weight decay": f"{heads['weight decay']:g}",
        "schedule": (
            f"constant within an epoch: linear warm-up (heads {heads['warm-up epochs']:g}, prompts "
            f"{prompts['warm-up epochs']:g} epochs), cosine since epoch 0"
        ),
        "epochs": f"{heads['epochs']:g}",
        "batch": f"{heads['batch']:g}; the last partial batch: {LAST}",
        "loss": f"weighted cross-entropy of the heads + {SIMILARITY:g} of the similarity, summed over attributes",
        "gradient clipping": f"norm {heads['gradient clipping']:g}, heads and prompts each",
        "precision": "CLIP in float16 without loss scaling on a GPU, the rest float32; or precision = '16-mixed'",
        "augmentation": "10 black pixels around, random crop of 224, flip; mean and std 0.5, not CLIP's",
        "resolution": "224; padded to squares (inferred: black, padding), resized without antialiasing, as OpenCV does",
        "test": f"threshold {THRESHOLD:g}; mA, and Acc, Prec, Rec and F1 by image; RAP's unclear labels not in mA",
        "selection": "the last epoch; select = 'maxima', as the authors print: each maximum over epochs on TEST",
        "seeds": "the authors' code: 605, one run; here the parameter seed",
        "sweep": "none found",
    }

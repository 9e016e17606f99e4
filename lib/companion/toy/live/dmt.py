"""DMT: what the notebook trains, measures and shows live at the `pocket` profile; at `paper`, its recipe."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import Tensor

from ...errors import MissingWeights
from ...evaluation import ablations
from ...evaluation.claims import check_range
from ...models.dmt import recipe, vit
from ...models.dmt.model import DMT
from ...models.dmt.vit import ViT
from ...training.fit import History
from ...training.recipe import run
from ...viz import plots
from ...viz.attention import photograph_maps, token_pca
from .. import encoders
from ..ablations import dmt as study
from ..datasets import collage
from ..encoders import photo_student
from ..encoders import teachers as taught

METHODS = ("DMT", "iBOT only")  # three teachers, and the one whose student does best alone
STEPS = 250  # the losses are seen to fall; the ablation's students take twice as many
CHOICES = ("DMT", "averaged teachers", "gate", "LN targets", "token loss only", "map loss only", "same view")
OWN_PROBE = {"MAE": "quadrant", "MoCo v3": "texture", "iBOT": "hue"}  # the factor on which each teacher is the best
PAIR = "MoCo v3 + iBOT"


@dataclass(frozen=True)
class Setting:
    """The trainings of a run.

    Attributes:
        title: of the data.
        learning_rates: by method; none where the `paper` profile runs another task.
        train: from a method to its trained model and the history.
        trained: the student's file at the `paper` profile, the parameter `weights`.
    """

    title: str
    learning_rates: Mapping[str, float]
    train: Callable[[str], tuple[DMT, History]]
    trained: Path | None = None


def setting(p: SimpleNamespace, out: Path, learning_rates: Mapping[tuple[str, str], float]) -> Setting:
    """The setting of the notebook's parameters; without methods where the `paper` profile runs another task."""
    if p.profile != "pocket":
        if p.task != "distil":
            return Setting(p.task, {}, lambda method: recipe.distil(p, out))
        title, training = recipe.distillation(p, out)
        r = recipe.published("distil")
        lr = r["lr"] * training.fit["batch"] / r["batch"]
        trained = None if p.dry_run else recipe.student_file(training, out)
        return Setting(title, {"DMT": lr}, lambda method: recipe.distil(p, out), trained)
    root = str(out / "data")
    study.write(root, p.seed)
    chosen = {method: learning_rates[study.TASK, method] for method in METHODS}

    def train(method: str) -> tuple[DMT, History]:
        model, loss, data = study.assemble(method, p.seed, root)
        return model, study.fit_student(model, loss, data, method, chosen[method], p.seed, STEPS)

    return Setting("synthetic collages", chosen, train)


def data(p: SimpleNamespace, out: Path) -> dict[str, collage.Part]:
    """The splits "train" and "test" of the collages."""
    root = str(out / "data")
    study.write(root, p.seed)
    return {split: study.part(root, p.seed, split) for split in ("train", "test")}


def examples(part: collage.Part) -> tuple[list[int], list[str]]:
    """The indices of one image for each texture, and what each shows."""
    shown = [int(torch.nonzero(part.factors[:, 0] == kind)[1]) for kind in range(len(collage.TEXTURES))]
    factors = part.factors[shown].tolist()
    return shown, [f"{collage.TEXTURES[t]}, {collage.SHAPES[s]}, {collage.QUADRANTS[q]}" for t, s, _, q in factors]


def smoothed(histories: Mapping[str, History]) -> dict[str, dict[str, pd.Series]]:
    """The losses of each training as means of ten steps, as `plots.curves` draws them."""
    names = {"loss": "total", "token loss": "token loss", "map loss": "map loss"}
    means = {method: pd.DataFrame(history).rolling(10, min_periods=1).mean() for method, history in histories.items()}
    return {method: {label: mean[name] for name, label in names.items()} for method, mean in means.items()}


# --- probes -----------------------------------------------------------------------------------------------------------


def teachers_known(parts: Mapping[str, collage.Part]) -> dict[str, dict[str, float]]:
    """Probes of the three teachers and of an untrained ViT, each checked against what it was trained to encode."""
    models = {**taught.load(), "untrained": taught.untrained()}
    known = {name: taught.measure(model, parts["train"], parts["test"]) for name, model in models.items()}
    for name, factor in OWN_PROBE.items():
        others = max(known[other][factor] for other in known if other != name)
        check_range(f"{name} on {factor}, lead over the best of the others (points)", known[name][factor] - others, 0)
    check_range("MoCo v3 on hue, which it cannot see (%)", known["MoCo v3"]["hue"], 8, 18)
    check_range("MoCo v3 on the quadrant (%)", known["MoCo v3"]["quadrant"], 20, 30)
    return known


def students_of(p: SimpleNamespace, students: Mapping[str, DMT]) -> dict[str, ViT]:
    """The distilled students alone and an untrained one; empty where the `paper` profile ran."""
    if p.profile != "pocket":
        print("Only at the pocket profile: its students are compared here.")
        return {}
    return {name: model.export() for name, model in students.items()} | {"untrained": study.student(p.seed).eval()}


def results(
    students: Mapping[str, ViT],
    histories: Mapping[str, History],
    parts: Mapping[str, collage.Part],
    known: Mapping[str, Mapping[str, float]],
) -> pd.DataFrame:
    """The probes of students and teachers in percent, checked against what each is expected to encode."""
    found = {name: taught.measure(model, parts["train"], parts["test"]) for name, model in students.items()}
    for name, curve in smoothed(histories).items():
        check_range(f"{name}, loss at the end / start", curve["total"].iloc[-1] / curve["total"].iloc[9], high=0.9)
    check_range(
        "DMT, mean of the probes less that of the untrained student",
        found["DMT"]["mean"] - found["untrained"]["mean"],
        1,
    )
    check_range(
        "iBOT only on texture, less DMT (points)", found["iBOT only"]["texture"] - found["DMT"]["texture"], high=-5
    )
    named = {f"student, {name}": row for name, row in found.items()}
    named |= {f"teacher, {name}": dict(row) for name, row in known.items()}
    return pd.DataFrame(named).T.rename_axis("encoder").reset_index()


# --- the paper profile ------------------------------------------------------------------------------------------------


def downstream_tasks(p: SimpleNamespace, out: Path) -> pd.DataFrame:
    """Train and test the downstream task of the `paper` profile, all four in a dry run; scores go to `measured.csv`.

    Empty at the `pocket` profile and for distillation.
    """
    kinds = [task for task in recipe.USUAL if task != "distil"]
    tasks = (
        kinds if p.profile == "paper" and p.dry_run else [p.task] if p.profile == "paper" and p.task in kinds else []
    )
    found = []
    for task in tasks:
        work = recipe.downstream(SimpleNamespace(**(vars(p) | {"task": task})))
        model, history = run(work.training, None if p.dry_run else out)
        found += [(work.title, len(history), metric, score) for metric, score in work.score(model).items()]
    if found and not p.dry_run:
        settings = {key: getattr(p, key) for key in ("task", "encoder", "seed", *recipe.DISTILLED)}
        recipe.RESULTS.measured(out / "measured.csv", *(settings | {"metric": m, "score": s} for *_, m, s in found))
    return pd.DataFrame(found, columns=["task", "steps", "metric", "test"])


# --- ablations --------------------------------------------------------------------------------------------------------


def study_table(rows: pd.DataFrame) -> pd.DataFrame:
    """Probes of all methods on test images, mean ± std over seeds, with the lead of DMT in the mean of the four."""
    table = ablations.spreads(rows, ("mean", *collage.FACTORS, "mean all"), "DMT").drop(columns="task")
    return table.set_index("method").loc[[m for m in study.METHODS if m in set(table.method)]].reset_index()


def bars(rows: pd.DataFrame, methods: Sequence[str], metrics: Sequence[str] = ("mean", "mean all")) -> Figure:
    """The probes of methods on test images, mean ± std over seeds."""
    known = set(rows.method)
    tables = ablations.bar_tables(rows, {m: (study.TASK, m) for m in metrics}, [m for m in methods if m in known])
    return plots.bars(*tables, value="accuracy of linear probes, synthetic data (%)")


def of_teachers(number: int) -> list[str]:
    """The methods that distil from so many teachers."""
    return [
        name
        for name, (names, kind, changes) in study.STUDENTS.items()
        if len(names) == number and kind is DMT and not changes
    ]


def knows(rows: pd.DataFrame, method: str, all_labels: bool) -> pd.DataFrame:
    """What `figures.probed` draws: by factor, a method's accuracy with its std, that of an untrained student and of the
    best teacher."""
    found = {}
    for factor in collage.FACTORS:
        part = ablations.summary(rows, f"{factor} all" if all_labels else factor).set_index("method")
        best = part["mean"][list(study.THEMSELVES)].max()
        found[factor] = part.loc[method, ["mean", "std"]].to_dict()
        found[factor] |= {"untrained": part["mean"]["untrained"], "best teacher": best}
    return pd.DataFrame(found).T


def reasons(rows: pd.DataFrame) -> dict[str, str]:
    """Why claims fail, by claim, with the leads from the rows of the ablations."""
    tested = rows[rows.stage == "test"].set_index(["method", "seed"]).sort_index()

    def span(measure: str, worse: str) -> str:
        lead = tested.loc["DMT", measure] - tested.loc[worse, measure]
        return f"{lead.min():+.1f} to {lead.max():+.1f} points"

    def mean(measure: str, method: str) -> str:
        return f"{tested.loc[method, measure].mean():.1f}"

    parts = ", ".join(f"{name} {span(name, PAIR)}" for name in ("hue", "shape", "texture"))
    return {
        "beats-moco-ibot": "the third teacher, MAE, leads on the quadrant alone, and this student keeps little of it: "
        f"with 10 labels {mean('quadrant', 'DMT')} % with MAE, {mean('quadrant', PAIR)} % without (chance level 25); "
        f"with all labels {mean('quadrant all', 'DMT')} and {mean('quadrant all', PAIR)} %. MAE's targets are a third "
        f"of the loss; the other factors change by: {parts}. With all labels three teachers lead by "
        f"{span('mean all', PAIR)}",
        "both-token": f"with all labels the lead is {span('mean all', 'token loss only')}: the map loss adds little to "
        "a probe of [CLS] token and mean patch token, which the token loss trains already",
    }


# --- photographs ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Photographs:
    """The held-out photographs and the patch tokens (4, s·s, D) of teachers and students on them.

    Attributes:
        images: (4, 3, 256, 256) in 0 to 1.
        tokens: by encoder, the teachers first, then "student" and "untrained".
        attention: the [CLS] token's in the last block, mean of the heads, of the encoders that have one: (4, s, s).
        quality: of the student's model card; empty for the student of this run.
    """

    images: Tensor
    tokens: dict[str, Tensor]
    attention: dict[str, Tensor]
    quality: Mapping[str, Any]

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of the patch tokens."""
        side = math.isqrt(self.tokens["student"].shape[1])
        return side, side

    def components(self) -> Figure:
        """The first three principal components of each encoder's tokens, as colours."""
        colours = {name: token_pca(found, self.grid) for name, found in self.tokens.items()}
        return plots.attention_grid(self.images, colours, photo_student.HELD_OUT)

    @functools.cached_property
    def agreement(self) -> dict[tuple[str, str], Tensor]:
        """Student, teacher -> `photo_student.agreement` (4, s, s)."""
        *teachers, trained, untrained = self.tokens
        pairs = [(student, teacher) for teacher in teachers for student in (trained, untrained)]
        found = {(a, b): photo_student.agreement(self.tokens[a], self.tokens[b]) for a, b in pairs}
        return {pair: values.unflatten(1, self.grid) for pair, values in found.items()}

    def looks(self) -> Figure:
        """The attention of the [CLS] token, for each encoder that has one."""
        return plots.attention_grid(self.images, self.attention, photo_student.HELD_OUT)

    def by_position(self) -> Figure:
        """The agreement of the trained student with each teacher, by position."""
        maps = {f"with {b}": values for (a, b), values in self.agreement.items() if a == "student"}
        return plots.attention_grid(self.images, maps, photo_student.HELD_OUT, shared=True, label="correlation")

    def table(self) -> pd.DataFrame:
        """The mean agreement over the photographs with its std, and the R2 of the model card."""
        rows = []
        for (student, teacher), values in self.agreement.items():
            each = values.mean((1, 2))
            row = {"teacher": teacher, "student": student, "agreement": f"{each.mean():.2f} ± {each.std():.2f}"}
            if self.quality:
                shares = self.quality["held-out photographs"]
                row["R² of a linear map"] = f"{shares[student][teacher]['R2']:.2f}"
            rows.append(row)
        return pd.DataFrame(rows)


def on_photographs(p: SimpleNamespace, students: Mapping[str, DMT]) -> Photographs | None:
    """Teachers, the student distilled from them and an untrained one on the held-out photographs.

    At the `paper` profile those of this run, else the two real teachers and the shipped student. None, with a note,
    where this run distilled no student, or the teachers' weights are not available.
    """
    if p.profile == "paper":
        return _of_this_run(p, students)
    try:
        teachers = photo_student.teachers()
    except MissingWeights as missing:
        print(f"This section is left out: {missing}")
        return None
    for name, encoder in teachers.items():
        print(f"{name}: {encoder.pretrained_cfg.get('description', 'the release in the Hugging Face cache')}")
    images, quality = photo_student.held_out(), encoders.read_card(photo_student.NAME)["quality"]
    print("training loss of the student:", quality["losses"])
    found = {name: photo_student.tokens(name, encoder, images) for name, encoder in teachers.items()}
    name, first = next(iter(teachers.items()))
    attention = {name: photograph_maps(first, photo_student.seen_by_teacher(name, first, images))["[CLS] attention"]}
    with torch.inference_mode():
        for name, model in {"student": photo_student.load(), "untrained": photo_student.student()}.items():
            seen = photo_student.seen_by_student(images)
            found[name] = model(seen)
            attention[name] = model.attention(seen).mean(1).unflatten(1, photo_student.GRID)
    return Photographs(images, {name: tokens[:, 1:].clone() for name, tokens in found.items()}, attention, quality)


@torch.no_grad()
def _of_this_run(p: SimpleNamespace, students: Mapping[str, DMT]) -> Photographs | None:
    if "DMT" not in students:
        print("This section is left out: this run distilled no student.")
        return None
    print(f"The teachers ({p.teachers}) and the student (ViT-{p.student}) of this run.")
    torch.manual_seed(p.seed)
    shown = {"student": students["DMT"].export(), "untrained": vit.build(p.student)}
    taught_by = students["DMT"].teachers or recipe.teachers(p)  # none where their tokens were cached
    teachers = dict(taught_by.models.items())
    images = photo_student.held_out()
    seen = photo_student.seen_by_student(images, 224)
    tokens = {name: model.hidden(seen)[0] for name, model in teachers.items()}
    tokens |= {name: model.eval()(seen) for name, model in shown.items()}
    attention = {name: model.attention(seen).mean(1) for name, model in (teachers | shown).items()}
    found = Photographs(images, {name: x[:, 1:] for name, x in tokens.items()}, attention, {})
    return dataclasses.replace(found, attention={name: x.unflatten(1, found.grid) for name, x in attention.items()})

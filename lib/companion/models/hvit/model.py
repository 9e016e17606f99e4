"""H-ViT: hierarchical Vision Transformers on whole slides (Grisi, Litjens, van der Laak; 2023, arXiv 2312.12619).

A slide has gigapixels and one label. Three Transformers are stacked: tokens of 16 px make a patch of 256 px, n x n
patches make a region of 1024, 2048 or 4096 px, the regions make the slide.

    pixels  (m, 3, R, R)   --patch encoder-->    patch embeddings   (m, n n, 384)
                           --region encoder-->   region embeddings  (m, 192)
                           --slide Transformer, gated attention pooling-->  one grade

The lower levels are pre-trained without labels (`pretrain`). **Global** H-ViT freezes both and trains the slide level;
**Local** H-ViT trains the region level with it. Every level can start the forward pass: pixels, stored patch embeddings
or stored region embeddings.

Written from the facts of computationalpathologygroup/hvit at 444bb72; its tensors, and HIPT's, load by `from_official`.
Numbers in brackets are those of the equations in the notebook.

Shapes: b slides, m regions a slide, p = n n patches a region, t tokens a patch, d the width of a level, h heads of e
channels, k grades.
"""

from __future__ import annotations

import copy
import math
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from ...errors import BadParameter, Count, Range, Share, check_choice, check_parts, check_range, typed
from ...errors import check_names as check_class_names
from ...evaluation.metrics import checked
from ...io.config import configure, reconfigure
from ..layers.state_dicts import OfficialModel, below, check_names, depth
from . import official
from .encoders import Named, PatchEncoder, RegionEncoder, grids, patches_of

VARIANTS = ("global", "local", "whole")
HEADS = ("classification", "regression", "ordinal", "coral", "corn")
POSITIONS = ("none", "sine", "learned")

# sizes of the three levels: the paper's, and those that a CPU trains in seconds
SIZES: dict[str, dict[str, Any]] = {
    "paper": {
        "patch": {"image": 256, "token": 16, "dim": 384, "depth": 12, "heads": 6},
        "region": {"dim": 192, "depth": 6, "heads": 6},
        "slide": {"heads": 3, "dropout": 0.25},
    },
    "pocket": {
        "patch": {"image": 32, "token": 4, "dim": 48, "depth": 3, "heads": 3, "mlp_ratio": 2, "std": None},
        "region": {"dim": 48, "depth": 2, "heads": 3, "mlp_ratio": 2, "std": None},
        "slide": {"heads": 3, "dropout": 0.1},
    },
}


# --- the slide level (4) - (6) ----------------------------------------------------------------------------------------


class GatedPool(nn.Module):
    """Gated attention pooling (5): alpha = softmax(w . (tanh(V h) * sigmoid(U h)) + c), z = sum alpha h.

    The released code's `dropout` is 0.25 whatever else is set, or none at all.
    """

    def __init__(self, dim: int, dropout: float = 0.25):
        super().__init__()
        self.content, self.gate = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.score = nn.Linear(dim, 1)
        self.dropout = nn.Dropout(dropout)

    def forward(self, h: Tensor, present: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """From h (b, m, d), and which of the m are not padding (b, m) bool, to z (b, d) and alpha (b, m)."""
        gated = self.dropout(self.content(h).tanh()) * self.dropout(self.gate(h).sigmoid())  # (b, m, d)
        score = self.score(gated)[..., 0]  # (b, m)
        if present is not None:
            score = score.masked_fill(~present, -math.inf)
        alpha = score.softmax(-1)
        return (alpha[:, None] @ h)[:, 0], alpha


class SlidePosition(nn.Module):
    """A position embedding added to each region's embedding; off in the released configurations.

    Args:
        kind: "sine" or "learned"; regions are numbered in the order of their file names.
        longest: entries of the table.
    """

    def __init__(self, kind: str, dim: int, longest: int = 512, dropout: float = 0.25):
        super().__init__()
        self.learned, self.dropout = kind == "learned", nn.Dropout(dropout if kind == "sine" else 0.0)
        if self.learned:
            self.embedder = nn.Embedding(longest, dim)
        else:
            angle = torch.arange(longest)[:, None] * torch.exp(torch.arange(0, dim, 2) * (-math.log(10_000.0) / dim))
            table = rearrange([angle.sin(), angle.cos()], "two n d -> n (d two)")[:, :dim]
            self.register_buffer("table", table, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """From and to (b, m, d). Raises `BadParameter`: more regions than positions."""
        table = self.embedder.weight if self.learned else self.table  # (longest, d)
        if x.shape[1] > len(table):
            raise BadParameter("regions", x.shape[1], f"at most {len(table)} positions (`longest`)")
        return self.dropout(x + table[: x.shape[1]])


class SlideTransformer(nn.Module):
    """The slide level: two post-norm Transformer layers over the regions, gated attention pooling, one output.

    Args:
        inputs: width of the region embeddings.
        dim: width; `inputs` by default.
        classes: grades k.
        head: what the outputs mean, one of `HEADS`; see `loss` and `graded`.
        position, longest: see `SlidePosition`.
    """

    def __init__(
        self,
        inputs: Count = 192,
        classes: Annotated[int, Range(2)] = 6,
        head: str = "classification",
        *,
        dim: Count | None = None,
        depth: Count = 2,
        heads: Count = 3,
        dropout: Share = 0.25,
        position: str = "none",
        longest: Count = 512,
    ):
        configure(self, locals())
        super().__init__()
        check_choice("head", head, HEADS)
        check_choice("position", position, POSITIONS)
        dim = dim or inputs
        check_parts("heads", dim, heads)
        self.inputs, self.head = inputs, head
        self.phi = nn.Sequential(nn.Linear(inputs, dim), nn.ReLU(), nn.Dropout(dropout))
        self.position = nn.Identity() if position == "none" else SlidePosition(position, dim, longest, dropout)
        layer = nn.TransformerEncoderLayer(dim, heads, dim, dropout, activation="relu", batch_first=True)
        self.transformer = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
        self.pool = GatedPool(dim, 0.25 if dropout else 0.0)
        self.rho = nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), nn.Dropout(dropout))
        self.reset_classifier(classes)

    def reset_classifier(self, num_classes: Annotated[int, Range(2)]) -> None:
        """Exchange the last layer for an untrained one of other grades."""
        old = next(self.rho.parameters())
        self.num_classes = num_classes
        outputs = {"classification": num_classes, "regression": 1, "coral": 1}.get(self.head, num_classes - 1)
        self.classifier = nn.Linear(old.shape[0], outputs, bias=self.head != "coral").to(old)
        if self.head == "coral":
            self.thresholds = nn.Parameter(old.new_zeros(num_classes - 1))
        reconfigure(self, classes=num_classes)

    def forward(self, x: Tensor, present: Tensor | None = None) -> Tensor:
        """Outputs (b, k), (b, 1) or (b, k - 1), by the head.

        Args:
            x: (b, m, d) region embeddings.
            present: (b, m) bool, False where slides of fewer regions were padded; the padding changes nothing.
        """
        return self.forward_intermediates(x, present)[0]

    def forward_intermediates(self, x: Tensor, present: Tensor | None = None) -> tuple[Tensor, Named]:
        """As `forward`, and the named results "phi", "positioned" and "transformer" (b, m, d), "pooling" (b, m), the
        weights alpha, and "slide" (b, d)."""
        if x.ndim != 3 or not x.shape[1] or x.shape[2] != self.inputs:
            raise BadParameter("regions", tuple(x.shape), f"(slides, 1 or more regions, {self.inputs})")
        # looked at where no GPU has to be waited for in a training step
        if present is not None and (present.is_cpu or not self.training) and not present.any(1).all():
            raise BadParameter("present", "a slide without a region", "at least one region a slide")
        phi = self.phi(x)  # (b, m, d)
        positioned = self.position(phi)
        h = self.transformer(positioned, src_key_padding_mask=None if present is None else ~present)  # (4)
        z, alpha = self.pool(h, present)  # (5): (b, d), (b, m)
        z = self.rho(z)
        logits = self.classifier(z)  # (6)
        if self.head == "coral":
            logits = logits + self.thresholds  # (b, 1) to (b, k - 1)
        return logits, {"phi": phi, "positioned": positioned, "transformer": h, "pooling": alpha, "slide": z}


# --- the whole --------------------------------------------------------------------------------------------------------


class HViT(OfficialModel):
    """The hierarchy of three levels. Its input is that of its lowest level or of an upper one (see `forward`).

    The levels are copied: what the caller hands over is neither frozen nor moved.

    Args:
        slide: the slide level.
        region, patch: the levels below; None where their embeddings are on disk.
        variant: what is trained: "global" the slide level, "local" the region level too, "whole" everything.
    """

    rules = official.NAMES

    def __init__(
        self,
        slide: SlideTransformer,
        region: RegionEncoder | None = None,
        patch: PatchEncoder | None = None,
        variant: str = "global",
    ):
        configure(self, locals())
        super().__init__()
        check_choice("variant", variant, VARIANTS)
        if (variant != "global" and region is None) or (variant == "whole" and patch is None):
            raise BadParameter("variant", variant, "one whose trained levels are given")
        self.patch, self.region, self.slide = copy.deepcopy(patch), copy.deepcopy(region), copy.deepcopy(slide)
        below = {"global": ("patch", "region"), "local": ("patch",), "whole": ()}[variant]
        self.variant, self.frozen = variant, [name for name in below if getattr(self, name) is not None]
        for name in self.frozen:
            self.level(name).requires_grad_(False)
        self.train(False)

    @property
    def num_classes(self) -> int:
        return self.slide.num_classes

    def reset_classifier(self, num_classes: Annotated[int, Range(2)]) -> None:
        """Exchange the last layer of the slide level for an untrained one of other grades."""
        self.slide.reset_classifier(num_classes)
        reconfigure(self, slide=self.slide)

    def train(self, mode: bool = True) -> HViT:
        """As usual, but frozen levels stay in eval mode: features on disk were made without stochastic depth."""
        super().train(mode)
        for name in self.frozen:
            self.level(name).eval()
        return self

    def forward(self, x: Tensor, *, tissue: Tensor | None = None, present: Tensor | None = None) -> Tensor:
        """Outputs of the slide level (b, ...).

        Args:
            x: (b, m, 3, R, R) pixels, (b, m, p, d) patch embeddings row by row, or (b, m, d) region embeddings.
            tissue: (b, m, p, t) share of tissue in each token, where the background is masked.
            present: see `SlideTransformer.forward`.
        """
        if x.ndim > 3:
            # what is padding is not embedded; as numbers, since each use of a mask would wait for the GPU
            there = slice(None) if present is None else present.flatten().nonzero()[:, 0]
            lower = x.flatten(0, 1)[there]  # (n, ...), n the regions of all slides
            keep = None if tissue is None else (tissue > 0).flatten(0, 1)[there]  # (n, p, t)
            if x.ndim == 5:
                lower = self.embed_patches(lower, keep)  # (n, p, d)
            regions = self.embed_regions(lower, None if keep is None else keep.any(-1))  # (n, d)
            x = regions.new_zeros(*x.shape[:2], regions.shape[-1])  # (b, m, d)
            x.flatten(0, 1)[there] = regions
        return self.slide(x, present)

    def predict(self, slides: Sequence[Any], names: Sequence[str]) -> list[Any]:
        """The grade of each slide, by name where names are known: of a file of features, or a tensor of `forward`."""
        check_class_names(names, self.num_classes)
        from ...data.slides import read_features  # imported here: h5py

        device, found = next(self.parameters()).device, list[Any]()
        for slide in slides:
            x = slide if isinstance(slide, Tensor) else read_features(slide)["features"]
            grade = int(graded(self.slide.head, self(x[None].to(device)).float().cpu(), self.num_classes))
            found.append(names[grade] if names else grade)
        return found

    def embed_patches(self, regions: Tensor, keep: Tensor | None = None, batch: int = 128) -> Tensor:
        """Patch embeddings (m, p, d) of regions (m, 3, R, R), `batch` patches at a time.

        Args:
            keep: (m, p, t) bool, the tokens with tissue.
        """
        patch = self.level("patch")
        patches = patches_of(regions, patch.image).split(batch)  # (batch, 3, s, s)
        kept = [None] * len(patches) if keep is None else keep.flatten(0, 1).split(batch)
        e = torch.cat([patch(*pair) for pair in zip(patches, kept, strict=True)])  # (m p, d)
        return rearrange(e, "(m p) d -> m p d", m=len(regions))

    def embed_regions(self, patches: Tensor, keep: Tensor | None = None) -> Tensor:
        """Region embeddings (m, d) of patch embeddings (m, p, d); `keep` (m, p) are the patches with tissue."""
        return self.level("region")(grids(patches), keep)

    def level(self, name: str) -> Any:
        """The patch or region level. Raises `BadParameter`: the model has none."""
        if getattr(self, name) is None:
            raise BadParameter("slides", f"input of the {name} level", f"embeddings: this model has no {name} level")
        return getattr(self, name)

    @classmethod
    def from_official(
        cls,
        state: Mapping[str, Tensor],
        head: str | None = None,
        *,
        position: str | None = None,
        variant: str | None = None,
    ) -> HViT:
        """H-ViT from the authors' tensors, with the levels and the sizes that they have.

        Args:
            head: what the outputs mean. Inferred for one output (a regression) and for free biases (CORAL); needed for
                several outputs.
            position: of `POSITIONS`; by default "learned" where the tensors hold that table, else "none". The sine
                table is computed, and need not be in a checkpoint.
            variant: by default "local" where there is a region level, else "global".

        Raises:
            BadParameter: several outputs and no `head`.
            BadCheckpoint: names that are missing, unknown, or of another shape.
        """
        needed = ["global_phi.0.weight", "global_transformer.layers.0.linear1.weight", "classifier.weight"]
        check_names(state, needed, "H-ViT")
        count = len(state["b"] if "b" in state else state["classifier.weight"])
        kind = "coral" if "b" in state else "regression" if count == 1 else head
        if kind is None or head not in (None, kind):
            accepted = repr(kind) if kind else "what the outputs mean: " + ", ".join(HEADS)
            raise BadParameter("head", head, accepted)
        learned, (dim, inputs) = state.get("pos_encoder.embedder.weight"), state["global_phi.0.weight"].shape
        slide = SlideTransformer(
            inputs,
            {"regression": 6, "classification": count}.get(kind, count + 1),
            kind,
            dim=dim,
            depth=depth(state, "global_transformer.layers."),
            position=position or ("none" if learned is None else "learned"),
            longest=512 if learned is None else len(learned),
        )
        patch, region = (below(state, f"vit_{level}.") for level in ("patch", "region"))
        model = cls(
            slide,
            RegionEncoder.from_official(region) if region else None,
            PatchEncoder.from_official(patch) if patch else None,
            variant or ("local" if region else "global"),
        )
        return model.loaded(state, "H-ViT", ignored=("pos_encoder.pe",))


@typed
def build(
    size: str = "paper",
    variant: str = "local",
    head: str = "regression",
    *,
    patches: int = 8,
    classes: int = 6,
    levels: Sequence[str] = ("patch", "region", "slide"),
    **slide: Any,
) -> HViT:
    """An H-ViT of random weights (torch's current seed), at one of `SIZES`.

    Args:
        patches: a side of the region: 4, 8 or 16 for 1024, 2048 or 4096 px; 4 at pocket size.
        levels: those that are built; the embeddings of the others are the model's input.
        slide: further options of `SlideTransformer`.
    """
    check_choice("size", size, SIZES)
    for level in levels:
        check_choice("levels", level, ("patch", "region", "slide"))
    sizes = SIZES[size]
    patch = PatchEncoder(**sizes["patch"]) if "patch" in levels else None
    region = RegionEncoder(patches, sizes["patch"]["dim"], **sizes["region"]) if "region" in levels else None
    top = SlideTransformer(sizes["region"]["dim"], classes, head, **sizes["slide"] | slide)
    return HViT(top, region, patch, variant)


# --- losses, predictions, votes ---------------------------------------------------------------------------------------


def extended(grades: Tensor, classes: int) -> Tensor:
    """Grades y (b,) as k - 1 binary targets "the grade is above j" (b, k - 1): the first y entries are 1."""
    return (torch.arange(classes - 1, device=grades.device) < grades[:, None]).float()


def loss(head: str, outputs: Tensor, grades: Tensor, classes: int = 6, *, per_slide: bool = False) -> Tensor:
    """The loss of a head's outputs (b, ...) against grades (b,) in 0 .. k - 1.

    Args:
        per_slide: CORN's mean is taken over each slide's thresholds first, then over the slides, as in the authors'
            training, whose batches are one slide; by default over all (slide, threshold) pairs that count. The other
            losses are the same either way.
    """
    check_choice("head", head, HEADS)
    if grades.shape != outputs.shape[:1]:  # a mean of squares would broadcast them
        raise BadParameter("grades", tuple(grades.shape), f"({len(outputs)},), one for each row of outputs")
    grades = grades.long()
    if grades.is_cpu and grades.numel() and (grades.min() < 0 or grades.max() >= classes):  # a GPU is not waited for
        raise BadParameter("grades", grades.tolist(), f"0 to {classes - 1}")
    if head == "classification":
        return F.cross_entropy(outputs, grades)
    if head == "regression":
        return F.mse_loss(outputs[:, 0], grades.to(outputs.dtype))
    targets = extended(grades, classes).to(outputs.dtype)
    each = F.binary_cross_entropy_with_logits(outputs, targets, reduction="none")  # (b, k - 1)
    if head == "ordinal":
        return each.mean()
    if head == "coral":
        return each.sum(1).mean()
    # CORN: target j counts only for slides whose grade is at least j
    counted = torch.arange(classes - 1, device=grades.device) <= grades[:, None]
    if per_slide:
        return ((each * counted).sum(1) / counted.sum(1)).mean()
    return each[counted].sum() / counted.sum()


def graded(head: str, outputs: Tensor, classes: int = 6) -> Tensor:
    """The predicted grades (b,) of outputs (b, ...).

    Ordinal heads count the leading probabilities above one half; CORN multiplies them up first. (The released code
    leaves that product out in training and tuning: `graded("ordinal", ...)` gives what it computes there.)

    Raises `BadParameter`: another head, or outputs that are not finite, or of other classes.
    """
    check_choice("head", head, HEADS)
    check_range("classes", classes, 2)
    outputs = checked("outputs", outputs, axes=2)
    if head == "classification":
        return outputs.argmax(1)
    if head == "regression":  # torch rounds halves to even
        return outputs[:, 0].round().clamp(0, classes - 1).long()
    probabilities = outputs.sigmoid()
    if head == "corn":
        probabilities = probabilities.cumprod(1)
    return (probabilities > 0.5).long().cumprod(1).sum(1)


def probabilities(head: str, outputs: Tensor) -> Tensor:
    """The probability of each grade (b, k) by the outputs (b, ...) of a head other than "regression", which has none.

    The outputs of ordinal heads are those of the grade lying above each threshold. They are made to decrease as
    `graded` reads them: by the running minimum, of CORN by the running product.
    """
    check_choice("head", head, [name for name in HEADS if name != "regression"])
    outputs = checked("outputs", outputs, axes=2)
    if head == "classification":
        return outputs.softmax(1)
    above = outputs.sigmoid().cumprod(1) if head == "corn" else outputs.sigmoid().cummin(1).values
    return F.pad(above, (1, 0), value=1.0) - F.pad(above, (0, 1))


def vote(grades: Sequence[int], *, isup: bool = True, seed: int = 0) -> int:
    """One grade from those of the folds: the most common one.

    Of two that are equally common, the one nearer to the remaining vote; of what is still equal, a random one.

    Args:
        isup: count the step between grades 0 and 1, no cancer and cancer, as 1.5.
        seed: of the random choice.

    Raises `BadParameter`: no grade, or one that is no whole number.
    """
    counts = Counter(
        checked("grades", grades, axes=1, low=0, whole=True).tolist()
    )  # keeps the order of first appearance
    common = [g for g, count in counts.items() if count == max(counts.values())]
    others = [g for g in counts if g not in common]
    if len(common) == 2 and others:

        def distance(grade: int) -> float:
            return sum(1.5 if isup and {grade, g} == {0, 1} else abs(grade - g) for g in others)

        near, far = sorted(common, key=distance)
        if distance(near) < distance(far):
            return near
    return common[random.Random(seed).randint(0, len(common) - 1)]

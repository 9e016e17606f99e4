"""Scores of multi-label attribute recognition, as papers on pedestrian attributes report them.

    scores = evaluate(labels, probabilities)
    scores.totals                      # {"mA": ..., "Acc": ..., "Prec": ..., "Rec": ..., "F1": ..., ...} in percent
    scores.per_attribute(names)        # a row for each attribute

For labels y and probabilities p of n images and A attributes, where an attribute is predicted if p > threshold:

* mA, mean accuracy: the mean over attributes of (TP / P + TN / N) / 2, the recall of positives and of negatives.
  An attribute that no image has, or that all have, gets 50 % at most.
* Acc, Prec, Rec: for each image |y and p| / |y or p|, / |p|, / |y|, then the mean over images; 0 / 0 counts as 0. Acc
  is thus the Jaccard index; the supplement of PromptPAR writes (TP + TN) / all, which its code does not compute.
* F1, of which two versions are in use. "F1": the mean over images of the image's own F1, as in the code of VTB and
  PromptPAR. "F1 of means": the harmonic mean of Prec and Rec, as in Rethinking_of_PAR and papers based on it. From
  their published Prec and Rec it is 0.2 to 0.4 points above the F1 of VTB and PromptPAR.

PromptPAR and VTB use a threshold of 0.45, Rethinking_of_PAR 0.5. The numbers agree with the authors' function
(Event-AHU/OpenPAR, PromptPAR/tools/function.py at 210ff55) and, for "F1 of means", valencebond/Rethinking_of_PAR.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from ...errors import BadParameter, Share, typed
from . import checked

THRESHOLD = 0.45  # probability above which an attribute is predicted, in the authors' evaluation
_TINY = 1e-20  # the authors': so that 0 / 0 is 0


@dataclass(frozen=True, eq=False)
class Scores:
    """The result of `evaluate`.

    Attributes:
        totals: "mA", "Acc", "Prec", "Rec", "F1" (the mean of the images' own) and "F1 of means", in percent.
        balanced: (A,) the terms of mA, in percent.
        f1: (A,) F1 of each attribute over the images, in percent; precision: likewise.
        positives: (A,) the share of images with the attribute, in percent.
        threshold: of the probabilities.
    """

    totals: dict[str, float]
    balanced: np.ndarray
    f1: np.ndarray
    precision: np.ndarray
    positives: np.ndarray
    threshold: float

    def per_attribute(self, names: Sequence[str]) -> pd.DataFrame:
        """A row for each attribute: its name, "positives", "mA" and "F1", in percent."""
        if len(names) != len(self.balanced):
            raise BadParameter("names", len(names), f"{len(self.balanced)}, one for each attribute")
        return pd.DataFrame({"attribute": list(names), "positives": self.positives, "mA": self.balanced, "F1": self.f1})


@typed
def evaluate(labels: np.ndarray, probabilities: np.ndarray, threshold: Share = THRESHOLD) -> Scores:
    """Score probabilities (n, A) against labels (n, A): 1 present, 0 absent.

    Any other label, such as -1 for unclear, counts in neither sum of mA and is not a positive of its image.

    Raises `BadParameter`: shapes that differ, no images, labels that are no whole numbers, probabilities outside 0 to
    1, or a threshold outside.
    """
    y = checked("labels", labels, axes=2, whole=True).numpy(force=True)
    p = checked("probabilities (after the sigmoid)", probabilities, y.shape, low=0, high=1).double().numpy(force=True)
    there, absent, said = y == 1, y == 0, p > threshold

    def share(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
        return part / (whole + _TINY)

    hits, misses, alarms = (there & said).sum(0), (there & ~said).sum(0), (absent & said).sum(0)
    balanced = (share(hits, there.sum(0)) + share((absent & ~said).sum(0), absent.sum(0))) / 2
    both = (there & said).sum(1)
    precision, recall = share(both, said.sum(1)), share(both, there.sum(1))
    mean_precision, mean_recall = precision.mean(), recall.mean()
    totals = {
        "mA": balanced.mean(),
        "Acc": share(both, (there | said).sum(1)).mean(),
        "Prec": mean_precision,
        "Rec": mean_recall,
        "F1": share(2 * precision * recall, precision + recall).mean(),
        "F1 of means": share(2 * mean_precision * mean_recall, mean_precision + mean_recall),
    }
    f1 = share(2 * hits, 2 * hits + misses + alarms)
    return Scores(
        {name: 100 * float(value) for name, value in totals.items()},
        100 * balanced,
        100 * f1,
        100 * share(hits, hits + alarms),
        100 * there.mean(0),
        threshold,
    )


@typed
def decode(probabilities: np.ndarray, names: Sequence[str], threshold: Share = THRESHOLD) -> list[dict[str, float]]:
    """The attributes predicted for each row of probabilities (n, A), by name, the most probable first.

    Raises `BadParameter`: not one name for each column, or probabilities or a threshold outside 0 to 1.
    """
    rows = checked("probabilities", probabilities, low=0, high=1).numpy(force=True)
    if rows.ndim != 2 or rows.shape[1] != len(names):
        raise BadParameter("names", len(names), f"one for each attribute of probabilities {rows.shape}")
    return [{names[i]: float(row[i]) for i in np.argsort(-row, kind="stable") if row[i] > threshold} for row in rows]

"""SA²VP's published tables next to measured accuracies, and its own figures."""

import matplotlib.pyplot as plt
import pytest
from matplotlib.patches import Rectangle

from companion.data import DATASETS
from companion.models.sa2vp import figures, recipe, tables
from companion.models.sa2vp.model import neighbourhood


@pytest.fixture(autouse=True)
def close():
    yield
    plt.close("all")


def measured(path, datasets, backbone="vit_b16"):
    for dataset, accuracy in datasets.items():
        key = {"backbone": backbone, "method": "SA²VP", "dataset": dataset, "seed": 0}
        recipe.measured(path, key | {"accuracy": accuracy})
    return recipe.measured(path)


def test_a_table_is_shown_once_one_of_its_datasets_was_run(tmp_path):
    path = tmp_path / "measured.csv"
    assert tables.per_task(recipe.measured(path)) == {}
    found = tables.per_task(measured(path, {"vtab/svhn": 91.25, "hta/dtd": 70.0}))
    assert list(found) == ["vitb_vtab_natural_per_task"]  # of HTA only the mean is published
    title, frame = found["vitb_vtab_natural_per_task"]
    row = frame.set_index("method").loc["SA2VP"]
    assert title.startswith("VTAB-1k Natural") and row.svhn == "– / 91.25" and row["measured here"] == "1 of 8"
    found = tables.per_task(measured(path, {"vtab/eurosat": 95.0}, "swin_b"))
    assert list(found) == ["vitb_vtab_natural_per_task", "swinb_vtab_specialized_per_task"]


def test_the_means_stand_next_to_what_each_paper_quotes(tmp_path):
    path = tmp_path / "measured.csv"
    frame = tables.group_means(recipe.measured(path)).set_index("method")
    quoted = [name for name in frame.index if name.startswith("SA2VP")]
    assert len(quoted) == 3 and all("quoted by" in name for name in quoted)
    assert frame.loc["VPT-Deep", "Structured"] == "54.98" and set(frame["measured here"]) == {"not run"}
    names = [name for name in DATASETS if name.startswith("fgvc/")]
    frame = tables.group_means(measured(path, dict.fromkeys(names, 90.0))).set_index("method")
    assert frame.loc["SA2VP", "FGVC"] == "– / 90.00"


def test_the_diagram_has_every_equation_of_the_notebook():
    (ax,) = figures.architecture().axes
    texts = " ".join(text.get_text() for text in ax.texts)
    assert all(f"(3.{number})" in texts for number in range(1, 6))
    lit = [patch for patch in ax.patches if isinstance(patch, Rectangle) and patch.get_facecolor()[0] > 0.8]
    attended = [patch for patch in lit if patch.get_facecolor()[2] < 0.01]
    assert len(attended) == 1 + 9  # the query, and its 3 x 3 keys


def test_the_neighbourhoods_are_those_of_the_mask():
    axes = figures.neighbourhoods(neighbourhood((8, 6)), (8, 6)).axes
    titles = [ax.get_title().partition(":") for ax in axes[1:]]
    assert [(name, count.split()[0]) for name, _, count in titles] == [
        ("[CLS]", "48"),
        ("corner", "4"),
        ("edge", "6"),
        ("inside", "9"),
    ]
    assert axes[4].images[0].get_array().sum() == 9

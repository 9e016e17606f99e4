"""The paper's tables: published accuracies next to those that were measured at the `paper` profile."""

from __future__ import annotations

import pandas as pd

from ...evaluation.tables import compare_published, published_table
from ...ops.papers import paper
from . import recipe

GROUPS = {"fgvc": ("vitb_fgvc_per_task", ""), "hta": ("vitb_hta_means", "")}
GROUPS |= {"vtab": ("vitb_vtab_{}_per_task", "swinb_vtab_{}_per_task")}
PARTS = ("natural", "specialized", "structured")
COLUMNS = {  # of the means by benchmark
    "method": "method",
    "fgvc": "FGVC",
    "hta": "HTA",
    "vtab_natural": "VTAB Natural",
    "vtab_specialized": "Specialized",
    "vtab_structured": "Structured",
    "vtab_mean_19_tasks": "mean, 19 tasks",
    "vtab_mean_of_3_groups": "mean, 3 groups",
    "tuned_of_total_percent": "trained (%)",
    "measured here": "measured here",
}


def group_means(results: pd.DataFrame) -> pd.DataFrame:
    """Means by benchmark on ViT-B/16: the baselines, and SA²VP as each citing paper quotes it.

    Args:
        results: of `recipe.measured`.
    """
    quoted = published_table("sa2vp", "sa2vp_vitb_group_means")
    rows = next(table for table in paper("sa2vp")["tables"] if table["id"] == quoted.attrs["id"])["rows"]
    quoted["method"] = [f"SA2VP, {row['group']}" for row in rows]
    both = pd.concat([published_table("sa2vp", "vitb_group_means_baselines"), quoted], ignore_index=True)
    return compare_published(both, recipe.benchmark_means(results, "vit_b16"))[list(COLUMNS)].rename(columns=COLUMNS)


def per_task(results: pd.DataFrame) -> dict[str, tuple[str, pd.DataFrame]]:
    """Title and table by id, of those published tables in which at least one accuracy was measured.

    Args:
        results: of `recipe.measured`.
    """
    found = {}
    for group, names in GROUPS.items():
        for backbone, name in zip(("vit_b16", "swin_b"), names, strict=True):
            for table in dict.fromkeys(name.format(part) for part in PARTS if name):
                frame = published_table("sa2vp", table)
                ours = recipe.cells(results, backbone, group) | recipe.benchmark_means(results, backbone)
                ours = {key: value for key, value in ours.items() if key[1] in frame.columns}
                if ours:
                    ours = recipe.with_mean(ours, list(frame.columns))
                    found[table] = (f"{frame.attrs['title']}, top-1 %", compare_published(frame, ours))
    return found

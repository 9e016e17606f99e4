"""The runner of recorded cases takes its sizes, rows and settings from the case."""

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from companion.evaluation.parity import Case, folder
from companion.models.promptpar import parity


def variant(root: Path, name: str, **changes) -> Case:
    """A copy of a case without outputs, other texts and numbers in its case.json and names.json."""
    target = root / name
    shutil.copytree(folder() / "promptpar" / name, target)
    for file in ("case.json", "names.json"):
        if (target / file).exists():
            text = (target / file).read_text()
            for old, new in changes.get(file.removesuffix(".json"), ()):
                assert re.search(old, text), old
                text = re.sub(old, new, text)
            (target / file).write_text(text)
    return Case(target)


@pytest.mark.parametrize(
    ("name", "changes", "wanted"),
    [
        (
            "mm_former",
            {
                "case": [
                    ('"embed": 768', '"embed": 512'),
                    (r"267, 768\]", "250, 512]"),
                    (r"\[7, 768\]", "[7, 512]"),
                    ("bn_logits_2023", "unused"),  # needs equal widths
                    ("bn_logits_linear", "unused_too"),  # has a layer over all tokens
                ],
                "names": [(r"_embed.weight\": \[\s*768,\s*768", '_embed.weight": [768, 512')],
            },
            {"normed_attribute_tokens": (2, 7, 768), "bn_logits": (2, 7), "attention": (2, 7, 257)},
        ),
        (
            "visual_transformer_small",
            {
                "case": [
                    ('"width": 64', '"width": 96'),
                    (r"2, 64\]", "2, 96]"),
                    (r"rows \[0, 1, 3,", "rows [0, 2,"),
                    ('"heads": 2', '"heads": 3'),
                ],
                "names": [(r"\b64\b", "96"), (r"\b192\b", "288"), (r"\b256\b", "384")],
            },
            {"tokens": (8, 2, 96), "tokens_nodiv": (5, 2, 96), "attention": (2, 8, 271), "all_class": (2, 5, 96)},
        ),
    ],
)
def test_other_sizes(name, changes, wanted, tmp_path):
    found = parity.outputs(variant(tmp_path, name, **changes))
    assert {key: tuple(found[key].shape) for key in wanted} == wanted
    assert not {"bn_logits_2023", "bn_logits_linear"} & found.keys() or name != "mm_former"


def test_another_schedule_and_other_masks(tmp_path):
    found = parity.outputs(
        variant(tmp_path, "schedule", case=[('"epochs": 100', '"epochs": 60'), ("warm-up 5", "warm-up 3")])
    )
    epoch = np.arange(3, 60)
    cosine = 1.6e-5 + (8e-3 - 1.6e-5) * (1 + np.cos(np.pi * epoch / 60)) / 2
    np.testing.assert_allclose(found["heads"][2:59], cosine, rtol=1e-9)
    assert len(found["prompts"]) == 60
    masks = parity.outputs(variant(tmp_path, "visual_mask", case=[("mask_l14_p10", "mask_b32_p20")]))
    assert masks["mask_b32_p20"].shape == (5 + 20 + 49, 5 + 20 + 49) and masks["mask_b32_p20"].dtype == torch.bool

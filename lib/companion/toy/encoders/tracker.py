"""The toy tracker, a one-stream tracker that replaces OSTrack.

It is trained on clear pairs of crops of one stream, two thirds RGB and one third thermal, whose distractors differ from
the target: it learns to match; its data have no darkness, glare or crossover, and no second stream.
"""

from __future__ import annotations

from pathlib import Path

from timm.models.vision_transformer import VisionTransformer

from ...backbones import read_state
from ...models.bat import OSTrack
from . import weights_file

NAME = "pocket_ostrack"


def build(weights: str | Path = "shipped") -> OSTrack:
    """The toy tracker in eval mode: 4 blocks of width 64, crops of 32 and 64 pixels.

    Args:
        weights: "shipped", "random" (torch's current seed), or a file under the names of OSTrack's authors.

    Raises `CorruptFile`, `BadCheckpoint`: a file that cannot be read, or does not match.
    """
    size = {"img_size": 64, "patch_size": 8, "embed_dim": 64, "depth": 4, "num_heads": 4, "mlp_ratio": 2}
    unused = {"num_classes": 0, "class_token": False, "pos_embed": "none", "global_pool": ""}
    tracker = OSTrack(VisionTransformer(**size, **unused), template=32, search=64, head_channels=64)
    if weights != "random":
        tracker.loaded(read_state(weights_file(NAME) if weights == "shipped" else weights), "OSTrack")
    return tracker.eval()

"""NAME: TODO the title, venue and arXiv number.

TODO in three sentences what it is, where it is from, and the letters of the shapes. Until it is written this is linear
probing.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from ...backbones import check_input
from ...errors import Count
from ...io.config import configure
from ..layers.classifying import OnFrozen, check_features, head


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Cross-entropy for `fit`. batch: images, labels."""
    return F.cross_entropy(model(batch[0]), batch[1])


class NAME(OnFrozen):
    """TODO the method: a head on a frozen copy of the encoder.

    Args:
        backbone: a timm model without classifier.
        classes: number of classes.

    Raises `BadParameter`: another backbone.
    """

    def __init__(self, backbone: nn.Module, classes: Count):
        configure(self, locals())
        check_features(backbone)
        super().__init__(backbone)
        self.head = head(backbone.num_features, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (b, classes) of images (b, 3, H, W)."""
        check_input(self.backbone, images)
        return self.head(self.backbone(images))

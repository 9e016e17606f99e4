"""The baselines of BAT: its frozen tracker on one stream or both, and full fine-tuning of BAT's network."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from ...errors import check_choice
from ...io.config import configure
from ..layers.frozen import frozen_copy
from .model import BAT, Tracks, halves, streams
from .ostrack import OSTrack, Prediction

FUSIONS = ("sum", "mean")


class FullFineTuning(BAT):
    """BAT with every tensor trained, the tracker's too, of which it has a copy. Arguments as of `BAT`."""

    def __init__(self, tracker: OSTrack, width: int = 8, **options: Any):
        super().__init__(tracker, width, **options)
        self.tracker = copy.deepcopy(tracker).requires_grad_(True)
        for unused in (self.tracker.vit.cls_token, self.tracker.vit.pos_embed):  # in the released checkpoints
            if unused is not None:
                unused.requires_grad_(False)


class _Frozen(Tracks):
    """A frozen tracker on the two streams, called as `BAT`."""

    def __init__(self, tracker: OSTrack):
        configure(self, locals())
        super().__init__()
        self.tracker = frozen_copy(tracker)


class SingleStream(_Frozen):
    """The frozen foundation on one stream of the pair. `stream` is 0 (RGB) or 1 (thermal, events)."""

    def __init__(self, tracker: OSTrack, stream: int):
        configure(self, locals())
        super().__init__(tracker)
        check_choice("stream", stream, (0, 1))
        self.stream = stream

    def embed_template(self, template: Tensor) -> Tensor:
        """Template tokens (b, n, d)."""
        return self.tracker.embed_template(template.chunk(2, 1)[self.stream])

    def locate(self, template_tokens: Tensor, search: Tensor) -> Prediction:
        return self.tracker.locate(template_tokens, search.chunk(2, 1)[self.stream])


class FeatureFusion(_Frozen):
    """The frozen foundation on each stream, and its head on the sum or the mean of their features."""

    def __init__(self, tracker: OSTrack, fusion: str = "sum"):
        configure(self, locals())
        super().__init__(tracker)
        check_choice("fusion", fusion, FUSIONS)
        self.fusion = fusion

    def locate(self, template_tokens: Tensor, search: Tensor) -> Prediction:
        first, second = halves(self.tracker.forward_features(template_tokens, streams(search)))  # (b, n + m, d) each
        return self.tracker.forward_head(first + second if self.fusion == "sum" else (first + second) / 2)


class HigherPeak(_Frozen):
    """The frozen foundation on each stream; for each sample the prediction of the stream with the higher peak score."""

    def locate(self, template_tokens: Tensor, search: Tensor) -> Prediction:
        both = self.tracker.locate(template_tokens, streams(search))
        first, second = halves(both.score.flatten(1).amax(1))  # (b,) each
        chosen = torch.arange(len(first), device=first.device) + len(first) * (second > first)
        return Prediction(*(part[chosen] for part in both))

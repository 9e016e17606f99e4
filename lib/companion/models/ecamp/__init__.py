"""ECAMP (arXiv 2312.13316): medical vision-language pre-training on chest X-rays and reports."""

from .heads import Detector, Segmenter, classification_loss, classifier, classifier_from_official, segmentation_loss
from .model import ECAMP, Batch, Losses, build, pretraining_loss
from .text import Pairs, Vocabulary

__all__ = [
    "ECAMP",
    "Batch",
    "Detector",
    "Losses",
    "Pairs",
    "Segmenter",
    "Vocabulary",
    "build",
    "classification_loss",
    "classifier",
    "classifier_from_official",
    "pretraining_loss",
    "segmentation_loss",
]

"""ECAMP (arXiv 2312.13316): medical vision-language pre-training on chest X-rays and reports."""

from .detection import Detector, detection_loss
from .heads import Segmenter, classification_loss, classifier, classifier_from_official, segmentation_loss
from .model import ECAMP, Batch, Bert, Blocks, Losses, build, pretraining_loss
from .text import ReportPairs, Vocabulary

__all__ = [
    "ECAMP",
    "Batch",
    "Bert",
    "Blocks",
    "Detector",
    "Losses",
    "ReportPairs",
    "Segmenter",
    "Vocabulary",
    "build",
    "classification_loss",
    "classifier",
    "classifier_from_official",
    "detection_loss",
    "pretraining_loss",
    "segmentation_loss",
]

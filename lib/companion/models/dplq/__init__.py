"""DPLQ: Domain Prompt Learning with Quaternion Networks (CVPR 2024)."""

from .model import DPLQ, DomainModel, MAEFeatures, Prompts, loss
from .official import domain_model

__all__ = ["DPLQ", "DomainModel", "MAEFeatures", "Prompts", "domain_model", "loss"]

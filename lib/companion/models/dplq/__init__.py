"""DPLQ: Domain Prompt Learning with Quaternion Networks (CVPR 2024)."""

from .model import DPLQ, MAE, DomainModel, Prompts, domain_model, loss

__all__ = ["DPLQ", "MAE", "DomainModel", "Prompts", "domain_model", "loss"]

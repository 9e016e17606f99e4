"""DMT: Comprehensive Distillation with Multiple Self-supervised Teachers.

Several frozen self-supervised ViTs distilled into one student:

    from companion.models.dmt import DMT, Teachers, build, loss, released

    teachers = Teachers({"MAE": released("MAE"), "MoCo v3": released("MoCo v3", "vit-b-300ep.pth.tar")})
    model = DMT(build("tiny"), teachers, statistics="running", decoder="tiny")
"""

from ..layers.mae import MAE
from .model import DMT, Teachers, loss
from .official import released
from .vit import ViT, build

__all__ = ["DMT", "MAE", "Teachers", "ViT", "build", "loss", "released"]

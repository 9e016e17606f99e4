"""NAME: what is trained, and what is refused."""

import pytest
import torch

from companion.errors import BadParameter
from companion.models.SLUG import NAME, loss
from companion.training.fit import fit
from companion.training.hardware import CPU
from companion.training.schedules import sgd
from tests.models.common import draw
from tests.papers.common import vit


def test_a_training_changes_all_but_the_backbone():
    model = NAME(vit(), 3)
    before = {name: tensor.clone() for name, tensor in model.named_parameters()}
    data = torch.utils.data.TensorDataset(draw(8, 3, 32, 32), torch.arange(8) % 3)
    fit(model, loss, data, epochs=3, batch=4, optimizer=sgd(0.1), hardware=CPU)
    changed = {name for name, tensor in model.named_parameters() if not torch.equal(tensor, before[name])}
    assert changed == {name for name in before if not name.startswith("backbone.")}


def test_another_backbone_is_refused():
    with pytest.raises(BadParameter, match="backbone"):
        NAME(vit().blocks, 3)

"""DMT's teachers: what MAE trains, and released files."""

from functools import partial

import pytest
import torch
from safetensors.torch import save_file

from companion.backbones import read_state
from companion.errors import BadCheckpoint, CorruptFile, MissingWeights
from companion.models.dmt import official
from companion.models.dmt.vit import ViT, build
from companion.models.layers.mae import MAE
from tests.models.common import refuses


def vit(**options):
    torch.manual_seed(0)
    return build("pocket teacher", **options)


@pytest.fixture
def images():
    return torch.rand(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def untrained(model):
    """Parameters without a gradient."""
    return {name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()}


def test_mae_trains_all_but_its_tables_and_its_names_go_there_and_back(images):
    model, noise = MAE(vit(), (32, 2, 4)), torch.rand(8, 16)
    model(images).backward()
    assert untrained(model) == {"encoder.pos_embed", "decoder.pos_embed"}
    state = model.to_official()
    assert {"mask_token", "decoder_pos_embed", "decoder_blocks.1.attn.qkv.weight", "decoder_pred.bias"} <= state.keys()
    assert torch.equal(MAE.from_official(state, 4, 4)(images, noise), model.eval()(images, noise))
    assert torch.equal(ViT.from_official(state, 4)(images), model.encoder(images))
    with pytest.raises(BadCheckpoint, match="decoder_embed"):
        MAE.from_official(model.encoder.to_official(), 4)


def test_released_files(tmp_path, images):
    model = vit(positions="learned", masked=True).eval()
    plain = model.to_official()

    def prefixed(prefix):
        return {prefix + name: value for name, value in plain.items()}

    files = {
        "mae.pth": {"model": plain},
        "moco.pth.tar": {"state_dict": prefixed("module.base_encoder."), "optimizer": {"state": {}}},
        "full.pth": {"teacher": prefixed("module.backbone."), "student": {}, "epoch": 3, "optimizer": {}},
    }
    for name, content in files.items():
        torch.save(content, tmp_path / name)
        assert torch.equal(ViT.from_official(read_state(tmp_path / name), 4)(images), model(images)), name
    save_file(plain, tmp_path / "plain.safetensors")
    loaded = official.released("iBOT", tmp_path / "plain.safetensors")  # heads are read from the width, 48: one
    assert (loaded.blocks[0].attn.num_heads, loaded.positions) == (1, "learned")


def test_other_files_are_refused(tmp_path, monkeypatch):
    torch.save({"epoch": 3}, tmp_path / "other.pth")
    (tmp_path / "cut.safetensors").write_bytes(b"no")
    save_file({"a": torch.ones(1)}, tmp_path / "else.safetensors")
    released, read = official.released, read_state
    refuses(
        (lambda: read(tmp_path / "other.pth"), r"other\.pth"),
        (lambda: read(tmp_path / "cut.safetensors"), r"cut\.safetensors"),
        (lambda: released("MAE", tmp_path / "absent.pth"), r"absent\.pth"),
        error=CorruptFile,
    )
    refuses((lambda: released("DINO", tmp_path / "else.safetensors"), "pos_embed"), error=BadCheckpoint)
    monkeypatch.setattr("companion.backbones.try_to_load_from_cache", lambda *a: None)
    files = {"MAE": "mae", "MoCo v3": "nyu-visionx", "iBOT": "bytedance/ibot", "DINO": "dino"}
    refuses(*((partial(released, name), file) for name, file in files.items()), error=MissingWeights)

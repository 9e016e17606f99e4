"""Encoders by name: loading, refusals, and that nothing is downloaded without `download`."""

import socket
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from companion import backbones
from companion.errors import BadCheckpoint, BadParameter, CorruptFile, MissingWeights
from companion.toy import encoders
from tests.io.test_unpickle import Evil
from tests.models.common import misfits, refuses
from tests.training.test_fit import same
from tools.encoders import pocket_clip, pocket_vit

SMALL = "test_vit"  # timm's own tiny ViT


@pytest.fixture(autouse=True)
def empty_cache(tmp_path, monkeypatch):
    """An empty cache of our own and no network: whoever tries to connect fails the test."""
    monkeypatch.setattr(backbones.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(socket.socket, "connect", Mock(side_effect=AssertionError("the network was tried")))


@pytest.mark.parametrize("name", ["pocket_vit", "pocket_clip"])
def test_the_shipped_weights_load(name):
    model = encoders.build(name)
    assert not model.training and backbones.input_of(model) == backbones.Input(32, (0.5,) * 3, (0.5,) * 3)


@pytest.mark.slow
def test_the_shipped_weights_are_as_good_as_their_cards_say():
    vit, clip = (encoders.read_card(name)["quality"] for name in ("pocket_vit", "pocket_clip"))
    found = pocket_vit.measure(encoders.build("pocket_vit", num_classes=16))["accuracy"]
    assert found == pytest.approx(vit["supervised"]["object"]["accuracy"], abs=0.01)
    found = pocket_clip.measure(encoders.build("pocket_clip"))["zero-shot accuracy"]
    assert found == pytest.approx(clip["zero_shot"]["object"]["accuracy"], abs=0.01)


def test_a_classifier_of_another_size_starts_random_from_torchs_seed():
    models = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        models.append(encoders.build("pocket_vit", num_classes=9))
    assert models[0].head.out_features == 9 and same(models[0], models[1]) and not same(models[0], models[2])
    assert torch.equal(models[0].pos_embed, encoders.build("pocket_vit").pos_embed)


@pytest.mark.parametrize(
    ("name", "hub"),
    [
        ("vit_b16", "timm/vit_base_patch16_224.orig_in21k"),
        ("openclip:ViT-B-32/openai", "timm/vit_base_patch32_clip_224.openai"),
    ],
)
def test_weights_that_are_not_cached_are_not_downloaded_and_the_error_names_them(name, hub, tmp_path):
    with pytest.raises(MissingWeights) as caught:
        backbones.build(name)
    assert hub in str(caught.value) and str(tmp_path / "hub") in str(caught.value)


@pytest.mark.parametrize("network", [True, False])
def test_a_download_is_tried_only_with_a_network(network, monkeypatch):
    """The hub's client would try for most of a minute a file."""
    session, download = Mock(), Mock(side_effect=ConnectionError("no such file"))
    session.head.side_effect = None if network else ConnectionError("no route")
    monkeypatch.setattr(backbones, "hf_hub_download", download)
    monkeypatch.setattr(backbones, "get_session", lambda: session)
    with pytest.raises(MissingWeights, match="no such file" if network else "no route|HF_HUB_OFFLINE"):
        backbones.build("vit_b16", download=True)
    assert download.called == network


@pytest.mark.parametrize(
    ("name", "weights"),
    [
        ("vit_b17", "pretrained"),
        ("vit_b16", "no/such/file.pth"),
        ("openclip:ViT-B-33/openai", "pretrained"),
        ("openclip:ViT-B-32/nobody", "pretrained"),
        ("openclip:ViT-B-32", "pretrained"),
    ],
)
def test_unknown_names_and_weights_are_refused(name, weights):
    with pytest.raises(BadParameter):
        backbones.build(name, weights)


def test_models_come_without_classifier_and_with_the_input_of_their_release(capfd):
    model = backbones.build(SMALL, "random")
    assert not model.training and model.num_classes == 0
    assert backbones.build(SMALL, "random", num_classes=7).num_classes == 7
    cfg = backbones.timm.get_pretrained_cfg(SMALL)
    assert backbones.input_of(model) == backbones.Input(cfg.input_size[1], tuple(cfg.mean), tuple(cfg.std))
    assert backbones.input_of(backbones.build(SMALL, "random", img_size=96)).size == 96
    clip = backbones.build("openclip:ViT-B-32/openai", "random")
    size, mean, _ = vars(backbones.input_of(clip)).values()
    assert size == 224 and mean == pytest.approx((0.48145466, 0.4578275, 0.40821073))
    assert type(clip.visual.transformer.resblocks[0].mlp.gelu).__name__ == "QuickGELU"
    assert capfd.readouterr().err == ""
    refuses((lambda: backbones.input_of(torch.nn.Linear(1, 1)), "Linear"))


def test_files_of_each_kind_load(tmp_path):
    made = backbones.build(SMALL, "random", num_classes=5)
    save_file(made.state_dict(), tmp_path / "a.safetensors")
    torch.save({"model": made.state_dict()}, tmp_path / "b.pth")
    for name in ("a.safetensors", "b.pth"):
        assert same(backbones.build(SMALL, tmp_path / name, num_classes=5), made)
        without = backbones.build(SMALL, tmp_path / name)
        assert torch.equal(without.pos_embed, made.pos_embed) and without.num_classes == 0


def test_the_original_vit_release_loads(tmp_path):
    """An .npz in the layout of Google's release, made from a known ViT, gives that ViT."""
    shape = {"img_size": 32, "patch_size": 16, "embed_dim": 24, "depth": 1, "num_heads": 3}
    made, path = backbones.build("vit_base_patch16_224", "random", **shape), tmp_path / "vit.npz"
    np.savez(path, **release(made))
    assert same(backbones.build("vit_base_patch16_224", path, **shape), made)
    refuses(
        (lambda: backbones.build("vit_base_patch16_224", path, **{**shape, "embed_dim": 48}), "vit_base"),
        (lambda: backbones.build("resnet18", path), "resnet18"),
        error=BadCheckpoint,
    )


def release(model):
    """The weights of a timm ViT of one block under the names and in the layouts of the original release."""
    width, heads = model.embed_dim, model.blocks[0].attn.num_heads
    state = {key.removeprefix("blocks.0."): value.numpy() for key, value in model.state_dict().items()}
    block, encoder = "Transformer/encoderblock_0", "Transformer"
    mha = f"{block}/MultiHeadDotProductAttention_1"
    norms = {f"{encoder}/encoder_norm": "norm", f"{block}/LayerNorm_0": "norm1", f"{block}/LayerNorm_2": "norm2"}
    linear = {f"{block}/MlpBlock_3/Dense_0": "mlp.fc1", f"{block}/MlpBlock_3/Dense_1": "mlp.fc2"}
    out = {
        "cls": state["cls_token"],
        "embedding/kernel": state["patch_embed.proj.weight"].transpose(2, 3, 1, 0),
        "embedding/bias": state["patch_embed.proj.bias"],
        f"{encoder}/posembed_input/pos_embedding": state["pos_embed"],
        f"{mha}/out/kernel": state["attn.proj.weight"].T.reshape(heads, -1, width),
        f"{mha}/out/bias": state["attn.proj.bias"],
    }
    out |= {f"{theirs}/scale": state[f"{ours}.weight"] for theirs, ours in norms.items()}
    out |= {f"{theirs}/kernel": state[f"{ours}.weight"].T for theirs, ours in linear.items()}
    out |= {f"{theirs}/bias": state[f"{ours}.bias"] for theirs, ours in (norms | linear).items()}
    for i, part in enumerate(("query", "key", "value")):
        out[f"{mha}/{part}/kernel"] = np.split(state["attn.qkv.weight"], 3)[i].T.reshape(width, heads, -1)
        out[f"{mha}/{part}/bias"] = np.split(state["attn.qkv.bias"], 3)[i].reshape(heads, -1)
    return out


def test_a_mismatched_file_names_what_differs(tmp_path):
    state, path = encoders.build("pocket_vit", "random").state_dict(), tmp_path / "a.safetensors"
    state["norm.scale"] = state.pop("norm.weight")
    state["cls_token"] = torch.zeros(1, 1, 40)
    save_file(state, path)
    missing, unknown, (shape,) = misfits(encoders.build, "pocket_vit", path)
    assert (missing, unknown) == (["norm.weight"], ["norm.scale"]) and shape.startswith("cls_token (1, 1, 40)")
    state = encoders.build("pocket_clip", "random").state_dict()
    del state["visual.proj"]
    save_file(state, path)
    assert misfits(encoders.build, "pocket_clip", path)[0] == ["visual.proj"]


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")  # torch, on what is no pickle at all
@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".npz"])
def test_files_that_are_no_weights_or_want_to_run_code_are_refused(tmp_path, suffix):
    path, evil = tmp_path / f"a{suffix}", Evil(tmp_path / "made")
    path.write_bytes(b"\x80not weights")
    refuses((lambda: encoders.build("pocket_vit", path), "a" + suffix), error=CorruptFile)
    if suffix != ".safetensors":
        np.savez(path, np.array([evil], dtype=object)) if suffix == ".npz" else torch.save({"model": evil}, path)
        refuses((lambda: backbones.build("vit_tiny_patch16_224", path), "a" + suffix), error=CorruptFile)
    assert not evil.path.exists()

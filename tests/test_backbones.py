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
from companion.toy.datasets import classification
from companion.toy.encoders import vit_and_clip as pocket
from tests.ops.test_unpickle import Evil
from tests.training.test_fit import same

SMALL = "test_vit"  # timm's own tiny ViT


@pytest.fixture(autouse=True)
def empty_cache(tmp_path, monkeypatch):
    """An empty cache of our own and no network: whoever tries to connect fails the test."""
    monkeypatch.setattr(backbones.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(socket.socket, "connect", Mock(side_effect=AssertionError("the network was tried")))


@pytest.mark.parametrize("name", ["pocket_vit", "pocket_clip"])
def test_the_shipped_weights_load_and_are_for_todays_tasks(name):
    model = encoders.build(name)
    assert not model.training
    assert backbones.input_of(model) == backbones.Input(32, (0.5,) * 3, (0.5,) * 3)
    # when this fails the tasks have changed: python -m companion.toy.encoders.vit_and_clip <name> --measure
    assert encoders.read_card(name)["tasks"] == classification.VERSION


def test_the_shipped_vit_is_as_good_as_its_card_says():
    said, model = encoders.read_card("pocket_vit")["quality"], encoders.build("pocket_vit", num_classes=16)
    assert pocket.source_accuracy(model) == pytest.approx(said["supervised"]["object"]["accuracy"], abs=0.005)
    probed = pocket.linear_probe(encoders.build("pocket_vit"), "orient")
    assert probed == pytest.approx(said["linear_probe"]["orient"]["accuracy"], abs=0.01)


def test_the_shipped_clip_is_as_good_as_its_card_says():
    scores = pocket.zero_shot(encoders.build("pocket_clip"))
    for name, said in encoders.read_card("pocket_clip")["quality"]["zero_shot"].items():
        assert scores[name] == pytest.approx(said["accuracy"], abs=0.005), name


def test_a_classifier_of_another_size_starts_random():
    model = encoders.build("pocket_vit", num_classes=9)
    assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 9)
    assert torch.equal(model.pos_embed, encoders.build("pocket_vit").pos_embed)


def test_random_weights_follow_torchs_seed():
    models = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        models.append(encoders.build("pocket_vit", "random"))
    assert same(models[0], models[1]) and not same(models[0], models[2])


@pytest.mark.parametrize(
    ("name", "hub"),
    [
        ("vit_b16", "timm/vit_base_patch16_224.orig_in21k"),
        ("swin_b", "timm/swin_base_patch4_window7_224.ms_in22k"),
        ("openclip:ViT-B-32/openai", "timm/vit_base_patch32_clip_224.openai"),
    ],
)
def test_weights_that_are_not_cached_give_one_clear_error(name, hub, tmp_path):
    with pytest.raises(MissingWeights) as caught:
        backbones.build(name)
    for part in (hub, str(tmp_path / "hub"), "download=True", "weights='FILE'", "-p weights FILE"):
        assert part in str(caught.value)


@pytest.mark.parametrize("case", ["HF_HUB_OFFLINE", "no network", "no such file"])
def test_a_download_that_fails_says_why_at_once(case, monkeypatch):
    """The hub's client would try for most of a minute a file."""
    session, download = Mock(), Mock(side_effect=ConnectionError("no such file"))
    monkeypatch.setattr(backbones, "hf_hub_download", download)
    monkeypatch.setattr(backbones, "get_session", lambda: session)
    monkeypatch.setattr(backbones.constants, "HF_HUB_OFFLINE", case == "HF_HUB_OFFLINE")
    if case == "no network":
        session.head.side_effect = ConnectionError("no network")
    with pytest.raises(MissingWeights, match=f"(?s)vit_base_patch16_224.*{case}.*`companion fetch sa2vp`") as caught:
        backbones.build("vit_b16", download=True)
    assert "<paper>" not in str(caught.value)
    assert download.called == (case == "no such file")


def test_weights_in_the_cache_are_used(tmp_path, monkeypatch):
    """A cache as the hub's client lays it out, filled by hand."""
    made = backbones.build(SMALL, "random")
    repository = backbones.timm.get_pretrained_cfg(SMALL).hf_hub_id
    folder = tmp_path / "hub" / f"models--{repository.replace('/', '--')}"
    for part in ("refs", "snapshots/abc"):
        (folder / part).mkdir(parents=True)
    (folder / "refs" / "main").write_text("abc")
    save_file(made.state_dict(), folder / "snapshots" / "abc" / "model.safetensors")
    assert same(backbones.build(SMALL), made)


@pytest.mark.parametrize(
    ("name", "weights"),
    [
        ("vit_b17", "pretrained"),
        ("vit_b16", "pocket"),
        ("vit_b16", "no/such/file.pth"),
        ("pocket_vit", "pretrained"),
        ("openclip:ViT-B-33/openai", "pretrained"),
        ("openclip:ViT-B-32/nobody", "pretrained"),
        ("openclip:ViT-B-32", "pretrained"),
    ],
)
def test_bad_names_and_weights(name, weights):
    with pytest.raises(BadParameter, match="Accepted"):
        backbones.build(name, weights)


def test_timm_models_come_without_classifier_and_with_their_input():
    model = backbones.build(SMALL, "random")
    assert not model.training and model.num_classes == 0
    cfg = backbones.timm.get_pretrained_cfg(SMALL)
    assert backbones.input_of(model) == backbones.Input(cfg.input_size[1], tuple(cfg.mean), tuple(cfg.std))
    assert backbones.input_of(backbones.build(SMALL, "random", img_size=96)).size == 96
    assert backbones.build(SMALL, "random", num_classes=7).num_classes == 7
    convnet = backbones.build("mobilenetv3_small_050", "random")
    assert backbones.input_of(convnet) == backbones.Input(224, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    with pytest.raises(BadParameter):
        backbones.input_of(torch.nn.Linear(1, 1))


def test_an_open_clip_model_brings_its_release_input_and_activation(capfd):
    model = backbones.build("openclip:ViT-B-32/openai", "random")
    said = backbones.input_of(model)
    assert said.size == 224 and said.mean == pytest.approx((0.48145466, 0.4578275, 0.40821073))
    assert type(model.visual.transformer.resblocks[0].mlp.gelu).__name__ == "QuickGELU"
    assert capfd.readouterr().err == ""


def test_files_of_each_kind_load(tmp_path):
    made = backbones.build(SMALL, "random", num_classes=5)
    save_file(made.state_dict(), tmp_path / "a.safetensors")
    torch.save({"model": made.state_dict()}, tmp_path / "b.pth")
    for name in ("a.safetensors", "b.pth"):
        assert same(backbones.build(SMALL, tmp_path / name, num_classes=5), made)
        without = backbones.build(SMALL, tmp_path / name)
        assert torch.equal(without.pos_embed, made.pos_embed) and without.num_classes == 0


def test_the_swin_release_file_loads(tmp_path):
    """The official file merges patches at the end of a stage and carries its masks; timm's Swin does neither."""
    made = backbones.build("swin_tiny_patch4_window7_224", "random", num_classes=3)
    official = {}
    for key, value in made.state_dict().items():
        for stage in (1, 2, 3):
            key = key.replace(f"layers.{stage}.downsample", f"layers.{stage - 1}.downsample.")  # dot marks the renamed
        official[key.replace("downsample..", "downsample.").replace("head.fc.", "head.")] = value
    official["layers.0.blocks.1.attn_mask"] = torch.zeros(64, 49, 49)
    official["layers.0.blocks.1.attn.relative_position_index"] = torch.zeros(49, 49)
    torch.save({"model": official}, tmp_path / "swin.pth")
    assert same(backbones.build("swin_tiny_patch4_window7_224", tmp_path / "swin.pth", num_classes=3), made)


def test_the_original_vit_release_loads(tmp_path):
    """An .npz in the layout of Google's release, made from a known ViT, gives that ViT."""
    shape = {"img_size": 32, "patch_size": 16, "embed_dim": 24, "depth": 2, "num_heads": 3}
    made = backbones.build("vit_base_patch16_224", "random", **shape)
    np.savez(tmp_path / "vit.npz", **release(made))
    assert same(backbones.build("vit_base_patch16_224", tmp_path / "vit.npz", **shape), made)
    with pytest.raises(BadCheckpoint):
        backbones.build("vit_base_patch16_224", tmp_path / "vit.npz", **{**shape, "embed_dim": 48})
    with pytest.raises(BadCheckpoint, match="not a ViT"):
        backbones.build("resnet18", tmp_path / "vit.npz")


def release(model):
    """A timm ViT's weights under the names and in the layouts of the original release."""
    width, heads = model.embed_dim, model.blocks[0].attn.num_heads
    state = {key: value.numpy() for key, value in model.state_dict().items()}
    out = {
        "cls": state["cls_token"],
        "embedding/kernel": state["patch_embed.proj.weight"].transpose(2, 3, 1, 0),
        "embedding/bias": state["patch_embed.proj.bias"],
        "Transformer/posembed_input/pos_embedding": state["pos_embed"],
        "Transformer/encoder_norm/scale": state["norm.weight"],
        "Transformer/encoder_norm/bias": state["norm.bias"],
    }
    for i in range(len(model.blocks)):
        theirs, ours = f"Transformer/encoderblock_{i}", f"blocks.{i}"
        for n in (1, 2):
            out[f"{theirs}/LayerNorm_{2 * n - 2}/scale"] = state[f"{ours}.norm{n}.weight"]
            out[f"{theirs}/LayerNorm_{2 * n - 2}/bias"] = state[f"{ours}.norm{n}.bias"]
            out[f"{theirs}/MlpBlock_3/Dense_{n - 1}/kernel"] = state[f"{ours}.mlp.fc{n}.weight"].T
            out[f"{theirs}/MlpBlock_3/Dense_{n - 1}/bias"] = state[f"{ours}.mlp.fc{n}.bias"]
        mha = f"{theirs}/MultiHeadDotProductAttention_1"
        weights, biases = np.split(state[f"{ours}.attn.qkv.weight"], 3), np.split(state[f"{ours}.attn.qkv.bias"], 3)
        for part, weight, bias in zip(("query", "key", "value"), weights, biases, strict=True):
            out[f"{mha}/{part}/kernel"] = weight.T.reshape(width, heads, -1)
            out[f"{mha}/{part}/bias"] = bias.reshape(heads, -1)
        out[f"{mha}/out/kernel"] = state[f"{ours}.attn.proj.weight"].T.reshape(heads, -1, width)
        out[f"{mha}/out/bias"] = state[f"{ours}.attn.proj.bias"]
    return out


def test_a_mismatched_file_names_what_differs(tmp_path):
    state = encoders.build("pocket_vit", "random").state_dict()
    state["norm.scale"] = state.pop("norm.weight")
    state["cls_token"] = torch.zeros(1, 1, 40)
    save_file(state, tmp_path / "a.safetensors")
    with pytest.raises(BadCheckpoint) as caught:
        encoders.build("pocket_vit", tmp_path / "a.safetensors")
    assert caught.value.missing == ["norm.weight"] and caught.value.unknown == ["norm.scale"]
    assert "cls_token" in caught.value.shapes[0]
    state = encoders.build("pocket_clip", "random").state_dict()
    del state["visual.proj"]
    save_file(state, tmp_path / "a.safetensors")
    with pytest.raises(BadCheckpoint, match=r"missing: visual\.proj"):
        encoders.build("pocket_clip", tmp_path / "a.safetensors")


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")  # torch, on what is no pickle at all
@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".npz"])
@pytest.mark.parametrize("data", [b"", b"\x80not weights"])
def test_files_that_are_no_weights(tmp_path, suffix, data):
    path = tmp_path / f"a{suffix}"
    path.write_bytes(data)
    with pytest.raises(CorruptFile, match="a" + suffix):
        encoders.build("pocket_vit", path)


def test_a_file_that_wants_to_run_code_does_not(tmp_path):
    evil = Evil(tmp_path / "made")
    torch.save({"model": evil}, tmp_path / "a.pth")
    np.savez(tmp_path / "b.npz", np.array([evil], dtype=object))
    for name, file, said in ((SMALL, "a.pth", "named tensors"), ("vit_base_patch16_224", "b.npz", "plain arrays")):
        with pytest.raises(CorruptFile, match=said):
            backbones.build(name, tmp_path / file)
    assert not evil.path.exists()

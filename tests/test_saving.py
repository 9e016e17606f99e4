"""Trained models as folders: a loaded model has the saved one's tensors to the bit; other files are refused."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import HfApi, RepoUrl
from safetensors.torch import load_file, save_file
from timm.layers import SwiGLU
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torchvision.transforms.v2.functional import pil_to_tensor

import companion
from companion import backbones, saving
from companion.data import classification, domains
from companion.errors import BadCheckpoint, BadParameter, CompanionError, CorruptFile
from companion.models import dmt, ecamp, promptpar
from companion.models.layers import classifying
from companion.models.sa2vp import baselines as vpt
from companion.toy.tokens import Tokenizer
from tests.models.common import refuses
from tests.papers.common import NAMES as CLASSES
from tests.papers.common import of_all, picture

MODELS: dict[str, Callable[[], nn.Module]] = {
    k: make for models in of_all("MODELS").values() for k, make in models.items()
}


def trained(name: str) -> nn.Module:
    """A model whose every tensor differs from what its constructor gives."""
    torch.manual_seed(4)
    model = MODELS[name]()
    with torch.no_grad():
        for p in model.parameters():
            p += 0.01 * torch.randn_like(p)
    return model.eval()


@pytest.mark.parametrize("name", MODELS)
def test_a_model_comes_back_with_all_its_tensors(name: str, tmp_path: Path) -> None:
    model = trained(name)
    before = torch.get_rng_state()
    names = CLASSES[: getattr(model, "num_classes", 0) or 3]
    path = companion.save(copy.deepcopy(model), tmp_path / "model", class_names=names)
    again = companion.load(path)
    assert torch.equal(before, torch.get_rng_state()) and not again.training and again.class_names == names
    assert repr(again) == repr(model) and type(again) is type(model)
    own, found = saving._tensors(model), saving._tensors(again)
    assert own.keys() == found.keys() and all(torch.equal(own[n], found[n]) for n in own)
    assert [p.requires_grad for p in model.parameters()] == [p.requires_grad for p in again.parameters()]
    assert {file.name for file in path.iterdir()} == {"README.md", "config.json", "model.safetensors"}
    if isinstance(model, saving.Pretrained):  # all but a plain ViT of timm
        assert repr(type(model).from_pretrained(path)) == repr(model)


# a model, its change, what is kept
CHANGES: dict[str, tuple[str, Callable[[Any], object], Callable[[Any], object]]] = {
    "scale": ("SA²VP", lambda m: setattr(m, "scale", 0.1), lambda m: m.scale),
    "noise": ("DPLQ", lambda m: setattr(m, "noise", "always"), lambda m: m.noise),
    "elimination": ("BAT", lambda m: setattr(m, "elimination", {2: 0.5}), lambda m: m.elimination),
    "deep": ("VPT", lambda m: setattr(m, "deep", False), lambda m: m.deep),
    "sentences": (
        "PromptPAR, embedded",
        lambda m: m.reset_classifier(["disc", "a ring"], Tokenizer()),
        lambda m: (m.sentences, m.text_features.sum().item()),
    ),
    "classes": ("DPLQ", lambda m: m.reset_classifier(["disc", "a ring"]), lambda m: m.classes),
    "embedded classes": (
        "MLR",
        lambda m: m.reset_classifier(torch.eye(4, m.text.shape[1]), torch.tensor([True] * 4)),
        lambda m: (m.num_classes, m.novel.tolist(), m.text.sum().item()),
    ),
    **{
        f"classes of {name}": (
            name,
            lambda m: m.reset_classifier(5),
            lambda m: (m.num_classes, [tuple(p.shape) for p in m.parameters()]),
        )
        for name in ("SA²VP", "SA²VP on a Swin", "VPT", "H-ViT", "DMT's classifier", "ECAMP's classifier")
    },
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_was_changed_after_a_model_was_made_comes_back(name: str, tmp_path: Path) -> None:
    model, change, kept = CHANGES[name]
    changed = trained(model)
    change(changed)
    again = companion.load(companion.save(changed, tmp_path / "model"))
    assert kept(again) == kept(changed) != kept(MODELS[model]())


def test_prompts_replace_the_class_names_of_a_file(tmp_path: Path) -> None:
    path = companion.save(MODELS["DPLQ"](), tmp_path / "m", class_names=["moon", "cat", "page"])
    model = companion.load(path)
    assert set(companion.predict(model, picture())[0]) == {"moon", "cat", "page"}
    model.reset_classifier(["disc", "ring"])
    assert set(companion.predict(model, picture())[0]) == {"disc", "ring"}


@pytest.mark.parametrize("options", [{"pool_include_prefix": True, "global_pool": "avg"}, {"dynamic_img_size": True}])
def test_a_vit_of_timm_comes_back_as_it_was_made(options: dict, tmp_path: Path) -> None:
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "num_heads": 3, "depth": 1, "num_classes": 0}
    model = classifying.FineTuning(VisionTransformer(**sizes, **options), 3).eval()
    again, x = companion.load(companion.save(model, tmp_path / "m")), torch.randn(2, 3, 32, 32)
    assert torch.equal(again(x), model(x)) and again.backbone.dynamic_img_size == model.backbone.dynamic_img_size


INPUT = backbones.Input(32, (0.5,) * 3, (0.25,) * 3)


TRANSFORMS = {  # the saved one, and the test form that is expected
    "resize": (classification.resize_transform(INPUT),) * 2,
    "crop": tuple(classification.crop_transform(INPUT, train=train) for train in (True, False)),
    "CLIP": tuple(domains.clip_transform(INPUT, train=train) for train in (True, False)),
    "square": tuple(promptpar.square_transform(32, train=train) for train in (True, False)),
    "DMT": (dmt.vit.test_transform(32),) * 2,
    "X-ray": (ecamp.transforms.test_transform(32),) * 2,
    "squeezed X-ray": (ecamp.transforms.squeeze_transform(32),) * 2,
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_a_transform_comes_back_in_its_test_form(name: str, tmp_path: Path) -> None:
    transform, expected = TRANSFORMS[name]
    again = companion.load(companion.save(trained("VPT"), tmp_path / "m", transform=transform)).transform
    image = picture()
    assert torch.equal(again(image), expected(image))
    pixels = pil_to_tensor(image.convert("L") if "X-ray" in name else image)  # or the pixels as a uint8 tensor
    torch.testing.assert_close(again(pixels), expected(image), rtol=0, atol=0.05)  # Pillow rounds after each axis


@pytest.mark.parametrize("name", ["VPT", "DPLQ", "ECAMP's classifier"])
def test_a_loaded_model_is_saved_with_its_class_names_and_its_transform(name: str, tmp_path: Path) -> None:
    transform = TRANSFORMS["squeezed X-ray" if "ECAMP" in name else "crop"][1]
    path = companion.save(trained(name), tmp_path / "1", class_names=CLASSES, transform=transform)
    first = companion.load(path)
    again = companion.load(companion.save(first, tmp_path / "2"))
    assert companion.predict(again, picture()) == companion.predict(first, picture())
    assert again.class_names == CLASSES and header(tmp_path / "2") == header(path)
    renamed = companion.save(first, tmp_path / "3", class_names=["x", "y", "z"])
    assert companion.load(renamed).class_names == ("x", "y", "z")


def header(path: Path) -> dict[str, Any]:
    return json.loads((path / "config.json").read_text())


def rewritten(path: Path, about: str = "", **tensors: torch.Tensor) -> Path:
    """The folder with another config, or with other tensors."""
    weights = path / "model.safetensors"
    save_file(load_file(weights) | tensors, weights)
    (path / "config.json").write_text(about or json.dumps(header(path)))
    return path


def test_what_would_be_loaded_as_something_else_is_not_saved(tmp_path: Path) -> None:
    changed, foreign, inside, out = *(MODELS["VPT"]() for _ in range(3)), tmp_path / "m"
    gated = classifying.FineTuning(
        VisionTransformer(img_size=32, depth=1, embed_dim=48, num_heads=3, num_classes=0, mlp_layer=SwiGLU), 3
    )
    changed.head = nn.Linear(48, 3, bias=False)
    inside.backbone.pool_include_prefix = True
    foreign.config["args"]["backbone"] = {"unknown": "torch.nn.Sequential"}
    refuses(
        (lambda: companion.save(changed, out), "head.bias"),
        (lambda: companion.save(inside, out), "backbone.pool_include_prefix"),
        (lambda: companion.save(foreign, out), "torch.nn.Sequential"),
        (lambda: companion.save(gated, out), "VisionTransformer"),
        (lambda: companion.save(nn.Linear(2, 2), out), "Linear"),
        (lambda: companion.save(MODELS["VPT"](), out, transform=lambda x: x), "transform"),
        (lambda: companion.save(MODELS["VPT"](), "vpt.safetensors"), "vpt.safetensors.*folder"),
        (lambda: companion.save(MODELS["DPLQ"](), out, class_names=["a", "b", "a"]), "'a'"),
        *(
            (lambda name=name: companion.save(MODELS[name](), out, class_names=["a", "b"]), "2 names.*3")
            for name in ("VPT", "MLR", "H-ViT", "ECAMP's classifier")
        ),
    )
    assert not list(tmp_path.iterdir())


def test_other_files_are_refused_by_name(tmp_path: Path) -> None:
    good = companion.save(MODELS["VPT"](), tmp_path / "good")
    about, config, weights = header(good), good / "config.json", good / "model.safetensors"
    whole = weights.read_bytes()

    def broken(edit: Callable[[], object]) -> Callable[[], object]:
        def load() -> object:
            config.write_text(json.dumps(about))
            weights.write_bytes(whole)
            edit()
            return companion.load(good)

        return load

    def about_is(**changes: Any) -> Callable[[], object]:
        return broken(lambda: rewritten(good, json.dumps(about | changes)))

    sizes = {"size": 1, "mean": [0] * 3, "std": [1] * 3}
    refuses(
        (lambda: companion.load(tmp_path / "none"), "none"),
        (lambda: companion.load(tmp_path), "config.json"),
        (broken(lambda: weights.unlink()), "model.safetensors"),
        (broken(lambda: weights.write_bytes(whole[:-100])), "model.safetensors"),
        (broken(lambda: weights.write_bytes(whole[:8] + b"[" + whole[9:])), "model.safetensors"),
        (broken(lambda: config.write_text("{")), "config.json"),
        (broken(lambda: config.write_text("[]")), "config.json.*from_official"),
        (broken(lambda: config.write_text('{"architecture": "vit_base_patch16_224"}')), "config.json.*from_official"),
        (about_is(companion=99), "99"),
        (about_is(model={"by": 3}), "good"),
        (about_is(model={"by": "companion.backbones:Input", "args": sizes}), "no model"),
        error=CorruptFile,
    )
    # nothing else is executed, whatever the file contains; Loop is a dataclass, but not frozen
    for by in ("os:system", "torch:load", "companion.cli:main", "companion.none:f", "companion.training.fit:Loop"):
        refuses((about_is(model={"by": by, "args": {"command": "touch hacked"}}), by))
    refuses(
        (broken(lambda: rewritten(good, more=torch.zeros(1))), "more"),
        (broken(lambda: rewritten(good, **{"head.bias": torch.zeros(4)})), r"head.bias \(4,\)"),
        error=BadCheckpoint,
    )


OLD = """{"paper": "", "made": {"by": "companion.models.sa2vp.baselines:VPT", "args": {
"backbone": {"by": "companion.backbones:build", "args": {"name": "vit_tiny_patch16_224", "weights": "random",
  "download": false, "img_size": 32, "depth": 1, "embed_dim": 48, "num_heads": 3}},
"classes": 3, "tokens": 8, "deep": true, "dropout": 0.1}},
"class_names": ["a", "b", "c"], "preprocessing": {"by": "companion.data.classification:crop_transform", "args": {
"input": {"by": "companion.backbones:Input", "args": {"size": 32, "mean": {"tuple": [0.5, 0.5, 0.5]},
  "std": {"tuple": [0.25, 0.25, 0.25]}}}, "train": false}}}"""


def test_a_file_of_version_0_2_loads(tmp_path: Path) -> None:
    model, path = trained("VPT"), tmp_path / "m.safetensors"

    def written(about: str, form: str = "1") -> Path:
        save_file({n: x.clone() for n, x in saving._tensors(model).items()}, path, {"companion": form, "model": about})
        return path

    again = companion.load(written(OLD))
    assert repr(again) == repr(model) and again.class_names == ("a", "b", "c")
    assert torch.equal(again.transform(picture()), TRANSFORMS["crop"][1](picture()))
    moved = OLD.replace("sa2vp.baselines:VPT", "layers.vpt:VPT")
    refuses((lambda: companion.load(written(moved)), "layers.vpt:VPT"), error=BadParameter)
    refuses(
        (lambda: companion.load(written(OLD, "99")), "version 0.2"),
        (lambda: companion.load(written("{")), "m.safetensors"),
        (lambda: save_file({"a": torch.zeros(1)}, path) or companion.load(path), "m.safetensors"),
        (lambda: companion.load(tmp_path / "none.safetensors"), "none.safetensors"),
        error=CorruptFile,
    )


def test_no_weights_are_looked_up(tmp_path: Path) -> None:
    """Whatever a config says: it is in a file."""
    path = companion.save(MODELS["VPT"](), tmp_path / "m")
    backbone = '"backbone": {"by": "companion.backbones:build", "args": {'
    text = json.dumps(header(path))
    assert text.count(backbone) == 1
    rewritten(path, text.replace(backbone, f'{backbone}"weights": "/etc/passwd", "download": true, '))
    assert type(companion.load(path)) is vpt.VPT


def test_a_config_names_no_other_setting_of_a_text_encoder(tmp_path: Path) -> None:
    """`attn_implementation` of transformers may name code on a hub."""
    path = companion.save(MODELS["MetaSegNet with BERT"](), tmp_path / "m")
    text = json.dumps(header(path))
    assert "attn_implementation" not in text and text.count('"bert": {') == 1
    rewritten(path, text.replace('"bert": {', '"bert": {"attn_implementation": "a/kernel", '))
    refuses((lambda: companion.load(path), "attn_implementation"), error=CompanionError)


def test_a_model_goes_to_the_hub_and_comes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a folder in place of the hub."""
    hub, model = tmp_path / "hub", trained("SA²VP")

    def upload(api: Any, *, repo_id: str, folder_path: Path, **options: Any) -> str:
        shutil.copytree(folder_path, hub / repo_id)
        return repo_id

    def download(name: str, *, allow_patterns: list[str], **options: Any) -> str:
        if not (hub / name).exists():
            raise ValueError(f"404 {name}")
        shutil.copytree(hub / name, local := tmp_path / "cache" / name)
        for file in local.iterdir():
            if not any(file.match(pattern) for pattern in allow_patterns):
                file.unlink()
        return str(local)

    monkeypatch.setattr(
        HfApi, "create_repo", lambda self, repo_id, **options: RepoUrl(f"https://huggingface.co/{repo_id}")
    )
    monkeypatch.setattr(HfApi, "upload_folder", upload)
    monkeypatch.setattr(saving, "snapshot_download", download)
    model.push_to_hub("me/plain", private=True)
    model.save_pretrained(tmp_path / "flowers", class_names=CLASSES)
    model.push_to_hub("me/flowers")
    (hub / "me" / "flowers" / "evil.py").write_text("")
    again = type(model).from_pretrained("me/flowers")
    assert repr(again) == repr(model) and again.class_names == CLASSES
    assert not (tmp_path / "cache" / "me" / "flowers" / "evil.py").exists()
    model.save_pretrained(tmp_path / "named", class_names=["a", "b", "c"], push_to_hub=True, repo_id="me/named")
    assert companion.load("me/named").class_names == ("a", "b", "c") and companion.load("me/plain").class_names == ()
    refuses(
        (lambda: companion.load("me/none"), "me/none.*404"),
        (lambda: companion.load("../me/none"), "no such folder"),
        error=CorruptFile,
    )
    refuses((lambda: vpt.VPT.from_pretrained(tmp_path / "named"), "SA2VP.*VPT"), error=BadParameter)


@pytest.mark.parametrize("name", ["SA²VP", "DPLQ", "ECAMP's classifier"])
def test_the_card_has_paper_data_limits_and_citation(name: str, tmp_path: Path) -> None:
    hostile = ["*rose*", "<b>tulip</b>", "lily"]
    card = (companion.save(trained(name), tmp_path / "m", class_names=hostile) / "README.md").read_text()
    assert card.startswith("---\n") and "library_name: companion" in card and "companion.load(" in card
    assert all(f"## {part}\n" in card for part in ("Data", "Limits", "Citation"))
    assert "<b>" not in card and "*rose*" not in card.replace("\\*", "") and saving.LIMITS in card
    assert ("arxiv.org" in card) == (name != "ECAMP's classifier")  # a ViT of timm: of no paper
    (tmp_path / "m" / "README.md").write_text("mine")
    companion.save(trained(name), tmp_path / "m")
    assert (tmp_path / "m" / "README.md").read_text() == "mine"

"""DMT's teachers and ancestors: cases recorded from MAE, MoCo v3, iBOT, DINO, G2SD, DMAE and TinyMIM.

DMT itself has no public code. The models it distils and the ancestors of its losses are checked.
"""

from __future__ import annotations

import re
import types
from importlib.machinery import SourceFileLoader
from pathlib import Path

import torch
from torch import Tensor, nn

from .legacy import Case, folder, run
from companion.models.layers import dino
from companion.models.layers.pos_embed import sincos_table
from companion.models.layers.state_dicts import load_official
from companion.models.dmt import teachers
from companion.models.dmt.teachers import MAE, contrastive_loss, mlp
from companion.models.dmt.vit import ViT, encoder_state


def outputs(case: Case) -> dict[str, Tensor]:
    """The recorded quantities of any case, by our code, in the order of the forward pass."""
    kinds = {
        "dino_head": _head,
        "dino": _dino,
        "dmae": _ancestor,
        "g2sd": _ancestor,
        "ibot_loss": _ibot_loss,
        "ibot": _ibot,
        "mae": _mae,
        "mocov3_contrastive": _contrast,
        "mocov3_heads": _moco_heads,
        "mocov3": _moco,
        "sincos": _tables,
        "tinymim": _ancestor,
    }
    with torch.no_grad():
        return run(kinds, case)


def read(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint; of a full training checkpoint the encoder, by its own names."""
    state = teachers.read(path)
    wrapped = any(name.startswith(("module.", "base_encoder.", "backbone.")) for name in state)
    return encoder_state(state) if wrapped else state


def part(case: Case, name: str, tokens: Tensor, usual: int) -> Tensor:
    """The recorded part of tokens (B, N, D): every `usual`-th unless case.json has another step, the first channels."""
    recorded = case.recorded[name].shape
    told = re.search(r"every (\d+)", str(case.facts.get("outputs", {}).get(name, "")))
    step, count = int(told[1]) if told else usual, tokens.shape[-2]
    if -(-count // step) != recorded[-2]:
        step = next((step for step in range(1, count + 1) if -(-count // step) == recorded[-2]), usual)
    return tokens[..., ::step, : recorded[-1]]


def _mae(case: Case) -> dict[str, Tensor]:
    config = case.facts["config"]
    trace: dict[str, Tensor] = {}
    model = MAE.from_official(case.state, config["num_heads"], config["decoder_num_heads"])
    model.mask_ratio, model.normalise = config.get("mask_ratio", 0.75), config.get("norm_pix_loss", True)
    images = case.input("image")
    noise = case.input("mask_noise")
    loss, full = model(images, noise, trace), model.encoder(images)
    return {
        "mask": trace["hidden"],
        "ids_restore": noise.argsort(1).argsort(1),
        "latent": part(case, "latent", trace["latent"], 1),
        "latent_cls": trace["latent"][:, 0],
        "pred": part(case, "pred", trace["pixels"], 4),
        "loss": loss,
        "full_tokens": part(case, "full_tokens", full[:, 1:], 4),
        "full_cls": full[:, 0],
    }


def _moco(case: Case) -> dict[str, Tensor]:
    tokens = ViT.from_official(case.state, case.facts["config"].get("num_heads"))(case.input("image"))
    return {"cls": tokens[:, 0], "tokens": part(case, "tokens", tokens[:, 1:], 3)}


def _ibot(case: Case) -> dict[str, Tensor]:
    model = ViT.from_official(case.state, case.facts["config"]["num_heads"])
    images, mask = case.input("image"), case.input("mask") > 0.3
    clean, masked, other = model(images), model(images, masked=mask), model(case.input("image_other"))
    last = model.hidden(images[:1], range(-len(case.recorded["inter_cls"]), 0))
    return {
        "cls": clean[:, 0],
        "tokens": part(case, "tokens", clean[:, 1:], 3),
        "masked_cls": masked[:, 0],
        "masked_tokens": part(case, "masked_tokens", masked[:, 1:], 3),
        "last_attention_cls": model.attention(images[:1]),
        "other_size_cls": other[:, 0],
        "other_size_tokens": part(case, "other_size_tokens", other[:, 1:], 1),
        "inter_cls": torch.cat([model.norm(x)[:, 0] for x in last]),
    }


def _dino(case: Case) -> dict[str, Tensor]:
    model = ViT.from_official(case.state, case.facts["config"].get("num_heads"))
    images = case.input("image")
    tokens = model(images)
    return {
        "cls": tokens[:, 0],
        "tokens": part(case, "tokens", tokens[:, 1:], 3),
        "last_attention_cls": model.attention(images),
        "other_size_cls": model(case.input("image_other"))[:, 0],
    }


def _tables(case: Case) -> dict[str, Tensor]:
    config = case.facts["config"]
    tables = {kind: sincos_table(config["embed_dim"], config["grid"], kind)[0] for kind in ("mae", "mocov3")}
    return {kind: part(case, kind, table, 5) for kind, table in tables.items() if kind in case.recorded}


def _head(case: Case) -> dict[str, Tensor]:
    return {"out": dino.Head.from_official(case.state)(case.input("tokens"))}


def _moco_heads(case: Case) -> dict[str, Tensor]:
    config = case.facts["config"]
    heads = nn.ModuleDict(
        {
            "projector": mlp(config["in"], config["hidden"], config["out"], 3),
            "predictor": mlp(config["out"], config["hidden"], config["out"], 2),
        }
    )
    names = {name: name for name in heads.state_dict() if not name.endswith("num_batches_tracked")}
    load_official(heads, case.state, names, "MoCo v3's heads")
    projection = heads.train()["projector"](case.input("feature"))
    return {"projection": projection, "prediction": heads["predictor"](projection)}


def _contrast(case: Case) -> dict[str, Tensor]:
    q1, q2, k1, k2 = (case.input(key) for key in ("q1", "q2", "k1", "k2"))
    both = [contrastive_loss(q, k, case.facts["config"]["T"]) for q, k in ((q1, k2), (q2, k1))]
    return {"loss_q1_k2": both[0], "loss_q2_k1": both[1], "loss": both[0] + both[1]}


def _ibot_loss(case: Case) -> dict[str, Tensor]:
    config = case.facts["config"]
    (temperature,) = {value for name, value in config.items() if name.startswith(("teacher_temp", "patch_temp"))}
    centre, patch_centre = 0.1 * case.input("center"), 0.1 * case.input("center2")
    outputs = centre.shape[-1]
    loss = dino.Loss(outputs, student=config["student_temp"], teacher=temperature, momentum=config["center_momentum"])
    loss.centre, loss.patch_centre = centre, patch_centre
    keys = ("student_cls", "student_local_cls", "teacher_cls", "student_patch", "teacher_patch")
    student, local, teacher, student_patches, teacher_patches = (case.input(key) for key in keys)
    masks = (case.input("mask") > 0.3).flatten(1)
    crops = config["global_crops"] + config["local_crops"]
    classes = loss(torch.cat([student, local]), teacher, crops) * config["lambda1"]
    patches = loss.patches(student_patches, teacher_patches, masks) * config["lambda2"]
    return {
        "cls": classes,
        "patch": patches,
        "loss": classes + patches,
        "center_after": loss.centre,
        "center2_after": loss.patch_centre,
    }


def _ancestor(case: Case) -> dict[str, Tensor]:
    """By the checkout's `tests/parity/dmt/ancestors.py`: the library itself needs none of them."""
    module = types.ModuleType("dmt_ancestors")
    SourceFileLoader(module.__name__, str(folder() / "dmt" / "ancestors.py")).exec_module(module)
    return module.CASES[case.name.partition("_")[0]](case, case.input, part)

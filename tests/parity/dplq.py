"""DPLQ: the cases recorded from caoql98/DPLQ at 3d78bb5, the baselines from caoql98/DCPL, the MAE from RVSA."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from . import fill
from .legacy import Case, run
from companion.models.layers.clip_prompting import CoCoOp, CoOp, MaPLe, PromptLearner
from companion.models.layers.quaternion import QuaternionLinear, hamilton, real_matrix
from companion.models.layers.state_dicts import official_state
from companion.models.dplq.model import DPLQ, MAE


def outputs(case: Case) -> dict[str, Tensor]:
    """The recorded quantities of any DPLQ case, by our code, in the order of the forward pass."""
    kinds = {
        "QuaternionLinearAutograd": _quaternion,
        "CustomCLIP of the official trainer/maple.py": _model,
        "baseline coop": partial(_baseline, CoOp),
        "baseline cocoop": partial(_baseline, CoCoOp),
        "baseline maple": partial(_baseline, MaPLe),
        "MaskedAutoencoderViT": _mae,
    }
    return run(kinds, case, case.facts["module"])  # the authors' class and file


def recorded(case: Case) -> dict[str, Tensor]:
    """The recorded outputs, and from case.json the gradient norm of every trainable parameter."""
    norms = case.facts.get("train_mode_grad_norms", {})
    return case.recorded | {f"grad:{name}": torch.tensor(norm) for name, norm in norms.items()}


def _input(case: Case, name: str) -> Tensor:
    key = f"input:{name}"  # these cases include the prefix of `fill`
    return case.values(key, *case.facts["inputs"][key])


def _state(case: Case) -> dict[str, Tensor]:
    """The official state dict; CLIP's scale has no axes; `fill` returns it as a plain number."""
    if case.given is not None:
        return dict(case.given)
    return {n: torch.as_tensor(a) for n, a in fill.state_dict(case.names, case.seed).items()}


def _quaternion(case: Case) -> dict[str, Tensor]:
    state, found = _state(case), {}
    for name, sizes in case.facts["layers"].items():
        layer = QuaternionLinear(sizes["in_features"], sizes["out_features"])
        layer.weight.data = torch.stack([state[f"{name}.{part}_weight"] for part in "rijk"])
        layer.bias.data = state[f"{name}.bias"]
        x = _input(case, name)
        half = x[..., x.shape[-1] // 2 :]
        found[f"{name}.full"] = layer(x)
        found[f"{name}.zero_padded"] = layer(torch.cat([torch.zeros_like(half), half], -1))
        found[f"{name}.real_matrix"] = real_matrix(layer.weight)
        layer(x).square().sum().backward()
        found |= {f"{name}.grad.{part}_weight": g for part, g in zip("rijk", layer.weight.grad, strict=True)}
        found[f"{name}.grad.bias"] = layer.bias.grad
    return found | {"hamilton": hamilton(_input(case, "q0"), _input(case, "q1"))}


def _gradients(model: PromptLearner, case: Case, logits: Tensor) -> dict[str, Tensor]:
    """The loss, the gradients by the authors' names, and the norm of each as "grad:<name>"."""
    labels = case.facts.get("labels") or case.facts["input_rules"]["labels"]
    value = F.cross_entropy(logits, torch.tensor(labels))
    value.backward()
    gradients = {name: p.grad for name, p in model.trained().items() if p.grad is not None}
    grads = official_state(gradients, {n: o for n, o in model._names().items() if n in gradients})
    found = {"loss": value} | {f"grad.{name}": grad for name, grad in grads.items()}
    return found | {f"grad:{name}": grad.norm() for name, grad in grads.items()}


def _learner(kind: type[PromptLearner], case: Case) -> PromptLearner:
    config = case.facts["config"]
    heads = (config["vision_heads"], config["text_heads"])
    return kind.from_official(_state(case), ends=case.facts["eot_positions"], heads=heads)


def _baseline(kind: type[PromptLearner], case: Case) -> dict[str, Tensor]:
    model = _learner(kind, case)
    logits = model(_input(case, "image"))
    return {"logits": logits} | _gradients(model, case, logits)


def _model(case: Case) -> dict[str, Tensor]:
    model = _learner(DPLQ, case)
    images, eps = _input(case, "image"), _input(case, "noise")
    domain = (_input(case, "domain_tokens") + 0.5).mean(1)
    with torch.no_grad():
        prompts = model.prompts(domain, eps)
        image, text = model.encode(images, prompts)
        silent = model(images, domain, torch.zeros_like(eps))
    found = {
        "meta_net": prompts.bias,
        "ctx": prompts.context,
        "shared_ctx": prompts.first_image,
        "visual_prompt_first": prompts.deep_image[0],
        "visual_prompt_last": prompts.deep_image[-1],
        "image_features": image,
        "text_features": text,
    }
    logits = model(images, domain, eps)
    return found | {"logits": logits, "logits_without_noise": silent} | _gradients(model, case, logits)


@torch.no_grad()
def _mae(case: Case) -> dict[str, Tensor]:
    model = MAE.from_official(_state(case))
    latent = model.encode(_input(case, "image"))
    tokens = model.decode(latent)[:, 1:]

    def size(name: str, axis: int) -> int:
        return case.facts["outputs"][name]["shape"][axis]

    return {
        "latent_cls": latent[:, 0],
        "latent_slice": latent[:, 1:][:, : size("latent_slice", 1), : size("latent_slice", 2)],
        "tokens_slice": tokens[:, : size("tokens_slice", 1), : size("tokens_slice", 2)],
        "domain_features": model(_input(case, "image")),
        "pixel_prediction_mean": model.decoder_pred(tokens).mean(1),
    }

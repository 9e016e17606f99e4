"""PromptPAR: a whole model with its gradients, and the authors' checkpoints."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from companion.backbones import read_state
from companion.models.layers.attend import attention_map
from companion.models.layers.clip_prompting import embed_texts
from companion.models.layers.state_dicts import official_state
from companion.models.promptpar.model import Output, PromptPAR, loss, prompted_text, read_checkpoint, weighted_loss

from .runner import Case


def read(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint: the authors' file of two state dicts, or one .safetensors."""
    return read_state(path) if Path(path).suffix == ".safetensors" else read_checkpoint(path)


def whole(case: Case) -> dict[str, Tensor]:
    """Outputs, losses and gradients, as released: with the text tower's prompts in the graph."""
    s, ids = case.facts["settings"], case.input("ids")
    model = PromptPAR.from_official(case.state, s["sentences"], lambda _: ids, heads=s["heads"])
    texts, cached = embed_texts(lambda _: ids, model.clip, s["sentences"]), model.text_features
    with torch.no_grad():
        other = prompted_text(model.clip, texts, torch.randn(model.text_prompts.shape))
    model.text_features = prompted_text(model.clip, texts, model.text_prompts.requires_grad_())

    tokens, last = model.encode(case.input("images"))
    regions = tokens[:, model.class_positions]
    cosines, shares = model.similarities(regions)
    x, fused = model.fuse(tokens)
    logits = model.heads(x)
    released, final = model.bn(logits), model.agg_bn(model.aggregate(shares))
    found = {
        "text_features": cached,
        "text_features_other_prompts": other,
        "last_attention_rows": model.tower_map(last).mean(1)[:, s["attention_rows"]],
        "visual_tokens_slice": tokens[:, s["tokens"]],
        "visual_tokens_mean_std": torch.stack([tokens.mean((1, 2)), tokens.std((1, 2))], -1),
        "all_class": regions,
        "logits_per_image": cosines,
        "final_similarity_batch": final,
        "final_similarity_each": model.agg_bn(torch.cat([model.aggregate(share[None]) for share in shares])),
        "mm_attention_headmean": attention_map(fused["q"], fused["k"]).mean(1),
        "pre_bn_logits": logits,
        "bn_logits": released,
    }
    labels, ratio = case.input("targets"), case.input("ratio")
    total = loss(Output(released, final), labels, ratio)
    total.backward()
    found["losses"] = torch.stack([weighted_loss(released, labels, ratio), weighted_loss(final, labels, ratio), total])
    found |= _gradients(case, model)
    with torch.no_grad():
        if tokens.shape[-1] == len(model.norm.weight):  # the release of 2023 has no `visual_embed`
            model.visual_embed = nn.Identity()
            found["bn_logits_2023"] = model.bn(model.heads(model.fuse(tokens)[0]))
    return found


def _gradients(case: Case, model: PromptPAR) -> dict[str, Tensor]:
    """Slices and norms of gradients, by the authors' names; that of the text prompts is exactly zero."""
    s = case.facts["settings"]
    ours = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    official = official_state(ours, {n: o for n, o in model.official_names().items() if n in ours})
    norms = {name.partition(".")[2]: grad.norm() for name, grad in official.items()}
    in_order, prompts = torch.stack([norms[name] for name in s["order"]]), model.prompts.grad
    layers = [0, len(prompts) // 2, len(prompts) - 1]
    return {
        "grad_norms": in_order,
        "grad_model_norms": in_order,
        "grad_prompt_deep": prompts[:, :, : s["channels"].get("grad_prompt_deep")],
        "grad_prompt_deep_slice": prompts[layers][:, s["prompts"], : s["channels"].get("grad_prompt_deep_slice")],
        "grad_prompt_deep_norm_per_layer": prompts.flatten(1).norm(dim=1),
        "grad_prompt_text_absmax": model.text_prompts.grad.abs().amax((1, 2, 3)),
        "grad_part_class": model.region_tokens.grad,
        "grad_part_class_embedding_norm": model.region_tokens.grad.norm(dim=1),
        "grad_temperature": model.temperature.grad[None],
    }

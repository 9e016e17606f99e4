"""PromptPAR: the cases recorded from Event-AHU/OpenPAR at 210ff55, folder PromptPAR."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from companion.backbones import read_state
from companion.evaluation.metrics.attributes import evaluate
from .legacy import Case, run
from companion.models.layers.clip_prompting import Texts, embed_texts
from companion.models.layers.state_dicts import load_official, official_state
from companion.models.promptpar.model import Output, PromptPAR, label_weights, loss, prompted_text, read_checkpoint, region_mask, weighted_loss
from companion.models.promptpar.recipe import by_epoch


def outputs(case: Case) -> dict[str, Tensor]:
    """The recorded quantities of any PromptPAR case, by our code, in the order of the forward pass."""
    kinds = {
        "Transformer.build_visual_mask": _masks,
        "visual Transformer": _tower,
        "CLIP.forward_aggregate": _aggregate,
        "TransformerClassifier": _fusion,
        "CEL_Sigmoid": _losses,
        "get_pedestrian_metrics": _metrics,
    }
    config = case.facts["config"]
    if "epochs" in config:
        return _schedules(case)
    if "dataset" in config:
        return _model(case)
    module = config if isinstance(config, str) else config.get("module", "")  # the authors' class or function
    return run(kinds, case, module)


def read(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint: the authors' file of two state dicts, or one .safetensors."""
    return read_state(path) if Path(path).suffix == ".safetensors" else read_checkpoint(path)


def _listed(case: Case, output: str, after: str = "") -> list[int]:
    """The numbers in the brackets of an output's description that follow `after`; [] if there are none."""
    text = case.facts["outputs"].get(output, {}).get("what", "")
    found = re.search(re.escape(after) + r"\s*\[([\d,\s]+)\]", text)
    return [int(n) for n in found[1].split(",")] if found else []


def _values(case: Case, key: str) -> Tensor:
    """An input whose shape is in brackets in its description."""
    shape = re.findall(r"\[([\d,\s]+)\]", case.facts["inputs"][key])[0]
    return case.values(f"input:{key}", *(int(n) for n in shape.split(",")))


# --- parts ------------------------------------------------------------------------------------------------------------


def _small(
    attributes: int,
    *,
    embed: int = 8,
    width: int = 8,
    layers: int = 1,
    heads: int = 1,
    grid: int = 16,
    dim: int = 64,
    fusion_heads: int = 1,
    **options,
) -> PromptPAR:
    """A model with random weights whose CLIP is as small as the case allows, on `grid` x `grid` patches."""
    vision = CLIPVisionCfg(layers, width, width // heads, patch_size=14, image_size=14 * grid)
    clip = CLIP(embed, vision, CLIPTextCfg(2, 1, width=8, heads=1, layers=1), quick_gelu=True)
    blocks = max(1, options.get("mm_layers", 1))
    fusion = VisionTransformer(img_size=16, embed_dim=dim, depth=blocks, num_heads=fusion_heads, num_classes=0)
    texts = Texts(torch.zeros(attributes, 2, 8), torch.ones(attributes, dtype=torch.long))
    usual = {"official_quirks": True, "visual_embed": True, "depth": layers}
    return PromptPAR(clip, texts, None, fusion, **(usual | options)).eval()


def _load(model: PromptPAR, case: Case, prefix: str = "") -> None:
    """Those of the model's tensors that the case has; `prefix` goes before its names."""
    state = {prefix + name: value for name, value in case.state.items()}
    if (deep := "clip_model.visual.transformer.prompt_deep") in state:
        state[deep] = state[deep].squeeze(2)
    names = {
        ours: official
        for ours, official in model.official_names().items()
        if (official if isinstance(official, str) else official[0]) in state
    }
    load_official(model, state, names, "PromptPAR (the authors' names)", ignored=("model.",))


def _masks(case: Case) -> dict[str, Tensor]:
    regions, overlap = (
        int(re.findall(rf"{name} (\d+)", case.facts["config"])[0]) for name in ("div_num", "overlap_row")
    )
    found = {}
    for name in case.facts["outputs"]:
        patch, prompts = (int(n) for n in re.findall(r"mask_[lb](\d+)_p(\d+)", name)[0])
        grid = (224 // patch, 224 // patch)
        found[name] = region_mask(grid, prompts, regions, overlap, official_quirks=name.endswith("_quirk"))
    return found


@torch.no_grad()
def _tower(case: Case) -> dict[str, Tensor]:
    config, found = case.facts["config"], {}
    shared = dict(
        attributes=1,
        width=config["width"],
        layers=config["layers"],
        heads=config["heads"],
        prompts=config["vis_prompt"],
        depth=config["vis_depth"],
        grid=config["grid"],
    )
    variants: dict[str, dict[str, Any]] = {"": {}, "_nomask": {"masked": False}, "_nodiv": {"regions": 0}}
    for ending, options in variants.items():
        model = _small(**shared, **options)
        _load(model, case, "clip_model.visual.")
        if f"tokens{ending}" not in case.facts["outputs"]:
            continue
        rows, seen = _listed(case, f"tokens{ending}", "rows"), list[Tensor]()
        given = _values(case, "tokens_nodiv" if ending == "_nodiv" else "tokens")
        x = model.tower(given.transpose(0, 1), seen)
        found[f"tokens{ending}"] = x[:, rows].transpose(0, 1)
        found[f"rows_norm{ending}"] = x.norm(dim=-1).mT
        if ending != "_nodiv":
            found[f"all_class{ending}"] = x[:, model.class_positions]
        found[f"attention{ending}"] = seen[0][:, rows]
    return found


@torch.no_grad()
def _aggregate(case: Case) -> dict[str, Tensor]:
    config = case.facts["config"]
    model = _small(config["A"], embed=config["E"], threshold=config["ag_threshold"])
    _load(model, case)
    model.clip.logit_scale.fill_(case.facts["scalars"]["clip_model.logit_scale"])
    regions = case.values("input:all_class", config["B"], 5, config["E"])
    model.text_features = case.values("input:text_features", config["A"], config["E"])
    logits, shares = model.similarities(regions)
    found = {"logits_per_image": logits, "similarity": shares, **_final(model, shares)}
    return found | {"final_similarity_batch_trainbn": model.get_submodule("agg_bn").train()(model.aggregate(shares))}


def _final(model: PromptPAR, shares: Tensor) -> dict[str, Tensor]:
    """The released aggregation of a batch, and of the same images one at a time."""
    norm = model.get_submodule("agg_bn")
    each = torch.cat([norm(model.aggregate(share[None])) for share in shares])
    return {"final_similarity_batch": norm(model.aggregate(shares)), "final_similarity_each": each}


@torch.no_grad()
def _fusion(case: Case) -> dict[str, Tensor]:
    config = case.facts["config"]
    found: dict[str, Tensor] = {}
    attributes, embed = config["A"], config["embed"]
    tokens, layers = _values(case, "visual_tokens"), config["mm_layers"]
    variants: dict[str, dict[str, Any]] = {"": {}, "_2023": {"visual_embed": False}, "_linear": {"mm_layers": 0}}
    for ending, options in variants.items():
        if f"bn_logits{ending}" not in case.facts["outputs"]:  # without `visual_embed` embed and dim are equal
            continue
        sizes = {"embed": embed, "dim": config["dim"], "fusion_heads": config["heads"], "mm_layers": layers} | options
        model = _small(attributes, prompts=config["visual_tokens"] - 257, regions=0, **sizes)
        _load(model, case)
        model.text_features = _values(case, "text_features")
        seen: list[Tensor] = []
        fused = model.fuse(tokens, seen)
        logits = model.heads(fused)
        if not ending:
            found |= {"attention": seen[0], "normed_attribute_tokens": fused, "pre_bn_logits": logits}
        found[f"bn_logits{ending}"] = model.bn(logits)
    return found


def _losses(case: Case) -> dict[str, Tensor]:
    shape = (case.facts["config"]["B"], case.facts["config"]["A"])
    logits = (2 * case.values("input:logits", *shape)).requires_grad_()
    labels = (case.values("input:targets", *shape) > 0.5).float()
    ratio = 0.02 + 0.9 * (2 * case.values("input:ratio", shape[1])).sigmoid()
    value = weighted_loss(logits, labels, ratio)
    value.backward()
    plain = nn.functional.binary_cross_entropy_with_logits(logits, labels, reduction="none").sum(1).mean()
    return {
        "targets": labels,
        "ratio": ratio,
        "weights": label_weights(labels, ratio),
        "loss": value,
        "loss_unweighted": plain,
        "grad_logits": logits.grad,
    }


def _metrics(case: Case) -> dict[str, Tensor]:
    labels, probabilities = (case.recorded[name].cpu().numpy() for name in ("gt", "probs"))
    found = {"gt": case.recorded["gt"], "probs": case.recorded["probs"]}  # stored, not filled: they are the inputs
    for threshold in (0.45, 0.5):
        scores = evaluate(labels, probabilities, threshold)
        found[f"label_ma_{threshold}"] = torch.from_numpy(scores.balanced / 100)
        found[f"label_f1_{threshold}"] = torch.from_numpy(scores.f1 / 100)
    return found


def _schedules(case: Case) -> dict[str, Tensor]:
    config, found = case.facts["config"], {}
    for name in ("heads", "prompts"):
        lr, warmup = re.findall(r"lr ([\d.e-]+), warm-up (\d+)", config[name])[0]
        found[name] = torch.from_numpy(by_epoch(int(warmup))(float(lr), config["epochs"], 1))
    return found


# --- the whole model --------------------------------------------------------------------------------------------------


def _model(case: Case) -> dict[str, Tensor]:
    config, facts = case.facts["config"], case.facts
    rows = facts["inputs"]["token_ids_without_padding"]
    ids = torch.tensor([row + [0] * (77 - len(row)) for row in rows])
    state = dict(case.state) | {name: torch.tensor(value) for name, value in facts["scalars"].items()}
    heads = (
        (config["vision_heads"], config["text_heads"], config.get("fusion_heads", 12))
        if "vision_heads" in config
        else None
    )
    sentences = facts["sentences"]
    model = PromptPAR.from_official(state, sentences, lambda _: ids, heads=heads)
    del state

    texts = embed_texts(lambda _: ids, model.clip, sentences)
    cached = model.text_features
    with torch.no_grad():
        other = prompted_text(model.clip, texts, torch.randn(model.text_prompts.shape))
    # as released, with the text tower's prompts in the graph: their gradient is what the case recorded
    prompts = model.text_prompts.requires_grad_()
    model.text_features = prompted_text(model.clip, texts, prompts)

    maps: list[Tensor] = []
    mixed: list[Tensor] = []
    tokens = model.forward_features(case.input("images"), maps)
    regions = tokens[:, model.class_positions]
    similarity, shares = model.similarities(regions)
    found = {
        "text_features": cached,
        "text_features_other_prompts": other,
        "last_attention_rows": maps[0][:, _listed(case, "last_attention_rows", "query rows")],
        "visual_tokens_slice": tokens[:, _listed(case, "visual_tokens_slice", "tokens")],
        "visual_tokens_mean_std": torch.stack([tokens.mean((1, 2)), tokens.std((1, 2))], -1),
        "all_class": regions,
        "logits_per_image": similarity,
        **_final(model, shares),
    }
    fused = model.fuse(tokens, mixed)
    logits = model.heads(fused)
    released = model.bn(logits)
    found |= {"mm_attention_headmean": mixed[0], "pre_bn_logits": logits, "bn_logits": released}
    with torch.no_grad():
        if tokens.shape[-1] == len(model.norm.weight):
            embed, model.visual_embed = model.visual_embed, nn.Identity()
            found["bn_logits_2023"] = model.bn(model.heads(model.fuse(tokens)))
            model.visual_embed = embed

    ratio = 0.05 + 0.9 * case.values("input:ratio", len(sentences)).sigmoid()
    labels = (case.values("input:targets", len(tokens), len(sentences)) > 0).float()
    final = model.get_submodule("agg_bn")(model.aggregate(shares))
    heads_loss, region_loss = weighted_loss(released, labels, ratio), weighted_loss(final, labels, ratio)
    total = loss(Output(released, final), labels, ratio)
    total.backward()
    return found | {"losses": torch.stack([heads_loss, region_loss, total])} | _gradients(model, case)


def _gradients(model: PromptPAR, case: Case) -> dict[str, Tensor]:
    """The recorded gradients: slices and norms, by the authors' names, and that of the text prompts: exactly zero."""
    ours = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    official = official_state(ours, {n: o for n, o in model.official_names().items() if n in ours})
    norms = {name.partition(".")[2]: grad.norm() for name, grad in official.items()}
    prompts, facts = model.prompts.grad, case.facts
    if "grad_norm_order" in facts:
        return {
            "grad_norms": torch.stack([norms[name] for name in facts["grad_norm_order"]]),
            "grad_prompt_deep": prompts[:, :, : facts["outputs"]["grad_prompt_deep"]["shape"][-1]],
            "grad_part_class": model.region_tokens.grad,
        }
    order = re.findall(r"[\w.]+", facts["outputs"]["grad_model_norms"]["what"].removeprefix("order: "))
    layers, part = [0, len(prompts) // 2, len(prompts) - 1], "grad_prompt_deep_slice"
    return {
        "grad_prompt_deep_norm_per_layer": prompts.flatten(1).norm(dim=1),
        "grad_prompt_deep_slice": prompts[layers][
            :, _listed(case, part, "prompts"), : facts["outputs"][part]["shape"][-1]
        ],
        "grad_prompt_text_absmax": model.text_prompts.grad.abs().amax((1, 2, 3)),
        "grad_part_class_embedding_norm": model.region_tokens.grad.norm(dim=1),
        "grad_temperature": model.get_parameter("temperature").grad[None],
        "grad_model_norms": torch.stack([norms[name] for name in order]),
    }

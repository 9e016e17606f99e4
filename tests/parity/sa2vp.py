"""SA²VP: the cases recorded from tommy-xq/SA2VP at 35674e7."""

from __future__ import annotations

import json
import math
import re

import torch
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from .legacy import Case, run
from companion.training.schedules import learning_rates
from companion.models.sa2vp.model import SA2VP, SA2VPSwin, two_pathway_loss


def outputs(case: Case) -> dict[str, Tensor]:
    """The recorded quantities of any SA²VP case, by our code, in the order of the forward pass."""
    kinds = {
        "CrossAttention of vit": _cross_attention,
        "Cross_Block of": _cross_block,
        "Embeddings of vit": _embeddings,
        "train_class_batch of": _loss_and_schedule,
        "Dual_model(SwinTransformer": _swin,
        "Dual_model(VisionTransformer": _vit,
    }
    return run(kinds, case, case.facts["module"])  # the authors' class and file


def _rows(case: Case, output: str) -> list[int]:
    """The recorded token rows of an output, from its description in case.json."""
    return json.loads(re.findall(r"rows (\[[\d, ]+\])", case.facts["outputs"][output])[0])


def _attention(case: Case) -> str:
    return "padded" if "_acc.py" in case.facts["module"] else "aligned"


def _single_block(case: Case, swin: bool) -> nn.Module:
    """A model at full width with the official tensors of one interaction in its first block."""
    config, state = case.facts["config"], case.state
    dim, heads = config["dim"], config["heads"]
    options = dict(width=config.get("inter_dim", 1), attention=_attention(case))
    side = math.isqrt(case.input("kv").shape[1])  # of the grid; a [CLS] token does not change it
    if swin:
        size = {"img_size": 4 * side, "window_size": 7 if side % 7 == 0 else side}
        backbone = SwinTransformer(embed_dim=dim, depths=(6,), num_heads=(heads,), num_classes=0, **size)
        model = SA2VPSwin(backbone, 1, stage=0, **options)
    else:
        backbone = VisionTransformer(img_size=16 * side, embed_dim=dim, depth=6, num_heads=heads, num_classes=0)
        model = SA2VP(backbone, 1, **options)
    block = _first_block(model)
    prefix = "attn." if "attn.to_out.weight" in state else ""
    for kind in ("weight", "bias"):
        if f"{prefix}qkv.{kind}" in state:
            qkv = state[f"{prefix}qkv.{kind}"]
        else:
            qkv = torch.cat([state[f"{prefix}to_{x}.{kind}"] for x in "qkv"])
        getattr(block.attn.qkv, kind).data = qkv
        getattr(block.attn.proj, kind).data = state[f"{prefix}to_out.{kind}"]
        if prefix:
            getattr(block.norm1, kind).data = state[f"attention_norm.{kind}"]
            for ours, official in (("norm", "ffn_norm"), ("down", "ffn.fc1"), ("up", "ffn.fc2")):
                getattr(getattr(model.adapters[0], ours), kind).data = state[f"{official}.{kind}"]
    return model.eval()


def _first_block(model: SA2VP | SA2VPSwin) -> nn.Module:
    return (model.backbone.layers[0] if isinstance(model, SA2VPSwin) else model.backbone).blocks[0]


def _attended(model: nn.Module, kv: Tensor, q: Tensor) -> Tensor:
    """The cross-attention of q on kv, both already normed, through the first block's projections."""
    attn = _first_block(model).attn

    def split(x: Tensor) -> Tensor:
        return attn.qkv(x).unflatten(-1, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4)

    _, k, v = split(kv)
    return attn.proj(model.cross(split(q)[0], k, v))


@torch.no_grad()
def _cross_attention(case: Case) -> dict[str, Tensor]:
    model = _single_block(case, swin=False)
    return {"out_rows": _attended(model, case.input("kv"), case.input("q"))[:, _rows(case, "out_rows")]}


@torch.no_grad()
def _cross_block(case: Case) -> dict[str, Tensor]:
    swin = "swin" in case.facts["module"]
    model, kv, q = _single_block(case, swin), case.input("kv"), case.input("q")
    norm = _first_block(model).norm1
    attended = _attended(model, *(F.layer_norm(x, x.shape[-1:], norm.weight, norm.bias, 1e-6) for x in (kv, q)))
    recorded = attended[: len(case.recorded["attn_rows"]), _rows(case, "attn_rows")]
    return {"attn_rows": recorded, "out_rows": model.adapters[0](q + attended)[:, _rows(case, "out_rows")]}


@torch.no_grad()
def _embeddings(case: Case) -> dict[str, Tensor]:
    config, state = case.facts["config"], case.state
    dim = state["cls_token"].shape[-1]
    backbone = VisionTransformer(
        img_size=config["image"], patch_size=config["patch"], embed_dim=dim, depth=6, num_heads=1, num_classes=0
    )
    model = SA2VP(backbone, 1, config["inter_dim"]).eval()
    backbone = model.backbone
    backbone.pos_embed.data, backbone.cls_token.data = state["position_embeddings"], state["cls_token"]
    model.prompt.data = state["ppt"]
    for kind in ("weight", "bias"):
        getattr(backbone.patch_embed.proj, kind).data = state[f"patch_embeddings.{kind}"]
        getattr(model.prompt_proj, kind).data = state[f"ppt_proj.{kind}"]
    image, prompt = model.embed(case.input("image"))
    found = {"image_tokens_rows": image, "prompt_tokens_rows": prompt}
    return {name: tokens[:, _rows(case, name)] for name, tokens in found.items()}


def _loss_and_schedule(case: Case) -> dict[str, Tensor]:
    """The loss for given logits; the schedules are compared in the test, because case.json has them as numbers."""
    target = torch.tensor(case.facts["targets"])
    return {"loss": two_pathway_loss(case.input("logits_image"), case.input("logits_prompt"), target)}


def schedules(case: Case) -> dict[str, tuple[list[float], list[float]]]:
    """The learning rates at the recorded steps, by schedule: (ours, the authors')."""
    found = {}
    for name, official in case.facts["schedule"].items():
        base, final, epochs, iterations, warmup = (
            float(part.lstrip("abcdefghijklmnopqrstuvwxyz")) for part in name.split("_")
        )
        steps = int(epochs * iterations)
        rates = learning_rates("cosine", base, steps, int(warmup * iterations), final)
        found[name] = ([float(rates[i]) for i in official["steps"]], official["lr"])
    return found


def _gradients(model: nn.Module, case: Case, logits_image: Tensor, logits_prompt: Tensor) -> dict[str, Tensor]:
    """The loss and the norm of its gradient for every trained tensor, by official name."""
    value = two_pathway_loss(logits_image, logits_prompt, torch.tensor(case.facts["targets"]))
    value.backward()
    official = model.official_names()
    grads = {f"grad:{official[n]}": p.grad.norm() for n, p in model.trained().items() if p.grad is not None}
    return {"logits_image": logits_image, "logits_prompt": logits_prompt, "loss": value} | grads


def _vit(case: Case) -> dict[str, Tensor]:
    config = case.facts["config"]
    model = SA2VP.from_official(
        case.state, heads=config["heads"], patch=config["patch"], scale=config["add_scale"], attention=_attention(case)
    )
    images, found, rows = case.input("image"), {}, _rows(case, "*_into_blockN")
    fusion = _outputs(dict(enumerate(model.adapters)))
    with torch.no_grad():
        tokens = model.forward_intermediates(images)
    for i, pathways in enumerate(tokens):
        found[f"fusion_block{i}"] = fusion[i][0][:1, rows]
        after = f"into_block{i + 1}" if i + 1 < config["depth"] else "last"
        for pathway, x in zip(("image", "prompt"), pathways, strict=True):
            found[f"{pathway}_tokens_{after}"] = x[:1, rows]
    return found | _gradients(model, case, *model(images))


def _outputs(modules: dict) -> dict[object, list[Tensor]]:
    """The outputs of `modules` from here on, by name, one per call."""
    found: dict[object, list[Tensor]] = {name: [] for name in modules}
    for name, module in modules.items():
        module.register_forward_hook(lambda _, __, out, name=name: found[name].append(out.detach()))
    return found


def _swin(case: Case) -> dict[str, Tensor]:
    config = case.facts["config"]
    model = SA2VPSwin.from_official(
        case.state, image_size=config["image"], heads=tuple(config["heads"]), scale=config["add_scale"]
    )
    swin, images = model.backbone, case.input("image")
    seen = _outputs(
        {
            "embed": swin.patch_embed.norm,
            "after_stage2": swin.layers[2].downsample,
            "after_stage3": swin.layers[3].downsample,
            "after_stage4": swin.layers[3],
        }
    )
    logits = model(images)
    found = {}
    for name, parts in seen.items():
        # the pathways pass one after the other, or as the halves of one batch
        image, prompt = parts if len(parts) == 2 else parts[0].chunk(2)
        for pathway, x in (("image", image), ("prompt", prompt)):
            x = x[:1] if x.ndim == 3 else x[:1].flatten(1, 2)
            length = x.shape[1]
            rows = [0, 1, 55, 56, 3135] if name == "embed" else [0, 1, length // 2, length - 1]
            found[f"{pathway}_tokens_{name}"] = x[:, rows]
    return found | _gradients(model, case, *logits)

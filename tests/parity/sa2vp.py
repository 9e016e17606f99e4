"""SA²VP: parts that the model does not have under the authors' names, its interaction and its embeddings."""

from __future__ import annotations

import torch
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from torch.nn import functional as F

from companion.models.sa2vp import SA2VP, SA2VPSwin

from .runner import Case


@torch.no_grad()
def interaction(case: Case) -> dict[str, Tensor]:
    """The cross-attention of q on kv, and a whole interaction, by a model with the official tensors in block 0."""
    facts, state, kv, q = case.facts["settings"], case.state, case.input("kv"), case.input("q")
    dim, heads, side, options = facts["dim"], facts["heads"], facts["side"], {"attention": facts["attention"]}
    model: SA2VP | SA2VPSwin
    if facts["swin"]:
        size = {"img_size": 4 * side, "window_size": 7 if side % 7 == 0 else side}
        swin = SwinTransformer(embed_dim=dim, depths=(6,), num_heads=(heads,), num_classes=0, **size)
        model = SA2VPSwin(swin, 1, facts["width"], stage=0, **options).eval()
        block = model.backbone.layers[0].blocks[0]
    else:
        vit = VisionTransformer(img_size=16 * side, embed_dim=dim, depth=6, num_heads=heads, num_classes=0)
        model = SA2VP(vit, 1, facts["width"], **options).eval()
        block = model.backbone.blocks[0]
    whole = "attn.to_out.weight" in state  # a block, or its attention alone
    prefix = "attn." if whole else ""
    norm, adapter, attn = block.norm1, model.adapters[0], block.attn
    parts = {f"{prefix}to_out": attn.proj}
    if whole:
        parts |= {"attention_norm": norm, "ffn_norm": adapter.norm, "ffn.fc1": adapter.down, "ffn.fc2": adapter.up}
    for kind in ("weight", "bias"):
        joined = state.get(f"{prefix}qkv.{kind}")
        getattr(attn.qkv, kind).data = (
            torch.cat([state[f"{prefix}to_{x}.{kind}"] for x in "qkv"]) if joined is None else joined
        )
        for name, layer in parts.items():
            getattr(layer, kind).data = state[f"{name}.{kind}"]

    def split(x: Tensor) -> Tensor:
        x = F.layer_norm(x, x.shape[-1:], norm.weight, norm.bias, 1e-6) if whole else x
        return attn.qkv(x).unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)

    _, k, v = split(kv)
    attended = attn.proj(model.cross(split(q)[0], k, v))
    found = {"attn_rows": attended, "out_rows": adapter(q + attended) if whole else attended}
    return {name: found[name][: facts["images"][name], rows] for name, rows in facts["rows"].items()}


@torch.no_grad()
def embeddings(case: Case) -> dict[str, Tensor]:
    """Image and prompt tokens before the first block."""
    facts, state = case.facts["settings"], case.state
    dim = state["cls_token"].shape[-1]
    vit = VisionTransformer(facts["image"], facts["patch"], embed_dim=dim, depth=6, num_heads=1, num_classes=0)
    model = SA2VP(vit, 1, facts["width"]).eval()
    backbone = model.backbone
    backbone.pos_embed.data, backbone.cls_token.data = state["position_embeddings"], state["cls_token"]
    model.prompt.data = state["ppt"]
    for kind in ("weight", "bias"):
        getattr(backbone.patch_embed.proj, kind).data = state[f"patch_embeddings.{kind}"]
        getattr(model.prompt_proj, kind).data = state[f"ppt_proj.{kind}"]
    found = dict(zip(("image_tokens_rows", "prompt_tokens_rows"), model.embed(case.input("image")), strict=True))
    return {name: found[name][:, rows] for name, rows in facts["rows"].items()}

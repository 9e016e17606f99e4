"""What SA²VP has from the authors' code (tommy-xq/SA2VP) beside the method: its tensor names, and its second attention,
the file `_acc`."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from einops import rearrange
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from torch.nn import functional as F

from ..layers.attend import Attend
from ..layers.heads import swin_sizes
from ..layers.state_dicts import Names, OfficialModel, check_names, depth, load_official, renamed

Rules = Sequence[tuple[str, str | Callable]]
_ADAPTERS: Rules = (
    (r"^head\.", "class_head."),
    (r"(cross_attn\.\d+)\.norm", r"\1.ffn_norm"),
    (r"(cross_attn\.\d+)\.down", r"\1.ffn.fc1"),
    (r"(cross_attn\.\d+)\.up", r"\1.ffn.fc2"),
)


class PaddedAttention(Attend):
    """The cross-attention of the file `_acc`: one head as wide as the model, and neighbours outside of the image.

    There a neighbour outside the image is not masked: it is a key and a value of zeros. All of these have logit 0:
    m of them together are one zero key, the last one here, with log(m) added. Arguments as `model.AlignedAttention`.
    """

    def __init__(self, mask: Tensor):
        super().__init__()
        outside = 9 - mask.sum(1, keepdim=True)
        if not mask[1:, 0].any():  # of a [CLS] token, which attends to all tokens, none is outside
            outside[0] = 0
        added = torch.zeros(mask.shape).masked_fill(~mask, -math.inf)
        self.register_buffer("mask", torch.cat([added, outside.float().log()], dim=1), persistent=False)  # (N, N + 1)

    def padded(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The arguments of `Attend`: q (b, 1, n, D), k and v (b, 1, N + 1, D), and the mask."""
        q, k, v = (rearrange(x, "b h n e -> b 1 n (h e)") for x in (q, k, v))
        return q, F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1)), self.mask[: q.shape[2]].to(q.dtype)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # type: ignore[override]  # it has its own mask
        return super().forward(*self.padded(q, k, v)).squeeze(1)

    def attention_map(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # type: ignore[override]
        return super().attention_map(*self.padded(q, k, v))


class Released(OfficialModel):
    """SA²VP's tensors under the authors' names.

    Attributes:
        rules: from our names to the authors': patterns and replacements, one after the other.
    """

    rules: Rules

    def official_names(self) -> Names:
        return renamed(self.state_dict(), self.rules)

    def load_released(self, state: Mapping[str, Tensor]):
        """Load a state dict of the authors' code, without the frozen copies of a block's attention and first norm that
        their model holds. Raises `BadCheckpoint`: all names that do not fit."""
        unused = r".*(cross_attn\.\d+\.(attn|attention_norm)\..*|relative_position_index|attn_mask|num_batches_tracked)"
        read = {name: tensor for name, tensor in state.items() if not re.fullmatch(unused, name)}
        load_official(self, read, self.official_names(), f"SA²VP on {type(self.backbone).__name__}")
        return self


class ReleasedViT(Released):
    """The names on a ViT."""

    rules = (
        (r"^prompt", "embeddings.ppt"),
        (r"^new_prompts", "encoder.deep_ppt"),
        (r"^new_projs", "encoder.deep_proj"),
        (r"^gains", "encoder.cross_conv"),
        (r"^adapters", "encoder.cross_attn"),
        (r"^backbone\.pos_embed", "embeddings.position_embeddings"),
        (r"^backbone\.cls_token", "embeddings.cls_token"),
        (r"^backbone\.patch_embed\.proj", "embeddings.patch_embeddings"),
        (r"^backbone\.norm", "encoder.encoder_norm"),
        (r"^backbone\.blocks", "encoder.layer"),
        (r"(layer\.\d+)\.norm1", r"\1.attention_norm"),
        (r"(layer\.\d+)\.norm2", r"\1.ffn_norm"),
        (r"(layer\.\d+)\.mlp", r"\1.ffn"),
        (r"(layer\.\d+)\.attn\.proj", r"\1.attn.out"),
        *_ADAPTERS,
        (r"^(embeddings|encoder)", r"vit_base.transformer.\1"),
    )

    def official_names(self) -> Names:
        parts = ("query", "key", "value")
        return {
            ours: [str(name).replace("qkv", part) for part in parts] if ".attn.qkv." in name else name
            for ours, name in super().official_names().items()
        }

    @classmethod
    def from_official(cls, state: Mapping[str, Tensor], *, heads: int | None = None, patch: int = 16, **options: Any):
        """The model with a state dict of the authors' code (`Dual_model`, ViT) in it. The inverse is `to_official`.

        Sizes are read off the tensors; `heads` is not among them and defaults to heads of 64 channels. `options` are
        those of the class (scale and attention are not stored either).

        Raises `BadCheckpoint`: names that are missing, unknown or of another shape, all of them listed.
        """
        root, head = "vit_base.transformer.", "class_head.weight"
        names = ("embeddings.position_embeddings", "embeddings.ppt", "encoder.deep_ppt", "encoder.layer.0.ffn.fc1.bias")
        check_names(state, [head, *(root + name for name in names)], "SA²VP on a ViT")
        positions, prompt, new_prompts, hidden = (state[root + name] for name in names)
        _, tokens, dim = positions.shape
        backbone = VisionTransformer(
            img_size=math.isqrt(tokens - 1) * patch,
            patch_size=patch,
            embed_dim=dim,
            depth=depth(state, root + "encoder.layer."),
            num_heads=heads or max(1, dim // 64),
            mlp_ratio=len(hidden) / dim,
            num_classes=0,
        )
        model = cls(backbone, len(state[head]), prompt.shape[-1], new_maps=len(new_prompts), **options)
        return model.eval().load_released(state)


class ReleasedSwin(Released):
    """The names on a Swin."""

    @property
    def rules(self) -> Rules:  # type: ignore[override]
        return (
            (r"^prompt_proj", "backbone.patch_embed.proj_ppt"),
            (r"^prompt$", "backbone.patch_embed.deep_ppt"),
            (r"^adapters", f"backbone.layers.{self.stage}.cross_attn"),
            # timm merges patches at the start of a stage, the original at the end of the one before
            (r"layers\.(\d+)\.downsample", lambda found: f"layers.{int(found[1]) - 1}.downsample"),
            *_ADAPTERS,
            (r"^backbone", "vit_base"),
        )

    @classmethod
    def from_official(
        cls,
        state: Mapping[str, Tensor],
        *,
        image_size: int = 224,
        heads: tuple[int, ...] | None = None,
        drop_path: float = 0.0,
        **options: Any,
    ):
        """The model with a state dict of the authors' code (`Dual_model`, Swin) in it. The inverse is `to_official`.

        Raises `BadCheckpoint`: names that are missing, unknown or of another shape, all of them listed.
        """
        prompt, head, what = "vit_base.patch_embed.deep_ppt", "class_head.weight", "SA²VP on a Swin"
        check_names(state, [prompt, head], what)
        sizes = swin_sizes(state, "vit_base.", what) | ({"num_heads": heads} if heads else {})
        backbone = SwinTransformer(img_size=image_size, drop_path_rate=drop_path, num_classes=0, **sizes)
        model = cls(backbone, len(state[head]), state[prompt].shape[-1], **options)
        return model.eval().load_released(state)

"""Attention maps of a model, read by forward hooks, and what is computed from them: rollout, class-token maps, PCA.

A model keeps its fast `scaled_dot_product_attention` and its source is not touched: the map is computed a second time
from the inputs of each attention layer, and checked against the layer's own output before it is handed out.

Source: rollout is S. Abnar and W. Zuidema, "Quantifying Attention Flow in Transformers", ACL 2020 (arXiv 2005.00928).
"""

from __future__ import annotations

import fnmatch
import functools
import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from sklearn.decomposition import PCA
from timm.layers import apply_rot_embed_cat
from timm.layers.attention import Attention as TimmAttention
from timm.layers.attention import AttentionRope
from timm.models import beit, hiera, swin_transformer_v2
from timm.models.eva import EvaAttention
from timm.models.swin_transformer import WindowAttention
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from ..errors import BadParameter, check_choice


@dataclass
class _Parts:
    """The operands of an attention layer: output = finish(softmax(q k^T scale + bias) v)."""

    q: Tensor  # (batch, heads, queries, head size)
    k: Tensor  # (batch, heads, keys, head size)
    v: Tensor  # (batch, heads, keys, head size)
    scale: float
    bias: Tensor | None  # added to the scores; any shape that broadcasts to (batch, heads, queries, keys)
    finish: Callable[[Tensor], Tensor]  # (batch, queries, heads * head size) -> the layer's output

    def map(self) -> Tensor:
        """softmax(q k^T scale + bias), (batch, heads, queries, keys), float32 whatever the model runs in."""
        with torch.autocast(self.q.device.type, enabled=False):
            scores = self.q.float() @ self.k.float().transpose(-2, -1) * self.scale
            if self.bias is not None:
                scores = scores + self.bias.float()
            return scores.softmax(-1)

    def output(self, attention: Tensor) -> Tensor:
        """The layer's output with this map, (batch, queries, channels)."""
        return self.finish((attention.to(self.v.dtype) @ self.v).transpose(1, 2).flatten(2))


def _additive(mask: Tensor | None, causal: bool, q: Tensor, k: Tensor, keep: bool = True) -> Tensor | None:
    """A mask as an additive bias of the scores. In a boolean mask the value `keep` marks the visible keys."""
    if causal:
        mask = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).tril()
        keep = True
    if mask is not None and mask.dtype == torch.bool:
        seen = mask if keep else ~mask
        mask = torch.zeros(mask.shape, device=mask.device).masked_fill(~seen, -math.inf)
    return mask


def _arguments(module: nn.Module, args: tuple, kwargs: dict) -> dict[str, Any]:
    """The call's arguments by name, defaults and the collected **kwargs included."""
    signature = inspect.signature(module.forward)
    bound = signature.bind(*args, **kwargs)
    bound.apply_defaults()
    named = dict(bound.arguments)
    for name, parameter in signature.parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            named |= named.pop(name)
    return named


def _split(x: Tensor, head_size: int) -> Tensor:
    """(batch, tokens, heads * head size) -> (batch, heads, tokens, head size)"""
    return x.unflatten(-1, (-1, head_size)).transpose(1, 2)


def _timm(module: TimmAttention, args: tuple, kwargs: dict) -> _Parts:
    call = _arguments(module, args, kwargs)
    x = call["x"]
    q, k, v = (_split(part, module.head_dim) for part in module.qkv(x).chunk(3, dim=-1))
    q, k = module.q_norm(q), module.k_norm(k)
    bias = _additive(call["attn_mask"], call["is_causal"], q, k)
    return _Parts(q, k, v, module.scale, bias, functools.partial(_gated, module, x))


def _gated(module: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    y = module.norm(y)
    return module.proj(y if module.gate is None else y * module.gate(x).sigmoid())


def _projected(module: nn.Module, x: Tensor, head_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values (batch, heads, tokens, head size) of a timm layer that may have a bias apart, or three
    projections."""
    if module.qkv is None:
        q, k, v = module.q_proj(x), module.k_proj(x), module.v_proj(x)
    else:
        apart = getattr(module, "q_bias", None)
        bias = module.qkv.bias if apart is None else torch.cat([apart, module.k_bias, module.v_bias])
        q, k, v = nn.functional.linear(x, module.qkv.weight, bias).chunk(3, dim=-1)
    return _split(q, head_size), _split(k, head_size), _split(v, head_size)


def _rope(module: EvaAttention | AttentionRope, args: tuple, kwargs: dict) -> _Parts:
    """EVA-02 and DINOv3: queries and keys are turned by their positions, but for the prefix tokens."""
    call = _arguments(module, args, kwargs)
    x = call["x"]
    q, k, v = _projected(module, x, module.head_dim)
    q, k = module.q_norm(q), module.k_norm(k)
    if (rope := call["rope"]) is not None:
        n = module.num_prefix_tokens
        turned = (apply_rot_embed_cat(y[:, :, n:], rope, half=module.rotate_half) for y in (q, k))
        q, k = (torch.cat([y[:, :, :n], t], 2).type_as(v) for y, t in zip((q, k), turned, strict=True))
    k, v = (y.repeat_interleave(q.shape[1] // y.shape[1], dim=1) for y in (k, v))  # grouped queries share keys
    bias = _additive(call["attn_mask"], call["is_causal"], q, k)
    return _Parts(q, k, v, module.scale, bias, functools.partial(_gated, module, x))


def _relative(table: Tensor, index: Tensor) -> Tensor:
    """The bias (1, heads, queries, keys) of a table (distances, heads) of relative positions."""
    return table[index.flatten()].view(*index.shape, -1).permute(2, 0, 1)[None]


def _beit(module: beit.Attention, args: tuple, kwargs: dict) -> _Parts:
    call = _arguments(module, args, kwargs)
    q, k, v = _projected(module, call["x"], module.qkv.out_features // (3 * module.num_heads))
    bias = call["shared_rel_pos_bias"]
    if module.relative_position_bias_table is not None:
        own = _relative(module.relative_position_bias_table, module.relative_position_index)
        bias = own if bias is None else own + bias
    return _Parts(q, k, v, module.scale, bias, module.proj)


def _windowed(bias: Tensor, mask: Tensor | None, x: Tensor) -> Tensor:
    """A bias with the mask (windows, area, area); the batch holds the windows of an image one after the other."""
    return bias if mask is None else bias + mask[:, None].repeat(len(x) // len(mask), 1, 1, 1)


def _swin_v2(module: swin_transformer_v2.WindowAttention, args: tuple, kwargs: dict) -> _Parts:
    """Cosines of queries and keys, times a learned scale for each head."""
    call = _arguments(module, args, kwargs)
    q, k, v = _projected(module, call["x"], module.dim // module.num_heads)
    q, k = nn.functional.normalize(q, dim=-1), nn.functional.normalize(k, dim=-1)
    q = q * module.logit_scale.clamp(max=math.log(100)).exp()
    table = module.cpb_mlp(module.relative_coords_table).view(-1, module.num_heads)
    bias = 16 * _relative(table, module.relative_position_index).sigmoid()
    return _Parts(q, k, v, 1.0, _windowed(bias, call["mask"], call["x"]), module.proj)


def _hiera(module: hiera.MaskUnitAttention, args: tuple, kwargs: dict) -> _Parts:
    """Attention inside mask units, whose tokens lie `windows` apart, or over all tokens; queries may be pooled."""
    x = _arguments(module, args, kwargs)["x"]
    count = x.shape[1] // (module.q_stride * module.window_size) if module.use_mask_unit_attn else 1
    units = x.unflatten(1, (-1, count)).transpose(1, 2).flatten(0, 1)
    q, k, v = (_split(part, module.head_dim) for part in module.qkv(units).chunk(3, dim=-1))
    q = q.unflatten(2, (module.q_stride, -1)).amax(2)

    def finish(y: Tensor) -> Tensor:
        return module.proj(y.unflatten(0, (-1, count)).transpose(1, 2).flatten(1, 2))

    return _Parts(q, k, v, module.scale, None, finish)


def _swin(module: WindowAttention, args: tuple, kwargs: dict) -> _Parts:
    call = _arguments(module, args, kwargs)
    x, mask = call["x"], call["mask"]
    q, k, v = (_split(part, part.shape[-1] // module.num_heads) for part in module.qkv(x).chunk(3, dim=-1))
    bias = _relative(module.relative_position_bias_table, module.relative_position_index)
    return _Parts(q, k, v, module.scale, _windowed(bias, mask, x), module.proj)


def _multihead(module: nn.MultiheadAttention, args: tuple, kwargs: dict) -> _Parts:
    call = _arguments(module, args, kwargs)
    if module.bias_k is not None or module.add_zero_attn:
        raise BadParameter("model", type(module).__name__, "nn.MultiheadAttention without add_bias_kv, add_zero_attn")
    tokens = [call["query"], call["key"], call["value"]]
    if not module.batch_first:
        tokens = [x.transpose(0, 1) for x in tokens]
    weights = (
        module.in_proj_weight.chunk(3)
        if module.in_proj_weight is not None
        else (module.q_proj_weight, module.k_proj_weight, module.v_proj_weight)
    )
    biases = module.in_proj_bias.chunk(3) if module.in_proj_bias is not None else (None,) * 3
    q, k, v = (
        _split(nn.functional.linear(x, w, b), module.head_dim) for x, w, b in zip(tokens, weights, biases, strict=True)
    )
    # `is_causal` only selects a fast path: nn.MultiheadAttention needs the mask as well, in which True is "hidden".
    bias = _additive(call["attn_mask"], False, q, k, keep=False)
    if bias is not None and bias.ndim == 3:
        bias = bias.unflatten(0, (-1, module.num_heads))
    padding = _additive(call["key_padding_mask"], False, q, k, keep=False)
    if padding is not None:
        padding = padding[:, None, None, :]
        bias = padding if bias is None else bias + padding

    def finish(y: Tensor) -> Tensor:
        y = module.out_proj(y)
        return y if module.batch_first else y.transpose(0, 1)

    return _Parts(q, k, v, module.head_dim**-0.5, bias, finish)


_TRANSFORMERS_NAMES = (("q_proj", "k_proj", "v_proj"), ("query", "key", "value"))


def _is_transformers(module: nn.Module) -> bool:
    """Whether it is an attention layer of transformers, by its attributes: the library need not be installed."""
    return hasattr(getattr(module, "config", None), "_attn_implementation") and any(
        all(isinstance(getattr(module, name, None), nn.Module) for name in names) for names in _TRANSFORMERS_NAMES
    )


def _transformers(module: nn.Module, args: tuple, kwargs: dict) -> _Parts:
    call = _arguments(module, args, kwargs)
    kind = module.config._attn_implementation
    check_choice("attn_implementation", kind, ("sdpa", "eager"))
    names = next(names for names in _TRANSFORMERS_NAMES if hasattr(module, names[0]))
    to_q, to_k, to_v = (getattr(module, name) for name in names)
    x = call["hidden_states"]
    other = next((call[n] for n in ("encoder_hidden_states", "key_value_states") if call.get(n) is not None), x)
    size = getattr(module, "head_dim", None) or module.attention_head_size
    q, k, v = _split(to_q(x), size), _split(to_k(other), size), _split(to_v(other), size)
    k, v = (y.repeat_interleave(q.shape[1] // y.shape[1], dim=1) for y in (k, v))  # grouped queries share keys
    mask = call.get("attention_mask")
    causal = call.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    # the eager path takes what is masked from the mask alone
    causal = bool(causal) and kind == "sdpa" and mask is None and q.shape[-2] > 1
    finish = getattr(module, "o_proj", None) or getattr(module, "out_proj", None) or nn.Identity()
    scale = getattr(module, "scaling", None) or getattr(module, "scale", None) or size**-0.5
    return _Parts(q, k, v, scale, _additive(mask, causal, q, k), finish)


_READERS: dict[type[nn.Module], Callable[[Any, tuple, dict], _Parts]] = {
    TimmAttention: _timm,
    WindowAttention: _swin,
    EvaAttention: _rope,
    AttentionRope: _rope,
    beit.Attention: _beit,
    swin_transformer_v2.WindowAttention: _swin_v2,
    hiera.MaskUnitAttention: _hiera,
    nn.MultiheadAttention: _multihead,
}


@runtime_checkable
class HasMap(Protocol):
    """An attention layer of a paper that computes its own map: `models.layers.attend.Attend` and its like."""

    def attention_map(self, *args: Any, **kwargs: Any) -> Tensor:
        """The map (batch, heads, queries, keys) of a call of the layer with these arguments."""


class Recorder:
    """Records the attention maps of a model's forward passes, inside a `with` block:

        with Recorder(model, layers=[-1]) as record:
            model(images)
        record.maps[0]  # (batch, heads, queries, keys), float32, on the CPU

    Knows the attention of timm's ViTs, of EVA-02 and DINOv3 (`Eva`), BEiT, Swin, SwinV2 and Hiera (of the last three
    the batch is batch * windows, in timm's order; Hiera's queries may be fewer than its keys), `nn.MultiheadAttention`
    (open_clip), the attention of transformers models under "sdpa" or "eager", and every layer with a method
    `attention_map`, as the papers' own (`HasMap`). The model runs unchanged and gives the same bits. A map is
    softmax(q k^T / sqrt(d) + masks and biases), before any dropout; for a layer of another library in eval mode it is
    checked by computing the layer's output from it.

    Args:
        model: the module whose forward passes are watched.
        layers: which attention layers: indices in the model's order (negative ones count from the end) or patterns of
            their names ("visual.*"); None takes all.

    Attributes:
        maps: one tensor (batch, heads, queries, keys) for each call of a watched layer, in the order of the calls.
        names: the layer of each map, as `model.named_modules()` has it.

    Raises:
        BadParameter: no attention layer that it knows, a layer that is not there, or, in the forward pass, a layer
            whose output is not the one that its map gives; at the end of the block, when no layer ran.
    """

    def __init__(self, model: nn.Module, layers: Sequence[int | str] | None = None):
        self.maps: list[Tensor] = []
        self.names: list[str] = []
        self._kind = type(model).__name__
        self._handles: list[Any] = []
        known = {name: module for name, module in model.named_modules() if self._knows(module)}
        if not known:
            raise BadParameter(
                "model",
                type(model).__name__,
                "a model with the attention of timm's ViT, EVA-02, DINOv3, BEiT, Swin, SwinV2 or Hiera, "
                "nn.MultiheadAttention or transformers attention; "
                "or a layer with a method attention_map",
            )
        self._watched = known if layers is None else {name: known[name] for name in _choose(layers, list(known))}

    def _knows(self, module: nn.Module) -> bool:
        return isinstance(module, (HasMap, *_READERS)) or _is_transformers(module)

    def __enter__(self) -> Recorder:
        self.maps.clear()
        self.names.clear()
        for name, module in self._watched.items():
            hook = functools.partial(self._record, name)
            self._handles.append(module.register_forward_hook(hook, with_kwargs=True))
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        if error is None and not self.maps:
            raise BadParameter(
                "model", self._kind, "a model that calls its attention layers inside the `with` block: none of them ran"
            )

    @torch.no_grad()
    def _record(self, name: str, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        if isinstance(module, HasMap):
            attention = module.attention_map(*args, **kwargs)
        else:
            read = next((read for kind, read in _READERS.items() if isinstance(module, kind)), _transformers)
            # a projection may carry dropout of its own (adapters in training): leave the random state as it was
            with torch.random.fork_rng(enabled=module.training):
                parts = read(module, args, kwargs)
                attention = parts.map()
                if not module.training:
                    _check(name, module, parts.output(attention), output[0] if isinstance(output, tuple) else output)
        self.maps.append(attention.float().cpu())
        self.names.append(name)


def _choose(layers: Sequence[int | str], names: list[str]) -> list[str]:
    """The `names` that `layers` means, in the model's order."""
    chosen: set[str] = set()
    for layer in layers:
        if isinstance(layer, str):
            found = fnmatch.filter(names, layer)
        else:
            found = [names[layer]] if -len(names) <= layer < len(names) else []
        if not found:
            raise BadParameter("layers", layer, f"-{len(names)} to {len(names) - 1}, or one of {', '.join(names)}")
        chosen.update(found)
    return [name for name in names if name in chosen]


def _check(name: str, module: nn.Module, ours: Tensor, theirs: Tensor) -> None:
    """Raise `BadParameter` when the output computed from the map is not the layer's (as with a bias of its own)."""
    if not theirs.isfinite().all():
        return  # nothing to compare with; the map shows the NaN as well
    full = theirs.dtype in (torch.float32, torch.float64) and torch.get_float32_matmul_precision() == "highest"
    allowed = 1e-4 if full else 3e-2
    if ours.shape == theirs.shape:
        difference = ((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1e-12)).item()
        if difference <= allowed:
            return
    raise BadParameter(
        "layers",
        name,
        f"attention layers whose output is softmax(q k^T) v: this {type(module).__name__} does something else. "
        "Leave it out with layers=[...], or give it a method attention_map",
    )


def rollout(
    maps: Sequence[Tensor],
    residual: float = 0.5,
    head: str = "mean",
    drop: Sequence[int] | Sequence[Sequence[int]] = (),
) -> Tensor:
    """Attention rollout (Abnar & Zuidema 2020): the share of each input token in each token of the last layer.

    A layer's matrix is `residual * identity + (1 - residual) * attention`; they are multiplied, the first on the right.

    Args:
        maps: one (batch, heads, tokens, tokens) a layer, first layer first.
        residual: the weight of the skip connection.
        head: how heads are joined: "mean", "max" or "min" (rows are normalised again).
        drop: token positions to leave out: one list for every layer, or one list for each, where the number of tokens
            differs because prompts are inserted. The remaining attention of a row is scaled to sum to 1. That is exact
            for prompts that are discarded after their layer (VPT-deep), not for prompts that later layers see.

    Returns:
        (batch, remaining tokens, remaining tokens), rows sum to 1.
    """
    if not maps:
        raise BadParameter("maps", [], "at least one attention map")
    check_choice("head", head, ("mean", "max", "min"))
    if not 0 <= residual <= 1:
        raise BadParameter("residual", residual, "0 to 1")
    one_list = all(isinstance(item, int) for item in drop)
    drops: list[Any] = [drop] * len(maps) if one_list else list(drop)
    if len(drops) != len(maps):
        raise BadParameter("drop", drop, f"one list of positions, or {len(maps)} lists, one a layer")
    joined: Tensor | None = None
    for layer, (attention, dropped) in enumerate(zip(maps, drops, strict=True)):
        if attention.shape[-2] != attention.shape[-1]:
            shape = f"layer {layer}: {attention.shape[-2]} queries, {attention.shape[-1]} keys"
            raise BadParameter("maps", shape, "as many queries as keys: a pooled layer (Hiera) has no rollout")
        attention = getattr(attention, f"a{head}" if head != "mean" else "mean")(dim=1)
        gone = {position % attention.shape[-1] for position in dropped}
        kept = [position for position in range(attention.shape[-1]) if position not in gone]
        attention = attention[:, kept][:, :, kept]
        attention = attention / attention.sum(-1, keepdim=True).clamp(min=1e-12)
        if joined is not None and attention.shape != joined.shape:
            raise BadParameter(
                "drop",
                drop,
                f"positions that leave every layer {joined.shape[-1]} tokens; layer {layer} has {len(kept)}",
            )
        step = residual * torch.eye(len(kept)).to(attention) + (1 - residual) * attention
        joined = step if joined is None else step @ joined
    return joined


def class_token_map(attention: Tensor, grid: tuple[int, int], skip: int | Sequence[int] = 0) -> Tensor:
    """The attention of the [CLS] token (position 0) to the patches, laid out as the image, heads averaged.

    Args:
        attention: (batch, heads, tokens, tokens) of one layer, or a rollout (batch, tokens, tokens).
        grid: rows and columns of patches.
        skip: the tokens that are neither [CLS] nor patch: how many lie between the two (VPT's prompts, register
            tokens), or their positions where they lie elsewhere.

    Returns:
        (batch, rows, columns): the row's own values, which sum to at most 1.
    """
    rows, columns = grid
    row = (attention.mean(1) if attention.ndim == 4 else attention)[:, 0]
    skipped = set(range(1, 1 + skip)) if isinstance(skip, int) else {position % row.shape[-1] for position in skip}
    kept = [position for position in range(1, row.shape[-1]) if position not in skipped]
    if len(kept) != rows * columns:
        raise BadParameter(
            "skip",
            skip,
            f"the extra tokens of a sequence of {row.shape[-1]}: without the class token and them {len(kept)} are "
            f"left, and the grid {rows} x {columns} has {rows * columns}",
        )
    return row[:, kept].unflatten(-1, (rows, columns))


def token_pca(tokens: Tensor, grid: tuple[int, int]) -> np.ndarray:
    """The first three principal components of patch tokens as red, green and blue, one basis for the whole batch.

    Components come in the order of their variance. The sign of a component is arbitrary; here the border of the images
    is never brighter, on average, than the whole, so that a background tends to be dark.

    Args:
        tokens: (batch, rows * columns, channels), or without the batch; without [CLS] and prompt tokens.
        grid: rows and columns.

    Returns:
        (batch, rows, columns, 3) in 0 to 1, or without the batch; each component spans 0 to 1 between its first and
        last percentile.
    """
    rows, columns = grid
    if tokens.shape[-2] != rows * columns:
        raise BadParameter("tokens", tuple(tokens.shape), f"{rows} x {columns} = {rows * columns} patch tokens")
    flat = tokens.detach().float().cpu().flatten(0, -2).numpy()
    parts = PCA(n_components=3, svd_solver="full").fit_transform(flat)
    border = np.ones((rows, columns), bool)
    border[1:-1, 1:-1] = False
    # each component has mean 0 over the whole batch
    parts *= np.where(parts.reshape(-1, rows * columns, 3)[:, border.ravel()].mean((0, 1)) > 0, -1, 1)
    low, high = np.percentile(parts, [1, 99], axis=0)
    colours = np.clip((parts - low) / np.maximum(high - low, 1e-12), 0, 1)
    return colours.reshape(*tokens.shape[:-2], rows, columns, 3)


def photograph_maps(vit: VisionTransformer, images: Tensor) -> dict[str, Tensor | np.ndarray]:
    """Where a plain ViT looks and what its patch tokens hold, for `plots.attention_grid`.

    Args:
        vit: a timm ViT with a [CLS] token.
        images: (batch, 3, H, W), normalised as the ViT wants them.

    Returns:
        "[CLS] attention" of the last block and "rollout" of all blocks, (batch, rows, columns) each, and "principal
        components" of the last block's patch tokens after the norm, (batch, rows, columns, 3).
    """
    with Recorder(vit) as record, torch.no_grad():
        tokens = vit.forward_features(images)
    prefix = vit.num_prefix_tokens
    size = images.shape[-2:]
    grid = vit.patch_embed.dynamic_feat_size((size[0], size[1]))
    return {
        "[CLS] attention": class_token_map(record.maps[-1], grid, prefix - 1),
        "rollout": class_token_map(rollout(record.maps), grid, prefix - 1),
        "principal components": token_pca(tokens[:, prefix:], grid),
    }

"""Attention maps of a model, read by forward hooks, and what is computed from them: rollout, class-token maps, PCA.

A model keeps its fast `scaled_dot_product_attention` and its source is not touched: each attention layer is called a
second time on the same inputs, now so that it forms its map.

Source: rollout is S. Abnar and W. Zuidema, "Quantifying Attention Flow in Transformers", ACL 2020 (arXiv 2005.00928).
"""

from __future__ import annotations

import fnmatch
import functools
import inspect
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import BadParameter, check_range


@runtime_checkable
class HasMap(Protocol):
    """An attention layer of a paper that computes its own map: `models.layers.attend.Attend` and its like."""

    def attention_map(self, *args: Any, **kwargs: Any) -> Tensor:
        """The map (batch, heads, queries, keys) of a call of the layer with these arguments."""


def _is_timm(module: nn.Module) -> bool:
    """Whether it is one of timm's layers that form the map unless `fused_attn`, and pass it to `attn_drop`."""
    return hasattr(module, "fused_attn") and isinstance(getattr(module, "attn_drop", None), nn.Module)


def _map(module: Any, args: tuple, kwargs: dict) -> Tensor:
    """The map (batch, heads, queries, keys) of a call of a layer, without calling its hooks."""
    if isinstance(module, HasMap):
        return module.attention_map(*args, **kwargs)
    if isinstance(module, nn.MultiheadAttention):
        call = inspect.signature(module.forward).bind(*args, **kwargs).arguments
        dropout, module.dropout = module.dropout, 0.0
        try:
            return module.forward(**call | {"need_weights": True, "average_attn_weights": False})[1]
        finally:
            module.dropout = dropout
    maps: list[Tensor] = []
    hook = module.attn_drop.register_forward_pre_hook(lambda _, inputs: maps.append(inputs[0]))
    fused, module.fused_attn = module.fused_attn, False
    try:
        module.forward(*args, **kwargs)
    finally:
        module.fused_attn = fused
        hook.remove()
    if len(maps) != 1:
        accepted = "attention layers that pass one map to `attn_drop`, or have a method attention_map; leave it out"
        raise BadParameter("layers", type(module).__name__, f"{accepted} with layers=[...]")
    return maps[0]


class Recorder:
    """Records the attention maps of a model's forward passes, inside a `with` block:

        with Recorder(model, layers=[-1]) as record:
            model(images)
        record.maps[0]  # (batch, heads, queries, keys), float32, on the CPU

    Knows timm's attention (ViT, EVA-02, DINOv3, BEiT, and Swin, of which the batch is batch * windows in
    timm's order), `nn.MultiheadAttention` (open_clip), and every layer with a method `attention_map`, as the papers'
    own (`HasMap`). The model runs unchanged and gives the same bits. A map is softmax(q k^T / sqrt(d) + masks and
    biases), before any dropout, as the layer itself computes it.

    Args:
        model: the module whose forward passes are watched.
        layers: which attention layers: indices in the model's order (negative ones count from the end) or patterns of
            their names ("visual.*"); None takes all.

    Attributes:
        maps: one tensor (batch, heads, queries, keys) for each call of a watched layer, in the order of the calls.
        names: the layer of each map, as `model.named_modules()` has it.

    Raises:
        BadParameter: no attention layer that it knows, a layer that is not there, or, in the forward pass, a layer that
            forms no map; at the end of the block, when no layer ran.
    """

    def __init__(self, model: nn.Module, layers: Sequence[int | str] | None = None):
        self.maps: list[Tensor] = []
        self.names: list[str] = []
        self._handles: list[Any] = []
        known = {
            name: module
            for name, module in model.named_modules()
            if isinstance(module, (HasMap, nn.MultiheadAttention)) or _is_timm(module)
        }
        if not known:
            accepted = "a model with timm's attention, nn.MultiheadAttention, or a layer with a method attention_map"
            raise BadParameter("model", type(model).__name__, accepted)
        self._watched = known if layers is None else {name: known[name] for name in _choose(layers, list(known))}

    def __enter__(self) -> Recorder:
        self.maps.clear()
        self.names.clear()
        for name, module in self._watched.items():
            hook = functools.partial(self._record, name)
            self._handles.append(module.register_forward_hook(hook, with_kwargs=True))
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        while self._handles:
            self._handles.pop().remove()
        if error is None and not self.maps:
            accepted = "a model that calls one of them inside the `with` block: none of them ran"
            raise BadParameter("layers", list(self._watched), accepted)

    @torch.no_grad()
    def _record(self, name: str, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        # dropout of the second call must not change the numbers of the model's own
        with torch.random.fork_rng(enabled=module.training):
            self.maps.append(_map(module, args, kwargs).float().cpu())
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


def rollout(maps: Sequence[Tensor]) -> Tensor:
    """Attention rollout (Abnar & Zuidema 2020): the share of each input token in each token of the last layer.

    A layer's matrix is the mean of the identity, for the skip connection, and of its attention, averaged over heads;
    they are multiplied, the first on the right.

    Args:
        maps: one (batch, heads, tokens, tokens) a layer, first layer first.

    Returns:
        (batch, tokens, tokens), rows sum to 1.
    """
    check_range("number of maps", len(maps), 1)
    joined = identity = torch.eye(maps[0].shape[-1]).to(maps[0])
    for attention in maps:
        if attention.shape[-2:] != joined.shape[-2:]:
            accepted = f"maps of {joined.shape[-1]} queries and keys: layers that pool or add tokens have no rollout"
            raise BadParameter("maps", tuple(attention.shape), accepted)
        joined = (identity + attention.mean(1)) / 2 @ joined
    return joined


def class_token_map(attention: Tensor, grid: tuple[int, int], skip: int = 0) -> Tensor:
    """The attention of the [CLS] token (position 0) to the patches, laid out as the image, heads averaged.

    Args:
        attention: (batch, heads, tokens, tokens) of one layer, or a rollout (batch, tokens, tokens).
        grid: rows and columns of patches.
        skip: how many tokens lie between [CLS] and the patches (VPT's prompts, register tokens).

    Returns:
        (batch, rows, columns): the row's own values, which sum to at most 1.
    """
    patches = (attention.mean(1) if attention.ndim == 4 else attention)[:, 0, 1 + skip :]
    if patches.shape[-1] != grid[0] * grid[1]:
        left = f"{patches.shape[-1]} are left after the class token and them, and the grid is {grid[0]} x {grid[1]}"
        raise BadParameter("skip", skip, f"the extra tokens of a sequence of {attention.shape[-1]}: {left}")
    return patches.unflatten(-1, grid)


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
    check_range("channels of the tokens", tokens.shape[-1], 3)
    from sklearn.decomposition import PCA  # imported here because it takes a second

    flat = tokens.detach().float().cpu().flatten(0, -2).numpy()
    check_range("number of tokens", len(flat), 3)
    parts = PCA(n_components=3, svd_solver="full").fit_transform(flat)
    border = np.ones((rows, columns), bool)
    border[1:-1, 1:-1] = False
    # each component has mean 0 over the whole batch
    parts *= np.where(parts.reshape(-1, rows * columns, 3)[:, border.ravel()].mean((0, 1)) > 0, -1, 1)
    low, high = np.percentile(parts, [1, 99], axis=0)
    colours = np.clip((parts - low) / np.maximum(high - low, 1e-12), 0, 1)
    return colours.reshape(*tokens.shape[:-2], rows, columns, 3)


def photograph_maps(vit: Any, images: Tensor) -> dict[str, Tensor | np.ndarray]:
    """Where a plain ViT looks and what its patch tokens hold, for `plots.attention_grid`.

    Args:
        vit: a timm ViT with a [CLS] token.
        images: (batch, 3, H, W), normalised as the ViT wants them.

    Returns:
        "[CLS] attention" of the last block and "rollout" of all blocks, (batch, rows, columns) each, and "principal
        components" of the last block's patch tokens after the norm, (batch, rows, columns, 3).

    Raises `BadParameter`: a ViT without a [CLS] token.
    """
    if getattr(vit, "cls_token", None) is None:
        raise BadParameter("vit", type(vit).__name__, "a timm ViT with a [CLS] token")
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

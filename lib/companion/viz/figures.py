"""Pictures in one house style, and the attention maps behind them.

Attention is read by hooks: a model keeps its fast `scaled_dot_product_attention`, its source is not touched, and the
map is computed beside it from what each attention layer was given. Every map is checked against the layer's own output
before it is handed out.

Sources: rollout is S. Abnar and W. Zuidema, "Quantifying Attention Flow in Transformers", ACL 2020 (arXiv 2005.00928);
Grad-CAM is R. R. Selvaraju et al., ICCV 2017 (arXiv 1610.02391); the colours are M. Okabe and K. Ito's set for
colour-blind readers.
"""

from __future__ import annotations

import fnmatch
import functools
import inspect
import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize, to_hex
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.patches import Rectangle
from matplotlib.text import Text
from PIL import Image, ImageDraw
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE
from timm.layers.attention import Attention as TimmAttention
from timm.models.swin_transformer import WindowAttention
from torch import Tensor, nn

from ..errors import BadParameter

# ------------------------------------------------------------------------------------------------------------- style

# Okabe-Ito, with black and yellow last: black reads as "reference", yellow is weak on white
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#000000", "#F0E442")
HEAT = "inferno"  # perceptually even, readable with every common kind of colour blindness and in grey

STYLE: dict[str, Any] = {
    "figure.dpi": 100,
    "savefig.dpi": 100,
    "figure.figsize": (6.4, 3.6),
    "figure.constrained_layout.use": True,
    "figure.constrained_layout.w_pad": 0.06,
    "figure.constrained_layout.h_pad": 0.05,
    "figure.titlesize": 11,
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.labelsize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.prop_cycle": cycler(color=COLOURS),
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "legend.fontsize": 8.5,
    "legend.frameon": False,
    "grid.color": "#d9d9d9",
    "grid.linewidth": 0.7,
    "lines.linewidth": 1.6,
    "image.cmap": HEAT,
    "image.interpolation": "nearest",
}

_DPI = STYLE["figure.dpi"]
_PHOTO_PIXELS = 120_000  # a photograph takes about 2 bytes a pixel as PNG: this keeps a figure of them below 300 kB


def style() -> AbstractContextManager[None]:
    """The house style for the length of a `with` block."""
    return plt.rc_context(STYLE)


def use_style() -> None:
    """The house style from here on, for the figures that a notebook draws itself."""
    plt.rcParams.update(STYLE)


def _styled(draw: Callable[..., Figure]) -> Callable[..., Figure]:
    """Draw in the house style whatever style is set outside."""

    @functools.wraps(draw)
    def styled(*args: Any, **kwargs: Any) -> Figure:
        with style():
            figure = draw(*args, **kwargs)
            figure.draw_without_rendering()  # ticks are made when first drawn, and take the style of that moment
            return figure

    return styled


def visible_texts(figure: Figure) -> list[Text]:
    """The texts of `figure` that a reader sees, laid out: `get_window_extent()` gives their boxes in pixels."""
    figure.draw_without_rendering()
    hidden = set()
    for ax in figure.axes:
        for axis, (low, high) in ((ax.xaxis, sorted(ax.get_xlim())), (ax.yaxis, sorted(ax.get_ylim()))):
            for tick in axis.get_major_ticks() + axis.get_minor_ticks():
                # a tick outside the limits keeps its text but is not drawn
                if not ax.axison or not low <= tick.get_loc() <= high:
                    hidden |= {tick.label1, tick.label2}
    texts = figure.findobj(lambda artist: isinstance(artist, Text) and artist.get_text().strip())
    return [text for text in texts if text.get_visible() and text not in hidden]


def overlapping_text(figure: Figure) -> list[tuple[str, str]]:
    """The pairs of texts of `figure` that cover each other by more than a pixel each way; for tests."""
    boxes = [(text.get_text(), text.get_window_extent()) for text in visible_texts(figure)]
    pairs = []
    for i, (one, a) in enumerate(boxes):
        for other, b in boxes[i + 1 :]:
            if min(a.x1, b.x1) - max(a.x0, b.x0) > 1 and min(a.y1, b.y1) - max(a.y0, b.y0) > 1:
                pairs.append((one, other))
    return pairs


# --------------------------------------------------------------------------------------------------- attention by hooks


@dataclass
class _Parts:
    """What an attention layer multiplies: output = finish(softmax(q k^T scale + bias) v)."""

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
        """What the layer gives with this map, (batch, queries, channels)."""
        return self.finish((attention.to(self.v.dtype) @ self.v).transpose(1, 2).flatten(2))


def _additive(mask: Tensor | None, causal: bool, q: Tensor, k: Tensor, keep: bool = True) -> Tensor | None:
    """A mask as numbers to add to the scores. In a boolean mask the value `keep` marks the keys that are seen."""
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

    def finish(y: Tensor) -> Tensor:
        y = module.norm(y)
        return module.proj(y if module.gate is None else y * module.gate(x).sigmoid())

    return _Parts(q, k, v, module.scale, _additive(call["attn_mask"], call["is_causal"], q, k), finish)


def _swin(module: WindowAttention, args: tuple, kwargs: dict) -> _Parts:
    call = _arguments(module, args, kwargs)
    x, mask = call["x"], call["mask"]
    q, k, v = (_split(part, part.shape[-1] // module.num_heads) for part in module.qkv(x).chunk(3, dim=-1))
    area = module.window_area
    bias = module.relative_position_bias_table[module.relative_position_index.flatten()]
    bias = bias.view(area, area, -1).permute(2, 0, 1)[None]  # (1, heads, area, area)
    if mask is not None:  # (windows, area, area); the batch holds the windows of an image one after the other
        bias = bias + mask[:, None].repeat(len(x) // len(mask), 1, 1, 1)
    return _Parts(q, k, v, module.scale, bias, module.proj)


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
    # `is_causal` is only a hint here: nn.MultiheadAttention wants the mask as well. True in its masks means "hidden".
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
    """Told by what it has, so that transformers need not be installed."""
    return hasattr(getattr(module, "config", None), "_attn_implementation") and any(
        all(isinstance(getattr(module, name, None), nn.Module) for name in names) for names in _TRANSFORMERS_NAMES
    )


def _transformers(module: nn.Module, args: tuple, kwargs: dict) -> _Parts:
    call = _arguments(module, args, kwargs)
    kind = module.config._attn_implementation
    if kind not in ("sdpa", "eager"):
        raise BadParameter("attn_implementation", kind, ("sdpa", "eager"))
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
    nn.MultiheadAttention: _multihead,
}


class Recorder:
    """Records the attention maps of a model's forward passes, inside a `with` block:

        with Recorder(model, layers=[-1]) as record:
            model(images)
        record.maps[0]  # (batch, heads, queries, keys), float32, on the CPU

    Knows timm's `Attention` and Swin's `WindowAttention` (there the batch is batch * windows, in timm's order),
    `nn.MultiheadAttention` (open_clip) and the attention of transformers models under "sdpa" or "eager". The model runs
    unchanged and gives the same bits. A map is softmax(q k^T / sqrt(d) + masks and biases), before any dropout; for a
    layer in eval mode it is checked by computing the layer's output from it.

    Args:
        model: the module whose forward passes are watched.
        layers: which attention layers: indices in the model's order (negative ones count from the end) or patterns of
            their names ("visual.*"); None takes all.
        also: for a paper's own attention, a module type and a function (module, args, kwargs) -> map of that call.

    Attributes:
        maps: one tensor (batch, heads, queries, keys) for each call of a watched layer, in the order of the calls.
        names: the layer of each map, as `model.named_modules()` has it.

    Raises:
        BadParameter: no attention layer that it knows, a layer that is not there, or, in the forward pass, a layer
            whose output is not the one that its map gives; at the end of the block, when no layer ran.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[int | str] | None = None,
        also: Mapping[type[nn.Module], Callable[[Any, tuple, dict], Tensor]] | None = None,
    ):
        self.maps: list[Tensor] = []
        self.names: list[str] = []
        self._kind = type(model).__name__
        self._also = dict(also or {})
        self._handles: list[Any] = []
        known = {name: module for name, module in model.named_modules() if self._knows(module)}
        if not known:
            raise BadParameter(
                "model",
                type(model).__name__,
                "a model with timm Attention or WindowAttention, nn.MultiheadAttention or transformers attention; "
                "for another module give also={its type: function(module, args, kwargs) -> map}",
            )
        self._watched = known if layers is None else {name: known[name] for name in _choose(layers, list(known))}

    def _knows(self, module: nn.Module) -> bool:
        return isinstance(module, (*self._also, *_READERS)) or _is_transformers(module)

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
                "model",
                self._kind,
                "a model that calls its attention layers inside the `with` block: none of them ran. A model that takes "
                "only their weights (SA2VP does) has maps of its own to give",
            )

    @torch.no_grad()
    def _record(self, name: str, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        own = next((read for kind, read in self._also.items() if isinstance(module, kind)), None)
        if own is not None:
            attention = own(module, args, kwargs)
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
    """A layer that does more than its known kind (a bias of its own, a cache) must not give a map that looks right."""
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
        "Leave it out with layers=[...] or read it with also={its type: function}",
    )


# ------------------------------------------------------------------------------------------------ from maps to pictures


def rollout(
    maps: Sequence[Tensor],
    residual: float = 0.5,
    head: str = "mean",
    drop: Sequence[int] | Sequence[Sequence[int]] = (),
) -> Tensor:
    """Attention rollout (Abnar & Zuidema 2020): how much of each input token reaches each token of the last layer.

    A layer moves `residual * identity + (1 - residual) * attention`; the layers are multiplied, the first on the right.

    Args:
        maps: one (batch, heads, tokens, tokens) a layer, first layer first.
        residual: the share of a token that passes by the attention through the skip connection.
        head: how heads are joined: "mean", "max" or "min" (rows are normalised again).
        drop: token positions to leave out: one list for every layer, or one list for each, where the number of tokens
            differs because prompts are inserted. The remaining attention of a row is scaled to sum to 1. That is exact
            for prompts that are thrown away after their layer (VPT-deep); prompts that live on also carry image.

    Returns:
        (batch, tokens kept, tokens kept), rows sum to 1.
    """
    if not maps:
        raise BadParameter("maps", [], "at least one attention map")
    if head not in ("mean", "max", "min"):
        raise BadParameter("head", head, ("mean", "max", "min"))
    if not 0 <= residual <= 1:
        raise BadParameter("residual", residual, "0 to 1")
    one_list = all(isinstance(item, int) for item in drop)
    drops = [drop] * len(maps) if one_list else list(drop)
    if len(drops) != len(maps):
        raise BadParameter("drop", drop, f"one list of positions, or {len(maps)} lists, one a layer")
    joined: Tensor | None = None
    for layer, (attention, dropped) in enumerate(zip(maps, drops, strict=True)):
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
    """Where the class token (position 0) looks, as a picture, heads averaged.

    Args:
        attention: (batch, heads, tokens, tokens) of one layer, or a rollout (batch, tokens, tokens).
        grid: rows and columns of patches.
        skip: the tokens that are neither class nor patch: how many stand between the two (VPT's prompts, register
            tokens), or their positions where they stand elsewhere.

    Returns:
        (batch, rows, columns): the row's own numbers, so they sum to at most 1.
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

    Args:
        tokens: (batch, rows * columns, channels), or without the batch; class and prompt tokens taken away before.
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
    low, high = np.percentile(parts, [1, 99], axis=0)
    colours = np.clip((parts - low) / np.maximum(high - low, 1e-12), 0, 1)
    return colours.reshape(*tokens.shape[:-2], rows, columns, 3)


def grad_cam(
    model: nn.Module,
    layer: nn.Module,
    images: Tensor,
    target: int | Tensor | Callable[[Any], Tensor],
    grid: tuple[int, int],
    skip: int = 1,
) -> Tensor:
    """Grad-CAM for a model of tokens: relu(sum over channels of mean gradient * activation) at `layer`.

    Args:
        model: gives logits (batch, classes) for `images`. Its parameters receive no gradient.
        layer: a module of `model` that gives tokens (batch, tokens, channels), or Swin's (batch, rows, columns,
            channels). Take the norm before the last attention: after it only the class token matters to the logits.
        images: (batch, 3, H, W), as the model wants them.
        target: the class to explain, one for all or (batch,), or a function from the model's output to scores (batch,).
        grid: rows and columns of patches.
        skip: how many tokens stand before the patches (class token, prompts).

    Returns:
        (batch, rows, columns) on the CPU, each picture's largest value is 1 (0 where nothing speaks for the target).
    """
    kept: list[Tensor] = []

    def watch(_module: nn.Module, _inputs: tuple, output: Tensor) -> Tensor:
        # a leaf of its own: gradients stop here, so nothing below the layer is paid for
        kept.append(output.detach().requires_grad_())
        return kept[-1]

    handle = layer.register_forward_hook(watch)
    try:
        with torch.enable_grad():
            output = model(images)
            if callable(target):
                scores = target(output)
            else:
                scores = output.gather(1, torch.as_tensor(target, device=output.device).expand(len(images))[:, None])
    finally:
        handle.remove()
    if len(kept) != 1:
        raise BadParameter(
            "layer", type(layer).__name__, f"a layer that runs once in a forward pass, not {len(kept)} times"
        )
    with torch.enable_grad():
        (gradient,) = torch.autograd.grad(scores.sum(), kept)
    tokens, gradient = (x.flatten(1, 2) if x.ndim == 4 else x[:, skip:] for x in (kept[0].detach(), gradient))
    rows, columns = grid
    if tokens.shape[1] != rows * columns:
        raise BadParameter("skip", skip, f"a number that leaves {rows * columns} tokens; {tokens.shape[1]} are left")
    if not gradient.any():
        raise BadParameter(
            "layer", type(layer).__name__, "a layer whose patch tokens reach the target (an earlier one)"
        )
    cam = torch.einsum("btc,bc->bt", tokens, gradient.mean(1)).relu()
    cam = cam / cam.amax(1, keepdim=True).clamp(min=1e-12)
    return cam.unflatten(1, (rows, columns)).float().cpu()


# ------------------------------------------------------------------------------------------------------------- pictures


def denormalise(image: Tensor, mean: Sequence[float], std: Sequence[float]) -> np.ndarray:
    """A model's input (3, H, W) back to a picture (H, W, 3) in 0 to 1."""
    picture = image.detach().float().cpu() * torch.tensor(std).view(3, 1, 1) + torch.tensor(mean).view(3, 1, 1)
    return picture.clamp(0, 1).permute(1, 2, 0).numpy()


def overlay(
    ax: Axes,
    image: Tensor,
    heat: Tensor,
    *,
    mean: Sequence[float] = (0, 0, 0),
    std: Sequence[float] = (1, 1, 1),
    limits: tuple[float, float] | None = None,
    mode: str = "bilinear",
    alpha: float = 0.6,
    colour_bar: bool = False,
) -> AxesImage:
    """Draw `heat` over the grey `image`, so that colour means heat and nothing else.

    Args:
        image: (3, H, W), normalised with `mean` and `std`.
        heat: (rows, columns), stretched over the image.
        limits: the heat's values at the two ends of the colours; default its smallest and largest.
        mode: "bilinear" or "nearest" (each patch a square).
        alpha: how far the heat covers the image.

    Returns:
        The heat's artist, for a colour bar over several pictures.
    """
    if mode not in ("bilinear", "nearest"):
        raise BadParameter("mode", mode, ("bilinear", "nearest"))
    grey = denormalise(image, mean, std) @ np.array([0.299, 0.587, 0.114])
    height, width = grey.shape
    ax.imshow(grey, cmap="gray", vmin=0, vmax=1, interpolation="antialiased")
    values = torch.as_tensor(heat).detach().float().cpu().numpy()
    low, high = limits or (values.min(), values.max())
    extent = (-0.5, width - 0.5, height - 0.5, -0.5)
    drawn = ax.imshow(values, cmap=HEAT, vmin=low, vmax=high, alpha=alpha, extent=extent, interpolation=mode)
    ax.set_axis_off()
    if colour_bar:
        ax.figure.colorbar(ScalarMappable(Normalize(low, high), HEAT), ax=ax, shrink=0.85)
    return drawn


def _panel(count: int) -> float:
    """Side of one of `count` photographs in inches, so that all of them together make a small PNG."""
    return float(np.clip(math.sqrt(_PHOTO_PIXELS / count) / _DPI, 0.8, 1.4))


def _wrap(text: str, inches: float, size: float = 8.5) -> str:
    """Break `text` into lines that fit; DejaVu's letters are about 0.6 of their size wide, some wider."""
    return textwrap.fill(str(text), max(8, int(inches * 72 / (0.62 * size))))


@_styled
def show_images(
    images: Tensor,
    titles: Sequence[str] | None = None,
    columns: int = 6,
    *,
    mean: Sequence[float] = (0, 0, 0),
    std: Sequence[float] = (1, 1, 1),
) -> Figure:
    """Images (number, 3, H, W), normalised with `mean` and `std`, in a grid, each below its title."""
    columns = min(columns, len(images))
    rows = math.ceil(len(images) / columns)
    side = _panel(len(images))
    labels = [_wrap(title, side) for title in titles] if titles is not None else [""] * len(images)
    if len(labels) != len(images):
        raise BadParameter("titles", f"{len(labels)} titles", f"{len(images)}, one an image")
    lines = max(label.count("\n") + 1 if label else 0 for label in labels)
    figure, axes = plt.subplots(
        rows, columns, figsize=(columns * (side + 0.12), rows * (side + 0.1 + 0.17 * lines)), squeeze=False
    )
    for ax in axes.flat:
        ax.set_axis_off()
    for ax, image, label in zip(axes.flat, images, labels, strict=False):
        ax.imshow(denormalise(image, mean, std), interpolation="nearest" if image.shape[-1] < 64 else "antialiased")
        ax.set_title(label, fontsize=8.5)
    return figure


@_styled
def attention_grid(
    images: Tensor,
    rows: Mapping[str, Tensor],
    titles: Sequence[str] | None = None,
    *,
    mean: Sequence[float] = (0, 0, 0),
    std: Sequence[float] = (1, 1, 1),
    mode: str = "bilinear",
    shared: bool = False,
    label: str = "attention",
) -> Figure:
    """Methods below each other, images beside each other, the plain images on top.

    Args:
        images: (number, 3, H, W), normalised with `mean` and `std`.
        rows: a method's name and its maps (number, rows, columns).
        titles: one for each image.
        mode: see `overlay`.
        shared: one scale for all maps, with its colour bar; otherwise each map goes from its own lowest to its own
            highest value, and the bar says so.
        label: what the colours show.
    """
    for name, maps in rows.items():
        if len(maps) != len(images):
            raise BadParameter("rows", f"{name}: {len(maps)} maps", f"{len(images)} maps, one an image")
    side = _panel(len(images) * (len(rows) + 1))
    names = {"image": "image"} | {name: _wrap(name, 1.1, 9) for name in rows}
    lines = max((_wrap(title, side).count("\n") + 1 for title in titles or ()), default=0)
    size = (len(images) * (side + 0.05) + 1.9, (len(rows) + 1) * (side + 0.05) + 0.17 * lines)
    figure, axes = plt.subplots(len(rows) + 1, len(images), figsize=size, squeeze=False, layout="compressed")
    every = torch.cat([torch.as_tensor(maps).flatten() for maps in rows.values()])
    limits = (every.min().item(), every.max().item()) if shared else None
    for column, image in enumerate(images):
        axes[0, column].imshow(denormalise(image, mean, std), interpolation="antialiased")
        if titles is not None:
            axes[0, column].set_title(_wrap(titles[column], side), fontsize=8.5)
        for line, maps in enumerate(rows.values(), 1):
            overlay(axes[line, column], image, maps[column], mean=mean, std=std, limits=limits, mode=mode)
    for line, name in enumerate(names.values()):
        axes[line, 0].set_ylabel(name, rotation=0, ha="right", va="center")
    for ax in axes.flat:
        ax.set_axis_on()
        ax.set(xticks=[], yticks=[])
        ax.spines[:].set_visible(False)
    bar = figure.colorbar(ScalarMappable(Normalize(*(limits or (0, 1))), HEAT), ax=axes, shrink=0.75, aspect=25)
    bar.set_label(label, labelpad=3)
    bar.outline.set_visible(False)
    if not shared:
        bar.set_ticks([0, 1], labels=["lowest", "highest"])
    return figure


def tsne(features: Tensor, labels: Tensor, ax: Axes, seed: int = 0, names: Sequence[str] | None = None) -> np.ndarray:
    """Draw features (number, channels) of classes `labels` (number,) in the plane by scikit-learn's t-SNE.

    The perplexity is 30, or less for fewer than 100 points. Classes differ by colour and marker. Returns the places
    (number, 2). Distances between groups and sizes of groups mean nothing in such a picture.
    """
    features = features.detach().float().cpu().numpy()
    labels = np.asarray(labels)
    perplexity = min(30.0, (len(features) - 1) / 3)
    places = TSNE(init="pca", perplexity=perplexity, random_state=seed).fit_transform(features)
    for i, kind in enumerate(np.unique(labels)):
        here = places[labels == kind]
        colour, marker = COLOURS[i % len(COLOURS)], "osD^vP*X"[i // len(COLOURS) % 8]
        name = str(kind) if names is None else names[int(kind)]
        ax.scatter(*here.T, s=16, color=colour, marker=marker, edgecolors="#333333", linewidths=0.3, label=name)
    ax.set(xticks=[], yticks=[])
    ax.spines[:].set_visible(False)
    ax.legend(loc="upper left", bbox_to_anchor=(1, 1), borderaxespad=0, handletextpad=0.2)
    return places


@_styled
def curves(histories: Mapping[str, Mapping[str, Any]], x: str = "epoch") -> Figure:
    """One panel for each measure, one line for each method.

    Args:
        histories: method -> measure -> its values, one a step, or (seeds, steps): then the mean is drawn, and the
            range over the seeds as a band. A pandas DataFrame serves as the inner mapping. Values under the key `x`
            place the steps; without it they are counted from 1.
        x: the horizontal axis.
    """
    measures = list(dict.fromkeys(name for history in histories.values() for name in history if name != x))
    if not measures:
        raise BadParameter("histories", dict(histories), "at least one method with one measure")
    figure, axes = plt.subplots(1, len(measures), figsize=(max(4.2, 3.2 * len(measures)), 2.9), squeeze=False)
    handles: dict[str, Any] = {}
    for ax, measure in zip(axes[0], measures, strict=True):
        for i, (method, history) in enumerate(histories.items()):
            if measure not in history:
                continue
            values = np.atleast_2d(np.asarray(history[measure], dtype=float))
            steps = np.asarray(history[x]) if x in history else np.arange(1, values.shape[1] + 1)
            colour, dash = COLOURS[i % len(COLOURS)], ("-", "--", ":", "-.")[i % 4]
            (handles[method],) = ax.plot(steps, values.mean(0), dash, color=colour, label=method)
            if len(values) > 1:
                ax.fill_between(steps, values.min(0), values.max(0), color=colour, alpha=0.18, linewidth=0)
        ax.set(xlabel=x, title=measure)
        ax.grid(axis="y")
        ax.xaxis.get_major_locator().set_params(integer=True, nbins=6)
    if len(handles) > 1:
        width = figure.get_figwidth() * 72
        longest = max(map(len, handles)) * 5.4 + 40  # points: letters of the legend, its line and gaps
        columns = int(np.clip(width // longest, 1, len(handles)))
        figure.legend(handles.values(), handles, loc="outside lower center", ncols=columns)
    return figure


@_styled
def bars(table: pd.DataFrame, error: pd.DataFrame | None = None, value: str = "accuracy (%)") -> Figure:
    """A table as bars: a group for each row (task), a bar for each column (method), its number beside it.

    Args:
        table: the values; a missing one (NaN) is left out.
        error: the spreads, same rows and columns, drawn as whiskers on both sides.
        value: what the values are, with their unit.
    """
    if error is not None and not (table.index.equals(error.index) and table.columns.equals(error.columns)):
        raise BadParameter("error", list(error.columns), f"the rows and columns of the table: {list(table.columns)}")
    groups, methods = len(table.index), len(table.columns)
    thick = 0.19  # inches a bar: a number at 8 points fits beside it
    figure, ax = plt.subplots(figsize=(6.4, groups * (methods * thick + 0.14) + 0.75 + 0.2 * math.ceil(methods / 4)))
    step = 1 / (methods + 0.14 / thick)
    for i, method in enumerate(table.columns):
        places = np.arange(groups) + (i - (methods - 1) / 2) * step
        values = table[method].to_numpy(dtype=float)
        spread = np.zeros(groups) if error is None else np.nan_to_num(error[method].to_numpy(dtype=float))
        whiskers = None if error is None else spread
        ax.barh(
            places,
            values,
            step * 0.86,
            xerr=whiskers,
            color=COLOURS[i % len(COLOURS)],
            label=str(method),
            error_kw={"elinewidth": 1, "ecolor": "#333333", "capsize": 2},
        )
        for place, number, reach in zip(places, values, spread, strict=True):
            if math.isfinite(number):
                text = f"{number:.1f}" if error is None else f"{number:.1f} ± {reach:.1f}"
                ax.annotate(
                    text, (max(number + reach, 0), place), (4, 0), textcoords="offset points", va="center", fontsize=8
                )
    ax.set_yticks(range(groups), [_wrap(name, 1.5) for name in table.index])
    ax.tick_params(axis="y", length=0)
    ax.invert_yaxis()
    ax.margins(x=0.14, y=0.01)
    ax.grid(axis="x")
    ax.set_xlabel(value)
    if methods > 1:
        longest = max(len(str(method)) for method in table.columns) * 5.4 + 40
        figure.legend(loc="outside upper center", ncols=int(np.clip(6.4 * 72 // longest, 1, methods)))
    return figure


def boxes(ax: Axes, image: np.ndarray, drawn: Mapping[str, Sequence[float]]) -> None:
    """Show an image (H, W, 3) uint8 with boxes on it: colour (as matplotlib names it) -> x, y, w, h in pixels."""
    ax.imshow(image, interpolation="antialiased")
    for colour, (x, y, w, h) in drawn.items():
        ax.add_patch(Rectangle((x - 0.5, y - 0.5), w, h, fill=False, edgecolor=colour, linewidth=1.3))
    ax.set(xticks=[], yticks=[], xlim=(-0.5, image.shape[1] - 0.5), ylim=(image.shape[0] - 0.5, -0.5))


def boxed(image: np.ndarray, boxes: Mapping[str, Sequence[float]], scale: int = 2) -> np.ndarray:
    """A frame with boxes drawn into its pixels, enlarged so that thin lines stay sharp: for films.

    Args:
        image: (H, W, 3) uint8.
        boxes: colour (as matplotlib names it) -> x, y, w, h in pixels; later ones are drawn over earlier ones.
        scale: how many pixels each pixel becomes, each way.

    Returns:
        (scale * H, scale * W, 3) uint8.
    """
    large = Image.fromarray(image).resize((image.shape[1] * scale, image.shape[0] * scale), Image.Resampling.BILINEAR)
    pen = ImageDraw.Draw(large)
    for colour, (x, y, w, h) in boxes.items():
        corners = np.array([x, y, x + w, y + h]) * scale
        pen.rectangle(corners.round().tolist(), outline=to_hex(colour), width=max(1, scale))
    return np.asarray(large)


@_styled
def rates(
    panels: Mapping[str, Mapping[str, tuple[Sequence[float], Sequence[float]]]], values: Mapping[str, str]
) -> Figure:
    """Success, precision and the like: the share of frames that pass each threshold, a line a method.

    Args:
        panels: what the threshold is of (the horizontal axis) -> method -> (thresholds, shares in 0 to 1).
        values: method -> what its legend says besides its name, for example its scores.
    """
    figure, axes = plt.subplots(1, len(panels), figsize=(max(4.2, 3.5 * len(panels)), 3.4), squeeze=False)
    handles: dict[str, Any] = {}
    for ax, (name, methods) in zip(axes[0], panels.items(), strict=True):
        for i, (method, (thresholds, shares)) in enumerate(methods.items()):
            colour, dash = COLOURS[i % len(COLOURS)], ("-", "--", ":", "-.")[i % 4]
            (handles[method],) = ax.plot(thresholds, shares, dash, color=colour)
        ax.set(xlabel=name, ylim=(0, 1.02), xlim=(min(thresholds), max(thresholds)))
        ax.grid()
    axes[0, 0].set_ylabel("share of frames")
    labels = [f"{method}  {values.get(method, '')}".strip() for method in handles]
    width, longest = figure.get_figwidth() * 72, max(map(len, labels)) * 5.4 + 40
    columns = int(np.clip(width // longest, 1, len(labels)))
    figure.legend(handles.values(), labels, loc="outside lower center", ncols=columns)
    return figure


@_styled
def radar(tables: Mapping[str, Mapping[str, float]], low: float = 0.0, high: float = 100.0) -> Figure:
    """One radar for each table: its rows around the circle, from `low` at the centre to `high` at the rim."""
    figure, axes = plt.subplots(
        1, len(tables), figsize=(3.9 * len(tables), 3.9), squeeze=False, subplot_kw={"projection": "polar"}
    )
    for i, (ax, (name, rows)) in enumerate(zip(axes[0], tables.items(), strict=True)):
        turns = np.linspace(0, 2 * np.pi, len(rows), endpoint=False)
        spokes, values = [*turns, turns[0]], [*rows.values(), next(iter(rows.values()))]
        ax.plot(spokes, values, color=COLOURS[i], linewidth=1.6)
        ax.fill(spokes, values, color=COLOURS[i], alpha=0.15)
        ax.set_xticks(turns, [f"{row}\n{value:.1f}" for row, value in rows.items()], fontsize=8)
        ax.set(ylim=(low, high), title=name)
        ax.set_yticks(np.linspace(low, high, 5)[1:], labels=[])
        ax.tick_params(axis="x", pad=6)
        ax.set_theta_zero_location("N")
        ax.set_theta_direction(-1)
    return figure

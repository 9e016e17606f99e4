"""ECAMP: entity-centred, context-aware medical vision-language pre-training (Wang, Yao et al., MedIA 2025).

A ViT is pre-trained on chest X-rays and their reports, without labels. Three quarters of the image's patches and most
of the report's words are masked; both are predicted, the words from the report and the tokens of the visible patches.
Downstream tasks use the ViT alone.

    pixels  (B, 3, 448, 448) --bicubic--> 224 --49 of 196 patches--> ViT --> z (B, 49, 768)
    z --image decoder--> all patches, L_mim   --super-resolution--> 448, inside an attention window, L_sr
    z, words --context fusion, BERT layers--> the hidden words, weighted, L_mlm        loss = L_mim + L_sr + L_mlm

Masking and weights of the words are drawn by the data set, `text.Pairs`. Classifier, segmenter and detector on the
pre-trained ViT: `heads`.

The paper's text was not available: everything is from the authors' code (github ToniChopp/ECAMP at d02d16d, MIT), read
and reimplemented; outputs agree with ones recorded from it. Section numbers are those of our notes on it.

Shapes: B pairs, N patches (K of them visible), L text tokens, V words, D the ViT's width, H the text's width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from timm.models import checkpoint_seq
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from ...errors import BadCheckpoint, BadParameter, check_choice
from ..layers.mae import Decoder, patchify, random_mask, unpatchify, visible_tokens
from ..layers.pos_embed import sincos_table
from ..layers.state_dicts import OfficialModel, check_names, depth, load_official, renamed

FUSIONS = ("both", "patch", "mean", "pooled")
POSITIONS = ("ecamp", "mae")
PREDICTIONS = ("low-res", "high-res")
MASKED = 0.75  # fraction of hidden patches
OFFICIAL = "ECAMP (or MRM): the pre-training model, decoders and BERT included"

# the paper's sizes, and those of the pocket profile (section 14)
SIZES: dict[str, dict[str, Any]] = {
    "paper": {},
    "pocket": {
        "image": 32,
        "patch": 4,
        "width": 96,
        "depth": 3,
        "heads": 4,
        "decoder_width": 48,
        "decoder_depth": 1,
        "decoder_heads": 4,
        "window": 6,
        "words": 40,
        "length": 20,
        "text_width": 96,
        "text_depth": 1,
        "text_heads": 4,
        "text_hidden": 192,
        "dropout": 0.0,
    },
}

METHODS: dict[str, tuple[dict, dict]] = {
    "MIM only": ({"text": False, "super_resolution": False}, {}),
    "MRM-like": (
        {"fusion": "pooled", "super_resolution": False},
        {"masking": "mrm", "rebalance": False, "splice_share": 0.0},
    ),
    "ECAMP": ({}, {}),
    "ECAMP, no super-resolution": ({"super_resolution": False}, {}),
    "ECAMP, no re-balancing": ({}, {"rebalance": False}),
    "ECAMP, no distillation": ({}, {"splice_share": 0.0}),
    "ECAMP, descriptors hidden": ({}, {"masking": "intended"}),
    "ECAMP, whole image": ({"window": None}, {}),
    "ECAMP, mean token": ({"fusion": "mean"}, {}),
    "ECAMP, patch attention": ({"fusion": "patch"}, {}),
}
"""The pre-trainings, by name: arguments of `ECAMP`, and of `text.Pairs`."""

# our names -> the authors'; the patterns are applied in order
_RENAMES = (
    (r"^encoder\.", ""),
    (r"^decoder\.mask_token", "mask_token"),
    (r"^decoder\.pixels", "decoder_pred"),
    (r"^decoder\.", "decoder_"),
    (r"^super_resolution\.", "super_res."),
    (r"^project\.", "bert_mlp."),
    (r"^text\.head\.decoder", "bert_encoder.model.cls.predictions.decoder"),
    (r"^text\.head", "bert_encoder.model.cls.predictions.transform"),
    (r"^text\.", "bert_encoder.model.bert."),
    (r"embeddings\.(word|position)s\.", r"embeddings.\1_embeddings."),
    (r"embeddings\.types\.", "embeddings.token_type_embeddings."),
    (r"bert\.layers\.", "bert.encoder.layer."),
    (r"pooler\.", "pooler.dense."),
    (r"fusion\.cross\.", "fusion.cross_self_attention."),
    (r"fusion\.mean\.", "fusion.gap_mlp."),
    (r"fusion\.mix\.", "fusion.out_layer."),
    (r"bert\.fusion\.", "bert.context_fusion_layer."),
    (r"\.self\.", ".attention.self."),
    (r"\.attended\.", ".attention.output."),
    (r"\.wide\.", ".intermediate.dense."),
    (r"\.narrow\.", ".output."),
)


class Batch(NamedTuple):
    """B image-report pairs with all random draws; `text.Pairs` returns them one by one."""

    images: Tensor  # (B, 3, 2 S, 2 S), normalised; the encoder receives them at S
    ids: Tensor  # (B, L) words, some of them [MASK]
    labels: Tensor  # (B, L) the same without [MASK]
    attention: Tensor  # (B, L) 1, or 0 for padding
    weights: Tensor  # (B, L) weight of each position in the text loss
    noise: Tensor  # (B, N) the K patches of the lowest noise are visible
    window: Tensor  # (B, 2) row and column of the window's corner, in patches


class Losses(NamedTuple):
    """The sum of the losses and the three losses, scalars; a loss that a variant does not have is zero."""

    total: Tensor
    mim: Tensor
    sr: Tensor
    mlm: Tensor


class ECAMP(OfficialModel):
    """The pre-training model: from a `Batch` to its `Losses`.

    Args:
        image: S, side of the encoder's input in pixels; the images of a batch have side 2 S.
        patch, width, depth, heads: the encoder, ViT-B/16.
        decoder_width, decoder_depth, decoder_heads: the image decoder.
        words, length: the vocabulary and the longest text.
        text_width, text_depth, text_heads, text_hidden, dropout: the text decoder.
        text: False for masked image modelling alone.
        super_resolution: False leaves the super-resolution loss out.
        window: side in patches of the window inside which the super-resolution loss is computed; None: the whole image.
        fusion: how image tokens enter the text. "both": cross-attention of the words to the visible patches, plus the
            mean of these; "patch" or "mean": one of the two; "pooled": the mean is added to the word embeddings and
            there is no fusion layer, as in MRM, on which ECAMP builds.
        positions: the fixed position embeddings, "ecamp" as released or "mae" (section 3.2).
        predict: output of the image decoder, "low-res" patches, or "high-res" ones as in MRM, which has no
            super-resolution block.
        pooler: build the released model's BERT pooler too: 590,592 parameters that receive no gradient.

    Raises `BadParameter`: an option outside its choices.
    """

    def __init__(
        self,
        *,
        image: int = 224,
        patch: int = 16,
        width: int = 768,
        depth: int = 12,
        heads: int = 12,
        decoder_width: int = 512,
        decoder_depth: int = 4,
        decoder_heads: int = 16,
        words: int = 30000,
        length: int = 256,
        text_width: int = 768,
        text_depth: int = 6,
        text_heads: int = 6,
        text_hidden: int = 1536,
        dropout: float = 0.1,
        text: bool = True,
        super_resolution: bool = True,
        window: int | None = 12,
        fusion: str = "both",
        positions: str = "ecamp",
        predict: str = "low-res",
        pooler: bool = False,
    ):
        super().__init__()
        check_choice("fusion", fusion, FUSIONS)
        check_choice("positions", positions, POSITIONS)
        check_choice("predict", predict, PREDICTIONS)
        side = image // patch
        if side * patch != image:
            raise BadParameter("image", image, f"a multiple of the patch, {patch}")
        if window is not None and not 1 <= window <= side:
            raise BadParameter("window", window, f"1 to {side} patches, or None")
        if predict == "high-res" and super_resolution:
            raise BadParameter("super_resolution", True, "False where the decoder itself predicts the high resolution")
        self.image, self.patch, self.window, self.fusion = image, patch, window, fusion
        self.scale = 2 if predict == "high-res" else 1
        self.encoder = VisionTransformer(
            img_size=image,
            patch_size=patch,
            embed_dim=width,
            depth=depth,
            num_heads=heads,
            num_classes=0,
            global_pool="",
        )
        self.encoder.pos_embed = nn.Parameter(sincos_table(width, side, positions), requires_grad=False)
        self.decoder = ImageDecoder(
            width, decoder_width, decoder_depth, decoder_heads, side, positions, 3 * (self.scale * patch) ** 2
        )
        self.super_resolution = SuperResolution() if super_resolution else None
        self.project = nn.Linear(width, text_width) if text else None
        self.text = None
        if text:
            self.text = TextDecoder(
                words, length, text_width, text_depth, text_heads, text_hidden, dropout, fusion, pooler
            )
        self.apply(_initialise)
        nn.init.xavier_uniform_(self.encoder.patch_embed.proj.weight.data.flatten(1))
        nn.init.zeros_(self.encoder.patch_embed.proj.bias)
        nn.init.normal_(self.encoder.cls_token, std=0.02)
        nn.init.normal_(self.decoder.mask_token, std=0.02)

    @property
    def patches(self) -> int:
        """N."""
        return self.encoder.patch_embed.num_patches

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the encoder's activations in the backward pass: less memory, more time."""
        self.encoder.set_grad_checkpointing(enable)

    def forward_features(self, images: Tensor, keep: Tensor | None = None) -> Tensor:
        """Encoder tokens (B, 1 + K, D) of images (B, 3, S, S), [CLS] first.

        `keep` (B, K): indices of the visible patches; None: all N of them.
        """
        vit = self.encoder
        x = visible_tokens(vit, images, keep)
        return vit.norm(checkpoint_seq(vit.blocks, x) if vit.grad_checkpointing else vit.blocks(x))

    def forward(self, batch: Batch, trace: dict[str, Tensor] | None = None) -> Losses:
        """The losses of a batch; `trace` receives intermediate tensors by name, the fusion's "attention" among them."""
        seen = {} if trace is None else trace
        images = batch.images
        if images.shape[-1] != 2 * self.image:
            raise BadParameter(
                "images", tuple(images.shape), f"a side of {2 * self.image}, twice what the encoder sees"
            )
        low = shrink(images)
        keep, hidden = random_mask(batch.noise, int(self.patches * (1 - MASKED)))
        latent = self.forward_features(low, keep)
        pixels = self.decoder(latent, keep)  # (B, N, 3 p p), in raster order

        target = patchify(images if self.scale == 2 else low, self.scale * self.patch)
        mim = mim_loss(pixels, target, hidden)
        seen |= {"low": low, "keep": keep, "hidden": hidden, "latent": latent, "pixels": pixels}

        sr = mlm = mim.new_zeros(())
        if self.super_resolution is not None:
            seen["super_resolved"] = resolved = self.super_resolution(unpatchify(pixels, self.patch))
            inside = None
            if self.window is not None:
                inside = windows(batch.window, self.window, 2 * self.patch, images.shape[-1])
            sr = sr_loss(resolved, images, inside)
        if self.text is not None and self.project is not None:
            z = self.project(latent[:, 1:])
            seen["logits"] = logits = self.text(batch.ids, batch.attention, z, trace)
            mlm, seen["cross_entropy"] = mlm_loss(logits, batch.labels, batch.weights)
        return Losses(mim + sr + mlm, mim, sr, mlm)

    @torch.no_grad()
    def attention(self, images: Tensor, ids: Tensor, attention: Tensor) -> Tensor:
        """Cross-attention of the words, (B, heads, L, N), over all patches of whole images, in raster order.

        Args:
            images: (B, 3, S, S).
            ids, attention: (B, L).
        """
        if self.text is None or self.project is None or self.fusion not in ("both", "patch"):
            raise BadParameter("fusion", self.fusion, "'both' or 'patch': in others no word attends to patches")
        trace: dict[str, Tensor] = {}
        self.text(ids, attention, self.project(self.forward_features(images)[:, 1:]), trace)
        return trace["attention"]

    # --- the authors' names ---

    def official_names(self) -> dict[str, str]:
        """Our names -> theirs."""
        found = renamed(self.state_dict(), _RENAMES)
        return {
            ours: n.replace(".norm.", ".LayerNorm.") if ours.startswith("text.") else n for ours, n in found.items()
        }

    @classmethod
    def from_official(
        cls,
        state: Mapping[str, Tensor],
        *,
        heads: int | None = None,
        decoder_heads: int | None = None,
        text_heads: int = 6,
        window: int | None = 12,
        dropout: float = 0.1,
    ) -> ECAMP:
        """The model of a state dict of the authors' code, in eval mode; its sizes are read from the tensors.

        Files of MRM (github RL4M/MRM-pytorch), and older ones that call the fusion layer `cross_attn_layer`, load too.
        The inverse is `to_official`.

        Args:
            heads, decoder_heads, text_heads: not readable from tensors. None: one head for 64 channels of the encoder;
                16 in the decoder, 6 for MRM's.

        Raises `BadCheckpoint`: missing and unknown names and other shapes, all of them listed.
        """
        state = {n.replace("cross_attn_layer", "context_fusion_layer"): t for n, t in state.items()}
        bert = "bert_encoder.model."
        head, words = bert + "cls.predictions.", bert + "bert.embeddings.word_embeddings.weight"
        # transformers stores one tensor under two names; position_ids is a counter in files of older releases
        bias = state.pop(head + "bias", None)
        if bias is not None:
            state.setdefault(head + "decoder.bias", bias)
        state.pop(bert + "bert.embeddings.position_ids", None)
        wide = next((n for n in state if n.startswith(bert) and n.endswith("intermediate.dense.weight")), "")
        needed = {
            "patch_embed.proj.weight",
            "pos_embed",
            "decoder_pos_embed",
            "decoder_pred.weight",
            "bert_mlp.weight",
            words,
            bert + "bert.embeddings.position_embeddings.weight",
            wide or bert + "bert.encoder.layer.0.intermediate.dense.weight",
        }
        check_names(state, needed, OFFICIAL)
        width, _, _, patch = state["patch_embed.proj.weight"].shape
        fused = any("context_fusion_layer" in name for name in state)
        high = state["decoder_pred.weight"].shape[0] == 3 * (2 * patch) ** 2

        model = cls(
            image=math.isqrt(state["pos_embed"].shape[1] - 1) * patch,
            patch=patch,
            width=width,
            depth=depth(state, "blocks."),
            heads=heads or max(1, width // 64),
            decoder_width=state["decoder_pos_embed"].shape[2],
            decoder_depth=depth(state, "decoder_blocks."),
            decoder_heads=decoder_heads or (6 if high else 16),
            words=len(state[words]),
            length=len(state[bert + "bert.embeddings.position_embeddings.weight"]),
            text_width=state[words].shape[1],
            text_depth=depth(state, bert + "bert.encoder.layer."),
            text_heads=text_heads,
            text_hidden=len(state[wide]),
            dropout=dropout,
            super_resolution=not high,
            window=window,
            fusion="both" if fused else "pooled",
            predict="high-res" if high else "low-res",
            pooler=bert + "bert.pooler.dense.weight" in state,
        ).eval()
        load_official(model, state, model.official_names(), OFFICIAL)
        return model

    def to_official(self) -> dict[str, Tensor]:
        """The state dict under the authors' names."""
        state = super().to_official()
        head = "bert_encoder.model.cls.predictions."
        if self.text is not None:
            state[head + "bias"] = state[head + "decoder.bias"]
        return state

    def load_mae(self, state: Mapping[str, Tensor]) -> list[str]:
        """Initialise from a masked autoencoder's state dict, as the paper does; return our names of the loaded tensors.

        Every tensor of the same name and shape is loaded, position embeddings included; BERT keeps its initialisation.
        MAE's image decoder has eight blocks, of which the first ones are loaded; without a decoder only the encoder is
        loaded.

        Raises `BadCheckpoint`: tensors of the encoder that are missing or of another shape.
        """
        own, names = self.state_dict(), self.official_names()
        fits = {ours: state[theirs] for ours, theirs in names.items() if theirs in state}
        wrong = [
            f"{names[n]} {tuple(t.shape)}, expected {tuple(own[n].shape)}"
            for n, t in fits.items()
            if n.startswith("encoder.") and t.shape != own[n].shape
        ]
        missing = [names[n] for n in own if n.startswith("encoder.") and n not in fits]
        if missing or wrong:
            raise BadCheckpoint("the encoder of ECAMP (MAE's names)", missing, shapes=wrong)
        fits = {n: t for n, t in fits.items() if t.shape == own[n].shape}
        self.load_state_dict(fits, strict=False)
        return list(fits)


def build(size: str = "paper", **options: Any) -> ECAMP:
    """An ECAMP with random weights (torch's current seed), of one of `SIZES`; `options` as in `ECAMP`."""
    check_choice("size", size, SIZES)
    return ECAMP(**{**SIZES[size], **options})


def pretraining_loss(model: nn.Module, items: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """The losses of a batch by name, for `fit`: "loss" is the sum of "mim", "sr" and "mlm"."""
    total, *terms = model(Batch(*items))
    return {"loss": total} | dict(zip(Losses._fields[1:], terms, strict=True))


def _initialise(module: nn.Module) -> None:
    """Section 3.7: linear layers Xavier-uniform, norms 1 and 0, embeddings N(0, 0.02)."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.LayerNorm):
        nn.init.ones_(module.weight)
        nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
        if module.padding_idx is not None:
            nn.init.zeros_(module.weight.data[module.padding_idx])


# --- images -----------------------------------------------------------------------------------------------------------


def shrink(images: Tensor) -> Tensor:
    """Images at half the size, bicubic, not antialiased, as the authors' version of torchvision resizes tensors."""
    return F.interpolate(images, scale_factor=0.5, mode="bicubic", align_corners=False, antialias=False)


def windows(corners: Tensor, side: int, cell: int, size: int) -> Tensor:
    """(B, 1, size, size): 1 inside the window of side x side cells of `cell` pixels, whose corners (B, 2) are in cells.

    A corner is (row, column): the released code calls the first a column and uses it as a row.
    """
    position = torch.arange(size, device=corners.device) // cell
    rows, columns = ((position >= c[:, None]) & (position < c[:, None] + side) for c in corners.T)
    return (rows[:, None, :, None] & columns[:, None, None, :]).float()


def mim_loss(pixels: Tensor, target: Tensor, hidden: Tensor) -> Tensor:
    """Squared error on hidden patches, averaged over ALL pixels: 0.75 times MAE's loss.

    Args:
        pixels, target: (B, N, p p 3).
        hidden: (B, N), 1 or 0.
    """
    return (F.mse_loss(pixels, target, reduction="none").mean(2) * hidden).mean()


def sr_loss(resolved: Tensor, images: Tensor, window: Tensor | None = None) -> Tensor:
    """Squared error inside the window (B, 1, 2 S, 2 S; None: everywhere), averaged over ALL pixels."""
    error = F.mse_loss(resolved, images, reduction="none")
    return (error if window is None else error * window).mean()


def mlm_loss(logits: Tensor, labels: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Weighted cross-entropy averaged over ALL positions, and the unweighted cross-entropies (B, L).

    Visible words and padding count too; the divisor is the number of positions, which the weights sum to.
    """
    each = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view_as(labels)
    return (weights * each).mean(), each


class ImageDecoder(Decoder):
    """MAE's decoder: from the tokens of the visible patches to the pixels of all patches (section 3.3)."""

    def __init__(self, inputs: int, width: int, depth: int, heads: int, side: int, positions: str, outputs: int):
        super().__init__(inputs, width, depth, heads, side, positions)
        self.pixels = nn.Linear(width, outputs)

    def forward(self, latent: Tensor, keep: Tensor) -> Tensor:
        """Pixels (B, N, outputs) from tokens (B, 1 + K, D) of the patches `keep` (B, K)."""
        return self.pixels(self.norm(self.hidden(latent, keep)[:, 1:]))


class SuperResolution(nn.Module):
    """Images of twice the size: y = ReLU(u + conv(ReLU(conv(u)))), u bilinear (section 3.4), 168 parameters.

    As released the output is never negative, so the negative half of a normalised image cannot be fitted.
    """

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        u = F.interpolate(images, scale_factor=2, mode="bilinear", align_corners=False)
        return F.relu(u + self.conv2(F.relu(self.conv1(u))))


# --- words ------------------------------------------------------------------------------------------------------------


class Attention(nn.Module):
    """Multi-head attention without an output projection: in BERT `AddNorm` has it, the fusion layer has none."""

    def __init__(self, width: int, heads: int, dropout: float):
        super().__init__()
        if width % heads:
            raise BadParameter("text_heads", heads, f"a divisor of the text's width, {width}")
        self.heads, self.dropout = heads, dropout
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))

    def forward(
        self, x: Tensor, y: Tensor, there: Tensor | None = None, trace: dict[str, Tensor] | None = None
    ) -> Tensor:
        """Attention (B, L, H) of queries x (B, L, H) to keys and values y (B, M, H); `there` (B, 1, 1, M): the mask."""
        q, k, v = (
            t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (self.query(x), self.key(y), self.value(y))
        )
        dropout = self.dropout if self.training else 0.0
        if trace is None:
            out = F.scaled_dot_product_attention(q, k, v, there, dropout)
        else:  # with the probabilities (B, heads, L, M)
            scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
            if there is not None:
                scores = scores.masked_fill(~there, -torch.inf)
            trace["attention"] = scores.softmax(-1)
            out = F.dropout(trace["attention"], dropout) @ v
        return out.transpose(1, 2).flatten(2)


class AddNorm(nn.Module):
    """LN(dropout(W x) + residual), the end of both halves of a BERT layer."""

    def __init__(self, inputs: int, width: int, dropout: float):
        super().__init__()
        self.dense, self.norm, self.dropout = nn.Linear(inputs, width), nn.LayerNorm(width, 1e-12), nn.Dropout(dropout)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return self.norm(self.dropout(self.dense(x)) + residual)


class _Layer(nn.Module):
    """The weights of a post-norm transformer layer."""

    def __init__(self, width: int, heads: int, hidden: int, dropout: float):
        super().__init__()
        self.self, self.attended = Attention(width, heads, dropout), AddNorm(width, width, dropout)
        self.wide, self.narrow = nn.Linear(width, hidden), AddNorm(hidden, width, dropout)


class BertLayer(_Layer):
    """Post-norm transformer layer: self-attention, then an MLP."""

    def forward(self, x: Tensor, there: Tensor) -> Tensor:
        a = self.attended(self.self(x, x, there), x)
        return self.narrow(F.gelu(self.wide(a)), a)


class Fusion(_Layer):
    """Multi-scale context fusion: a BERT layer with cross-attention to the image tokens in its middle (section 3.5).

    a = LN(W_o SelfAttention(x) + x)
    c = CrossAttention(a, z)                 fine: each word attends to the visible patches, no output projection
    m = LN(W_m (c + W_g mean(z)) + a)        coarse: every word receives the mean of the patches
    f = LN(W_2 GELU(W_1 m) + m)
    """

    def __init__(self, width: int, heads: int, hidden: int, dropout: float, kind: str):
        super().__init__(width, heads, hidden, dropout)
        self.cross = Attention(width, heads, dropout) if kind in ("both", "patch") else None
        self.mean = nn.Linear(width, width) if kind in ("both", "mean") else None
        self.mix = AddNorm(width, width, dropout)

    def forward(self, x: Tensor, there: Tensor, z: Tensor, trace: dict[str, Tensor] | None = None) -> Tensor:
        """f (B, L, H) of word embeddings x (B, L, H) and patch tokens z (B, K, H)."""
        a = self.attended(self.self(x, x, there), x)
        c = self.cross(a, z, trace=trace) if self.cross is not None else None
        g = self.mean(z.mean(1, keepdim=True)) if self.mean is not None else None
        if c is None and g is not None:
            c, g = g.expand_as(a), None
        m = self.mix(c if g is None else c + g, a)
        if trace is not None:
            trace |= {"attended": a, "context": c, "after_mix": m} | ({} if g is None else {"global": g})
        return self.narrow(F.gelu(self.wide(m)), m)


class Embeddings(nn.Module):
    """BERT's embeddings: word, position and type (always the first of the two types)."""

    def __init__(self, words: int, length: int, width: int, dropout: float):
        super().__init__()
        self.words, self.positions = nn.Embedding(words, width, padding_idx=0), nn.Embedding(length, width)
        self.types, self.norm, self.dropout = nn.Embedding(2, width), nn.LayerNorm(width, 1e-12), nn.Dropout(dropout)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.words(ids) + self.positions.weight[: ids.shape[1]] + self.types.weight[0]
        return self.dropout(self.norm(x))


class WordHead(nn.Module):
    """BERT's prediction head: from tokens to logits of words. As released it is not tied to the embeddings."""

    def __init__(self, width: int, words: int):
        super().__init__()
        self.dense, self.norm = nn.Linear(width, width), nn.LayerNorm(width, 1e-12)
        self.decoder = nn.Linear(width, words)

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.norm(F.gelu(self.dense(x))))


class TextDecoder(nn.Module):
    """Bidirectional text decoder: from words, some masked, and image tokens to logits of words at each position."""

    def __init__(
        self,
        words: int,
        length: int,
        width: int,
        depth: int,
        heads: int,
        hidden: int,
        dropout: float,
        fusion: str,
        pooler: bool,
    ):
        super().__init__()
        self.embeddings = Embeddings(words, length, width, dropout)
        self.fusion = None if fusion == "pooled" else Fusion(width, heads, hidden, dropout, fusion)
        self.layers = nn.ModuleList(BertLayer(width, heads, hidden, dropout) for _ in range(depth))
        self.pooler = nn.Linear(width, width) if pooler else None  # not used, as released
        self.head = WordHead(width, words)

    def forward(self, ids: Tensor, attention: Tensor, z: Tensor, trace: dict[str, Tensor] | None = None) -> Tensor:
        """Logits (B, L, V) of words (B, L), `attention` 0 on padding, and patch tokens z (B, K, H)."""
        if ids.shape[1] > (longest := self.embeddings.positions.num_embeddings):
            raise BadParameter("ids", tuple(ids.shape), f"at most {longest} words a text")
        there = attention.bool()[:, None, None]
        x = embedded = self.embeddings(ids)
        x = x + z.mean(1, keepdim=True) if self.fusion is None else self.fusion(x, there, z, trace)
        if trace is not None:
            trace |= {"embedded": embedded, "fused": x}
        for layer in self.layers:
            x = layer(x, there)
        return self.head(x)


def heat(attention: Tensor, size: int | None = None) -> Tensor:
    """The authors' heat map of a word's attention (heads, N): maximum over heads, power 0.25, scaled to 0 ... 1.

    Args:
        attention: of one word, over patches in raster order, as `ECAMP.attention` returns it. (The released script
            leaves the patches in their shuffled order, so its maps are scrambled.)
        size: upsample to (size, size), bilinear; None: (sqrt N, sqrt N).
    """
    x = attention.amax(0).pow(0.25)
    x = ((x - x.min()) / (x.max() - x.min()).clamp_min(1e-12)).unflatten(0, (math.isqrt(len(x)), -1))
    if size is None:
        return x
    return F.interpolate(x[None, None], (size, size), mode="bilinear", align_corners=False)[0, 0]

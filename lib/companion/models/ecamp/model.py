"""ECAMP: entity-centred, context-aware medical vision-language pre-training (Wang, Yao et al., MedIA 2025).

A ViT is pre-trained on chest X-rays and their reports, without labels. Three quarters of the image's patches and most
of the report's words are masked; both are predicted, the words from the report and the tokens of the visible patches.
Downstream tasks use the ViT alone.

    pixels  (B, 3, 448, 448) --bicubic--> 224 --49 of 196 patches--> ViT --> z (B, 49, 768)
    z --image decoder--> all patches, L_mim   --super-resolution--> 448, inside an attention window, L_sr
    z, words --context fusion, BERT layers--> the hidden words, weighted, L_mlm        loss = L_mim + L_sr + L_mlm

Masking and weights of the words are drawn by the data set, `text.ReportPairs`. Classifier, segmenter and detector on
the pre-trained ViT: `heads`, `detection`. The variants of the ablations: `variants`.

The paper's text was not available: everything is from the authors' code (github ToniChopp/ECAMP at d02d16d, MIT), read
and reimplemented; outputs agree with ones recorded from it. Section numbers are those of our notes on it; numbers of
equations, those of the notebook.

Shapes: B pairs, N patches (K of them visible, p x p pixels each), L text tokens, V words, D the ViT's width, H the
text's width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from einops import rearrange
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from ...errors import Count, Share, check_choice, check_parts, extra, typed
from ...io.config import configure
from ..layers.attend import attention_map
from ..layers.heads import vit_sizes
from ..layers.mae import Decoder, encode, initialise, initialise_stem, patchify, random_mask, unpatchify, visible
from ..layers.pos_embed import sincos_table
from ..layers.predicting import Images, Names, Transform, grey, outputs
from ..layers.state_dicts import OfficialModel, depth
from . import official
from .transforms import test_transform

with extra("xrays"):
    from transformers import BertConfig
    from transformers.models.bert import modeling_bert as bert

MASKED = 0.75  # fraction of hidden patches

Computed = tuple[Tensor, dict[str, Tensor]]  # a result, and by name what it is computed from


@typed
@dataclass(frozen=True)
class Blocks:
    """The sizes of a stack of transformer blocks."""

    width: Count
    depth: Count
    heads: Count

    def __post_init__(self) -> None:
        check_parts("heads", self.width, self.heads)


@typed
@dataclass(frozen=True)
class Bert:
    """The sizes of the text decoder.

    Attributes:
        words, length: V and the largest L.
        width, depth, heads, hidden: H, layers after the fusion layer, heads, and width of the MLPs.
        pooler: has the released model's BERT pooler too: 590,592 parameters that receive no gradient.
    """

    words: Count = 30000
    length: Count = 256
    width: Count = 768
    depth: Count = 6
    heads: Count = 6
    hidden: Count = 1536
    dropout: Share = 0.1
    pooler: bool = False

    def __post_init__(self) -> None:
        check_parts("heads", self.width, self.heads)


# the paper's sizes, and those of the pocket profile (section 14)
SIZES: dict[str, dict[str, Any]] = {
    "paper": {"text": Bert()},
    "pocket": {
        "image": 32,
        "patch": 4,
        "encoder": Blocks(96, 3, 4),
        "decoder": Blocks(48, 1, 4),
        "text": Bert(words=40, length=20, width=96, depth=1, heads=4, hidden=192, dropout=0.0),
        "window": 6,
    },
}


class Batch(NamedTuple):
    """B image-report pairs with all random draws; `text.ReportPairs` returns them one by one."""

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


# --- words ------------------------------------------------------------------------------------------------------------


def bert_config(sizes: Bert) -> BertConfig:
    """The sizes under transformers' names; its defaults are BERT's: GELU, two token types, norms with 1e-12."""
    return BertConfig(
        vocab_size=sizes.words,
        max_position_embeddings=sizes.length,
        hidden_size=sizes.width,
        num_attention_heads=sizes.heads,
        intermediate_size=sizes.hidden,
        hidden_dropout_prob=sizes.dropout,
        attention_probs_dropout_prob=sizes.dropout,
        attn_implementation="sdpa",
    )


class BertEmbeddings(bert.BertEmbeddings):
    """BERT's embeddings: word, position and type (always the first of the two types)."""

    def forward(self, ids: Tensor) -> Tensor:
        x = self.word_embeddings(ids) + self.position_embeddings.weight[: ids.shape[1]]  # (B, L, H)
        return self.dropout(self.LayerNorm(x + self.token_type_embeddings.weight[0]))


class BertLayer(bert.BertLayer):
    """A layer of BERT: a = LN(W_o SelfAttention(x) + x), LN(W_2 GELU(W_1 a) + a)."""

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.feed_forward_chunk(self.attention(x, mask)[0])


class CrossAttention(nn.Module):
    """Multi-head attention of words to patches, without an output projection."""

    def __init__(self, sizes: Bert):
        super().__init__()
        self.heads, self.dropout = sizes.heads, sizes.dropout
        self.query, self.key, self.value = (nn.Linear(sizes.width, sizes.width) for _ in range(3))

    def _heads(self, x: Tensor) -> Tensor:
        return rearrange(x, "b n (h d) -> b h n d", h=self.heads)

    def forward(self, a: Tensor, z: Tensor) -> Tensor:
        """(B, L, H) of words a (B, L, H) and patches z (B, K, H)."""
        q, k, v = self._heads(self.query(a)), self._heads(self.key(z)), self._heads(self.value(z))
        out = F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout if self.training else 0.0)
        return rearrange(out, "b h n d -> b n (h d)")

    def attention_map(self, a: Tensor, z: Tensor) -> Tensor:
        """The probabilities (B, heads, L, K) of a call with these arguments."""
        return attention_map(self._heads(self.query(a)), self._heads(self.key(z)))


class Fusion(bert.BertLayer):
    """Multi-scale context fusion: a BERT layer with cross-attention to the image tokens in its middle (section 3.5).

    a = LN(W_o SelfAttention(x) + x)                                                                                 (5)
    c = CrossAttention(a, z) + W_g mean(z)                                                                           (6)
    m = LN(W_m c + a),  f = LN(W_2 GELU(W_1 m) + m)                                                                  (7)

    In c each word attends to the visible patches (fine, no output projection), and all receive their mean (coarse).
    """

    def __init__(self, sizes: Bert):
        config = bert_config(sizes)
        super().__init__(config)
        self.cross = CrossAttention(sizes)
        self.mean = nn.Linear(sizes.width, sizes.width)
        self.mix = bert.BertSelfOutput(config)

    def context(self, a: Tensor, z: Tensor) -> Computed:
        """c (B, L, H) of words a (B, L, H) and patches z (B, K, H); its terms "fine" and "coarse"."""
        fine, coarse = self.cross(a, z), self.mean(z.mean(1, keepdim=True))  # (B, L, H), (B, 1, H)
        return fine + coarse, {"fine": fine, "coarse": coarse}

    def forward(self, x: Tensor, mask: Tensor, z: Tensor) -> Computed:
        """f (B, L, H) of embedded words x (B, L, H) and patches z (B, K, H); the terms by name."""
        a = self.attention(x, mask)[0]  # (5)
        c, out = self.context(a, z)  # (6)
        m = self.mix(c, a)
        return self.feed_forward_chunk(m), out | {"attended": a, "mixed": m}  # (7)


class WordHead(bert.BertPredictionHeadTransform):
    """BERT's prediction head: from tokens to logits of words. As released it is not tied to the embeddings."""

    def __init__(self, config: BertConfig):
        super().__init__(config)
        self.decoder = nn.Linear(config.hidden_size, config.vocab_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(super().forward(x))


class TextDecoder(nn.Module):
    """Bidirectional text decoder: from words, some masked, and image tokens to logits of words at each position."""

    def __init__(self, sizes: Bert, fusion: type[nn.Module] = Fusion):
        super().__init__()
        config = bert_config(sizes)
        self.embeddings, self.fusion = BertEmbeddings(config), fusion(sizes)
        self.layers = nn.ModuleList(BertLayer(config) for _ in range(sizes.depth))
        self.pooler = bert.BertPooler(config) if sizes.pooler else None  # not used, as released
        self.head = WordHead(config)

    def forward(self, ids: Tensor, attention: Tensor, z: Tensor) -> Computed:
        """Logits (B, L, V) of words (B, L) and patches z (B, K, H); the terms of the fusion, "embedded" and "fused".

        attention: (B, L), 0 on padding.
        """
        mask = attention.bool()[:, None, None]  # (B, 1, 1, L)
        embedded = self.embeddings(ids)  # (B, L, H)
        x, out = self.fusion(embedded, mask, z)
        out |= {"embedded": embedded, "fused": x}
        for layer in self.layers:
            x = layer(x, mask)  # (B, L, H)
        return self.head(x), out


def mlm_loss(logits: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """Cross-entropy of logits (B, L, V), weighted, averaged over ALL positions (8).

    Visible words and padding count too; the divisor is the number of positions, which the weights sum to.
    """
    each = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view_as(labels)
    return (weights * each).mean()


# --- images -----------------------------------------------------------------------------------------------------------


def shrink(images: Tensor) -> Tensor:
    """Images at half the size, bicubic, not antialiased, as the authors' version of torchvision resizes tensors."""
    return F.interpolate(images, scale_factor=0.5, mode="bicubic", align_corners=False, antialias=False)


class ImageDecoder(Decoder):
    """MAE's decoder: from the tokens of the visible patches to the pixels of all patches (2) (section 3.3)."""

    def __init__(self, inputs: int, sizes: Blocks, side: int, outputs: int):
        super().__init__(inputs, sizes.width, sizes.depth, sizes.heads, side, "ecamp")
        self.pixels = nn.Linear(sizes.width, outputs)

    def forward(self, latent: Tensor, keep: Tensor | None = None) -> Tensor:
        """Pixels (B, N, outputs) from tokens (B, 1 + K, D) of the patches `keep` (B, K)."""
        return self.pixels(self.norm(self.hidden(latent, keep)[:, 1:]))


def mim_loss(pixels: Tensor, target: Tensor, hidden: Tensor) -> Tensor:
    """Squared error on hidden patches, averaged over ALL pixels: 0.75 times MAE's loss (3).

    Args:
        pixels, target: (B, N, 3 p p).
        hidden: (B, N), 1 or 0.
    """
    return (F.mse_loss(pixels, target, reduction="none").mean(2) * hidden).mean()


class SuperResolution(nn.Module):
    """Images of twice the size: y = ReLU(u + conv(ReLU(conv(u)))), u bilinear (4) (section 3.4), 168 parameters.

    As released the output is never negative, so the negative half of a normalised image cannot be fitted.
    """

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        u = F.interpolate(images, scale_factor=2, mode="bilinear", align_corners=False)  # (B, 3, 2 S, 2 S)
        return F.relu(u + self.conv2(F.relu(self.conv1(u))))


def windows(corners: Tensor, side: int, cell: int, size: int) -> Tensor:
    """(B, 1, size, size): 1 inside the window of side x side cells of `cell` pixels, whose corners (B, 2) are in cells.

    A corner is (row, column): the released code calls the first a column and uses it as a row.
    """
    position = torch.arange(size, device=corners.device) // cell
    rows, columns = ((position >= c[:, None]) & (position < c[:, None] + side) for c in corners.T)  # (B, size)
    return (rows[:, None, :, None] & columns[:, None, None, :]).float()


def sr_loss(resolved: Tensor, images: Tensor, window: Tensor | None = None) -> Tensor:
    """Squared error inside the window (B, 1, 2 S, 2 S; None: everywhere), averaged over ALL pixels (4)."""
    error = F.mse_loss(resolved, images, reduction="none")
    return (error if window is None else error * window).mean()


# --- pre-training -----------------------------------------------------------------------------------------------------


class ECAMP(OfficialModel):
    """The pre-training model: from a `Batch` to its `Losses`.

    Args:
        image: S, side of the encoder's input in pixels; the images of a batch have side 2 S.
        patch: p.
        encoder, decoder: the ViT, of ViT-B/16 by default, and the image decoder.
        text: the text decoder.
        window: side in patches of the window inside which the super-resolution loss is computed; None: the whole image.
    """

    rules = official.NAMES["pre-training"]
    fusion: type[nn.Module] = Fusion  # of the text decoder; `variants` have others

    def __init__(
        self,
        *,
        image: Count = 224,
        patch: Count = 16,
        encoder: Blocks = Blocks(768, 12, 12),
        decoder: Blocks = Blocks(512, 4, 16),
        text: Bert = Bert(),
        window: Count | None = 12,
    ):
        configure(self, locals())
        super().__init__()
        check_parts("patch", image, patch)
        side = image // patch
        self.image, self.patch, self.window = image, patch, window
        self.encoder = VisionTransformer(
            img_size=image,
            patch_size=patch,
            embed_dim=encoder.width,
            depth=encoder.depth,
            num_heads=encoder.heads,
            num_classes=0,
            global_pool="",
        )
        self.encoder.pos_embed = nn.Parameter(sincos_table(encoder.width, side, "ecamp"), requires_grad=False)
        self.decoder = ImageDecoder(encoder.width, decoder, side, 3 * patch**2)
        self.super_resolution = SuperResolution()
        self.project = nn.Linear(encoder.width, text.width)
        self.text = TextDecoder(text, self.fusion)
        self.apply(_initialise)
        initialise_stem(self.encoder)
        nn.init.normal_(self.decoder.mask_token, std=0.02)

    @classmethod
    def build(cls, size: str = "paper", *, words: int | None = None, **options: Any) -> ECAMP:
        """A model with random weights (torch's current seed), of one of `SIZES`.

        Args:
            words: V, if it is not that of the size.
            options: arguments of the class that differ.
        """
        check_choice("size", size, SIZES)
        options = SIZES[size] | options
        if words:
            options["text"] = replace(options["text"], words=words)
        return cls(**options)

    def predict(self, images: Images, names: Names, transform: Transform = None) -> list[Tensor]:
        """Features (D,) of each image, the mean of its patches' tokens."""
        transform = transform or test_transform(self.image)
        return list(outputs(self, images, transform, grey, lambda x: self.encoder.forward_features(x)[:, 1:].mean(1)))

    def forward_features(self, images: Tensor, keep: Tensor | None = None) -> Tensor:
        """Encoder tokens (B, 1 + K, D) of images (B, 3, S, S), [CLS] first.

        `keep` (B, K): indices of the visible patches; None: all N of them.
        """
        return encode(self.encoder, images, keep)

    def forward(self, batch: Batch) -> Losses:
        """The losses of a batch."""
        return self.forward_intermediates(batch)[0]

    def forward_intermediates(self, batch: Batch) -> tuple[Losses, dict[str, Tensor]]:
        """The losses of a batch, and what they are computed from by name: "low", "keep", "hidden", "latent", "pixels";
        "super_resolved"; "logits" and the terms of the fusion."""
        low = shrink(batch.images)  # (B, 3, S, S)
        keep, hidden = random_mask(batch.noise, visible(batch.noise.shape[1], MASKED))  # (B, K), (B, N)
        latent = self.forward_features(low, keep)  # (B, 1 + K, D)
        pixels = self.decoder(latent, keep)  # (B, N, 3 p p)  (2)
        mim = mim_loss(pixels, patchify(low, self.patch), hidden)  # (3)
        sr, resolved = self.resolve(pixels, batch)
        mlm, read = self.read(latent, batch)
        out = {"low": low, "keep": keep, "hidden": hidden, "latent": latent, "pixels": pixels}
        return Losses(mim + sr + mlm, mim, sr, mlm), out | resolved | read

    def resolve(self, pixels: Tensor, batch: Batch) -> Computed:
        """The super-resolution loss of decoded patches (B, N, 3 p p); "super_resolved" (B, 3, 2 S, 2 S)."""
        y = self.super_resolution(unpatchify(pixels, self.patch))  # (B, 3, 2 S, 2 S)
        inside = None
        if self.window is not None:
            inside = windows(batch.window, self.window, 2 * self.patch, y.shape[-1])
        return sr_loss(y, batch.images, inside), {"super_resolved": y}  # (4)

    def read(self, latent: Tensor, batch: Batch) -> Computed:
        """The loss of the masked words, from encoder tokens (B, 1 + K, D); "logits" and the terms of the fusion."""
        z = self.project(latent[:, 1:])  # (B, K, H)  (1)
        logits, out = self.text(batch.ids, batch.attention, z)  # (B, L, V)  (5) to (7)
        return mlm_loss(logits, batch.labels, batch.weights), out | {"logits": logits}  # (8)

    @torch.no_grad()
    def attention(self, images: Tensor, ids: Tensor, attention: Tensor, keep: Tensor | None = None) -> Tensor:
        """Cross-attention of the words, (B, heads, L, N), over all patches of images, in raster order.

        Args:
            images: (B, 3, S, S).
            ids, attention: (B, L).
            keep: (B, N), another order of the patches.
        """
        z = self.project(self.forward_features(images, keep)[:, 1:])  # (B, N, H)
        attended = self.text(ids, attention, z)[1]["attended"]  # (B, L, H)
        return self.text.get_submodule("fusion.cross").attention_map(attended, z)

    # --- the authors' names ---

    @classmethod
    def from_official(
        cls,
        state: Mapping[str, Tensor],
        *,
        heads: int | None = None,
        decoder_heads: int = 16,
        text_heads: int = 6,
        window: int | None = 12,
        dropout: float = 0.1,
    ) -> ECAMP:
        """The model of a state dict of the authors' code, in eval mode; its sizes are read from the tensors.

        The inverse is `to_official`.

        Args:
            heads, decoder_heads, text_heads: not readable from tensors. None: one head for 64 channels.

        Raises `BadCheckpoint`: missing and unknown names and other shapes, all of them listed.
        """
        state = official.as_released(state)
        text, vit = official.bert_sizes(state), vit_sizes(state, heads)
        return cls(
            image=vit["img_size"],
            patch=vit["patch_size"],
            encoder=Blocks(vit["embed_dim"], vit["depth"], vit["num_heads"]),
            decoder=Blocks(state["decoder_pos_embed"].shape[2], depth(state, "decoder_blocks."), decoder_heads),
            text=Bert(**text, heads=text_heads, dropout=dropout),
            window=window,
        ).loaded(state, official.WHAT)

    def to_official(self) -> dict[str, Tensor]:
        """The state dict under the authors' names."""
        state = super().to_official()
        return state | {f"{official.HEAD}bias": state[f"{official.HEAD}decoder.bias"]}  # transformers has both names


build = ECAMP.build


def pretraining_loss(model: nn.Module, items: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """The losses of a batch by name, for `fit`: "loss" is the sum of "mim", "sr" and "mlm"."""
    total, *terms = model(Batch(*items))
    return {"loss": total} | dict(zip(Losses._fields[1:], terms, strict=True))


def _initialise(module: nn.Module) -> None:
    """Section 3.7: linear layers as in MAE, norms 1 and 0, embeddings N(0, 0.02). For `nn.Module.apply`."""
    initialise(module)
    if isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
        if module.padding_idx is not None:
            nn.init.zeros_(module.weight.data[module.padding_idx])


def heat(attention: Tensor, size: int | None = None) -> Tensor:
    """The authors' heat map of a word's attention (heads, N): maximum over heads, power 0.25, scaled to 0 ... 1.

    Args:
        attention: of one word, over patches in raster order, as `ECAMP.attention` returns it. (The released script
            leaves the patches in their shuffled order, so its maps are scrambled.)
        size: upsample to (size, size) as the authors do, bilinear; None: (sqrt N, sqrt N).
    """
    x = attention.amax(0).pow(0.25)  # (N,)
    x = (x - x.min()) / (x.max() - x.min()).clamp_min(1e-12)
    x = rearrange(x, "(h w) -> h w", h=math.isqrt(len(x)))
    return x if size is None else F.interpolate(x[None, None], (size, size), mode="bilinear")[0, 0]

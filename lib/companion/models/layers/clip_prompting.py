"""What methods that prompt a frozen CLIP share: its two towers with prompts, class texts, a learned context.

A `PromptedCLIP` maps images (b, 3, H, W) to logits (b, C) over class names that can be exchanged after training, and
does not train CLIP, of which it holds a frozen copy; a `PromptLearner` learns context tokens at the start of the texts.
The CLIP is one of open_clip's, of any size; its tokenizer is any callable from texts to ids (C, L). The methods are in
`coop` (CoOp, CoCoOp, MaPLe), `models.dplq` and `models.promptpar`.

Shapes: b images, C classes, n context tokens, J prompted layers, L text positions, Wt and Wv the widths of the text and
the image tower, E the width they share.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg
from open_clip.transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ...backbones import input_of
from ...data.domains import clip_transform
from ...errors import BadCheckpoint, BadParameter, check_images
from ...errors import check_names as check_class_names
from ...io.config import configure, reconfigure
from ...saving import Pretrained
from .frozen import current, frozen_copy
from .precision import without_autocast
from .predicting import Images, Names, Transform, named, outputs
from .state_dicts import check_names, load_official, official_state
from .state_dicts import depth as depth_of

Tokenizer = Callable[..., Tensor]
LEARNER = "prompt_learner."  # before the names of trained tensors in the authors' state dicts


# --- the two towers, with prompts -------------------------------------------------------------------------------------


def _run(tower: nn.Module, block: nn.Module, x: Tensor, **options: Tensor) -> Tensor:
    if tower.grad_checkpointing and torch.is_grad_enabled():
        return checkpoint(block, x, use_reentrant=False, **options)
    return block(x, **options)


def encode_image(clip: CLIP, images: Tensor, first: Tensor, deep: Tensor) -> Tensor:
    """Image features (b, E), not normalised, of images (b, 3, H, W) with prompts at the END of the sequence.

    Args:
        first: tokens that enter with the patches, after positions are added: (n, Wv) or (b, n, Wv).
        deep: the tokens that replace them before block 1, 2, ...: (J - 1, n, Wv) or (J - 1, b, n, Wv). After the last
            replacement they remain.
    """
    visual, b, n = clip.visual, len(images), first.shape[-2]
    check_images(images, 3, *visual.image_size)
    patches = rearrange(visual.conv1(images), "b c h w -> b (h w) c")
    x = torch.cat([visual.class_embedding.to(patches.dtype).expand(b, 1, -1), patches], dim=1)  # (b, 1 + N, Wv)
    x = torch.cat([x + visual.positional_embedding, first.to(x.dtype).expand(b, -1, -1)], dim=1)  # (b, 1 + N + n, Wv)
    x = visual.ln_pre(x)
    for i, block in enumerate(visual.transformer.resblocks):
        if 1 <= i <= len(deep):
            x = torch.cat([x[:, :-n], deep[i - 1].to(x.dtype).expand(b, -1, -1)], dim=1)
        x = _run(visual.transformer, block, x)
    return visual.ln_post(x[:, 0]) @ visual.proj


def encode_text(clip: CLIP, x: Tensor, ends: Tensor, deep: Tensor | None = None) -> Tensor:
    """Text features (..., C, E), not normalised, of embedded texts x (..., C, L, Wt) without positions.

    Args:
        ends: (C,) where each text ends; the feature is read there. The tower is causal, so x may be truncated after the
            last end, L less than CLIP's, without changing the result.
        deep: (J - 1, n, Wt) overwrites positions 1 to n before block 1, 2, ...; those beyond the last block of a
            shallower tower are left out.
    """
    lead, length = x.shape[:-2], x.shape[-2]
    x = (x + clip.positional_embedding[:length]).flatten(0, -3)  # (... C, L, Wt)
    mask = clip.attn_mask[:length, :length]
    for i, block in enumerate(clip.transformer.resblocks):
        if deep is not None and 1 <= i <= len(deep):
            prompt = deep[i - 1].to(x.dtype).expand(len(x), -1, -1)
            x = torch.cat([x[:, :1], prompt, x[:, 1 + deep.shape[1] :]], dim=1)
        x = _run(clip.transformer, block, x, attn_mask=mask)
    x = x[torch.arange(len(x), device=x.device), ends.expand(lead).flatten()]  # (... C, Wt)
    return (clip.ln_final(x) @ clip.text_projection).unflatten(0, lead)


def similarity(clip: CLIP, image: Tensor, text: Tensor) -> Tensor:
    """Logits (b, C): cosines times CLIP's own scale. image (b, E), text (C, E) or, one per image, (b, C, E).

    In float32 also under autocast: at three digits, a hundred times a cosine changes the largest class.
    """
    with without_autocast(image.device):
        cosine = F.normalize(text.float(), dim=-1) @ F.normalize(image.float(), dim=-1)[..., None]
        return clip.logit_scale.exp() * cosine.squeeze(-1)


class ImageFeatures(nn.Module):
    """CLIP's plain image features (b, E), for `fit.outputs_of(ImageFeatures(clip), data)`, once per image."""

    def __init__(self, clip: CLIP):
        configure(self, locals())
        super().__init__()
        self.clip = clip
        self.num_features = clip.visual.output_dim

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        check_images(images, 3, *self.clip.visual.image_size)
        return self.clip.encode_image(images)


# --- class names ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Texts:
    """Class texts, embedded (C, L, Wt) without positions, and the position of each one's end-of-text token, (C,)."""

    embedded: Tensor
    ends: Tensor


Classes = Sequence[str] | Texts


def tokenise(tokenizer: Tokenizer, clip: CLIP, texts: Sequence[str]) -> Tensor:
    """Token ids (C, L) of `texts`.

    Raises `BadParameter`: there is none, one is longer than the CLIP reads, or the tokenizer is not the CLIP's.
    """
    if isinstance(texts, str) or not texts:
        raise BadParameter("classes", texts, "a list of one or more names")
    ids = tokenizer(texts)
    vocabulary, length = clip.token_embedding.num_embeddings, len(clip.positional_embedding)
    if ids.shape != (len(texts), length) or ids.max() >= vocabulary:
        wrong = f"ids {tuple(ids.shape)} up to {int(ids.max())}"
        raise BadParameter("tokenizer", wrong, f"one that gives ({len(texts)}, {length}) ids below {vocabulary}")
    # a text that fills all positions may have been cut, as tokenizers do without a word
    full = [text for text, end in zip(texts, ids.argmax(1).tolist(), strict=True) if end == length - 1]
    for text, row in zip(full, tokenizer(full, context_length=length + 1) if full else (), strict=True):
        if row.argmax() == length:
            raise BadParameter("classes", text, f"a text of at most {length} tokens, with start and end")
    return ids.to(clip.token_embedding.weight.device)


def checked_clip(clip: CLIP) -> CLIP:
    """`clip`. Raises `BadParameter` when it is not one that the functions above can run."""
    if (
        not isinstance(clip, CLIP)
        or not isinstance(clip.visual, VisionTransformer)
        or (clip.visual.attn_pool, clip.visual.pool_type, clip.text_pool_type) != (None, "tok", "argmax")
        or clip.attn_mask is None
        or not isinstance(clip.text_projection, Tensor)
    ):
        accepted = "an open_clip CLIP with a ViT whose feature is its class token, and a causal text tower"
        raise BadParameter("clip", type(clip).__name__, accepted)
    return clip


def check_depth(clip: CLIP, depth: int) -> None:
    """Raise `BadParameter` when the image tower has fewer layers than the J = `depth` that are prompted."""
    layers = len(clip.visual.transformer.resblocks)
    if not 1 <= depth <= layers:
        raise BadParameter("depth", depth, f"1 to {layers}, the layers of the image tower")


def _ids(tokenizer: Tokenizer, clip: CLIP, texts: Sequence[str], free: int = 0) -> Tensor:
    """Token ids (C, L) of `texts`, with `free` positions after the start token left for a learned context."""
    ids = tokenise(tokenizer, clip, texts)
    if free:
        most, longest = ids.shape[1] - 1 - int(ids.argmax(1).max()), texts[int(ids.argmax(1).argmax())]
        if free > most:
            raise BadParameter("tokens", free, f"at most {most}: '{longest}' must fit too")
        ids = torch.cat([ids[:, :1], ids.new_zeros(len(ids), free), ids[:, 1 : ids.shape[1] - free]], dim=1)
    return ids


def embed_texts(tokenizer: Tokenizer, clip: CLIP, texts: Sequence[str], free: int = 0) -> Texts:
    """Embed `texts`, with `free` positions after the start token left for a learned context."""
    ids = _ids(tokenizer, clip, texts, free)
    return Texts(clip.token_embedding(ids).detach(), ids.argmax(1))


# --- prompted CLIPs ---------------------------------------------------------------------------------------------------


class WithTexts(Pretrained, nn.Module):
    """A model with a frozen CLIP, `clip`, and texts. What is computed of the texts follows the CLIP's weights.

    Attributes:
        ends: (C,) as in `Texts`.
        length: positions up to the last end.
        constants: the buffers that are computed when texts are set.
    """

    clip: CLIP
    _ids: Tensor | None
    constants: tuple[str, ...] = ("embedded",)

    def hold(self, texts: Classes, tokenizer: Tokenizer | None, free: int = 0) -> None:
        """Exchange the texts. Raises `BadParameter`: no tokenizer, or one that does not match."""
        device = self.clip.positional_embedding.device
        if isinstance(texts, Texts):
            self._ids, ends = None, texts.ends
            self._buffers["embedded"] = texts.embedded.to(device)
            self._non_persistent_buffers_set.add("embedded")
        elif tokenizer is None:
            raise BadParameter("tokenizer", None, "the CLIP's tokenizer, or embedded Texts instead of names")
        else:
            self._ids = _ids(tokenizer, self.clip, texts, free)
            ends = self._ids.argmax(1)
        self.length = int(ends.max()) + 1
        self.register_buffer("ends", ends.to(device), persistent=False)
        for name in self.constants:
            getattr(self, name)

    @property
    def num_classes(self) -> int:
        """How many texts there are: classes or attributes."""
        return len(self.ends)

    @property
    def embedded(self) -> Tensor:
        """The texts (C, L, Wt), embedded without positions."""
        if self._ids is None:
            return self._buffers["embedded"]
        weight, ids = self.clip.token_embedding.weight, self._ids
        return current(self, "embedded", [weight, self.ends], lambda: F.embedding(ids.to(weight.device), weight))

    @property
    def text_features(self) -> Tensor:
        """The texts' features (C, E), not normalised."""
        tower = [p for name, p in self.clip.named_parameters() if not name.startswith("visual.")]
        return current(self, "text_features", [self.embedded, self.ends, *tower], self.encode_texts)

    def encode_texts(self) -> Tensor:
        """Compute `text_features`."""
        return encode_text(self.clip, self.embedded[:, : self.length], self.ends)


class PromptedCLIP(WithTexts):
    """A frozen CLIP and the texts of the classes.

    Args:
        clip: an open_clip `CLIP` with a ViT whose class token is the feature; a frozen copy is kept.
        classes: the class names (underscores are read as spaces), or their embedded `Texts`.
        tokenizer: texts to ids, as `open_clip.get_tokenizer`'s; None with `Texts`.
        template: the prompt of a class, with {} for its name.
        free: positions after the start of every text that are left for a learned context.

    Raises `BadParameter`: a CLIP, tokenizer or option that does not match.
    """

    def __init__(self, clip: CLIP, classes: Classes, tokenizer: Tokenizer | None, template: str, free: int = 0):
        configure(self, locals())
        super().__init__()
        self.clip = frozen_copy(checked_clip(clip))
        self.tokenizer, self.template, self.free = tokenizer, template, free
        if "{}" not in template:
            raise BadParameter("template", template, "a text with {} for the class name")
        self.reset_classifier(classes)

    def reset_classifier(self, classes: Classes) -> None:
        """Exchange the class names, for instance for novel ones after training; the parameters are unchanged."""
        texts = classes
        if not isinstance(classes, Texts):
            check_class_names(classes)
            texts = [self.template.replace("{}", name.replace("_", " ")) for name in classes]
        self.hold(texts, self.tokenizer, self.free)
        self.classes = () if isinstance(classes, Texts) else tuple(classes)
        reconfigure(self, classes=classes)

    def predict(self, images: Images, names: Names, transform: Transform = None) -> list[dict[str, float]]:
        """The probability of each class, by default under the names that the prompts have."""
        transform = transform or clip_transform(input_of(self.clip))
        return named(outputs(self, images, transform).softmax(1), names or self.classes)

    def train(self, mode: bool = True):
        super().train(mode)
        self.clip.eval()
        return self

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the activations of each block in the backward pass, to save memory."""
        self.clip.set_grad_checkpointing(enable)

    def trained(self) -> dict[str, nn.Parameter]:
        """The trainable parameters by name."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def count(self) -> int:
        """The number of trainable parameters."""
        return sum(p.numel() for p in self.trained().values())

    def image_features(self, images: Tensor) -> Tensor:
        """CLIP's plain image features (b, E), without autograd; an input (b, E) is returned as it is."""
        if images.ndim == 2:
            return images
        with torch.no_grad():
            check_images(images, 3, *self.clip.visual.image_size)
        return self.clip.encode_image(images)


class PromptLearner(PromptedCLIP):
    """A `PromptedCLIP` that learns n context tokens, `ctx` (n, Wt), at text positions 1 to n.

    Args: as `PromptedCLIP`, and
        tokens: n. The context is initialised with the first n tokens of the template, when it has so many before the
            name; else from N(0, 0.02²), and the class name follows it directly.
    """

    def __init__(self, clip: CLIP, classes: Classes, tokenizer: Tokenizer | None, tokens: int, template: str):
        configure(self, locals())
        start, free = None, 0
        before, name, rest = template.partition("{}")
        if tokenizer is not None and name:
            words = embed_texts(tokenizer, checked_clip(clip), [before])
            if tokens < words.ends[0]:
                start = words.embedded[0, 1 : 1 + tokens].clone()
            else:
                template, free = name + rest, tokens
        super().__init__(clip, classes, tokenizer, template, free)
        width = clip.positional_embedding.shape[1]
        self.ctx = nn.Parameter(torch.randn(tokens, width) * 0.02 if start is None else start)

    def prompted(self, ctx: Tensor) -> Tensor:
        """The class texts with a context in them, truncated after the last end: ctx (n, Wt) to (C, length, Wt), one
        context per image (b, n, Wt) to (b, C, length, Wt)."""
        texts, n = self.embedded[:, : self.length], ctx.shape[-2]
        ctx = ctx.to(texts.dtype)[..., None, :, :].expand(*ctx.shape[:-2], len(texts), -1, -1)  # (..., C, n, Wt)
        before, after = (part.expand(*ctx.shape[:-2], -1, -1) for part in (texts[:, :1], texts[:, 1 + n :]))
        return torch.cat([before, ctx, after], dim=-2)

    # --- the authors' names ---

    unused: tuple[str, ...] = ()  # official names, by how they start, that no forward pass reads

    def learner_names(self) -> dict[str, str | list]:
        """Our trained parameters to the names in the authors' prompt learner; a (nested) list where ours is a stack."""
        return {"ctx": LEARNER + "ctx"}

    @staticmethod
    def _sizes(state: Mapping[str, Tensor]) -> dict[str, int]:
        """The options of the class, from the shapes of a prompt learner; a `KeyError` names a missing tensor."""
        return {"tokens": len(state[LEARNER + "ctx"])}

    @classmethod
    def from_official(
        cls,
        state: Mapping[str, Tensor],
        clip: CLIP | None = None,
        classes: Classes = (),
        tokenizer: Tokenizer | None = None,
        *,
        ends: Sequence[int] | None = None,
        heads: tuple[int | None, int | None] = (None, None),
        **options: Any,
    ):
        """The model with a state dict of the authors' code in it: the whole one, or its prompt learner's alone.

        With a `clip`, the texts of `classes` are embedded, and the towers of the state dict, when it has them, replace
        the weights of the copy. Without one the CLIP is built from the state dict and the texts are the stored ones;
        their `ends`, (C,), and the `heads` of the image and the text tower are not stored (None: 64 channels per head,
        as in OpenAI's). The inverse is `to_official`.

        Raises:
            BadCheckpoint: names that are missing, unknown or of another shape, all of them listed.
            BadParameter: neither `clip`, `classes` and `tokenizer`, nor `ends`.
        """
        what = f"{cls.__name__} (the authors' names)"
        if "ctx" in state:  # a checkpoint of the prompt learner alone
            state = {LEARNER + name: tensor for name, tensor in state.items()}
        try:
            sizes = cls._sizes(state)
        except KeyError as error:
            raise BadCheckpoint(what, missing=error.args) from error
        if clip is None:
            if ends is None:
                accepted = "the position of every class's end-of-text token, which is not in a state dict"
                raise BadParameter("ends", None, f"{accepted}; or give clip, classes and tokenizer")
            towers = {f"image_encoder.{name}" for name in ("conv1.weight", "positional_embedding", "proj")}
            texts = [LEARNER + "token_prefix", LEARNER + "token_suffix"]
            check_names(state, {*towers, *texts, "text_encoder.positional_embedding"}, what)
            clip = clip_of(state, "image_encoder.", "text_encoder.", heads)
            before, after = (state[name] for name in texts)  # (C, 1, Wt), (C, L - 1 - n, Wt)
            context = before.new_zeros(len(before), sizes["tokens"], before.shape[-1])
            classes = Texts(torch.cat([before, context, after], dim=1), torch.as_tensor(ends))
        whole = any(name.startswith(("image_encoder.", "text_encoder.")) for name in state)
        # the model shares the tensors of the CLIP, which keeps its weights
        model = cls(copy.deepcopy(clip) if whole else clip, classes, tokenizer, **(sizes | options)).eval()
        names = model.learner_names() | (tower_names(model) if whole else {})
        load_official(model, state, names, what, ignored=(LEARNER + "token_", "logit_scale", *cls.unused))
        return model

    def to_official(self) -> dict[str, Tensor]:
        """The whole state dict under the authors' names, the texts of the classes among it."""
        texts = {"token_prefix": self.embedded[:, :1], "token_suffix": self.embedded[:, 1 + len(self.ctx) :]}
        state = official_state(self.state_dict(), self.learner_names() | tower_names(self))
        return state | {LEARNER + name: tensor.clone() for name, tensor in texts.items()}


def tower_names(model: nn.Module) -> dict[str, str]:
    """The frozen towers: OpenAI's names, under the authors' two modules. The token embedding is in neither."""
    names = {}
    for ours in model.state_dict():
        name = ours.removeprefix("clip.")
        if ours.startswith("clip.visual."):
            names[ours] = "image_encoder." + name.removeprefix("visual.")
        elif name.startswith(("positional_embedding", "text_projection", "transformer.", "ln_final.")):
            names[ours] = "text_encoder." + name
        elif ours == "clip.logit_scale":
            names[ours] = name
    return names


def clip_of(
    state: Mapping[str, Tensor], image: str, text: str, heads: tuple[int | None, int | None], words: int = 1
) -> CLIP:
    """A CLIP of the sizes of the towers whose names begin with `image` and `text`.

    Args:
        heads: of the two towers; None: 64 channels per head.
        words: of the token embedding.
    """
    width, _, _, patch = state[f"{image}conv1.weight"].shape
    side = math.isqrt(len(state[f"{image}positional_embedding"]) - 1)
    length, text_width = state[f"{text}positional_embedding"].shape
    image_heads, text_heads = heads[0] or width // 64, heads[1] or text_width // 64
    layers = [depth_of(state, f"{tower}transformer.resblocks.") for tower in (image, text)]
    clip = CLIP(
        state[f"{image}proj"].shape[1],
        CLIPVisionCfg(layers[0], width, width // image_heads, patch_size=patch, image_size=side * patch),
        CLIPTextCfg(length, words, width=text_width, heads=text_heads, layers=layers[1]),
        quick_gelu=True,
    )
    arguments = {"state": state, "image": image, "text": text, "heads": heads, "words": words}
    return configure(clip, arguments, clip_of)

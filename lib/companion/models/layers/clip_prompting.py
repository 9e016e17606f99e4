"""The baselines of CLIP-prompting papers, on a frozen CLIP: zero-shot, CoOp, CoCoOp, MaPLe.

    ZeroShot    the prompt "a photo of <class>."                                        (Radford et al., ICML 2021)
    CoOp        n learned token embeddings before the class name                        (Zhou et al., IJCV 2022)
    CoCoOp      the same, plus a bias that a small network computes from the image feature  (Zhou et al., CVPR 2022)
    MaPLe       learned tokens in J layers of both towers; those of the image tower     (Khattak et al., CVPR 2023)
                are projections of those of the text tower

Every model maps images (b, 3, H, W) to logits (b, C) over class names that can be exchanged after training, and does
not train CLIP, of which it holds a frozen copy. The CLIP is one of open_clip's, of any size; its tokenizer is any
callable from texts to ids (C, L).

Written from the papers' equations and checked against outputs recorded from the authors' code (KaiyangZhou/CoOp and
muzairkhattak/multimodal-prompt-learning, both MIT, as shipped with caoql98/DCPL at 7630aa0).

Shapes: b images, C classes, n context tokens, J prompted layers, L text positions, Wt and Wv the widths of the text and
the image tower, E the width they share.
"""

from __future__ import annotations

import copy
import math
from collections import OrderedDict
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

from ...errors import BadCheckpoint, BadParameter
from ...ops.recorded import Recorded, recorded
from .frozen import frozen_copy
from .precision import without_autocast
from .state_dicts import check_names, load_official, official_state
from .state_dicts import depth as depth_of

Tokenizer = Callable[[Sequence[str]], Tensor]


# --- the two towers, with prompts -------------------------------------------------------------------------------------


def _run(tower: nn.Module, block: nn.Module, x: Tensor, **options: Tensor) -> Tensor:
    if tower.grad_checkpointing and torch.is_grad_enabled():
        return checkpoint(block, x, use_reentrant=False, **options)
    return block(x, **options)


def encode_image(clip: CLIP, images: Tensor, first: Tensor | None = None, deep: Tensor | None = None) -> Tensor:
    """Image features (b, E), not normalised, of images (b, 3, H, W) with prompts at the END of the sequence.

    Args:
        first: tokens that enter with the patches, after positions are added: (n, Wv) or (b, n, Wv).
        deep: the tokens that replace them before block 1, 2, ...: (J - 1, n, Wv) or (J - 1, b, n, Wv). After the last
            replacement they remain.
    """
    if first is None:
        return clip.encode_image(images)
    visual, b, n = clip.visual, len(images), first.shape[-2]
    patches = rearrange(visual.conv1(images), "b c h w -> b (h w) c")
    x = torch.cat([visual.class_embedding.to(patches.dtype).expand(b, 1, -1), patches], dim=1)  # (b, 1 + N, Wv)
    x = torch.cat([x + visual.positional_embedding, first.to(x.dtype).expand(b, -1, -1)], dim=1)  # (b, 1 + N + n, Wv)
    x = visual.ln_pre(x)
    for i, block in enumerate(visual.transformer.resblocks):
        if deep is not None and 1 <= i <= len(deep):
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


class ImageFeatures(Recorded, nn.Module):
    """CLIP's plain image features (b, E), for `fit.predict(ImageFeatures(clip), data)`, once per image."""

    def __init__(self, clip: CLIP):
        super().__init__()
        self.clip = clip
        self.num_features = clip.visual.output_dim

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        return self.clip.encode_image(images)


# --- class names ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Texts:
    """Class texts, embedded (C, L, Wt) without positions, and the position of each one's end-of-text token, (C,)."""

    embedded: Tensor
    ends: Tensor


Classes = Sequence[str] | Texts


def tokenise(tokenizer: Tokenizer, clip: CLIP, texts: Sequence[str]) -> Tensor:
    """Token ids (C, L) of `texts`. Raises `BadParameter` when there is none or the tokenizer is not the CLIP's."""
    if isinstance(texts, str) or not texts:
        raise BadParameter("classes", texts, "a list of one or more names")
    ids = tokenizer(texts)
    vocabulary, length = clip.token_embedding.num_embeddings, len(clip.positional_embedding)
    if ids.shape != (len(texts), length) or ids.max() >= vocabulary:
        found = f"ids {tuple(ids.shape)} up to {int(ids.max())}"
        raise BadParameter("tokenizer", found, f"one that gives ({len(texts)}, {length}) ids below {vocabulary}")
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


def embed_texts(tokenizer: Tokenizer, clip: CLIP, texts: Sequence[str], free: int = 0) -> Texts:
    """Embed `texts`, with `free` positions after the start token left for a learned context."""
    ids = tokenise(tokenizer, clip, texts)
    if free:
        most, longest = ids.shape[1] - 1 - int(ids.argmax(1).max()), texts[int(ids.argmax(1).argmax())]
        if free > most:
            raise BadParameter("tokens", free, f"at most {most}: '{longest}' must fit too")
        ids = torch.cat([ids[:, :1], ids.new_zeros(len(ids), free), ids[:, 1 : ids.shape[1] - free]], dim=1)
    return Texts(clip.token_embedding(ids).detach(), ids.argmax(1))


# --- prompted CLIPs ---------------------------------------------------------------------------------------------------


class PromptedCLIP(Recorded, nn.Module):
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
        super().__init__()
        self.clip = frozen_copy(checked_clip(clip))
        self.tokenizer, self.template, self.free = tokenizer, template, free
        if "{}" not in template:
            raise BadParameter("template", template, "a text with {} for the class name")
        for name in ("embedded", "ends"):
            self.register_buffer(name, None, persistent=False)
        self.set_classes(classes)

    def set_classes(self, classes: Classes) -> None:
        """Exchange the class names, for instance for novel ones after training; the parameters are unchanged."""
        self.record(classes=classes)
        if not isinstance(classes, Texts):
            if self.tokenizer is None:
                raise BadParameter("classes", classes, "embedded Texts: this model was made without a tokenizer")
            if isinstance(classes, str):
                raise BadParameter("classes", classes, "a list of names")
            texts = [self.template.replace("{}", name.replace("_", " ")) for name in classes]
            classes = embed_texts(self.tokenizer, self.clip, texts, self.free)
        device = self.clip.positional_embedding.device
        self.embedded, self.ends = classes.embedded.to(device), classes.ends.to(device)
        self.length = int(classes.ends.max()) + 1

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
            return self.clip.encode_image(images)


class PromptLearner(PromptedCLIP):
    """A `PromptedCLIP` that learns n context tokens, `ctx` (n, Wt), at text positions 1 to n.

    Args: as `PromptedCLIP`, and
        tokens: n. The context is initialised with the first n tokens of the template, when it has so many before the
            name; else from N(0, 0.02²), and the class name follows it directly.
    """

    def __init__(self, clip: CLIP, classes: Classes, tokenizer: Tokenizer | None, tokens: int, template: str):
        if tokens < 1:
            raise BadParameter("tokens", tokens, "1 or more")
        start, free = None, 0
        before, name, rest = template.partition("{}")
        if tokenizer is not None and name:
            known = embed_texts(tokenizer, checked_clip(clip), [before])
            if tokens < known.ends[0]:
                start = known.embedded[0, 1 : 1 + tokens].clone()
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

    def _learner_names(self) -> dict[str, Any]:
        """Our parameters to the names in the authors' prompt learner; a (nested) list where ours is a stack."""
        return {"ctx": "ctx"}

    @staticmethod
    def _sizes(learner: Mapping[str, Tensor]) -> dict[str, int]:
        """The options of the class, from the shapes of a prompt learner; a `KeyError` names a missing tensor."""
        return {"tokens": len(learner["ctx"])}

    unused: tuple[str, ...] = ()  # official names, by how they start, that no forward pass reads

    def learner_names(self) -> dict[str, str | list]:
        """Our trained parameters to the authors' names."""
        learner = self._learner_names()

        def nested(names: str | list) -> str | list:
            return f"prompt_learner.{names}" if isinstance(names, str) else [nested(n) for n in names]

        return {ours: nested(official) for ours, official in learner.items()}

    @classmethod
    def from_official(
        cls,
        state: Mapping[str, Tensor],
        clip: CLIP | None = None,
        classes: Classes | None = None,
        tokenizer: Tokenizer | None = None,
        *,
        ends: Sequence[int] | None = None,
        heads: tuple[int, int] | None = None,
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
        prefix = "prompt_learner."
        if "ctx" in state:  # a checkpoint of the prompt learner alone
            state = {prefix + name: value for name, value in state.items()}
        what = f"{cls.__name__} (the authors' names)"
        learner = {name.removeprefix(prefix): t for name, t in state.items() if name.startswith(prefix)}
        try:
            sizes = cls._sizes(learner)
        except KeyError as error:
            raise BadCheckpoint(what, missing=[prefix + error.args[0]]) from error
        if clip is None:
            if ends is None:
                accepted = "the position of every class's end-of-text token, which is not in a state dict"
                raise BadParameter("ends", None, f"{accepted}; or give clip, classes and tokenizer")
            clip = _clip_of(state, heads, what)
            if missing := {"token_prefix", "token_suffix"} - learner.keys():
                raise BadCheckpoint(what, missing={prefix + name for name in missing})
            before, after = learner["token_prefix"], learner["token_suffix"]
            middle = before.new_zeros(len(before), sizes["tokens"], before.shape[-1])
            classes = Texts(torch.cat([before, middle, after], dim=1), torch.as_tensor(ends))
            if len(ends) != len(before):
                raise BadParameter("ends", list(ends), f"{len(before)} positions, one a class")
        elif classes is None or tokenizer is None:
            raise BadParameter("classes", classes, "class names, and their tokenizer, when a clip is given")
        towers = any(name.startswith(("image_encoder.", "text_encoder.")) for name in state)
        # the model shares the tensors of the CLIP, which keeps its weights
        model = cls(copy.deepcopy(clip) if towers else clip, classes, tokenizer, **(sizes | options)).eval()
        names = model.learner_names()
        if towers:
            names |= tower_names(model)
        ignored = (prefix + "token_", "logit_scale", *cls.unused)
        load_official(model, state, names, what, ignored)
        return model

    def to_official(self) -> dict[str, Tensor]:
        """The whole state dict under the authors' names, the texts of the classes among it."""
        n = len(self.ctx)
        texts = {"token_prefix": self.embedded[:, :1], "token_suffix": self.embedded[:, 1 + n :]}
        own = official_state(self.state_dict(), self.learner_names() | tower_names(self))
        return own | {"prompt_learner." + name: value.clone() for name, value in texts.items()}


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


def _clip_of(state: Mapping[str, Tensor], heads: tuple[int, int] | None, what: str) -> CLIP:
    """A CLIP of the sizes that the towers in an official state dict have, without a token embedding."""
    needed = {
        *(f"image_encoder.{name}" for name in ("conv1.weight", "positional_embedding", "proj")),
        *("text_encoder.positional_embedding", "logit_scale"),
    }
    check_names(state, needed, what)
    return clip_of(state, "image_encoder.", "text_encoder.", heads or (None, None))


@recorded()
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
    return CLIP(
        state[f"{image}proj"].shape[1],
        CLIPVisionCfg(layers[0], width, width // image_heads, patch_size=patch, image_size=side * patch),
        CLIPTextCfg(length, words, width=text_width, heads=text_heads, layers=layers[1]),
        quick_gelu=True,
    )


# --- the methods ------------------------------------------------------------------------------------------------------


class ZeroShot(PromptedCLIP):
    """CLIP unchanged: nothing is trained, the classes' text features are computed once. Arguments as `PromptedCLIP`."""

    def __init__(self, clip: CLIP, classes: Classes, tokenizer: Tokenizer, template: str = "a photo of {}."):
        super().__init__(clip, classes, tokenizer, template)

    @torch.no_grad()
    def set_classes(self, classes: Classes) -> None:
        super().set_classes(classes)
        texts = encode_text(self.clip, self.embedded[:, : self.length], self.ends)
        self.register_buffer("text_features", texts, persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (b, C) of images (b, 3, H, W), or of their features (b, E)."""
        return similarity(self.clip, self.image_features(images), self.text_features)


class CoOp(PromptLearner):
    """Context optimisation: n learned tokens, the same for every class and image. Arguments as `PromptLearner`."""

    def __init__(
        self, clip: CLIP, classes: Classes, tokenizer: Tokenizer | None, *, tokens: int = 16, template: str = "{}."
    ):
        super().__init__(clip, classes, tokenizer, tokens, template)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (b, C) of images (b, 3, H, W), or of their features (b, E): nothing in the image tower is trained."""
        text = encode_text(self.clip, self.prompted(self.ctx), self.ends)
        return similarity(self.clip, self.image_features(images), text)


def meta_net(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    """The two-layer network W2 relu(W1 f + b1) + b2 from an image feature to a bias on the context."""
    return nn.Sequential(
        OrderedDict(linear1=nn.Linear(inputs, hidden), relu=nn.ReLU(), linear2=nn.Linear(hidden, outputs))
    )


META_NET = [f"meta_net.linear{i}.{kind}" for i in (1, 2) for kind in ("weight", "bias")]


class CoCoOp(PromptLearner):
    """Conditional context optimisation: the context plus a bias that a small network computes from the image feature.

    Args: as `PromptLearner`, and
        hidden: width of the network; None for E / 16.
    """

    def __init__(
        self,
        clip: CLIP,
        classes: Classes,
        tokenizer: Tokenizer | None,
        *,
        tokens: int = 4,
        template: str = "a photo of a {}.",
        hidden: int | None = None,
    ):
        super().__init__(clip, classes, tokenizer, tokens, template)
        shared = clip.visual.output_dim
        self.meta_net = meta_net(shared, hidden or max(1, shared // 16), self.ctx.shape[1])

    def forward(self, images: Tensor) -> Tensor:
        """Logits (b, C) of images (b, 3, H, W), or of their features (b, E). The text tower runs b · C times."""
        features = F.normalize(self.image_features(images), dim=-1)
        ctx = self.ctx + self.meta_net(features)[:, None]
        return similarity(self.clip, features, encode_text(self.clip, self.prompted(ctx), self.ends))

    def _learner_names(self) -> dict[str, Any]:
        return {"ctx": "ctx"} | {name: name for name in META_NET}

    @staticmethod
    def _sizes(learner: Mapping[str, Tensor]) -> dict[str, int]:
        return {"tokens": len(learner["ctx"]), "hidden": len(learner["meta_net.linear1.weight"])}


class LinearStack(nn.Module):
    """`layers` linear layers of one size in parallel, in one batched product; they are initialised equally.

    x (layers, ..., inputs) to (layers, ..., outputs); `weight` (layers, outputs, inputs), `bias` (layers, outputs).
    """

    def __init__(self, inputs: int, outputs: int, layers: int):
        super().__init__()
        one = nn.Linear(inputs, outputs)
        self.weight = nn.Parameter(one.weight.detach().repeat(layers, 1, 1))
        self.bias = nn.Parameter(one.bias.detach().repeat(layers, 1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.baddbmm(self.bias[:, None], x.flatten(1, -2), self.weight.mT).unflatten(1, x.shape[1:-1])


def check_depth(clip: CLIP, depth: int) -> None:
    """Raise `BadParameter` when the image tower has fewer layers than the J = `depth` that are prompted."""
    layers = len(clip.visual.transformer.resblocks)
    if not 1 <= depth <= layers:
        raise BadParameter("depth", depth, f"1 to {layers}, the layers of the image tower")


class MaPLe(PromptLearner):
    """Multi-modal prompt learning: text prompts in J layers, and for each a linear layer that projects them to image
    prompts.

    Args: as `PromptLearner`, and
        depth: J, the prompted layers: 9 in the released settings, 3 for cross-dataset runs. Prompts deeper than the
            text tower act on the image tower alone.
    """

    def __init__(
        self,
        clip: CLIP,
        classes: Classes,
        tokenizer: Tokenizer | None,
        *,
        tokens: int = 2,
        depth: int = 9,
        template: str = "a photo of a {}.",
    ):
        super().__init__(clip, classes, tokenizer, tokens, template)
        check_depth(clip, depth)
        text, image = self.ctx.shape[1], clip.visual.conv1.out_channels
        self.proj = nn.Linear(text, image)
        self.deep_text = nn.Parameter(torch.randn(depth - 1, tokens, text) * 0.02)
        self.deep_proj = LinearStack(text, image, depth - 1)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (b, C) of images (b, 3, H, W)."""
        image = encode_image(self.clip, images, self.proj(self.ctx), self.deep_proj(self.deep_text))
        text = encode_text(self.clip, self.prompted(self.ctx), self.ends, self.deep_text)
        return similarity(self.clip, image, text)

    def _learner_names(self) -> dict[str, Any]:
        layers = range(len(self.deep_text))
        return (
            {name: name for name in ("ctx", "proj.weight", "proj.bias")}
            | {"deep_text": [f"compound_prompts_text.{i}" for i in layers]}
            | {f"deep_proj.{k}": [f"compound_prompt_projections.{i}.{k}" for i in layers] for k in ("weight", "bias")}
        )

    @staticmethod
    def _sizes(learner: Mapping[str, Tensor]) -> dict[str, int]:
        deep = sum(name.startswith("compound_prompts_text.") for name in learner)
        return {"tokens": len(learner["ctx"]), "depth": deep + 1}

"""What PromptPAR has from the authors' code (Event-AHU/OpenPAR, folder PromptPAR) beside the method: its tensor names
and checkpoints, and the prompts of its text tower, which have no effect."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from open_clip.model import CLIP
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from ...errors import CorruptFile
from ...io.unpickle import load_torch
from ..layers import state_dicts
from ..layers.clip_prompting import Texts, Tokenizer, clip_of
from .tower import Settings

NAMES = {
    "prompts": "clip_model.visual.transformer.prompt_deep",
    "text_prompts": "clip_model.transformer.prompt_text_deep",
    "region_tokens": "clip_model.visual.part_class_embedding",
    "temperature": "clip_model.softmax_model.temperature",
}


def prompted_text(clip: CLIP, texts: Texts, prompts: Tensor, place: str = "end") -> Tensor:
    """Sentence features (A, E), not normalised, with prompts (layers, n, A, Wt): n for each sentence and layer.

    The model does not need this: with `place` "end", as released, any prompts give the features without prompts, and
    the gradient is exactly zero. With "start", after the start token, they have an effect.
    """
    n, length = prompts.shape[1], texts.embedded.shape[1]
    start, ends = (length, texts.ends) if place == "end" else (1, texts.ends + n)
    x = texts.embedded + clip.positional_embedding
    x = torch.cat([x[:, :start], x.new_zeros(len(x), n, x.shape[-1]), x[:, start:]], dim=1)  # (A, length + n, Wt)
    mask = torch.full((length + n, length + n), -torch.inf, device=x.device).triu(1)
    for i, block in enumerate(clip.transformer.resblocks):
        if i < len(prompts):
            x = torch.cat([x[:, :start], rearrange(prompts[i], "n a w -> a n w"), x[:, start + n :]], dim=1)
        x = block(x, attn_mask=mask)
    return clip.ln_final(x[torch.arange(len(x)), ends]) @ clip.text_projection


def read_checkpoint(path: str | Path) -> dict[str, Tensor]:
    """The tensors in a checkpoint file of the authors' code, for `from_official`; no code in the file is run.

    Their files have two state dicts: the CLIP under "ViT_model" (released) or "clip_model" (as their training writes
    it; their test script expects the other name), the rest under "model_state_dict".

    Raises `CorruptFile` for any other file.
    """
    file: Any = load_torch(path)
    try:
        parts = {"clip_model.": file.get("ViT_model") or file["clip_model"], "model.": file["model_state_dict"]}
        return renamed({prefix + name: value for prefix, part in parts.items() for name, value in part.items()})
    except (AttributeError, KeyError) as error:
        reason = "no 'ViT_model' or 'clip_model', or no 'model_state_dict' in it: not a checkpoint of PromptPAR"
        raise CorruptFile(path, reason) from error


def renamed(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under the names of today's code: PA100k_Checkpoint.pth calls the layer on the image tokens
    `vis_embed`, which OpenPAR's code of May 2025 and later calls `visual_embed`."""
    return {name.replace("model.vis_embed.", "model.visual_embed."): tensor for name, tensor in state.items()}


class Released(state_dicts.OfficialModel):
    """PromptPAR's tensors under the names of the authors' two modules."""

    def official_names(self) -> dict[str, str | list]:
        """Our tensor names to those in the authors' two modules."""
        names: dict[str, str | list] = {}
        for name, tensor in self.state_dict().items():
            part, _, rest = name.partition(".")
            if part == "clip":
                names[name] = f"clip_model.{rest}"
            elif part == "agg_bn":
                names[name] = f"clip_model.{name}"
            elif part == "heads":
                names[name] = [f"model.weight_layer.{i}.{rest}" for i in range(len(tensor))]
            elif tensor.numel():  # the authors have no empty prompts
                names[name] = NAMES.get(name, f"model.{name}")
        return names

    def to_official(self) -> dict[str, Tensor]:
        """All tensors under the authors' names, "clip_model.<name>" and "model.<name>"."""
        state, deep = super().to_official(), NAMES["prompts"]
        return state | ({deep: state[deep].unsqueeze(2)} if deep in state else {})

    @classmethod
    def from_official(
        cls,
        state: Mapping[str, Tensor],
        sentences: Sequence[str],
        tokenizer: Tokenizer,
        *,
        clip: CLIP | None = None,
        heads: tuple[int, int, int] | None = None,
        official_quirks: bool = True,
        **options: Any,
    ) -> Any:
        """The model with the authors' tensors, all sizes read from them; the inverse is `to_official`.

        Args:
            state: "clip_model.<name>" and "model.<name>", as `read_checkpoint` returns it.
            sentences: one for each attribute.
            clip: one of the right shape, of which a copy gets the weights; None: built for square images.
            heads: of the image tower, the text tower and the fusion; None: 64 channels per head, as released.
            official_quirks: True, as the weights were trained.
            options: `overlap`, `masked`, `drop_path` and `threshold`, which a state dict does not contain.

        Raises `BadCheckpoint`: names that are missing, unknown or of another shape, all of them listed.
        """
        what, state, visual = "PromptPAR (the authors' names)", renamed(state), "clip_model.visual."
        needed = [f"{visual}{name}" for name in ("conv1.weight", "positional_embedding", "proj")]
        needed += ["clip_model.positional_embedding", "clip_model.token_embedding.weight", "model.word_embed.weight"]
        state_dicts.check_names(state, needed, what)
        prompts, text_prompts = (state.get(NAMES[name]) for name in ("prompts", "text_prompts"))
        if prompts is not None:
            state[NAMES["prompts"]] = prompts = prompts.squeeze(2)  # (J, P, W)
        image, text, mixed = heads or (None, None, None)
        width, mm_layers = len(state["model.word_embed.weight"]), state_dicts.depth(state, "model.blocks.")
        sizes = {"embed_dim": width, "num_heads": mixed or width // 64, "depth": mm_layers}
        fusion = VisionTransformer(img_size=16, num_classes=0, **sizes)
        if clip is None:
            words = len(state["clip_model.token_embedding.weight"])
            clip = clip_of(state, visual, "clip_model.", (image, text), words)
        settings = Settings(
            prompts=0 if prompts is None else prompts.shape[1],
            depth=None if prompts is None else len(prompts),
            regions=len(state.get(NAMES["region_tokens"], ())),
            text_prompts=0 if text_prompts is None else text_prompts.shape[1],
            mm_layers=mm_layers,
            visual_embed="model.visual_embed.weight" in state,
            official_quirks=official_quirks,
            **options,
        )
        model = cls(copy.deepcopy(clip), sentences, tokenizer, fusion, settings).eval()
        state_dicts.load_official(model, state, model.official_names(), what, optional=("num_batches_tracked",))
        return model

"""The small CLIP (open_clip's classes), trained contrastively on scenes and captions. About 6 minutes on one core.

The image tower starts from the shipped ViT, which encodes shapes and hues but not positions: a 2D sine-cosine
embedding is added to the position embedding of its patches; without it, position stays at chance level for long.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from timm.layers import build_sincos2d_pos_embed
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from companion.toy import encoders
from companion.toy.encoders.training import fit_steps
from companion.toy.encoders.vit_and_clip import pixels
from companion.toy.scenes import CLASSES, Scene, scenes
from companion.toy.tokens import Tokenizer

from . import ship
from .pocket_vit import augment


def short_caption(scene: Scene, names: Sequence[str]) -> str:
    """A caption with the attributes `names` only: "a red object on grass", or "an object" when it is empty."""
    words = {name: scene.attributes[name] for name in names}
    thing = " ".join([words[name] for name in ("size", "hue") if name in words] + [words.get("shape", "object")])
    where = f" at the {words['place']}" if "place" in words else ""
    ground = f" on {words['background']}" if "background" in words else ""
    return ("an " if thing == "object" else "a ") + thing + where + ground


def image_tower_from(vit: nn.Module) -> dict[str, Tensor]:
    """A small ViT's weights under the names of open_clip's image tower; both then give the same [CLS] token.

    open_clip's patch projection has no bias: the ViT's is added to the patches' position embedding.
    """
    names = {"norm1": "ln_1", "norm2": "ln_2", "attn.qkv.": "attn.in_proj_", "attn.proj": "attn.out_proj"}
    names |= {"mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj", "blocks": "transformer.resblocks"}
    state = vit.state_dict()
    position = state["pos_embed"][0].clone()
    position[1:] += state["patch_embed.proj.bias"]
    out = {
        "class_embedding": state["cls_token"][0, 0],
        "positional_embedding": position,
        "conv1.weight": state["patch_embed.proj.weight"],
        "ln_post.weight": state["norm.weight"],
        "ln_post.bias": state["norm.bias"],
    }
    for key, value in state.items():
        if key.startswith("blocks."):
            for ours, theirs in names.items():
                key = key.replace(ours, theirs)
            out[key] = value
    return out


def contrast(clip: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """CLIP's loss of images and their captions (b, k, tokens), mean over the k kinds of captions.

    Equal captions in a batch are all positives. With full captions alone, two or three words would distinguish almost
    any two images, and the others would hardly be learned.
    """
    images, captions = batch
    image, losses = clip.encode_image(images, normalize=True), []
    for column in captions.unbind(1):
        distinct, which = column.unique(dim=0, return_inverse=True)
        text = clip.encode_text(distinct, normalize=True)[which]
        logits = clip.logit_scale.exp().clamp(max=100) * image @ text.T
        same = (which[:, None] == which[None]).float()
        target = same / same.sum(-1, keepdim=True)
        losses.append((F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2)
    return torch.stack(losses).mean()


def train(images: int, steps: int, seed: int) -> nn.Module:
    """The CLIP.

    Each image has seven captions: one for each attribute alone, one with all of them, and one with a random subset, the
    same for the whole batch. Images are not flipped: captions contain left and right.
    """
    drawn = scenes(images, "train", seed)
    attributes, tokenizer = list(drawn[0].attributes), Tokenizer()
    subsets = [list(itertools.compress(attributes, bits)) for bits in itertools.product((0, 1), repeat=len(attributes))]
    always = [i for i, names in enumerate(subsets) if len(names) in (1, len(attributes))]
    captions = torch.stack([tokenizer([short_caption(scene, names) for scene in drawn]) for names in subsets], 1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = encoders.build("pocket_clip", "random")
    start = image_tower_from(encoders.build("pocket_vit"))
    start["positional_embedding"][1:] += build_sincos2d_pos_embed([8, 8], 48, temperature=10.0)
    model.visual.load_state_dict(start | {"proj": model.visual.proj})

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        chosen = [*always, int(torch.randint(len(subsets), ()))]
        return contrast(model, (augment(batch[0], flips=False), batch[1][:, chosen]))

    data = TensorDataset(pixels([s.image for s in drawn]), captions)
    fit_steps(model, loss, data, steps, 64, 2e-3, seed, "pocket_clip")
    return model


@torch.inference_mode()
def measure(model: nn.Module) -> dict[str, float]:
    """Zero-shot accuracy of the 16 classes, prompts "a red disc", on 1,000 scenes from test tiles."""
    drawn = scenes(1000, "test", 1)
    images = model.encode_image(pixels([s.image for s in drawn]), normalize=True)
    texts = model.encode_text(Tokenizer()([f"a {name}" for name in CLASSES]), normalize=True)
    hit = (images @ texts.T).argmax(-1) == torch.tensor([s.label for s in drawn])
    return {"zero-shot accuracy": hit.float().mean().item()}


if __name__ == "__main__":
    recipe = {"images": 12000, "steps": 1000, "seed": 0}
    ship("pocket_clip", train, measure, recipe)

"""SA²VP: Spatially Aligned-and-Adapted Visual Prompt (Pei et al., AAAI 2024, arXiv 2312.10376).

A frozen vision transformer reads the image; a second pathway runs a learned MAP of prompt tokens, one for every image
token, through the same frozen blocks. At each block a small interaction lets each token of one pathway attend to the
3x3 neighbourhood of its own place in the other. Only the prompt maps, a bottleneck adapter a block and the head learn.

Written from the equations, and checked against outputs recorded from the authors' code (github tommy-xq/SA2VP, commit
35674e7, MIT). The backbones are timm's, by Ross Wightman. Section numbers are those of the method in the notebook.

Shapes: b images, N slots (slot 0 is the class slot of a ViT, then the patches in raster order), D channels, r the width
of the bottleneck, s the weight of the fusion.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

import torch
from timm.layers import Mlp
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from ...errors import BadCheckpoint, BadParameter
from ..layers.vpt import PLAIN_VIT, plain_vit

ATTENTION = ("aligned", "padded")
DIRECTIONS = ("both", "prompt to image", "image to prompt", "none")


def loss(logits_image: Tensor, logits_prompt: Tensor, target: Tensor, prompt_weight: float = 0.2) -> Tensor:
    """(1 - w) CE(image pathway) + w CE(prompt pathway), w = 0.2 as released. Logits (b, classes), target (b,)."""
    on_image, on_prompt = F.cross_entropy(logits_image, target), F.cross_entropy(logits_prompt, target)
    return (1 - prompt_weight) * on_image + prompt_weight * on_prompt


def neighbourhood(grid: tuple[int, int], radius: int | None = 1, class_slot: bool = True) -> Tensor:
    """Which slots a query may read in the other pathway: boolean (N, N), rows are queries.

    A patch reads the patches at most `radius` away in row and in column (None: all slots, the unaligned control). The
    class slot reads all slots and is read by no patch.
    """
    place = torch.cartesian_prod(torch.arange(grid[0]), torch.arange(grid[1]))
    near = (place[:, None] - place[None]).abs().amax(-1) <= (math.inf if radius is None else radius)
    if not class_slot:
        return near
    mask = F.pad(near, (1, 0, 1, 0), value=radius is None)
    mask[0] = True
    return mask


def cross_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """The aligned attention as ONE masked attention. q, k, v (b, heads, N, d), `mask` boolean (N, N)."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def padded_mask(mask: Tensor, radius: int, class_slot: bool) -> Tensor:
    """The additive mask (N, N + 1) of the released `_acc` variant.

    There a neighbour outside the picture is not left out: it is a key and a value of zeros. All of these have logit 0:
    m of them together are one zero key with log(m) added. The extra last column is that key.
    """
    outside = (2 * radius + 1) ** 2 - mask.sum(1, keepdim=True)
    if class_slot:
        outside[0] = 0  # the class slot reads every slot, none of them outside
    return torch.cat([torch.zeros(mask.shape).masked_fill(~mask, -math.inf), outside.float().log()], dim=1)


class Adapter(nn.Module):
    """What an interaction trains: W2 GELU(W1 LN(z) + b1) + b2, with NO residual around it. z: (b, N, D)."""

    def __init__(self, dim: int, width: int, dropout: float):
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.down = nn.Linear(dim, width)
        self.up = nn.Linear(width, dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, z: Tensor) -> Tensor:
        return self.dropout(self.up(self.dropout(F.gelu(self.down(self.norm(z))))))


def _xavier(*layers: nn.Linear) -> None:
    for layer in layers:
        nn.init.xavier_uniform_(layer.weight)
        nn.init.normal_(layer.bias, std=1e-6)


class _TwoPathways(nn.Module):
    """What the ViT and the Swin version share: options, the masks, the interaction, what is trained."""

    def __init__(
        self,
        backbone: nn.Module,
        *,
        scale: float,
        attention: str,
        radius: int | None,
        direction: str,
        dropout: float,
        frozen_dropout: bool,
    ):
        super().__init__()
        if attention not in ATTENTION:
            raise BadParameter("attention", attention, ATTENTION)
        if direction not in DIRECTIONS:
            raise BadParameter("direction", direction, DIRECTIONS)
        if attention == "padded" and radius is None:
            raise BadParameter("radius", radius, "a whole number when attention = 'padded'")
        self.backbone = backbone.requires_grad_(False)
        self.scale, self.attention, self.direction = scale, attention, direction
        self.dropout = nn.Dropout(dropout)
        self.frozen_dropout = frozen_dropout

    def _set_mask(self, grid: tuple[int, int], radius: int | None, class_slot: bool) -> None:
        mask = neighbourhood(grid, radius, class_slot)
        if self.attention == "padded":
            mask = padded_mask(mask, radius, class_slot)
        self.register_buffer("mask", mask, persistent=False)

    def train(self, mode: bool = True):
        """The released code lets the frozen blocks drop too while training; `frozen_dropout=False` keeps them quiet."""
        super().train(mode)
        self.backbone.train(mode and self.frozen_dropout)
        return self

    def trained(self) -> dict[str, nn.Parameter]:
        """The trained tensors by name, the head among them."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def count(self, head: bool = False) -> int:
        """How many numbers are trained; the paper's percentage leaves the head out."""
        return sum(p.numel() for name, p in self.trained().items() if head or not name.startswith("head."))

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, trace: dict | None) -> Tensor:
        """Aligned cross attention (3.2) of q on k, v, each (b, heads, N, d); returns (b, N, D)."""
        mask = self.mask[: q.shape[2]]
        if self.attention == "padded":  # one head as wide as the model, and a zero key and value at the end
            q, k, v = (x.transpose(1, 2).flatten(2).unsqueeze(1) for x in (q, k, v))
            k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
            mask = mask.to(q.dtype)
        if trace is not None:
            bias = mask if mask.is_floating_point() else torch.zeros(mask.shape).masked_fill(~mask.cpu(), -math.inf)
            logits = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1]) + bias.to(q)
            trace.setdefault("cross", []).append(logits.softmax(-1).detach())
        return cross_attention(q, k, v, mask).transpose(1, 2).flatten(2)

    def _interact(self, i: int, proj: nn.Linear, q, k, v, query: Tensor, trace: dict | None) -> Tensor:
        """Bilateral interaction (3.3): the attended neighbourhood plus the query itself, through the adapter of i."""
        fusion = self.adapters[i](query + self.dropout(proj(self._attend(q, k, v, trace))))
        if trace is not None:
            trace.setdefault("fusion", []).append(fusion.detach())
        return fusion

    def _load_official(self, state: Mapping[str, Tensor], names: dict[str, tuple[str, ...]], tied: dict[str, str]):
        """Copy `state` in: `names` maps ours to the official ones (several are stacked), `tied` the frozen copies."""
        ours = dict(self.state_dict())
        wanted = {official for group in names.values() for official in group}
        missing, shapes = wanted - state.keys(), []
        unknown = {
            name
            for name in state
            if name not in wanted
            and name not in tied
            and not name.endswith(("relative_position_index", "attn_mask", "num_batches_tracked"))
        }
        for name, group in names.items():
            if missing.isdisjoint(group):
                value = torch.cat([state[n] for n in group]) if len(group) > 1 else state[group[0]]
                if value.shape != ours[name].shape:
                    shapes.append(f"{group[0]} {tuple(value.shape)}, expected {tuple(ours[name].shape)}")
                ours[name] = value
        # the authors store a frozen copy of each block's attention; one that differs is another model
        for copy, source in tied.items():
            if copy in state and source in state and not torch.equal(state[copy], state[source]):
                shapes.append(f"{copy} is no copy of {source}")
        if missing or unknown or shapes:
            raise BadCheckpoint(f"SA²VP on {type(self.backbone).__name__}", missing, unknown, shapes)
        self.load_state_dict(ours)
        return self

    def _to_official(self, names: dict[str, tuple[str, ...]]) -> dict[str, Tensor]:
        ours = self.state_dict()
        return {
            official: part
            for name, group in names.items()
            for official, part in zip(group, ours[name].chunk(len(group)), strict=True)
        }


class SA2VP(_TwoPathways):
    """SA²VP on a plain ViT: any depth divisible by 3, any width, patch grid and image size.

    Args:
        backbone: a timm `VisionTransformer` of the original's form (`vpt.plain_vit`); its weights are frozen.
        classes: number of classes.
        width: r, the width of the prompt maps and of the adapters (8, 16, 32 or 64 in the released settings).
        scale: s, the weight of the fusion (0.1, 0.5 or 1.5 in the released settings).
        new_maps: how many new prompt maps join along the depth (2; the released code has a comment that says 1 for
            Stanford Cars, but not at which block: here the first of the two).
        attention: "aligned", the plain file that gave the paper's numbers, or "padded", the `_acc` file added later.
        radius: reach of the alignment in patches: 1 is 3x3, 0 the same place only, None everything (a control).
        direction: which interactions run (a control; the paper's is "both").
        dropout: probability after the embeddings, in the frozen MLPs, after the cross attention and in the adapters.
        frozen_dropout: whether the frozen blocks drop too while training (the released code does; VPT's does not).

    Raises:
        BadParameter: an option outside its choices, or a backbone that is not such a ViT.
    """

    def __init__(
        self,
        backbone: VisionTransformer,
        classes: int,
        width: int = 16,
        scale: float = 0.1,
        *,
        new_maps: int = 2,
        attention: str = "aligned",
        radius: int | None = 1,
        direction: str = "both",
        dropout: float = 0.1,
        frozen_dropout: bool = True,
    ):
        blocks = getattr(backbone, "blocks", ())
        usual = all(isinstance(block, Block) and type(block.mlp) is Mlp for block in blocks)
        if not plain_vit(backbone) or not usual or len(blocks) % 3:
            raise BadParameter("backbone", type(backbone).__name__, f"{PLAIN_VIT}; pre-norm, depth divisible by 3")
        if new_maps not in (0, 1, 2):
            raise BadParameter("new_maps", new_maps, (0, 1, 2))
        super().__init__(
            backbone,
            scale=scale,
            attention=attention,
            radius=radius,
            direction=direction,
            dropout=dropout,
            frozen_dropout=frozen_dropout,
        )
        dim, depth = backbone.embed_dim, len(backbone.blocks)
        grid = backbone.patch_embed.grid_size
        slots = 1 + grid[0] * grid[1]
        self.grid, self.period = grid, depth // 3
        self._set_mask(grid, radius, class_slot=True)
        for block in backbone.blocks:
            block.mlp.drop1.p = block.mlp.drop2.p = dropout

        self.prompt = nn.Parameter(torch.empty(1, slots, width))
        self.prompt_proj = nn.Linear(width, dim)
        self.new_prompts = nn.Parameter(torch.empty(new_maps, 1, slots, width))
        self.new_projs = nn.ModuleList(nn.Linear(width, dim) for _ in range(new_maps))
        self.gains = nn.Parameter(torch.empty(new_maps, dim))
        self.adapters = nn.ModuleList(Adapter(dim, width, dropout) for _ in range(depth))
        self.head = nn.Linear(dim, classes)

        nn.init.trunc_normal_(self.prompt, std=0.02)
        nn.init.trunc_normal_(self.new_prompts, std=0.02)
        nn.init.normal_(self.gains, std=0.02)
        nn.init.trunc_normal_(self.head.weight, std=0.02)
        _xavier(self.prompt_proj, *self.new_projs, *(x for a in self.adapters for x in (a.down, a.up)))

    def embed(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Image tokens (b, N, D) and prompt tokens (3.1). Both get the SAME frozen position table.

        The prompt tokens do not depend on the image: (1, N, D), unless dropout makes one draw an image: (b, N, D).
        """
        vit = self.backbone
        patches = vit.patch_embed(images)
        tokens = torch.cat([vit.cls_token.expand(len(images), -1, -1), patches], dim=1) + vit.pos_embed
        prompt = self.prompt_proj(self.prompt) + vit.pos_embed
        if self._dropping(self.dropout):
            prompt = prompt.expand(len(images), -1, -1)
        return self.dropout(tokens), self.dropout(prompt)

    def forward(self, images: Tensor, trace: dict | None = None) -> tuple[Tensor, Tensor]:
        """Classify images (b, 3, H, W) by both pathways: two (b, classes); the first is the prediction.

        A `trace` dictionary, when given, is filled with what happens inside, one entry a block: "image" and "prompt"
        tokens after the block (b, N, D), "fusion" F (b, N, D), "cross" and "self" (image pathway) attention maps
        (b, heads, N, N).
        """
        image, prompt = self.embed(images)
        b, last = len(images), len(self.backbone.blocks) - 1
        for i, block in enumerate(self.backbone.blocks):
            to_prompt = i % self.period == 0
            # the head reads slot 0 alone, so the last block need not finish the others
            keep = 1 if i == last and trace is None else image.shape[1]

            # The frozen block T_i on both pathways: as one batch, but for the first block, where the image pathway
            # has nothing to learn yet (no autograd) and the prompts may still be one map for all images.
            if i == 0:
                qkv_image, next_image = self._block(block, image, keep, trace)
                qkv_prompt, next_prompt = self._block(block, prompt, keep)
            else:
                qkv, both = self._block(block, torch.cat([image, prompt.expand(b, -1, -1)]), keep, trace)
                next_image, next_prompt = both.split(b)
                qkv_image, qkv_prompt = zip(*(x.split(b) for x in qkv), strict=True)

            # The interaction reads the block's inputs, through the q, k, v that T_i has already computed.
            new = i // self.period - 1
            if to_prompt and 0 <= new < len(self.new_projs):
                fresh = self.new_projs[new](self.new_prompts[new])
                next_prompt = next_prompt + self.gains[new] * self._block(block, fresh, keep, batch=b)[1]
            if to_prompt and self.direction in ("both", "image to prompt"):
                q = qkv_prompt[0].expand(b, -1, -1, -1)
                fusion = self._interact(i, block.attn.proj, q[:, :, :keep], *qkv_image[1:], prompt[:, :keep], trace)
                next_prompt = next_prompt + self.scale * fusion
            elif not to_prompt and self.direction in ("both", "prompt to image"):
                q = qkv_image[0][:, :, :keep]
                fusion = self._interact(i, block.attn.proj, q, *qkv_prompt[1:], image[:, :keep], trace)
                next_image = next_image + self.scale * fusion
            image, prompt = next_image, next_prompt
            if trace is not None:
                trace.setdefault("image", []).append(image.detach())
                trace.setdefault("prompt", []).append(prompt.detach().expand(b, -1, -1))
        return self._classify(image), self._classify(prompt).expand(b, -1)

    def _block(self, block: nn.Module, x: Tensor, keep: int, trace: dict | None = None, batch: int = 1):
        """The frozen pre-norm block T_i on x (b, N, D), for its first `keep` slots; also its q, k, v for the
        interaction, each (b, heads, N, d). With dropout on, an x of one map becomes `batch` maps where it first
        drops: after the GELU."""
        attn = block.attn
        q, k, v = attn.qkv(block.norm1(x)).unflatten(-1, (3, attn.num_heads, attn.head_dim)).permute(2, 0, 3, 1, 4)
        q, k = attn.q_norm(q), attn.k_norm(k)
        if trace is not None:
            of_image = slice(0, len(x) if "self" not in trace else len(trace["self"][0]))
            logits = q[of_image] @ k[of_image].transpose(-2, -1) * attn.scale
            trace.setdefault("self", []).append(logits.softmax(-1).detach())
        attended = F.scaled_dot_product_attention(q[:, :, :keep], k, v)
        y = x[:, :keep] + block.ls1(attn.proj(attended.transpose(1, 2).flatten(2)))
        hidden = block.mlp.act(block.mlp.fc1(block.norm2(y)))
        if len(x) < batch and self._dropping(block.mlp.drop1):
            hidden = hidden.expand(batch, -1, -1)
        return (q, k, v), y + block.ls2(block.mlp.drop2(block.mlp.fc2(block.mlp.drop1(hidden))))

    def _classify(self, tokens: Tensor) -> Tensor:
        return self.head(self.backbone.norm(tokens[:, 0]))

    @staticmethod
    def _dropping(layer: nn.Dropout) -> bool:
        return layer.training and layer.p > 0

    @classmethod
    def from_official(cls, state: Mapping[str, Tensor], *, heads: int | None = None, patch: int = 16, **options):
        """The model with a state dict of the authors' code (`Dual_model`, ViT) in it.

        Sizes are read off the tensors; `heads` is not among them and defaults to heads of 64 channels. `options` are
        those of the class (scale and attention are not stored either). The inverse is `to_official`.

        Raises:
            BadCheckpoint: names that are missing, unknown or of another shape, all of them listed.
        """
        root, need = "vit_base.transformer.", {"embeddings.position_embeddings", "embeddings.ppt", "encoder.deep_ppt"}
        absent = {root + n for n in need} | {"class_head.weight"}
        if absent - state.keys():
            raise BadCheckpoint("SA²VP on a ViT", missing=absent - state.keys())
        _, slots, dim = state[root + "embeddings.position_embeddings"].shape
        layers = {m[1] for n in state if (m := re.search(r"encoder\.layer\.(\d+)\.", n))}
        side = math.isqrt(slots - 1)
        mlp = state.get(root + "encoder.layer.0.ffn.fc1.bias", torch.empty(4 * dim))
        backbone = VisionTransformer(
            img_size=side * patch,
            patch_size=patch,
            embed_dim=dim,
            depth=len(layers),
            num_heads=heads or max(1, dim // 64),
            mlp_ratio=len(mlp) / dim,
            num_classes=0,
        )
        maps, width = state[root + "encoder.deep_ppt"].shape[0], state[root + "embeddings.ppt"].shape[-1]
        model = cls(backbone, len(state["class_head.weight"]), width, new_maps=maps, **options).eval()
        return model._load_official(state, *model._official_names())

    def to_official(self) -> dict[str, Tensor]:
        """The state dict under the authors' names, without their frozen copies of each block's attention."""
        return self._to_official(self._official_names()[0])

    def _official_names(self) -> tuple[dict[str, tuple[str, ...]], dict[str, str]]:
        embeddings, encoder = "vit_base.transformer.embeddings.", "vit_base.transformer.encoder."
        names = {
            "prompt": (embeddings + "ppt",),
            "new_prompts": (encoder + "deep_ppt",),
            "gains": (encoder + "cross_conv",),
            "backbone.pos_embed": (embeddings + "position_embeddings",),
            "backbone.cls_token": (embeddings + "cls_token",),
        }
        layers = {
            "prompt_proj": (embeddings + "ppt_proj",),
            "head": ("class_head",),
            "backbone.patch_embed.proj": (embeddings + "patch_embeddings",),
            "backbone.norm": (encoder + "encoder_norm",),
            **{f"new_projs.{k}": (f"{encoder}deep_proj.{k}",) for k in range(len(self.new_projs))},
        }
        tied = {}
        for i in range(len(self.adapters)):
            ours, block, cross = f"backbone.blocks.{i}.", f"{encoder}layer.{i}.", f"{encoder}cross_attn.{i}."
            layers |= {
                ours + "norm1": (block + "attention_norm",),
                ours + "norm2": (block + "ffn_norm",),
                ours + "attn.qkv": tuple(block + f"attn.{x}" for x in ("query", "key", "value")),
                ours + "attn.proj": (block + "attn.out",),
                ours + "mlp.fc1": (block + "ffn.fc1",),
                ours + "mlp.fc2": (block + "ffn.fc2",),
                f"adapters.{i}.norm": (cross + "ffn_norm",),
                f"adapters.{i}.down": (cross + "ffn.fc1",),
                f"adapters.{i}.up": (cross + "ffn.fc2",),
            }
            copies = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out": "out"}
            for kind in ("weight", "bias"):
                tied |= {f"{cross}attn.{a}.{kind}": f"{block}attn.{b}.{kind}" for a, b in copies.items()}
                tied[f"{cross}attention_norm.{kind}"] = f"{block}attention_norm.{kind}"
        for ours, group in layers.items():
            for kind in ("weight", "bias"):
                names[f"{ours}.{kind}"] = tuple(f"{n}.{kind}" for n in group)
        return names, tied


class SA2VPSwin(_TwoPathways):
    """SA²VP on a Swin transformer (3.7): both pathways pass every block and merging, the interaction is in one stage.

    Args:
        backbone: a timm `SwinTransformer`; its weights are frozen.
        classes, width, scale, attention, radius, direction, dropout, frozen_dropout: as in `SA2VP`.
        stage: which stage interacts, counted from 0 (the third, 14x14 tokens, in the paper); its number of blocks is
            divisible by 3.
    """

    def __init__(
        self,
        backbone: SwinTransformer,
        classes: int,
        width: int = 8,
        scale: float = 0.5,
        *,
        stage: int = 2,
        attention: str = "aligned",
        radius: int | None = 1,
        direction: str = "both",
        dropout: float = 0.1,
        frozen_dropout: bool = True,
    ):
        if not isinstance(backbone, SwinTransformer):
            raise BadParameter("backbone", type(backbone).__name__, "a timm SwinTransformer")
        usable = [number for number, layer in enumerate(backbone.layers) if len(layer.blocks) % 3 == 0]
        if stage not in usable:
            raise BadParameter("stage", stage, f"one with a number of blocks divisible by 3: {usable}")
        super().__init__(
            backbone,
            scale=scale,
            attention=attention,
            radius=radius,
            direction=direction,
            dropout=dropout,
            frozen_dropout=frozen_dropout,
        )
        blocks = backbone.layers[stage].blocks
        self.stage, self.period = stage, len(blocks) // 3
        self.grid = blocks[0].input_resolution
        self._set_mask(self.grid, radius, class_slot=False)
        rows, columns = backbone.patch_embed.grid_size
        dim = backbone.patch_embed.proj.out_channels
        self.prompt = nn.Parameter(torch.empty(1, rows * columns, width))
        self.prompt_proj = nn.Linear(width, dim)
        self.adapters = nn.ModuleList(Adapter(blocks[0].norm1.normalized_shape[0], width, dropout) for _ in blocks)
        self.head = nn.Linear(backbone.num_features, classes)
        nn.init.trunc_normal_(self.prompt, std=0.02)
        for layer in (self.prompt_proj, self.head, *(x for a in self.adapters for x in (a.down, a.up))):
            nn.init.trunc_normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)

    def forward(self, images: Tensor, trace: dict | None = None) -> tuple[Tensor, Tensor]:
        """Classify images (b, 3, H, W) by both pathways: two (b, classes); the first is the prediction.

        `trace` gets, for each block of the interacting stage, "image" and "prompt" tokens (b, N, D), "fusion" (b, N, D)
        and "cross" maps (b, heads, N, N).
        """
        swin, b = self.backbone, len(images)
        image = swin.patch_embed(images)
        prompt = swin.patch_embed.norm(self.prompt_proj(self.prompt)).view(1, *image.shape[1:]).expand_as(image)
        for number, layer in enumerate(swin.layers):
            if number < self.stage:  # the image pathway has nothing to learn yet: apart, so that it needs no autograd
                image, prompt = layer(image), layer(prompt)
            elif number == self.stage:
                image, prompt = layer.downsample(image), layer.downsample(prompt)
                for i, block in enumerate(layer.blocks):
                    image, prompt = self._step(i, block, image, prompt, trace)
            else:
                image, prompt = layer(torch.cat([image, prompt])).split(b)
        logits = self.head(swin.norm(torch.cat([image, prompt])).mean((1, 2)))
        return tuple(logits.split(b))

    def _step(self, i: int, block: nn.Module, image: Tensor, prompt: Tensor, trace: dict | None):
        """One block T_i on both pathways (b, rows, columns, D) and the interaction of their inputs."""
        next_image, next_prompt = block(torch.cat([image, prompt])).split(len(image))
        to_prompt = i % self.period == 0
        wanted = ("both", "image to prompt") if to_prompt else ("both", "prompt to image")
        if self.direction in wanted:
            source, query = (image, prompt) if to_prompt else (prompt, image)
            attn, norm = block.attn, block.norm1
            # the released code copies LN1 with eps 1e-6 where Swin's own has 1e-5, so q, k, v cannot be shared here
            normed = F.layer_norm(torch.cat([query, source]), norm.normalized_shape, norm.weight, norm.bias, 1e-6)
            query_normed, source_normed = normed.flatten(1, 2).chunk(2)
            d = attn.qkv.in_features
            q = F.linear(query_normed, attn.qkv.weight[:d], attn.qkv.bias[:d])
            kv = F.linear(source_normed, attn.qkv.weight[d:], attn.qkv.bias[d:])
            q, k, v = (x.unflatten(-1, (attn.num_heads, -1)).transpose(1, 2) for x in (q, *kv.chunk(2, -1)))
            fusion = self._interact(i, attn.proj, q, k, v, query.flatten(1, 2), trace).view_as(image)
            if to_prompt:
                next_prompt = next_prompt + self.scale * fusion
            else:
                next_image = next_image + self.scale * fusion
        if trace is not None:
            trace.setdefault("image", []).append(next_image.flatten(1, 2).detach())
            trace.setdefault("prompt", []).append(next_prompt.flatten(1, 2).detach())
        return next_image, next_prompt

    @classmethod
    def from_official(
        cls,
        state: Mapping[str, Tensor],
        *,
        image_size: int = 224,
        heads: tuple[int, ...] | None = None,
        drop_path: float = 0.0,
        **options,
    ):
        """The model with a state dict of the authors' code (`Dual_model`, Swin) in it. The inverse is `to_official`.

        Raises:
            BadCheckpoint: names that are missing, unknown or of another shape, all of them listed.
        """
        need = {"vit_base.patch_embed.deep_ppt", "vit_base.patch_embed.proj.weight", "class_head.weight"}
        if need - state.keys():
            raise BadCheckpoint("SA²VP on a Swin", missing=need - state.keys())
        found = [
            re.match(r"vit_base\.layers\.(\d+)\.blocks\.(\d+)\.attn\.relative_position_bias_table", n) for n in state
        ]
        blocks = sorted((int(m[1]), int(m[2])) for m in found if m)
        depths = tuple(sum(1 for stage, _ in blocks if stage == s) for s in sorted({s for s, _ in blocks}))
        tables = [state[f"vit_base.layers.{s}.blocks.0.attn.relative_position_bias_table"] for s in range(len(depths))]
        kernel = state["vit_base.patch_embed.proj.weight"]
        backbone = SwinTransformer(
            img_size=image_size,
            patch_size=kernel.shape[-1],
            embed_dim=kernel.shape[0],
            depths=depths,
            num_heads=heads or tuple(t.shape[1] for t in tables),
            window_size=(math.isqrt(len(tables[0])) + 1) // 2,
            drop_path_rate=drop_path,
            num_classes=0,
        )
        width = state["vit_base.patch_embed.deep_ppt"].shape[-1]
        model = cls(backbone, len(state["class_head.weight"]), width, **options).eval()
        return model._load_official(state, *model._official_names())

    def to_official(self) -> dict[str, Tensor]:
        """The state dict under the authors' names, without their frozen copies of each block's attention."""
        return self._to_official(self._official_names()[0])

    def _official_names(self) -> tuple[dict[str, tuple[str, ...]], dict[str, str]]:
        names, tied = {}, {}
        ours_to_official = {"prompt": "patch_embed.deep_ppt", "prompt_proj": "patch_embed.proj_ppt"}
        for ours in self.state_dict():
            if ours.startswith("head."):
                names[ours] = ("class_head." + ours.removeprefix("head."),)
            elif m := re.match(r"adapters\.(\d+)\.(norm|down|up)\.(\w+)", ours):
                part = {"norm": "ffn_norm", "down": "ffn.fc1", "up": "ffn.fc2"}[m[2]]
                names[ours] = (f"vit_base.layers.{self.stage}.cross_attn.{m[1]}.{part}.{m[3]}",)
            elif m := re.match(r"backbone\.layers\.(\d+)\.downsample\.(.+)", ours):
                # timm merges patches at the start of a stage, the original at the end of the one before
                names[ours] = (f"vit_base.layers.{int(m[1]) - 1}.downsample.{m[2]}",)
            elif ours.startswith("backbone."):
                names[ours] = ("vit_base." + ours.removeprefix("backbone."),)
            else:
                stem, _, kind = ours.partition(".")
                names[ours] = ("vit_base." + ours_to_official[stem] + (f".{kind}" if kind else ""),)
        for i in range(len(self.adapters)):
            cross, block = f"vit_base.layers.{self.stage}.cross_attn.{i}.", f"vit_base.layers.{self.stage}.blocks.{i}."
            for copy, source in (("attention_norm", "norm1"), ("attn.qkv", "attn.qkv"), ("attn.to_out", "attn.proj")):
                for kind in ("weight", "bias"):
                    tied[f"{cross}{copy}.{kind}"] = f"{block}{source}.{kind}"
        return names, tied

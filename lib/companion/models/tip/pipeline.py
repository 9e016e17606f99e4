"""TIP as a diffusers pipeline: degraded images and two prompts to restored images; sizes, saving, loading.

    pipe = TIPPipeline.from_stable_diffusion()
    pipe(image, "A zebra on grass", "Deblur with sigma 3.0; Denoise with sigma 0.08").images
    pipe.save_pretrained("tip"); TIPPipeline.from_pretrained("tip")

Sampler, guidance and sizes are choices of ours; which part reads which prompt, and the prompt of the blind mode, are
the paper's (figure, project page).
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import constants
from open_clip.tokenizer import SimpleTokenizer
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms.v2.functional import to_pil_image

from ...backbones import quiet, unreachable
from ...errors import BadCheckpoint, BadParameter, CorruptFile, Count, MissingWeights, check_choice, extra, typed
from ...io.files import atomic_folder, read_json
from ...io.progress import progress
from ...saving import downloaded
from ..layers.predicting import Images, Names, coloured
from ..layers.windows import starts
from .degradations import BLIND, checked
from .model import TIP, Adaptor, frozen, to_images

with extra("diffusion"):
    from diffusers import AutoencoderKL, DDIMScheduler, DiffusionPipeline, UNet2DConditionModel
    from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
    from diffusers.utils import logging as diffusers_logging
    from diffusers.utils.torch_utils import randn_tensor
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

START, END = "<|startoftext|>", "<|endoftext|>"

# --- sizes: from configurations, without weights ----------------------------------------------------------------------

_SD_VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
    "scaling_factor": 0.18215,
}
_SD_NOISE = {
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}
SIZES: dict[str, dict[str, Any]] = {
    "sd15": {
        "unet": {"cross_attention_dim": 768, "attention_head_dim": 8},
        "text": {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12},
        "pad": END,
    },
    "sd21": {
        "unet": {"cross_attention_dim": 1024, "attention_head_dim": (5, 10, 20, 20), "use_linear_projection": True},
        # 24 layers were trained, the last one is left out
        "text": {
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 23,
            "num_attention_heads": 16,
            "hidden_act": "gelu",
        },
        "pad": "!",
    },
}


PARTS = {
    "diffusers": ("AutoencoderKL", "DDIMScheduler", "UNet2DConditionModel"),
    "transformers": ("CLIPTextModel", "CLIPTokenizer", "CLIPTokenizerFast"),
}
"""The classes that a saved pipeline may name next to this package's."""


# --- the pipeline -----------------------------------------------------------------------------------------------------


def check_parts(folder: Path) -> None:
    """Raise `CorruptFile` where diffusers or transformers would run code of a pipeline's folder, or look it up."""
    found = read_json(folder / "model_index.json")
    if not isinstance(found, dict) or found.get("_class_name") != "TIPPipeline":
        raise CorruptFile(folder / "model_index.json", "not of a TIPPipeline")
    for name, part in found.items():
        library, kind = part if isinstance(part, list) and len(part) == 2 else ("", part)
        known = library is kind is None or kind in PARTS.get(library, ()) or str(library).startswith("companion.")
        if not (name.startswith("_") or known):
            raise CorruptFile(
                folder / "model_index.json", f"{name} = {part}: no part of a TIPPipeline is of this class"
            )
    for code in folder.rglob("*.py"):
        raise CorruptFile(code, "a pipeline has no code")
    for path in folder.glob("*/config.json"):
        if spare := {"auto_map", "attn_implementation", "_attn_implementation"} & set(read_json(path)):
            raise CorruptFile(path, f"{sorted(spare)} may name code")


class TIPPipeline(DiffusionPipeline):
    """Restores images. Saves and loads with `save_pretrained` and `from_pretrained`, safetensors only.

    Modules of the caller stay as they are: see `model.frozen`.

    Args:
        vae: `AutoencoderKL`.
        text_encoder: CLIP's of transformers, or another with its interface.
        tokenizer: CLIP's; None with a text encoder that has a method `ids`.
        unet: `UNet2DConditionModel`.
        adaptor: the `Adaptor` of that UNet.
        scheduler: `DDIMScheduler`.
    """

    _optional_components = ["tokenizer"]  # noqa: RUF012 - a list is what diffusers looks for

    def __init__(self, vae, text_encoder, unet, adaptor, scheduler, tokenizer=None):
        super().__init__()
        parts = {"vae": frozen(vae), "text_encoder": frozen(text_encoder), "unet": frozen(unet)}
        self.register_modules(**parts, tokenizer=tokenizer, adaptor=adaptor.eval(), scheduler=scheduler)
        factor = 2 ** (len(vae.config.block_out_channels) - 1)
        if factor != adaptor.factor:
            raise BadParameter("adaptor", f"images reduced {adaptor.factor} times", f"{factor} times, as by the VAE")

    def predict(self, images: Images, names: Names, **options: Any) -> list[Any]:
        """The restored images, PIL images; options of the call."""
        return [self(coloured(image)[None], **{"output": "pil"} | options).images[0] for image in images]

    def save_pretrained(self, save_directory, **options) -> None:
        """As in diffusers, but under a temporary name first. A folder with files must be a pipeline's."""
        folder = Path(save_directory)
        if any(folder.glob("*")):
            check_parts(folder)
        with atomic_folder(folder) as new:
            super().save_pretrained(new, **options)

    @classmethod
    def from_pretrained(cls, path, **options) -> TIPPipeline:
        """The pipeline of a folder of `save_pretrained`, or of "<user>/<name>" on the hub; options as in diffusers.

        Raises `CorruptFile`: the folder holds or names code, or a part of another class.
        """
        path = Path(path) if Path(path).exists() else downloaded(str(path))
        check_parts(path)
        options = {"use_safetensors": True, "low_cpu_mem_usage": False, **options}
        with quiet(diffusers_logging):
            return super().from_pretrained(path, **options)

    @classmethod
    def from_stable_diffusion(
        cls,
        name: str = "stable-diffusion-v1-5/stable-diffusion-v1-5",
        *,
        fusion: str = "modulate",
        download: bool = False,
        **options: Any,
    ) -> TIPPipeline:
        """The released parts of a Stable Diffusion 1.x or 2.x, and an adaptor initialised from its UNet.

        Args:
            name: id on the hub, or a folder in diffusers' layout.
            fusion: of the adaptor.
            download: fetch what is not cached.
            options: to `from_pretrained` of every part, for instance `variant="fp16"`.

        Raises `MissingWeights` when it is neither cached nor available.
        """
        reason = unreachable() if download and not Path(name).is_dir() else ""
        here = {"local_files_only": not download or bool(reason)}
        options = {"use_safetensors": True, **here, **options}
        whole = {"low_cpu_mem_usage": False, **options}  # accelerate is not a dependency
        try:
            with quiet(diffusers_logging):
                vae = AutoencoderKL.from_pretrained(name, subfolder="vae", **whole)
                unet = UNet2DConditionModel.from_pretrained(name, subfolder="unet", **whole)
                text = CLIPTextModel.from_pretrained(name, subfolder="text_encoder", **options)
                tokenizer = CLIPTokenizer.from_pretrained(name, subfolder="tokenizer", **here)
                scheduler = DDIMScheduler.from_pretrained(name, subfolder="scheduler", **here)
        except OSError as error:
            ways = [
                f"pass download=True (about 4 GB from {name}), or `hf download {name}`",
                "name a folder that holds it",
            ]
            raise MissingWeights(name, constants.HF_HUB_CACHE, ways, reason) from error
        return cls(vae, text, unet, Adaptor.of(unet, fusion=fusion), scheduler, tokenizer)

    @property
    def model(self) -> TIP:
        """The network to train, which shares this pipeline's parts; only the adaptor has gradients."""
        self.adaptor.requires_grad_(True)
        return TIP(self.unet, self.adaptor, self.text_encoder)

    def ids(self, texts: Sequence[str], truncate: bool = False) -> Tensor:
        """Ids (B, M) of texts, see `text.tokenize`."""
        return tokenize(self.text_encoder if self.tokenizer is None else self.tokenizer, texts, truncate)

    @torch.no_grad()
    def states(self, texts: Sequence[str]) -> Tensor:
        """States (B, M, d) of texts; equal texts are encoded once."""
        unique = list(dict.fromkeys(texts))
        states = self.text_encoder(self.ids(unique).to(self.text_encoder.device))[0]
        return states[[unique.index(text) for text in texts]]

    @typed
    @torch.no_grad()
    def __call__(
        self,
        image: Tensor,
        prompt: str | Sequence[str] = "",
        restoration: str | Sequence[str] = BLIND,
        *,
        steps: Count = 50,
        scale: float = 1.0,
        guidance: float = 1.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        tile: int = 0,
        overlap: int = 64,
        match_colours: bool = False,
        output: str = "pt",
    ) -> ImagePipelineOutput:
        """Restored `images`, from pure noise, in `steps` steps of DDIM (ours; the paper's sampler is not known).

        Args:
            image: degraded, (B, 3, H, W) in [0, 1].
            prompt: c_s, the content of the clean image; one prompt, or one per image.
            restoration: c_r, the degradations to undo. The defaults are the blind mode of the project's page.
            scale: s of the fusion; 0 is the frozen model, which does not depend on `image`.
            guidance: w of c_s: prediction("") + w (prediction(c_s) - prediction("")); 1 is off. In any case the adaptor
                and each half of the UNet are called once per step.
            generator: of the initial noise; a list has one for each image.
            latents: the initial noise (B, L, h, w); (1, L, h, w) is the same for all images.
            tile: side in pixels of square tiles, for images larger than memory: in each step the noise is predicted
                tile by tile, and predictions are blended where tiles overlap. 0 for none.
            overlap: of two tiles, in pixels.
            match_colours: give each channel of a restored image the mean and standard deviation of the degraded one.
            output: "pt", (B, 3, H, W) in [0, 1]; "pil", a list of PIL images; or "latent".

        Raises `BadParameter`: values outside of [0, 1], a list of another number of prompts, a tile that is no multiple
        of what the VAE reduces, or an overlap that is.
        """
        model, device, dtype, count = TIP(self.unet, self.adaptor), self.unet.device, self.adaptor.dtype, len(image)
        (height, width), factor = image.shape[-2:], self.adaptor.factor
        if tile and (tile % factor or overlap % factor or not 0 <= overlap <= tile // 2):
            accepted = f"multiples of {factor} pixels, the overlap at most half of the tile"
            raise BadParameter("tile and overlap", f"{tile}, {overlap}", accepted)
        y = F.pad(checked(image), (0, -width % factor, 0, -height % factor), mode="replicate")
        y = (2 * y - 1).to(device, dtype)
        semantic, control = _each("prompt", prompt, count), _each("restoration", restoration, count)
        pairs = 1 if guidance == 1 else 2  # of predictions: with c_s, and without
        semantic = self.states(semantic + [""] * count * (pairs - 1))
        control = self.states(control).to(dtype)

        size = (count, self.unet.config.in_channels, y.shape[-2] // factor, y.shape[-1] // factor)
        if latents is None:
            z = randn_tensor(size, generator=generator, device=device, dtype=dtype)
        else:
            z = latents.to(device, dtype).expand(size)
        z = z * self.scheduler.init_noise_sigma
        self.scheduler.set_timesteps(steps, device=device)
        self.scheduler.alphas_cumprod = self.scheduler.alphas_cumprod.to(device)  # it may have trained on another
        tiled = functools.partial(blend, z.shape[-2:], tile // factor, overlap // factor)
        for t in progress(self.scheduler.timesteps, "restoring"):
            noisy = self.scheduler.scale_model_input(z, t)

            def predict(rows: slice, columns: slice, noisy: Tensor = noisy, t: Tensor = t) -> Tensor:
                part = noisy[..., rows, columns]
                pixels = (slice(factor * side.start, factor * side.stop) for side in (rows, columns))
                x = model.encode(part.repeat(pairs, 1, 1, 1), t, semantic)  # (pairs * B, ...)
                maps = model.adaptor(part, t, control, y[(..., *pixels)])  # (B, ...), for both
                return model.fused(x, [m.repeat(pairs, 1, 1, 1) for m in maps], scale, semantic)

            predicted = tiled(predict)
            if guidance != 1:
                with_text, without = predicted.chunk(2)
                predicted = with_text + (guidance - 1) * (with_text - without)
            z = self.scheduler.step(predicted.to(z.dtype), t, z).prev_sample
        if output == "latent":
            return ImagePipelineOutput(z)
        decoded = tiled(lambda rows, columns: to_images(self.vae, z[..., rows, columns]), factor)
        restored = (decoded[..., :height, :width] / 2 + 0.5).float()
        if match_colours:
            restored = matched(restored, image.to(restored))
        return ImagePipelineOutput(restored if output == "pt" else [to_pil_image(x.cpu()) for x in restored])


def blend(
    size: Sequence[int], side: int, overlap: int, compute: Callable[[slice, slice], Tensor], factor: int = 1
) -> Tensor:
    """The results (..., h * factor, w * factor) of `compute` in square windows, with linear weights where they overlap.

    Args:
        size: (h, w), which the windows cover.
        side: of a window; 0, or as large as the map: one window.
        overlap: of neighbours; the last window ends at the border, so its overlap may be larger.
    """
    axes = []
    for length in size:
        own = min(side, length) or length
        axes.append([slice(start, start + own) for start in starts(length, own, max(1, own - overlap))])
    total, weights = torch.tensor(0.0), torch.tensor(0.0)
    for rows, columns in itertools.product(*axes):
        part = compute(rows, columns)
        if [len(axis) for axis in axes] == [1, 1]:
            return part
        if total.ndim == 0:
            total = part.new_zeros(*part.shape[:-2], *(length * factor for length in size))
            weights = part.new_zeros(total.shape[-2:])
        ramps = []
        for length in part.shape[-2:]:  # rising over the overlap from the border, then 1
            position = torch.arange(length) + 0.5
            rising = torch.minimum(position, length - position) / max(1, overlap * factor)
            ramps.append(rising.clamp(max=1).to(part))
        place = tuple(slice(factor * side.start, factor * side.stop) for side in (rows, columns))
        total[(..., *place)] += part * (ramp := ramps[0][:, None] * ramps[1])
        weights[place] += ramp
    return total / weights


def matched(restored: Tensor, degraded: Tensor) -> Tensor:
    """Images (B, 3, H, W) whose channels have the mean and standard deviation of the degraded ones, in [0, 1]."""
    (std, mean), (wanted, middle) = (torch.std_mean(x, dim=(-2, -1), keepdim=True) for x in (restored, degraded))
    return ((restored - mean) / std.clamp_min(1e-5) * wanted + middle).clamp(0, 1)


def save_adaptor(adaptor: Adaptor, folder: str | Path) -> Path:
    """Write a trained adaptor, without the frozen parts, into a folder, under a temporary name first; return it.

    An adaptor in that folder is replaced. Raises `BadParameter` when the folder holds anything else.
    """
    folder = Path(folder)
    if folder.exists() and not (folder / "diffusion_pytorch_model.safetensors").is_file():
        raise BadParameter("folder", str(folder), "a folder that does not exist yet, or that holds an adaptor")
    with atomic_folder(folder) as new:
        adaptor.save_pretrained(new)
    return folder


def load_adaptor(folder: str | Path, unet: UNet2DConditionModel) -> Adaptor:
    """The adaptor that `save_adaptor` wrote, or that of a saved pipeline, for a UNet.

    Raises:
        MissingWeights: the folder has none.
        CorruptFile: its file cannot be read.
        BadCheckpoint: it was made for another UNet.
    """
    folder = Path(folder)
    folder = folder / "adaptor" if (folder / "adaptor").is_dir() else folder
    if not (folder / "config.json").is_file():
        ways = ["name the folder that `save_adaptor` wrote", "train one: leave `checkpoint` empty"]
        raise MissingWeights("TIP's adaptor", folder, ways)
    try:
        adaptor = Adaptor.from_pretrained(folder, low_cpu_mem_usage=False, use_safetensors=True)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise CorruptFile(folder, f"not an adaptor of TIP ({type(error).__name__}: {str(error)[:200]})") from error
    ours, theirs = adaptor.config.controlnet, unet.config
    names = ("in_channels", "block_out_channels", "layers_per_block", "cross_attention_dim", "attention_head_dim")
    if other := [f"{n} {ours[n]}, not {theirs[n]}" for n in names if not np.array_equal(ours[n], theirs[n])]:
        raise BadCheckpoint("this UNet", shapes=other)
    return adaptor


def _each(name: str, text: str | Sequence[str], count: int) -> list[str]:
    """A list of one text per image."""
    texts = [text] * count if isinstance(text, str) else list(text)
    if len(texts) != count:
        raise BadParameter(name, text, f"a text, or a list of {count}, one per image")
    return texts


# --- from a size ------------------------------------------------------------------------------------------------------


def build(
    size: str = "sd15",
    *,
    fusion: str = "modulate",
    unet: Mapping[str, Any] = {},
    vae: Mapping[str, Any] = {},
    text: Mapping[str, Any] = {},
    conditioning_channels: Sequence[int] = (16, 32, 96, 256),
) -> TIPPipeline:
    """A pipeline of a size, with random weights (torch's current seed), offline.

    Args:
        size: one of `SIZES`, "sd15" and "sd21", substitutes for the paper's unknown model.
        fusion: of the `Adaptor`.
        unet, vae, text: entries of their configurations to change.
        conditioning_channels: widths of the image's network.

    Works on torch's meta device (`with torch.device("meta")`), to count parameters.
    """
    check_choice("size", size, SIZES)
    sizes = SIZES[size]
    net = UNet2DConditionModel(**{**sizes["unet"], **unet})
    encoder = CLIPTextModel(CLIPTextConfig(max_position_embeddings=77, vocab_size=49408, **{**sizes["text"], **text}))
    return TIPPipeline(
        AutoencoderKL(**{**_SD_VAE, **vae}),
        encoder,
        net,
        Adaptor.of(net, conditioning_channels, fusion=fusion),
        DDIMScheduler(**_SD_NOISE),
        clip_tokenizer(sizes["pad"]),
    )


# --- texts: one frozen encoder reads both prompts (inferred: the figure draws two boxes named CLIP) -------------------


def clip_tokenizer(pad: str = END) -> CLIPTokenizer:
    """CLIP's tokenizer from the merges that ship with open_clip: offline, with the ids of OpenAI's CLIP.

    Args:
        pad: the padding token: the end token (Stable Diffusion 1.5) or "!" (2.1).
    """
    simple = SimpleTokenizer()
    names = {"<start_of_text>": START, "<end_of_text>": END}
    vocabulary = {names.get(token, token): i for token, i in simple.encoder.items()}
    return CLIPTokenizer(
        vocab=vocabulary,
        merges=list(simple.bpe_ranks),
        unk_token=END,
        bos_token=START,
        eos_token=END,
        pad_token=pad,
        model_max_length=77,  # start and end included
    )


@typed
def tokenize(tokenizer, texts: Sequence[str], truncate: bool = False) -> Tensor:
    """Ids (B, M) of texts, by a tokenizer of transformers, or by an object with a method `ids`.

    Raises `BadParameter` for a text that is too long, unless `truncate`: a truncated caption is still a caption, but
    the end of a truncated instruction would be ignored without an error.
    """
    if hasattr(tokenizer, "ids"):
        return tokenizer.ids(texts, truncate)
    length = tokenizer.model_max_length
    for text, ids in zip(texts, tokenizer(list(texts))["input_ids"], strict=True):
        if len(ids) > length and not truncate:
            raise BadParameter("text", text, f"at most {length} tokens, it has {len(ids)}")
    options = {"padding": "max_length", "max_length": length, "truncation": True, "return_tensors": "pt"}
    return tokenizer(list(texts), **options)["input_ids"]

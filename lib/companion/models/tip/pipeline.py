"""TIP as a pipeline of diffusers: pictures and two texts in, restored pictures out; sizes, saving, loading.

    pipe = build("pocket", vocabulary)                   or TIPPipeline.from_stable_diffusion()
    pipe(image, "A zebra on grass", "Deblur with sigma 3.0; Denoise with sigma 0.08").images
    pipe.save_pretrained("tip"); TIPPipeline.from_pretrained("tip")

`tip` holds the model and its loss. Sampler, guidance and sizes are choices of ours (section 5.1); that the two texts go
to two parts, and the text of the blind mode, are the paper's (figure, project page).
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiffusionPipeline, UNet2DConditionModel
from diffusers.utils import BaseOutput
from diffusers.utils import logging as diffusers_logging
from diffusers.utils.torch_utils import randn_tensor
from huggingface_hub import constants
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms.v2.functional import to_pil_image
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer
from transformers.utils import logging as transformers_logging

from ...errors import BadCheckpoint, BadParameter, CorruptFile, MissingWeights
from ...ops.files import atomic_folder
from ...ops.progress import progress
from .model import TIP, Adaptor, Encoded, check_unet, pictures
from .text import END, WordText, clip_tokenizer, tokenize

ROUTES = ("decoupled", "swapped", "joined")
BLIND = "Remove all degradation"  # figure: the restoration prompt that names nothing

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
SIZES = {
    "sd15": {
        "unet": {"cross_attention_dim": 768, "attention_head_dim": 8},
        "vae": _SD_VAE,
        "text": {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12},
        "scheduler": _SD_NOISE,
        "hint": (16, 32, 96, 256),
        "pad": END,
    },
    "sd21": {
        "unet": {"cross_attention_dim": 1024, "attention_head_dim": (5, 10, 20, 20), "use_linear_projection": True},
        "vae": _SD_VAE,
        # 24 layers were trained, the last one is left out
        "text": {
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 23,
            "num_attention_heads": 16,
            "hidden_act": "gelu",
        },
        "scheduler": _SD_NOISE,
        "hint": (16, 32, 96, 256),
        "pad": "!",
    },
    # ours, section 3.6: what two CPU cores train in a minute
    "pocket": {
        "unet": {
            "in_channels": 4,
            "out_channels": 4,
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
            "block_out_channels": (32, 48),
            "layers_per_block": 1,
            "cross_attention_dim": 32,
            "attention_head_dim": 2,
            "norm_num_groups": 8,
        },
        "vae": {
            "block_out_channels": (16, 32, 32),
            "down_block_types": ("DownEncoderBlock2D",) * 3,
            "up_block_types": ("UpDecoderBlock2D",) * 3,
            "layers_per_block": 1,
            "latent_channels": 4,
            "norm_num_groups": 8,
        },
        "text": {"width": 32, "places": 32},
        # x0 prediction and a last step of pure noise learn faster at this size (section 14)
        "scheduler": {
            "beta_schedule": "scaled_linear",
            "beta_start": 0.00085,
            "beta_end": 0.012,
            "clip_sample": False,
            "prediction_type": "sample",
            "rescale_betas_zero_snr": True,
            "timestep_spacing": "trailing",
        },
        "hint": (16, 24, 32),
    },
}


# --- the pipeline -----------------------------------------------------------------------------------------------------


def routed(semantic: str, restoration: str, route: str = "decoupled") -> tuple[str, str]:
    """The texts that the UNet and the adaptor read.

    "decoupled": c_s and c_r (figure). Controls of ours: "swapped", the other way round; "joined": both read both, as a
    stock ControlNet pipeline with one prompt does.
    """
    if route not in ROUTES:
        raise BadParameter("route", route, ROUTES)
    both = "; ".join(text for text in (semantic, restoration) if text)
    return {"decoupled": (semantic, restoration), "swapped": (restoration, semantic), "joined": (both, both)}[route]


@dataclass
class Restored(BaseOutput):
    """What the pipeline gives: `images`, as asked for by `output`."""

    images: Tensor | list


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No bars of the libraries, and no warning about what diffusers passes and the hub's client no longer takes."""
    loud = [log for log in (diffusers_logging, transformers_logging) if log.is_progress_bar_enabled()]
    for log in loud:
        log.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The `local_dir_use_symlinks` argument")
            yield
    finally:
        for log in loud:
            log.enable_progress_bar()


class TIPPipeline(DiffusionPipeline):
    """Restores pictures. Saves and loads with `save_pretrained` and `from_pretrained`, safetensors only.

    Args:
        vae: `AutoencoderKL`.
        text_encoder: CLIP's of transformers, or a `WordText`.
        tokenizer: CLIP's; None with a `WordText`, which has its own.
        unet: `UNet2DConditionModel`, frozen.
        adaptor: the `Adaptor` of that UNet.
        scheduler: `DDIMScheduler`.
    """

    _optional_components = ["tokenizer"]  # noqa: RUF012 - a list is what diffusers looks for

    def __init__(self, vae, text_encoder, unet, adaptor, scheduler, tokenizer=None):
        super().__init__()
        check_unet(unet)
        self.register_modules(
            vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, unet=unet, adaptor=adaptor, scheduler=scheduler
        )
        factor = 2 ** (len(vae.config.block_out_channels) - 1)
        if factor != adaptor.factor:
            raise BadParameter(
                "adaptor", f"pictures reduced {adaptor.factor} times", f"{factor} times, as the VAE does"
            )
        for part in (vae, text_encoder, unet, adaptor):
            part.eval()
        for part in (vae, text_encoder, unet):
            part.requires_grad_(False)

    @classmethod
    def from_pretrained(cls, path, **options) -> TIPPipeline:
        """A pipeline that `save_pretrained` wrote; options as diffusers'. Safetensors only, nothing on the screen."""
        options = {"use_safetensors": True, "low_cpu_mem_usage": False, **options}
        with _quiet():
            return super().from_pretrained(path, **options)

    @classmethod
    def from_stable_diffusion(
        cls,
        name: str = "stable-diffusion-v1-5/stable-diffusion-v1-5",
        *,
        fusion: str = "modulate",
        mid: str | None = None,
        download: bool = False,
        **options: object,
    ) -> TIPPipeline:
        """The released parts of a Stable Diffusion 1.x or 2.x, and an adaptor that starts from its UNet.

        Args:
            name: id on the hub, or a folder in diffusers' layout.
            fusion, mid: of the adaptor.
            download: fetch what is not cached.
            options: to `from_pretrained` of every part, for instance `variant="fp16"`.

        Raises `MissingWeights` when it is neither cached nor to be had.
        """
        here = {"local_files_only": not download}
        given = {"use_safetensors": True, **here, **options}
        whole = {"low_cpu_mem_usage": False, **given}  # what accelerate would do, which nothing else here needs
        try:
            with _quiet():
                vae = AutoencoderKL.from_pretrained(name, subfolder="vae", **whole)
                unet = UNet2DConditionModel.from_pretrained(name, subfolder="unet", **whole)
                text = CLIPTextModel.from_pretrained(name, subfolder="text_encoder", **given)
                tokenizer = CLIPTokenizer.from_pretrained(name, subfolder="tokenizer", **here)
                scheduler = DDIMScheduler.from_pretrained(name, subfolder="scheduler", **here)
        except OSError as error:
            ways = [
                f"pass download=True (about 4 GB from {name}), or `hf download {name}`",
                "name a folder that holds it",
            ]
            raise MissingWeights(name, constants.HF_HUB_CACHE, ways) from error
        return cls(vae, text, unet, Adaptor.of(unet, fusion=fusion, mid=mid), scheduler, tokenizer)

    @property
    def model(self) -> TIP:
        """The network to train, with this pipeline's own parts; only the adaptor learns."""
        self.adaptor.requires_grad_(True)
        return TIP(self.unet, self.adaptor, self.text_encoder)

    @property
    def multiple(self) -> int:
        """Height and width that are no multiple of this are padded."""
        return self.adaptor.factor

    def ids(self, texts: Sequence[str], cut: bool = False) -> Tensor:
        """Ids (B, M) of texts, for `TIP`; see `tip_text.tokenize`."""
        return tokenize(self.text_encoder if self.tokenizer is None else self.tokenizer, texts, cut)

    @torch.no_grad()
    def states(self, texts: Sequence[str]) -> Tensor:
        """States (B, M, d) of texts; equal texts are encoded once."""
        unique = list(dict.fromkeys(texts))
        found = self.text_encoder(self.ids(unique).to(self.text_encoder.device))[0]
        return found[[unique.index(text) for text in texts]]

    @torch.no_grad()
    def __call__(
        self,
        image: Tensor,
        prompt: str | Sequence[str] = "",
        restoration: str | Sequence[str] = BLIND,
        *,
        steps: int = 50,
        scale: float = 1.0,
        guidance: float = 1.0,
        restoration_guidance: float = 1.0,
        negative: str = "",
        negative_restoration: str = BLIND,
        route: str = "decoupled",
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        output: str = "pt",
        trace: list[dict] | None = None,
    ) -> Restored:
        """Restore pictures, from pure noise, in `steps` steps of DDIM (ours; the paper's sampler is not known).

        Args:
            image: degraded, (B, 3, H, W) in [0, 1].
            prompt: c_s, what the clean picture shows; one text, or one a picture.
            restoration: c_r, what to undo. The defaults are the blind mode of the project's page.
            scale: the dial s on the adaptor; 0 is the frozen model, which does not see `image`.
            guidance: w of c_s: prediction(negative) + w (prediction(c_s) - prediction(negative)); 1 is off.
            restoration_guidance: the same of c_r, against `negative_restoration`. With both, the two differences add
                up. In any case the adaptor is called once a step, and so is each half of the UNet.
            negative, negative_restoration: the texts that guidance leads away from.
            route: see `routed`.
            generator: of the start noise; a list has one for each picture.
            latents: the start noise (B, L, h, w), to hold it fixed; (1, L, h, w) is the same for all pictures.
            output: "pt", (B, 3, H, W) in [0, 1]; "pil", a list of pictures; or "latent".
            trace: a list that gets a row for each step and site: {"step", "t", "site", "gamma", "beta"}, the mean
                magnitudes of the maps, gamma None where it is added.

        Raises `BadParameter`.
        """
        if not isinstance(image, Tensor) or image.ndim != 4 or image.shape[1] != 3 or not image.is_floating_point():
            raise BadParameter("image", getattr(image, "shape", type(image)), "a float tensor (B, 3, H, W) in [0, 1]")
        if image.numel() == 0 or not (image.amin() >= 0 and image.amax() <= 1):
            raise BadParameter("image", "values outside [0, 1]", "a float tensor (B, 3, H, W) in [0, 1]")
        if steps < 1 or steps > self.scheduler.config.num_train_timesteps:
            raise BadParameter("steps", steps, f"1 to {self.scheduler.config.num_train_timesteps}")
        if output not in ("pt", "pil", "latent"):
            raise BadParameter("output", output, ("pt", "pil", "latent"))
        model, device, count = TIP(self.unet, self.adaptor), self.unet.device, len(image)
        height, width = image.shape[-2:]
        y = F.pad(image, (0, -width % self.multiple, 0, -height % self.multiple), mode="replicate")
        y = (2 * y - 1).to(device, self.adaptor.dtype)

        pairs = zip(_each("prompt", prompt, count), _each("restoration", restoration, count), strict=True)
        texts = [routed(s, r, route) for s, r in pairs]
        semantic, control, y_all = [s for s, _ in texts], [r for _, r in texts], y
        if guidance != 1:
            semantic = semantic + [negative] * count
        if restoration_guidance != 1:
            control, y_all = control + [negative_restoration] * count, torch.cat([y, y])
        semantic, control = self.states(semantic), self.states(control).to(self.adaptor.dtype)

        size = (count, self.unet.config.in_channels, y.shape[-2] // self.multiple, y.shape[-1] // self.multiple)
        if latents is None:
            z = randn_tensor(size, generator=generator, device=device, dtype=self.adaptor.dtype)
        elif tuple(latents.shape[1:]) != size[1:] or len(latents) not in (1, count):
            raise BadParameter("latents", tuple(latents.shape), f"{size}, or one for all pictures")
        else:
            z = latents.to(device, self.adaptor.dtype).expand(size)
        z = z * self.scheduler.init_noise_sigma
        self.scheduler.set_timesteps(steps, device=device)
        for step, t in enumerate(progress(self.scheduler.timesteps, "restoring")):
            seen = self.scheduler.scale_model_input(z, t)
            x = model.encode(_repeat(seen, len(semantic)), t, semantic)
            maps = model.adaptor(_repeat(seen, len(control)), t, control, y_all)
            if trace is not None:
                trace += _magnitudes(maps, x, step, int(t), count)
            found = _guided(model, x, maps, semantic, scale, count, guidance, restoration_guidance)
            z = self.scheduler.step(found.to(z.dtype), t, z).prev_sample
        if output == "latent":
            return Restored(z)
        restored = (pictures(self.vae, z)[..., :height, :width] / 2 + 0.5).float()
        if output == "pt":
            return Restored(restored)
        return Restored([to_pil_image(picture.cpu()) for picture in restored])


def save_adaptor(adaptor: Adaptor, folder: str | Path) -> Path:
    """Write a trained adaptor, and nothing of what is frozen, into a folder; under a temporary name first.

    An adaptor that stands there is replaced. Raises `BadParameter` where something else does.
    """
    folder = Path(folder)
    if folder.exists() and not (folder / "diffusion_pytorch_model.safetensors").is_file():
        raise BadParameter("folder", str(folder), "a folder that is not there yet, or that holds an adaptor")
    with atomic_folder(folder) as new:
        adaptor.save_pretrained(new)
    return folder


def load_adaptor(folder: str | Path, unet: UNet2DConditionModel) -> Adaptor:
    """The adaptor that `save_adaptor` wrote, or that stands below a saved pipeline, for a UNet.

    Raises:
        MissingWeights: there is none in the folder.
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
    other = [f"{n} {ours[n]}, the UNet has {theirs[n]}" for n in names if _plain(ours[n]) != _plain(theirs[n])]
    if other:
        raise BadCheckpoint("this UNet", shapes=other)
    return adaptor


def _plain(value: object) -> object:
    """A configuration's value as its JSON has it."""
    return list(value) if isinstance(value, (list, tuple)) else value


def _each(name: str, text: str | Sequence[str], count: int) -> list[str]:
    """One text a picture."""
    texts = [text] * count if isinstance(text, str) else list(text)
    if len(texts) != count or not all(isinstance(t, str) for t in texts):
        raise BadParameter(name, text, f"a text, or a list of {count}, one a picture")
    return texts


def _repeat(z: Tensor, count: int) -> Tensor:
    return z.repeat(count // len(z), 1, 1, 1)


def _guided(
    model: TIP,
    x: Encoded,
    maps: Sequence[Tensor | None],
    semantic: Tensor,
    scale: float,
    count: int,
    guidance: float,
    restoration_guidance: float,
) -> Tensor:
    """The prediction, led away from the negative texts; the decoder runs once on all pairs of texts that it takes."""
    first = torch.arange(count, device=semantic.device)
    from_unet, from_adaptor = [first], [first]
    if guidance != 1:
        from_unet, from_adaptor = [*from_unet, first + count], [*from_adaptor, first]
    if restoration_guidance != 1:
        from_unet, from_adaptor = [*from_unet, first], [*from_adaptor, first + count]
    u, a = torch.cat(from_unet), torch.cat(from_adaptor)
    # the time embedding is the same in all rows
    taken = Encoded(x.time[:1].expand(len(u), -1), tuple(f[u] for f in x.skips), x.mid[u])
    found = model.fused(taken, [None if m is None else m[a] for m in maps], scale, semantic[u])
    found, *others = found.chunk(len(from_unet))
    weights = [w for w in (guidance, restoration_guidance) if w != 1]
    return found + sum((w - 1) * (found - other) for w, other in zip(weights, others, strict=True))


def _magnitudes(maps: Sequence[Tensor | None], x: Encoded, step: int, t: int, count: int) -> list[dict]:
    rows = []
    for site, (m, f) in enumerate(zip(maps, (*x.skips, x.mid), strict=True)):
        if m is not None:
            *gamma, beta = m[:count].abs().split(f.shape[1], 1)
            mean = float(gamma[0].mean()) if gamma else None
            rows.append({"step": step, "t": t, "site": site, "gamma": mean, "beta": float(beta.mean())})
    return rows


# --- from a size ------------------------------------------------------------------------------------------------------


def build(
    size: str = "sd15",
    vocabulary: Sequence[str] = (),
    *,
    fusion: str = "modulate",
    mid: str | None = None,
    prediction: str | None = None,
    unet: dict | None = None,
    vae: dict | None = None,
    text: dict | None = None,
    hint: Sequence[int] | None = None,
    unshuffle: int = 1,
    hint_zero: bool = True,
) -> TIPPipeline:
    """A pipeline of a size, with random weights (torch's current seed), offline.

    Args:
        size: one of `SIZES`: "sd15" and "sd21", the stand-ins for the paper's unknown model; "pocket".
        vocabulary: the words that the pocket text encoder knows.
        fusion, mid, unshuffle, hint_zero: of the `Adaptor`.
        prediction: "epsilon", "sample" or "v_prediction"; None: the size's own.
        unet, vae, text: entries of their configurations to change.
        hint: widths of the picture's network; None: the size's own.

    On torch's meta device (`with torch.device("meta")`) it costs nothing, and its parameters can be counted.
    """
    if size not in SIZES:
        raise BadParameter("size", size, tuple(SIZES))
    sizes = SIZES[size]
    net = UNet2DConditionModel(**{**sizes["unet"], **(unet or {})})
    words = {**sizes["text"], **(text or {})}
    if size == "pocket":
        encoder, tokenizer = WordText(list(vocabulary), **words), None
    else:
        encoder = CLIPTextModel(CLIPTextConfig(max_position_embeddings=77, vocab_size=49408, **words))
        tokenizer = clip_tokenizer(sizes["pad"])
    changes = {} if prediction is None else {"prediction_type": prediction}
    return TIPPipeline(
        AutoencoderKL(**{**sizes["vae"], **(vae or {})}),
        encoder,
        net,
        Adaptor.of(
            net,
            sizes["hint"] if hint is None else hint,
            fusion=fusion,
            mid=mid,
            unshuffle=unshuffle,
            hint_zero=hint_zero,
        ),
        DDIMScheduler(**{**sizes["scheduler"], **changes}),
        tokenizer,
    )

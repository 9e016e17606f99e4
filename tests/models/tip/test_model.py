"""TIP: its two halves equal the UNet, it starts as the frozen model, and its two prompts are separate.

No code of the authors exists; the reference is diffusers itself.
"""

import functools
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

pytest.importorskip("diffusers")

import open_clip
from diffusers import UNet2DConditionModel

import companion
from companion.errors import BadParameter, CorruptFile, MissingWeights
from companion.models.tip import TIPPipeline, build, clip_tokenizer, tokenize
from companion.models.tip import model as tip
from companion.models.tip.pipeline import BLIND, blend
from tests.models.common import assert_recomputed_gradients_are_equal, refuses
from tests.papers.tip import small_pipe

ROWS, DEBLUR = "a picture with rows", "Deblur with sigma 0.9"


def shaken(pipe: TIPPipeline) -> TIPPipeline:
    """With an adaptor that is no longer at its start."""
    torch.manual_seed(1)
    with torch.no_grad():
        for p in pipe.adaptor.parameters():
            p.add_(torch.randn_like(p) * 0.05)
    return pipe


def batch(pipe: TIPPipeline) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """z_t, t, states of c_s and c_r, the degraded image."""
    torch.manual_seed(2)
    states = pipe.states([ROWS] * 2), pipe.states([DEBLUR] * 2)
    return torch.randn(2, 4, 8, 8), torch.randint(1000, (2,)), *states, torch.rand(2, 3, 32, 32) * 2 - 1


NARROW = {"block_out_channels": (8, 16, 32, 32), "cross_attention_dim": 16, "norm_num_groups": 4}
LEVELS = {  # as Stable Diffusion 1 and 2 are built, narrow
    "sd15": NARROW | {"attention_head_dim": 4},
    "sd21": NARROW | {"attention_head_dim": (1, 2, 4, 4), "use_linear_projection": True},
}


def save_narrow(folder: Path) -> TIPPipeline:
    """A narrow Stable Diffusion 1.5, whose parts are saved in the hub's layout."""
    torch.manual_seed(0)
    vae = {"block_out_channels": (8, 8, 8, 8), "norm_num_groups": 4, "layers_per_block": 1}
    text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    made = build("sd15", unet=LEVELS["sd15"], vae=vae, text=text)
    for name in ("vae", "unet", "text_encoder", "tokenizer", "scheduler"):
        getattr(made, name).save_pretrained(folder / name)
    return made


# --- the model --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "size"), [("sd15", (9, 7)), ("sd21", (8, 24))])
@torch.no_grad()
def test_halves_are_the_unet(name: str, size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    unet = UNet2DConditionModel(**LEVELS[name]).eval()
    z, t, states = torch.randn(2, 4, *size), torch.tensor([10, 900]), torch.randn(2, 5, unet.config.cross_attention_dim)
    assert torch.equal(tip.decode(unet, tip.encode(unet, z, t, states), states), unet(z, t, states).sample)


@pytest.mark.parametrize("options", [{}, {"fusion": "add"}])
@torch.no_grad()
def test_starts_as_the_frozen_unet_and_is_it_at_scale_zero(options: dict) -> None:
    pipe = small_pipe(**options)
    z, t, semantic, restoration, y = batch(pipe)
    plain = pipe.unet(z, t, semantic).sample
    assert torch.equal(pipe.model(z, t, semantic, restoration, y), plain)
    shaken(pipe)
    assert torch.equal(pipe.model(z, t, semantic, restoration, y, scale=0.0), plain)
    assert not torch.allclose(pipe.model(z, t, semantic, restoration, y), plain, atol=1e-3)


def test_checkpointed_gradients_are_the_same() -> None:
    inputs = batch(small_pipe())
    assert_recomputed_gradients_are_equal(lambda: shaken(small_pipe()).model, lambda m: m(*inputs).square().mean())


# --- the pipeline -----------------------------------------------------------------------------------------------------


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def image() -> Tensor:
    return torch.rand(2, 3, 32, 32, generator=seeded())


def predictions(pipe: TIPPipeline, image: Tensor, **options) -> Tensor:
    """Latents after one step, for one start noise."""
    start = torch.randn(1, 4, 8, 8, generator=seeded(5))
    return pipe(image, steps=1, latents=start, output="latent", **options).images


def test_guidance_with_one_call_of_the_adaptor(image: Tensor) -> None:
    """The start noise being all there is at the first step, a step of x0 prediction is the prediction itself."""
    pipe, calls = shaken(small_pipe()), []
    plain, empty = (predictions(pipe, image, prompt=prompt, restoration=DEBLUR) for prompt in (ROWS, ""))
    pipe.adaptor.register_forward_hook(lambda _, given, found: calls.append(len(given[0])))
    guided = predictions(pipe, image, prompt=ROWS, restoration=DEBLUR, guidance=3.0)
    torch.testing.assert_close(guided, plain + 2 * (plain - empty), atol=1e-4, rtol=1e-4)
    assert calls == [2] and (plain - empty).abs().max() > 0.01


def test_an_image_in_a_batch_is_the_image_alone(image: Tensor) -> None:
    pipe = shaken(small_pipe())
    texts = {"prompt": [ROWS, ""], "restoration": [BLIND, DEBLUR]}
    together = pipe(image, **texts, steps=3, generator=[seeded(0), seeded(1)]).images
    alone = pipe(image[1:], "", DEBLUR, steps=3, generator=[seeded(1)]).images
    torch.testing.assert_close(together[1:], alone, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("size", [(30, 27), (36, 20)])
def test_images_of_any_size_keep_it(size: tuple[int, int]) -> None:
    found = small_pipe()(torch.rand(1, 3, *size), steps=2).images
    assert found.shape == (1, 3, *size) and found.amin() >= 0 and found.amax() <= 1
    assert small_pipe()(torch.rand(1, 3, *size), steps=1, output="pil").images[0].size == size[::-1]


def test_windows_cover_a_map_and_a_local_operation_is_that_of_the_whole_map() -> None:
    x = torch.randn(2, 3, 13, 30, generator=seeded())
    for side, overlap in ((6, 3), (13, 4), (5, 0), (0, 0), (99, 8)):
        torch.testing.assert_close(blend((13, 30), side, overlap, lambda rows, columns: x[..., rows, columns]), x)
        larger = blend(
            (13, 30), side, overlap, lambda rows, columns: F.interpolate(x[..., rows, columns], scale_factor=2), 2
        )
        torch.testing.assert_close(larger, F.interpolate(x, scale_factor=2))


def test_windows_that_disagree_leave_no_seam() -> None:
    """Neighbours that predict 0 and 1: over 8 shared positions the result rises in steps of an eighth, not of 1."""
    values: dict[int, int] = {}

    def compute(rows: slice, columns: slice) -> Tensor:
        value = values.setdefault(columns.start, len(values) % 2)
        return torch.full((1, 1, rows.stop - rows.start, columns.stop - columns.start), float(value))

    found = blend((16, 48), 16, 8, compute)
    assert len(values) == 5 and found.amax() > 0.9
    assert (found[..., 1:] - found[..., :-1]).abs().amax() < 1 / 8 + 1e-6


def test_a_tile_that_holds_the_image_is_the_whole_and_smaller_ones_keep_its_size(image: Tensor) -> None:
    pipe = shaken(small_pipe())
    options = {"prompt": ROWS, "restoration": DEBLUR, "steps": 2}
    whole = pipe(image, **options, generator=seeded(3)).images
    assert torch.equal(pipe(image, **options, generator=seeded(3), tile=64, overlap=32).images, whole)
    wide = F.interpolate(image, (32, 90), mode="bicubic").clamp(0, 1)
    tiled = pipe(wide, **options, generator=seeded(3), tile=32, overlap=16).images
    assert tiled.shape == wide.shape and tiled.isfinite().all()
    with pytest.raises(BadParameter, match="tile"):
        pipe(image, tile=30)


def test_colours_are_those_of_the_input_when_asked(image: Tensor) -> None:
    degraded = 0.3 + 0.2 * image
    restored = small_pipe()(degraded, steps=2, match_colours=True).images
    torch.testing.assert_close(restored.mean((-2, -1)), degraded.mean((-2, -1)), atol=0.02, rtol=0)
    plain = small_pipe()(degraded, steps=2).images
    assert (plain.mean((-2, -1)) - degraded.mean((-2, -1))).abs().max() > 0.05


@pytest.mark.parametrize("options", [{}, {"fusion": "add"}])
def test_saved_and_loaded_without_pickles(tmp_path: Path, image: Tensor, options: dict) -> None:
    pipe = shaken(small_pipe(**options))
    pipe.save_pretrained(tmp_path)
    loaded = TIPPipeline.from_pretrained(tmp_path)
    torch.testing.assert_close(predictions(loaded, image), predictions(pipe, image), atol=1e-5, rtol=1e-5)
    file = tmp_path / "unet" / "diffusion_pytorch_model.safetensors"
    torch.save(pipe.unet.state_dict(), file.with_suffix(".bin"))
    file.unlink()
    with pytest.raises(OSError, match="safetensors"):
        TIPPipeline.from_pretrained(tmp_path)


def test_a_folder_that_names_or_holds_code_is_refused(tmp_path: Path) -> None:
    folder = companion.save(small_pipe(), tmp_path / "tip")
    index, text, vae = (folder / name for name in ("model_index.json", "text_encoder/config.json", "vae/evil.py"))
    parts, settings = json.loads(index.read_text()), json.loads(text.read_text())
    forged = [
        *(
            (index, parts | {"vae": part})
            for part in (["evil", "Evil"], ["os", "system"], ["transformers", "AutoModel"])
        ),
        (index, parts | {"_class_name": "StableDiffusionPipeline"}),
        *((text, settings | {key: "evil/kernel"}) for key in ("attn_implementation", "auto_map")),
        (vae, "open('touched', 'w')"),
    ]
    for path, content in forged:
        before = path.read_text() if path.exists() else None
        path.write_text(json.dumps(content))
        for load in (companion.load, TIPPipeline.from_pretrained):
            with pytest.raises(CorruptFile, match=path.name):
                load(folder)
        path.write_text(before) if before else path.unlink()
    assert isinstance(companion.load(folder), TIPPipeline)


def test_from_the_layout_of_stable_diffusion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = save_narrow(tmp_path)
    pipe = TIPPipeline.from_stable_diffusion(str(tmp_path))
    assert pipe.adaptor.factor == 8 and pipe.scheduler.config.prediction_type == "epsilon"
    copied, unet = pipe.adaptor.branch.state_dict(), made.unet.state_dict()
    assert all(torch.equal(t, unet[n]) for n, t in pipe.unet.state_dict().items())
    shared = [n for n in copied if n in unet]
    assert {n.split(".")[0] for n in shared} == {"conv_in", "time_embedding", "down_blocks", "mid_block"}
    assert all(torch.equal(copied[n], unet[n]) for n in shared)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("diffusers.configuration_utils.HF_HUB_CACHE", str(tmp_path), raising=False)
    missing = functools.partial(TIPPipeline.from_stable_diffusion, download=False)
    cases = ((lambda: missing(str(tmp_path / "nowhere")), "nowhere"), (missing, "stable-diffusion-v1-5"))
    refuses(*cases, error=MissingWeights)


def test_what_would_silently_restore_something_else_is_refused() -> None:
    image, call = torch.rand(1, 3, 32, 32), small_pipe()
    other = UNet2DConditionModel(**LEVELS["sd15"], num_class_embeds=3)
    refuses(
        (lambda: build("sd3"), "size"),
        (lambda: small_pipe(fusion="modulated"), "fusion"),
        (lambda: call(image * 0 + 1.5), "0, 1"),
        (lambda: call(image.byte()), "float"),
        (lambda: call(image, ["a", "b"]), "1"),
        (lambda: call(image, "a " * 80), "77"),
        (lambda: tokenize(clip_tokenizer(), ["zebra " * 80]), "77"),
        (lambda: small_pipe(conditioning_channels=(16, 24)), "4"),
        (lambda: tip.TIP(other, call.adaptor), "num_class_embeds"),
    )


# --- text encoders ----------------------------------------------------------------------------------------------------


def test_clip_tokenizer_is_open_clips() -> None:
    texts = ["", BLIND, "Deblur with sigma 3.0; Denoise with sigma 0.08", "Two hands holding and dialing a phone."]
    expected = open_clip.get_tokenizer("ViT-L-14")(texts)
    words = expected != 0
    for pad, at in (("!", 0), ("<|endoftext|>", 49407)):
        assert torch.equal(tokenize(clip_tokenizer(pad), texts), expected.where(words, at))

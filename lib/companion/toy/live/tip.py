"""TIP: what the notebook trains live, the test images that its figures restore, and the scores of its tables."""

from __future__ import annotations

import functools
import hashlib
import io
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ipywidgets
import matplotlib.pyplot as plt
import pandas as pd
import torch
from IPython.display import Markdown, display
from PIL import Image, ImageOps
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as F

from ...errors import BadParameter
from ...evaluation.metrics.restoration import psnr, ssim
from ...evaluation.tables import published_table
from ...models.tip import model as tip
from ...models.tip import recipe
from ...models.tip.degradations import BLIND, Op, Sample, degrade, prompt
from ...models.tip.pipeline import TIPPipeline
from ...models.tip.recipe import Setting
from ...training.fit import History
from ...viz import plots, widgets
from ..ablations import study_root
from ..ablations import tip as study
from ..datasets import restoration as pocket

METHODS = ("TIP", "plain ControlNet")
SCORES = ("PSNR input", "PSNR", "SSIM", "texture", "contrast off", "loss gain")  # of the study, in the notebook's table


def setting(p: SimpleNamespace, out: Path, learning_rates: Mapping[tuple[str, str], float]) -> Setting:
    """The setting of the notebook's parameters: the study's synthetic images and trainings, or `recipe.setting`.

    The test is the study's "parameterised" one. Size, sampling steps, base model and dataset are fixed.
    """
    if p.profile != "pocket":
        return recipe.setting(p, out)
    root = str(out / "data")
    pocket.write(study_root(root, p.seed), p.seed)
    images, chosen = study.part(root, p.seed, "train"), {m: learning_rates["parameterised", m] for m in METHODS}

    def train(pipe: TIPPipeline, method: str) -> History:
        return study.train_model(pipe, study.samples(method, images, p.seed), chosen[method], p.seed, method)

    return Setting(
        title="synthetic images",
        learning_rates=chosen,
        build=functools.partial(study.build, seed=p.seed),
        train=train,
        test=study.tested(root, p.seed, "test", "parameterised")[0],
        restore=functools.partial(study.restore, seed=p.seed, guidance=p.guidance, scale=p.scale),
    )


def train(found: Setting, task: str) -> tuple[dict[str, TIPPipeline], dict[str, History], tuple[bool | None, str]]:
    """The pipeline and the history of each method, and whether the frozen modules are still the same.

    The last is what `Run.claim` takes: the SHA-256 of every tensor of UNet, VAE and text encoder before and after, and
    their gradients. Without a training (`task` is not "train") there are no histories, and it is None.
    """
    pipes, histories, changed, gradients = {}, {}, [], 0
    for name in found.learning_rates:
        pipe = pipes[name] = found.build(name)
        if found.train is None or task != "train":
            continue
        modules = (pipe.unet, pipe.vae, pipe.text_encoder)
        before = _hashes(modules)
        histories[name] = found.train(pipe, name)
        changed += [a != b for a, b in zip(before, _hashes(modules), strict=True)]
        gradients += sum(q.grad is not None or q.requires_grad for m in modules for q in m.parameters())
    if not histories:
        return pipes, histories, (None, "nothing was trained")
    text = (
        f"{sum(changed)} of {len(changed)} tensors of UNet, VAE and text encoder have another SHA-256 after "
        f"{len(histories[name])} steps, {gradients} have a gradient"
    )
    return pipes, histories, (not any(changed) and not gradients, text)


def _hashes(modules: Sequence[nn.Module]) -> list[bytes]:
    tensors = (t.detach().cpu().contiguous().flatten() for m in modules for t in m.state_dict().values())
    return [hashlib.sha256(t.view(torch.uint8).numpy()).digest() for t in tensors]


@dataclass(frozen=True)
class Examples:
    """The test images of the figures, the prompts that they vary, and how restored images are scored.

    Attributes:
        samples: images with their true prompts.
        kinds: the prompts that are compared, of `degradations.texts`.
        semantic, restoration: the prompts of a grid of all combinations.
        walked: blurred and noisy images.
        denoise, deblur: restoration prompts with one number that grows.
        scores: (restored images, their samples) to mean scores.
    """

    samples: list[Sample]
    kinds: list[str]
    semantic: list[str]
    restoration: list[str]
    walked: list[Sample]
    denoise: list[str]
    deblur: list[str]
    scores: Callable[[Tensor, Sequence[Sample]], dict[str, float]]


def examples(p: SimpleNamespace, out: Path, found: Setting) -> Examples:
    """The examples of a setting: strongly degraded synthetic images, or the first test images of a real dataset.

    The numbers of the real ones' prompts are those of the project page's figure.
    """
    if p.profile == "pocket":
        root, small, numbers = str(out / "data"), Op("resize", 4.0), pocket.RECIPE
        samples, _ = study.tested(root, p.seed, "test", "heavy")
        scenes = study.part(root, p.seed, "test").scenes(0.7)
        clean = list(zip(scenes.images, scenes.captions, strict=True))[:48]
        walked = _walk(clean, (Op("blur", 0.9), Op("noise", 0.10)), numbers.noise, numbers.blur, pocket.EDGE)
        kinds = ["no text", "restoration only", "own", "wrong semantic prompt"]
        captions = ["", *map(pocket.caption, pocket.KINDS)]
        prompts = [BLIND, prompt([small]), *(prompt([small, Op("noise", value)]) for value in numbers.noise)]
        return Examples(samples, kinds, captions, prompts, *walked, _toy)
    samples = [found.test[i] for i in range(min(2 if p.dry_run else 8, len(found.test)))]
    published = published_table("tip", "fig-prompt-walk").set_index("method")
    noise, blur = (list(published.loc[f"{verb} with sigma"]) for verb in ("Denoise", "Deblur"))
    own = p.texts if p.texts != "own" else recipe.texts_of(p.method)
    kinds = [*dict.fromkeys(["no text", "restoration only", own])]
    captions = [*dict.fromkeys(["", *(s.semantic for s in samples)])][:3]
    prompts = [*dict.fromkeys([BLIND, *(s.restoration for s in samples)])][:3]
    clean = [(s.clean, s.semantic) for s in samples]
    walked = _walk(clean, (Op("blur", 3.0), Op("noise", 0.12)), noise, blur, "replicate")
    return Examples(samples, kinds, captions, prompts, *walked, _scores)


def _walk(
    images: Sequence[tuple[Tensor, str]],
    damage: tuple[Op, ...],
    noise: Sequence[float],
    blur: Sequence[float],
    edge: str,
) -> tuple[list[Sample], list[str], list[str]]:
    """Images with one damage, and the prompts that name one degradation with each of its values."""
    samples = [
        Sample(x, degrade(x, damage, i, edge=edge), caption, prompt(damage), damage)
        for i, (x, caption) in enumerate(images)
    ]
    return samples, [prompt([Op("noise", value)]) for value in noise], [prompt([Op("blur", value)]) for value in blur]


def _scores(images: Tensor, samples: Sequence[Sample]) -> dict[str, float]:
    clean = torch.stack([s.clean for s in samples])
    found = float(psnr(images, clean).mean()), 100 * float(ssim(images, clean).mean())
    return dict(zip(("PSNR (dB)", "SSIM (%)"), found, strict=True))


def _toy(images: Tensor, samples: Sequence[Sample]) -> dict[str, float]:
    """Also what can be read off synthetic images: their texture, its contrast, noise, and whose layout they have."""
    kinds = tuple(pocket.KINDS[pocket.CAPTIONS.index(s.semantic)] for s in samples)
    right = sum(a == b for a, b in zip(pocket.seen_kind(images), kinds, strict=True)) / len(kinds)
    return _scores(images, samples) | {
        "texture (%)": 100 * right,
        "contrast (%)": 100 * float(pocket.seen_contrast(images, kinds).mean()),
        "noise (%)": 100 * float((images[..., 4:] - images[..., :-4]).abs().mean()),  # the textures' period is 4
        "layout lead (dB)": study.layout_lead(images, torch.stack([s.clean for s in samples])),
    }


def scores(p: SimpleNamespace, out: Path, found: Setting, pipes: Mapping[str, TIPPipeline]) -> pd.DataFrame:
    """Test scores of the trained pipelines, a row for each task and kind of prompts.

    At the `paper` profile of the whole test split, which are also added to the results in `out`.
    """
    if p.profile == "pocket":
        rows = []
        for task, methods in study.TASKS.items():
            kinds = ["own", "no text", *(kind for kind in study.MISLED if kind in methods)]
            for name, kind in (*((METHODS[0], kind) for kind in kinds), (METHODS[1], "own")):
                row = study.score(pipes[name], task, kind, str(out / "data"), p.seed, "test")
                rows.append({"images": task, "method": name, "prompts": kind} | {name: row[name] for name in SCORES})
        return pd.DataFrame(rows)
    ((name, pipe),) = pipes.items()
    kind = p.texts if p.texts != "own" else recipe.texts_of(p.method)
    values, reasons = recipe.score(recipe.whole_test(found, pipe, kind))
    if not p.dry_run:
        recipe.results(p, out, values)
    return pd.DataFrame([{"images": found.title, "method": name, "prompts": kind} | values | reasons])


def reasons(rows: pd.DataFrame) -> dict[str, str]:
    """Why a claim of the study may fail, by its id, as its rows show it."""
    tested = rows[rows.stage == "test"].set_index(["task", "method", "seed"]).sort_index()
    numbers = [f"contrast at {number:.1f}" for number in pocket.WALK[2]]
    walk = tested.loc[("mild", "TIP"), numbers]
    rises = (walk.diff(axis=1).iloc[:, 1:] > 0).to_numpy()
    spans = (walk.iloc[:, -1] - walk.iloc[:, 0]).mean()

    def lead(metric: str) -> pd.Series:
        ours, theirs = (tested.xs(method, level="method")[metric] for method in METHODS)
        return ours - theirs

    loss, score = lead("loss gain"), lead("PSNR")
    wrong = tested.loc[("mild", "blind prompt"), "PSNR"] - tested.loc[("mild", "wrong restoration prompt"), "PSNR"]
    off = [tested.loc[("mild", name), "contrast off"] for name in ("blind prompt", "wrong restoration prompt")]
    return {
        "blind-over-wrong": (
            f"with {(wrong <= 0).sum()} of {len(wrong)} seeds the blind prompt is as far from the true contrast: "
            f"{', '.join(f'{a:.1f} and {b:.1f}' for a, b in zip(*(x[wrong <= 0] for x in off), strict=True))} points"
        ),
        "walk": (
            f"the number has a small effect: from {pocket.WALK[2][0]} to {pocket.WALK[2][-1]} the contrast rises by "
            f"{spans:.1f} points on average, and {rises.sum()} of {rises.size} single steps are rises"
        ),
        "modulation": (
            f"the two are close: over tasks and seeds modulation leads in the denoising loss {(loss > 0).sum()} of "
            f"{len(loss)} times, by {loss.mean():+.1f} points, and in PSNR {(score > 0).sum()} of {len(score)} times, "
            f"by {score.mean():+.2f} dB"
        ),
    }


def explorer(pipe: TIPPipeline, found: Setting, shown: Examples) -> Any:
    """An image restored by a choice of both prompts and of the scale; see `widgets.live`."""
    sample = next(s for s in shown.samples if s.semantic == shown.semantic[-1])

    def three(semantic: str, restoration: str, scale: float) -> Tensor:
        given = sample._replace(semantic="" if semantic == "(empty)" else semantic, restoration=restoration)
        gap = torch.ones(3, sample.clean.shape[-1], max(2, sample.clean.shape[-1] // 32))
        restored = found.restore(pipe, [given], scale=scale)[0]
        wide = torch.cat([sample.degraded, gap, restored, gap, sample.clean], -1).permute(1, 2, 0)
        return wide.repeat_interleave(8, 0).repeat_interleave(8, 1) if len(wide) < 64 else wide

    semantic = [text or "(empty)" for text in reversed(shown.semantic)]
    restoration = list(dict.fromkeys([sample.restoration, BLIND, *shown.deblur[:1]]))
    return widgets.live(
        three, "input, restored, clean", semantic=semantic, restoration=restoration, scale=[1.0, 0.5, 0.0]
    )


def gradient_order(pipe: TIPPipeline, batch: tuple[Tensor, ...], steps: int = 3) -> pd.DataFrame:
    """How many tensors of each part of a new adaptor have a gradient that is not zero, at each of its first steps.

    The last convolution of the image's embedding is set to zero first, as ControlNet's is.
    """
    branch, rows = pipe.adaptor.branch, []
    for parameter in branch.controlnet_cond_embedding.conv_out.parameters():
        nn.init.zeros_(parameter)
    optimiser = torch.optim.AdamW(branch.parameters(), 1e-3)
    parts = {
        "fusion": lambda name: "controlnet_down" in name or "controlnet_mid" in name,
        "copied blocks": lambda name: "controlnet" not in name,
        "keys of the prompt": lambda name: "attn2.to_k" in name,
        "image embedding, last layer": lambda name: "cond_embedding.conv_out" in name,
        "image embedding, first layer": lambda name: "cond_embedding.conv_in" in name,
    }
    for step in range(steps):
        tip.loss(pipe.model, batch, pipe.scheduler).backward()
        reached = [name for name, q in branch.named_parameters() if q.grad is not None and q.grad.any()]
        rows.append({"step": step + 1} | {part: sum(map(belongs, reached)) for part, belongs in parts.items()})
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
    return pd.DataFrame(rows)


def upload_box(pipe: TIPPipeline, found: Setting, side: int = 64) -> ipywidgets.VBox | Markdown:
    """In JupyterLab: an image file is restored by the prompts and the scale typed next to it; elsewhere a sentence.

    Args:
        side: the image's central square is resized to this.
    """
    if "JPY_SESSION_NAME" not in os.environ:
        return Markdown("In JupyterLab this cell shows a box for an image file, two prompts and a slider.")
    once: dict[str, Any] = {"continuous_update": False}  # not at every letter
    controls = {
        "upload": ipywidgets.FileUpload(accept="image/*", multiple=False),
        "semantic": ipywidgets.Text(description="semantic", **once),
        "restoration": ipywidgets.Text(BLIND, description="restoration", **once),
        "scale": ipywidgets.FloatSlider(1.0, min=0.0, max=1.5, description="scale", **once),
    }

    def show(upload: Sequence[Any], semantic: str, restoration: str, scale: float) -> None:
        for file in upload:
            try:
                image = ImageOps.exif_transpose(Image.open(io.BytesIO(file.content))).convert("RGB")
                x = F.to_dtype(F.pil_to_tensor(ImageOps.fit(image, (side, side))), torch.float32, scale=True)
                after = found.restore(pipe, [Sample(x, x, semantic, restoration, None)], scale=scale)[0]
            except (OSError, BadParameter) as error:
                print(f"{file.name}: {error}")
            else:
                figure = plots.image_rows({"": [x, after]}, ["input", "restored"], side=2.4)
                display(figure)
                plt.close(figure)  # ipywidgets would show it a second time

    return ipywidgets.VBox([*controls.values(), ipywidgets.interactive_output(show, controls)])

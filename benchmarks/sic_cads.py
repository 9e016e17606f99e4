"""SIC-CADS' image-level branch compared with the passes that it cannot avoid, and the cost of the refinement.

An image of 640 x 480, already of the detector's size, goes through CLIP's ViT-B/32 as five crops and through a
ResNet-50 at 416 px: the reference is those two passes alone, their inputs made beforehand. The branch adds the crops,
the pyramid, the heads and the scores of 1,203 classes. In training the reference is the ResNet forward and back and the
five crops forward.
"""

from __future__ import annotations

import functools

import bench
import timm
import torch
from bench import Step
from open_clip.transformer import QuickGELU, VisionTransformer
from torch.nn import functional as F

from companion.models.sic_cads import MLR, refine

CLASSES, BOXES, REFINEMENTS = 1203, 300, 100
SIDE = 480  # of a training image


def build() -> MLR:
    """The recogniser at full size, random weights."""
    torch.manual_seed(0)
    body = timm.create_model("resnet50", pretrained=False, num_classes=0)
    teacher = VisionTransformer(224, 32, 768, 12, 12, 4.0, output_dim=512, act_layer=QuickGELU)
    text, novel = F.normalize(torch.randn(CLASSES, 512), dim=-1), torch.arange(CLASSES) % 4 == 0
    return MLR(body, text, novel, teacher=teacher).eval()


def image(height: int = 480, width: int = 640) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (1, 3, height, width), generator=generator, dtype=torch.uint8)


def branch(student: bool = False) -> Step:
    model, x = build(), image()
    return lambda: model.recognise(x, student=student)


def passes(student: bool = False) -> Step:
    """ResNet-50 and, without the student, CLIP on five crops."""
    model = build()
    x, crops = model.prepared(image()), model.crops(image())[0]

    @torch.no_grad()
    def step() -> None:
        model.body(x)
        if not student:
            model.teacher(crops)

    return step


def refinements() -> Step:
    """`REFINEMENTS` times, because one is too short to time."""
    generator = torch.Generator().manual_seed(1)
    found, p = torch.rand(BOXES, CLASSES, generator=generator), torch.rand(CLASSES, generator=generator)

    def step() -> None:
        for _ in range(REFINEMENTS):
            refine(found, p, 0.7)

    return step


def training() -> Step:
    """A training step of the recogniser on one image."""
    model, x = build().train(), image(SIDE, SIDE)
    positives = torch.zeros(1, CLASSES, dtype=torch.bool)
    positives[0, [1, 2, 1201]] = True
    optimizer = torch.optim.AdamW(model.trained().values(), lr=1e-4)

    def step() -> None:
        sum(model.loss(x, positives)).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def training_passes() -> Step:
    """ResNet-50 forward and back with the same optimiser, CLIP's crops forward."""
    model = build().train()
    pixels = image(SIDE, SIDE)
    x, crops = model.prepared(pixels, resize=False), model.crops(pixels)[0]
    optimizer = torch.optim.AdamW([p for p in model.body.parameters() if p.requires_grad], lr=1e-4)

    def step() -> None:
        model.body(x).sum().backward()
        with torch.no_grad():
            model.teacher(crops)
        optimizer.step()
        optimizer.zero_grad()

    return step


def main() -> None:
    makers = {
        "image-level branch (visual MLR+)": branch,
        "ResNet-50 and CLIP on five crops": passes,
        "image-level branch, student": functools.partial(branch, True),
        "ResNet-50": functools.partial(passes, True),
        f"{REFINEMENTS} refinements": refinements,
        "training step": training,
        "ResNet-50 forward and back, CLIP forward": training_passes,
    }
    plus, both, student, resnet, refined, trained, plain = makers
    bench.run(
        "sic_cads",
        f"ResNet-50 at 416 px and CLIP ViT-B/32, an image of 640 x 480, {CLASSES} classes; training at {SIDE} px",
        makers,
        [
            ("image-level branch / CLIP's crops and ResNet-50", plus, both),
            ("image-level branch with the student / ResNet-50", student, resnet),
            (f"{REFINEMENTS} refinements of {BOXES} boxes x {CLASSES} classes / one pass of the branch", refined, plus),
            ("training step / ResNet-50 forward and back, CLIP's crops forward", trained, plain),
        ],
        rounds=3,
    )


if __name__ == "__main__":
    main()

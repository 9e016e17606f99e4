"""SIC-CADS: the formulas written out, images of a batch apart, refinement, official names."""

import timm
import torch
from torch import nn
from torch.nn import functional as F

from companion.backbones import Input
from companion.models.sic_cads.model import MLR, Settings, detect, normalise, pool, rank_loss, refine
from tests.models.common import draw, misfits, refuses
from tests.parity.runner import ROOT as PARITY
from tests.parity.runner import Case

CLASSES, DIM = 10, 24
NOVEL = torch.arange(CLASSES) % 3 == 0
SMALL = {"image_input": Input(64, (0.5,) * 3, (0.5,) * 3), "teacher_input": Input(32, (0.5,) * 3, (0.5,) * 3)}


def share(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def pixels(count: int = 2, height: int = 64, width: int = 96) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (count, 3, height, width), generator=generator, dtype=torch.uint8)


class Teacher(nn.Module):
    """A tiny image tower that counts the crops it is shown."""

    def __init__(self):
        super().__init__()
        self.layer, self.seen = nn.Linear(3 * 32 * 32, DIM), []

    def forward(self, x):
        assert not torch.is_grad_enabled()
        self.seen.append(len(x))
        return self.layer(x.flatten(1))


def body() -> nn.Module:
    return timm.create_model("resnet10t", channels=(8, 16, 24, 32), stem_width=8, num_classes=0, zero_init_last=False)


def build(**changes) -> MLR:
    torch.manual_seed(0)
    parts = {"body": body(), "teacher": Teacher()} | {k: changes.pop(k) for k in ("body", "teacher") if k in changes}
    settings = Settings(**{"width": 16, **SMALL, **changes})
    return MLR(parts["body"], F.normalize(draw(CLASSES, DIM), dim=-1), NOVEL, settings, teacher=parts["teacher"]).eval()


def test_only_what_the_paper_trains_gets_a_gradient_and_the_callers_modules_stay():
    torch.manual_seed(0)  # with some weights no pair of classes is ranked wrongly
    own, teacher = body(), Teacher()
    model = build(body=own, teacher=teacher).train()
    model.set_grad_checkpointing()
    before = model.body.bn1.running_mean.clone()
    sum(model.loss(pixels(), draw(2, CLASSES) > 0.5)).backward()
    reached = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert reached == set(model.trained()) and not any(".bn" in name for name in reached)
    assert {name.split(".")[0] for name in reached} == {"body", "pyramid", "heads"}
    assert torch.equal(model.body.bn1.running_mean, before)
    assert all(m.training and all(p.requires_grad for p in m.parameters()) for m in (own, teacher))
    assert model.body.grad_checkpointing and not own.grad_checkpointing


def test_labels_of_boxes_rank_base_classes_and_cached_embeddings_are_used():
    model, images, positives = build(tau=20.0), pixels(), draw(2, CLASSES) > 0
    ranked, distilled = model.loss(images, positives)
    e_text, _ = model(model.prepared(images, resize=False))
    scores = 20 * pool(e_text @ model.text.mT, 2)
    torch.testing.assert_close(ranked, rank_loss(scores, positives, ~NOVEL))
    torch.testing.assert_close(model.loss(images, positives, boxes=False)[0], rank_loss(scores, positives))
    taught = model.teacher_embeddings(images)
    calls = len(model.teacher.seen)
    torch.testing.assert_close(model.loss(images, positives, teacher=taught)[1], distilled)
    assert len(model.teacher.seen) == calls


def test_official_names_round_trip():
    names, novel = Case(PARITY / "sic_cads" / "mlr_lvis_r50").names, torch.zeros(1203, dtype=torch.bool)
    shapes = {n: s for n, s in names.items() if "resblocks" not in n or "resblocks.0." in n}  # CLIP's first block
    state = {name: torch.full(shape, float(i)) for i, (name, shape) in enumerate(shapes.items())}
    again = MLR.from_official(state, novel).to_official()
    assert state.keys() - again.keys() == {f"backbone.bottom_up.base.fc.{kind}" for kind in ("weight", "bias")}
    assert all(torch.equal(t, state[n]) for n, t in again.items())
    # merged with a detector, as the authors' tool does; and without CLIP's tower, so that only the student is there
    merged = {f"ovmlr_model.{n}": t for n, t in again.items() if not n.startswith("clip_model.")}
    student = MLR.from_official(merged | {"roi_heads.x": torch.zeros(1)}, novel)
    assert student.teacher is None
    refuses((lambda: student.recognise(pixels()), "."))
    wrong = again | {"typo": torch.zeros(1), "mlr_lin2.bias": torch.zeros(3)}
    del wrong["mlr_lin.bias"]
    missing, unknown, (shape,) = misfits(MLR.from_official, wrong, novel)
    assert (missing, unknown) == (["mlr_lin.bias"], ["typo"]) and "mlr_lin2.bias (3,)" in shape


def test_what_would_silently_give_wrong_scores_is_refused():
    text, model, positives = draw(CLASSES, DIM), build(), draw(2, CLASSES) > 0
    refuses(
        (lambda: build(lambda_novel=1.5), "1.5"),
        (lambda: build(levels=0), "levels"),
        (lambda: model.recognise(pixels(), share=1.5), "share"),
        (lambda: model.loss(pixels(), positives[:1]), "positives"),
        (lambda: model.loss(pixels(), positives, teacher=share(2, 1, DIM)), "teacher"),
        (lambda: normalise(share(2, 4), "images"), "over"),
        (lambda: detect(share(3, 4), share(3, 4), top=-1), "top"),
        (lambda: MLR(body(), text, NOVEL.float()), "float32"),
        (lambda: MLR(body(), text, NOVEL[:3]), "3"),
        (lambda: MLR(body(), text[:1], NOVEL[:1]), "text"),
        (lambda: MLR(body(), text[:2], NOVEL[:2]), "text"),
        (lambda: model.recognise(pixels().float()), "uint8"),
        (lambda: refine(share(3, 4), share(4), 1.2), "1.2"),
        (lambda: refine(share(3, 4), share(1, 4)), "4"),
    )


def test_of_equal_scores_those_of_the_first_boxes_and_classes_are_kept():
    scores = share(40, 6).mul(5).floor().div(5)
    scores[0, 0] = torch.nan  # is above no threshold
    above = (scores > 0.3).flatten().nonzero().flatten()
    expected = above[scores.flatten()[above].argsort(descending=True, stable=True)]
    for top in (1, 7, 50, 1000):
        found = detect(share(40, 4), scores, 0.3, None, top)
        assert torch.equal(found.rows * 6 + found.classes, expected[:top])


def test_equal_scores_and_classes_without_boxes_give_finite_values():
    equal, none = torch.full((2, 4), 0.25), torch.zeros(4, dtype=torch.bool)
    for over in ("image", "batch"):
        torch.testing.assert_close(normalise(equal, over), torch.full((2, 4), 0.5))
    scores = draw(2, 4).requires_grad_()
    loss = rank_loss(scores, ~none.expand(2, 4), none)
    loss.backward()
    assert loss == 0 and not scores.grad.any()


@torch.no_grad()
def test_the_scores_of_an_image_are_independent_of_its_batch():
    model, images = build(), pixels(3)
    together = model.recognise(images)
    assert model.teacher.seen == [15], "the teacher sees all crops of a batch at once"
    for i in range(3):
        torch.testing.assert_close(model.recognise(images[i : i + 1]).p, together.p[i : i + 1], rtol=1e-4, atol=1e-5)
    model.recognise(images, student=True)
    assert len(model.teacher.seen) == 4


def test_the_rank_loss_has_the_precision_of_its_scores():
    scores, positives = draw(2, 12).double(), torch.arange(12).expand(2, -1) < 3
    costs = (1 + scores[:, None] - scores[:, :3, None]).clamp_min(0)  # (2, 3, 12)
    torch.testing.assert_close(rank_loss(scores, positives), costs.mean(), rtol=1e-12, atol=1e-12)

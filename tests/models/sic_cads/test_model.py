"""SIC-CADS: counts, the formulas written out, invariances of refinement, official names, bad inputs."""

import itertools
import math
import time
import timeit

import pytest
import timm
import torch
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg
from torch import nn
from torch.nn import functional as F

from companion.backbones import Input
from companion.data import DATASETS
from companion.data.detection_sets import COCO_BASE, COCO_NOVEL
from companion.errors import BadCheckpoint, BadParameter
from companion.evaluation.parity import Case, compare, folder
from companion.evaluation.tables import published_table
from companion.models.sic_cads import model as sic_cads
from companion.models.sic_cads import parity
from companion.models.sic_cads.model import MLR, detect, detector_scores, fuse, normalise, pool, rank_loss, refine
from companion.ops.files import read_json, write_json
from companion.ops.papers import paper
from companion.toy.datasets.tokens import Tokenizer
from tests.models.common import draw, gflop, misfits, refuses

CLASSES, DIM = 10, 24
NOVEL = torch.arange(CLASSES) % 3 == 0
SMALL = {"image_input": Input(64, (0.5,) * 3, (0.5,) * 3), "teacher_input": Input(32, (0.5,) * 3, (0.5,) * 3)}


def share(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def pixels(count: int = 2, height: int = 64, width: int = 96, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, height, width), generator=generator, dtype=torch.uint8)


def boxes(count: int, seed: int = 1) -> torch.Tensor:
    corner, size = share(count, 2, seed=seed) * 80, share(count, 2, seed=seed + 1) * 40 + 5
    return torch.cat([corner, corner + size], 1)


class Teacher(nn.Module):
    """A tiny image tower that counts the crops it is shown."""

    def __init__(self):
        super().__init__()
        self.layer, self.seen = nn.Linear(3 * 32 * 32, DIM), []

    def forward(self, x):
        assert not torch.is_grad_enabled()
        self.seen.append(len(x))
        return self.layer(x.flatten(1))


class Plain(nn.Module):
    """A body that is none of timm's: three maps of strides 4, 8, 16."""

    channels = (8, 12, 16)

    def __init__(self):
        super().__init__()
        layers = zip((3, *self.channels), self.channels, (4, 2, 2), strict=False)
        self.layers = nn.ModuleList(nn.Conv2d(i, o, 3, stride, 1) for i, o, stride in layers)

    def forward(self, x):
        found = []
        for layer in self.layers:
            x = layer(x).relu()
            found.append(x)
        return found


def body() -> nn.Module:
    return timm.create_model("resnet10t", channels=(8, 16, 24, 32), stem_width=8, num_classes=0, zero_init_last=False)


def build(**changes) -> MLR:
    torch.manual_seed(0)
    options = {"body": body(), "teacher": Teacher(), "width": 16, **SMALL, **changes}
    return MLR(options.pop("body"), F.normalize(draw(CLASSES, DIM), dim=-1), NOVEL, **options).eval()


def full_size() -> MLR:
    """ResNet-50 and CLIP's ViT-B/32 without values."""
    with torch.device("meta"):
        body = timm.create_model("resnet50", num_classes=0)
        vision = CLIPVisionCfg(layers=12, width=768, patch_size=32, image_size=224)
        clip = CLIP(512, vision, CLIPTextCfg(77, 49408, width=512, heads=8, layers=1), quick_gelu=True)
        return MLR(body, torch.zeros(1203, 512), torch.zeros(1203, dtype=torch.bool), teacher=clip.visual)


def test_counts_of_the_full_size_model():
    """Those of the table, which were counted on the authors' model."""
    model, counted = full_size(), published_table("sic_cads", "counts").set_index("method").parameters

    def count(start: str, trained: bool = True) -> int:
        named = model.named_parameters()
        return sum(p.numel() for n, p in named if n.startswith(start) and p.requires_grad == trained)

    found = {
        "ResNet-50 convolutions": count("body."),
        "FPN and P6/P7": count("pyramid."),
        "three linear heads": count("heads."),
        "trained and used, total": sum(p.numel() for p in model.trained().values()),
        "text table, 1203 x 512": count("text", trained=False),
        "CLIP ViT-B/32 visual": count("teacher.", trained=False),
    }
    assert found == counted[list(found)].to_dict() and count("pyramid.extra_blocks.") == 1_180_160


def test_only_what_the_paper_trains_gets_a_gradient():
    model = build().train()
    ranked, distilled = model.loss(pixels(), draw(2, CLASSES) > 0.5)
    (ranked + distilled).backward()
    reached = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert reached == set(model.trained())
    assert {name.split(".")[0] for name in reached} == {"body", "pyramid", "heads"}
    assert not any(".bn" in name for name in reached)


def test_body_and_teacher_of_the_caller_are_not_changed():
    own, teacher = body(), Teacher()
    model = build(body=own, teacher=teacher)
    assert own.training and teacher.training
    assert all(p.requires_grad for module in (own, teacher) for p in module.parameters())
    model.set_grad_checkpointing()
    assert model.body.grad_checkpointing and not own.grad_checkpointing


def test_frozen_norms_stay_and_free_ones_move():
    for frozen, changed in ((True, False), (False, True)):
        model = build(freeze_norms=frozen).train()
        before = {n: t.clone() for n, t in model.body.state_dict().items() if n.endswith("running_mean")}
        model.loss(pixels(), draw(2, CLASSES) > 0.5)
        after = model.body.state_dict()
        assert any(not torch.equal(t, after[n]) for n, t in before.items()) == changed


def test_images_are_resized_by_the_shorter_side_and_padded_with_zeros():
    model = build()
    x = model.prepared(pixels(1, 60, 100))
    assert x[..., 106:].eq(0).all() and x[..., :106].ne(0).all()
    assert model.prepared(pixels(1, 60, 100), resize=False).shape == (1, 3, 64, 128)
    square = pixels(1, 64, 64)
    torch.testing.assert_close(model.prepared(square), (square / 255 - 0.5) / 0.5)


def test_crops_are_the_image_and_four_overlapping_corners_squeezed_without_smoothing():
    near, far = (0, 2 / 3), (1 / 3, 1)
    assert sic_cads.patches(1) == [(0, 1, 0, 1)] and len(sic_cads.patches(3)) == 1 + 4 + 9
    assert sic_cads.patches(2) == [(0, 1, 0, 1), *((*a, *b) for a in (near, far) for b in (near, far))]
    model, smooth = build(), build(antialias=True)
    image = pixels(1, 60, 90)
    found = model.crops(image)
    assert found.shape == (1, 5, 3, 32, 32)
    corner = image[..., 20:60, 30:90].float()
    expected = F.interpolate(corner, (32, 32), mode="bilinear", align_corners=False).round()
    torch.testing.assert_close(found[:, 4], (expected / 255 - 0.5) / 0.5)
    assert not torch.allclose(found, smooth.crops(image))


@torch.no_grad()
def test_a_batch_gives_what_its_images_give():
    model, images = build(), pixels(3)
    together = model.recognise(images)
    assert model.teacher.seen == [15], "the teacher sees all crops of a batch at once"
    model.recognise(images, student=True)
    assert model.teacher.seen == [15]
    alone = [model.recognise(image[None]) for image in images]
    torch.testing.assert_close(together.p, torch.cat([r.p for r in alone]))
    assert together.text.shape == (3, 5, CLASSES) and together.p.shape == (3, CLASSES)
    batch = build(over="batch").recognise(images).p
    assert not torch.allclose(batch, together.p)
    torch.testing.assert_close(build(over="batch").recognise(images[:1]).p, alone[0].p)
    model = build(levels=1)
    e_text, _ = model(model.prepared(images))
    cosine = e_text[:, 0] @ model.text.mT  # of the whole image
    torch.testing.assert_close(pool(model.recognise(images).text, 1), cosine)


@torch.no_grad()
def test_any_module_can_be_the_body():
    model = build(body=Plain(), channels=Plain.channels, extra=False)
    assert model.heads.shared.in_features == 3 * 16
    assert [m.shape[-1] for m in model.forward_features(torch.zeros(1, 3, 64, 64))] == [16, 8, 4]
    assert model.recognise(pixels(), student=True).p.isfinite().all()


def test_probabilities_do_not_depend_on_scale_and_shift_of_an_image():
    s, scale, shift = draw(4, 30), share(4, 1) * 5 + 0.1, draw(4, 1, seed=5)
    torch.testing.assert_close(normalise(scale * s + shift), normalise(s))
    assert not torch.allclose(normalise(scale * s + shift, "none"), normalise(s, "none"))
    z = (s[0] - s[0].mean()) / s[0].std()
    torch.testing.assert_close(normalise(s)[0], z.sigmoid())


def test_fusion_is_equation_6_and_one_formula_when_the_lambdas_add_up_to_one():
    text, image = share(3, CLASSES), share(3, CLASSES, seed=2)
    fused = fuse(text, image, sic_cads.text_share(NOVEL, 0.8, 0.6))
    for b, c in itertools.product(range(3), range(CLASSES)):
        t, i = float(text[b, c]), float(image[b, c])
        expected = t**0.4 * i**0.6 if NOVEL[c] else t**0.8 * i**0.2
        assert math.isclose(float(fused[b, c]), expected, rel_tol=1e-5)
    one = fuse(text, image, sic_cads.CROSS_DATASET)
    torch.testing.assert_close(fuse(text, image, sic_cads.text_share(NOVEL, 0.8, 0.2)), one)


def test_refinement_at_its_ends():
    p, m = share(20, CLASSES), share(CLASSES, seed=2)
    assert torch.equal(refine(p, m, 0), p)
    assert torch.equal(refine(p, m, 1), m.expand(20, -1))
    torch.testing.assert_close(refine(p, m, 0.5), (p * m).sqrt())
    p[0, 0] = 0
    assert refine(p, m, 0.5)[0, 0] == 0 and torch.equal(refine(p, m, 0), p)


@pytest.mark.parametrize("gamma", [0.3, 0.5, 0.7, 0.95])
def test_within_a_class_refinement_changes_no_order_and_no_suppression(gamma):
    p, m = share(60, CLASSES), share(CLASSES, seed=2)
    refined = refine(p, m, gamma)
    assert torch.equal(p.argsort(0), refined.argsort(0))
    everything = {"threshold": 0, "top": 60 * CLASSES}
    before, after = (detect(boxes(60), scores, **everything) for scores in (p, refined))
    pairs = [set(zip(d.rows.tolist(), d.classes.tolist(), strict=True)) for d in (before, after)]
    assert pairs[0] == pairs[1]
    assert not torch.equal(before.classes, after.classes)  # across classes it does


def test_a_threshold_keeps_products_above_its_square():
    p, m = share(50, CLASSES), share(CLASSES, seed=2)
    kept = detect(boxes(50), refine(p, m, 0.5), 0.6, None, 500)
    found = torch.zeros_like(p, dtype=torch.bool)
    found[kept.rows, kept.classes] = True
    assert torch.equal(found, p * m > 0.36)


def test_refining_300_boxes_and_1203_classes_takes_under_2_ms_on_one_core():
    p, m, threads = share(300, 1203), share(1203, seed=2), torch.get_num_threads()
    torch.set_num_threads(1)
    times = timeit.repeat(lambda: refine(p, m, 0.7), timer=time.process_time, repeat=100, number=1)
    torch.set_num_threads(threads)
    assert min(times) < 0.002


def written_out(scores, positives, columns):
    total = 0.0
    for row, labels in zip(scores, positives, strict=True):
        labels = [p for p in range(len(row)) if labels[p] and columns[p]]
        all_columns = [k for k in range(len(row)) if columns[k]]
        terms = [max(0.0, 1 + float(row[k]) - float(row[p])) for p in labels for k in all_columns]
        total += sum(terms) / len(terms) if terms else 0.0
    return total / len(scores)


def test_rank_loss_is_the_sum_written_out():
    scores, positives = 3 * draw(5, CLASSES), draw(5, CLASSES, seed=2) > 0.4
    positives[3] = False  # an image without labels counts with 0
    everything = torch.ones(CLASSES, dtype=torch.bool)
    for columns in (None, ~NOVEL):
        expected = written_out(scores, positives, everything if columns is None else columns)
        assert math.isclose(float(rank_loss(scores, positives, columns)), expected, rel_tol=1e-5)
    assert rank_loss(scores, torch.zeros_like(positives)) == 0


def test_losses_of_the_model():
    model, images, positives = build(tau=20.0), pixels(), draw(2, CLASSES) > 0
    ranked, distilled = model.loss(images, positives)
    e_text, e_image = model(model.prepared(images, resize=False))
    scores = 20 * pool(e_text @ model.text.mT, 2)
    torch.testing.assert_close(ranked, rank_loss(scores, positives, ~NOVEL))
    torch.testing.assert_close(model.loss(images, positives, boxes=False)[0], rank_loss(scores, positives))
    taught = model.teacher_embeddings(images)
    torch.testing.assert_close(distilled, 0.01 * sic_cads.distillation_loss(e_image, taught))
    calls = len(model.teacher.seen)
    kept = model.loss(images, positives, teacher=taught)
    assert torch.equal(kept[1], distilled) and len(model.teacher.seen) == calls


def test_zero_shot_classifier():
    layer = sic_cads.ZeroShotClassifier(6, draw(CLASSES, DIM), scale=20, bias=-2.0)
    logits = layer(draw(7, 6))
    assert logits.shape == (7, CLASSES + 1) and logits[:, -1].eq(0).all()
    x = F.normalize(layer.linear(draw(7, 6)), dim=-1)
    torch.testing.assert_close(logits[:, :-1], 20 * x @ F.normalize(draw(CLASSES, DIM), dim=-1).mT - 2)
    assert layer(draw(7, 6), draw(3, DIM)).shape == (7, 3)
    assert sic_cads.ZeroShotClassifier(6, draw(CLASSES, DIM)).bias is None


def test_scores_of_one_and_more_stages():
    stages = [draw(5, CLASSES + 1, seed=s) for s in range(3)]
    one = detector_scores(stages[:1])
    assert torch.equal(one, stages[0].sigmoid())
    objectness = share(5)
    many = detector_scores(stages, objectness)
    mean = torch.stack([s.sigmoid() for s in stages]).mean(0)
    torch.testing.assert_close(many, (mean * objectness[:, None]).sqrt())
    torch.testing.assert_close(detector_scores(stages[:1], activation="softmax").sum(-1), torch.ones(5))
    s = draw(2, 5, CLASSES)
    torch.testing.assert_close(pool(s, 2), (s[:, 0] + s[:, 1:].max(1).values) / 2)


def test_detections_are_the_best_first():
    given = torch.tensor([[0.0, 0.0, 10.0, 10.0], [0.0, 0.0, 10.0, 9.0], [20.0, 20.0, 30.0, 30.0]])
    p = torch.tensor([[0.9, 0.1], [0.8, 0.7], [0.3, 0.05]])
    found = detect(given, p, 0.2)
    assert found.rows.tolist() == [0, 1, 2] and found.classes.tolist() == [0, 1, 0]  # (1, 0) is suppressed by (0, 0)
    assert detect(given, p, 0.2, None, 3).rows.tolist() == [0, 1, 1]
    assert detect(given, p, 0.2, top=1).rows.tolist() == [0]
    assert len(detect(given, p, 0.95).scores) == 0
    # boxes without offsets stay inside the image
    given = torch.tensor([[10.0, 5.0, 200.0, 60.0]])
    found = sic_cads.cascade_boxes(given, [torch.zeros(1, 4)] * 2, [(10, 10, 5, 5)] * 2, (50, 100))
    torch.testing.assert_close(found, torch.tensor([[10.0, 5.0, 100.0, 50.0]]))


def tiny_clip() -> CLIP:
    torch.manual_seed(3)
    vision = CLIPVisionCfg(1, width=32, head_width=16, patch_size=16, image_size=32)
    return CLIP(DIM, vision, CLIPTextCfg(16, 64, width=32, heads=2, layers=1)).eval()


def test_vocabulary_embeds_the_released_prompt():
    clip, names = tiny_clip(), ["cat", "moon", "rocket"]
    found = sic_cads.vocabulary(clip, Tokenizer(), names, batch=2)
    assert found.shape == (3, DIM) and not found.requires_grad
    with torch.no_grad():
        alone = clip.encode_text(Tokenizer()([sic_cads.PROMPT.format("moon")], 16))
    torch.testing.assert_close(found[1:2], F.normalize(alone, dim=-1))


def test_official_names_round_trip():
    case = Case(folder() / "sic_cads" / "mlr_lvis_r50")
    novel = torch.zeros(1203, dtype=torch.bool)
    state = {name: torch.full(shape, float(i)) for i, (name, shape) in enumerate(case.names.items())}
    model = MLR.from_official(state, novel)
    again = model.to_official()
    left = {n for n in state if n not in again}
    assert left == {f"backbone.bottom_up.base.fc.{kind}" for kind in ("weight", "bias")}
    assert all(torch.equal(t, state[n]) for n, t in again.items())
    # merged with a detector, as the authors' tool does; and without CLIP's tower, so that only the student is there
    merged = {f"ovmlr_model.{n}": t for n, t in again.items() if not n.startswith("clip_model.")}
    student = MLR.from_official(merged | {"roi_heads.x": torch.zeros(1)}, novel)
    assert torch.equal(student.text, model.text) and student.teacher is None
    with pytest.raises(BadParameter, match="teacher"):
        student.recognise(pixels())
    wrong = dict(again) | {"typo": torch.zeros(1), "mlr_lin2.bias": torch.zeros(3)}
    del wrong["mlr_lin.bias"]
    missing, unknown, (shape,) = misfits(MLR.from_official, wrong, novel)
    assert (missing, unknown) == (["mlr_lin.bias"], ["typo"]) and "mlr_lin2.bias (3,)" in shape
    with pytest.raises(BadCheckpoint, match="text_embedding"):
        MLR.from_official({}, novel)


def test_the_heads_of_a_whole_checkpoint_can_be_checked():
    case = Case(folder() / "sic_cads" / "mlr_heads")
    more = dict(case.state) | {"backbone.fpn_lateral3.bias": torch.zeros(256)}
    assert all(d.agrees for d in compare("sic_cads", Case(case.folder, more)))
    more["mlr_lin2.weight"] = more["mlr_lin2.weight"] * 1.1 + 0.01
    wrong = [d.output for d in compare("sic_cads", Case(case.folder, more)) if not d.agrees]
    assert wrong[0] == "e_text" and "e_image" not in wrong


@pytest.mark.slow
def test_recorded_recognisers_of_other_sizes_are_run_as_their_case_tells(tmp_path):
    """No class count, image size, label or vocabulary is typed into the runner."""
    whole, copied = folder() / "sic_cads" / "mlr_lvis_r50", tmp_path / "mlr_coco_r50"
    names, facts = (read_json(whole / f"{name}.json") for name in ("names", "case"))
    facts |= {"case": "mlr_coco_r50", "novel_class_indices": [0, 3], "weights_seed": 4, "inputs_seed": 4}
    facts["config"] |= {"num_classes": 6, "file": "configs/ovmlr_coco_base_caption.yaml", "inference_resolution": 64}
    facts["inputs"]["image"]["shape"] = [3, 96, 144]
    facts["train_losses_input"] = "image uint8 [3,64,96] as above, boxes labels = base class indices [1,5]"
    write_json(copied / "names.json", names | {"text_embedding.weight": [6, 512]})
    write_json(copied / "case.json", facts)
    case = Case(copied)
    found = parity.outputs(case)
    assert found["p_mmlr"].shape == (1, 6) and found["top20_student"].shape == (1, 6)
    model = MLR.from_official(case.state, torch.tensor([True, False, False, True, False, False]), tau=20.0)
    images = (127.5 + 50 * case.values("input:train", 3, 64, 96)).round().clamp(0, 255).to(torch.uint8)[None]
    with torch.no_grad():
        scores = 20 * pool(model.cosines(model(model.prepared(images, resize=False))[0]), 2)[0, [1, 2, 4, 5]]
    pairs = (1 + scores - scores[[0, 3], None]).clamp_min(0)  # positives 1 and 5 against the base classes
    torch.testing.assert_close(found["mlr_loss"], pairs.mean())


def test_bad_options_and_calls():
    text, model, plain = draw(CLASSES, DIM), build(), {"channels": Plain.channels}
    refuses(
        (lambda: build(levels=0), "levels"),
        (lambda: build(lambda_novel=1.5), "lambda_novel"),
        (lambda: build(lambda_base=-1), "lambda_base"),
        (lambda: build(over="class"), "over"),
        (lambda: build(body=nn.Conv2d(3, 3, 1)), "body"),
        (lambda: build(indices=(2, 3, 7)), "body"),
        (lambda: MLR(Plain(), text, NOVEL[:3], **plain), "novel"),
        (lambda: MLR(Plain(), text, NOVEL.float(), **plain), "novel"),
        (lambda: MLR(Plain(), text[:1], NOVEL[:1], **plain), "text"),
        (lambda: model.recognise(pixels().float()), "uint8"),
        (lambda: model.recognise(pixels()[0]), "uint8"),
        (lambda: refine(share(3, 4), share(4), 1.2), "gamma"),
        (lambda: refine(share(3, 4), share(1, 4)), "p = "),
        (lambda: normalise(draw(2, 3), "class"), "over"),
        (lambda: detector_scores([draw(2, 3)], activation="tanh"), "activation"),
    )


def test_the_cost_and_the_splits_are_what_was_counted():
    """The GFLOP behind the runs, by the same counter; the detector's in test_detectors."""
    splits = published_table("sic_cads", "splits").set_index("method")
    coco = [len(COCO_BASE), len(COCO_NOVEL), 65, DATASETS["detection/ov-coco"].classes]
    assert splits.loc["OV-COCO"].tolist() == coco
    assert splits.loc["OV-LVIS", "vocabulary"] == DATASETS["detection/ov-lvis"].classes
    model = full_size().eval()
    with torch.device("meta"), torch.no_grad():
        forward = gflop(lambda: model(torch.zeros(1, 3, 416, 576)))
        crops = gflop(lambda: model.teacher(torch.zeros(5, 3, 224, 224)))
        training = gflop(lambda: model(torch.zeros(1, 3, 480, 480)))
    runs = {run["id"]: run["gflop"] for run in paper("sic_cads")["runs"]}
    assert round(forward + crops + 113) == runs["training-free"]
    assert round((3 * training + crops) / 3) == runs["ov-coco"] == runs["ov-lvis"]

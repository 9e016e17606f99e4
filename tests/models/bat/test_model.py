"""BAT: exchange between the streams, elimination, the loss, the baselines, and the authors' names."""

import pytest
import torch
from timm.models.vision_transformer import ResPostBlock, VisionTransformer
from torch import Tensor

from companion.errors import BadCheckpoint
from companion.models.bat import (
    BAT,
    FeatureFusion,
    FullFineTuning,
    HigherPeak,
    OSTrack,
    Prediction,
    SingleStream,
    foundation,
    losses,
)
from companion.toy.bat import OneDirection
from tests.models.common import BLOCKS, assert_recomputed_gradients_are_equal, draw, refuses

DEPTH = 3
BOXES = torch.tensor([[0.3, 0.35, 0.25, 0.2], [0.1, 0.5, 0.3, 0.3]])


def small_tracker(**changes) -> OSTrack:
    """OSTrack with all its parts, the unused class token and table too, at 3 blocks of width 64."""
    torch.manual_seed(0)
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": DEPTH, "num_heads": 2, "mlp_ratio": 2}
    vit = VisionTransformer(**sizes | {"num_classes": 0, "global_pool": ""} | changes)
    tracker = OSTrack(vit, template=32, search=64, head_channels=16).eval()
    for module in tracker.head.modules():  # statistics that a wrong mode would change
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 2)
    return tracker


def small(kind: type[BAT] = BAT, std: float = 0.3, **options) -> BAT:
    """BAT whose adapters, at std 0.3, change the output visibly; in eval mode."""
    tracker = small_tracker()
    torch.manual_seed(1)
    model = kind(tracker, width=4, std=std, **options).eval()
    for name, p in model.adapters.named_parameters():
        if name.endswith("bias") and std:
            torch.nn.init.normal_(p, std=0.1)
    return model


def crops(count: int = 2) -> tuple[Tensor, Tensor]:
    return draw(count, 6, 32, 32, seed=2), draw(count, 6, 64, 64, seed=3)


def gap(a: Prediction, b: Prediction) -> float:
    """The largest difference of two predictions' maps; a box is read at a peak, which may change with rounding."""
    return max(float((x - y).detach().abs().max()) for x, y in zip(a[:3], b[:3], strict=True))


def loss(model, batch):
    template, search, boxes = batch
    return losses(model(template, search), boxes)["loss"]


@pytest.mark.parametrize("options", [{}, dict(elimination={0: 0.7}), dict(kind=FullFineTuning)], ids=str)
def test_gradients_come_where_training_is_and_recomputed_ones_are_equal(options):
    tracker = small_tracker().train()
    model = options.get("kind", BAT)(tracker, 4).train()
    loss(model, (*crops(), BOXES)).backward()
    got = {name for name, p in model.named_parameters() if p.grad is not None}
    expected = {n for n, _ in model.named_parameters() if n.startswith("adapters.") or "kind" in options}
    assert got == set(model.trained()) == expected - {"tracker.vit.cls_token", "tracker.vit.pos_embed"}
    assert all(p.requires_grad and p.grad is None for p in tracker.parameters()) and tracker.head.training
    assert_recomputed_gradients_are_equal(lambda: small(**options), lambda m: loss(m, (*crops(), BOXES)))


def test_recomputed_gradients_of_the_tracker_are_equal():
    one = [x[:, :3] for x in crops()]
    assert_recomputed_gradients_are_equal(small_tracker, lambda m: loss(m, (*one, BOXES)))


@pytest.mark.parametrize("vit", [*BLOCKS, {"pre_norm": True}, {"class_token": False}], ids=str)
@torch.no_grad()
def test_adapters_of_zeros_leave_the_sum_of_two_passes_of_any_tracker(vit):
    tracker, (template, search) = small_tracker(**vit), crops()
    pairs = zip(template.chunk(2, 1), search.chunk(2, 1), strict=True)
    features = sum(tracker.forward_features(tracker.embed_template(z), x) for z, x in pairs)
    model = BAT(tracker, 4, std=0).eval()
    found = model.forward_features(model.embed_template(template), search)
    torch.testing.assert_close(found, features, rtol=1e-4, atol=1e-4)
    normed = tracker.embed_search(search[:, :3]).mean(-1).abs().max() < 1e-5
    assert normed == ("pre_norm" in vit)


def test_half_precision_knows_no_certainty():
    """A score of 1 where the target is not would cost infinitely much; 1 - 1e-4 is 1 in half precision."""
    model = small()
    with torch.no_grad():
        for branch in (model.tracker.head.ctr, model.tracker.head.size):
            branch[-1].bias.fill_(12.0)  # certain at every position
    with torch.autocast("cpu", torch.bfloat16):
        found = model(*crops())
        value = losses(found, BOXES)["loss"]
    assert all(part.dtype == torch.float32 for part in found) and max(found.score.max(), found.size.max()) < 1
    value.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.trained().values())


@pytest.mark.parametrize("into", [0, 1])
@torch.no_grad()
def test_one_direction_changes_one_stream_alone(into):
    model, (template, search) = small(kind=OneDirection, into=into), crops()
    received = model.forward_intermediates(model.embed_template(template), search)[1][0]["A1"].chunk(2)
    assert received[into].any() and not received[1 - into].any()


@torch.no_grad()
def test_eliminated_tokens_come_back_as_zeros_at_their_places():
    """OSTrack keeps 0.7 three times: 64 -> 45 -> 32 -> 23 of the search."""
    model, (template, search) = small(std=0, elimination={0: 0.7, 1: 0.7, 2: 0.7}), crops()
    found, blocks = model.forward_intermediates(model.embed_template(template), search)
    assert [out["kept"].shape for out in blocks] == [(4, 45), (4, 32), (4, 23)]
    kept, last = blocks[-1]["kept"], model.tracker.vit.norm(blocks[-1]["x"])[:, 16:]
    expected = torch.zeros(4, 64, 64).scatter(1, kept[..., None].expand_as(last), last)
    torch.testing.assert_close(found[:, 16:], expected[:2] + expected[2:])


@torch.no_grad()
def test_the_baselines_are_the_tracker_on_one_stream_or_on_the_one_with_the_higher_peak():
    tracker, (template, search) = small_tracker(), crops(8)
    pairs = list(zip(template.chunk(2, 1), search.chunk(2, 1), strict=True))
    each = [tracker(*pair) for pair in pairs]
    for stream, expected in enumerate(each):
        assert gap(SingleStream(tracker, stream).eval()(template, search), expected) < 1e-5
    features = sum(tracker.forward_features(tracker.embed_template(z), x) for z, x in pairs)
    for fusion, expected in (("sum", features), ("mean", features / 2)):
        assert gap(FeatureFusion(tracker, fusion).eval()(template, search), tracker.forward_head(expected)) < 1e-5
    higher = each[1].score.flatten(1).amax(1) > each[0].score.flatten(1).amax(1)
    assert 0 < higher.sum() < 8, "both streams win somewhere"
    found = HigherPeak(tracker).eval()(template, search)
    for stream, chosen in ((0, ~higher), (1, higher)):
        torch.testing.assert_close(found.score[chosen], each[stream].score[chosen])
        torch.testing.assert_close(found.box[chosen], each[stream].box[chosen])


def test_bad_checkpoints_options_and_crops_are_refused(tmp_path):
    torch.save({"net": {"fc.weight": torch.zeros(2)}}, tmp_path / "resnet.pth")
    refuses(
        (lambda: BAT.from_official(small_tracker().to_official(), heads=2), r"OSTrack\.from_official"),
        (lambda: foundation(tmp_path / "resnet.pth"), "pos_embed_z"),
        error=BadCheckpoint,
    )
    refuses((lambda: BAT(small_tracker(block_fn=ResPostBlock)), "ResPostBlock"))
    refuses((lambda: small(elimination={7: 0.7}), "0 to 2"), (lambda: OSTrack(small_tracker().vit, template=30), "30"))
    z, x = crops()
    for model in (small(), SingleStream(small_tracker(), 1)):
        refuses(
            *(
                (lambda model=model, wrong=wrong: model(*wrong), ".")
                for wrong in ((z[:, :3], x), (x, x), (z, x[..., :-8]))
            )
        )

"""BAT: trainable parameters, exchange between the streams, losses, the baselines, and the authors' names."""

import itertools
import math

import pytest
import torch
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from torchvision.ops import box_convert

from companion.errors import BadCheckpoint, BadParameter, CorruptFile, MissingWeights
from companion.models.bat import BAT, HigherPeak, OSTrack, Prediction, SingleStream
from companion.models.bat import model as bat
from companion.toy.encoders import tracker as pocket
from tests.models.common import assert_recomputed_gradients_are_equal, misfits, numbers, refuses

DEPTH = 3


def small_tracker(seed: int = 0, drop_path: float = 0.0) -> OSTrack:
    """OSTrack with all its parts, the unused class token and table too, at 3 blocks of width 64."""
    torch.manual_seed(seed)
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": DEPTH, "num_heads": 2, "mlp_ratio": 2}
    vit = VisionTransformer(**sizes, num_classes=0, global_pool="", drop_path_rate=drop_path)
    tracker = OSTrack(vit, template=32, search=64, head_channels=16).eval()
    for module in tracker.head.modules():  # statistics that a wrong mode would change
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 2)
    return tracker


def small(seed: int = 1, std: float = 0.3, **options) -> BAT:
    """BAT whose adapters, at std 0.3, change the output visibly; in eval mode."""
    tracker = small_tracker()
    torch.manual_seed(seed)
    model = BAT(tracker, options.pop("width", 4), std=std, **options).eval()
    for name, p in model.exchanges.named_parameters():
        if name.endswith("bias") and std:
            torch.nn.init.normal_(p, std=0.1)
    return model


def crops(count: int = 2, seed: int = 2) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 6, 32, 32, generator=generator), torch.randn(count, 6, 64, 64, generator=generator)


def swapped(images: Tensor) -> Tensor:
    return torch.cat(images.chunk(2, 1)[::-1], 1)


def equal(a: Prediction, b: Prediction) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


BOXES = torch.tensor([[0.3, 0.35, 0.25, 0.2], [0.1, 0.5, 0.3, 0.3]])


def loss(model, batch):
    template, search, boxes = batch
    return bat.losses(model(template, search), boxes)["loss"]


def test_trained_parameters_at_paper_scale():
    with torch.device("meta"):
        model = BAT(bat.foundation("random"))
    assert numbers(model, trained=True) == 315_264 == 24 * 13_136
    assert numbers(model) == 92_833_797 and round(100 * 315_264 / 92_833_797, 3) == 0.340
    assert numbers(model.tracker.vit) + 768 * (64 + 256) == 86_044_416
    assert numbers(model.tracker.head) == 6_474_117
    assert all(name.startswith("exchanges.") for name in model.trained())
    assert len(model.to_official()) == 386


@pytest.mark.parametrize("width", [1, 2, 8, 16])
@pytest.mark.parametrize(("shared", "stages"), [(True, 2), (True, 1), (False, 2)])
def test_trained_parameters_by_formula(width, shared, stages):
    model = small(width=width, shared=shared, stages=bat.STAGES[:stages])
    one = 2 * 64 * width + width**2 + 2 * width + 64
    assert sum(p.numel() for p in model.trained().values()) == DEPTH * stages * (1 if shared else 2) * one


@pytest.mark.parametrize("options", [{}, dict(elimination={0: 0.7}), dict(tuned="all")], ids=str)
def test_gradients_come_where_training_is(options):
    model = small(**options).train()
    loss(model, (*crops(), BOXES)).backward()
    got = {name for name, p in model.named_parameters() if p.grad is not None}
    assert got == set(model.trained())
    assert "tuned" in options or all(p.grad.any() for p in model.trained().values())
    expected = {n for n, _ in model.named_parameters() if n.startswith("exchanges.") or "tuned" in options}
    assert got == expected - {"tracker.vit.cls_token", "tracker.vit.pos_embed"}


def test_all_zero_start_starves_all_but_one_bias():
    """Claim 5: from zeros only `up.bias` has a gradient, so an adapter could learn no more than a constant."""
    for std, starved in ((0.0, True), (0.02, False)):
        tracker = small_tracker()
        torch.manual_seed(1)
        model = BAT(tracker, 4, std=std, dropout=0)
        loss(model, (*crops(), BOXES)).backward()
        for name, p in model.trained().items():
            assert p.grad.any() != (starved and not name.endswith("up.bias")), name


def test_start_of_the_adapters():
    """The truncated normal that the released network really starts from, biases at zero."""
    torch.manual_seed(0)
    adapter = bat.Adapter(768)
    for layer in (adapter.down, adapter.mid, adapter.up):
        assert not layer.bias.any()
        assert abs(layer.weight.std() - 0.02) < 0.003
    assert not any(p.any() for p in bat.Adapter(768, std=0).parameters())


def test_training_mode_keeps_the_heads_statistics_and_draws_dropout():
    model = BAT(small_tracker(drop_path=0.3), 4, std=0.3).train()
    assert not any(module.training for module in model.tracker.head.modules())
    assert model.tracker.vit.blocks[1].training and model.exchanges[0]["mlp"].training
    template, search = crops()
    assert not equal(model(template, search), model(template, search))
    model.eval()
    assert equal(model(template, search), model(template, search))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_knows_no_certainty(dtype):
    """A score of 1 where the target is not would cost infinitely much; 1 - 1e-4 is 1 in half precision."""
    model = small()
    with torch.no_grad():
        for branch in (model.tracker.head.ctr, model.tracker.head.size):
            branch[-1].bias.fill_(12.0)  # certain at every position
    with torch.autocast("cpu", dtype):
        found = model(*crops())
        value = bat.losses(found, BOXES)["loss"]
    assert all(part.dtype == torch.float32 for part in found)
    assert found.score.max() < 1 and found.size.max() < 1 and torch.isfinite(value)
    value.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.trained().values())


@pytest.mark.parametrize("tuned", ["adapters", "all"])
def test_the_callers_tracker_stays_as_it_was(tuned):
    tracker = small_tracker().train()
    before = {name: value.clone() for name, value in tracker.state_dict().items()}
    models = [BAT(tracker, 4, tuned=tuned).train(), SingleStream(tracker, 0), HigherPeak(tracker)]
    loss(models[0], (*crops(), BOXES)).backward()
    torch.optim.SGD(models[0].trained().values(), lr=1.0).step()
    assert all(p.requires_grad and p.grad is None for p in tracker.parameters()) and tracker.head.training
    assert all(torch.equal(value, before[name]) for name, value in tracker.state_dict().items())
    assert not any(p.requires_grad for model in models[1:] for p in model.parameters())


@pytest.mark.parametrize("options", [{}, dict(elimination={0: 0.7}), dict(tuned="all")], ids=str)
def test_gradient_checkpointing_gives_the_same_gradients(options):
    assert_recomputed_gradients_are_equal(lambda: small(**options), lambda m: loss(m, (*crops(), BOXES)))


@pytest.mark.parametrize("options", [{}, dict(fusion="mean"), dict(stages=("mlp",)), dict(tuned="all")], ids=str)
@torch.no_grad()
def test_no_stream_is_the_main_one(options):
    """Claim 2: swapping the streams of both crops changes nothing, not one bit."""
    model = small(**options)
    template, search = crops()
    assert equal(model(template, search), model(swapped(template), swapped(search)))
    # and not because the streams do not matter
    assert not equal(model(template, search), model(template, swapped(search)))


@pytest.mark.parametrize(
    "options", [dict(directions="first to second"), dict(directions="second to first"), dict(shared=False)], ids=str
)
@torch.no_grad()
def test_one_direction_or_own_adapters_make_the_streams_differ(options):
    model, (template, search) = small(**options), crops()
    assert not torch.allclose(model(template, search).score, model(swapped(template), swapped(search)).score, atol=1e-4)


@pytest.mark.parametrize("how", ["zero adapters", "width 0"])
@torch.no_grad()
def test_without_adapters_the_features_are_the_sum_of_two_trackers(how):
    """Claim 3, exactly: so the frozen head first sees features of about twice their size."""
    model = small(std=0) if how == "zero adapters" else small(width=0)
    template, search = crops()
    found = model.forward_features(model.embed_template(template), search)
    tracker, both = model.tracker, zip(template.chunk(2, 1), search.chunk(2, 1), strict=True)
    parts = [tracker.forward_features(tracker.embed_template(z), x) for z, x in both]
    assert torch.equal(found, parts[0] + parts[1])
    mean = small(std=0, fusion="mean")
    assert torch.equal(mean.forward_features(mean.embed_template(template), search), (parts[0] + parts[1]) / 2)


@torch.no_grad()
def test_an_adapter_is_affine_and_of_low_rank():
    """Claim 4."""
    torch.manual_seed(0)
    adapter = bat.Adapter(96, 8, std=0.3).eval().double()
    torch.nn.init.normal_(adapter.down.bias)
    a, b = torch.randn(2, 50, 96, dtype=torch.float64)
    torch.testing.assert_close(adapter(0.3 * a + 0.7 * b), 0.3 * adapter(a) + 0.7 * adapter(b))
    linear = adapter(torch.eye(96, dtype=torch.float64)) - adapter(torch.zeros(96, dtype=torch.float64))
    assert torch.linalg.matrix_rank(linear) == 8


def two_passes(model: BAT, template: Tensor, search: Tensor) -> Tensor:
    """Section 3.2 line by line: each stream by itself, attention by softmax, every adapter called for one direction."""
    tracker, both = model.tracker, []
    for z, x in zip(template.chunk(2, 1), search.chunk(2, 1), strict=True):
        tokens = [tracker.vit.patch_embed.proj(i).flatten(2).transpose(1, 2) for i in (z, x)]
        both.append(torch.cat([tokens[0] + tracker.position_template, tokens[1] + tracker.position_search], 1))
    a, b = both
    for block, exchange in zip(tracker.vit.blocks, model.exchanges, strict=True):

        def to(which: str, stage: str, h: Tensor, exchange=exchange) -> Tensor | float:
            if stage not in exchange:
                return 0
            directions, adapters = exchange[stage].directions, exchange[stage].adapters
            arrow = {"second": "first to second", "first": "second to first"}[which]
            if directions not in ("both", arrow):
                return 0
            return adapters[-1 if which == "first" else 0](h)

        def attention(h: Tensor, attn=block.attn) -> Tensor:
            q, k, v = attn.qkv(h).unflatten(-1, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
            weights = (q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5).softmax(-1)
            return attn.proj((weights @ v).transpose(1, 2).flatten(2))

        ha, hb = block.norm1(a), block.norm1(b)
        a1 = a + attention(ha) + to("first", "attention", hb)
        b1 = b + attention(hb) + to("second", "attention", ha)
        ha, hb = block.norm2(a1), block.norm2(b1)
        a = a1 + block.mlp(ha) + to("first", "mlp", hb)
        b = b1 + block.mlp(hb) + to("second", "mlp", ha)
    return tracker.vit.norm(a) + tracker.vit.norm(b)


OPTIONS = [
    dict(directions=d, shared=s, stages=t)
    for d, s, t in itertools.product(bat.DIRECTIONS, (True, False), (bat.STAGES, ("attention",), ("mlp",)))
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@torch.no_grad()
def test_one_batch_is_the_two_passes(options):
    model, (template, search) = small(**options), crops()
    found = model.forward_features(model.embed_template(template), search)
    torch.testing.assert_close(found, two_passes(model, template, search), rtol=1e-5, atol=1e-5)


def test_the_gradient_of_one_batch_is_that_of_the_two_passes():
    grads = []
    for how in (lambda m, z, x: m.forward_features(m.embed_template(z), x), two_passes):
        model = small()
        (how(model, *crops()) * torch.linspace(-1, 1, 64)).sum().backward()
        grads.append({name: p.grad for name, p in model.trained().items()})
    for name, value in grads[0].items():
        torch.testing.assert_close(value, grads[1][name], rtol=1e-4, atol=1e-4 * float(value.abs().max()))


@torch.no_grad()
def test_samples_do_not_see_each_other():
    model, (template, search) = small(), crops(3)
    whole = model(template, search)
    for i in range(3):
        one = model(template[i : i + 1], search[i : i + 1])
        torch.testing.assert_close(one.score[0], whole.score[i], rtol=0, atol=1e-6)


@torch.no_grad()
def test_a_trace_shows_the_pass_and_does_not_change_it():
    model, (template, search), trace = small(stages=("mlp",)), crops(), {}
    assert equal(model(template, search), model(template, search, trace))
    counts = {key: len(entries) for key, entries in trace.items()}
    assert counts == dict.fromkeys(("tokens", "attention", "traffic", "kept"), DEPTH)
    last = model.tracker.vit.norm(trace["tokens"][-1]).chunk(2)
    assert torch.equal(last[0] + last[1], model.forward_features(model.embed_template(template), search))
    assert trace["attention"][0].shape == (4, 2, 64) and (trace["attention"][0].sum(-1) < 1).all()
    assert trace["traffic"][0].keys() == {"mlp"} and trace["traffic"][0]["mlp"].shape == (4, 16 + 64)
    assert torch.equal(trace["kept"][0], torch.arange(64).expand(4, 64))


def test_the_template_centre():
    for side, index in ((64, 27), (48, 14), (56, 24)):  # 8x8, 6x6, 7x7 tokens, as OSTrack takes them
        with torch.device("meta"):
            vit = VisionTransformer(img_size=16, patch_size=8, embed_dim=8, depth=1, num_heads=1)
            assert OSTrack(vit, template=side, search=64).centre == index


def test_eliminated_tokens_leave_in_the_order_of_attention():
    x = torch.arange(2.0 * 7).view(2, 7, 1)
    attention = torch.tensor([[0.1, 0.5, 0.2, 0.4], [0.4, 0.3, 0.2, 0.1]])
    kept = torch.tensor([[3, 5, 7, 9], [0, 1, 2, 3]])
    found, left = bat.eliminate(x, attention, kept, 0.6, n=3)
    assert found[..., 0].tolist() == [[0, 1, 2, 4, 6, 5], [7, 8, 9, 10, 11, 12]]
    assert left.tolist() == [[5, 9, 7], [0, 1, 2]]


@torch.no_grad()
def test_eliminated_tokens_come_back_as_zeros_at_their_places():
    model, (template, search), trace = small(width=0, elimination={1: 0.5}), crops(), {}
    tokens = model.embed_template(template)
    found = model.forward_features(tokens, search, trace)
    assert [entry.shape[1] for entry in trace["kept"]] == [64, 32, 32]
    kept, last = trace["kept"][-1], model.tracker.vit.norm(trace["tokens"][-1])
    expected = torch.zeros(4, 64, 64)
    for row, (places, values) in enumerate(zip(kept, last[:, 16:], strict=True)):
        assert len(set(places.tolist())) == 32
        expected[row, places] = values
    torch.testing.assert_close(found[:, :16], last[:2, :16] + last[2:, :16])
    torch.testing.assert_close(found[:, 16:], expected[:2] + expected[2:])
    gone = (found[:, 16:] == 0).all(-1)
    for sample in range(2):
        in_neither = set(range(64)) - set(kept[sample].tolist()) - set(kept[sample + 2].tolist())
        assert set(gone[sample].nonzero()[:, 0].tolist()) == in_neither


@torch.no_grad()
def test_both_settings_of_elimination_run():
    """BAT's released configuration has none; OSTrack keeps 0.7 three times: 64 -> 45 -> 32 -> 23 of the search."""
    template, search = crops()
    none, ones = (small(elimination=e) for e in ({}, {0: 1.0, 2: 1.0}))
    torch.testing.assert_close(none(template, search).score, ones(template, search).score, rtol=0, atol=1e-6)
    trace = {}
    found = small(elimination={0: 0.7, 1: 0.7, 2: 0.7})(template, search, trace)
    assert [entry.shape for entry in trace["kept"]] == [(4, 45), (4, 32), (4, 23)]
    assert found.score.shape == (2, 1, 8, 8) and torch.isfinite(found.box).all()


def maps_of(boxes: Tensor, f: int) -> tuple[Tensor, Tensor, Tensor]:
    """Maps (score, size, offset) that encode `boxes` (B, 4), cx, cy, w, h."""
    cell = (boxes[:, :2] * f).floor().long().clamp(0, f - 1)
    rows, (c, r) = torch.arange(len(boxes)), cell.unbind(1)
    score, size, offset = (torch.full((len(boxes), n, f, f), 0.1) for n in (1, 2, 2))
    score[rows, 0, r, c] = 0.9
    size[rows, :, r, c] = boxes[:, 2:]
    offset[rows, :, r, c] = boxes[:, :2] * f - cell
    return score, size, offset


def test_decode_reads_the_box_that_the_maps_say_and_takes_the_first_of_equal_peaks():
    boxes = torch.rand(50, 4, generator=torch.Generator().manual_seed(0)) * 0.98 + 0.01
    for f in (8, 16):
        torch.testing.assert_close(bat.decode(*maps_of(boxes, f)), boxes)
    score = torch.zeros(1, 1, 4, 4)
    score[0, 0, 2, 1] = score[0, 0, 1, 3] = 0.5
    box = bat.decode(score, torch.full((1, 2, 4, 4), 0.3), torch.zeros(1, 2, 4, 4))
    assert box[0].tolist() == pytest.approx([3 / 4, 1 / 4, 0.3, 0.3])


@pytest.mark.parametrize("f", [8, 16, 24])
def test_the_window_is_nowhere_zero(f):
    window = bat.hann(f)[0, 0]
    assert window.min() > 0 and window.max() <= 1
    assert torch.equal(window, window.T)
    torch.testing.assert_close(window, window.flip(0))
    k = torch.arange(1, f + 1)
    row = 0.5 * (1 - torch.cos(2 * torch.pi * k / (f + 1)))
    torch.testing.assert_close(window, row[:, None] * row, rtol=0, atol=1e-6)


def test_the_target_map_peaks_at_the_centre():
    boxes = torch.tensor([[0.25, 0.5, 0.25, 0.25], [0.6, 0.1, 0.3, 0.2], [0.5, 0.5, 0.02, 0.02], [0.9, 0.9, 0.3, 0.3]])
    found = bat.centre_map(boxes, 16)
    centre = ((boxes[:, :2] + boxes[:, 2:] / 2) * 16).round().long()
    for target, (x, y) in zip(found[:, 0], centre.tolist(), strict=True):
        if x > 15 or y > 15:  # outside of the crop: only the Gaussian's skirt is seen
            assert target.max() < 1
            continue
        assert target[y, x] == 1 and (target == 1).sum() == 1
        assert target.min() == 0
        if y > 0:
            assert target[y - 1, x] == target[y + 1, x]
    assert found[2].sum() == 1, "a tiny box has a radius of no cell"
    assert found[0].sum() > 1
    spread = [bat.centre_map(torch.tensor([[0.5 - s / 2, 0.5 - s / 2, s, s]]), 16).gt(0).sum() for s in (0.1, 0.4, 0.8)]
    assert spread[0] < spread[1] <= spread[2], "the radius grows with the box"


def test_losses_of_a_perfect_answer_are_zero():
    cxcywh = torch.tensor([[0.5, 0.5, 0.25, 0.2], [0.3, 0.65, 0.3, 0.3]])
    boxes = box_convert(cxcywh, "cxcywh", "xywh")
    target = bat.centre_map(boxes, 16)
    perfect = (target == 1).float()
    terms = bat.losses(Prediction(perfect, None, None, cxcywh), boxes)
    assert terms["focal"] == 0
    assert abs(terms["giou"]) < 1e-5 and terms["l1"] < 1e-7 and abs(terms["loss"]) < 1e-5
    # the head's own scores stop at 1e-4 from 0 and 1
    assert bat.focal(perfect.clamp(1e-4, 1 - 1e-4), target) < 1e-3
    assert bat.focal(1 - perfect.clamp(1e-4, 1 - 1e-4), target) > 100


def test_losses_add_up_and_boxes_are_cut_to_the_crop():
    found = Prediction(torch.full((1, 1, 8, 8), 0.5), None, None, torch.tensor([[0.85, 0.5, 0.3, 0.2]]))
    terms = bat.losses(found, torch.tensor([[0.7, 0.4, 0.6, 0.2]]))  # of it 0.7 to 1.0 is inside
    assert terms["l1"] < 1e-6 and abs(terms["giou"]) < 1e-5
    torch.testing.assert_close(terms["loss"], terms["focal"] + 2 * terms["giou"] + 5 * terms["l1"])
    off = bat.losses(found._replace(box=torch.tensor([[0.2, 0.5, 0.2, 0.2]])), torch.tensor([[0.7, 0.4, 0.2, 0.2]]))
    assert off["giou"] > 1  # no overlap
    torch.testing.assert_close(off["l1"], torch.tensor((0.6 + 0.6) / 4))
    torch.testing.assert_close(off["loss"], off["focal"] + 2 * off["giou"] + 5 * off["l1"])


def test_the_focal_loss_forgives_scores_near_a_centre():
    """The centre costs -log p (1 - p)²; a cell of target t costs -log(1 - p) p² (1 - t)⁴."""
    score, target = torch.tensor([[[[0.8, 0.3, 0.6]]]]), torch.tensor([[[[1.0, 0.5, 0.0]]]])
    cells = [-math.log(0.8) * 0.2**2, -math.log(0.7) * 0.3**2 * 0.5**4, -math.log(0.4) * 0.6**2]
    assert bat.focal(score, target).item() == pytest.approx(sum(cells), rel=1e-5)
    twice = torch.cat([score, score]), torch.cat([target, target])
    assert bat.focal(*twice).item() == pytest.approx(sum(cells), rel=1e-5)  # over the number of centres


def test_predictions_are_within_their_ranges():
    found = small()(*crops())
    assert found.score.shape == (2, 1, 8, 8) and found.size.shape == found.offset.shape == (2, 2, 8, 8)
    for part in (found.score, found.size):
        assert part.min() >= 1e-4 and part.max() <= 1 - 1e-4
    assert torch.equal(found.box, bat.decode(*found[:3]))
    terms = bat.losses(found, torch.tensor([[1.2, 1.2, 0.2, 0.2]] * 2))  # no centre in the crop
    assert all(torch.isfinite(value) for value in terms.values())


@pytest.mark.parametrize("stream", [0, 1])
@torch.no_grad()
def test_a_single_stream_sees_its_own_alone(stream):
    model = SingleStream(small_tracker(), stream).eval()
    template, search = crops()
    prediction = model(template, search)
    own = [images.chunk(2, 1)[stream] for images in (template, search)]
    for found, expected in zip(prediction, model.tracker(*own), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    other, mine = (slice(3, 6), slice(0, 3)) if stream == 0 else (slice(0, 3), slice(3, 6))
    for images in (template, search):
        before = images.clone()
        images[:, other] = torch.randn(images[:, other].shape)
        assert equal(model(template, search), prediction)
        images[:, mine] += 1
        assert not equal(model(template, search), prediction)
        images.copy_(before)


@torch.no_grad()
def test_the_higher_peak_is_chosen_for_each_sample():
    tracker = small_tracker()
    model, (template, search) = HigherPeak(tracker).eval(), crops(8)
    prediction = model(template, search)
    each = [SingleStream(tracker, i).eval()(template, search) for i in (0, 1)]
    chosen = torch.stack([one.score.flatten(1).amax(1) for one in each]).argmax(0)
    assert 0 < chosen.sum() < 8, "both streams win somewhere"
    for i, stream in enumerate(chosen.tolist()):
        for found, expected in zip(prediction, each[stream], strict=True):
            torch.testing.assert_close(found[i], expected[i], rtol=0, atol=1e-6)


def test_official_names_round_trip():
    tracker = small_tracker()
    official = tracker.to_official()
    assert {f"backbone.{n}" for n in ("pos_embed_z", "pos_embed_x", "cls_token", "blocks.2.attn.qkv.bias")} <= {
        *official
    }
    assert {"box_head.conv4_size.1.running_var", "box_head.conv5_ctr.weight"} <= {*official}
    again = OSTrack.from_official(official, heads=2)
    assert again.to_official().keys() == official.keys()
    template, search = (images[:, :3] for images in crops())
    assert equal(tracker(template, search), again(template, search))

    model = small()
    official = model.to_official()
    assert "backbone.blocks.1.adap_t.adapter_down.weight" in official
    assert "backbone.blocks.2.adap2_t.adapter_up.bias" in official
    counted = {n: v for n, v in official.items() if not n.endswith("num_batches_tracked")}  # may be absent
    for state in (official, counted):
        again = BAT.from_official(state, heads=2)
        assert equal(model(*crops()), again(*crops())) and not again.training


def test_other_sizes_are_read_from_the_tensors():
    torch.manual_seed(0)
    vit = VisionTransformer(img_size=24, patch_size=4, embed_dim=128, depth=2, mlp_ratio=3, num_heads=2, num_classes=0)
    model = BAT(OSTrack(vit, template=16, search=24, head_channels=32), width=3)
    again = BAT.from_official(model.to_official())
    assert (again.tracker.template, again.tracker.search, len(again.exchanges)) == (16, 24, 2)
    assert again.tracker.vit.blocks[0].attn.num_heads == 2  # one for every 64 channels
    assert sum(p.numel() for p in again.trained().values()) == sum(p.numel() for p in model.trained().values())


def test_checkpoints_that_do_not_fit_list_their_names():
    state = small().to_official()
    state |= {"backbone.extra": torch.zeros(1), "box_head.conv5_ctr.bias": torch.zeros(3)}
    del state["backbone.blocks.1.adap_t.adapter_mid.bias"], state["backbone.norm.weight"]
    assert misfits(BAT.from_official, state, heads=2) == (
        ["backbone.blocks.1.adap_t.adapter_mid.bias", "backbone.norm.weight"],
        ["backbone.extra"],
        ["box_head.conv5_ctr.bias (3,), expected (1,)"],
    )
    missing, unknown, _ = misfits(OSTrack.from_official, small().to_official(), heads=2)
    assert len(unknown) == DEPTH * 2 * 6 and not missing
    state = small_tracker().to_official()
    refuses((lambda: BAT.from_official(state), r"OSTrack\.from_official"), error=BadCheckpoint)
    refuses((lambda: OSTrack.from_official({"a": torch.zeros(1)}), "pos_embed_z"), error=BadCheckpoint)
    del state["backbone.pos_embed"]
    assert misfits(OSTrack.from_official, state, heads=2)[0] == ["backbone.pos_embed"]


def test_foundation_from_a_training_checkpoint(tmp_path):
    """As OSTrack's trainer writes it: the weights under `net`, next to other entries."""
    torch.manual_seed(3)
    tracker = pocket.build("random")
    torch.save({"epoch": 300, "net": tracker.to_official(), "stats": {"loss": 0.1}}, tmp_path / "ep0300.pth.tar")
    again = pocket.build(tmp_path / "ep0300.pth.tar")
    assert not again.training
    template, search = (images[:, :3] for images in crops())
    assert equal(tracker(template, search), again(template, search))
    # the full-size builder reads its sizes from the file
    save_file({n: v.contiguous() for n, v in tracker.to_official().items()}, tmp_path / "t.safetensors")
    assert bat.foundation(tmp_path / "t.safetensors").search == 64


def test_foundation_names_what_is_missing(tmp_path):
    refuses((bat.foundation, r"OSTrack_ep0300\.pth\.tar(.|\n)*mae"), error=MissingWeights)
    refuses((lambda: bat.foundation(tmp_path / "nowhere.pth"), "nowhere"), error=CorruptFile)
    torch.save({"net": small_tracker().to_official()}, tmp_path / "other.pth")
    assert all(misfits(pocket.build, tmp_path / "other.pth"))
    torch.save({"net": {"fc.weight": torch.zeros(2)}}, tmp_path / "resnet.pth")
    refuses((lambda: bat.foundation(tmp_path / "resnet.pth"), "pos_embed_z"), error=BadCheckpoint)


def test_bad_options():
    refuses(
        (lambda: small(directions="sideways"), "'both', 'first to second', 'second to first'"),
        (lambda: small(fusion="product"), "'sum', 'mean'"),
        (lambda: small(tuned="head"), "'adapters', 'all'"),
        (lambda: small(stages=("attention", "norm")), "'attention', 'mlp'"),
        (lambda: small(stages="attention"), "'attention', 'mlp'"),
        (lambda: small(elimination={7: 0.7}), "blocks 0 to 2"),
        (lambda: small(elimination={0: 0.0}), "shares above 0"),
        (lambda: small(elimination={0: 70}), "up to 1"),
        (lambda: small(width=-1), "0 or more"),
        (lambda: SingleStream(small_tracker(), 2), "stream"),
        (lambda: OSTrack(small_tracker().vit, template=30), "multiples of the patch size 8"),
        # the released names have one adapter for both directions
        (lambda: small(shared=False).to_official(), "shared"),
        (lambda: BAT.from_official(small().to_official(), heads=2, shared=False), "shared"),
    )


@pytest.mark.parametrize("kind", [small, lambda: HigherPeak(small_tracker()), lambda: SingleStream(small_tracker(), 1)])
def test_bad_images(kind):
    model, (z, x) = kind(), crops()
    for given in ((z[:, :3], x), (z, x[:, :3]), (z, z), (x, x), (z, x[..., :-8])):
        with pytest.raises(BadParameter, match=r"crop = \([24], "):
            model(*given)

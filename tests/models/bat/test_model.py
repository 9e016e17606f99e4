"""BAT: exchange between the streams, elimination, the loss, the baselines, and the authors' names."""

import itertools

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from companion.errors import BadCheckpoint, BadParameter, CorruptFile, MissingWeights
from companion.models.bat import BAT, HigherPeak, OSTrack, Prediction, SingleStream
from companion.models.bat import model as bat
from tests.models.common import assert_recomputed_gradients_are_equal, draw, misfits, refuses

DEPTH = 3
BOXES = torch.tensor([[0.3, 0.35, 0.25, 0.2], [0.1, 0.5, 0.3, 0.3]])


def small_tracker() -> OSTrack:
    """OSTrack with all its parts, the unused class token and table too, at 3 blocks of width 64."""
    torch.manual_seed(0)
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": DEPTH, "num_heads": 2, "mlp_ratio": 2}
    vit = VisionTransformer(**sizes, num_classes=0, global_pool="")
    tracker = OSTrack(vit, template=32, search=64, head_channels=16).eval()
    for module in tracker.head.modules():  # statistics that a wrong mode would change
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 2)
    return tracker


def small(std: float = 0.3, width: int = 4, **options) -> BAT:
    """BAT whose adapters, at std 0.3, change the output visibly; in eval mode."""
    tracker = small_tracker()
    torch.manual_seed(1)
    model = BAT(tracker, width, std=std, **options).eval()
    for name, p in model.exchanges.named_parameters():
        if name.endswith("bias") and std:
            torch.nn.init.normal_(p, std=0.1)
    return model


def crops(count: int = 2) -> tuple[Tensor, Tensor]:
    return draw(count, 6, 32, 32, seed=2), draw(count, 6, 64, 64, seed=3)


def swapped(images: Tensor) -> Tensor:
    return torch.cat(images.chunk(2, 1)[::-1], 1)


def gap(a: Prediction, b: Prediction) -> float:
    """The largest difference of two predictions' maps; a box is read at a peak, which may change with rounding."""
    return max(float((x - y).detach().abs().max()) for x, y in zip(a[:3], b[:3], strict=True))


def loss(model, batch):
    template, search, boxes = batch
    return bat.losses(model(template, search), boxes)["loss"]


@pytest.mark.parametrize("options", [{}, dict(elimination={0: 0.7}), dict(tuned="all")], ids=str)
def test_gradients_come_where_training_is_and_recomputed_ones_are_equal(options):
    model = small(**options).train()
    loss(model, (*crops(), BOXES)).backward()
    got = {name for name, p in model.named_parameters() if p.grad is not None}
    expected = {n for n, _ in model.named_parameters() if n.startswith("exchanges.") or "tuned" in options}
    assert got == set(model.trained()) == expected - {"tracker.vit.cls_token", "tracker.vit.pos_embed"}
    assert_recomputed_gradients_are_equal(lambda: small(**options), lambda m: loss(m, (*crops(), BOXES)))


def test_training_mode_keeps_the_heads_statistics_and_draws_dropout():
    model = BAT(small_tracker(), 4, std=0.3).train()
    assert not any(module.training for module in model.tracker.head.modules())
    assert model.tracker.vit.blocks[1].training and gap(model(*crops()), model(*crops())) > 0
    model.eval()
    assert gap(model(*crops()), model(*crops())) == 0


def test_half_precision_knows_no_certainty():
    """A score of 1 where the target is not would cost infinitely much; 1 - 1e-4 is 1 in half precision."""
    model = small()
    with torch.no_grad():
        for branch in (model.tracker.head.ctr, model.tracker.head.size):
            branch[-1].bias.fill_(12.0)  # certain at every position
    with torch.autocast("cpu", torch.bfloat16):
        found = model(*crops())
        value = bat.losses(found, BOXES)["loss"]
    assert all(part.dtype == torch.float32 for part in found) and max(found.score.max(), found.size.max()) < 1
    value.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.trained().values())


@pytest.mark.parametrize("tuned", ["adapters", "all"])
def test_the_callers_tracker_stays_as_it_was(tuned):
    tracker = small_tracker().train()
    before = {name: value.clone() for name, value in tracker.state_dict().items()}
    model, *frozen = BAT(tracker, 4, tuned=tuned).train(), SingleStream(tracker, 0), HigherPeak(tracker)
    loss(model, (*crops(), BOXES)).backward()
    torch.optim.SGD(model.trained().values(), lr=1.0).step()
    assert all(p.requires_grad and p.grad is None for p in tracker.parameters()) and tracker.head.training
    assert all(torch.equal(value, before[name]) for name, value in tracker.state_dict().items())
    assert not any(p.requires_grad for model in frozen for p in model.parameters())


@pytest.mark.parametrize("options", [{}, dict(fusion="mean"), dict(stages=("mlp",)), dict(tuned="all")], ids=str)
@torch.no_grad()
def test_no_stream_is_the_main_one(options):
    """Claim 2: swapping the streams of both crops changes nothing."""
    model = small(**options)
    template, search = crops()
    found = model(template, search)
    assert gap(found, model(swapped(template), swapped(search))) < 1e-5
    # and not because the streams do not matter
    assert gap(found, model(template, swapped(search))) > 1e-3


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
    both = tracker.vit.norm(a) + tracker.vit.norm(b)
    return both if model.fusion == "sum" else both / 2


OPTIONS = [
    dict(directions=d, shared=s, stages=t)
    for d, s, t in itertools.product(bat.DIRECTIONS, (True, False), (bat.STAGES, ("attention",), ("mlp",)))
]


# without adapters the features are the sum of two trackers (claim 3)
@pytest.mark.parametrize("options", [*OPTIONS, dict(fusion="mean"), dict(width=0), dict(std=0)], ids=str)
@torch.no_grad()
def test_one_batch_is_the_two_passes(options):
    model, (template, search) = small(**options), crops()
    found = model.forward_features(model.embed_template(template), search)
    torch.testing.assert_close(found, two_passes(model, template, search), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_trace_shows_the_pass_and_does_not_change_it():
    model, (template, search), trace = small(stages=("mlp",)), crops(), {}
    assert gap(model(template, search), model(template, search, trace)) == 0
    assert {key: len(entries) for key, entries in trace.items()} == dict.fromkeys(
        ("tokens", "attention", "traffic", "kept"), DEPTH
    )
    assert trace["attention"][0].shape == (4, 2, 64) and (trace["attention"][0].sum(-1) < 1).all()
    # the norm of what a token receives over that of the frozen MLP's output
    block, x = model.tracker.vit.blocks[1], trace["tokens"][0]
    h = x + bat.attend(block.attn, block.norm1(x))[0]
    h = block.norm2(h)
    received = model.exchanges[1]["mlp"].adapters[0](torch.cat(h.chunk(2)[::-1]))
    expected = {"mlp": received.norm(dim=-1) / block.mlp(h).norm(dim=-1)}
    torch.testing.assert_close(trace["traffic"][1], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("side", "index"), [(64, 27), (48, 14), (56, 24)])
def test_the_template_centre_is_ostracks(side, index):
    """Of 8x8, 6x6 and 7x7 tokens."""
    with torch.device("meta"):
        vit = VisionTransformer(img_size=16, patch_size=8, embed_dim=8, depth=1, num_heads=1)
        assert OSTrack(vit, template=side, search=64).centre == index


@torch.no_grad()
def test_eliminated_tokens_come_back_as_zeros_at_their_places():
    """OSTrack keeps 0.7 three times: 64 -> 45 -> 32 -> 23 of the search."""
    model, (template, search), trace = small(width=0, elimination={0: 0.7, 1: 0.7, 2: 0.7}), crops(), {}
    found = model.forward_features(model.embed_template(template), search, trace)
    assert [entry.shape for entry in trace["kept"]] == [(4, 45), (4, 32), (4, 23)]
    kept, last = trace["kept"][-1], model.tracker.vit.norm(trace["tokens"][-1])
    expected = torch.zeros(4, 64, 64)
    for row, (places, values) in enumerate(zip(kept, last[:, 16:], strict=True)):
        assert len(set(places.tolist())) == 23
        expected[row, places] = values
    torch.testing.assert_close(found[:, 16:], expected[:2] + expected[2:])
    # a share of 1 removes nothing
    none, ones = (small(elimination=e)(template, search) for e in ({}, {0: 1.0, 2: 1.0}))
    assert gap(none, ones) < 1e-5


@torch.no_grad()
def test_the_baselines_are_the_tracker_on_one_stream_or_on_the_one_with_the_higher_peak():
    tracker, (template, search) = small_tracker(), crops(8)
    each = [tracker(z, x) for z, x in zip(template.chunk(2, 1), search.chunk(2, 1), strict=True)]
    for stream, expected in enumerate(each):
        assert gap(SingleStream(tracker, stream).eval()(template, search), expected) < 1e-5
    assert gap(*each) > 1e-3
    first, second = (one.score.flatten(1).amax(1) for one in each)
    assert (first - second).abs().min() > 1e-5 and 0 < (second > first).sum() < 8, "both streams win somewhere"
    chosen = Prediction(*(torch.stack([(a, b)[i][n] for n, i in enumerate((second > first).tolist())])
                          for a, b in zip(*each, strict=True)))  # fmt: skip
    assert gap(HigherPeak(tracker).eval()(template, search), chosen) < 1e-5


def test_official_names_round_trip_at_other_sizes(tmp_path):
    torch.manual_seed(0)
    vit = VisionTransformer(img_size=24, patch_size=4, embed_dim=128, depth=2, mlp_ratio=3, num_heads=2, num_classes=0)
    tracker = OSTrack(vit, template=16, search=24, head_channels=32).eval()
    model = BAT(tracker, width=3, std=0.3).eval()
    official = model.to_official()
    names = ("blocks.1.adap_t.adapter_down.weight", "blocks.0.adap2_t.adapter_up.bias", "pos_embed_z", "cls_token")
    names = {*(f"backbone.{n}" for n in names), "box_head.conv4_size.1.running_var", "box_head.conv5_ctr.weight"}
    assert names <= official.keys()
    counted = {n: v for n, v in official.items() if not n.endswith("num_batches_tracked")}  # may be absent
    images = draw(2, 6, 16, 16), draw(2, 6, 24, 24)
    for state in (official, counted):
        again = BAT.from_official(state)  # one head for every 64 channels
        assert gap(model(*images), again(*images)) == 0 and not again.training
    # OSTrack's trainer writes the weights under `net`, next to other entries
    torch.save({"epoch": 300, "net": tracker.to_official(), "stats": {"loss": 0.1}}, tmp_path / "ep0300.pth.tar")
    first = [x[:, :3] for x in images]
    assert gap(tracker(*first), bat.foundation(tmp_path / "ep0300.pth.tar")(*first)) == 0


def test_checkpoints_that_do_not_fit_are_refused(tmp_path):
    state = small().to_official()
    state |= {"backbone.extra": torch.zeros(1), "box_head.conv5_ctr.bias": torch.zeros(3)}
    del state["backbone.blocks.1.adap_t.adapter_mid.bias"], state["backbone.norm.weight"]
    missing, unknown, shapes = misfits(BAT.from_official, state, heads=2)
    assert missing == ["backbone.blocks.1.adap_t.adapter_mid.bias", "backbone.norm.weight"]
    assert unknown == ["backbone.extra"] and len(shapes) == 1 and shapes[0].startswith("box_head.conv5_ctr.bias")
    plain = small_tracker().to_official()
    torch.save({"net": {"fc.weight": torch.zeros(2)}}, tmp_path / "resnet.pth")
    refuses(
        (lambda: BAT.from_official(plain, heads=2), r"OSTrack\.from_official"),
        (lambda: OSTrack.from_official(small().to_official(), heads=2), "adap_t"),
        (lambda: bat.foundation(tmp_path / "resnet.pth"), "pos_embed_z"),
        error=BadCheckpoint,
    )
    refuses((bat.foundation, r"OSTrack_ep0300\.pth\.tar"), error=MissingWeights)
    refuses((lambda: bat.foundation(tmp_path / "nowhere.pth"), "nowhere"), error=CorruptFile)


def test_bad_options_and_crops_are_refused():
    z, x = crops()
    refuses(
        (lambda: small(directions="sideways"), "'both', 'first to second', 'second to first'"),
        (lambda: small(stages="attention"), "'attention', 'mlp'"),
        (lambda: small(elimination={7: 0.7}), "0 to 2"),
        (lambda: small(elimination={0: 70}), "up to 1"),
        (lambda: OSTrack(small_tracker().vit, template=30), "30"),
        # the released names have one adapter for both directions
        (lambda: small(shared=False).to_official(), "shared"),
    )
    for model in (small(), HigherPeak(small_tracker()), SingleStream(small_tracker(), 1)):
        for given in ((z[:, :3], x), (x, x), (z, x[..., :-8])):
            with pytest.raises(BadParameter):
                model(*given)

"""DMT (a reconstruction): counts, what is exact, gradients, variants, checkpoints, and what it says about bad input."""

import copy
import itertools

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch.nn import functional as F

from companion.errors import BadCheckpoint, BadParameter
from companion.models.dmt import model as dmt
from companion.models.dmt.model import DMT, Teachers, ViT
from companion.training import fit


def teachers(count=3, **options):
    torch.manual_seed(1)
    tables = {"MAE": "mae", "MoCo v3": "mocov3", "iBOT": "learned"}
    models = {name: dmt.build("pocket teacher", positions=kind) for name, kind in list(tables.items())[:count]}
    return Teachers(models, **options)


def student(**options):
    torch.manual_seed(2)
    return dmt.build("pocket", **options)


def model(count=3, *, taught_by=None, **options):
    taught_by = taught_by or teachers(count)
    torch.manual_seed(3)
    return DMT(student(), taught_by, **{"mask_ratio": 0.5, "decoder": "pocket", **options})


@pytest.fixture
def images():
    return torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def noise():
    return torch.rand(4, 16, generator=torch.Generator().manual_seed(1))


def total(module, trained=False):
    return sum(p.numel() for p in module.parameters() if p.requires_grad or not trained)


# --- counts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "whole", "headed", "trained"),
    [
        ("tiny", 5_524_416, 5_717_416, 5_486_592),
        ("small", 21_665_664, 22_050_664, 21_590_016),
        ("base", 85_798_656, 86_567_656, 85_647_360),
    ],
)
def test_sizes(size, whole, headed, trained):
    with torch.device("meta"):
        vit = dmt.build(size, positions="learned")
        assert total(vit) == whole and total(vit) + 1000 * (vit.width + 1) == headed
        assert total(dmt.build(size), trained=True) == trained  # without the fixed table


def test_a_quarter_of_the_patches_is_seen():
    assert dmt.visible(196, 0.75) == 49
    with pytest.raises(BadParameter, match="mask_ratio"):
        dmt.visible(196, 1.0)
    with pytest.raises(BadParameter, match="leaves a patch"):
        dmt.visible(4, 0.9)


# --- one ViT ----------------------------------------------------------------------------------------------------------


def test_it_is_timms_vit(images):
    vit = student(positions="learned").eval()
    theirs = VisionTransformer(32, 8, embed_dim=32, depth=2, num_heads=4, num_classes=0, global_pool="").eval()
    theirs.load_state_dict(vit.state_dict())
    assert torch.allclose(vit(images), theirs(images), atol=1e-6)


@pytest.mark.parametrize(("width", "side"), [(768, 14), (48, 4), (32, 7)])
def test_the_two_tables_are_each_other_with_halves_exchanged(width, side):
    mae, moco = (dmt.position_table(width, side, kind) for kind in ("mae", "mocov3"))
    swapped = torch.cat([mae[..., width // 2 :], mae[..., : width // 2]], -1)
    assert torch.equal(swapped, moco) and not torch.allclose(mae, moco)
    assert not mae[:, 0].any()
    square = mae[0, 1:].unflatten(0, (side, side))
    assert torch.equal(square.transpose(0, 1).flatten(0, 1), moco[0, 1:])


def test_dropped_patches_do_not_matter_and_their_order_does_not_either(images, noise):
    vit, keep = student().eval(), noise.argsort(1)[:, :8]
    seen = vit(images, keep)
    changed = images.clone()
    gone = torch.ones(4, 16).scatter(1, keep, 0).unflatten(1, (4, 4))
    changed += 10 * F.interpolate(gone[:, None], scale_factor=8)
    assert torch.equal(vit(changed, keep), seen)
    other = torch.randperm(8)
    assert torch.allclose(vit(images, keep[:, other])[:, 1:], seen[:, 1:][:, other], atol=1e-5)
    everything = torch.arange(16).expand(4, -1)
    assert torch.allclose(vit(images, everything), vit(images), atol=1e-6)


def test_masked_patches_are_replaced(images):
    vit = student(masked=True).eval()
    masked = torch.zeros(4, 16, dtype=torch.bool)
    assert torch.equal(vit(images, masked=masked), vit(images))
    masked[:, 3] = True
    changed = images.clone()
    changed[:, :, :8, 24:] = 7.0  # patch 3, the last of the first row
    assert torch.equal(vit(images, masked=masked), vit(changed, masked=masked))
    assert not torch.allclose(vit(images), vit(changed))
    with pytest.raises(BadParameter, match="masked"):
        student()(images, masked=masked)


def test_hidden_layers_and_attention(images):
    vit = student().eval()
    first, last = vit.hidden(images, (0, 1))
    assert torch.equal(vit.hidden(images, (-2,))[0], first) and torch.equal(vit.norm(last), vit(images))
    rows = vit.attention(images)
    assert rows.shape == (4, 4, 16) and (rows.sum(-1) < 1).all()
    q, k, _ = vit.qkv(first)
    assert torch.allclose(rows, (q @ k.mT / 8**0.5).softmax(-1)[:, :, 0, 1:])
    assert vit.attention(images, 0).shape == (4, 4, 16)
    assert vit.features(images).shape == (4, 64)
    with pytest.raises(BadParameter, match="layers"):
        vit.hidden(images, (2,))


@pytest.mark.parametrize("positions", dmt.POSITIONS)
def test_other_sizes(positions):
    vit = student(positions=positions)
    assert vit(torch.rand(2, 3, 48, 64)).shape == (2, 1 + 6 * 8, 32)
    for shape in [(2, 3, 30, 32), (2, 1, 32, 32), (3, 32, 32)]:
        with pytest.raises(BadParameter, match="images"):
            vit(torch.rand(shape))


def test_bad_sizes():
    for name, value in [("image", 33), ("heads", 5), ("last_heads", 5), ("positions", "x")]:
        with pytest.raises(BadParameter, match=name.removeprefix("last_")):
            student(**{name: value})
    with pytest.raises(BadParameter, match="size"):
        dmt.build("huge")


# --- released names ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", dmt.POSITIONS)
@pytest.mark.parametrize("prefix", ["", "module.", "module.base_encoder.", "backbone.", "module.backbone."])
def test_official_names_there_and_back(prefix, kind, images):
    vit = student(positions=kind, masked=kind == "learned").eval()
    state = vit.to_official(prefix)
    others = {"head.0.weight": torch.ones(2), "head.mlp.0.weight": torch.ones(2, 2)}
    state |= {prefix + name: value for name, value in others.items()}
    if "base_encoder" in prefix:
        state["module.momentum_encoder.cls_token"] = state["module.predictor.0.weight"] = torch.ones(2)
    loaded = ViT.from_official(state, heads=4)
    assert loaded.positions == kind and not loaded.training
    assert torch.equal(loaded(images), vit(images))


def test_a_checkpoint_that_does_not_fit():
    state = student().to_official()
    with pytest.raises(BadCheckpoint, match="pos_embed"):
        ViT.from_official({name: value for name, value in state.items() if name != "pos_embed"})
    state["blocks.1.attn.typo"] = state.pop("blocks.1.attn.proj.bias")
    with pytest.raises(BadCheckpoint) as caught:
        ViT.from_official(state, heads=4)
    assert caught.value.missing == ["blocks.1.attn.proj.bias"] and caught.value.unknown == ["blocks.1.attn.typo"]


# --- targets ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["ln", "channel"])
@pytest.mark.parametrize("fusion", dmt.FUSIONS)
@pytest.mark.parametrize("scale", [0.01, 1000.0])
def test_a_teachers_scale_does_not_matter(norm, fusion, scale, images, noise):
    distil = model(target_norm=norm, fusion=fusion)
    taught = distil.teachers(images)
    louder = [taught.tokens[0] * scale, *taught.tokens[1:]]
    one, other = distil(images, taught, noise), distil(images, louder, noise)
    assert torch.allclose(one.total, other.total, rtol=1e-3)
    plain = model(target_norm="none", fusion=fusion)
    assert abs(plain(images, louder, noise).total / plain(images, taught, noise).total - 1) > 0.05


def test_channel_targets_have_unit_channels(images):
    distil = model(target_norm="channel")
    for target in distil.targets(distil.teachers(images)):
        assert torch.allclose(target.mean((0, 1)), torch.zeros(48), atol=1e-5)
        assert torch.allclose(target.square().mean((0, 1)), torch.ones(48), atol=1e-3)


def test_running_statistics_reach_those_of_the_data_and_are_used_in_eval(images):
    torch.manual_seed(0)
    norm, tokens = dmt.TargetNorm(8, "channel", "running"), 3 + torch.randn(64, 5, 8) * torch.arange(1, 9)
    norm.train()
    for batch in tokens.split(8):
        norm(batch)
    plain = F.layer_norm(tokens, (8,), eps=1e-6)
    assert torch.allclose(norm.mean, plain.mean((0, 1)), atol=1e-5)
    norm.eval()
    assert torch.equal(norm(tokens[:1]), norm(tokens)[:1])  # of other pictures nothing depends
    assert set(norm.state_dict()) == {"mean", "square", "batches"}
    assert not dmt.TargetNorm(8, "channel").state_dict()


def test_bad_targets(images):
    for options, word in [({"kind": "x"}, "target_norm"), ({"statistics": "x"}, "statistics")]:
        with pytest.raises(BadParameter, match=word):
            dmt.TargetNorm(8, **options)
    distil = model()
    with pytest.raises(BadParameter, match="taught"):
        distil.targets(distil.teachers(images).tokens[:2])


# --- losses -----------------------------------------------------------------------------------------------------------


def test_by_hand(images, noise):
    distil, trace = model(weights=(1, 2, 0.5), token=0.7, map=1.3, target_norm="ln"), {}
    losses = distil(images, noise=noise, trace=trace)
    keep = noise.argsort(1)[:, :8]
    z = distil.student(images, keep)
    expected = 0
    for k, (teacher, weight) in enumerate(zip(distil.teachers.models.values(), (1, 2, 0.5), strict=True)):
        y = teacher.hidden(images)[0]
        t = (y - y.mean(-1, keepdim=True)) / (y.var(-1, correction=0, keepdim=True) + 1e-6).sqrt()
        at = torch.cat([t[:, :1], torch.stack([t[b, 1 + keep[b]] for b in range(4)])], 1)
        d = (distil.adapters[k](z) - at).abs()
        token = torch.where(d < 2, d**2 / 4, d - 1).mean()
        d = (trace["maps"][k] - t).abs()
        mapped = torch.where(d < 2, d**2 / 4, d - 1).mean()
        assert torch.allclose(losses.token[k], token, rtol=1e-4) and torch.allclose(losses.map[k], mapped, rtol=1e-4)
        expected += weight * (0.7 * token + 1.3 * mapped) / 3
    assert torch.allclose(losses.total, expected, rtol=1e-4)


def test_relations_by_hand():
    torch.manual_seed(0)
    s, t = torch.randn(3, 2, 4, 5, 6), torch.randn(3, 2, 4, 5, 12)
    for i, loss in zip((0, 2), dmt.relation_loss(s, t), strict=True):
        j = 1 if i == 0 else 2
        p, q = (((x[i] @ x[j].mT) / x.shape[-1] ** 0.5).softmax(-1) for x in (t, s))
        assert torch.allclose(loss, (p * (p / q).log()).sum(-1).mean(), rtol=1e-4)


@pytest.mark.parametrize("view", dmt.VIEWS)
@pytest.mark.parametrize("fusion", dmt.FUSIONS)
def test_one_teacher_makes_all_fusions_the_same(view, fusion, images, noise):
    one = model(taught_by=teachers(1, view=view))
    other = model(taught_by=teachers(1, view=view), fusion=fusion)
    assert torch.equal(one(images, noise=noise).total, other(images, noise=noise).total)


def test_identical_teachers_give_the_encoder_the_gradient_of_one(images, noise):
    single = model(1)
    same = Teachers({name: copy.deepcopy(single.teachers.models["MAE"]) for name in "abc"})
    three = model(taught_by=same)
    three.decoder.load_state_dict(single.decoder.state_dict())
    for heads, own in ((three.adapters, single.adapters), (three.map_heads, single.map_heads)):
        for head in heads:
            head.load_state_dict(own[0].state_dict())
    for each in (single, three):
        each(images, noise=noise).total.backward()
    for p, q in zip(single.student.parameters(), three.student.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None)
        assert p.grad is None or torch.allclose(p.grad, q.grad, atol=1e-7)


def test_fused_targets_of_teachers_of_other_widths(images, noise):
    torch.manual_seed(5)
    mixed = Teachers({"narrow": dmt.build("pocket", width=32), "wide": dmt.build("pocket", width=64)})
    distil = model(taught_by=mixed, fusion="mean", target_norm="ln")
    narrow, wide = distil.targets(distil.teachers(images))
    assert narrow.shape == wide.shape == (4, 17, 64)
    plain = F.layer_norm(mixed(images).tokens[0], (32,), eps=1e-6)
    # the fixed matrix keeps angles
    assert torch.allclose(
        F.normalize(narrow, dim=-1) @ F.normalize(narrow, dim=-1).mT,
        F.normalize(plain, dim=-1) @ F.normalize(plain, dim=-1).mT,
        atol=1e-5,
    )
    distil(images, noise=noise).total.backward()


def test_the_gate_prefers_the_teacher_that_the_student_agrees_with(images):
    distil = model(2, fusion="gate")
    distil.weights = (1.0, 1.0)
    a, b = torch.randn(2, 1, 3, 48)
    fused = distil.fuse([a + 0.5 * b, b + 0.5 * a], a)
    assert (F.cosine_similarity(fused, a + 0.5 * b, dim=-1) > F.cosine_similarity(fused, b + 0.5 * a, dim=-1)).all()
    distil.fusion = "mean"
    assert torch.allclose(distil.fuse([a, b], a), (a + b) / 2)


@pytest.mark.parametrize(
    ("view", "fusion", "region", "relation"),
    [
        case
        for case in itertools.product(dmt.VIEWS, dmt.FUSIONS, dmt.REGIONS, (0, 1))
        if case[::2] != ("same", "removed")
    ],
)
def test_every_variant_trains_only_what_it_should(view, fusion, region, relation, images):
    distil = model(taught_by=teachers(view=view), fusion=fusion, map_region=region, relation=relation)
    losses = distil(images)
    losses.total.backward()
    assert torch.isfinite(losses.total) and losses.relation.shape == (3,)
    assert losses.token.shape == losses.map.shape == ((3,) if fusion == "separate" else (1,))
    trained = {name for name, p in distil.named_parameters() if p.grad is not None and p.grad.any()}
    frozen = {name for name, p in distil.named_parameters() if not p.requires_grad}
    assert frozen == {
        "student.pos_embed",
        "decoder.pos_embed",
        *(f"teachers.{n}" for n, _ in distil.teachers.named_parameters()),
    }
    assert trained == {name for name, p in distil.named_parameters() if p.requires_grad}
    assert set(fit.trained_state(distil)) == trained


def test_what_weighs_nothing_is_not_built(images):
    assert model(token=0).adapters is None
    only = model(map=0)
    assert only.decoder is None and only.map_heads is None
    losses = only(images)
    assert torch.allclose(losses.total, losses.token.mean()) and not losses.map.any()


def test_teachers_run_once_without_autograd_and_see_what_they_should(images):
    distil = model(taught_by=teachers(sees={"MoCo v3": dmt.grey}))
    calls = []
    for name, teacher in distil.teachers.models.items():
        teacher.blocks[0].register_forward_hook(lambda m, i, o, name=name: calls.append((name, o.requires_grad)))
    distil.train()
    assert distil.student.training and not distil.teachers.models["MAE"].training
    distil(images)
    assert calls == [("MAE", False), ("MoCo v3", False), ("iBOT", False)]
    red = images.clone()
    red[:, 0] += 0.1
    red[:, 1] -= 0.1 * 0.299 / 0.587
    one, other = distil.teachers(images).tokens, distil.teachers(red).tokens
    assert torch.allclose(one[1], other[1], atol=1e-4) and not torch.allclose(one[0], other[0], atol=1e-2)


def test_lighter_views_are_supersets(images, noise):
    some = teachers(view="lighter")
    assert some.counts(16, 8) == (11, 13, 16)
    assert teachers(view="lighter", shares=(0.1, 0.75, 1)).counts(16, 8) == (8, 12, 16)
    tokens = some(images, noise.argsort(1), 8).tokens
    assert [t.shape[1] for t in tokens] == [12, 14, 17]
    with pytest.raises(BadParameter, match="order"):
        some(images)


def test_other_layers_are_targets_too(images):
    first = teachers(layer=0)
    assert torch.equal(first(images).tokens[0], first.models["MAE"].hidden(images, (0,))[0])
    assert first(images, relations=True).qkv[0].shape == (3, 4, 4, 17, 12)


def test_the_student_alone_is_kept(images):
    distil = model().eval()
    kept = distil.export()
    assert set(kept.state_dict()) == set(student().state_dict())
    assert torch.equal(kept(images), distil.student(images)) and kept is not distil.student


def test_a_killed_training_resumes_to_the_same_bits(images, tmp_path):
    data = torch.utils.data.TensorDataset(images.repeat(4, 1, 1, 1))

    def train(name, epochs=3, **options):
        distil = model(target_norm="channel", statistics="running")
        settings = {"epochs": epochs, "batch": 4, "lr": 1e-3, "accelerator": "cpu", "warmup": 0}
        fit.fit(distil, lambda m, b: m(b[0]).total, data, **settings, checkpoint=tmp_path / name, **options)
        return distil

    whole = train("whole.pt")

    class Killed(Exception):
        pass

    steps = []

    def killed(m, b):
        steps.append(0)
        if len(steps) == 8:
            raise Killed
        return m(b[0]).total

    distil = model(target_norm="channel", statistics="running")
    with pytest.raises(Killed):
        fit.fit(
            distil,
            killed,
            data,
            epochs=3,
            batch=4,
            lr=1e-3,
            accelerator="cpu",
            warmup=0,
            checkpoint_every=5,
            checkpoint=tmp_path / "killed.pt",
        )
    resumed = train("killed.pt", resume=True)
    for (name, p), q in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(p, q), name


@pytest.mark.parametrize("fusion", dmt.FUSIONS)
def test_it_trains_in_bfloat16_too(fusion, images):
    data, losses = torch.utils.data.TensorDataset(images), []
    for precision in ("32-true", "bf16-mixed"):
        distil = model(fusion=fusion, relation=1)
        rows = fit.fit(
            distil, dmt.loss, data, epochs=2, batch=4, lr=1e-3, warmup=0, accelerator="cpu", precision=precision
        )
        losses.append([row["loss"] for row in rows])
    assert losses[0] == pytest.approx(losses[1], rel=0.02)


def test_bad_options():
    wide = teachers()
    for options, word in [
        ({"fusion": "sum"}, "fusion"),
        ({"map_region": "x"}, "map_region"),
        ({"weights": (1, 2)}, "weights"),
        ({"weights": (0, 0, 0)}, "weights"),
        ({"token": 0, "map": 0}, "token, map, relation"),
        ({"token": -1}, "token, map, relation"),
        ({"mask_ratio": 0, "map_region": "removed"}, "map_region"),
        ({"taught_by": teachers(view="same"), "map_region": "removed"}, "map_region"),
        ({"decoder": "huge"}, "decoder"),
        ({"taught_by": (48, 48, 48), "relation": 1}, "relation"),
    ]:
        with pytest.raises(BadParameter, match=word):
            model(**options)
    with pytest.raises(BadParameter, match="last_heads"):
        DMT(student(last_heads=2), wide, relation=1, decoder="pocket")
    with pytest.raises(BadParameter, match="patches"):
        DMT(student(image=64), wide, decoder="pocket")
    with pytest.raises(BadParameter, match="taught"):
        DMT(student(), wide.widths, decoder="pocket")(torch.rand(1, 3, 32, 32))
    with pytest.raises(BadParameter, match="teachers"):
        DMT(student(), (), decoder="pocket")


def test_bad_teachers():
    some = dict(teachers().models)
    for options, word in [
        ({"view": "half"}, "teacher_view"),
        ({"layer": 2}, "teacher_layer"),
        ({"shares": (1, 1)}, "shares"),
        ({"sees": {"BEiT": dmt.grey}}, "sees"),
    ]:
        with pytest.raises(BadParameter, match=word):
            Teachers(some, **options)
    with pytest.raises(BadParameter, match="grid"):
        Teachers({"a": student(), "b": student(image=64)})
    with pytest.raises(BadParameter, match="teachers"):
        Teachers({})

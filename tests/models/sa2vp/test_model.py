"""SA²VP: trainable parameters, the reach of an interaction, equivalent forms of its attention, loading."""

import itertools
import math

import pytest
import torch
from timm.layers import GluMlp
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import ResPostBlock, VisionTransformer
from torch.nn import functional as F

from companion import backbones
from companion.errors import BadCheckpoint, BadParameter
from companion.evaluation.parity import Case, folder
from companion.models.layers.vpt import VPT, FineTuning, LinearProbe
from companion.models.sa2vp import SA2VP, SA2VPSwin, loss
from companion.models.sa2vp.model import DIRECTIONS, AlignedAttention, neighbourhood, padded_mask
from companion.models.sa2vp.parity import outputs
from companion.ops.files import read_json, write_json
from companion.training.fit import CPU, fit
from companion.training.schedules import adamw
from companion.viz.attention import Recorder
from tests.models.common import assert_recomputed_gradients_are_equal, misfits, numbers, refuses


def small_vit(**changes) -> VisionTransformer:
    torch.manual_seed(0)
    settings = dict(img_size=20, patch_size=4, embed_dim=24, depth=6, num_heads=3, num_classes=0) | changes
    return VisionTransformer(**settings).eval()


def small_swin(**changes) -> SwinTransformer:
    torch.manual_seed(0)
    settings = dict(
        img_size=64, embed_dim=16, depths=(1, 1, 6, 1), num_heads=(1, 2, 4, 8), window_size=2, num_classes=0
    )
    return SwinTransformer(**settings | changes).eval()


def small(swin: bool = False, **options) -> tuple[SA2VP | SA2VPSwin, torch.Tensor]:
    """A small model in eval mode, and two images for it."""
    kind, backbone, size = (SA2VPSwin, small_swin(), 64) if swin else (SA2VP, small_vit(), 20)
    return kind(backbone, 5, 4, **options).eval(), images(size)


def images(size: int = 20, count: int = 2) -> torch.Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("width", "count", "percent"),
    [(8, 202_200, 0.2351), (16, 372_912, 0.4328), (32, 714_336, 0.8257), (64, 1_397_184, 1.6024)],
)
def test_trainable_parameters_of_vit_b16(width, count, percent):
    with torch.device("meta"):
        backbone = VisionTransformer(num_classes=0)
        model, one_map = SA2VP(backbone, 200, width), SA2VP(backbone, 200, width, new_maps=1)
    assert model.count() == count == 21_339 * width + 31_488
    assert model.count(head=True) == count + 769 * 200
    assert count - one_map.count() == 965 * width + 1_536
    assert numbers(backbone) == 85_798_656 and round(100 * count / (85_798_656 + count), 4) == percent


def test_trainable_parameters_of_swin_b_and_vpt():
    with torch.device("meta"):
        backbone = SwinTransformer(embed_dim=128, depths=(2, 2, 18, 2), num_heads=(4, 8, 16, 32), num_classes=0)
        model = SA2VPSwin(backbone, 100, 8)
        deep, shallow = (VPT(backbones.build("vit_b16", "random"), 10, tokens=50, deep=d) for d in (True, False))
    assert model.count() == 201_488 == 21_714 * 8 + 27_776 and numbers(backbone) == 86_743_224
    assert [sum(p.numel() for p in one.prompts) for one in (deep, shallow)] == [12 * 50 * 768, 50 * 768]


@pytest.mark.parametrize("swin", [False, True])
def test_a_step_changes_everything_trained_and_nothing_frozen(swin):
    model, x = small(swin, dropout=0.0)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    data = torch.utils.data.TensorDataset(x.repeat(2, 1, 1, 1), torch.tensor([0, 1, 2, 3]))
    fit(model, loss, data, epochs=3, batch=4, optimizer=adamw(1e-2), hardware=CPU)
    trained = set(model.trained())
    assert not any(name.startswith("backbone.") for name in trained)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]) == (name not in trained), name


@pytest.mark.parametrize("kind", [SA2VP, SA2VPSwin, FineTuning, LinearProbe, VPT])
def test_the_backbone_of_the_caller_is_left_alone(kind):
    backbone = (small_swin() if kind is SA2VPSwin else small_vit()).train()
    model = kind(backbone, 5).eval()
    assert all(p.requires_grad for p in backbone.parameters()) and backbone.training and not model.backbone.training
    assert all(m.p == 0 for m in backbone.modules() if isinstance(m, torch.nn.Dropout))
    # what is trained has tensors of its own
    owned = {p.data_ptr() for p in model.parameters() if p.requires_grad}
    assert owned and not owned & {p.data_ptr() for p in backbone.parameters()}


def test_dropout_is_where_the_docstrings_say():
    """In the interactions of both; in the embeddings and the MLPs of the ViT alone, as in the authors' code."""
    for swin, frozen in ((False, 2 * 6), (True, 0)):
        model, _ = small(swin, dropout=0.3)
        assert model.dropout.p == 0.3 and all(adapter.dropout.p == 0.3 for adapter in model.adapters)
        dropping = [m for m in model.backbone.modules() if isinstance(m, torch.nn.Dropout) and m.p]
        assert len(dropping) == frozen and all(m.p == 0.3 for m in dropping)


@pytest.mark.parametrize(
    ("make", "frozen"),
    [(FineTuning, False), (LinearProbe, True), (VPT, True), (lambda b, c: VPT(b, c, deep=False), True)],
)
def test_baselines_train_what_they_say(make, frozen):
    for backbone, size in ((small_vit(), 20), (small_swin(), 64)):
        model = make(backbone, 5).train()
        F.cross_entropy(model(images(size)), torch.tensor([0, 1])).backward()
        assert any(p.grad is not None for p in model.backbone.parameters()) != frozen
        assert model.backbone.training != frozen
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("swin", [False, True])
def test_without_fusion_the_prediction_is_the_frozen_backbone(zeros, swin):
    """With s = 0, and with zero-initialised adapters."""
    model, x = small(swin, scale=1.5 if zeros else 0.0)
    for tensor in [t for adapter in model.adapters if zeros for t in adapter.up.parameters()]:
        torch.nn.init.zeros_(tensor)
    expected = model.head(model.backbone(x))
    torch.testing.assert_close(model(x)[0], expected, rtol=0, atol=2e-6)
    assert not torch.allclose(model(x)[1], expected, atol=1e-2)


def queries(*shape: int) -> tuple[torch.Tensor, ...]:
    """q, k, v (b, heads, N, d)."""
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(*shape, generator=generator) for _ in range(3))


def test_an_interaction_sees_its_neighbourhood_alone():
    """The gradient of one position's fusion in the other pathway is zero outside of 3x3, and not inside."""
    attention, (q, k, v) = AlignedAttention(neighbourhood((5, 5))), queries(1, 2, 26, 8)
    seen = torch.zeros(26, 26, dtype=torch.bool)
    for token in range(26):
        kv = [x.clone().requires_grad_() for x in (k, v)]
        attention(q, *kv)[0, token].sum().backward()
        seen[token] = sum(x.grad[0].abs().sum((0, 2)) for x in kv) > 0
    assert seen[0].all(), "the [CLS] token attends to every token"
    assert not seen[1:, 0].any(), "no patch attends to the [CLS] token"
    assert sorted(set(seen[1:].sum(1).tolist())) == [4, 6, 9]
    for a in range(25):
        for b in range(25):
            near = abs(a // 5 - b // 5) <= 1 and abs(a % 5 - b % 5) <= 1
            assert seen[1 + a, 1 + b] == near


def loop_attention(q, k, v, grid, padded=False):
    """The definition, a query at a time; `padded`: keys outside of the grid count as zeros."""
    rows, columns = grid
    out = torch.empty_like(q)
    for token in range(q.shape[2]):
        r, c = divmod(token - 1, columns)
        near = [1 + i * columns + j for i in range(rows) for j in range(columns) if abs(i - r) < 2 and abs(j - c) < 2]
        keys = near if token else list(range(q.shape[2]))
        logits = q[:, :, token : token + 1] @ k[:, :, keys].transpose(-2, -1) / math.sqrt(q.shape[-1])
        weights = F.pad(logits, (0, 9 - len(keys) if padded and token else 0)).softmax(-1)[..., : len(keys)]
        out[:, :, token] = (weights @ v[:, :, keys])[:, :, 0]
    return out.transpose(1, 2).flatten(2)


def test_loop_and_mask_agree_and_the_padded_variant_is_one_head_with_zero_keys_outside():
    q, k, v = queries(2, 3, 31, 8)
    ours = AlignedAttention(neighbourhood((5, 6)))(q, k, v)
    torch.testing.assert_close(loop_attention(q, k, v, (5, 6)), ours, rtol=0, atol=1e-6)
    q, k, v = queries(2, 1, 31, 24)
    mask = neighbourhood((5, 6))
    ours = AlignedAttention(padded_mask(mask, 1, class_token=True))(q, k, v)
    torch.testing.assert_close(loop_attention(q, k, v, (5, 6), padded=True), ours, rtol=0, atol=1e-6)
    split = (x.unflatten(-1, (3, 8)).squeeze(1).transpose(1, 2) for x in (q, k, v))  # the same, as three heads
    torch.testing.assert_close(AlignedAttention(padded_mask(mask, 1, class_token=True))(*split), ours)
    plain = AlignedAttention(mask)(q, k, v)
    inner = [0] + [1 + r * 6 + c for r in range(1, 4) for c in range(1, 5)]
    torch.testing.assert_close(ours[:, inner], plain[:, inner], rtol=0, atol=1e-6)
    edge = [token for token in range(31) if token not in inner]
    assert (ours[:, edge] - plain[:, edge]).abs().max() > 0.1


def naive_forward(model: SA2VP, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """3.2-3.5 line by line: own projections for the interaction, everything run for every image."""
    vit, b = model.backbone, len(x)
    image = torch.cat([vit.cls_token.expand(b, -1, -1), vit.patch_embed(x)], 1) + vit.pos_embed
    prompt = (model.prompt_proj(model.prompt) + vit.pos_embed).expand(b, -1, -1)
    for i, block in enumerate(vit.blocks):
        attn = block.attn

        def interact(kv, q, i=i, block=block, attn=attn):
            def project(y):
                return attn.qkv(block.norm1(y)).unflatten(-1, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4)

            attended = loop_attention(project(q)[0], *project(kv)[1:], model.grid)
            return model.adapters[i](q + attn.proj(attended))

        if i % model.period == 0:
            fusion, new = interact(image, prompt), block(prompt)
            if i:
                k = i // model.period - 1
                fresh = model.new_projs[k](model.new_prompts[k]).expand(b, -1, -1)
                new = new + model.gains[k] * block(fresh)
            image, prompt = block(image), new + model.scale * fusion
        else:
            fusion = interact(prompt, image)
            image, prompt = block(image) + model.scale * fusion, block(prompt)
    return tuple(model.head(vit.norm(t)[:, 0]) for t in (image, prompt))


def test_sharing_work_changes_nothing():
    model, x = small(scale=1.5)
    torch.nn.init.normal_(model.gains)
    for ours, naive in zip(model(x), naive_forward(model, x), strict=True):
        torch.testing.assert_close(ours, naive, rtol=0, atol=3e-6)


def test_an_interaction_of_the_swin_is_the_formula_with_the_released_eps():
    """On tokens of tiny variance, where an eps of 1e-6 and Swin's own 1e-5 differ."""
    model, _ = small(swin=True, scale=1.5)
    stage, (rows, columns) = model.backbone.layers[model.stage], model.grid
    image, prompt = (1e-3 * torch.randn(2, rows, columns, 64) for _ in range(2))
    for i in (0, 1):  # to the prompt, to the image
        block, to_prompt = stage.blocks[i], i == 0
        source, query = (image, prompt) if to_prompt else (prompt, image)
        q, k, v = (
            block.attn.qkv(F.layer_norm(x, (64,), block.norm1.weight, block.norm1.bias, eps).flatten(1, 2))
            .unflatten(-1, (3, 4, 16))[:, :, n]
            .transpose(1, 2)
            for n, x, eps in ((0, query, 1e-6), (1, source, 1e-6), (2, source, 1e-6))
        )
        attended = loop_attention(*(F.pad(x, (0, 0, 1, 0)) for x in (q, k, v)), model.grid)[:, 1:]
        fusion = 1.5 * model.adapters[i](query.flatten(1, 2) + block.attn.proj(attended)).view_as(query)
        expected = (block(image), block(prompt) + fusion) if to_prompt else (block(image) + fusion, block(prompt))
        for found, known in zip(model._step(i, image, prompt), expected, strict=True):
            torch.testing.assert_close(found, known, rtol=0, atol=2e-6)


def test_the_loss_weighs_the_prompt_pathway_by_a_fifth():
    target, known, unknown = torch.tensor([1, 3]), 100 * F.one_hot(torch.tensor([1, 3]), 5).float(), torch.zeros(2, 5)
    for output, expected in (((unknown, known), 0.8), ((known, unknown), 0.2), ((unknown, unknown), 1), (unknown, 1)):
        found = loss(lambda _, output=output: output, (torch.empty(2), target))
        assert found.item() == pytest.approx(expected * math.log(5))


@pytest.mark.parametrize("attention", ["aligned", "padded"])
@pytest.mark.parametrize("swin", [False, True])
def test_attention_maps_are_recorded_by_hooks(swin, attention):
    """Of every block, the last one too, and of every interaction; the outputs stay the same."""
    model, x = small(swin, attention=attention)
    with torch.no_grad():
        plain = model(x)
        with Recorder(model, also={AlignedAttention: AlignedAttention.read}) as record:
            for recorded, output in zip(model(x), plain, strict=True):
                torch.testing.assert_close(recorded, output, rtol=0, atol=2e-6)
    cross = [m for name, m in zip(record.names, record.maps, strict=True) if name == "cross"]
    blocks = {name.removeprefix("backbone.") for name in record.names} - {"cross"}
    assert len(cross) == 6 and blocks == {n for n, _ in model.backbone.named_modules() if n.endswith(".attn")}
    outside = ~neighbourhood(model.grid, class_token=not swin)
    for weights in cross:
        torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]))
        assert weights.shape[:2] == (2, {"aligned": 4 if swin else 3, "padded": 1}[attention])
        assert (weights[..., : outside.shape[1]][..., outside[: weights.shape[2]]] == 0).all()
    tokens = model.forward_intermediates(x)
    assert {t.shape for pair in tokens for t in pair} == {(2, len(outside), 64 if swin else 24)} and len(tokens) == 6
    if not swin:
        for last, features in zip(tokens[-1], model.forward_features(x), strict=True):
            torch.testing.assert_close(model.backbone.norm(last)[:, 0], features, rtol=0, atol=2e-6)


@pytest.mark.parametrize("swin", [False, True])
def test_gradient_checkpointing_changes_nothing(swin):
    labels = torch.tensor([0, 1])
    assert_recomputed_gradients_are_equal(lambda: small(swin)[0], lambda m: loss(m, (small(swin)[1], labels)))


def test_dropout_draws_for_every_image():
    """With dropout on, two copies of one image differ in both pathways; the pass still runs maps once where it can."""
    model = SA2VP(small_vit(), 5, 4, dropout=0.5).train()
    twice = images(count=1).repeat(2, 1, 1, 1)
    image, prompt = model(twice)
    assert not torch.equal(image[0], image[1]) and not torch.equal(prompt[0], prompt[1])
    quiet = SA2VP(small_vit(), 5, 4, dropout=0.5, frozen_dropout=False).train()
    assert not quiet.backbone.training and quiet.adapters[0].training


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("swin", [False, True])
def test_directions(direction, swin):
    model, x = small(swin, scale=1.5, direction=direction)
    prompted = direction in ("both", "prompt to image")
    assert torch.allclose(model(x)[0], model.head(model.backbone(x)), atol=1e-5) != prompted
    # the prompt pathway differs between images only where the image informs it
    prompt = model(x)[1]
    varies = (prompt[0] - prompt[1]).abs().max() > 1e-6
    assert varies == (direction in ("both", "image to prompt"))


def test_other_sizes_run():
    model = SA2VP(small_vit(img_size=(12, 28)), 5, 4).eval()
    assert model.grid == (3, 7)
    assert model(torch.randn(1, 3, 12, 28))[0].shape == (1, 5)


def test_official_names_round_trip_swin():
    model, x = small(swin=True)
    official = model.to_official()
    assert "vit_base.layers.1.downsample.reduction.weight" in official
    again = SA2VPSwin.from_official(official, image_size=64)
    assert all(torch.equal(a, b) for a, b in zip(model(x), again(x), strict=True))
    source, copy = (f"vit_base.layers.2.{name}.weight" for name in ("blocks.3.attn.proj", "cross_attn.3.attn.to_out"))
    with pytest.raises(BadCheckpoint, match="to_out"):
        SA2VPSwin.from_official(official | {copy: official[source] + 1}, image_size=64)


def test_official_names_round_trip_and_misfits_are_listed():
    official = dict(Case(folder() / "sa2vp" / "tiny_vit_full").state)
    again = SA2VP.from_official(official, heads=3).to_official()
    assert again.keys() == official.keys() and all(torch.equal(official[n], again[n]) for n in official)
    # copies of what is frozen are checked
    start = "vit_base.transformer.encoder."
    key, copy = official[f"{start}layer.2.attn.key.weight"], f"{start}cross_attn.2.attn.to_k.weight"
    SA2VP.from_official(official | {copy: key}, heads=3)
    with pytest.raises(BadCheckpoint, match="to_k"):
        SA2VP.from_official(official | {copy: key + 1}, heads=3)
    state = official | {"class_head.bias": torch.zeros(3), "extra": torch.zeros(1)}
    del state[f"{start}encoder_norm.weight"]
    missing, unknown, shapes = misfits(SA2VP.from_official, state, heads=3)
    assert (missing, unknown, len(shapes)) == ([f"{start}encoder_norm.weight"], ["extra"], 1)
    third = f"{start}layer.3.attn.key.weight"  # of a tensor of ours
    assert misfits(SA2VP.from_official, {n: t for n, t in official.items() if n != third}, heads=3)[0] == [third]
    for kind in (SA2VP, SA2VPSwin):
        with pytest.raises(BadCheckpoint, match="deep_ppt"):
            kind.from_official({"a": torch.zeros(1)})


def test_vits_of_another_form_are_refused_not_run_wrongly():
    """CLIP's ViTs have a norm before the blocks, DeiT-III's no position for the [CLS] token, ..."""
    forms = [{"pre_norm": True}, {"no_embed_class": True}, {"reg_tokens": 2}, {"pos_embed": "none"}]
    forms += [{"global_pool": "avg"}, {"global_pool": "avg", "class_token": False}]
    for changes, kind in itertools.product(forms, (SA2VP, VPT)):
        with pytest.raises(BadParameter, match="no norm before its blocks"):
            kind(small_vit(**changes), 5)


def test_bad_options_and_backbones():
    other = [small_vit(block_fn=ResPostBlock), small_vit(mlp_layer=GluMlp)]
    refuses(
        (lambda: SA2VP(small_vit(), 5, 4, attention="fast"), "aligned"),
        (lambda: SA2VP(small_vit(), 5, 4, direction="sideways"), "prompt to image"),
        (lambda: SA2VP(small_vit(), 5, 4, new_maps=3), "0, 1, 2"),
        (lambda: SA2VP(small_vit(), 5, 4, attention="padded", radius=None), "whole number"),
        (lambda: SA2VP(small_vit(depth=4), 5), "depth divisible by 3"),
        (lambda: SA2VP(small_vit(depth=3), 5), "depth 3.*6 or more"),
        (lambda: SA2VPSwin(small_swin(depths=(1, 1, 3, 6)), 5), r"stage = 2 .*6 blocks or more, divisible by 3: \[3\]"),
        (lambda: VPT(small_swin(window_size=3), 5), r"image size \(64, 64\).*windows of \(3, 3\).*\(16, 16\)"),
        (lambda: SA2VPSwin(small_vit(), 5), "SwinTransformer"),
        (lambda: SA2VPSwin(small_swin(), 5, stage=4), r"divisible by 3: \[2\]"),  # there is none
        (lambda: SA2VPSwin(small_swin(), 5, stage=1), r"divisible by 3: \[2\]"),  # of a single block
        (lambda: VPT(torch.nn.Linear(1, 1), 5), "timm VisionTransformer"),
        *((lambda vit=vit: SA2VP(vit, 5), "pre-norm") for vit in other),
    )
    for vit in other:
        VPT(vit, 5)(images())


def test_vpt_without_prompts_is_the_backbone():
    for backbone, size in ((small_vit(), 20), (small_swin(), 64)):
        for deep in (True, False):
            model = VPT(backbone, 5, tokens=0, deep=deep).eval()
            expected = model.head(backbone(images(size)))
            torch.testing.assert_close(model(images(size)), expected, rtol=0, atol=2e-6)


def test_deep_prompts_are_not_passed_on():
    """The next block replaces them: the MLPs and the mergings of a Swin run on the image alone."""
    calls, backbone = [], small_swin()
    for deep, expected in ((True, 1), (False, 2)):
        model = VPT(backbone, 5, deep=deep).eval()
        calls.clear()
        for part in (model.backbone.layers[0].blocks[0].mlp, model.backbone.layers[1].downsample.reduction):
            part.register_forward_hook(lambda module, *_: calls.append(module))
        model(images(64))
        assert len(calls) == 2 * expected


def test_a_parity_case_of_other_sizes_runs(tmp_path):
    """A cross-attention of 8 heads on a grid of 5 x 5, seed 3, by a loop over the queries."""
    source, dim, heads, side = folder() / "sa2vp" / "tiny_cross_attention", 64, 8, 5
    facts, names = read_json(source / "case.json"), read_json(source / "names.json")
    facts |= {"config": {"dim": dim, "heads": heads, "grid": [side, side]}, "seed": 3}
    facts["inputs"] = {"kv": [1, 1 + side**2, dim], "q": [1, 1 + side**2, dim]}
    facts["outputs"] = {"out_rows": "token rows [0, 1, 13, 25]"}
    write_json(tmp_path / "case.json", facts)
    write_json(tmp_path / "names.json", {name: [dim] * len(shape) for name, shape in names.items()})
    case = Case(tmp_path)
    linear = {x: (case.state[f"to_{x}.weight"], case.state[f"to_{x}.bias"]) for x in ("q", "k", "v", "out")}
    inputs = {"q": case.input("q"), "k": case.input("kv"), "v": case.input("kv")}
    q, k, v = (F.linear(inputs[x], *linear[x])[0].unflatten(-1, (heads, -1)).transpose(0, 1) for x in "qkv")
    rows = []
    for j in (0, 1, 13, 25):
        y, x = divmod(j - 1, side)
        near = [n for n in range(1, 26) if max(abs((n - 1) // side - y), abs((n - 1) % side - x)) <= 1]
        near = list(range(26)) if j == 0 else near
        scores = (q[:, j, None] * k[:, near]).sum(-1) / math.sqrt(dim // heads)
        rows.append((scores.softmax(-1)[..., None] * v[:, near]).sum(1).flatten())
    torch.testing.assert_close(outputs(case)["out_rows"][0], F.linear(torch.stack(rows), *linear["out"]))

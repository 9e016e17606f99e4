"""PromptPAR: counts, the formulas one image at a time, strips, effects of quirks and inert prompts, names, bad
inputs."""

import itertools

import pytest
import torch
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.nn import functional as F

from companion.errors import BadCheckpoint, BadParameter, CorruptFile
from companion.evaluation.parity import Case, folder
from companion.models.layers.clip_prompting import Texts, embed_texts
from companion.models.promptpar import Output, PromptPAR, loss, read_checkpoint
from companion.models.promptpar.model import group_sizes, prompted_text, region_mask, strips, weighted_loss
from companion.toy.datasets.tokens import Tokenizer
from tests.models.common import assert_recomputed_gradients_are_equal, draw, misfits, numbers, refuses

SENTENCES = ["a red top", "a green disc", "a large cat", "a moon at the left", "a rocket"]
GRID = (8, 4)
RATIO = torch.tensor([0.5, 0.1, 0.9, 0.02, 0.3])


def images(count: int = 2, seed: int = 1) -> torch.Tensor:
    return draw(count, 3, 64, 32, seed=seed)


def small_clip(layers: int = 3, embed: int = 32) -> CLIP:
    torch.manual_seed(3)
    vision = CLIPVisionCfg(layers, width=32, head_width=16, patch_size=8, image_size=(64, 32))
    return CLIP(embed, vision, CLIPTextCfg(16, 64, width=32, heads=2, layers=2), quick_gelu=True).eval()


def build(clip: CLIP | None = None, inner: int = 48, **changes) -> PromptPAR:
    """A model whose trained tensors are all different from their start and from each other."""
    torch.manual_seed(0)
    fusion = VisionTransformer(img_size=16, embed_dim=inner, depth=3, num_heads=4, num_classes=0)
    options = {"prompts": 10, "visual_embed": True} | changes
    model = PromptPAR(clip or small_clip(), SENTENCES, Tokenizer(), fusion, **options).eval()
    with torch.no_grad():
        for p in model.trained().values():
            p.add_(0.1 * torch.randn_like(p))
        for bn in (model.bn, model.agg_bn):
            if bn is not None:
                bn.running_mean.normal_()
                bn.running_var.uniform_(0.5, 2)
    return model


def full_size(attributes: int, embed: bool, **options) -> PromptPAR:
    """ViT-L/14 without values."""
    with torch.device("meta"):
        vision = CLIPVisionCfg(layers=24, width=1024, patch_size=14, image_size=224)
        clip = CLIP(768, vision, CLIPTextCfg(77, 49408, width=768, heads=12, layers=12), quick_gelu=True)
        texts = Texts(torch.zeros(attributes, 77, 768), torch.full((attributes,), 9, device="cpu"))
        fusion = VisionTransformer(img_size=16, embed_dim=768, depth=1, num_heads=12, num_classes=0)
        return PromptPAR(clip, texts, None, fusion, visual_embed=embed, **options)


@pytest.mark.parametrize(
    ("attributes", "embed", "trained", "total", "percent"),
    [
        (35, False, 2_822_832, 437_524_145, 0.6452),  # PETA
        (26, False, 2_567_043, 437_268_356, 0.5871),  # PA100K
        (51, False, 3_277_568, 437_978_881, 0.7483),  # RAPv1: the 0.75 % of the abstract
        (54, False, 3_362_831, 438_064_144, 0.7677),  # RAPv2
        (14, False, 2_225_991, 436_927_304, 0.5095),  # WIDER
        (35, True, 3_413_424, 438_114_737, 0.7791),
        (51, True, 3_868_160, 438_569_473, 0.8820),
    ],
)
def test_trained_parameters_at_full_size(attributes, embed, trained, total, percent):
    model = full_size(attributes, embed)
    assert model.count(inert=True) == trained
    assert numbers(model) == total
    assert round(100 * trained / total, 4) == percent
    # the text tower's prompts are a third to a half of that, and change nothing
    assert trained - model.count() == 12 * 3 * attributes * 768
    groups = {group["name"]: sum(p.numel() for p in group["params"]) for group in model.param_groups()}
    assert sum(groups.values()) == model.count()
    assert groups["heads"] == (768 * 768 + 768) * (1 + embed) + 1536 + 3072 + 769 * attributes + 2 * attributes
    if (attributes, embed) == (35, False):  # the authors' log
        assert groups["heads"] == 622_185 and groups["prompts"] + 967_680 == 2_200_647
    if (attributes, embed) == (51, False):
        assert model.count() == 1_867_520


@pytest.mark.parametrize("options", [{}, {"depth": 2}, {"regions": 0}, {"mm_layers": 0}, {"mm_layers": 2}])
def test_gradients_reach_every_trained_tensor_and_nothing_frozen(options):
    model = build(**options).train()
    loss(model(images(4)), (draw(4, 5) > 0).float(), RATIO).backward()
    trained = model.trained()
    assert all(p.grad.abs().sum() > 0 for p in trained.values() if p.numel())
    assert (model.prompts.grad.abs().sum((1, 2)) > 0).all()
    assert all(p.grad is None for n, p in model.named_parameters() if n not in trained)
    assert not {n for n in trained if n.startswith("clip.") or ".attn." in n or ".mlp." in n or n == "text_prompts"}
    assert not model.clip.training


def test_the_whole_tower_can_be_tuned():
    model = build(prompts=0, regions=0, tuned="all").train()
    loss(model(images(4)), (draw(4, 5) > 0).float(), RATIO).backward()
    tower = dict(model.clip.visual.named_parameters())
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in tower.values())
    assert {f"clip.visual.{n}" for n in tower} == {n for n in model.trained() if n.startswith("clip.")}
    prompts, _ = model.param_groups()
    assert sum(map(torch.numel, prompts["params"])) == sum(p.numel() for p in tower.values())


@pytest.mark.parametrize("options", [{}, {"prompts": 0, "regions": 0, "tuned": "all"}])
def test_the_callers_clip_stays_as_it_was(options):
    clip = small_clip().train()
    before = {name: t.clone() for name, t in clip.state_dict().items()}
    model = build(clip, **options).train()
    loss(model(images(4)), (draw(4, 5) > 0).float(), RATIO).backward()
    torch.optim.SGD(model.trained().values(), lr=1.0).step()
    assert clip.visual.training and all(p.requires_grad and p.grad is None for p in clip.parameters())
    assert all(torch.equal(t, before[name]) for name, t in clip.state_dict().items())


@pytest.mark.parametrize("options", [{}, {"depth": 2}, {"prompts": 0, "regions": 0, "tuned": "all"}])
def test_gradient_checkpointing_gives_the_same_gradients(options):
    labels = (draw(4, 5) > 0).float()
    assert_recomputed_gradients_are_equal(lambda: build(**options), lambda m: loss(m(images(4)), labels, RATIO))


def test_a_tower_without_trained_tensors_needs_no_graph_and_its_tokens_can_be_cached():
    model = build(prompts=0, regions=0)
    tokens = model.train().forward_features(images())
    assert not tokens.requires_grad and tokens.shape == (2, 33, 32)
    model.eval()
    assert torch.equal(model.forward_head(tokens).logits, model(images()).logits)
    assert model(images()).similarity is None


def test_the_last_fusion_block_is_skipped_for_some_images_while_training():
    model = build(drop_path=0.5)
    tokens = model.forward_features(images(1)).detach().expand(16, -1, -1)
    torch.testing.assert_close(model.fuse(tokens)[0], model.fuse(tokens)[1])
    torch.manual_seed(0)
    assert len(model.train().fuse(tokens)[:, 0, 0].unique()) > 1


def one_image(model: PromptPAR, image: torch.Tensor, options: dict) -> tuple[torch.Tensor, ...]:
    """Section 3 for one image: all tokens in all blocks, in the paper's layout, masked pair by pair."""
    visual, quirks = model.clip.visual, model.official_quirks
    prompts, regions = options.get("prompts", 10), options.get("regions", 4)
    sizes = group_sizes(prompts, regions)
    patches = [visual.conv1(image[None])[0, :, r, c] for r in range(GRID[0]) for c in range(GRID[1])]
    tokens = torch.stack([visual.class_embedding, *patches]) + visual.positional_embedding
    tokens = visual.ln_pre(torch.cat([tokens[:1], model.region_tokens, tokens[1:]]))
    classes, patches = list(tokens[: 1 + regions]), tokens[1 + regions :]
    current = [tokens[:0]] * (1 + regions)
    kinds = [("cls" if k == 0 else "prompt", r) for r, size in enumerate(sizes) for k in range(1 + size)]
    kinds += [("patch", i // GRID[1]) for i in range(len(patches))]
    spans = strips(GRID[0], regions, options.get("overlap", 2)) if regions else []
    mask = torch.zeros(len(kinds), len(kinds))
    for q, (kind, r) in enumerate(kinds):
        if kind == "patch" or r == 0 or not options.get("masked", True):
            continue
        for k, (other, s) in enumerate(kinds):
            seen = spans[r - 1][0] <= s < spans[r - 1][1] if other == "patch" else s == r
            if not seen:
                mask[q, k] = -torch.inf
    for layer, block in enumerate(visual.transformer.resblocks):
        if layer < len(model.prompts):
            current = list(model.prompts[layer].split(sizes))
        sequence = [x for r in range(1 + regions) for x in (classes[r][None], current[r])]
        x = block(torch.cat([*sequence, patches])[None], attn_mask=mask)[0]
        at = 0
        for r, size in enumerate(sizes):
            classes[r], current[r] = x[at], x[at + 1 : at + 1 + size]
            at += 1 + size
        patches = x[at:]
    x = (x if quirks else visual.ln_post(x)) @ visual.proj
    places = [sum(sizes[:r]) + r for r in range(1 + regions)]
    fused = torch.cat([model.word_embed(model.text_features), model.visual_embed(x)])[None]
    for block in model.blocks:
        fused = block(fused)
    fused = model.norm(fused)[0]
    logits = [model.heads.weight[i, 0] @ fused[i] + model.heads.bias[i, 0] for i in range(len(SENTENCES))]
    if quirks:
        places[0] = 1
    return x, torch.stack(logits), x[places]


@torch.no_grad()
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"official_quirks": True, "masked": False},
        {"depth": 2},
        {"depth": 1, "prompts": 7},  # groups of 2, 2, 1, 1, 1
        {"regions": 2, "overlap": 1},
        {"regions": 8, "overlap": 0, "prompts": 3},
        {"regions": 0},
        {"prompts": 0},
        {"masked": False},
        {"mm_layers": 2},
        {"visual_embed": False, "inner": 32},
    ],
)
def test_one_image_at_a_time(options):
    options = dict(options)
    model = build(**options)
    options.pop("inner", None)
    tokens = model.forward_features(images())
    logits = model.heads(model.fuse(tokens))
    for i, image in enumerate(images()):
        expected = one_image(model, image, options)
        for ours, theirs in zip((tokens[i], logits[i], tokens[i, model.class_positions]), expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model(images()).logits, model.bn(logits))


@torch.no_grad()
def test_similarity_one_number_at_a_time():
    model = build(threshold=0.4)
    regions = model.forward_features(images(3))[:, model.class_positions]
    _, shares = model.similarities(regions)
    found = model.aggregate(shares)
    for b in range(3):
        rows = []
        for region in regions[b]:
            cosines = torch.stack([F.cosine_similarity(region, text, dim=0) for text in model.text_features])
            rows.append((cosines * model.clip.logit_scale.exp() / model.temperature).softmax(0))
        for a in range(len(SENTENCES)):
            local = [row[a] for row in rows[1:]]
            picked = max(local) if max(local) > 0.4 else min(local)
            torch.testing.assert_close(found[b, a], (picked + rows[0][a]) / 2, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("rows", [4, 7, 8, 14, 16])
@pytest.mark.parametrize("overlap", [0, 1, 2, 4])
def test_strips_cover_every_row_and_neighbours_share_what_they_should(rows, overlap):
    for regions in (1, 2, 4):
        spans = strips(rows, regions, overlap)
        assert {r for a, b in spans for r in range(a, b)} == set(range(rows))
        assert spans[0][0] == 0 and spans[-1][1] == rows
        if overlap <= rows // regions:
            assert all(b - c == overlap for (_, b), (c, _) in itertools.pairwise(spans))


def test_strips_as_published_and_the_released_ones_are_right_on_16x16_patches_alone():
    assert [(a, b - 1) for a, b in strips(16, 4, 2)] == [(0, 4), (3, 8), (7, 12), (11, 15)]
    allowed = (~region_mask((16, 16), 50)).sum(1)
    assert [int(allowed[i]) for i in (0, 5, 11, 22, 33, 44, 54, 55)] == [311, 311, 91, 107, 107, 91, 91, 311]
    assert int(region_mask((16, 16), 50).sum()) == 9328
    assert torch.equal(region_mask((16, 16), 50, official_quirks=True), region_mask((16, 16), 50))
    released, ours = (region_mask((14, 14), 50, official_quirks=quirks) for quirks in (True, False))
    assert not torch.equal(released, ours)
    assert int((~released[44, 55:]).sum()) == 20  # the fourth strip keeps 20 patches of 56
    no_overlap = ~region_mask((16, 16), 50, overlap=0, official_quirks=True)[11:55:11, 55:]
    assert not no_overlap[:, 240:].any()  # the last row is in no strip


@torch.no_grad()
def test_maps_are_attention_and_stay_in_the_strips():
    model = build()
    found = model.maps(images())
    assert found.regions.shape == (2, 5, *GRID)
    assert found.attributes.shape == found.cosines.shape == (2, 5, *GRID)
    for r, (a, b) in enumerate(strips(8, 4, 2), 1):
        outside = [row for row in range(8) if not a <= row < b]
        assert (found.regions[:, r, outside] == 0).all() and (found.regions[:, r, a:b] > 0).all()
    assert (found.regions[:, 0] > 0).all() and (found.regions.sum((2, 3)) < 1).all()
    seen, fused = [], []
    tokens = model.forward_features(images(), seen)
    model.fuse(tokens, fused)
    torch.testing.assert_close(seen[0].sum(-1), torch.ones(2, 47))
    torch.testing.assert_close(fused[0].sum(-1), torch.ones(2, 5))
    assert (found.cosines.abs() <= 1 + 1e-6).all()


@torch.no_grad()
@pytest.mark.parametrize("quirks", [False, True])
def test_an_image_does_not_depend_on_its_batch_unless_as_released(quirks):
    model, batch = build(official_quirks=quirks), images(3)
    # predictions never do
    torch.testing.assert_close(model(batch).logits, model(batch.flip(0)).logits.flip(0), rtol=1e-4, atol=1e-4)
    _, shares = model.similarities(draw(3, 5, 32))
    together = model.aggregate(shares)
    alone = torch.cat([model.aggregate(share[None]) for share in shares])
    for other in (alone, model.aggregate(shares.flip(0)).flip(0)):
        assert torch.allclose(together, other, atol=1e-6) == (not quirks)
    assert torch.equal(together[-1], alone[-1])  # the last image's regions are its own


@pytest.mark.parametrize("place", ["end", "start"])
def test_prompts_after_the_text_have_no_effect_and_no_gradient(place):
    clip = small_clip()
    texts = embed_texts(Tokenizer(), clip, SENTENCES)
    prompts = draw(2, 3, len(SENTENCES), 32).requires_grad_()
    features = prompted_text(clip, texts, prompts, place)
    plain = clip.encode_text(Tokenizer()(SENTENCES))
    features.square().sum().backward()
    if place == "end":
        torch.testing.assert_close(features, plain, rtol=0, atol=1e-5)
        assert prompts.grad.abs().max() == 0
    else:
        assert (features - plain).abs().max() > 0.01
        assert (prompts.grad.abs().sum((1, 3)) > 0).all()


def test_sentences_are_read_once_and_can_be_replaced():
    clip = small_clip()
    model = build(clip)
    torch.testing.assert_close(model.text_features, clip.encode_text(Tokenizer()(SENTENCES)), rtol=0, atol=1e-5)
    assert not model.text_features.requires_grad and "text_features" not in model.state_dict()
    before = model(images()).logits
    model.set_sentences([*SENTENCES[:4], "a violet bar"], Tokenizer())
    assert not torch.equal(model(images()).logits, before)


@torch.no_grad()
def test_sentences_can_be_replaced_in_half_precision():
    model, other = build(), [*SENTENCES[:4], "a violet bar"]
    model.set_sentences(other, Tokenizer())
    expected = model.half_clip().text_features
    model.set_sentences(other, Tokenizer())
    torch.testing.assert_close(model.text_features, expected, rtol=0, atol=5e-3)
    assert model.text_features.dtype == torch.float32 and model(images()).logits.isfinite().all()
    assert model.clip.text_projection.dtype == torch.float16


def test_loss_is_a_sum_over_attributes_and_a_mean_over_images():
    logits, labels = draw(3, 5), (draw(3, 5, seed=2) > 0).float()
    expected = 0.0
    for z, y in zip(logits, labels, strict=True):
        for j in range(5):
            weight = torch.exp(1 - RATIO[j]) if y[j] else torch.exp(RATIO[j])
            p = z[j].sigmoid()
            expected += -weight * (y[j] * p.log() + (1 - y[j]) * (1 - p).log()) / 3
    torch.testing.assert_close(weighted_loss(logits, labels, RATIO), expected)
    output = Output(logits, draw(3, 5, seed=5))
    parts = [weighted_loss(x, labels, RATIO) for x in output]
    torch.testing.assert_close(loss(output, labels, RATIO), parts[0] + 0.5 * parts[1])
    assert torch.equal(loss(output, labels, RATIO, similarity=0), parts[0])
    assert torch.equal(loss(Output(logits, None), labels, RATIO), parts[0])


@torch.no_grad()
def test_half_precision_runs():
    model = build()
    with torch.autocast("cpu", torch.bfloat16):
        output = model(images())
    exact = model(images())
    torch.testing.assert_close(output.logits.float(), exact.logits, rtol=0, atol=0.2)
    assert output.similarity.isfinite().all()


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"visual_embed": False, "inner": 32}, {"mm_layers": 0}, {"regions": 0}])
def test_official_names_round_trip(options):
    model = build(official_quirks=True, **options)
    state = model.to_official()
    again = PromptPAR.from_official(state, SENTENCES, Tokenizer(), clip=small_clip(), heads=(2, 2, 4))
    assert torch.equal(again(images()).logits, model(images()).logits)
    assert all(torch.equal(again.to_official()[name], value) for name, value in state.items())
    if "regions" not in options:
        assert torch.equal(again(images()).similarity, model(images()).similarity)
        assert state["clip_model.visual.transformer.prompt_deep"].shape == (3, 10, 1, 32)
        assert state["clip_model.transformer.prompt_text_deep"].shape == (2, 3, 5, 32)
        assert state["model.weight_layer.4.weight"].shape == (1, model.norm.weight.numel())


def test_the_mlp_of_the_fusion_may_have_another_width():
    fusion = VisionTransformer(img_size=16, embed_dim=32, depth=1, num_heads=2, mlp_ratio=2.0, num_classes=0)
    model = PromptPAR(small_clip(), SENTENCES, Tokenizer(), fusion, prompts=10, official_quirks=True).eval()
    again = PromptPAR.from_official(model.to_official(), SENTENCES, Tokenizer(), clip=small_clip(), heads=(2, 2, 2))
    assert torch.equal(again(images()).logits, model(images()).logits)


def test_all_names_of_the_released_model_are_known():
    """Every tensor of the authors' model, with its shape, comes back from ours at full size."""
    case = Case(folder() / "promptpar" / "full_l14_pa100k")
    scalars = {"clip_model.logit_scale": [], "clip_model.softmax_model.temperature": []}
    ours = {n: list(t.shape) for n, t in full_size(26, True).to_official().items() if "num_batches" not in n}
    assert ours == case.names | scalars
    recorded = case.facts["trainable"]["names"]
    trained = full_size(26, True)
    official = {n: o for n, o in trained.official_names().items() if n in trained.trained()}
    names = {x.partition(".")[2] for o in official.values() for x in ([o] if isinstance(o, str) else o)}
    assert names | {"transformer.prompt_text_deep"} == set(recorded["model"]) | set(recorded["clip_model"])


def test_a_checkpoint_that_does_not_fit_lists_its_names():
    state = build().to_official()
    state |= {"model.extra": torch.zeros(1), "model.norm.bias": torch.zeros(3)}
    del state["model.weight_layer.3.bias"]
    options = {"clip": small_clip(), "heads": (2, 2, 4)}
    assert misfits(PromptPAR.from_official, state, SENTENCES, Tokenizer(), **options) == (
        ["model.weight_layer.3.bias"],
        ["model.extra"],
        ["model.norm.bias (3,), expected (48,)"],
    )
    with pytest.raises(BadCheckpoint, match=r"model\.word_embed\.weight"):
        PromptPAR.from_official({"clip_model.proj": torch.zeros(1)}, SENTENCES, Tokenizer())
    with pytest.raises(BadParameter, match="5, one for each attribute"):
        PromptPAR.from_official(build().to_official(), SENTENCES[:4], Tokenizer(), **options)


class Result(dict):
    """Stands for the EasyDict of scores that the authors' training keeps in its checkpoints."""


@pytest.mark.parametrize("entry", ["ViT_model", "clip_model"])
def test_a_file_of_the_authors_code(entry, tmp_path):
    """The released files and those that training writes name the CLIP differently; both load, half precision too."""
    model = build(official_quirks=True)
    state = model.to_official()
    parts = {p: {n.removeprefix(p): t for n, t in state.items() if n.startswith(p)} for p in ("clip_model.", "model.")}
    halved = {n: t.half() if t.is_floating_point() else t for n, t in parts["clip_model."].items()}
    saved = {"epoch": 3, entry: halved, "model_state_dict": parts["model."], "result": Result(ma=0.9)}
    torch.save(saved, tmp_path / "PETA_Checkpoint.pth")
    found = read_checkpoint(tmp_path / "PETA_Checkpoint.pth")
    assert found.keys() == state.keys()
    again = PromptPAR.from_official(found, SENTENCES, Tokenizer(), clip=small_clip(), heads=(2, 2, 4))
    torch.testing.assert_close(again(images()).logits, model(images()).logits, rtol=0, atol=0.1)
    torch.save({"state_dict": {}}, tmp_path / "other.pth")
    (tmp_path / "broken.pth").write_bytes((tmp_path / "PETA_Checkpoint.pth").read_bytes()[:2000])
    for name, words in (("other.pth", "not a checkpoint of PromptPAR"), ("broken.pth", r"broken\.pth")):
        with pytest.raises(CorruptFile, match=words):
            read_checkpoint(tmp_path / name)


def test_what_is_not_accepted():
    fusion = VisionTransformer(img_size=16, embed_dim=48, depth=1, num_heads=4, num_classes=0)
    clip, words = small_clip(), Tokenizer()
    texts, prompts = embed_texts(words, clip, SENTENCES), draw(2, 1, 5, 32)
    refuses(
        (lambda: build(prompts=-1), "prompts = -1"),
        (lambda: build(regions=9), "0 to 8"),
        (lambda: build(overlap=9), "overlap"),
        (lambda: build(depth=0), "depth"),
        (lambda: build(depth=4), "1 to 3"),
        (lambda: build(text_prompts=-1), "text_prompts"),
        (lambda: build(mm_layers=4), "0 to 3"),
        (lambda: build(threshold=1.5), "threshold"),
        (lambda: build(tuned="heads"), "'prompts', 'all'"),
        (lambda: build(visual_embed=False), "32 channels, the ViT has 48"),
        (lambda: build(official_quirks=True, prompts=7), "multiple of 5"),
        (lambda: build(official_quirks=True, regions=3), "4 regions"),
        (lambda: build(official_quirks=True, prompts=0), "multiple of 5"),
        (lambda: build(mm_layers=0).maps(images()), "mm_layers"),
        (lambda: build().set_sentences(SENTENCES[:3], words), "5, one for each attribute"),
        (lambda: PromptPAR(clip, SENTENCES, words, nn.Identity()), "timm VisionTransformer"),
        (lambda: PromptPAR(nn.Identity(), SENTENCES, words, fusion), "open_clip CLIP"),
        (lambda: PromptPAR(clip, SENTENCES, None, fusion, visual_embed=True), "tokenizer"),
        (lambda: PromptPAR(clip, [], words, fusion, visual_embed=True), "one or more names"),
        (lambda: prompted_text(clip, texts, prompts, "middle"), "'end', 'start'"),
    )

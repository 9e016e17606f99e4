"""PromptPAR: the formulas one image at a time, strips, effects of quirks and inert prompts, the authors' names."""

import copy

import pytest
import torch
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg
from open_clip.transformer import CustomResidualAttentionBlock
from timm.models.vision_transformer import ResPostBlock, VisionTransformer

import companion
from companion.errors import BadCheckpoint, CorruptFile
from companion.models.layers.clip_prompting import embed_texts
from companion.models.promptpar import PromptPAR, Settings, loss, read_checkpoint
from companion.models.promptpar.tower import region_mask, strips
from companion.toy import encoders
from companion.toy.tokens import Tokenizer
from tests.models.common import BLOCKS, EXCHANGES, assert_recomputed_gradients_are_equal, draw, misfits, refuses

SENTENCES = ["a red top", "a green disc", "a large cat", "a moon at the left", "a rocket"]
GRID = (8, 4)
RATIO = torch.tensor([0.5, 0.1, 0.9, 0.02, 0.3])


def images(count: int = 2, seed: int = 1) -> torch.Tensor:
    return draw(count, 3, 64, 32, seed=seed)


def small_clip(layers: int = 3, embed: int = 32) -> CLIP:
    torch.manual_seed(3)
    vision = CLIPVisionCfg(layers, width=32, head_width=16, patch_size=8, image_size=(64, 32))
    return CLIP(embed, vision, CLIPTextCfg(16, 64, width=32, heads=2, layers=2), quick_gelu=True).eval()


def build(clip: CLIP | None = None, inner: int = 48, vit: dict | None = None, **changes) -> PromptPAR:
    """A model whose trained tensors are all different from their start and from each other."""
    torch.manual_seed(0)
    fusion = VisionTransformer(img_size=16, embed_dim=inner, depth=3, num_heads=4, num_classes=0, **vit or {})
    options = {"prompts": 10, "visual_embed": True} | changes
    model = PromptPAR(clip or small_clip(), SENTENCES, Tokenizer(), fusion, Settings(**options)).eval()
    with torch.no_grad():
        for p in model.trained().values():
            p.add_(0.1 * torch.randn_like(p))
        for bn in (model.bn, model.agg_bn):
            if bn is not None:
                bn.running_mean.normal_()
                bn.running_var.uniform_(0.5, 2)
    return model


@pytest.mark.parametrize("options", [{}, {"depth": 2}, {"regions": 0}, {"mm_layers": 0}, {"mm_layers": 2}])
def test_gradients_reach_every_trained_tensor_and_nothing_frozen(options):
    clip = small_clip().train()
    model = build(clip, **options).train()
    loss(model(images(4)), (draw(4, 5) > 0).float(), RATIO).backward()
    trained = model.trained()
    assert all(p.grad.abs().sum() > 0 for p in trained.values() if p.numel())
    assert (model.prompts.grad.abs().sum((1, 2)) > 0).all()
    assert all(p.grad is None for n, p in model.named_parameters() if n not in trained)
    assert not {n for n in trained if n.startswith(("clip.", "text_prompts")) or ".attn." in n or ".mlp." in n}
    groups = {id(p) for group in model.param_groups() for p in group["params"]}
    assert groups == {id(p) for p in trained.values()}
    # the caller's CLIP stays as it was
    assert clip.visual.training and all(p.requires_grad and p.grad is None for p in clip.parameters())


@pytest.mark.parametrize("options", [{}, {"depth": 2}])
def test_gradient_checkpointing_gives_the_same_gradients(options):
    labels = (draw(4, 5) > 0).float()
    assert_recomputed_gradients_are_equal(lambda: build(**options), lambda m: loss(m(images(4)), labels, RATIO))


def test_a_tower_without_trained_tensors_needs_no_graph_and_its_tokens_can_be_cached():
    model = build(prompts=0, regions=0)
    tokens = model.train().forward_features(images())
    assert not tokens.requires_grad and tokens.shape == (2, 33, 32)
    model.eval()
    assert torch.equal(model.forward_head(tokens), model(images()))
    assert model.train()(images()).similarity is None


def test_the_last_fusion_block_is_skipped_for_some_images_while_training():
    model = build(drop_path=0.5)
    tokens = model.forward_features(images(1)).detach().expand(16, -1, -1)
    torch.manual_seed(0)
    assert len(model.train().fuse(tokens)[0][:, 0, 0].unique()) > 1


@pytest.mark.parametrize("vit", BLOCKS, ids=str)
@torch.no_grad()
def test_the_fusion_is_the_block_of_any_vit(vit):
    model = build(vit=vit, mm_layers=2)
    tokens = model.forward_features(images())
    x = torch.cat([model.word_embed(model.text_features).expand(2, -1, -1), model.visual_embed(tokens)], 1)
    expected = model.norm(model.blocks[1](model.blocks[0](x)))[:, :5]
    torch.testing.assert_close(model.fuse(tokens)[0], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("sizes", "spans"),
    [
        ((16, 4, 2), [(0, 5), (3, 9), (7, 13), (11, 16)]),  # as published
        ((14, 4, 0), [(0, 3), (3, 7), (7, 10), (10, 14)]),
        ((7, 2, 1), [(0, 4), (3, 7)]),
        ((8, 1, 2), [(0, 8)]),
        ((8, 4, 4), [(0, 4), (0, 6), (2, 8), (4, 8)]),
    ],
)
def test_strips_cover_every_row_and_neighbours_share_some(sizes, spans):
    assert strips(*sizes) == spans


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
    assert (found.cosines.abs() <= 1 + 1e-6).all()


@torch.no_grad()
def test_sentences_are_read_once_and_the_clip_may_be_in_half_precision():
    clip = small_clip()
    model = build(clip)
    torch.testing.assert_close(model.text_features, clip.encode_text(Tokenizer()(SENTENCES)), rtol=0, atol=1e-5)
    assert not model.text_features.requires_grad and "text_features" not in model.state_dict()
    model.half_clip()
    assert model.text_features.dtype == torch.float32 and model(images()).isfinite().all()
    assert model.clip.text_projection.dtype == torch.float16
    before = model.text_features.clone()
    model.reset_classifier(SENTENCES[::-1], Tokenizer())
    torch.testing.assert_close(model.text_features.flip(0), before, rtol=0, atol=1e-2)


@torch.no_grad()
@pytest.mark.parametrize("half", [False, True])
def test_the_features_of_sentences_follow_the_weights_that_are_loaded(half):
    torch.manual_seed(9)
    clip = small_clip()
    for p in clip.parameters():
        p.add_(0.1 * torch.randn_like(p))
    model, other = (m.half_clip() if half else m for m in (build(), build(clip)))
    assert not model.load_state_dict(other.state_dict()).missing_keys
    torch.testing.assert_close(model.text_features, other.text_features, rtol=0, atol=1e-2 if half else 1e-5)
    torch.testing.assert_close(model(images()), other(images()), rtol=0, atol=0.1 if half else 1e-4)


@torch.no_grad()
@pytest.mark.parametrize("embedded", [False, True])
@pytest.mark.parametrize("way", EXCHANGES)
def test_the_features_of_sentences_follow_the_clip_of_a_model(way, embedded, tmp_path):
    """Also of a model from a file, and where the sentences were given embedded."""
    clips = [encoders.build("pocket_clip", "random") for _ in range(2)]
    texts, tokenizer = (embed_texts(Tokenizer(), clips[0], SENTENCES), None) if embedded else (SENTENCES, Tokenizer())
    fusion = VisionTransformer(img_size=16, embed_dim=48, depth=1, num_heads=4, num_classes=0)
    settings = Settings(prompts=10, visual_embed=True)
    models = [PromptPAR(clip, texts, tokenizer, fusion, settings).eval() for clip in clips]
    models[1].load_state_dict({n: x for n, x in models[0].state_dict().items() if "clip" not in n}, strict=False)
    loaded = companion.load(companion.save(models[0], tmp_path / "m"))
    x, before = draw(2, 3, 32, 32), models[0].text_features
    for model in (models[0], loaded):
        EXCHANGES[way](model.clip, copy.deepcopy(clips[1]))
        assert torch.equal(model.text_features, models[1].text_features) and not torch.equal(
            before, model.text_features
        )
        assert torch.equal(model(x), models[1](x))


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"visual_embed": False, "inner": 32}, {"mm_layers": 0}, {"regions": 0}])
def test_official_names_round_trip(options):
    model = build(official_quirks=True, **options)
    state = model.to_official()
    again = PromptPAR.from_official(state, SENTENCES, Tokenizer(), clip=small_clip(), heads=(2, 2, 4))
    assert torch.equal(again(images()), model(images()))
    assert all(torch.equal(again.to_official()[name], value) for name, value in state.items())


@torch.no_grad()
def test_the_released_name_of_the_layer_on_the_image_tokens_is_read():
    model = build(official_quirks=True)
    state = {n.replace("visual_embed", "vis_embed"): tensor for n, tensor in model.to_official().items()}
    assert "model.vis_embed.weight" in state
    again = PromptPAR.from_official(state, SENTENCES, Tokenizer(), clip=small_clip(), heads=(2, 2, 4))
    assert torch.equal(again(images()), model(images()))


def test_checkpoints_that_do_not_fit_are_refused():
    state = build().to_official()
    state |= {"model.extra": torch.zeros(1), "model.norm.bias": torch.zeros(3)}
    del state["model.weight_layer.3.bias"]
    options = {"clip": small_clip(), "heads": (2, 2, 4)}
    missing, unknown, shapes = misfits(PromptPAR.from_official, state, SENTENCES, Tokenizer(), **options)
    assert (missing, unknown) == (["model.weight_layer.3.bias"], ["model.extra"])
    assert [text.partition(" ")[0] for text in shapes] == ["model.norm.bias"]
    fewer = (lambda: PromptPAR.from_official(state, SENTENCES[:4], Tokenizer(), **options), r"model\.bn\.weight")
    refuses(fewer, error=BadCheckpoint)


class Result(dict):
    """Stands for the EasyDict of scores that the authors' training keeps in its checkpoints."""


def test_a_file_of_the_authors_code(tmp_path):
    """Files that training writes name the CLIP differently from the released ones; half precision is read too."""
    state = build(official_quirks=True).to_official()
    parts = {p: {n.removeprefix(p): t for n, t in state.items() if n.startswith(p)} for p in ("clip_model.", "model.")}
    halved = {n: t.half() if t.is_floating_point() else t for n, t in parts["clip_model."].items()}
    saved = {"epoch": 3, "clip_model": halved, "model_state_dict": parts["model."], "result": Result(ma=0.9)}
    torch.save(saved, tmp_path / "PETA_Checkpoint.pth")
    found = read_checkpoint(tmp_path / "PETA_Checkpoint.pth")
    again = PromptPAR.from_official(found, SENTENCES, Tokenizer(), clip=small_clip(), heads=(2, 2, 4)).to_official()
    for name, tensor in state.items():
        torch.testing.assert_close(again[name], tensor, rtol=1e-3, atol=1e-3)
    torch.save({"state_dict": {}}, tmp_path / "other.pth")
    (tmp_path / "broken.pth").write_bytes((tmp_path / "PETA_Checkpoint.pth").read_bytes()[:2000])
    for name in ("other", "broken"):
        refuses((lambda name=name: read_checkpoint(tmp_path / f"{name}.pth"), name), error=CorruptFile)


def test_what_would_run_wrongly_is_refused():
    custom = small_clip()
    custom.visual.transformer.resblocks[1] = CustomResidualAttentionBlock(32, 2)
    refuses(
        (lambda: build(custom), "CustomResidualAttentionBlock"),
        (lambda: build(vit={"block_fn": ResPostBlock}), "ResPostBlock"),
        (lambda: build(mm_layers=4), "0 to 3"),
        (lambda: build(visual_embed=False), "48"),
        (lambda: build(depth=4), "1 to 3"),
        (lambda: build(depth=0), "1 to 3"),
        (lambda: build(official_quirks=True, prompts=7), "5"),
        (lambda: build(official_quirks=True, regions=3), "4"),
        (lambda: build(mm_layers=0).maps(images()), "mm_layers"),
    )


def test_prompts_start_as_released_in_the_range_for_patches_of_14_pixels():
    bounds = [(6 / (3 * patch**2 + 32)) ** 0.5 for patch in (8, 14)]
    for quirks, bound in zip((False, True), bounds, strict=True):
        torch.manual_seed(0)
        fusion = VisionTransformer(img_size=16, embed_dim=32, depth=1, num_heads=2, num_classes=0)
        options = Settings(prompts=10, official_quirks=quirks)
        model = PromptPAR(small_clip(), SENTENCES, Tokenizer(), fusion, options)
        for prompts in (model.prompts, model.text_prompts):
            assert 0.95 * bound < float(prompts.detach().abs().max()) <= bound


@torch.no_grad()
def test_without_the_quirks_tokens_are_normalised_and_the_first_class_token_is_read():
    plain, released = (build(official_quirks=quirks, masked=False) for quirks in (False, True))
    released.load_state_dict(plain.state_dict())  # their prompts start in another range
    positions = [list(map(int, model.class_positions)) for model in (plain, released)]
    assert positions[0][1:] == positions[1][1:] and positions[0][0] == 0 != positions[1][0]
    visual = plain.clip.visual
    before = released.forward_features(images()) @ torch.linalg.inv(visual.proj)
    expected = visual.ln_post(before) @ visual.proj
    torch.testing.assert_close(plain.forward_features(images()), expected, rtol=1e-2, atol=1e-2)


def test_a_token_attends_to_its_own_strip_unless_the_released_mistake_is_asked_for():
    grid = (8, 4)
    assert torch.equal(region_mask(grid, 10), region_mask(grid, 10, official_quirks=False))
    assert not torch.equal(
        region_mask((16, 16), 10, overlap=4), region_mask((16, 16), 10, overlap=4, official_quirks=True)
    )

"""H-ViT: counts, trainable parameters, receptive fields of the levels, losses, votes, names, heatmaps."""

import itertools

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer

from companion.errors import BadCheckpoint, CorruptFile
from companion.evaluation.tables import published_table
from companion.models.hvit import model as hvit
from companion.models.hvit.model import HViT, PatchBag, PatchEncoder, RegionEncoder, SlideTransformer
from companion.models.layers.pos_embed import resize_pos_embed
from companion.models.layers.state_dicts import load_official
from companion.viz import heatmaps
from tests.models.common import assert_recomputed_gradients_are_equal, gflop, misfits, numbers, refuses

PIXELS = 32 * 4  # a pocket region


def pocket(variant: str = "local", head: str = "regression", seed: int = 0, **options) -> HViT:
    torch.manual_seed(seed)
    return hvit.build("pocket", variant, head, patches=4, **options).eval()


def embeddings(slides: int = 2, regions: int = 3, seed: int = 1) -> torch.Tensor:
    return torch.randn(slides, regions, 16, 48, generator=torch.Generator().manual_seed(seed))


def pixels(slides: int = 1, regions: int = 2, seed: int = 2) -> torch.Tensor:
    return torch.randn(slides, regions, 3, PIXELS, PIXELS, generator=torch.Generator().manual_seed(seed))


def test_parameters_at_paper_scale():
    """Those of the table, which were counted on the authors' code."""
    counted = published_table("hvit", "parameters").set_index("method")
    with torch.device("meta"):
        for patches, column in ((4, "region_1024"), (8, "region_2048"), (16, "region_4096")):
            local = hvit.build("paper", "local", "classification", patches=patches)
            level = hvit.build("paper", "global", "classification", patches=patches)
            found = {
                "patch Transformer (ViT-S/16 at 256 px)": numbers(local.patch),
                "region Transformer": numbers(local.region),
                "slide level, 6 classes (what Global trains)": numbers(level, trained=True),
                "slide level, regression": numbers(SlideTransformer(head="regression")),
                "slide level, ordinal (5 outputs)": numbers(SlideTransformer(head="ordinal")),
                "what Local trains, 6 classes": numbers(local, trained=True),
                "all levels, 6 classes": numbers(local),
            }
            assert found == counted.loc[list(found), column].to_dict()
            assert local.region.pos_embed.shape[1] == 1 + int(patches * 256 * 0.875 // 256) ** 2
        regression = numbers(hvit.build(), trained=True)
        assert regression == counted.loc["what Local trains, regression", "region_2048"]
        assert numbers(SlideTransformer(head="coral")) == 594_822
    assert len(found) + 1 == len(counted) and found["all levels, 6 classes"] == 25_042_951


def test_the_patch_encoder_is_timms_vit_s():
    """Same names; the same output to 2e-6 once timm is given the resized table (section 3.1)."""
    torch.manual_seed(0)
    ours = PatchEncoder().eval()
    timms = VisionTransformer(img_size=256, patch_size=16, embed_dim=384, depth=12, num_heads=6, num_classes=0).eval()
    state = ours.state_dict() | {"pos_embed": resize_pos_embed(ours.pos_embed, (16, 16)).detach()}
    timms.load_state_dict(state)
    x = torch.randn(1, 3, 256, 256)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), timms(x), atol=2e-6, rtol=0)


@pytest.mark.parametrize(
    ("variant", "levels"),
    [("global", ["slide"]), ("local", ["region", "slide"]), ("whole", ["patch", "region", "slide"])],
)
def test_gradients_come_where_training_is(variant, levels):
    model = pocket(variant).train()
    hvit.loss("regression", model(pixels()), torch.tensor([3])).backward()
    got = {name for name, p in model.named_parameters() if p.grad is not None}
    assert got == set(model.trained())
    assert {name.split(".")[0] for name in got} == set(levels)
    assert not any(module.training for level in model.frozen for module in getattr(model, level).modules())
    # the positions of a frozen level can be trained; the caller's levels are neither frozen nor set to eval mode
    slide, region = SlideTransformer(48), RegionEncoder(4, 48, 48, 1, 3)
    model = HViT(slide, region, variant="global", positions=True)
    assert {n for n in model.trained() if not n.startswith("slide.")} == {"region.pos_embed"}
    assert slide.training and region.training and all(p.requires_grad for p in region.parameters())


def test_what_timm_users_look_for():
    model, x = pocket("whole").train(), pixels()
    tokens = model.patch.forward_features(x[0, :, :, :32, :32])
    assert tokens.shape == (2, 65, 48)
    torch.testing.assert_close(tokens[:, 0], model.patch(x[0, :, :, :32, :32]))
    grade = torch.tensor([3])
    assert_recomputed_gradients_are_equal(lambda: pocket("whole"), lambda m: hvit.loss("regression", m(x), grade))
    model.set_grad_checkpointing()
    assert all(block.grad_checkpointing for block in (model.patch, model.region))


def test_every_level_starts_the_same_pass():
    model, x, trace = pocket(), pixels(2, 3), {}
    with torch.no_grad():
        whole = model(x, trace=trace)
        torch.testing.assert_close(model(trace["patches"]), whole)
        torch.testing.assert_close(model(trace["regions"]), whole)
    assert trace["patch_attention"].shape == (2, 3, 16, 3, 8, 8)
    assert trace["region_attention"].shape == (2, 3, 3, 4, 4)
    assert trace["pooling"].shape == (2, 3) and trace["slide"].shape == (2, 48)
    with torch.no_grad():  # patches lie row by row
        torch.testing.assert_close(trace["patches"][:, 0, 1 * 4 + 2], model.patch(x[:, 0, :, 32:64, 64:96]))
    # claim 3: global and local are one function
    frozen = pocket("global", seed=5)
    frozen.load_state_dict(model.state_dict())
    assert torch.equal(model(embeddings()), frozen(embeddings()))


def test_the_order_of_regions_counts_with_positions_only():
    """Claim 4."""
    x, order = torch.randn(1, 5, 48), [3, 1, 4, 0, 2]
    for position, invariant in (("none", True), ("sine", False), ("learned", False)):
        torch.manual_seed(0)
        level = SlideTransformer(48, position=position).eval()
        assert torch.allclose(level(x), level(x[:, order]), atol=1e-5) == invariant, position
        # the padding of a short slide changes nothing
        present = torch.tensor([[True, True, True, False, False]])
        torch.testing.assert_close(level(x, present), level(x[:, :3]))
    assert SlideTransformer(48, position="learned", longest=5)(x).isfinite().all()
    refuses((lambda: SlideTransformer(48, position="learned", longest=4)(x), "longest"))


def test_masks_of_background():
    """Claim 5: a mask of all tokens has no effect; masked tokens have no effect; a region without tissue gives no
    NaN."""
    model, x = pocket("whole"), pixels()
    share = torch.rand(1, 2, 16, 64, generator=torch.Generator().manual_seed(3)) + 0.01
    share[0, 0, 5] = 0  # a patch without tissue
    share[0, 1, 2, 10:30] = 0
    with torch.no_grad():
        torch.testing.assert_close(model(x, tissue=torch.ones_like(share)), model(x), atol=1e-5, rtol=1e-5)
        seen = model(x, tissue=share)
        assert not torch.allclose(seen, model(x), atol=1e-5)
        other = x.clone()
        other[0, 0, :, 32:64, 32:64] += 3  # patch 5 of the first region
        assert torch.allclose(model(other, tissue=share), seen, atol=1e-5)
        assert not torch.allclose(model(other), model(x), atol=1e-5)
        assert model(x, tissue=torch.zeros_like(share)).isfinite().all()


def test_slides_of_different_length_in_one_batch():
    model, x = pocket(), embeddings(2, 4)
    present = torch.tensor([[True, True, True, True], [True, True, False, False]])
    changed = x.clone()
    changed[1, 2:] = 100
    for baseline in (model, PatchBag(48, pooling="mean").eval(), PatchBag(48).eval()):
        both = baseline(changed, present=present)
        torch.testing.assert_close(both[:1], baseline(x[:1]))
        torch.testing.assert_close(both[1:], baseline(x[1:, :2]))
    refuses((lambda: model(x, present=present & False), "region"))
    bag = PatchBag(48).eval()  # it has no order
    torch.testing.assert_close(bag(x), bag(x.flip(2)))
    assert not torch.allclose(model(x), model(x.flip(2)), atol=1e-4)


def test_the_map_is_what_attention_does():
    encoder, trace = RegionEncoder(4, 48, 48, 1, 3).eval(), {}
    x = torch.randn(2, 48, 4, 4)
    out = encoder(x, trace=trace)
    block = encoder.blocks[0]
    qkv = block.attn.qkv(block.norm1(trace["tokens"])).unflatten(-1, (3, 3, 16)).permute(2, 0, 3, 1, 4)
    read = (trace["attention"][:, :, None] @ qkv[2]).transpose(1, 2).flatten(2)[:, 0]
    cls = trace["tokens"][:, 0] + block.attn.proj(read)
    torch.testing.assert_close(out, encoder.norm(cls + block.mlp(block.norm2(cls))))
    torch.testing.assert_close(trace["attention"].sum(-1), torch.ones(2, 3))


@pytest.mark.parametrize("head", hvit.HEADS)
def test_a_loss_is_least_at_its_own_grade(head):
    outputs = {"classification": 6, "regression": 1}.get(head, 5)
    grades = torch.arange(6)
    logits = torch.zeros(6, outputs)
    if head == "classification":
        logits = 20 * torch.eye(6)
    elif head == "regression":
        logits = grades[:, None].float()
    else:
        logits = 40 * hvit.extended(grades, 6) - 20
    assert hvit.loss(head, logits, grades) < 1e-3
    assert hvit.predict(head, logits).tolist() == grades.tolist()
    assert hvit.loss(head, logits, grades.flip(0)) > 1


def test_corn_counts_the_thresholds_up_to_the_grade():
    """Threshold k is a condition on grades of at least k; there an unsure model pays log 2."""
    for grade, counted in ((0, 1), (2, 3), (5, 5)):
        outputs = torch.zeros(1, 5, requires_grad=True)
        hvit.loss("corn", outputs, torch.tensor([grade])).backward()
        assert (outputs.grad[0] != 0).tolist() == [k < counted for k in range(5)]
    outputs = torch.stack([torch.zeros(5), torch.full((5,), 50.0)])  # grades 0 and 5: one threshold and five
    found = [hvit.loss("corn", outputs, torch.tensor([0, 5]), per_slide=each).item() for each in (False, True)]
    assert found == pytest.approx([np.log(2) / 6, np.log(2) / 2])


def test_predictions_at_their_edges():
    assert hvit.predict("regression", torch.tensor([[-2.0], [0.5], [1.5], [2.5], [9.0]])).tolist() == [0, 0, 2, 2, 5]
    assert hvit.predict("ordinal", torch.tensor([[1.0, -1, 1, 1, 1]])).tolist() == [1]  # only leading ones count
    logits = torch.tensor([[0.3, 0.3, 0.3, 0.3, 0.3]])
    assert (hvit.predict("ordinal", logits).item(), hvit.predict("corn", logits).item()) == (5, 1)


def test_votes():
    assert hvit.vote([3, 3, 3, 0, 1]) == 3
    assert hvit.vote([2]) == 2

    def votes(*grades: int, **options: bool) -> set[int]:
        return {hvit.vote(grades, seed=seed, **options) for seed in range(50)}

    assert votes(4, 4, 1, 1, 2) == {1}  # nearer to the fifth
    assert votes(0, 0, 3, 3, 1, isup=False) == {0}
    assert votes(0, 0, 2, 2, 1) == {2}  # 0 and 1 are 1.5 apart
    assert votes(0, 0, 2, 2, 1, isup=False) == {0, 2}
    assert votes(0, 1, 2, 3, 4) == {0, 1, 2, 3, 4} and votes(1, 1, 3, 3, 2) == {1, 3}


def test_bad_values_say_what_is_accepted():
    refuses(
        (lambda: hvit.loss("l1", torch.zeros(1, 1), torch.zeros(1)), "classification"),
        (lambda: hvit.vote([]), "one fold or more"),
        (lambda: hvit.loss("ordinal", torch.zeros(1, 5), torch.tensor([6])), "0 to 5"),
        (lambda: hvit.predict("l1", torch.zeros(1, 1)), "regression"),
        (lambda: hvit.build("huge"), "pocket"),
        (lambda: hvit.build("pocket", "Local"), "local"),
        (lambda: hvit.build("pocket", levels=("slides",)), "slide"),
        (lambda: hvit.build("pocket", "local", levels=("slide",)), "levels"),
        (lambda: SlideTransformer(head="mse"), "regression"),
        (lambda: SlideTransformer(position="3d"), "sine"),
        (lambda: SlideTransformer(classes=1), "2 or more"),
        (lambda: RegionEncoder(4, 48, 50, 1, 3), "divide"),
        (lambda: PatchEncoder(250), "tile"),
        (lambda: HViT(SlideTransformer(), RegionEncoder(4, dim=96, heads=3)), "192"),
        (lambda: HViT(SlideTransformer(), patch=PatchEncoder(depth=1)), "region level"),
        (lambda: pocket()(torch.zeros(1, 2)), r"\(B, M, D\)"),
        (lambda: pocket()(torch.zeros(1, 2, 15, 48)), "square"),
        (lambda: pocket()(torch.zeros(1, 2, 16, 40)), "48"),
        (lambda: pocket()(torch.zeros(1, 0, 48)), "1 or more regions"),
        (lambda: pocket()(torch.zeros(1, 1, 3, 100, 100)), "32 px"),
        (lambda: pocket(levels=("region", "slide"))(pixels()), "no patch level"),
        (lambda: pocket("global", levels=("slide",))(embeddings()), "no region level"),
        (lambda: PatchEncoder(32, 4, 48, 1, 3)(torch.zeros(1, 3, 30, 32)), "multiples of 4"),
        (lambda: PatchEncoder(32, 4, 48, 1, 3)(torch.zeros(1, 3, 32, 32), torch.ones(1, 9)), "64"),
        (lambda: PatchBag(pooling="max"), "attention"),
    )


@pytest.mark.parametrize("head", hvit.HEADS)
def test_the_authors_names_there_and_back(head):
    torch.manual_seed(0)
    slide = SlideTransformer(192, head=head, position="learned", longest=8)
    model = HViT(slide, RegionEncoder(4, depth=2), PatchEncoder(depth=1), "local").eval()
    state, ours = model.to_official(), model.state_dict()
    again = HViT.from_official(state, head)
    assert again.state_dict().keys() == ours.keys()
    assert all(torch.equal(t, ours[n]) for n, t in again.state_dict().items())
    assert (again.slide.head, again.slide.classes, again.variant) == (head, 6, "local")
    state["typo"] = state.pop("global_rho.0.bias")
    assert misfits(HViT.from_official, state, head) == (["global_rho.0.bias"], ["typo"], [])
    del state["typo"], state["classifier.weight"]
    refuses((lambda: HViT.from_official(state, head), r"classifier\.weight"), error=BadCheckpoint)


def test_what_the_outputs_mean_must_be_said_or_be_plain():
    state = hvit.build("paper", "global", "ordinal", levels=("slide",)).to_official()
    refuses((lambda: HViT.from_official(state), "head"))
    assert HViT.from_official(state, "corn").slide.classes == 6
    assert HViT.from_official(state, "classification").slide.classes == 5
    state = hvit.build("paper", "global", "regression", levels=("slide",)).to_official()
    assert HViT.from_official(state).slide.head == "regression"
    refuses((lambda: HViT.from_official(state, "ordinal"), "regression"))
    state = hvit.build("paper", "global", "coral", levels=("slide",)).to_official()
    assert HViT.from_official(state).slide.head == "coral"


def test_a_table_of_another_region_size_is_resized_or_refused_never_left_out():
    """What users of HIPT complain of: "77 loaded, 1 mismatched", and a table that stays at its start."""
    large = RegionEncoder(16, depth=1)
    small = RegionEncoder(8, depth=1)
    with pytest.raises(BadCheckpoint, match="pos_embed"):
        load_official(small, large.state_dict(), {n: n for n in small.state_dict()}, "a region of 2048")
    read = RegionEncoder.from_official(large.state_dict())
    assert read.pos_embed.shape[1] == 1 + 14**2
    trace: dict[str, torch.Tensor] = {}
    read(torch.zeros(1, 384, 8, 8), trace=trace)
    torch.testing.assert_close(trace["positions"], resize_pos_embed(large.pos_embed, (8, 8)))
    assert trace["positions"].shape[1] == 65 and trace["positions"][:, 1:].std() > 0.01


def test_a_dino_checkpoint_gives_its_teacher(tmp_path):
    """HIPT's files: wrapped names, a projection head, and the trainer's settings next to the tensors."""
    torch.manual_seed(0)
    encoder, student = PatchEncoder(depth=1), PatchEncoder(depth=1)
    wrapped = {f"module.backbone.{n}": t for n, t in encoder.state_dict().items()}
    wrapped["module.head.mlp.0.weight"] = torch.zeros(2, 384)
    other = {f"module.backbone.{n}": t for n, t in student.state_dict().items()}
    torch.save({"student": other, "teacher": wrapped, "epoch": 3, "args": object}, tmp_path / "dino.pth")
    read = PatchEncoder.from_official(hvit.read_checkpoint(tmp_path / "dino.pth"))
    assert all(torch.equal(t, read.state_dict()[n]) for n, t in encoder.state_dict().items())
    assert (read.image, read.token, read.heads) == (256, 16, 6)

    save_file({n: t.contiguous() for n, t in encoder.state_dict().items()}, tmp_path / "plain.safetensors")
    assert hvit.read_checkpoint(tmp_path / "plain.safetensors").keys() == encoder.state_dict().keys()
    (tmp_path / "bad.pth").write_bytes((tmp_path / "dino.pth").read_bytes()[:2000])
    refuses((lambda: hvit.read_checkpoint(tmp_path / "bad.pth"), r"bad\.pth"), error=CorruptFile)
    refuses((lambda: RegionEncoder.from_official(encoder.state_dict()), r"phi\.0\.weight"), error=BadCheckpoint)


def test_ranks_are_shares_of_what_is_lower_and_maps_of_patches_are_laid_row_by_row():
    assert heatmaps.ranks(np.array([[3.0, 1.0], [2.0, 3.0]])).tolist() == [[0.5, 0.0], [0.25, 0.5]]
    several = heatmaps.ranks(np.random.default_rng(0).random((5, 4, 4)))
    assert (several.reshape(5, -1).max(1) == 15 / 16).all() and several.min() == 0
    assert heatmaps.ranks(np.array([0.1, 0.7, 0.2]), axes=1).tolist() == [0, 2 / 3, 1 / 3]
    attention = np.random.default_rng(0).random((4, 2, 3, 3))
    laid = heatmaps.patch_map(attention)
    assert laid.shape == (2, 6, 6)
    np.testing.assert_array_equal(laid[1, :3, 3:], heatmaps.ranks(attention[1, 1]))
    refuses((lambda: heatmaps.patch_map(attention[:3]), "square"))
    assert heatmaps.region_map(np.random.rand(2, 2, 2), 6).shape == (2, 6, 6)  # noqa: NPY002
    refuses((lambda: heatmaps.region_map(attention[0], 7), "multiple"))


def test_factorised_scores():
    """Claim 6."""
    rng = np.random.default_rng(0)
    patch, region, other = (rng.random((8, 8)) for _ in range(3))

    def scores(gamma, variant="local", patch=patch):
        return heatmaps.factorised(patch, region, 0.3, gamma, variant)

    np.testing.assert_allclose(scores(0.5), scores(0.5, "global"))
    np.testing.assert_array_equal(scores(1.0), scores(1.0, patch=other))
    np.testing.assert_allclose(scores(0.0), patch)
    for variant, gamma in itertools.product(("global", "local"), (0, 0.3, 0.5, 1)):
        found = scores(gamma, variant)
        assert found.min() >= 0 and found.max() < 1
        np.testing.assert_allclose(heatmaps.granular([patch], [region], 0.3, 2, gamma, variant), found)
    refuses(
        (lambda: scores(1.5), "0 to 1"),
        (lambda: scores(0.5, "mixed"), "'global', 'local'"),
        (lambda: scores(0, "whole"), "more than 0"),
    )


def test_granular_maps_keep_their_scale():
    """Scores that are the same everywhere stay so; with the released weights Global's shrink unless gamma is 0.5."""
    flat = [np.full((8, 8), 0.6)] * 4
    for gamma in (0.3, 0.5, 1.0):
        fair = heatmaps.granular(flat[:2], flat, 0.6, 1, gamma, "global")
        np.testing.assert_allclose(fair, 0.6, rtol=1e-12)
        quirk = heatmaps.granular(flat[:2], flat, 0.6, 1, gamma, "global", official_quirks=True)
        if gamma == 0.3:
            np.testing.assert_allclose(quirk, 0.6 * 1.3 / 1.7)
    np.testing.assert_allclose(heatmaps.granular(flat[:2], flat, 0.6, 1, 0.3, "local", official_quirks=True), 0.6)


def test_stitching_and_colours():
    maps = [((0, 0), np.full((4, 4), 0.2)), ((16, 0), np.full((4, 4), 0.8)), ((-8, 24), np.full((4, 4), 0.4))]
    scores, there = heatmaps.stitch(maps, (8, 10), 8)
    assert scores[0].tolist() == pytest.approx([0.2, 0.2, 0.5, 0.5, 0.8, 0.8, 0, 0, 0, 0])  # overlaps are averaged
    assert there[:, 9].sum() == 0 and there[3, 0] and scores[3, 0] == pytest.approx(0.3)
    tissue = np.full((8, 10, 3), 200, np.uint8)
    coloured = heatmaps.overlay(tissue, scores, there)
    assert (coloured[~there] == 200).all() and (coloured[there] != 200).any()
    above = heatmaps.overlay(tissue, scores, there, threshold=0.7)
    assert (above[scores < 0.7] == 200).all() and (above[0, 4] != 200).any()
    refuses((lambda: heatmaps.overlay(tissue[:4], scores, there), "tissue"))


def test_the_cost_is_what_was_counted():
    """The table's GFLOP, by the same counter."""
    listed = published_table("hvit", "flops").set_index("method").gflop
    with torch.device("meta"):
        parts = {
            "patch Transformer, one patch of 256 px": (PatchEncoder(), (1, 3, 256, 256)),
            "region Transformer, 8 x 8 patches (2048 px)": (RegionEncoder(8), (1, 384, 8, 8)),
            "region Transformer, 16 x 16 patches (4096 px)": (RegionEncoder(16), (1, 384, 16, 16)),
            "slide level, 7 regions": (SlideTransformer(), (1, 7, 192)),
        }
        assert set(parts) == set(listed.index)
        for name, (part, shape) in parts.items():
            found = gflop(lambda part=part, shape=shape: part(torch.empty(shape)))
            # the few products of the slide level's attention are counted by another of torch's paths than the table's
            near = 0.02 if name.startswith("slide") else 1e-3
            assert found == pytest.approx(listed[name], rel=near), name

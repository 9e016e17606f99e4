"""DMT's teachers and ancestors: losses by hand, running means, gradients, resuming, released files, bad input."""

import copy

import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from companion.errors import BadCheckpoint, BadParameter, CorruptFile, MissingWeights
from companion.evaluation import parity
from companion.models.dmt import model as dmt
from companion.models.dmt import teachers as dmt_teachers
from companion.models.dmt.ancestors import DMAE, G2SD, TinyMIM
from companion.models.dmt.model import ViT
from companion.models.dmt.teachers import MAE, MoCo, SelfDistillation
from companion.models.layers import dino
from companion.training import fit


def vit(**options):
    torch.manual_seed(0)
    return dmt.build("pocket teacher", **options)


def mae(**options):
    encoder = vit()
    torch.manual_seed(1)
    return MAE(encoder, (32, 2, 4), **options)


def moco(**options):
    encoder = vit(positions="mocov3")
    torch.manual_seed(1)
    return MoCo(encoder, 10, 64, 32, **options)


def ibot(**options):
    encoder = vit(positions="learned", masked=options.pop("masked", True))
    torch.manual_seed(1)
    return SelfDistillation(encoder, 10, 40, 64, 16, **options)


@pytest.fixture
def images():
    return torch.rand(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def trained(model):
    return {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}


# --- masked modelling -------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_mae_by_hand(images):
    model, trace = mae().eval(), {}
    noise = torch.rand(8, 16)
    loss = model(images, noise, trace)
    keep = noise.argsort(1)[:, :4]
    assert torch.equal(trace["keep"], keep) and trace["hidden"].sum(1).eq(12).all()
    total = 0.0
    for b in range(8):
        for n in set(range(16)) - set(keep[b].tolist()):
            y, x = divmod(n, 4)
            patch = images[b, :, 8 * y : 8 * y + 8, 8 * x : 8 * x + 8].permute(1, 2, 0).flatten()
            patch = (patch - patch.mean()) / (patch.var() + 1e-6).sqrt()
            total += float((trace["pixels"][b, n] - patch).square().mean())
    assert float(loss) == pytest.approx(total / (8 * 12), rel=1e-5)
    model.normalise = False
    model(images, noise, trace)
    assert torch.equal(trace["target"], dmt_teachers.patchify(images, 8))


def test_mae_trains_all_but_its_tables_and_its_names_go_there_and_back(images):
    model = mae()
    model(images).backward()
    assert trained(model) == {n for n, _ in model.named_parameters()} - {"encoder.pos_embed", "decoder.pos_embed"}
    state = model.to_official()
    names = {
        "mask_token",
        "decoder_pos_embed",
        "decoder_embed.weight",
        "decoder_blocks.1.attn.qkv.weight",
        "decoder_pred.bias",
    }
    assert names <= state.keys()
    loaded, noise = MAE.from_official(state, 4, 4), torch.rand(8, 16)
    assert torch.equal(loaded(images, noise), model.eval()(images, noise))
    assert torch.equal(ViT.from_official(state, 4)(images), model.encoder(images))
    with pytest.raises(BadCheckpoint, match="decoder_embed"):
        MAE.from_official(model.encoder.to_official(), 4)
    with pytest.raises(BadParameter, match="mask_ratio"):
        mae(mask_ratio=1.0)


# --- running means ----------------------------------------------------------------------------------------------------


def test_a_running_mean_has_no_parameters_and_follows():
    model = vit()
    mean = dmt_teachers.average(model)
    assert not list(mean.parameters()) and mean.state_dict().keys() == model.state_dict().keys()
    with torch.no_grad():
        model.norm.bias += 1.0
    dmt_teachers.follow(mean, model, 0.9)
    assert torch.allclose(mean.norm.bias, torch.full((48,), 0.1)) and not model.norm.bias.eq(0.1).any()


def test_momentum_and_temperature_rise_as_released():
    assert dmt_teachers.rising(0.99, 0, 100) == pytest.approx(0.99)
    assert dmt_teachers.rising(0.99, 50, 100) == pytest.approx(0.995)
    assert dmt_teachers.rising(0.99, 100, 100) == pytest.approx(1)
    assert [dmt_teachers.warm(e, 30) for e in (0, 29, 40)] == pytest.approx([0.04, 0.07, 0.07])
    assert dmt_teachers.warm(0, 0) == 0.07 and dmt_teachers.warm(0, 1) == 0.04


# --- contrast ---------------------------------------------------------------------------------------------------------


def test_contrast_by_hand():
    torch.manual_seed(0)
    q, k = torch.randn(5, 8), torch.randn(5, 8)
    cosine = F.cosine_similarity(q[:, None], k[None], dim=-1) / 0.2
    expected = -(cosine.diagonal() - cosine.logsumexp(1)).mean() * 0.4
    assert torch.allclose(dmt_teachers.contrastive_loss(q, k), expected, atol=1e-6)


def test_moco_trains_the_query_side(images):
    model = moco().train()
    model(images, images.flip(-1)).backward()
    frozen = {"encoder.pos_embed", *(f"encoder.patch_embed.proj.{n}" for n in ("weight", "bias"))}
    names = {n for n, _ in model.named_parameters()}
    # the patch tokens of the last block reach no loss but through the class token; the norm's bias shifts all alike,
    # which the projector's batch norm takes off again
    assert names - trained(model) <= frozen | {"encoder.norm.bias"}
    assert not any(n.startswith("key_") for n in names)
    assert all(p.requires_grad for p in moco(frozen_patches=False).encoder.patch_embed.parameters())


def test_moco_heads_are_the_released_ones():
    heads = dmt_teachers.mlp(768, 4096, 256, 3), dmt_teachers.mlp(256, 4096, 256, 2)
    assert [[type(m).__name__ for m in head] for head in heads] == [
        ["Linear", "BatchNorm1d", "ReLU", "Linear", "BatchNorm1d", "ReLU", "Linear", "BatchNorm1d"],
        ["Linear", "BatchNorm1d", "ReLU", "Linear", "BatchNorm1d"],
    ]
    assert all(m.bias is None for head in heads for m in head if isinstance(m, torch.nn.Linear))
    assert not heads[0][-1].affine and heads[0][1].affine


def test_keys_follow_once_a_step_and_not_in_eval(images):
    model = moco(momentum=0.5).train()
    before = model.key_encoder.norm.weight.clone()
    with torch.no_grad():
        model.encoder.norm.weight += 1
    model(images, images)
    assert torch.allclose(model.key_encoder.norm.weight, before + 0.5) and model.step == 1
    model.eval()(images, images)
    assert model.step == 1
    with pytest.raises(BadParameter, match="momentum"):
        moco(momentum=1.5)


# --- self-distillation ------------------------------------------------------------------------------------------------


def crops(images, small=2):
    cut = dino.ImageViews((32, 16), small=small)
    torch.manual_seed(3)
    return cut(images)


def test_patch_loss_by_hand_and_its_centre():
    torch.manual_seed(0)
    loss = dmt_teachers.SelfDistillationLoss(6, teacher=0.05, patch_teacher=0.05)
    loss.patch_centre = torch.randn(1, 1, 6)
    own, seen, masks = torch.randn(4, 9, 6), torch.randn(4, 9, 6), torch.rand(4, 9) > 0.5
    masks[0] = False  # a picture of which nothing is hidden counts as 0
    centre = loss.patch_centre.clone()
    _, patch = loss(torch.randn(4, 6), torch.randn(4, 6), 2, own, seen, masks)
    expected = 0
    for b in range(1, 4):
        each = [
            -(((seen[b, n] - centre[0, 0]) / 0.05).softmax(0) * (own[b, n] / 0.1).log_softmax(0)).sum()
            for n in masks[b].nonzero()[:, 0]
        ]
        expected += torch.stack(each).mean() / 4
    assert torch.allclose(patch, expected, rtol=1e-4)
    assert torch.allclose(loss.patch_centre, 0.9 * centre + 0.1 * seen.mean((0, 1)))


@pytest.mark.parametrize("small", [0, 2])
def test_ibot_trains_the_student(images, small):
    model = ibot().train()
    model(crops(images, small)).backward()
    assert {n for n, p in model.named_parameters() if p.requires_grad} - trained(model) <= {"encoder.norm.bias"}
    assert not any(n.startswith("mean_") for n, _ in model.named_parameters())
    first = model.mean_encoder.norm.weight.clone()
    with torch.no_grad():
        model.encoder.norm.weight += 1
    model(crops(images, small))
    assert torch.allclose(model.mean_encoder.norm.weight, first + 0.004)
    kept = model.teacher()
    assert isinstance(kept, ViT) and torch.equal(kept.norm.weight, model.mean_encoder.norm.weight)
    assert torch.equal(kept(images), model.mean_encoder(images)) and list(kept.parameters())


def test_dino_is_ibot_without_patches(images):
    model = ibot(masked=False, patch_weight=0).train()
    views = crops(images)
    loss = model(views)
    student = torch.cat([model.head(model.encoder(x)[:, 0]) for x in views])
    teacher = torch.cat([model.head(model.encoder(x)[:, 0]) for x in views[:2]])
    assert torch.allclose(loss, dino.Loss(40, teacher=0.07)(student, teacher, 4), rtol=1e-5)
    with pytest.raises(BadParameter, match="masked_embed"):
        ibot(masked=False)
    with pytest.raises(BadParameter, match="mask_ratio"):
        ibot(mask_ratio=0)


def test_the_last_layer_stands_still_at_first(images):
    model = ibot(frozen_steps=1).train()
    model(crops(images)).backward()
    assert model.head.direction.grad is None and model.head.direction.requires_grad
    model(crops(images)).backward()
    assert model.head.direction.grad.any()


def test_masks_that_are_given_are_used(images):
    model, masks = ibot().eval(), torch.zeros(16, 16, dtype=torch.bool)
    masks[:, :5] = True
    seen = []
    model.encoder.register_forward_pre_hook(lambda m, a, k: seen.append(k.get("masked")), with_kwargs=True)
    model(crops(images), masks)
    assert torch.equal(seen[0], masks) and seen[1] is None


@pytest.mark.parametrize("make", [moco, ibot])
def test_a_killed_training_resumes_to_the_same_bits(make, images, tmp_path):
    data = TensorDataset(images.repeat(2, 1, 1, 1))

    def loss(model, batch):
        x = batch[0]
        return model(x, x.flip(-1)) if make is moco else model([x, x.flip(-1)])

    class Killed(Exception):
        pass

    def run(path, stop=None, **options):
        model, steps = make(), []

        def step(model, batch):
            steps.append(0)
            if len(steps) == stop:
                raise Killed
            return loss(model, batch)

        fit.fit(
            model,
            step,
            data,
            epochs=3,
            batch=8,
            lr=1e-3,
            warmup=0,
            accelerator="cpu",
            checkpoint_every=3,
            checkpoint=tmp_path / path,
            **options,
        )
        return model.state_dict()

    whole = run("whole.pt")
    with pytest.raises(Killed):
        run("killed.pt", 5)
    resumed = run("killed.pt", resume=True)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert int(whole["step"]) == 6


@pytest.mark.parametrize("make", [mae, moco, ibot])
def test_they_train_in_bfloat16_too(make, images):
    def loss(model, batch):
        x = batch[0]
        return {mae: lambda: model(x), moco: lambda: model(x, x.flip(-1)), ibot: lambda: model([x, x.flip(-1)])}[make]()

    found = []
    for precision in ("32-true", "bf16-mixed"):
        rows = fit.fit(
            make(),
            loss,
            TensorDataset(images),
            epochs=2,
            batch=8,
            lr=1e-3,
            warmup=0,
            accelerator="cpu",
            precision=precision,
        )
        found.append([row["loss"] for row in rows])
    assert found[0] == pytest.approx(found[1], rel=0.1)


# --- ancestors --------------------------------------------------------------------------------------------------------


def small(**options):
    torch.manual_seed(4)
    return dmt.build("pocket", **options)


@pytest.mark.parametrize(
    ("size", "decoder", "count"),
    [("tiny", (128, 4, 4), 7_471_360), ("small", (256, 4, 8), 26_326_272), ("base", (512, 8, 16), 113_362_176)],
)
def test_g2sd_trains_as_many_numbers_as_released(size, decoder, count):
    with torch.device("meta"):
        model = G2SD(MAE(dmt.build("base")), MAE(dmt.build(size), decoder))
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == count


def test_ancestors_train_only_the_student(images):
    teacher = mae()
    for model, step in [
        (G2SD(teacher, MAE(small(), (16, 1, 4)), block=1), lambda m: m(images).decoder),
        (DMAE(vit(), MAE(small(), (16, 1, 4)), student_block=0, teacher_block=1), lambda m: sum(m(images))),
        (TinyMIM(vit(), small()), lambda m: sum(m(images))),
    ]:
        model.train()
        assert not model.teacher.training
        step(model).backward()
        names = trained(model)
        assert names and not any(name.startswith("teacher.") for name in names)
        if isinstance(model, TinyMIM):  # what comes after the last block's queries, keys and values has no part
            after = ("blocks.1.attn.proj", "blocks.1.norm2", "blocks.1.mlp", "norm.")
            assert not any(name.removeprefix("student.").startswith(after) for name in names)


@torch.no_grad()
def test_an_ancestors_loss_is_nothing_when_the_student_is_the_teacher(images):
    teacher = vit()
    assert sum(TinyMIM(teacher, copy.deepcopy(teacher))(images)) == pytest.approx(0, abs=1e-6)
    own = mae()
    same = G2SD(own, copy.deepcopy(own), block=2)
    assert same(images, relation_heads=4).relation == pytest.approx(0, abs=1e-6)
    assert same(images).relation == 0


def test_bad_ancestors():
    for make, word in [
        (lambda: G2SD(mae(), MAE(small(), (16, 1, 4)), block=3), "block"),
        (lambda: G2SD(mae(), MAE(small(image=64), (16, 1, 4))), "student"),
        (lambda: DMAE(vit(), MAE(small(), (16, 1, 4))), "student_block"),
        (lambda: TinyMIM(vit(), small(last_heads=2)), "student"),
        (lambda: TinyMIM(vit(), small(), layer=5), "layer"),
    ]:
        with pytest.raises(BadParameter, match=word):
            make()
    for cls in (G2SD, TinyMIM):
        with pytest.raises(BadCheckpoint, match="student"):
            cls.from_official({"teacher.cls_token": torch.ones(1), "typo": torch.ones(1)})


# --- released files ---------------------------------------------------------------------------------------------------


def test_released_files(tmp_path, images):
    model = vit(positions="learned", masked=True).eval()
    plain = model.to_official()
    files = {
        "mae.pth": {"model": plain},
        "moco.pth.tar": {
            "epoch": 3,
            "arch": "vit_base",
            "state_dict": model.to_official("module.base_encoder."),
            "optimizer": {"state": {}},
        },
        "ibot.pth": {"state_dict": plain},
        "full.pth": {"teacher": model.to_official("module.backbone."), "student": {}, "epoch": 3, "optimizer": {}},
    }
    for name, content in files.items():
        torch.save(content, tmp_path / name)
        assert torch.equal(ViT.from_official(dmt_teachers.read(tmp_path / name), 4)(images), model(images)), name
    save_file(plain, tmp_path / "plain.safetensors")
    loaded = dmt_teachers.released("iBOT", tmp_path / "plain.safetensors")  # heads are read from the width, 48 wide: 1
    assert loaded.heads == 1 and loaded.positions == "learned"


def test_checkpoints_of_training_runs_can_be_checked_against_the_recorded_outputs(tmp_path):
    case = next(c for c in parity.cases("dmt") if c.name == "mocov3_vitb")
    whole = {f"module.base_encoder.{name}": value for name, value in case.state.items()}
    torch.save({"state_dict": whole | {"module.predictor.0.weight": torch.ones(1)}, "epoch": 1}, tmp_path / "moco.pth")
    state = parity.checkpoint("dmt", tmp_path / "moco.pth")
    assert state.keys() == case.names.keys()
    assert torch.equal(state["norm.weight"], case.state["norm.weight"])


def test_bad_files(tmp_path):
    torch.save({"epoch": 3}, tmp_path / "other.pth")
    with pytest.raises(CorruptFile, match=r"other\.pth"):
        dmt_teachers.read(tmp_path / "other.pth")
    (tmp_path / "cut.pth").write_bytes(b"PK cut")
    with pytest.raises(CorruptFile, match=r"cut\.pth"):
        dmt_teachers.released("MAE", tmp_path / "cut.pth")
    (tmp_path / "cut.safetensors").write_bytes(b"no")
    with pytest.raises(CorruptFile, match=r"cut\.safetensors"):
        dmt_teachers.read(tmp_path / "cut.safetensors")
    with pytest.raises(BadParameter, match="weights"):
        dmt_teachers.released("MAE", tmp_path / "absent.pth")
    with pytest.raises(BadParameter, match="MoCo v3"):
        dmt_teachers.released("BEiT")
    with pytest.raises(MissingWeights, match="bytedance/ibot"):
        dmt_teachers.released("iBOT")
    save_file({"a": torch.ones(1)}, tmp_path / "else.safetensors")
    with pytest.raises(BadCheckpoint, match="pos_embed"):
        dmt_teachers.released("DINO", tmp_path / "else.safetensors")


@pytest.mark.parametrize("name", ["MAE", "MoCo v3", "DINO"])
def test_weights_that_are_not_cached(name, monkeypatch, tmp_path):
    monkeypatch.setattr("companion.backbones.try_to_load_from_cache", lambda *a: None)
    with pytest.raises(MissingWeights, match="download"):
        dmt_teachers.released(name)

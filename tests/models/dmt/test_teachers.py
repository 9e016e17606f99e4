"""DMT's teachers: MAE and MoCo v3 by hand, the key encoder, resuming, released files, bad input."""

import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from companion.errors import BadCheckpoint, BadParameter, CorruptFile, MissingWeights
from companion.evaluation import parity
from companion.models.dmt import teachers as dmt_teachers
from companion.models.dmt.teachers import MAE, MoCo
from companion.models.dmt.vit import ViT, build
from companion.models.layers.mae import patchify
from companion.training.fit import CPU, Hardware, fit
from companion.training.schedules import adamw, schedule
from tests.models.common import refuses


def vit(**options):
    torch.manual_seed(0)
    return build("pocket teacher", **options)


def mae(**options):
    encoder = vit()
    torch.manual_seed(1)
    return MAE(encoder, (32, 2, 4), **options)


def moco(**options):
    encoder = vit(positions="mocov3")
    torch.manual_seed(1)
    return MoCo(encoder, 64, 32, **options)


@pytest.fixture
def images():
    return torch.rand(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def trained(model):
    return {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}


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
    assert torch.equal(trace["target"], patchify(images, 8))


def test_mae_trains_all_but_its_tables_and_its_names_go_there_and_back(images):
    model = mae()
    model(images).backward()
    assert trained(model) == {n for n, _ in model.named_parameters()} - {"encoder.pos_embed", "decoder.pos_embed"}
    state = model.to_official()
    assert {"mask_token", "decoder_pos_embed", "decoder_blocks.1.attn.qkv.weight", "decoder_pred.bias"} <= state.keys()
    loaded, noise = MAE.from_official(state, 4, 4), torch.rand(8, 16)
    assert torch.equal(loaded(images, noise), model.eval()(images, noise))
    assert torch.equal(ViT.from_official(state, 4)(images), model.encoder(images))
    with pytest.raises(BadCheckpoint, match="decoder_embed"):
        MAE.from_official(model.encoder.to_official(), 4)
    with pytest.raises(BadParameter, match="mask_ratio"):
        mae(mask_ratio=1.0)


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
    # the patch tokens of the last block reach no loss but through the [CLS] token; the norm's bias shifts all alike,
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


def mirrored(model, batch):
    return model(batch[0], batch[0].flip(-1))


def train(model, images, loss=mirrored, **options):
    options = dict(epochs=3, batch=8, optimizer=adamw(1e-3), schedule=schedule("cosine", 0), hardware=CPU) | options
    return fit(model, loss, TensorDataset(images), **options)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_key_encoder_follows_in_the_released_order(images, accumulate):
    """It is updated once per step before the keys are computed, with the momentum of that step: 0.5 (1 + cos) rises."""
    model, seen = moco(), []
    own = vit(positions="mocov3").patch_embed.proj.weight
    keys = model.key_encoder.norm.weight.clone()

    def loss(model, batch):
        seen.append((model.encoder.norm.weight.detach().clone(), model.key_encoder.norm.weight.clone()))
        return mirrored(model, batch)

    hardware = Hardware("cpu", accumulate=accumulate)
    train(model, images, loss, callbacks=[model.ema(3, 0.5)], hardware=hardware)
    for step in range(3):
        query, key = seen[step * accumulate]
        keys = keys.lerp(query, 1 - (1 - 0.5 * (1 + torch.cos(torch.tensor(torch.pi * step / 3))) / 2))
        torch.testing.assert_close(key, keys)
    assert torch.equal(model.encoder.patch_embed.proj.weight, own) and own.requires_grad, "frozen on a copy"
    refuses((lambda: model.ema(3, 1.5), "momentum"), (lambda: moco(temperature=0), "temperature"))


@pytest.mark.parametrize(("make", "loss"), [(mae, lambda model, batch: model(batch[0])), (moco, mirrored)])
def test_bfloat16(make, loss, images):
    losses = [
        [row["loss"] for row in train(make(), images, loss, hardware=Hardware("cpu", precision=precision))]
        for precision in ("32-true", "bf16-mixed")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=0.1)


def test_released_files(tmp_path, images):
    model = vit(positions="learned", masked=True).eval()
    plain = model.to_official()
    files = {
        "mae.pth": {"model": plain},
        "moco.pth.tar": {"state_dict": model.to_official("module.base_encoder."), "optimizer": {"state": {}}},
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


def test_bad_files(tmp_path, monkeypatch):
    torch.save({"epoch": 3}, tmp_path / "other.pth")
    (tmp_path / "cut.pth").write_bytes(b"PK cut")
    (tmp_path / "cut.safetensors").write_bytes(b"no")
    save_file({"a": torch.ones(1)}, tmp_path / "else.safetensors")
    released, read = dmt_teachers.released, dmt_teachers.read
    refuses(
        (lambda: read(tmp_path / "other.pth"), r"other\.pth"),
        (lambda: released("MAE", tmp_path / "cut.pth"), r"cut\.pth"),
        (lambda: read(tmp_path / "cut.safetensors"), r"cut\.safetensors"),
        error=CorruptFile,
    )
    refuses((lambda: released("MAE", tmp_path / "absent.pth"), "weights"), (lambda: released("BEiT"), "MoCo v3"))
    refuses((lambda: released("DINO", tmp_path / "else.safetensors"), "pos_embed"), error=BadCheckpoint)
    refuses((lambda: released("iBOT"), "bytedance/ibot"), error=MissingWeights)
    monkeypatch.setattr("companion.backbones.try_to_load_from_cache", lambda *a: None)
    for name in ("MAE", "MoCo v3", "DINO"):
        refuses((lambda name=name: released(name), "download"), error=MissingWeights)

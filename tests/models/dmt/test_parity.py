"""The parity runner of DMT takes everything from case.json: cases of other sizes, ratios and seeds run too."""

import math
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from companion.evaluation.parity import Case, folder
from companion.models.dmt.parity import outputs
from companion.models.dmt.teachers import MAE
from companion.models.dmt.vit import ViT
from companion.models.layers.pos_embed import resize_pos_embed, sincos_table
from companion.ops.files import write_json


def case(root: Path, name: str, facts: dict, state: dict[str, Tensor], shapes: dict[str, tuple]) -> Case:
    """A case whose recorded outputs are zeros of `shapes`."""
    (root / name).mkdir()
    write_json(root / name / "case.json", facts)
    write_json(root / name / "names.json", {key: list(tensor.shape) for key, tensor in state.items()})
    save_file({key: torch.zeros(shape) for key, shape in shapes.items()}, root / name / "outputs.safetensors")
    return Case(root / name)


def autoencoder(width: int, heads: int, decoder: tuple[int, int, int], image: int = 64) -> MAE:
    return MAE(ViT(image, 16, width, 2, heads), decoder)


def test_a_masked_autoencoder_of_another_size_and_ratio(tmp_path):
    config = {"num_heads": 3, "decoder_num_heads": 2, "mask_ratio": 0.5, "norm_pix_loss": False}
    facts = {"config": config, "weights_seed": 7, "inputs": {"image": [2, 3, 64, 64], "mask_noise": [2, 16]}}
    facts["outputs"] = {"pred": {"note": "every 1st patch"}, "full_tokens": {"note": "every 2nd patch"}}
    shapes = {"latent": (2, 9, 12), "pred": (2, 16, 768), "full_tokens": (2, 8, 48)}
    found = case(tmp_path, "mae_small", facts, autoencoder(48, 3, (32, 1, 2)).to_official(), shapes)
    ours, images = outputs(found), found.input("image")
    assert {name: tuple(ours[name].shape) for name in shapes} == shapes
    assert ours["mask"].sum(1).tolist() == [8, 8]
    pixels = images.unfold(2, 16, 16).unfold(3, 16, 16).permute(0, 2, 3, 4, 5, 1).reshape(2, 16, 768)
    hidden = ours["mask"].bool()
    torch.testing.assert_close(ours["loss"], (ours["pred"] - pixels)[hidden].square().mean())
    assert torch.equal(ours["mask"], (found.input("mask_noise").argsort(1).argsort(1) >= 8).float())


def test_position_tables_of_another_grid(tmp_path):
    shapes = {"mae": (13, 32), "mocov3": (13, 32)}
    facts = {"config": {"embed_dim": 32, "grid": 5}, "outputs": {name: {"note": "every 2nd row"} for name in shapes}}
    ours = outputs(case(tmp_path, "sincos_tables_small", facts, {}, shapes))
    assert {name: tuple(value.shape) for name, value in ours.items()} == shapes
    # row 8 of the table is patch 7: row 1, column 2; w_3 = 10000^(-3 / 8)
    angle = 2 * 10000 ** (-3 / 8)
    assert math.isclose(ours["mae"][4, 3], math.sin(angle), rel_tol=1e-5)
    assert math.isclose(ours["mocov3"][4, 16 + 3], math.sin(angle), rel_tol=1e-5)


def test_the_ancestors_of_other_sizes(tmp_path):
    """G2SD with one decoder block of the teacher, half of the patches hidden; DMAE with other blocks aligned."""
    teacher, student = autoencoder(64, 2, (64, 3, 2)), autoencoder(48, 3, (32, 1, 1))
    state = {f"teacher.{name}": value for name, value in teacher.to_official().items()}
    state |= {f"student.{name}": value for name, value in student.to_official().items()}
    heads = {"encoderfeature_pred": (48, 64), "decoderfeature_pred": (32, 64)}
    inputs = {"image": [1, 3, 64, 64], "mask_noise": [1, 16]}
    for name, (into, out) in heads.items():
        state |= {f"student.{name}.fc1.weight": torch.empty(out, into), f"student.{name}.fc1.bias": torch.empty(out)}
        state |= {f"student.{name}.fc2.weight": torch.empty(out, out), f"student.{name}.fc2.bias": torch.empty(out)}
    config = {"teacher": "ViT (64, 2, 2), decoder 64 wide 3 deep 2 heads", "student": "ViT (48, 2, 3)"}
    config |= {"mask_ratio": 0.5, "teacher_decoder_block": 1}
    shapes = {"student_encoder_pred": (1, 3, 32), "target_encoder": (1, 3, 32)}
    shapes |= {"student_decoder_pred": (1, 5, 64), "target_decoder": (1, 5, 64)}
    facts = {"config": config, "inputs_seed": 2, "inputs": inputs}
    ours = outputs(case(tmp_path, "g2sd_small", facts, state, shapes))
    assert {name: tuple(ours[name].shape) for name in shapes} == shapes and int(ours["mask"].sum()) == 8
    assert all(torch.isfinite(value).all() for value in ours.values())

    state = {f"teacher.{name}": value for name, value in ViT(64, 16, 64, 3, 4).to_official().items()}
    state |= {f"student.{name}": value for name, value in student.to_official().items()}
    start = "student.aligned_feature_projection_heads.0"
    state |= {f"{start}.fc1.weight": torch.empty(64, 48), f"{start}.fc1.bias": torch.empty(64)}
    state |= {f"{start}.fc2.weight": torch.empty(64, 64), f"{start}.fc2.bias": torch.empty(64)}
    sizes = {"teacher": {"heads": 4, "aligned_block": 0}, "student": {"heads": 3, "aligned_block": 1}}
    facts = {"config": sizes | {"mask_ratio": 0.25}, "seed": 5, "inputs": inputs}
    ours = outputs(case(tmp_path, "dmae_small", facts, state, {"pred": (1, 4, 16), "teacher_block": (1, 13, 64)}))
    assert ours["ids_keep"].shape == (1, 12) and ours["teacher_block"].shape == (1, 13, 64)
    assert ours["pred"].shape == (1, 4, 16) and 0 < ours["loss_embedding"] < 2


def test_the_effects_of_the_findings():
    """Tables of sines and cosines that differ, and the 0.1 that iBOT adds to the sides of a new grid."""
    apart = (sincos_table(768, 14, "mae") - sincos_table(768, 14, "mocov3")).abs()
    assert f"{apart.max():.1f}" == "2.0" and round(100 * float((apart > 0.1).float().mean())) == 30
    recorded = Case(folder() / "dmt" / "ibot_vitb")
    model, images = ViT.from_official(recorded.state, 12), recorded.input("image_other")
    with torch.no_grad():
        moved = model(images)
        model.pos_embed = torch.nn.Parameter(resize_pos_embed(model.pos_embed, (6, 6)))
        exact = model(images)
    assert f"{(moved - exact).abs().max():.2f} {moved.abs().max():.1f}" == "0.10 4.2"

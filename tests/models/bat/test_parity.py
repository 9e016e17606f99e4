"""The parity runner builds models and inputs of any size from case.json."""

import json

import torch
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer

from companion.evaluation.parity import Case, folder
from companion.models.bat import model as bat
from companion.models.bat import parity


def variant(tmp_path, name: str, inputs: dict, names: dict | None = None, **config) -> Case:
    """A recorded case with other inputs, weights and configuration."""
    facts = json.loads((folder() / "bat" / name / "case.json").read_text())
    facts["inputs"] |= inputs
    facts["config"] |= config
    (tmp_path / name).mkdir()
    (tmp_path / name / "case.json").write_text(json.dumps(facts))
    if names is None:
        names = json.loads((folder() / "bat" / name / "names.json").read_text())
    (tmp_path / name / "names.json").write_text(json.dumps(names))
    return Case(tmp_path / name)


def test_other_sizes(tmp_path):
    found = parity.outputs(variant(tmp_path, "head", {"feat": {"shape": [2, 768, 12, 12]}}, feat_sz=12))
    assert found["score"].shape == (2, 1, 12, 12) and found["bbox"].shape == (2, 4)

    vit = VisionTransformer(img_size=224, embed_dim=32, depth=3, num_heads=4, num_classes=0)
    model = bat.BAT(bat.OSTrack(vit, 64, 320, 32), 2)
    shapes = {official: list(model.state_dict()[ours].shape) for ours, official in model.official_names().items()}
    inputs = {"template": {"shape": [2, 6, 64, 64]}, "search": {"shape": [2, 6, 320, 320]}}
    found = parity.outputs(variant(tmp_path, "model_192_depth4", inputs, shapes, heads=4))
    assert found["score_map"].shape == (2, 1, 20, 20)
    assert found["last_attn_x_center_to_search"].shape == (2, 4, 400)
    assert found["block2_x"].shape == (2, 42, 6) and "block3_x" not in found and found["loss"].isfinite()

    case = variant(tmp_path, "losses", {}, {}, search_size=320)
    truth = torch.tensor([[0.2, 0.3, 0.2, 0.1], [0.5, 0.4, 0.3, 0.3]])
    recorded = {"gt_xywh": truth, "pred_cxcywh": truth + 0.1, "keep_rate": torch.tensor([[0.0, 1.0], [3.0, 1.0]])}
    save_file(recorded, case.folder / "outputs.safetensors")
    found = parity.outputs(case)
    assert found["heatmap"].shape == (2, 1, 20, 20)
    assert found["heatmap"].flatten(1).argmax(1).tolist() == [7 * 20 + 6, 11 * 20 + 13]

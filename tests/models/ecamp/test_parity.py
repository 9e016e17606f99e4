"""The runner of recorded cases builds models and inputs from case.json, not from the cases that are shipped."""

import json

import torch
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer

from companion.evaluation import fill, parity
from companion.models.ecamp.heads import Segmenter


def test_a_segmenter_of_another_size_seed_and_number_of_classes(tmp_path):
    encoder = VisionTransformer(img_size=32, patch_size=8, embed_dim=24, depth=1, num_heads=3, num_classes=0)
    model = Segmenter(encoder, channels=(12, 8, 8), classes=2).eval()
    names = {name: list(t.shape) for name, t in model.to_official().items() if t.is_floating_point()}
    filled = {name: torch.from_numpy(fill.parameter(name, tuple(shape), 5)) for name, shape in names.items()}
    model.load_state_dict({own: filled[name] for own, name in model.official_names().items() if name in names}, False)
    images = torch.from_numpy(fill.values("input:image", (2, 3, 32, 32), 5))
    mask = torch.from_numpy(fill.values("input:mask", (2, 2, 32, 32), 5) > 1).float()
    with torch.no_grad():
        logits = model(images)
    p, sums = logits.sigmoid(), (logits.sigmoid() + mask).sum()
    expected = {"logits": logits, "dice_coefficient": (2 * (p * mask).sum() + 1) / (sums + 1)}
    folder = tmp_path / "ecamp" / "segmenter_two_classes"
    folder.mkdir(parents=True)
    inputs = {"image": "fill.values('input:image',(2,3,32,32), seed)", "mask": [2, 2, 32, 32]}
    facts = {"case": folder.name, "config": {"num_attention_heads": 3}, "seed": 5, "inputs": inputs}
    (folder / "case.json").write_text(json.dumps(facts))
    (folder / "names.json").write_text(json.dumps(names))
    save_file({name: value.contiguous() for name, value in expected.items()}, folder / "outputs.safetensors")
    (case,) = parity.cases("ecamp", tmp_path)
    differences = parity.compare("ecamp", case)
    assert {d.output for d in differences} == set(expected) and all(d.agrees for d in differences)

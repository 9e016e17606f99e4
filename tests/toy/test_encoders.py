"""The shipped encoders: their files, and an output of each as it was recorded."""

from functools import partial

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from timm.models.vision_transformer import VisionTransformer

from companion.errors import BadCheckpoint, BadParameter, CorruptFile, MissingWeights
from companion.toy import ecamp, encoders
from companion.toy.encoders import (
    detector,
    domain_mae,
    photo_prompts,
    photo_student,
    slide_dino,
    teachers,
    texture_prior,
    tracker,
)
from companion.training.checkpoints import trained_state
from tests.models.common import refuses
from tests.training.test_fit import same
from tools.encoders import pocket_mae, ship

SHIPPED = sorted(path.stem for path in encoders.WEIGHTS.glob("*.safetensors"))


@pytest.mark.parametrize("name", SHIPPED)
def test_the_card_of_shipped_weights_describes_them(name):
    head, path = encoders.read_card(name), encoders.WEIGHTS / f"{name}.safetensors"
    assert encoders.weights_file(name) == path and head["bytes"] == path.stat().st_size < 2_500_000
    assert head["license"] == "mit" and head["quality"] and head["recipe"]
    assert head["parameters"] <= sum(tensor.numel() for tensor in load_file(path).values())


def test_a_training_writes_weights_with_a_card_that_load_and_damaged_or_wrong_ones_are_refused(tmp_path, monkeypatch):
    wrong = encoders.WEIGHTS / f"{detector.DETECTOR}.safetensors"
    refuses((lambda: detector.clip(wrong), "pocket_scene_clip"), error=BadCheckpoint)
    refuses((lambda: encoders.build("pocket_vit", tmp_path / "none"), "none"), error=BadParameter)
    name, recipe = domain_mae.NAMES["remote"], pocket_mae.RECIPE | {"images": 64, "steps": 2}
    before, train = encoders.read_card(name), partial(pocket_mae.train, "remote")
    path = ship(name, train, partial(pocket_mae.measure, "remote"), recipe, tmp_path, tensors=pocket_mae.tensors)
    monkeypatch.setattr(encoders, "WEIGHTS", tmp_path)
    head = encoders.read_card(name)
    assert list(head) == list(before) and head["recipe"] == recipe and 0 < head["quality"]["share"] < 1
    assert all(head[key] == before[key] for key in ("data", "command", "parameters", "bytes"))
    assert same(domain_mae.load("remote"), train(**recipe))
    path.write_bytes(path.read_bytes()[:-1])
    refuses((lambda: encoders.weights_file(name), path.name), error=CorruptFile)
    path.unlink()
    refuses((lambda: encoders.weights_file(name), name), error=MissingWeights)


def ramp(*shape):
    """Images (2, *shape) from -1 to 1, the same on every machine."""
    count = int(np.prod(shape))
    return (torch.arange(2 * count) * 37 % 101).float().reshape(2, *shape) / 50 - 1


def embedded(name, height, length):
    clip = encoders.build(name)
    return clip.encode_image(ramp(3, height, 32)), clip.encode_text(torch.arange(2 * length).reshape(2, length))


def detections():
    boxes, scores = detector.detector()(ramp(3, 64, 64), detector.texts(detector.clip()))
    return torch.cat([boxes[:, :1] / 64, scores[:, :1].mean(-1, keepdim=True)], -1)


def chests():
    model = ecamp.shipped()
    return model.forward_features(ramp(3, 32, 32))


def denoised():
    pipe, z = texture_prior.build(), ramp(12, 4, 4)
    seen = pipe.unet(z, torch.tensor([300, 700]), pipe.states(["a picture with rows"] * 2)).sample
    return seen, pipe.vae.decode(z).sample


def slide_levels():
    patch, region = slide_dino.build()
    return torch.cat([patch(ramp(3, 32, 32)), region(ramp(48, 4, 4))])


def tracked():
    model = tracker.build()
    return model(ramp(3, 32, 32), ramp(3, 64, 64)).box


def prompts():
    vit = VisionTransformer(224, 14, embed_dim=384, depth=12, num_heads=6, num_classes=0, init_values=1e-5)
    return [x for model in photo_prompts.load(vit).values() for x in trained_state(model).values()]


OUTPUTS = {
    "pocket_vit": (lambda: encoders.build("pocket_vit")(ramp(3, 32, 32)), [-0.01, 1.3617, -1.5888, -0.5712]),
    "pocket_clip": (lambda: embedded("pocket_clip", 32, 16), [0.1861, 1.5576, -1.0235, -3.9495]),
    "pocket_pedestrian_clip": (lambda: embedded("pocket_pedestrian_clip", 64, 24), [-0.1598, 1.7685, 2.292, 0.8485]),
    "pocket_scene_clip, pocket_ov_detector": (detections, [0.3905, 0.3422, 0.1776, 0.0021]),
    "pocket_ecamp": (chests, [-0.0014, 0.9258, 2.0461, 0.43]),
    "pocket_mae_remote": (lambda: domain_mae.load("remote")(ramp(3, 32, 32)), [0.0008, 0.9102, -0.6978, -0.447]),
    "pocket_mae_medical": (lambda: domain_mae.load("medical")(ramp(3, 32, 32)), [0.0061, 0.9139, -0.79, 0.0563]),
    "pocket_ostrack": (tracked, [0.3006, 0.1547, 0.3935, 0.2482]),
    "pocket_slide_dino": (slide_levels, [0.0115, 6.1751, 0.6686, -1.7726]),
    "pocket_teachers": (
        lambda: [m(ramp(3, 32, 32)) for m in teachers.load().values()],
        [0.0, 1.0016, -0.7689, -1.2316],
    ),
    "pocket_texture_prior": (denoised, [-0.2798, 0.3058, 0.0232, -0.1737]),
    "photo_student": (lambda: photo_student.load()(ramp(3, 224, 224)), [-0.0032, 0.9103, -0.4645, -0.1463]),
    "photo_prompts": (prompts, [0.0308, 0.1817, 0.0374, 0.0217]),
}


@pytest.mark.parametrize("name", OUTPUTS)
def test_an_encoder_computes_what_it_did(name):
    """Mean, standard deviation, and two values of its output."""
    output, expected = OUTPUTS[name]
    with torch.no_grad():
        found = output()
    found = found.flatten() if isinstance(found, torch.Tensor) else torch.cat([x.flatten() for x in found])
    assert [*map(float, (found.mean(), found.std(), found[1], found[-1]))] == pytest.approx(expected, abs=5e-4)


def test_every_shipped_file_is_loaded_by_an_output():
    assert sorted(", ".join(OUTPUTS).split(", ")) == SHIPPED


def test_tokens_of_the_real_encoders():
    """The [CLS] token first, before the final norm; in its place the mean of the EfficientNet's map."""
    try:
        known = photo_student.teachers()
    except MissingWeights:
        pytest.skip("the extra `real` is not installed")
    images, vit = photo_student.held_out()[:1], known["ViT-S/14"]
    first, second = (photo_student.tokens(name, encoder, images) for name, encoder in known.items())
    assert first.shape == (1, 257, 384) and second.shape == (1, 257, 112)
    with torch.no_grad():
        x = vit.forward_features(photo_student.seen_by_teacher("ViT-S/14", vit, images))
        torch.testing.assert_close(vit.norm(first), x, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(second[:, 0], second[:, 1:].mean(1))

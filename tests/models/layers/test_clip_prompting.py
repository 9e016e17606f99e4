"""Prompted CLIPs: gradients, equality with the plain CLIP, class names, the authors' names, bad inputs.

The forward passes of CoOp, CoCoOp and MaPLe are recorded cases of DPLQ (tests/parity/dplq).
"""

import copy

import open_clip
import pytest
import torch
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from companion.errors import BadCheckpoint, BadParameter
from companion.models.dplq.baselines import CoCoOp, CoOp, MaPLe, ZeroShot
from companion.models.layers import clip_prompting as prompting
from companion.models.layers.clip_prompting import ImageFeatures
from companion.toy import encoders
from companion.toy.tokens import Tokenizer
from companion.training.fit import outputs_of
from companion.training.hardware import CPU
from tests.models.common import EXCHANGES, assert_recomputed_gradients_are_equal, draw, refuses
from tests.parity.runner import ROOT as PARITY
from tests.parity.runner import Case

CLASSES = ["red disc", "green ring", "large violet cross"]
OPTIONS = {CoOp: {"tokens": 4}, MaPLe: {"depth": 4}}
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


@pytest.fixture
def clip():
    return encoders.build("pocket_clip")


def images(count: int = 2) -> torch.Tensor:
    return draw(count, 3, 32, 32)


def build(kind, clip, classes=CLASSES, **changes):
    torch.manual_seed(0)
    return kind(clip, classes, Tokenizer(), **(OPTIONS.get(kind, {}) | changes)).eval()


def moved(model):
    """The model with every parameter perturbed, so that none is zero or equal to another by its initialisation."""
    torch.manual_seed(1)
    with torch.no_grad():
        for p in model.trained().values():
            p.add_(0.1 * torch.randn_like(p))
    return model


@pytest.mark.parametrize("kind", [CoOp, CoCoOp, MaPLe])
def test_gradients_reach_every_trained_tensor_and_nothing_of_clip(kind, clip):
    model = build(kind, clip.train()).train()
    F.cross_entropy(model(images()), torch.tensor([0, 2])).backward()
    assert all(p.grad is not None and p.grad.any() for p in model.trained().values())
    assert all(p.grad is None and not p.requires_grad for p in model.clip.parameters()) and not model.clip.training
    assert clip.training and all(p.requires_grad for p in clip.parameters()), "the caller's is left alone"


def test_gradient_checkpointing_changes_nothing(clip):
    labels = torch.tensor([0, 2])
    assert_recomputed_gradients_are_equal(lambda: build(MaPLe, clip), lambda m: F.cross_entropy(m(images()), labels))


@torch.no_grad()
def test_zero_shot_is_the_plain_clip_and_so_is_an_untrained_context_of_the_same_words(clip):
    image, text, scale = clip(images(), Tokenizer()([f"a photo of a {name}." for name in CLASSES]))
    expected = scale * image @ text.T
    for kind, options in ((ZeroShot, {}), (CoOp, {"tokens": 4}), (CoOp, {"tokens": 2})):
        found = build(kind, clip, template="a photo of a {}.", **options)(images())
        torch.testing.assert_close(found, expected, **CLOSE)
    coop, cocoop = build(CoOp, clip, tokens=2, template="a photo of a {}."), build(CoCoOp, clip, tokens=2)
    assert torch.equal(coop.ctx, cocoop.ctx) and torch.equal(coop.ctx, coop.embedded[0, 1:3])
    assert (cocoop(images()) - expected).abs().max() > 1e-3, "its network adds a bias"
    assert torch.equal(build(CoOp, clip, ["red_disc"]).embedded, build(CoOp, clip, ["red disc"]).embedded)


@torch.no_grad()
def test_more_tokens_than_words_are_drawn_and_texts_end_where_the_class_name_ends(clip):
    model = moved(build(MaPLe, clip, tokens=6))
    ids = Tokenizer()(CLASSES)
    assert torch.equal(model.embedded[:, 7:], clip.token_embedding(ids)[:, 1:-6])
    assert torch.equal(model.ends, ids.argmax(1) + 6) and model.length == 1 + 6 + 3 + 1 < clip.context_length
    truncated = prompting.encode_text(clip, model.prompted(model.ctx), model.ends, model.deep_text)
    model.length = clip.context_length
    whole = prompting.encode_text(clip, model.prompted(model.ctx), model.ends, model.deep_text)
    torch.testing.assert_close(truncated, whole, **CLOSE)


@pytest.mark.parametrize("kind", [ZeroShot, CoOp, CoCoOp, MaPLe])
@torch.no_grad()
def test_images_and_classes_are_judged_apart_and_features_may_stand_for_images(kind, clip):
    model, x = moved(build(kind, clip)), images(3)
    logits = model(x)
    torch.testing.assert_close(model(x.flip(0)).flip(0), logits, **CLOSE)
    if kind is not MaPLe:  # whose image tower has prompts
        features = outputs_of(ImageFeatures(clip), TensorDataset(x), hardware=CPU)
        torch.testing.assert_close(model(features), logits, **CLOSE)
    model.reset_classifier([CLASSES[2], CLASSES[0]])
    torch.testing.assert_close(model(x), logits[:, [2, 0]], **CLOSE)
    assert (logits[0] - logits[1]).abs().max() > 0.01 and (logits[:, 0] - logits[:, 1]).abs().max() > 0.01


@pytest.mark.parametrize("kind", [ZeroShot, CoOp, CoCoOp, MaPLe])
@torch.no_grad()
def test_class_texts_follow_the_weights_that_are_loaded(kind, clip):
    other, x = moved(build(kind, encoders.build("pocket_clip", "random"))), images()
    model = build(kind, clip)
    assert not model.load_state_dict(other.state_dict()).missing_keys
    torch.testing.assert_close(model(x), other(x), **CLOSE)


@pytest.mark.parametrize("way", EXCHANGES)
@pytest.mark.parametrize("kind", [ZeroShot, CoOp, CoCoOp, MaPLe])
@torch.no_grad()
def test_class_texts_follow_the_clip_of_a_model(kind, way, clip):
    model, x = moved(build(kind, clip)), images()
    before = model(x)
    for seed in range(3):
        torch.manual_seed(seed)
        other = encoders.build("pocket_clip", "random")
        expected = build(kind, other)
        expected.load_state_dict(model.trained(), strict=False)
        EXCHANGES[way](model.clip, other)
        assert torch.equal(model(x), expected(x)) and not torch.equal(model(x), before)
        assert torch.equal(copy.deepcopy(model)(x), expected(x))


def test_class_names_that_are_refused_change_nothing(clip):
    model, x = build(ZeroShot, clip), images()
    logits = model(x)
    for names in ("disc", [], ["ring", "disc " * 20]):
        with pytest.raises(BadParameter):
            model.reset_classifier(names)
        assert model.classes == tuple(CLASSES) and torch.equal(model(x), logits)
    model.reset_classifier(["disc " * 8])  # with template, start and end: 14 of 16 tokens


@pytest.mark.parametrize(
    ("name", "kind", "options"),
    [
        ("model_vitb16", MaPLe, {"depth": 2}),
        ("baseline_maple", MaPLe, {"depth": 2, "tokens": 4}),
        ("baseline_coop", CoOp, {}),
        ("baseline_cocoop", CoCoOp, {}),
    ],
)
def test_texts_of_a_real_clip_are_the_authors(name, kind, options):
    """The ids and ends that the authors' code made of its class names, with open_clip's tokenizer."""
    vision = CLIPVisionCfg(layers=2, width=64, patch_size=8, image_size=16)
    clip = CLIP(16, vision, CLIPTextCfg(77, 49408, width=64, heads=1, layers=2), quick_gelu=True)
    facts = Case(PARITY / "dplq" / name).facts["about"]
    model = kind(clip, facts["config"]["class_names"], open_clip.get_tokenizer("ViT-B-16-quickgelu"), **options)
    assert model.ends.tolist() == facts["eot_positions"]
    if "token_ids" in facts:
        assert torch.equal(model.embedded[:, :16], clip.token_embedding(torch.tensor(facts["token_ids"])))


def test_a_clip_or_text_that_does_not_fit_is_refused(clip):
    pooled = CLIPVisionCfg(image_size=8, patch_size=4, width=64, layers=1, pool_type="avg")
    average = CLIP(16, pooled, CLIPTextCfg(16, 64, width=64, heads=1, layers=1))
    other = open_clip.get_tokenizer("ViT-B-16-quickgelu")
    refuses(
        (lambda: build(MaPLe, clip, depth=7), "7"),
        (lambda: build(CoOp, clip, tokens=12), "large violet cross"),
        (lambda: build(CoOp, clip, "red disc"), "red disc"),
        (lambda: CoOp(clip, CLASSES, other), "16"),
        (lambda: build(CoOp, average), "CLIP"),
    )
    refuses((lambda: CoOp.from_official({"a": torch.zeros(1)}, clip, CLASSES, Tokenizer()), "ctx"), error=BadCheckpoint)


@pytest.mark.parametrize("kind", [CoOp, CoCoOp, MaPLe])
def test_the_learners_own_tensors_are_read_for_other_classes(kind, clip):
    """As CoOp and CoCoOp keep them; a whole state dict changes nothing of the CLIP that is given."""
    model, before = moved(build(kind, clip)), {name: tensor.clone() for name, tensor in clip.state_dict().items()}
    state = model.to_official()
    kind.from_official({name: tensor + 1 for name, tensor in state.items()}, clip, CLASSES, Tokenizer())
    assert all(torch.equal(tensor, before[name]) for name, tensor in clip.state_dict().items())
    learner = {n.removeprefix("prompt_learner."): t for n, t in state.items() if n.startswith("prompt_learner.")}
    novel = kind.from_official(learner, clip, ["bar"], Tokenizer())
    model.reset_classifier(["bar"])
    assert torch.equal(novel(images()), model(images()))

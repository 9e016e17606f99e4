"""Prompted CLIPs: trainable parameters, equality with the plain CLIP, class names, the authors' names, bad inputs."""

import open_clip
import pytest
import torch
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from companion.errors import BadCheckpoint, BadParameter
from companion.evaluation.parity import Case, folder
from companion.models.layers import clip_prompting as prompting
from companion.models.layers.clip_prompting import CoCoOp, CoOp, ImageFeatures, LinearStack, MaPLe, ZeroShot
from companion.toy import encoders
from companion.toy.datasets.tokens import Tokenizer
from companion.training.fit import CPU, predict
from tests.models.common import assert_recomputed_gradients_are_equal, misfits, refuses

CLASSES = ["red disc", "green ring", "large violet cross"]
OPTIONS = {CoOp: {"tokens": 4}, CoCoOp: {}, MaPLe: {"depth": 4}}


@pytest.fixture
def clip():
    return encoders.build("pocket_clip")


def images(count: int = 2) -> torch.Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(1))


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
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.trained().values())
    assert all(p.grad is None and not p.requires_grad for p in model.clip.parameters())
    assert not model.clip.training and build(ZeroShot, clip).count() == 0
    # the CLIP that was given is left alone, and gets no weights of a checkpoint either
    before = {name: tensor.clone() for name, tensor in clip.state_dict().items()}
    state = {name: tensor + 1 for name, tensor in model.to_official().items()}
    kind.from_official(state, clip, CLASSES, Tokenizer())
    assert clip.training and all(p.requires_grad for p in clip.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in clip.state_dict().items())


def test_gradient_checkpointing_changes_nothing(clip):
    labels = torch.tensor([0, 2])
    assert_recomputed_gradients_are_equal(lambda: build(MaPLe, clip), lambda m: F.cross_entropy(m(images()), labels))


def test_zero_shot_is_the_plain_clip(clip):
    model = build(ZeroShot, clip)
    with torch.no_grad():
        image, text, scale = clip(images(), Tokenizer()([f"a photo of {name}." for name in CLASSES]))
    torch.testing.assert_close(model(images()), scale * image @ text.T, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", [CoOp, MaPLe])
def test_a_context_that_starts_from_words_is_those_words(kind, clip):
    """Untrained, the texts are the template's; of MaPLe, whose image tokens change the logits, only the texts."""
    template = "a photo of a {}."
    model = build(kind, clip, tokens=4, template=template, **({"depth": 1} if kind is MaPLe else {}))
    words = build(ZeroShot, clip, template=template)
    text = prompting.encode_text(clip, model.prompted(model.ctx), model.ends)
    torch.testing.assert_close(text, words.text_features, rtol=0, atol=1e-5)
    if kind is CoOp:
        torch.testing.assert_close(model(images()), words(images()), rtol=0, atol=1e-5)


def test_fewer_tokens_than_words_leave_the_other_words_and_more_are_drawn(clip):
    model = build(MaPLe, clip, tokens=6)
    names = clip.token_embedding(Tokenizer()(CLASSES))
    assert torch.equal(model.embedded[:, 7:], names[:, 1:-6])
    assert torch.equal(model.ends, Tokenizer()(CLASSES).argmax(1) + 6) and 0 < model.ctx.std() < 0.03
    model = build(CoCoOp, clip, tokens=2)
    ids = Tokenizer()([f"a photo of a {name}." for name in CLASSES])
    assert torch.equal(model.embedded, clip.token_embedding(ids))
    assert torch.equal(model.ctx, clip.token_embedding(ids)[0, 1:3])
    assert torch.equal(build(CoOp, clip, ["red_disc"]).embedded, build(CoOp, clip, ["red disc"]).embedded)


def test_texts_cut_after_their_ends_give_the_same(clip):
    model = moved(build(MaPLe, clip))
    assert model.length == 1 + 4 + 3 + 1 < clip.context_length  # start, "a photo of a", the longest name, end
    cut = prompting.encode_text(clip, model.prompted(model.ctx), model.ends, model.deep_text)
    model.length = clip.context_length
    whole = prompting.encode_text(clip, model.prompted(model.ctx), model.ends, model.deep_text)
    torch.testing.assert_close(cut, whole, rtol=0, atol=1e-5)


def test_text_prompts_overwrite_the_positions_after_the_start_layer_by_layer(clip):
    """`encode_text` against open_clip's own blocks, written out for one text."""
    n, length, tower = 3, 9, clip.transformer
    torch.manual_seed(0)
    x, deep = torch.randn(1, length, 64), torch.randn(1, n, 64)
    found = prompting.encode_text(clip, x, torch.tensor([length - 1]), deep)
    x = x + clip.positional_embedding[:length]
    for i, block in enumerate(tower.resblocks):
        if i == 1:
            x[:, 1 : 1 + n] = deep[0]
        x = block(x, attn_mask=clip.attn_mask[:length, :length])
    torch.testing.assert_close(found, clip.ln_final(x[:, -1]) @ clip.text_projection, rtol=0, atol=1e-5)


def test_image_prompts_enter_at_the_end_and_are_replaced_layer_by_layer(clip):
    """`encode_image` against open_clip's own blocks, written out for one image at a time."""
    n, width = 2, 48
    first, deep = torch.randn(2, n, width), torch.randn(3, 2, n, width)
    found = prompting.encode_image(clip, images(), first, deep)
    visual = clip.visual
    for b in range(2):
        x = visual._embeds(images()[b : b + 1])
        x = torch.cat([x, first[b : b + 1]], dim=1)
        for i, block in enumerate(visual.transformer.resblocks):
            if i in (1, 2, 3):
                x[:, -n:] = deep[i - 1, b]
            x = block(x)
        torch.testing.assert_close(found[b : b + 1], visual._pool(x)[0] @ visual.proj, rtol=0, atol=1e-5)
    torch.testing.assert_close(prompting.encode_image(clip, images()), visual(images()))


def test_cocoop_with_a_silent_net_is_coop(clip):
    cocoop = build(CoCoOp, clip)
    for p in cocoop.meta_net.parameters():
        torch.nn.init.zeros_(p)
    coop = build(CoOp, clip, template="a photo of a {}.")
    torch.testing.assert_close(cocoop(images()), coop(images()), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", [ZeroShot, CoOp, CoCoOp])
def test_features_may_stand_for_images(kind, clip):
    model = moved(build(kind, clip))
    features = predict(ImageFeatures(clip), TensorDataset(images(3)), hardware=CPU)
    torch.testing.assert_close(model(features), model(images(3)), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", [ZeroShot, CoOp, CoCoOp, MaPLe])
def test_images_and_classes_are_judged_apart(kind, clip):
    """An image's logits depend neither on its batch nor on the other classes."""
    model = moved(build(kind, clip))
    with torch.no_grad():
        logits = model(images(3))
        torch.testing.assert_close(model(images(3).flip(0)).flip(0), logits, rtol=0, atol=1e-5)
        model.set_classes([CLASSES[2], CLASSES[0]])
        torch.testing.assert_close(model(images(3)), logits[:, [2, 0]], rtol=0, atol=1e-5)


def test_a_stack_is_its_layers_one_by_one():
    torch.manual_seed(0)
    stack = LinearStack(6, 5, 3)
    assert torch.equal(stack.weight[0], stack.weight[2])
    torch.nn.init.normal_(stack.weight)
    x = torch.randn(3, 4, 2, 6)
    for n in range(3):
        torch.testing.assert_close(stack(x)[n], F.linear(x[n], stack.weight[n], stack.bias[n]))


def test_texts_of_a_real_clip_are_the_authors():
    """The ids and ends that the authors' code made of its class names, with open_clip's tokenizer."""
    torch.manual_seed(0)  # OpenAI's context and vocabulary, small towers
    vision = CLIPVisionCfg(layers=2, width=64, patch_size=8, image_size=16)
    clip = CLIP(16, vision, CLIPTextCfg(77, 49408, width=64, heads=1, layers=2), quick_gelu=True)
    tokenizer = open_clip.get_tokenizer("ViT-B-16-quickgelu")
    for name, kind, options in (
        ("model_vitb16", MaPLe, {"depth": 2}),
        ("baseline_maple", MaPLe, {"depth": 2, "tokens": 4}),
        ("baseline_coop", CoOp, {}),
        ("baseline_cocoop", CoCoOp, {}),
    ):
        facts = Case(folder() / "dplq" / name).facts
        model = kind(clip, facts["config"]["class_names"], tokenizer, **options)
        assert model.ends.tolist() == facts["eot_positions"]
        if "token_ids" in facts:
            expected = clip.token_embedding(torch.tensor(facts["token_ids"]))
            assert torch.equal(model.embedded[:, :16], expected)
        # open_clip's own text tower, on these tokens without truncation
        x = model.embedded.clone()
        x[:, 1 : 1 + len(model.ctx)] = model.ctx
        x = clip.ln_final(clip.transformer(x + clip.positional_embedding, attn_mask=clip.attn_mask))
        expected = F.normalize(x[torch.arange(len(x)), model.ends] @ clip.text_projection, dim=-1)
        text = prompting.encode_text(clip, model.prompted(model.ctx), model.ends)
        torch.testing.assert_close(F.normalize(text, dim=-1), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", [CoOp, CoCoOp, MaPLe])
def test_official_names_round_trip(kind, clip):
    model = moved(build(kind, clip))
    state = model.to_official()
    assert {"logit_scale", "prompt_learner.token_suffix", "image_encoder.proj", "text_encoder.ln_final.bias"} <= set(
        state
    )
    again = kind.from_official(state, encoders.build("pocket_clip", "random"), CLASSES, Tokenizer())
    assert again.to_official().keys() == state.keys()
    assert all(torch.equal(again.to_official()[n], state[n]) for n in state if "token_" not in n)
    # the learner's own tensors alone, as CoOp and CoCoOp keep them: for other classes, on the CLIP that is given
    learner = {n.removeprefix("prompt_learner."): t for n, t in state.items() if n.startswith("prompt_learner.")}
    novel = kind.from_official(learner, clip, ["bar"], Tokenizer())
    model.set_classes(["bar"])
    assert torch.equal(novel(images()), model(images()))


@pytest.mark.parametrize("heads", [None, (4, 2)])
def test_a_clip_is_built_from_a_whole_state_dict(heads):
    image, text = heads or (1, 1)
    vision = CLIPVisionCfg(layers=3, width=64, head_width=64 // image, patch_size=4, image_size=12)
    torch.manual_seed(0)
    clip = CLIP(32, vision, CLIPTextCfg(20, 64, width=64, heads=text, layers=2), quick_gelu=True).eval()

    def tokenizer(texts):
        return Tokenizer()(texts, 20)

    model = moved(MaPLe(clip, CLASSES, tokenizer, depth=3)).eval()
    again = MaPLe.from_official(model.to_official(), ends=model.ends.tolist(), heads=heads)
    x = torch.randn(2, 3, 12, 12)
    assert torch.equal(again(x), model(x))
    with pytest.raises(BadParameter, match="Texts"):
        again.set_classes(["bar"])


def test_a_checkpoint_that_does_not_fit_lists_its_names(clip):
    state = build(MaPLe, clip).to_official()
    state["extra"] = torch.zeros(1)
    state["prompt_learner.proj.bias"] = torch.zeros(5)
    del state["prompt_learner.compound_prompt_projections.1.weight"], state["image_encoder.proj"]
    assert misfits(MaPLe.from_official, state, clip, CLASSES, Tokenizer()) == (
        ["image_encoder.proj", "prompt_learner.compound_prompt_projections.1.weight"],
        ["extra"],
        ["prompt_learner.proj.bias (5,), expected (48,)"],
    )
    for kind in (CoOp, CoCoOp, MaPLe):
        with pytest.raises(BadCheckpoint, match="ctx"):
            kind.from_official({"a": torch.zeros(1)}, clip, CLASSES, Tokenizer())
    with pytest.raises(BadCheckpoint, match=r"conv1\.weight"):
        CoOp.from_official({"ctx": torch.zeros(4, 64)}, ends=[3])


def test_what_is_not_accepted(clip):
    pooled = CLIPVisionCfg(image_size=8, patch_size=4, width=64, layers=1, pool_type="avg")
    average = CLIP(16, pooled, CLIPTextCfg(16, 64, width=64, heads=1, layers=1))
    state, other = build(CoOp, clip).to_official(), open_clip.get_tokenizer("ViT-B-16-quickgelu")
    refuses(
        (lambda: build(MaPLe, clip, depth=0), "depth = 0"),
        (lambda: build(MaPLe, clip, depth=7), "1 to 6"),
        (lambda: build(CoOp, clip, tokens=0), "tokens = 0"),
        (lambda: build(CoOp, clip, tokens=12), "at most 11.*large violet cross"),
        (lambda: build(CoCoOp, clip, template="a photo"), "template"),
        (lambda: build(CoOp, clip, []), "classes"),
        (lambda: build(CoOp, clip, "red disc"), "classes"),
        (lambda: build(ZeroShot, clip, "red disc"), "classes"),
        (lambda: CoOp.from_official(state), "end-of-text"),
        (lambda: CoOp.from_official(state, clip), "class names"),
        (lambda: CoOp(clip, CLASSES, other), r"tokenizer.*\(1, 16\) ids below 64"),
        (lambda: build(CoOp, encoders.build("pocket_vit")), "class token"),
        (lambda: build(CoOp, average), "class token"),
    )
    assert build(CoOp, clip, tokens=11)(images()).shape == (2, 3)

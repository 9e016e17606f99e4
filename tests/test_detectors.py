"""Detectors for refinement: tiny random ones against transformers' own functions; finished results."""

import json

import pytest
import torch
import transformers as hf
from torchvision.ops import clip_boxes_to_image

from companion import detectors
from companion.detectors import GroundingDino, Output, Owl, build, limits, read_results, refine_results, refined, rows
from companion.errors import BadParameter, CorruptFile, MissingWeights
from companion.models.sic_cads import refine
from tests.data.conftest import refused

NAMES = ["cat", "hot_dog", "moon"]
SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
OWLS = {
    "owlvit": (hf.OwlViTConfig, hf.OwlViTForObjectDetection, hf.OwlViTImageProcessor),
    "owlv2": (hf.Owlv2Config, hf.Owlv2ForObjectDetection, hf.Owlv2ImageProcessor),
}


def image_of(height: int = 48, width: int = 80) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (3, height, width), generator=generator, dtype=torch.uint8)


def owl_model(kind: str) -> torch.nn.Module:
    torch.manual_seed(0)
    config, family, _ = OWLS[kind]
    text, vision = SMALL | {"projection_dim": 32}, SMALL | {"image_size": 64, "patch_size": 16}
    return family(config(text_config=text, vision_config=vision, projection_dim=32)).eval()


def owl(kind: str, names=NAMES, model: torch.nn.Module | None = None) -> Owl:
    return Owl(model or owl_model(kind), OWLS[kind][2](size={"height": 64, "width": 64}), names)


@pytest.mark.parametrize("kind", list(OWLS))
def test_the_callers_model_is_not_changed(kind):
    model = owl_model(kind).train()
    detector = owl(kind, model=model)
    assert model.training and all(p.requires_grad for p in model.parameters()) and not detector.model.training


@pytest.mark.parametrize("kind", list(OWLS))
@pytest.mark.parametrize("shape", [(48, 80), (80, 48)])
def test_owl_gives_the_librarys_boxes_and_scores_of_all_classes(kind, shape):
    detector, image = owl(kind), image_of(*shape)
    found = detector(image)
    assert found.size == shape and found.boxes.shape == (16, 4) and found.probabilities.shape == (16, 3)
    ids = detectors.SimpleTokenizer(context_length=16)([f"a photo of a {n.replace('_', ' ')}" for n in NAMES])
    given = detector.processor(images=image, return_tensors="pt")
    with torch.no_grad():
        whole = detector.model(input_ids=ids, attention_mask=(ids > 0).long(), **given)
    torch.testing.assert_close(found.probabilities, whole.logits[0].sigmoid())
    theirs = detector.processor.post_process_object_detection(whole, threshold=0.0, target_sizes=[shape])[0]
    torch.testing.assert_close(found.boxes, clip_boxes_to_image(theirs["boxes"], shape))
    torch.testing.assert_close(theirs["scores"], found.probabilities.amax(1))  # one class a box: too late to refine


def test_owl_reads_its_names_once():
    detector = owl("owlvit")
    calls = []
    detector.tower.text_model.register_forward_hook(lambda *_: calls.append(1))
    detector(image_of())
    assert not calls and detector.queries.shape == (3, 32)
    assert not any(p.requires_grad for p in detector.parameters())


def bert() -> hf.BertTokenizer:
    """A tokenizer of few words; the model knows its special tokens by BERT's ids."""
    vocab = {"[PAD]": 0} | {f"[unused{i}]": i for i in range(1, 1100)}
    known = {"[UNK]": 100, "[CLS]": 101, "[SEP]": 102, "[MASK]": 103, ".": 1012, "?": 1029}
    known |= {word: 200 + i for i, word in enumerate(("cat", "hot", "dog", "moon", "ball"))}
    return hf.BertTokenizer(vocab={w: i for w, i in vocab.items() if i not in known.values()} | known)


def dino(names=NAMES, length: int = 12, **options) -> GroundingDino:
    torch.manual_seed(0)
    layers = {"encoder_layers": 1, "decoder_layers": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    stages = {"depths": [1] * 4, "num_heads": [1] * 4, "out_features": ["stage2", "stage3", "stage4"]}
    swin = hf.SwinConfig(image_size=32, embed_dim=8, window_size=2, **stages)
    text = hf.BertConfig(**SMALL | {"hidden_size": 16}, vocab_size=1100)
    config = hf.GroundingDinoConfig(
        backbone_config=swin, text_config=text, d_model=32, num_queries=20, max_text_len=length, **layers, **heads
    )
    processor = hf.GroundingDinoImageProcessor(size={"shortest_edge": 64, "longest_edge": 96})
    return GroundingDino(hf.GroundingDinoForObjectDetection(config).eval(), processor, bert(), names, **options)


@torch.no_grad()
def test_grounding_dino_takes_the_best_token_of_each_name():
    detector, image = dino(), image_of()
    found = detector(image)
    given = detector.processor(images=image, return_tensors="pt")
    whole = detector.model(**given, **bert()("cat. hot dog. moon.", return_tensors="pt"))
    said = whole.logits[0].sigmoid()
    torch.testing.assert_close(found.probabilities, torch.stack([said[:, 1], said[:, 3:5].amax(1), said[:, 6]], 1))
    mean = dino(tokens="mean")(image)
    torch.testing.assert_close(mean.probabilities[:, 1], said[:, 3:5].mean(1))
    theirs = hf.GroundingDinoProcessor(detector.processor, bert()).post_process_grounded_object_detection(
        whole, threshold=0.0, target_sizes=[(48, 80)]
    )[0]
    torch.testing.assert_close(found.boxes, clip_boxes_to_image(theirs["boxes"], (48, 80)))


def test_many_names_take_several_passes():
    detector = dino(["cat", "hot_dog", "moon", "ball", "dog"])
    assert [list(spans) for _, spans in detector.chunks] == [[0, 1, 2, 3], [4]]
    assert all(len(ids) + 2 <= 12 for ids, _ in detector.chunks)
    found = detector(image_of())
    assert found.boxes.shape == (40, 4) and found.probabilities.shape == (40, 5)
    assert found.probabilities[:20, 4].eq(0).all() and found.probabilities[20:, :4].eq(0).all()
    p = torch.full((5,), 0.5)
    assert refine(found.probabilities, p, 0.5)[20:, :4].eq(0).all()  # no class comes from a pass that was not asked
    refused(BadParameter, "at most 9 tokens", dino, ["cat " * 10])


def output(count: int = 12, classes: int = 3) -> Output:
    generator = torch.Generator().manual_seed(2)
    corner = torch.rand(count, 2, generator=generator) * 40
    boxes = torch.cat([corner, corner + 8 + 20 * torch.rand(count, 2, generator=generator)], 1)
    return Output(boxes, torch.rand(count, classes, generator=generator), (80, 80))


def test_top_k_comes_after_refinement():
    found = output()
    p = torch.tensor([0.01, 0.01, 0.99])
    assert (refined(found, p, 0.9, top=4).classes == 2).all()
    assert len(set(refined(found, top=4).classes.tolist())) > 1
    plain = refined(found, p, 0.0, top=36)
    assert torch.equal(plain.scores, refined(found, top=36).scores)


def test_rows_are_coco_results():
    found = refined(output(), top=2)
    first = rows(found, 7, [1, 5, 9])[0]
    assert first["image_id"] == 7 and first["category_id"] == [1, 5, 9][found.classes[0]]
    x, y, width, height = first["bbox"]
    torch.testing.assert_close(torch.tensor([x, y, x + width, y + height]), found.boxes[0])


def test_any_callable_is_a_detector_when_its_output_fits():
    boxes, probabilities, size = output()
    for found, p, said in (
        (Output(boxes, probabilities * 3 - 1, size), None, "sigmoid of logits"),
        (Output(boxes[:3], probabilities, size), None, r"boxes \(R, 4\)"),
        (output(), torch.ones(4), "p = "),
    ):
        refused(BadParameter, said, refined, found, p)


def test_finished_results_are_rescaled_as_the_matrix_is():
    found, p = output(), torch.tensor([0.2, 0.9, 0.5])
    everything = rows(refined(found, nms=None, top=36), 1, [4, 6, 8])
    later = refine_results(everything, {1: p}, [4, 6, 8], 0.7)
    direct = rows(refined(found, p, 0.7, nms=None, top=36), 1, [4, 6, 8])
    assert sorted(round(r["score"], 5) for r in later) == sorted(round(r["score"], 5) for r in direct)
    assert everything[0]["score"] != later[0]["score"]
    cut = refine_results(rows(refined(found, nms=None, threshold=0.5), 1, [4, 6, 8]), {1: p}, [4, 6, 8], 0.7)
    assert len(cut) < len(direct)  # removed boxes do not reappear


def test_limits_say_what_was_cut():
    found = output()
    one = found.probabilities == found.probabilities.amax(1, keepdim=True)
    finished = rows(refined(found._replace(probabilities=found.probabilities * one), nms=None, top=5), 1, [1, 2, 3])
    found_limits = limits([*finished, finished[0] | {"image_id": 2}])
    assert found_limits["most rows an image"] == 5 and found_limits["images with that many"] == 50
    assert found_limits["boxes with one class"] == 100
    assert found_limits["lowest score"] == min(r["score"] for r in finished)
    assert limits(rows(refined(found, nms=None, top=36), 1, [1, 2, 3]))["boxes with one class"] == 0
    refused(BadParameter, "no rows", limits, [])


def test_result_files(tmp_path):
    path, good = tmp_path / "dets.json", {"image_id": 1, "category_id": 3, "bbox": [1, 2, 3, 4], "score": 0.5}
    path.write_text(json.dumps([good]))
    assert read_results(path) == [good]
    for broken, said in (
        ({"a": 1}, "a list"),
        ([good, {"image_id": 1}], "row 1"),
        ([good | {"category_id": "cat"}], "row 0"),
        ([good | {"score": 3.2}], "'score' is 3.2"),
    ):
        path.write_text(json.dumps(broken))
        refused(CorruptFile, said, read_results, path)
    path.write_text(json.dumps([good])[:-9])
    refused(CorruptFile, r"dets\.json", read_results, path)
    for image, category, gamma, said in ((2, 3, 0.5, "image_id 1"), (1, 4, 0.5, "without 3"), (1, 3, -0.1, "gamma")):
        refused(BadParameter, said, refine_results, [good], {image: torch.ones(1)}, [category], gamma)


def test_weights_from_a_folder(tmp_path):
    model = owl_model("owlvit")
    refused(MissingWeights, "google/owlvit-base-patch32", build, "google/owlvit-base-patch32", NAMES, tmp_path)
    model.save_pretrained(tmp_path)
    again = build("google/owlvit-base-patch32", NAMES, tmp_path)
    torch.testing.assert_close(again(image_of()).probabilities, owl("owlvit")(image_of()).probabilities)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    refused(CorruptFile, "owlvit", build, "google/owlvit-base-patch32", NAMES, tmp_path)


def test_grounding_dino_from_a_folder(tmp_path):
    dino().model.save_pretrained(tmp_path)
    bert().save_pretrained(tmp_path)
    found = build("IDEA-Research/grounding-dino-tiny", NAMES, tmp_path, tokens="mean")
    assert found.tokens == "mean" and found.chunks == dino().chunks


def test_names_that_are_not_there(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    refused(BadParameter, "google/owlv2", build, "fasterrcnn", NAMES)
    refused(BadParameter, "names", build, "google/owlvit-base-patch32", [], "random")
    refused(BadParameter, "tokenizer is a file", build, "IDEA-Research/grounding-dino-tiny", NAMES, "random")
    refused(BadParameter, "tokens", dino, tokens="first")
    refused(BadParameter, "uint8", owl("owlvit"), image_of().float())
    refused(MissingWeights, "grounding-dino-base", build, "IDEA-Research/grounding-dino-base", NAMES)

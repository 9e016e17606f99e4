"""Detectors for refinement: tiny random ones against transformers' own functions; finished results."""

import json

import pytest
import torch
import transformers as hf
from torchvision.ops import box_convert, clip_boxes_to_image

from companion.errors import CorruptFile, MissingWeights
from companion.models.sic_cads import detectors
from companion.models.sic_cads.detectors import GroundingDino, Owl, build, read_results, refine_results, rows
from companion.models.sic_cads.model import Output, refined
from tests.models.common import refuses

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
@pytest.mark.parametrize("shape", [(48, 80), (80, 48)])
def test_owl_gives_the_librarys_boxes_and_scores_of_all_classes(kind, shape):
    model, image = owl_model(kind).train(), image_of(*shape)
    detector = owl(kind, model=model)
    assert model.training and all(p.requires_grad for p in model.parameters())  # the caller's is not changed
    found = detector(image)
    assert found.size == shape and found.boxes.shape == (16, 4)
    ids = detectors.SimpleTokenizer(context_length=16)([f"a photo of a {n.replace('_', ' ')}" for n in NAMES])
    given = detector.processor(images=image, return_tensors="pt")
    with torch.no_grad():
        whole = detector.model(input_ids=ids, attention_mask=(ids > 0).long(), **given)
    torch.testing.assert_close(found.probabilities, whole.logits[0].sigmoid())
    (theirs,) = detector.processor.post_process_object_detection(whole, threshold=0.0, target_sizes=[shape])
    torch.testing.assert_close(found.boxes, clip_boxes_to_image(theirs["boxes"], shape), rtol=1e-4, atol=1e-3)
    refuses((lambda: detector(image.float()), "float32"))


def bert() -> hf.BertTokenizer:
    """A tokenizer of few words; the model knows its special tokens by BERT's ids."""
    vocab = {"[PAD]": 0} | {f"[unused{i}]": i for i in range(1, 1100)}
    known = {"[UNK]": 100, "[CLS]": 101, "[SEP]": 102, "[MASK]": 103, ".": 1012, "?": 1029}
    known |= {word: 200 + i for i, word in enumerate(("cat", "hot", "dog", "moon", "ball"))}
    return hf.BertTokenizer(vocab={w: i for w, i in vocab.items() if i not in known.values()} | known)


def dino(names=NAMES, length: int = 12) -> GroundingDino:
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
    return GroundingDino(hf.GroundingDinoForObjectDetection(config).eval(), processor, bert(), names)


@torch.no_grad()
def test_grounding_dino_takes_the_best_token_of_each_name_and_several_passes_for_many():
    detector, image = dino(), image_of()
    found, given = detector(image), detector.processor(images=image, return_tensors="pt")
    whole = detector.model(**given, **bert()("cat. hot dog. moon.", return_tensors="pt"))
    tokens = whole.logits[0].sigmoid()
    best = torch.stack([tokens[:, 1], tokens[:, 3:5].amax(1), tokens[:, 6]], 1)
    torch.testing.assert_close(found.probabilities, best)
    boxes = box_convert(whole.pred_boxes[0], "cxcywh", "xyxy") * torch.tensor([80, 48, 80, 48])
    torch.testing.assert_close(found.boxes, clip_boxes_to_image(boxes, (48, 80)), rtol=1e-4, atol=1e-3)
    many = dino(["cat", "hot_dog", "moon", "ball", "dog"])(image)  # the last one in a pass of its own
    assert many.boxes.shape == (40, 4) and many.probabilities.shape == (40, 5)
    assert many.probabilities[:20, 4].eq(0).all() and many.probabilities[20:, :4].eq(0).all()
    refuses((lambda: dino(["cat " * 10]), "9 tokens"))


BOXES = torch.tensor([[0.0, 0, 10, 10], [20, 20, 40, 30], [50, 50, 60, 70]])
FOUND = Output(BOXES, torch.tensor([[0.64, 0.04], [0.25, 0.01], [0.09, 0.16]]), (80, 80))


def test_the_best_boxes_are_chosen_after_refinement_and_finished_results_rescaled():
    p = torch.tensor([0.01, 1.0])
    plain, best = refined(FOUND, top=3), refined(FOUND, p, 0.5, top=3)
    assert plain.classes.tolist() == [0, 0, 1] and best.classes.tolist() == [1, 1, 1]
    torch.testing.assert_close(plain.scores, torch.tensor([0.64, 0.25, 0.16]))
    torch.testing.assert_close(best.scores, torch.tensor([0.4, 0.2, 0.1]))
    torch.testing.assert_close(best.boxes, BOXES[[2, 0, 1]])
    finished = rows(refined(FOUND, nms=None), 7, [4, 6])
    assert finished[0] == {"image_id": 7, "category_id": 4, "bbox": [0, 0, 10, 10], "score": pytest.approx(0.64)}
    assert finished[1]["bbox"] == [20, 20, 20, 10]
    rescaled = refine_results(finished, {7: p}, [4, 6], 0.5)
    assert sorted(row["score"] for row in rescaled)[-3:] == pytest.approx([0.1, 0.2, 0.4])
    refuses(
        (lambda: refined(FOUND._replace(probabilities=3 * FOUND.probabilities)), "1.92"),  # logits
        (lambda: refine_results(finished, {8: p}, [4, 6]), "7"),
        (lambda: refine_results(finished, {7: p}, [4, 9]), "6"),
    )


def test_result_files_are_read_and_refused_by_row(tmp_path):
    path, good = tmp_path / "dets.json", {"image_id": 1, "category_id": 3, "bbox": [1, 2, 3, 4], "score": 0.5}
    path.write_text(json.dumps([good]))
    assert read_results(path) == [good]
    for content, named in (
        ([good, {"image_id": 1}], "row 1"),
        ([good | {"category_id": "cat"}], "row 0"),
        ([good | {"score": 3.2}], "3.2"),
        ({"a": 1}, "dets.json"),
    ):
        path.write_text(json.dumps(content))
        refuses((lambda: read_results(path), named), error=CorruptFile)


def test_weights_from_a_folder(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    owls, dinos = tmp_path / "owl", tmp_path / "dino"
    owl_model("owlvit").save_pretrained(owls)
    again = build("google/owlvit-base-patch32", NAMES, owls)
    torch.testing.assert_close(again(image_of()).probabilities, owl("owlvit")(image_of()).probabilities)
    dino().model.save_pretrained(dinos)
    bert().save_pretrained(dinos)
    assert build("IDEA-Research/grounding-dino-tiny", NAMES, dinos).chunks == dino().chunks
    file = owls / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    refuses((lambda: build("google/owlvit-base-patch32", NAMES, owls), "owlvit"), error=CorruptFile)
    refuses((lambda: build("google/owlvit-base-patch32", NAMES, tmp_path), "owlvit"), error=MissingWeights)
    refuses((lambda: build("fasterrcnn", NAMES), "fasterrcnn"))

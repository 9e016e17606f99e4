"""Open-vocabulary detectors that return all boxes with all class probabilities, for the refinement of SIC-CADS.

    detector = build("google/owlvit-base-patch32", boxes.class_names)
    output = detector(image)                    # boxes (R, 4), probabilities (R, C), before any threshold
    best = refined(output, scores, gamma=0.5)   # scores (C,): the image-level ones of this image

Any callable from an image to an `Output` is a detector: to plug one in, return its boxes and the whole matrix of
probabilities *before* its own threshold, suppression and top-k. The libraries' `post_process` functions keep one class
per box: their results cannot be refined.

`google/owlvit-*`, `google/owlv2-*` and `IDEA-Research/grounding-dino-*` are transformers' (Apache-2.0 by their model
cards). Their training data had boxes with the names of many of COCO's "novel" classes: their results are not zero-shot
in the sense of OV-COCO, and only the gain by refinement is meaningful.

For a detector that cannot be run here, `read_results` reads its results in COCO's format, and `refine_results` rescales
them.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from open_clip import SimpleTokenizer
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import box_convert, clip_boxes_to_image

from ...backbones import quiet, unreachable
from ...data.coco import check_results
from ...errors import BadParameter, CorruptFile, MissingWeights, extra
from ...io.files import read_json
from .model import Detections, Output, check_pixels

NAMES = (
    *("google/owlvit-base-patch32", "google/owlvit-base-patch16", "google/owlvit-large-patch14"),
    *("google/owlv2-base-patch16", "google/owlv2-base-patch16-ensemble", "google/owlv2-large-patch14-ensemble"),
    *("IDEA-Research/grounding-dino-tiny", "IDEA-Research/grounding-dino-base"),
)
"""Usual names; others of the three families load too."""


def rows(detections: Detections, image_id: int | str, categories: Sequence[int]) -> list[dict]:
    """Detections as rows of COCO's result format; `categories`: the id of each class."""
    boxes = box_convert(detections.boxes, "xyxy", "xywh").tolist()
    return [
        {"image_id": image_id, "category_id": categories[label], "bbox": box, "score": score}
        for box, score, label in zip(boxes, detections.scores.tolist(), detections.classes.tolist(), strict=True)
    ]


# --- the families of transformers -------------------------------------------------------------------------------------


class Owl(nn.Module):
    """OWL-ViT and OWLv2 (Minderer et al., ECCV 2022 and NeurIPS 2023): a sigmoid for every box and class.

    The class names are embedded once, so that an image costs one pass of the image tower for any C.

    Args:
        model: `OwlViTForObjectDetection` or `Owlv2ForObjectDetection` of transformers; it is copied.
        processor: the image processor of the same family.
        names: of the classes; underscores are read as spaces.
    """

    def __init__(self, model: nn.Module, processor: Any, names: Sequence[str]):
        super().__init__()
        self.model, self.processor = copy.deepcopy(model).requires_grad_(False).eval(), processor
        self.square = model.config.model_type == "owlv2"  # it pads the image to a square first
        self.tower = self.model.owlv2 if self.square else self.model.owlvit
        length = model.config.text_config.max_position_embeddings
        texts = [f"a photo of a {name.replace('_', ' ')}" for name in names]  # OWL's own prompt
        ids = SimpleTokenizer(context_length=length)(texts)  # CLIP's, as OWL's own is
        if ids.max() >= model.config.text_config.vocab_size:
            raise BadParameter("model", model.config.text_config.vocab_size, "a vocabulary of CLIP's 49,408 words")
        with torch.no_grad():
            pooled = [self.tower.text_model(input_ids=part).pooler_output for part in ids.split(64)]
            queries = F.normalize(self.tower.text_projection(torch.cat(pooled)), dim=-1)  # (C, D)
        self.register_buffer("queries", queries)

    @torch.inference_mode()
    def forward(self, image: Tensor) -> Output:
        """All boxes of an image (3, H, W), uint8."""
        height, width = _size(image)
        pixels = self.processor(images=image, return_tensors="pt")["pixel_values"].to(self.queries.device)
        maps, _ = self.model.image_embedder(pixels)
        features = maps.flatten(1, 2)
        logits, _ = self.model.class_predictor(features, self.queries[None])
        boxes = box_convert(self.model.box_predictor(features, maps)[0], "cxcywh", "xyxy")
        sides = (max(height, width),) * 2 if self.square else (width, height)
        boxes = clip_boxes_to_image(boxes * boxes.new_tensor(sides).repeat(2), (height, width))
        return Output(boxes, logits[0].float().sigmoid(), (height, width))


class GroundingDino(nn.Module):
    """Grounding DINO (Liu et al., ECCV 2024): every box has a logit for every *token* of a prompt "cat. dog. ...".

    A class has the largest probability of its tokens. A prompt has 256 tokens at most, so many classes
    need several passes, each with its own boxes: R is 900 per pass, with probability 0 for the classes of other passes.

    Args:
        model: `GroundingDinoForObjectDetection` of transformers; it is copied.
        processor: its image processor.
        tokenizer: its BERT tokenizer.
        names: of the classes; underscores are read as spaces.
    """

    def __init__(self, model: nn.Module, processor: Any, tokenizer: Any, names: Sequence[str]):
        super().__init__()
        self.model, self.processor = copy.deepcopy(model).requires_grad_(False).eval(), processor
        self.classes, self.ends = len(names), (tokenizer.cls_token_id, tokenizer.sep_token_id)
        stop, room = tokenizer.convert_tokens_to_ids("."), model.config.max_text_len - 3  # start, end, a full stop
        self.chunks: list[tuple[list[int], dict[int, slice]]] = [([], {})]  # of each pass: tokens, places of the names
        for number, name in enumerate(names):
            tokens = tokenizer(name.replace("_", " ").lower(), add_special_tokens=False)["input_ids"]
            if len(tokens) > room:
                raise BadParameter("names", name, f"a name of at most {room} tokens")
            if len(self.chunks[-1][0]) + len(tokens) > room:
                self.chunks.append(([], {}))
            ids, places = self.chunks[-1]
            places[number] = slice(len(ids) + 1, len(ids) + 1 + len(tokens))  # after the start token
            ids += [*tokens, stop]

    @torch.inference_mode()
    def forward(self, image: Tensor) -> Output:
        """All boxes of an image (3, H, W), uint8, of all passes."""
        height, width = _size(image)
        device, boxes, probabilities = self.model.device, [], []
        pixels = self.processor(images=image, return_tensors="pt").to(device)
        for ids, places in self.chunks:
            text = torch.tensor([[self.ends[0], *ids, self.ends[1]]], device=device)
            out = self.model(**pixels, input_ids=text)
            of_tokens = out.logits[0].float().sigmoid()  # (900, tokens)
            of_classes = of_tokens.new_zeros(len(of_tokens), self.classes)
            for number, place in places.items():
                of_classes[:, number] = of_tokens[:, place].amax(1)
            boxes.append(box_convert(out.pred_boxes[0], "cxcywh", "xyxy"))
            probabilities.append(of_classes)
        corners = torch.cat(boxes) * boxes[0].new_tensor([width, height, width, height])
        return Output(clip_boxes_to_image(corners, (height, width)), torch.cat(probabilities), (height, width))


def build(
    name: str, names: Sequence[str], weights: str | Path = "pretrained", *, download: bool = False
) -> Owl | GroundingDino:
    """A detector of the three families, ready for the classes `names`.

    Args:
        name: the name on the hub, see `NAMES`.
        names: of the classes.
        weights: "pretrained", from the hub's local cache; a folder with the files of the hub's repository; or "random",
            full-size and offline (torch's current seed), for the OWLs.
        download: download files that are not cached.

    Raises:
        BadParameter: an unknown name, no class, or "random" for Grounding DINO, whose tokenizer is a file.
        MissingWeights: not found; the message lists the ways to get them.
        CorruptFile: a folder whose files cannot be read.
    """
    with extra("detection"):
        import transformers as hf  # imported here: it takes seconds, and only these detectors need it

    kind = next((k for k in ("owlvit", "owlv2", "grounding-dino") if f"/{k}-" in f"/{name.rpartition('/')[2]}"), None)
    if kind is None:
        raise BadParameter("detector", name, NAMES)
    if isinstance(names, str) or not names:
        raise BadParameter("names", names, "a list of one or more class names")
    if kind == "grounding-dino":
        if weights == "random":
            raise BadParameter("weights", weights, "'pretrained' or a folder: its tokenizer is a file")
        model = _loaded(hf.GroundingDinoForObjectDetection, name, weights, download)
        tokenizer = _loaded(hf.AutoTokenizer, name, weights, download)
        return GroundingDino(model, hf.GroundingDinoImageProcessor(), tokenizer, names)
    family, config, processor = {
        "owlvit": (hf.OwlViTForObjectDetection, hf.OwlViTConfig, hf.OwlViTImageProcessor),
        "owlv2": (hf.Owlv2ForObjectDetection, hf.Owlv2Config, hf.Owlv2ImageProcessor),
    }[kind]
    model = family(config()) if weights == "random" else _loaded(family, name, weights, download)
    side = model.config.vision_config.image_size
    return Owl(model, processor(size={"height": side, "width": side}), names)


def _loaded(kind: Any, name: str, weights: str | Path, download: bool) -> Any:
    """One part of a hub repository, from the cache or from a folder."""
    folder = None if weights == "pretrained" else Path(weights)
    ways = [
        "on a machine with a network: detectors.build(..., download=True)",
        f"all files of the hub's '{name}' in a folder: detectors.build(..., weights='<folder>')",
    ]
    if folder is not None and not (folder / "config.json").is_file():
        raise MissingWeights(name, folder, ways[1:])
    reason = unreachable() if folder is None and download else ""
    # no pickles: every one of them has its weights as safetensors
    safe = {} if kind.__name__ == "AutoTokenizer" else {"use_safetensors": True}
    with quiet():
        try:
            return kind.from_pretrained(folder or name, local_files_only=bool(reason) or not download, **safe)
        except Exception as error:  # many kinds: not cached, no network, truncated, other tensors
            if folder is not None:
                raise CorruptFile(folder, f"not the files of {name} ({type(error).__name__}: {error})") from error
            from huggingface_hub import constants

            raise MissingWeights(name, constants.HF_HUB_CACHE, ways, reason) from error


def _size(image: Tensor) -> tuple[int, int]:
    check_pixels(image[None])
    return image.shape[1], image.shape[2]


# --- finished results -------------------------------------------------------------------------------------------------


def read_results(path: str | Path) -> list[dict]:
    """Finished results in COCO's format: a list of {"image_id", "category_id", "bbox": [x, y, w, h], "score"}.

    Raises `CorruptFile` with the row and the field.
    """
    results = check_results(read_json(path), path)
    for number, row in enumerate(results):
        if not 0 <= row["score"] <= 1:
            raise CorruptFile(path, f"row {number}: 'score' is {row['score']!r}, not a probability")
    return results


def refine_results(
    results: Sequence[Mapping], scores: Mapping[object, Tensor], categories: Sequence[int], gamma: float = 0.5
) -> list[dict]:
    """Finished results rescaled: the score s of class c becomes p_c ** gamma * s ** (1 - gamma).

    Args:
        results: rows as of `read_results`.
        scores: the image-level ones (C,) of each image, by image_id.
        categories: the id of each class.

    Raises `BadParameter`: a row of an image without scores, or of a class that is not among `categories`.
    """
    factors = {
        (image, category): score**gamma
        for image, row in scores.items()
        for category, score in zip(categories, row.tolist(), strict=True)
    }
    refined_rows = []
    for row in results:
        place = row["image_id"], row["category_id"]
        if place not in factors:
            raise BadParameter("results", place, "(image_id, category_id) with scores in `scores` and `categories`")
        refined_rows.append({**row, "score": factors[place] * row["score"] ** (1 - gamma)})
    return refined_rows

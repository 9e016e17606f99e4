"""Records how an object was constructed, as JSON, so that it can be rebuilt: the call of a class or function here.

A `Recorded` class and a function under `@recorded` store their arguments on the returned object. `made_by` returns that
record, `make` rebuilds the object from it. Only recorded calls of this package, its frozen dataclasses, a plain ViT of
timm, and a BERT and its tokenizer of transformers are executed: a record read from a file cannot run anything else.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import BadParameter

Arguments = ParamSpec("Arguments")
Made = TypeVar("Made")
_VIT = "timm.models.vision_transformer:VisionTransformer"
_BERT = "transformers.models.bert.modeling_bert:BertModel"
# all that is read of a BERT's configuration: others, such as `attn_implementation`, may name code on a hub
_BERT_FIELDS = {"vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"}
_BERT_FIELDS |= {"hidden_act", "hidden_dropout_prob", "attention_probs_dropout_prob", "max_position_embeddings"}
_BERT_FIELDS |= {"type_vocab_size", "layer_norm_eps", "pad_token_id"}
_TOKENS = {"pad_token", "unk_token", "cls_token", "sep_token", "mask_token", "model_max_length"}


class Recorded:
    """Base of classes whose instances record the arguments of their constructor."""

    def __new__(cls, *args: Any, **kwargs: Any):
        new = super().__new__(cls)
        # copy.deepcopy and pickle call this without arguments, and then restore the record with the other attributes
        new.__dict__["_made"] = _call(cls, cls.__init__, (new, *args), kwargs)
        return new

    def record(self, **arguments: Any) -> None:
        """Replace recorded arguments, where a method changes what the constructor was given."""
        self.__dict__["_made"]["args"] |= {name: made_by(value) for name, value in arguments.items()}


def recorded(**instead: Any) -> Callable[[Callable[Arguments, Made]], Callable[Arguments, Made]]:
    """A decorator: the returned object records the call, with the arguments `instead` replacing the given ones."""

    def decorate(function: Callable[Arguments, Made]) -> Callable[Arguments, Made]:
        @functools.wraps(function)
        def call(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Made:
            found = function(*args, **kwargs)
            note = _call(function, function, args, kwargs)
            note["args"] |= instead
            vars(found)["_made"] = note
            if isinstance(visual := getattr(found, "visual", None), nn.Module):  # a CLIP's image tower is used alone
                vars(visual)["_made"] = {"of": note, "part": "visual"}
            return found

        vars(call)["recorded"] = True
        return call

    return decorate


def made_by(value: object) -> Any:
    """A value as JSON from which `make` rebuilds an equal one; of float tensors the shape, of modules their record.

    Values without such a form become {"unknown": their type}.
    """
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (list, tuple)):
        entries = [made_by(entry) for entry in value]
        return entries if isinstance(value, list) else {"tuple": entries}
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Mapping):
        return {"mapping": [[made_by(key), made_by(entry)] for key, entry in value.items()]}
    if isinstance(value, Tensor):
        values = None if value.is_floating_point() or value.is_meta else value.tolist()
        return {"tensor": list(value.shape), "dtype": str(value.dtype).removeprefix("torch."), "values": values}
    kind = type(value)
    if (note := getattr(value, "_made", None)) is not None:
        return note
    if f"{kind.__module__}:{kind.__qualname__}" == _VIT and len(value.blocks):  # type: ignore[attr-defined]
        return {"by": _VIT, "args": _vit(value)}
    if dataclasses.is_dataclass(value) and _frozen(kind) and kind.__module__.startswith("companion."):
        fields = {field.name: made_by(getattr(value, field.name)) for field in dataclasses.fields(value)}
        return {"by": f"{kind.__module__}:{kind.__qualname__}", "args": fields}
    if f"{kind.__module__}:{kind.__qualname__}" == "open_clip.tokenizer:SimpleTokenizer":
        return {"tokenizer": value.context_length}  # type: ignore[attr-defined]
    if f"{kind.__module__}:{kind.__qualname__}" == _BERT:
        config = {k: v for k, v in value.config.to_dict().items() if k in _BERT_FIELDS}  # type: ignore[attr-defined]
        return {"bert": config, "pooler": value.pooler is not None}  # type: ignore[attr-defined]
    if kind.__module__.startswith("transformers.") and hasattr(value, "backend_tokenizer"):
        options = {k: getattr(value, k) for k in sorted(_TOKENS)}
        return {"fast_tokenizer": value.backend_tokenizer.to_str(), "options": options}
    return {"unknown": f"{kind.__module__}.{kind.__qualname__}"}


def make(note: Any) -> Any:
    """The value recorded by `made_by`, without its weights.

    Raises:
        BadParameter: a part that could not be recorded, or a record that names no recorded call.
    """
    if isinstance(note, list):
        return [make(entry) for entry in note]
    if not isinstance(note, dict):
        return note
    if "unknown" in note:
        accepted = "models whose parts come from this package, backbones.build or are timm's plain ViT"
        raise BadParameter("model", f"one with a {note['unknown']}", accepted)
    if "tuple" in note:
        return tuple(make(note["tuple"]))
    if "mapping" in note:
        return {make(key): make(entry) for key, entry in note["mapping"]}
    if "tensor" in note:
        dtype = getattr(torch, note["dtype"])
        return torch.zeros(note["tensor"]) if note["values"] is None else torch.tensor(note["values"], dtype=dtype)
    if "tokenizer" in note:
        from open_clip.tokenizer import SimpleTokenizer  # imported here: it imports transformers

        return SimpleTokenizer(context_length=note["tokenizer"])
    if "bert" in note:
        import transformers as hf  # imported here because it takes seconds

        _only(note["bert"], _BERT_FIELDS)
        return hf.BertModel(hf.BertConfig(**note["bert"]), add_pooling_layer=note["pooler"])
    if "fast_tokenizer" in note:
        import tokenizers
        from transformers import PreTrainedTokenizerFast

        _only(note["options"], _TOKENS)
        return PreTrainedTokenizerFast(
            tokenizer_object=tokenizers.Tokenizer.from_str(note["fast_tokenizer"]), **note["options"]
        )
    if "of" in note:
        return getattr(make(note["of"]), {"visual": "visual"}[note["part"]])
    return _resolve(note["by"])(**{name: make(value) for name, value in note["args"].items()})


def _only(given: Mapping[str, Any], known: set[str]) -> None:
    """Raises `BadParameter` for a field of a record that is not read."""
    if spare := sorted(set(given) - known):
        raise BadParameter("model", spare, f"only {sorted(known)} of a text encoder")


def _resolve(path: str) -> Callable[..., Any]:
    """The class or function of a record. Raises `BadParameter` when calling it is not allowed."""
    module, _, name = path.partition(":")
    found = None
    if module.startswith("companion.") or path == _VIT:
        try:
            found = getattr(importlib.import_module(module), name, None)
        except ImportError as error:
            raise BadParameter("model", path, f"one of this version of the companion ({error})") from error
    known = isinstance(found, type) and (issubclass(found, Recorded) or _frozen(found))
    if found is None or not (known or vars(found).get("recorded") or path == _VIT):
        raise BadParameter("model", path, "a recorded class or function of this version of the companion")
    return found


def _frozen(kind: type) -> bool:
    """Whether a class is a frozen dataclass: a plain value, whose construction has no side effect."""
    return dataclasses.is_dataclass(kind) and kind.__dataclass_params__.frozen  # type: ignore[attr-defined]


def _call(what: Any, function: Callable, args: tuple, kwargs: dict) -> dict[str, Any]:
    """The record of a call, including defaults, which may change in a later version."""
    signature = inspect.signature(function)
    bound = signature.bind_partial(*args, **kwargs)
    bound.apply_defaults()
    named = dict(bound.arguments)
    for name, parameter in signature.parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            named |= named.pop(name)
        if parameter.kind is parameter.VAR_POSITIONAL and not named[name]:
            del named[name]
    named.pop("self", None)
    return {"by": f"{what.__module__}:{what.__qualname__}", "args": {n: made_by(v) for n, v in named.items()}}


def _vit(vit: Any) -> dict[str, Any]:
    """The arguments of a plain timm ViT with the sizes of this one."""
    attn = vit.blocks[0].attn
    return {
        "img_size": list(vit.patch_embed.img_size or (224, 224)),
        "patch_size": vit.patch_embed.patch_size[0],
        "embed_dim": vit.embed_dim,
        "depth": len(vit.blocks),
        "num_heads": attn.num_heads,
        "mlp_ratio": vit.blocks[0].mlp.fc1.out_features / vit.embed_dim,
        "qkv_bias": attn.qkv.bias is not None,
        "num_classes": vit.num_classes,
        "global_pool": vit.global_pool,
        "class_token": vit.cls_token is not None,
        "pos_embed": "none" if vit.pos_embed is None else "learn",
        "drop_path_rate": getattr(vit.blocks[-1].drop_path1, "drop_prob", 0.0),
    }

"""The `config` of a model, an encoder or a transform: how it was built, as JSON, and the way back.

    class VPT(nn.Module):
        def __init__(self, backbone, classes, tokens=8):
            configure(self, locals())             # its config: the class and these arguments

    def swin(**sizes):
        return configure(model, sizes, swin)      # the config of what a function returns: a call of it

A config is {"by": "<module>:<name>", "args": {...}}. A file cannot run anything else than what `build` may: the
constructors of this package that call `configure`, its frozen dataclasses, `FUNCTIONS`, a BERT and its tokenizer. Where
a call passes its arguments on to timm, only `SIZES` are accepted: others of timm and open_clip name files, hubs, and
flags of an unpickler.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import inspect
import itertools
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import BadParameter, MissingExtra, check_arguments, extra

Built = TypeVar("Built")
VIT = "timm.models.vision_transformer:VisionTransformer"
# what `build` calls, and the arguments that replace those of a config: weights are never looked up
FUNCTIONS: dict[str, dict[str, Any]] = {
    "companion.backbones:build": {"weights": "random", "download": False},
    "companion.data.classification:crop_transform": {},
    "companion.data.classification:resize_transform": {},
    "companion.data.domains:clip_transform": {},
    "companion.models.dmt.downstream:classifier": {},
    "companion.models.dmt.vit:test_transform": {},
    "companion.models.ecamp.heads:classifier": {},
    "companion.models.ecamp.heads:classifier_from_official": {},
    "companion.models.ecamp.transforms:squeeze_transform": {},
    "companion.models.ecamp.transforms:test_transform": {},
    "companion.models.layers.clip_prompting:clip_of": {},
    "companion.models.metasegnet.model:swin": {},
    "companion.models.promptpar.transforms:square_transform": {},
    "companion.models.sic_cads.official:tower": {},
    "companion.toy.encoders:build": {"weights": "random"},
    "companion.toy.encoders.detector:clip": {"weights": "random"},
    "companion.toy.promptpar:transform": {},
    "companion.toy.tokens:Tokenizer": {},
    VIT: {},
}
# the arguments of an encoder that a config may have
SIZES = {"name", "num_classes", "img_size", "patch_size", "in_chans", "embed_dim", "depth", "depths", "num_heads"}
SIZES |= {"mlp_ratio", "window_size", "qkv_bias", "qk_norm", "init_values", "class_token", "reg_tokens", "pre_norm"}
SIZES |= {"no_embed_class", "pos_embed", "global_pool", "pool_include_prefix", "fc_norm", "final_norm"}
SIZES |= {"strict_img_size", "dynamic_img_size", "dynamic_img_pad", "drop_rate", "pos_drop_rate", "patch_drop_rate"}
SIZES |= {"proj_drop_rate", "attn_drop_rate", "drop_path_rate", "proj_bias", "scale_attn_norm", "scale_mlp_norm"}
SIZES |= {"head_dim", "always_partition", "output_stride", "features_only", "out_indices"}
SIZES |= {"force_quick_gelu", "force_image_size", "force_patch_dropout"}
# of an open_clip tower
TOWER = {"layers", "width", "heads", "head_width", "mlp_ratio", "patch_size", "image_size", "context_length"}
TOWER |= {"vocab_size", "ls_init_value", "patch_dropout", "pool_type", "no_ln_pre", "final_ln_after_pool"}
PASSED_ON = {"companion.backbones:build", "companion.toy.encoders:build", "companion.models.metasegnet.model:swin", VIT}
# all that is read of a BERT's configuration: others, such as `attn_implementation`, may name code on a hub
BERT = {"vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "hidden_act"}
BERT |= {"hidden_dropout_prob", "attention_probs_dropout_prob", "max_position_embeddings", "type_vocab_size"}
BERT |= {"layer_norm_eps", "pad_token_id"}
TOKENS = {"pad_token", "unk_token", "cls_token", "sep_token", "mask_token", "model_max_length"}


def configure(built: Built, arguments: Mapping[str, Any], by: Callable | None = None) -> Built:
    """Set the `config` of what a constructor (`by` None) or the function `by` builds, and return it.

    Args:
        arguments: of the call. A constructor passes its `locals()` on its first line; that of a base class changes
            nothing then.
    """
    check_arguments(by or arguments.get("__class__", type(built)).__init__, arguments)
    values = {name: as_json(value) for name, value in arguments.items() if name not in ("self", "__class__")}
    made = by or type(built)
    config = {"by": f"{made.__module__}:{made.__qualname__}", "args": values}
    if by is None:
        vars(built).setdefault("config", config)
    else:
        vars(built)["config"] = config
        if isinstance(visual := getattr(built, "visual", None), nn.Module):  # a CLIP's image tower is used alone
            vars(visual)["config"] = {"of": config, "part": "visual"}
    return built


def reconfigure(built: object, **arguments: Any) -> None:
    """Change arguments of a `config`, and forget the class names of the file that a model was loaded from."""
    about = vars(built)
    about["config"] = about["config"] | {
        "args": about["config"]["args"] | {name: as_json(value) for name, value in arguments.items()}
    }
    about.pop("class_names", None)


def config_of(built: object) -> dict[str, Any] | None:
    """The `config` that `configure` set; None where there is none."""
    config = getattr(built, "__dict__", {}).get("config")
    return config if isinstance(config, dict) else None


def as_json(value: Any) -> Any:
    """A value as JSON from which `build` makes an equal one; of float tensors the shape, of models their config.

    Values without such a form become {"unknown": their type}.
    """
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, list):
        return [as_json(entry) for entry in value]
    if isinstance(value, tuple):
        return {"tuple": as_json([*value])}
    if isinstance(value, Mapping):
        return {"mapping": [[as_json(key), as_json(entry)] for key, entry in value.items()]}
    if isinstance(value, Tensor):
        values = None if value.is_floating_point() or value.is_meta else value.tolist()
        return {"tensor": list(value.shape), "dtype": str(value.dtype).removeprefix("torch."), "values": values}
    if config := config_of(value):
        return config
    kind = f"{type(value).__module__}:{type(value).__qualname__}"
    if kind == VIT and len(value.blocks):
        with contextlib.suppress(AttributeError):  # blocks of another form than timm's plain ones
            return {"by": VIT, "args": _vit(value)}
    if kind.startswith("companion.") and _frozen(type(value)):
        return {
            "by": kind,
            "args": {part.name: as_json(getattr(value, part.name)) for part in dataclasses.fields(value)},
        }
    if kind == "open_clip.tokenizer:SimpleTokenizer":
        return {"tokenizer": value.context_length}
    if kind == "transformers.models.bert.modeling_bert:BertModel":
        sizes = value.config.to_dict()
        return {"bert": {name: sizes[name] for name in BERT & sizes.keys()}, "pooler": value.pooler is not None}
    if kind.startswith("transformers.") and hasattr(value, "backend_tokenizer"):
        options = {name: getattr(value, name) for name in sorted(TOKENS)}
        return {"fast_tokenizer": value.backend_tokenizer.to_str(), "options": options}
    return {"unknown": kind.replace(":", ".")}


def rebuild(note: Any) -> Any:
    """The value of `as_json`, without its weights.

    Raises:
        BadParameter: a part that has no config, or a config that names nothing that may be built.
    """
    if isinstance(note, list):
        return [rebuild(entry) for entry in note]
    if not isinstance(note, dict):
        return note
    if "unknown" in note:
        accepted = "models whose parts come from this package, backbones.build or are timm's plain ViT"
        raise BadParameter("model", f"one with a {note['unknown']}", accepted)
    if "tuple" in note:
        return tuple(rebuild(note["tuple"]))
    if "mapping" in note:
        return {rebuild(key): rebuild(entry) for key, entry in note["mapping"]}
    if "tensor" in note:
        dtype = getattr(torch, note["dtype"])
        return torch.zeros(note["tensor"]) if note["values"] is None else torch.tensor(note["values"], dtype=dtype)
    if "tokenizer" in note:
        from open_clip.tokenizer import SimpleTokenizer  # imported here: it imports transformers

        return SimpleTokenizer(context_length=note["tokenizer"])
    if "bert" in note:
        with extra("landcover"):
            import transformers as hf  # imported here because it takes seconds
        return hf.BertModel(hf.BertConfig(**_only(note["bert"], BERT)), add_pooling_layer=note["pooler"])
    if "fast_tokenizer" in note:
        with extra("xrays"):
            import tokenizers
            from transformers import PreTrainedTokenizerFast
        tokens = tokenizers.Tokenizer.from_str(note["fast_tokenizer"])
        return PreTrainedTokenizerFast(tokenizer_object=tokens, **_only(note["options"], TOKENS))
    if "of" in note:
        return rebuild(note["of"]).visual
    by, given = note["by"], note["args"]
    fixed = FUNCTIONS.get(by, {})
    if by in PASSED_ON:
        towers = {name: value["mapping"] for name, value in given.items() if name in ("vision_cfg", "text_cfg")}
        _only(given, SIZES | fixed.keys() | towers.keys())
        _only(dict(itertools.chain(*towers.values())), TOWER)
    return _resolve(by)(**{name: rebuild(value) for name, value in given.items()} | fixed)


def _only(given: dict[str, Any], known: set[str]) -> dict[str, Any]:
    """`given`. Raises `BadParameter` for a setting that is not read."""
    if spare := sorted(set(given) - known):
        raise BadParameter("model", spare, f"only {sorted(known)} of an encoder can be saved and loaded")
    return given


def _resolve(path: str) -> Callable[..., Any]:
    """The class or function of a config. Raises `BadParameter` where it may not be called."""
    module, _, name = path.partition(":")
    found = None
    if module.startswith("companion.") or path == VIT:
        try:
            found = getattr(importlib.import_module(module), name, None)
        except MissingExtra:
            raise
        except ImportError as error:
            raise BadParameter("model", path, f"one of this version of the companion ({error})") from error
    own = isinstance(found, type) and found.__module__ == module and (_configured(found) or _frozen(found))
    if found is None or not (own or path in FUNCTIONS):
        raise BadParameter("model", path, "a network or a transform of this version of the companion")
    return found


def _configured(kind: type) -> bool:
    """Whether the constructor of a network, or of one that it extends, calls `configure`."""
    return issubclass(kind, nn.Module) and any(
        configure.__name__ in inspect.unwrap(base.__init__).__code__.co_names  # type: ignore[misc]
        for base in kind.__mro__
        if base.__module__.startswith("companion.") and "__init__" in vars(base)
    )


def _frozen(kind: type) -> bool:
    """Whether a class is a frozen dataclass: a plain value, whose construction has no side effect."""
    return dataclasses.is_dataclass(kind) and kind.__dataclass_params__.frozen  # type: ignore[attr-defined]


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
        "pool_include_prefix": vit.pool_include_prefix,
        "dynamic_img_size": vit.dynamic_img_size,
        "drop_path_rate": getattr(vit.blocks[-1].drop_path1, "drop_prob", 0.0),
    }

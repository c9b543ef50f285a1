"""config.json of a Hugging Face folder as a model here, and back."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from nha_jax.errors import UserError
from nha_jax.layers.rope import ROPE_TYPES, RopeScaling
from nha_jax.models import ModelConfig
from nha_jax.models.config import parse_windows, windows_text

NHA_TYPE = "nha"
"""model_type of an exported model that no architecture of transformers computes."""


@dataclasses.dataclass(frozen=True)
class Architecture:
    """What tells the supported architectures of transformers apart."""

    name: str
    qkv_bias: bool = False
    qk_norm: bool = False
    # What transformers takes where a config.json is silent; None: as many as heads, hidden / heads.
    kv_heads: int | None = None
    head_dim: int | None = None


ARCHITECTURES = {
    "llama": Architecture("LlamaForCausalLM"),
    "mistral": Architecture("MistralForCausalLM", kv_heads=8),
    "qwen2": Architecture("Qwen2ForCausalLM", qkv_bias=True, kv_heads=32),
    "qwen3": Architecture("Qwen3ForCausalLM", qk_norm=True, kv_heads=32, head_dim=128),
}
# Fields of ModelConfig that the "nha" entry of an exported config.json holds.
NHA_FIELDS = (
    *("windows", "slots", "slot_lag", "qkv_bias", "qk_norm", "feature_map", "value_activation"),
    *("output_norm", "conv", "gate_normalizer", "empty_slots", "scale"),
)
SIZES = {
    "vocab_size": "vocab_size",
    "hidden": "hidden_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "ffn": "intermediate_size",
}


SLIDING = ("sliding_window", "use_sliding_window", "max_window_layers", "layer_types")


def model_values(config: Mapping[str, Any], file: Any) -> dict[str, Any]:
    """Fields of `ModelConfig` for a config.json, read from ``file``; windows as the source's own.

    Raises UserError, naming the file, for what this project does not compute.
    """
    kind = config.get("model_type")
    if kind not in (*ARCHITECTURES, NHA_TYPE):
        raise UserError(
            f"{file}: model_type {kind!r} is not supported; supported are "
            f"{', '.join((*ARCHITECTURES, NHA_TYPE))}."
        )
    for name, wanted in {
        "hidden_act": ("silu",),
        "attention_bias": (False, None),
        "mlp_bias": (False, None),
        "quantization_config": (None,),
    }.items():
        if config.get(name, wanted[0]) not in wanted:
            raise UserError(
                f"{file}: {name} is {config[name]!r}, which is not supported; only models with "
                f"{wanted[0]!r} are."
            )
    values: dict[str, Any] = {}
    for ours, theirs in SIZES.items():
        if not isinstance(config.get(theirs), int):
            raise UserError(f"{file}: {theirs} is {config.get(theirs)!r}; it must be an integer.")
        values[ours] = config[theirs]
    silent = ARCHITECTURES.get(kind, Architecture(""))
    values |= {
        "kv_heads": config.get("num_key_value_heads", silent.kv_heads) or values["heads"],
        "head_dim": config.get("head_dim", silent.head_dim),
        "norm_eps": config.get("rms_norm_eps", 1e-6),
        "tied_embeddings": config.get("tie_word_embeddings", False),
        **_rope(config, file),
    }
    if kind == NHA_TYPE:
        nha = config.get("nha")
        if not isinstance(nha, Mapping) or set(nha) - {*NHA_FIELDS, "tensors"}:
            raise UserError(f"{file}: nha is not the group of values that an export writes.")
        return values | {name: value for name, value in nha.items() if name != "tensors"}
    architecture = ARCHITECTURES[kind]
    return values | {
        "qkv_bias": architecture.qkv_bias,
        "qk_norm": architecture.qk_norm,
        "windows": windows_text(_windows(config, kind, values["layers"], file)),
    }


def _rope(config: Mapping[str, Any], file: Any) -> dict[str, Any]:
    # Since transformers 5 both are in rope_parameters.
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", *ROPE_TYPES):
        raise UserError(
            f"{file}: RoPE type {kind!r} is not supported; supported are "
            f"{', '.join(('default', *ROPE_TYPES))}."
        )
    if (partial := rope.get("partial_rotary_factor", config.get("partial_rotary_factor", 1))) != 1:
        raise UserError(f"{file}: partial_rotary_factor is {partial}; only 1 is supported.")
    values = {"rope_theta": float(rope.get("rope_theta", config.get("rope_theta", 10_000.0)))}
    if kind == "default":
        return values
    fields = {f.name for f in dataclasses.fields(RopeScaling)} - {"rope_type"}
    chosen = {name: value for name, value in rope.items() if name in fields and value is not None}
    if "factor" not in chosen:
        raise UserError(f"{file}: RoPE type {kind!r} has no factor.")
    if kind == "linear":
        chosen = {"factor": chosen["factor"]}
    return values | {"rope_scaling": RopeScaling(**chosen, rope_type=kind)}


def _windows(
    config: Mapping[str, Any], kind: str, layers: int, file: Any
) -> tuple[int | None, ...]:
    window = config.get("sliding_window", 4096)
    if kind == "llama" or (kind != "mistral" and not config.get("use_sliding_window", False)):
        window = None
    if window is None:
        return (None,) * layers
    types = config.get("layer_types")
    if types is None:
        first = 0 if kind == "mistral" else config.get("max_window_layers", 28)
        types = ["sliding_attention" if i >= first else "full_attention" for i in range(layers)]
    known = {"sliding_attention": window, "full_attention": None}
    if len(types) != layers or set(types) - set(known):
        raise UserError(f"{file}: layer_types {types} must name {layers} full or sliding layers.")
    return tuple(known[name] for name in types)


def hf_config(model: ModelConfig, like: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """config.json of an exported model: of a plain architecture if one computes this model.

    ``like``: the config.json it was imported from. What that says beyond the model is kept.
    """
    kept = dict(like or {})
    kind = plain_type(model, kept.get("model_type"))
    windows = _every_layer(model)
    said = (
        kind is not None
        and kind == kept.get("model_type")
        and _windows(kept, kind, model.layers, "config.json") == windows
    )
    for name in ("nha", *(() if said else SLIDING)):
        kept.pop(name, None)
    config = kept | {name: getattr(model, ours) for ours, name in SIZES.items()}
    config |= {
        "architectures": [ARCHITECTURES[kind].name if kind else "NHAForCausalLM"],
        "model_type": kind or NHA_TYPE,
        "num_key_value_heads": model.num_kv_heads,
        "head_dim": model.head_width,
        "hidden_act": "silu",
        "rms_norm_eps": model.norm_eps,
        "tie_word_embeddings": model.tied_embeddings,
    }
    scaling = model.rope_scaling and dataclasses.asdict(model.rope_scaling)
    if scaling and scaling["rope_type"] == "linear":
        scaling = {"factor": scaling["factor"], "rope_type": "linear"}
    if "rope_parameters" in kept:
        scaling = scaling or {"rope_type": "default"}
        config["rope_parameters"] = {"rope_theta": model.rope_theta, **scaling}
    else:
        config |= {"rope_theta": model.rope_theta, "rope_scaling": scaling}
    if kind is None:
        config["nha"] = {name: getattr(model, name) for name in NHA_FIELDS}
        return config
    if said:
        return config
    window = next((w for w in windows if w is not None), None)
    if window is not None and kind != "mistral":
        names = ["full_attention" if w is None else "sliding_attention" for w in windows]
        first = windows.index(window)
        config |= {"use_sliding_window": True, "layer_types": names, "max_window_layers": first}
    if kind != "llama":
        config["sliding_window"] = window
    return config


def plain_type(model: ModelConfig, preferred: str | None = None) -> str | None:
    """model_type of an architecture of transformers that computes this very model, if any."""
    windows = _every_layer(model)
    sliding = {w for w in windows if w is not None}
    own_scale = model.scale is None or model.scale == model.head_width**-0.5
    if (
        (sliding and (model.slots or len(sliding) > 1))
        or model.value_activation != "none"
        or model.output_norm
        or model.conv
        or not own_scale
    ):
        return None
    fits = [
        kind
        for kind, a in ARCHITECTURES.items()
        if (a.qkv_bias, a.qk_norm) == (model.qkv_bias, model.qk_norm)
    ]
    if sliding:
        fits = [kind for kind in fits if kind != "llama"]
    if None in windows and sliding:
        fits = [kind for kind in fits if kind != "mistral"]
    if preferred in fits:
        return preferred
    return fits[0] if fits else None


def _every_layer(model: ModelConfig) -> tuple[int | None, ...]:
    pattern = parse_windows(model.windows)
    return pattern * (model.layers // len(pattern))

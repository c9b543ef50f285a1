"""What a language model is made of, checked, and its form for the command line."""

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ml_collections import config_dict

from nha_jax.errors import UserError, nearest
from nha_jax.layers.rope import RopeScaling
from nha_jax.models.presets import PRESETS
from nha_jax.ops import EMPTY_SLOTS, FEATURE_MAPS, IMPLS

CHOICES = {
    "feature_map": FEATURE_MAPS,
    "value_activation": ("none", "silu"),
    "empty_slots": EMPTY_SLOTS,
    "dtype": ("bfloat16", "float32"),
    "param_dtype": ("bfloat16", "float32"),
    "remat": ("none", "full", "dots", "save_attention"),
    "impl": IMPLS,
}
LEAST = {
    **dict.fromkeys(("vocab_size", "hidden", "layers", "heads", "kv_heads", "head_dim", "ffn"), 1),
    **dict.fromkeys(("slots", "slot_lag", "conv"), 0),
}


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A Native Hybrid Attention language model. Hashable, so that it can be a static argument.

    Raises `UserError` when built from values that do not make a model.
    """

    vocab_size: int = 32_000
    hidden: int = 1024
    layers: int = 24
    heads: int = 16
    kv_heads: int | None = None
    """Key and value heads, each read by heads / kv_heads query heads. None: as many as heads."""
    head_dim: int | None = None
    """Width of a head's query, key and value. None: hidden / heads."""
    ffn: int = 2816
    """Inner width of the SwiGLU block."""
    slots: int = 64
    """Rows of long-term memory per kv head. 0: window only."""
    windows: int | str | Sequence[int | str] = "64"
    """The layers' windows, in tokens: one number, "full", or a repeating pattern of them, as a
    list or as text like "64*7,full". Stored as the text of its shortest period."""
    slot_lag: int | None = None
    """Tokens before a token is written to the slots. None: each layer's window."""
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    """Built from a mapping too, with the names of a Hugging Face `rope_scaling` of type llama3."""
    qkv_bias: bool = False
    qk_norm: bool = False
    """RMSNorm over each head's query and key."""
    tied_embeddings: bool = False
    feature_map: str = "none"
    """Of queries and keys on the slot path: none, silu or relu."""
    value_activation: str = "none"
    """none or silu."""
    output_norm: bool = False
    """silu, then RMSNorm over all heads, before the output projection."""
    conv: int = 0
    """Width of the causal depthwise convolution on queries, keys and values (say 4). 0: off."""
    gate_normalizer: float = 8.0
    """log_alpha = log_sigmoid(f) / gate_normalizer."""
    empty_slots: str = "masked"
    scale: float | None = None
    """Of the attention logits. None: 1 / sqrt(head_dim)."""
    norm_eps: float = 1e-5
    dtype: str = "bfloat16"
    """Of the computation: bfloat16 or float32."""
    param_dtype: str = "float32"
    remat: str = "none"
    """What the backward pass computes anew, per block: nothing (none), everything (full), all
    but matrix products and the attention op (dots), or all but the attention op
    (save_attention)."""
    unroll: bool = False
    """Without a cache, no loop over the layers: more to compile, and what the backward pass needs
    is not copied into and out of a loop's arrays."""
    scan_runs: bool = False
    """Without a cache, neighbours of one window are one loop: much less to compile, for a second
    copy of the blocks' parameters in memory."""
    impl: str = "auto"
    """Backend of the attention op."""
    slot_share_target: float | None = None
    """Share of attention that the auxiliary loss pulls the slots towards. None: no such loss."""
    slot_share_coef: float = 0.01
    autoencoder: bool = False
    """Every place's output is decoded from the last token's alone (the compression task of MAD);
    no language model then, and no cache."""

    def __post_init__(self) -> None:
        _check_types(self)
        for name, least in LEAST.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise UserError(f"{name} is {value}; it must be at least {least}.")
        for name, known in CHOICES.items():
            value = getattr(self, name)
            if value not in known:
                raise UserError(f"{name} {value!r} is unknown.{nearest(str(value), known)}")
        for name in ("rope_theta", "gate_normalizer", "norm_eps"):
            if not getattr(self, name) > 0:
                raise UserError(f"{name} is {getattr(self, name)}; it must be above 0.")
        if self.slot_share_target is not None and not 0 < self.slot_share_target < 1:
            raise UserError(
                f"slot_share_target is {self.slot_share_target}; it must lie between 0 and 1."
            )
        if not self.slot_share_coef >= 0:
            raise UserError(f"slot_share_coef is {self.slot_share_coef}; it must not be negative.")
        if self.conv == 1:
            raise UserError("conv is 1, which mixes nothing; set it to 0 (off) or to 2 or more.")
        if self.head_dim is None and self.hidden % self.heads:
            raise UserError(
                f"hidden {self.hidden} is not divisible by heads {self.heads}; "
                "change one of them or set head_dim."
            )
        if self.heads % self.num_kv_heads:
            raise UserError(
                f"heads {self.heads} is not divisible by kv_heads {self.kv_heads}; "
                "change one of them."
            )
        if self.head_width % 2:
            raise UserError(
                f"head_dim is {self.head_width}; it must be even, since RoPE pairs its halves."
            )
        if self.rope_scaling is not None and not isinstance(self.rope_scaling, RopeScaling):
            object.__setattr__(self, "rope_scaling", _rope_scaling(self.rope_scaling))
        pattern = _shortest_period(parse_windows(self.windows))
        if self.layers % len(pattern):
            raise UserError(
                f"windows {self.windows!r} has a period of {len(pattern)}, which does not divide "
                f"layers {self.layers}; give one window per layer or a pattern that divides them."
            )
        object.__setattr__(self, "windows", windows_text(pattern))
        if self.unroll and self.scan_runs:
            raise UserError(
                "unroll and scan_runs are both true, and scan_runs is a loop; set one to false."
            )
        if self.slots == 0 and 0 in pattern:
            raise UserError(
                "slots is 0 where a layer's window is 0, which leaves it nothing to attend to; "
                "raise slots or that window."
            )

    @property
    def num_kv_heads(self) -> int:
        return self.heads if self.kv_heads is None else self.kv_heads

    @property
    def head_width(self) -> int:
        """Width of a head's query, key and value."""
        return self.hidden // self.heads if self.head_dim is None else self.head_dim

    @property
    def window_pattern(self) -> tuple[int | None, ...]:
        """Shortest period of the layers' windows; None stands for full attention."""
        return parse_windows(self.windows)

    def num_params(self) -> int:
        """Number of parameters, embeddings included."""
        hidden, width = self.hidden, self.head_width
        q, kv = self.heads * width, self.num_kv_heads * width
        layer = 2 * hidden  # the two norms
        layer += hidden * (q + 2 * kv) + q * hidden
        layer += hidden * self.num_kv_heads * self.slots
        layer += 3 * hidden * self.ffn
        layer += (q + 2 * kv) * (self.qkv_bias + self.conv)
        layer += 2 * width * self.qk_norm + q * self.output_norm
        embeddings = self.vocab_size * hidden * (1 if self.tied_embeddings else 2)
        decoder = 2 * (hidden * hidden + hidden) if self.autoencoder else 0
        return embeddings + self.layers * layer + decoder + hidden

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "ModelConfig":
        """The model that a `model_config()` describes: defaults, then preset, then its fields.

        A field of None keeps the preset's value. Raises `UserError` for unknown fields, an
        unknown preset and everything that `ModelConfig` refuses.
        """
        values = dict(config)
        preset = values.pop("preset", None) or ""
        _check_fields(values)
        if preset and preset not in PRESETS:
            raise UserError(f"preset {preset!r} is unknown.{nearest(preset, PRESETS)}")
        chosen = {name: value for name, value in values.items() if value is not None}
        if "rope_scaling" in chosen:
            scaling = dict(chosen.pop("rope_scaling"))
            if given := {name: value for name, value in scaling.items() if value is not None}:
                chosen["rope_scaling"] = given
        return cls(**PRESETS.get(preset, {}) | chosen)


def model_config(preset: str = "", **overrides: Any) -> config_dict.ConfigDict:
    """A model as an ml_collections config: each field of `ModelConfig`, typed, None where the
    preset's or the default value stands. `windows` is text ("64", "full", "64*7,full"), so that
    `--config.model.windows=full` works; `rope_scaling` is a group of its own.

    Raises `UserError` for an unknown field.
    """
    _check_fields(overrides)
    config = config_dict.ConfigDict({"preset": preset})
    for field in dataclasses.fields(ModelConfig):
        if field.name == "rope_scaling":
            config.rope_scaling = _placeholders(RopeScaling)
        elif field.name == "windows":
            config.windows = config_dict.placeholder(str)
        else:
            config[field.name] = config_dict.placeholder(_kind(field.type))
    if overrides.get("windows") is not None:
        overrides["windows"] = windows_text(parse_windows(overrides["windows"]))
    if isinstance(scaling := overrides.pop("rope_scaling", None), RopeScaling):
        scaling = dataclasses.asdict(scaling)
    if scaling is not None:
        _rope_scaling(scaling)
        config.rope_scaling.update(scaling)
    config.update(overrides)
    return config


def parse_windows(windows: int | str | Sequence[int | str]) -> tuple[int | None, ...]:
    """Windows as numbers of tokens, None for full: `"64*2,full"` -> `(64, 64, None)`.

    Raises `UserError` for what is not a window, an empty list or a negative window.
    """
    items: Iterable[Any]
    if isinstance(windows, str):
        items = windows.split(",")
    elif isinstance(windows, Iterable):
        items = windows
    else:
        items = (windows,)
    parsed: list[int | None] = []
    for item in items:
        match = re.fullmatch(r"\s*(full|-?\d+)\s*(?:\*\s*(\d+)\s*)?", str(item))
        if match is None:
            raise UserError(
                f"windows {windows!r} holds {item!r}; each window is a number of tokens or "
                "'full', and N*COUNT repeats one."
            )
        value, count = match[1], int(match[2] or 1)
        if value != "full" and int(value) < 0:
            raise UserError(f"windows {windows!r} holds {value}; a window must not be negative.")
        parsed += [None if value == "full" else int(value)] * count
    if not parsed:
        raise UserError(f"windows {windows!r} is empty; give at least one window or 'full'.")
    return tuple(parsed)


def windows_text(windows: Sequence[int | None]) -> str:
    """`(64, 64, None)` -> `"64*2,full"`, what `parse_windows` reads."""
    parts: list[str] = []
    start = 0
    for end in range(1, len(windows) + 1):
        if end == len(windows) or windows[end] != windows[start]:
            name = "full" if windows[start] is None else str(windows[start])
            parts.append(name if end - start == 1 else f"{name}*{end - start}")
            start = end
    return ",".join(parts)


def _shortest_period(windows: tuple[int | None, ...]) -> tuple[int | None, ...]:
    size = len(windows)
    for period in range(1, size + 1):
        if size % period == 0 and windows[:period] * (size // period) == windows:
            return windows[:period]
    return windows


def _kind(annotation: Any) -> type:
    """The one type of an annotation beside None: `int | None` -> int."""
    kinds = getattr(annotation, "__args__", (annotation,))
    (kind,) = (kind for kind in kinds if kind is not type(None))
    return kind


def _check_types(config: "ModelConfig") -> None:
    for field in dataclasses.fields(config):
        if field.name in ("windows", "rope_scaling"):  # these check themselves
            continue
        value = getattr(config, field.name)
        kind = _kind(field.type)
        optional = field.type is not kind
        accepted: Any = (int, float) if kind is float else kind
        fits = isinstance(value, accepted) and (kind is bool or not isinstance(value, bool))
        if not fits and not (value is None and optional):
            raise UserError(f"{field.name} is {value!r}; it must be of type {kind.__name__}.")


def _check_fields(values: Mapping[str, Any]) -> None:
    known = [field.name for field in dataclasses.fields(ModelConfig)]
    for name in values:
        if name not in known:
            raise UserError(f"model has no field {name!r}.{nearest(name, known)}")


def _rope_scaling(mapping: Any) -> RopeScaling:
    if not isinstance(mapping, Mapping):
        raise UserError(f"rope_scaling is {mapping!r}; it must be a mapping of a llama3 scaling.")
    values = dict(mapping)
    if "type" in values:  # the older spelling in Hugging Face configs
        values.setdefault("rope_type", values.pop("type"))
    known = [field.name for field in dataclasses.fields(RopeScaling)]
    for name in values:
        if name not in known:
            raise UserError(f"rope_scaling has no field {name!r}.{nearest(name, known)}")
    if "factor" not in values:
        raise UserError("rope_scaling has no factor; give one, for example factor=8.0.")
    return RopeScaling(**values)


def _placeholders(cls: type) -> config_dict.ConfigDict:
    return config_dict.ConfigDict(
        {f.name: config_dict.placeholder(_kind(f.type)) for f in dataclasses.fields(cls)}
    )

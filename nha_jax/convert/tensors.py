"""Which tensor of a Hugging Face folder is which parameter here."""

import dataclasses
import math

import numpy as np

from nha_jax.models import ModelConfig


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A parameter and the tensor, or one tensor per layer, that holds it there.

    Matrices are stored there as ``[outputs, inputs]`` and here as ``[inputs, outputs]``, with the
    heads as an axis of their own. RoPE pairs halves on both sides, so no rows change places.
    """

    path: tuple[str, ...]
    """Of the parameter, as in the checkpoint's tree."""
    name: str
    """There; ``{}`` stands for the layer's number."""
    shape: tuple[int, ...]
    """Here, of one layer."""
    outputs: int = 0
    """Trailing axes here that make the rows there; 0: nothing is transposed."""
    extra: bool = False
    """No architecture of transformers has it."""

    @property
    def stacked(self) -> bool:
        return "{}" in self.name

    @property
    def hf_shape(self) -> tuple[int, ...]:
        if not self.outputs:
            return (math.prod(self.shape),) if self.stacked else self.shape
        split = len(self.shape) - self.outputs
        return math.prod(self.shape[split:]), math.prod(self.shape[:split])

    def ours(self, array: np.ndarray) -> np.ndarray:
        """One layer's tensor there -> the parameter here."""
        return (array.T if self.outputs else array).reshape(self.shape)

    def theirs(self, array: np.ndarray) -> np.ndarray:
        """One layer's parameter here -> the tensor there."""
        if not self.outputs:
            return array.reshape(self.hf_shape)
        return array.reshape(self.hf_shape[::-1]).T


def tensors(model: ModelConfig) -> list[Tensor]:
    """Every parameter of the model, in the order of a Hugging Face folder.

    Raises nothing: shapes follow from the config alone.
    """
    hidden, width, heads, kv_heads = (
        *(model.hidden, model.head_width, model.heads, model.num_kv_heads),
    )
    found = [Tensor(("embedding",), "model.embed_tokens.weight", (model.vocab_size, hidden))]

    def layer(path, name, shape, outputs=0, extra=False):
        whole = ("blocks", *path.split("."))
        found.append(Tensor(whole, f"model.layers.{{}}.{name}", shape, outputs, extra))

    layer("attention_norm.scale", "input_layernorm.weight", (hidden,))
    projections = {"q": heads, "k": kv_heads, "v": kv_heads}
    for x, count in projections.items():
        layer(f"attention.{x}", f"self_attn.{x}_proj.weight", (hidden, count, width), 2)
        if model.qkv_bias:
            layer(f"attention.{x}_bias", f"self_attn.{x}_proj.bias", (count, width))
        if model.conv:
            shape = (model.conv, count, width)
            layer(f"attention.{x}_conv.kernel", f"self_attn.{x}_conv.weight", shape, 2, True)
    if model.qk_norm:
        layer("attention.q_norm.scale", "self_attn.q_norm.weight", (width,))
        layer("attention.k_norm.scale", "self_attn.k_norm.weight", (width,))
    if model.slots:
        shape = (hidden, kv_heads, model.slots)
        layer("attention.f", "self_attn.f_proj.weight", shape, 2, True)
    if model.output_norm:
        layer("attention.o_norm.scale", "self_attn.o_norm.weight", (heads, width), 0, True)
    layer("attention.o", "self_attn.o_proj.weight", (heads, width, hidden), 1)
    layer("mlp_norm.scale", "post_attention_layernorm.weight", (hidden,))
    layer("mlp.gate", "mlp.gate_proj.weight", (hidden, model.ffn), 1)
    layer("mlp.up", "mlp.up_proj.weight", (hidden, model.ffn), 1)
    layer("mlp.down", "mlp.down_proj.weight", (model.ffn, hidden), 1)
    found.append(Tensor(("norm", "scale"), "model.norm.weight", (hidden,)))
    if not model.tied_embeddings:
        found.append(Tensor(("output",), "lm_head.weight", (hidden, model.vocab_size), 1))
    return found

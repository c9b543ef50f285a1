"""The tiny models of transformers that the tests of `nha_jax.convert` compare with.

python tests/convert/tiny_models.py        makes tests/convert/data anew; needs PyTorch

`data` holds each of them as a folder, and in expected.npz what transformers computes: the logits of
every token of ``rows``, of the last tokens of ``long``, and its greedy continuation of ``rows``.
"""

import shutil
from pathlib import Path

import numpy as np

DATA = Path(__file__).parent / "data"
VOCAB, LONG, LAST, NEW = 32, 600, 8, 12

COMMON = dict(
    vocab_size=VOCAB,
    hidden_size=16,
    intermediate_size=12,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=1024,
    initializer_range=0.2,
    bos_token_id=0,
    eos_token_id=None,
    pad_token_id=None,
)
LLAMA3 = dict(
    rope_type="llama3",
    rope_theta=500_000.0,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=64,
)
# Name: (model_type, what differs from COMMON)
MODELS = {
    "llama2": ("llama", dict(rope_parameters=dict(rope_type="default", rope_theta=10_000.0))),
    "llama3": ("llama", dict(rope_parameters=LLAMA3, tie_word_embeddings=True)),
    "llama_linear": (
        "llama",
        dict(rope_parameters=dict(rope_type="linear", rope_theta=10_000.0, factor=4.0)),
    ),
    "mistral": ("mistral", dict(sliding_window=None, num_key_value_heads=1)),
    "mistral_sliding": ("mistral", dict(sliding_window=10)),
    "qwen2": ("qwen2", dict(head_dim=4, tie_word_embeddings=True)),
    "qwen2_sliding": (
        "qwen2",
        dict(use_sliding_window=True, sliding_window=10, max_window_layers=1, head_dim=4),
    ),
    "qwen3": ("qwen3", dict(rope_parameters=dict(rope_type="default", rope_theta=1e6))),
}


def rows() -> np.ndarray:
    return np.random.default_rng(0).integers(1, VOCAB, (2, 32)).astype(np.int32)


def long_row() -> np.ndarray:
    return np.random.default_rng(1).integers(1, VOCAB, (1, LONG)).astype(np.int32)


def make(name: str):
    """The model of transformers, float32, with weights away from their plain beginnings."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    kind, differs = MODELS[name]
    torch.manual_seed(len(name))
    config = AutoConfig.for_model(kind, **COMMON | differs)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:  # norms start at 1 and biases at 0
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def logits(model, tokens: np.ndarray, **options) -> np.ndarray:
    import torch

    with torch.no_grad():
        return model(torch.tensor(tokens, dtype=torch.long), **options).logits.numpy()


def continuation(model, tokens: np.ndarray) -> np.ndarray:
    import torch

    prompt = torch.tensor(tokens, dtype=torch.long)
    mask = torch.ones_like(prompt)
    made = model.generate(
        prompt, attention_mask=mask, max_new_tokens=NEW, do_sample=False, pad_token_id=0
    )
    return made[:, tokens.shape[1] :].numpy()


def main() -> None:
    shutil.rmtree(DATA, ignore_errors=True)
    for name in MODELS:
        model = make(name)
        model.save_pretrained(DATA / name)
        (DATA / name / "generation_config.json").unlink(missing_ok=True)
        np.savez_compressed(
            DATA / name / "expected.npz",
            rows=logits(model, rows()),
            long=logits(model, long_row())[:, -LAST:],
            continuation=continuation(model, rows()),
        )


if __name__ == "__main__":
    main()

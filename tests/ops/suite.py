"""The op's one suite of cases, inputs and tolerances; each backend plugs in by its name."""

import zlib
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np

from nha_jax.ops import init_state, nha_attention

# Relative RMS against the float64 reference on the same (rounded) inputs.
TOLERANCE = {
    "float32": {"value": 1e-6, "grad": 2e-6},
    "bfloat16": {"value": 4e-3, "grad": 5e-3},
}

KERNEL_TOLERANCE = {  # the same for kernels, whose products take operands of the inputs' dtype
    "float32": {"value": 2e-6, "grad": 5e-6},
    "float16": {"value": 2e-3, "grad": 2e-3},
    "bfloat16": {"value": 8e-3, "grad": 8e-3},
}


@dataclass(frozen=True)
class Case:
    """One call of the op. ``documents``: lengths per row, 0 as ("pad", n) written -n."""

    name: str
    t: int = 33
    window: int | None = 4
    slot_lag: int | None = None
    slots: int = 4
    heads: int = 2
    kv_heads: int = 1
    head_dim: int = 8
    value_dim: int = 8
    scale: float | None = None
    rope: bool = True
    feature_map: str = "none"
    empty_slots: str = "masked"
    documents: tuple[tuple[int, ...], ...] | None = None
    gates: tuple[float, float] = (-2.0, -1e-2)
    state: bool = False

    @property
    def batch(self) -> int:
        return len(self.documents) if self.documents else 2

    @property
    def lag(self) -> int:
        return self.slot_lag if self.slot_lag is not None else (self.window or 0)

    def options(self) -> dict:
        names = ("window", "slot_lag", "scale", "feature_map", "empty_slots")
        return {name: getattr(self, name) for name in names}


def _packed(window: int) -> tuple[tuple[int, ...], ...]:
    """Documents of 1, W-1, W, W+1 tokens, one of no tokens, padding left, right and between."""
    w = window
    rows = ((1, w - 1, w, 0, w + 1, w), (-3, w + 1, 0, w, 1, w), (w, 1, -2, w, w, -3))
    longest = max(sum(abs(n) for n in row) for row in rows)
    return tuple((*row, -(longest - sum(abs(n) for n in row))) for row in rows)


def _length(documents: tuple[tuple[int, ...], ...]) -> int:
    return sum(abs(n) for n in documents[0])


PACKED = _packed(7)
LONG = ((70, 1, 60, -9, 60), (-20, 130, 50), (200,))  # documents over several chunks of 64
CASES = (
    Case("one_token", t=1),
    Case("two_tokens", t=2, heads=4, kv_heads=2),
    Case("shorter_than_window", t=15, window=16, value_dim=12),
    Case("window_long", t=16, window=16),
    Case("window_and_one", t=17, window=16, empty_slots="zero"),
    Case("grouped", t=63, window=8, heads=6, kv_heads=2, value_dim=12, slots=5),
    Case("long", t=257, window=24, slots=8),
    Case("pure_slots", t=63, window=0, feature_map="silu", rope=False),
    Case("pure_slots_zero", t=33, window=0, empty_slots="zero", feature_map="relu"),
    Case("no_lag", t=63, window=16, slot_lag=0, feature_map="silu", scale=1.0),
    Case("long_lag", t=40, window=3, slot_lag=9),
    Case("short_lag", t=130, window=70, slot_lag=3),
    Case("slots_without_window", t=33, window=0, slot_lag=5),
    Case("window_only", t=33, window=5, slots=0),
    Case("packed", _length(PACKED), window=7, documents=PACKED),
    Case("packed_zero", _length(PACKED), window=7, documents=PACKED, empty_slots="zero"),
    Case("packed_no_lag", _length(PACKED), window=7, slot_lag=0, documents=PACKED),
    Case("packed_pure", _length(PACKED), window=0, slot_lag=4, documents=PACKED, rope=False),
    Case("packed_long", _length(LONG), window=64, kv_heads=2, slots=8, documents=LONG),
    Case("extreme_gates", t=130, window=8, gates=(-40.0, -1e-6), slots=6),
    Case("closed_gates", t=63, window=4, gates=(-1e-5, -1e-6)),
    Case("open_gates", t=63, window=4, gates=(-40.0, -30.0)),
    Case("continued", t=63, window=6, state=True),
    Case("continued_packed", _length(PACKED), window=7, documents=PACKED, state=True),
    Case("full", t=33, window=None),
    Case("full_packed", _length(PACKED), window=None, documents=PACKED),
    Case("full_packed_long", _length(LONG), window=None, heads=4, kv_heads=2, documents=LONG),
    Case("full_continued", t=63, window=None, state=True),
)


def segment_ids(case: Case) -> np.ndarray | None:
    if case.documents is None:
        return None
    rows = []
    for row in case.documents:
        ids = [0 if n < 0 else 5 + 2 * i for i, n in enumerate(row)]
        rows.append(np.repeat(ids, [abs(n) for n in row]))
    return np.stack(rows).astype(np.int32)


def tables(case: Case, t: int | None = None) -> tuple[np.ndarray, np.ndarray] | None:
    if not case.rope:
        return None
    angle = np.arange(t or case.t)[:, None] * 0.3 ** np.arange(case.head_dim // 2)
    return np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)


def inputs(case: Case, seed: int = 0) -> dict[str, np.ndarray]:
    """q, k, v, log_alpha of the case as float32 values that bfloat16 holds exactly."""
    rng = np.random.default_rng([zlib.crc32(case.name.encode()), seed])
    b, t, h = case.batch, case.t, case.kv_heads
    low, high = case.gates
    gate = -np.exp(rng.uniform(np.log(-high), np.log(-low), (b, t, h, case.slots)))
    arrays = dict(
        q=rng.normal(size=(b, t, case.heads, case.head_dim)),
        k=rng.normal(size=(b, t, h, case.head_dim)),
        v=rng.normal(size=(b, t, h, case.value_dim)),
        log_alpha=gate,
    )
    return {name: _rounded(x) for name, x in arrays.items()}


def _rounded(x: np.ndarray) -> np.ndarray:
    """float32 values that bfloat16 holds exactly."""
    return x.astype(jnp.bfloat16).astype(np.float32)


def before(case: Case, dtype):
    """A state that has seen tokens: what comes before the case's own."""
    if not case.state:
        return None
    prompt = replace(case, name=case.name + "-prompt", t=16, documents=None, state=False)
    x = {name: jnp.asarray(a, dtype) for name, a in inputs(prompt).items()}
    x = {name: jnp.broadcast_to(a[:1], (case.batch, *a.shape[1:])) for name, a in x.items()}
    start = init_state(
        case.batch, case.kv_heads, case.head_dim, case.value_dim, case.slots, case.window,
        slot_lag=case.slot_lag, max_length=case.t + 20, dtype=dtype,
    )  # fmt: skip
    ids = None if case.documents is None else jnp.full((case.batch, 16), 5, jnp.int32)

    @jax.jit
    def after(x, ids, start):
        return nha_attention(
            **x, **case.options(), rope=tables(prompt), segment_ids=ids, initial_state=start,
            return_state=True, impl="reference",
        )[1]  # fmt: skip

    return after(x, ids, start)


def run(case: Case, impl: str, dtype, seed: int = 0) -> dict[str, np.ndarray]:
    """Outputs and gradients of one case by one backend, by name, as float64 arrays.

    Gradients are those of random cotangents of every output and state, rounded as the inputs are.
    """
    x = inputs(case, seed)
    wide = {"log_alpha": jnp.promote_types(dtype, jnp.float32)}  # float16 would round small gates
    x = {name: jnp.asarray(a, wide.get(name, dtype)) for name, a in x.items()}
    if case.window is None:
        x["log_alpha"] = x["log_alpha"][..., :0]
    state = before(case, jnp.promote_types(dtype, jnp.float32))
    moving = {"x": x}
    if state is not None:
        names = ("slot_k", "slot_v", "k", "v", "log_alpha")
        moving["state"] = {name: getattr(state, name) for name in names}
    ids = segment_ids(case)

    def outputs(moving):
        start = None if state is None else replace(state, **moving["state"])
        o, after, share, lse = nha_attention(
            **moving["x"], **case.options(), rope=tables(case), segment_ids=ids,
            initial_state=start, return_state=True, return_slot_share=True, return_lse=True,
            impl=impl,
        )  # fmt: skip
        kept = dict(slot_k=after.slot_k, slot_v=after.slot_v)
        finite = {
            f"lse_{side}": jnp.where(jnp.isfinite(y), y, 0.0)
            for side, y in zip(("slot", "window"), lse, strict=True)
            if y is not None
        }
        return dict(o=o, slot_share=share, **kept, **finite)

    def loss(moving):
        out = outputs(moving)
        rng = np.random.default_rng([7, seed])
        total = sum(
            (y.astype(jnp.promote_types(y.dtype, jnp.float32)) * _rounded(z)).sum()
            for y in out.values()
            for z in [rng.normal(size=y.shape)]
        )
        return total, out

    (_, out), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(moving)
    results = {name: np.asarray(y, np.float64) for name, y in out.items()}
    for group, tree in grads.items():
        for name, y in tree.items():
            results[f"grad {group}.{name}"] = np.asarray(y, np.float64)
    return results


def error(result: np.ndarray, truth: np.ndarray) -> float:
    """Relative RMS; an absolute one where the truth is all zero."""
    if truth.size == 0:
        return 0.0
    size = np.sqrt(np.mean(truth**2))
    return float(np.sqrt(np.mean((result - truth) ** 2)) / (size if size > 0 else 1.0))


def compare(results: dict, truth: dict, dtype: str, tolerance: dict = TOLERANCE) -> list[str]:
    """The tensors that are off, with their errors; empty when all hold."""
    assert results.keys() == truth.keys()
    wrong = []
    for name, y in truth.items():
        limit = tolerance[dtype]["grad" if name.startswith("grad") else "value"]
        off = error(results[name], y)
        if results[name].shape != y.shape or not off <= limit:
            wrong.append(f"{name}: {off:.1e} > {limit:.0e}")
    return wrong

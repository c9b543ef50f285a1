"""What the op refuses, each time in one sentence that names the argument and what was wrong."""

import jax.numpy as jnp
import pytest

from nha_jax.errors import UserError
from nha_jax.ops import init_state, nha_attention, nha_decode_step


def call(**changes):
    arguments = dict(
        q=jnp.ones((2, 5, 4, 8)),
        k=jnp.ones((2, 5, 2, 8)),
        v=jnp.ones((2, 5, 2, 8)),
        log_alpha=-jnp.ones((2, 5, 2, 3)),
        window=4,
    )
    return nha_attention(**(arguments | changes))


def state(**changes):
    sizes = dict(batch=2, kv_heads=2, head_dim=8, value_dim=8, slots=3, window=4)
    return init_state(**(sizes | changes))


BAD = {
    "q_rank": (dict(q=jnp.ones((2, 5, 8))), r"q has shape \(2, 5, 8\).*\[B,T,HQ,D\]"),
    "k_length": (dict(k=jnp.ones((2, 6, 2, 8))), r"k has shape \(2, 6, 2, 8\).*\(2, 5, 2, 8\)"),
    "k_width": (dict(k=jnp.ones((2, 5, 2, 4))), r"k has shape \(2, 5, 2, 4\)"),
    "v_heads": (dict(v=jnp.ones((2, 5, 4, 8))), r"v has shape \(2, 5, 4, 8\)"),
    "heads": (dict(q=jnp.ones((2, 5, 3, 8))), "q has 3 heads.*multiple of the 2 heads"),
    "dtype": (dict(q=jnp.ones((2, 5, 4, 8), int)), "q has dtype int32"),
    "gates": (dict(log_alpha=-jnp.ones((2, 5, 4, 3))), r"log_alpha has shape \(2, 5, 4, 3\)"),
    "no_gates": (dict(log_alpha=None), "log_alpha is None"),
    "window": (dict(window=-1), "window is -1"),
    "window_type": (dict(window=2.5), "window is 2.5"),
    "lag": (dict(slot_lag=-2), "slot_lag is -2"),
    "nothing": (dict(window=0, log_alpha=jnp.ones((2, 5, 2, 0))), "M = 0 slots and window is 0"),
    "rope_form": (dict(rope=jnp.ones((5, 4))), "rope must be a pair"),
    "rope_shape": (dict(rope=(jnp.ones((5, 8)),) * 2), r"rope cos has shape \(5, 8\).*\(5, 4\)"),
    "feature_map": (dict(feature_map="silo"), "feature_map is 'silo'.*Did you mean 'silu'"),
    "empty_slots": (dict(empty_slots="mask"), "empty_slots is 'mask'.*'masked'"),
    "impl": (dict(impl="xlaa"), "impl is 'xlaa'.*Did you mean 'xla'"),
    "segments": (dict(segment_ids=jnp.ones((2, 4), int)), r"segment_ids has shape \(2, 4\)"),
    "segments_type": (dict(segment_ids=jnp.ones((2, 5))), "segment_ids has dtype float32"),
    "state_window": (
        dict(initial_state=state(window=6)),
        r"the state's k has shape \(2, 2, 6, 8\)",
    ),
    "state_slots": (dict(initial_state=state(slots=2)), "the state's slot_k has shape"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(name):
    changes, message = BAD[name]
    with pytest.raises(UserError, match=message) as error:
        call(**changes)
    assert "\n" not in str(error.value)


def test_good_input_is_taken():
    assert call().shape == (2, 5, 4, 8)
    assert call(window=None, log_alpha=None).shape == (2, 5, 4, 8)


def test_states():
    with pytest.raises(UserError, match="max_length is None but window=None"):
        state(window=None)
    with pytest.raises(UserError, match="slots is -1"):
        state(slots=-1)
    full = state(window=None, max_length=6)
    _, after = call(window=None, initial_state=full, return_state=True)
    with pytest.raises(UserError, match="holds 5 tokens and 5 more exceed max_length 6"):
        call(window=None, initial_state=after)


def test_a_decode_step_takes_one_token():
    with pytest.raises(UserError, match="a decode step takes T = 1 token"):
        nha_decode_step(
            jnp.ones((2, 5, 4, 8)),
            jnp.ones((2, 5, 2, 8)),
            jnp.ones((2, 5, 2, 8)),
            -jnp.ones((2, 5, 2, 3)),
            state(),
            window=4,
        )

"""What the slots hold, on slots made by hand, and the capacity suite's counts."""

import types

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from nha_jax.errors import UserError
from nha_jax.evals import capacity, mqar
from nha_jax.evals.interference import look_inside, read_back, weights
from nha_jax.models import ModelConfig
from nha_jax.ops import init_state, nha_attention
from tests.evals.test_mqar_suite import config, quiet, random_model


def test_weights_by_hand():
    alpha = np.array([[0.5, 1.0], [0.2, 0.5], [1.0, 0.25]])
    w = np.asarray(weights(jnp.log(alpha), 3))
    # token 0: half written to slot 0, of which token 1 leaves a fifth; token 2 writes to slot 1.
    expected = [[0.5 * 0.2 * 1.0, 0], [0.8 * 1.0, 0.5 * 0.25], [0, 0.75]]
    np.testing.assert_allclose(w, expected, atol=1e-6)
    np.testing.assert_allclose(
        np.asarray(weights(jnp.log(alpha), 2)), [[0.1, 0], [0.8, 0.5], [0, 0]], atol=1e-6
    )
    assert not np.asarray(weights(jnp.log(alpha), 0)).any()
    # Convex: all weights and what is left of the empty start sum to 1.
    np.testing.assert_allclose(w.sum(0) + alpha.prod(0), 1, atol=1e-6)


def reading(alpha, key, value, query, token, written, among=None):
    arrays = (jnp.asarray(x, jnp.float32) for x in (key, value))
    log_alpha = jnp.log(jnp.maximum(jnp.asarray(alpha, jnp.float32), 1e-30))
    among = jnp.arange(len(key)) if among is None else jnp.asarray(among)
    query = jnp.asarray(query, jnp.float32)
    found = read_back(*arrays, log_alpha, query, token, among, jnp.asarray(written), 50.0)
    return types.SimpleNamespace(**{k: float(v) for k, v in found._asdict().items()})


KEYS, VALUES = np.eye(3), np.array([[2.0, 0, 0], [0, 3, 0], [0, 0, 4]])


def test_a_slot_for_each_token_is_read_back_in_full():
    alpha = 1 - np.eye(3)
    for token in range(3):
        got = reading(alpha, KEYS, VALUES, KEYS[(token + 1) % 3], token, 3)
        assert got.stored
        assert got.separate
        for value in (got.survival, got.own, got.key_cosine, got.value_cosine):
            assert value == pytest.approx(1, abs=1e-5)
        assert got.others == pytest.approx(0, abs=1e-5)
        assert got.queried == pytest.approx(0, abs=1e-5)  # the query was another one's key
        assert reading(alpha, KEYS, VALUES, KEYS[token], token, 3).queried > 1 - 1e-5
    assert not reading(alpha, KEYS, VALUES, KEYS[2], 2, 2).stored


def test_an_overwritten_token_is_gone():
    alpha = [[0.0], [0.25], [0.25]]  # one slot
    got = reading(alpha, KEYS, VALUES, KEYS[0], 0, 3)
    assert got.survival == pytest.approx(1 / 16, rel=1e-4)
    assert got.own == got.queried == pytest.approx(1 / 16, rel=1e-4)
    assert got.others == pytest.approx(15 / 16, rel=1e-4)
    assert not got.separate
    # K = k0/16 + 3/16 k1 + 3/4 k2
    assert got.key_cosine == pytest.approx(1 / np.sqrt(1 + 9 + 144), rel=1e-4)
    assert got.value_cosine == pytest.approx(2 / np.sqrt(4 + 81 + 48**2), rel=1e-4)


def test_tokens_that_share_a_slot_collide():
    # Tokens 0 and 1 in slot 0, two parts to three; slot 1 is token 2's.
    alpha = [[0.0, 1.0], [0.4, 1.0], [1.0, 0.0]]
    got = reading(alpha, KEYS, VALUES, KEYS[0], 0, 3)
    assert got.survival == pytest.approx(0.4, rel=1e-4)
    assert got.own == pytest.approx(0.4, rel=1e-4)
    assert got.others == pytest.approx(0.6, rel=1e-4)
    assert not got.separate
    assert got.value_cosine == pytest.approx(0.8 / np.hypot(0.8, 1.8), rel=1e-4)
    apart = reading(alpha, KEYS, VALUES, KEYS[0], 0, 3, among=[0, 2])
    assert apart.separate  # from those asked about


def test_the_shares_are_those_of_the_op():
    """What the op's slots return for a query is the sum over tokens of share times value."""
    rng = np.random.default_rng(0)
    t, d, m, lag = 12, 4, 3, 2
    k, v = (jnp.asarray(rng.normal(size=(1, t, 1, d)), jnp.float32) for _ in range(2))
    log_alpha = jnp.asarray(-rng.exponential(0.5, size=(1, t, 1, m)), jnp.float32)
    q = jnp.asarray(rng.normal(size=(1, t, 1, d)), jnp.float32)
    o = nha_attention(q, k, v, log_alpha, window=0, slot_lag=lag, scale=0.7, impl="reference")
    for place in (3, 11):
        parts = [
            read_back(
                k[0, :, 0], v[0, :, 0], log_alpha[0, :, 0], q[0, place, 0],
                token, jnp.arange(t), jnp.asarray(place - lag + 1), 0.7,
            )
            for token in range(t)
        ]  # fmt: skip
        total = sum(part.queried * v[0, i, 0] for i, part in enumerate(parts))
        np.testing.assert_allclose(total, o[0, place, 0], atol=1e-5)
        assert [bool(p.stored) for p in parts] == [i < place - lag + 1 for i in range(t)]
        for part in parts[: place - lag + 1]:
            assert float(part.own + part.others) <= 1 + 1e-5


def small(**model):
    run = config(model={"kv_heads": 1, "heads": 2, "layers": 2, "windows": "4,full", **model})
    run.data.seq_len = 16
    run.eval = capacity.options(run)
    run.eval.update(num_kv_pairs=(1, 3), num_examples=10, batch_size=8)
    return run


def test_look_inside_runs_the_model():
    run = small(windows="4", slots=3, feature_map="silu")
    model = random_model(run.model)
    run.eval.num_examples = 8
    (batch,) = mqar.questions(mqar.Cell(16, 3, 0), run.eval)
    inside = nnx.jit(look_inside)
    hidden, layers = inside(model, batch.inputs, batch.places, batch.value_at)
    np.testing.assert_allclose(hidden, model(batch.inputs).hidden, atol=1e-5)
    assert [int(one.layer) for one in layers] == [0, 1]
    for one in layers:
        assert one.share.shape == one.reading.own.shape == (8, 3, 2)
        np.testing.assert_array_equal(
            one.reading.stored, np.repeat(batch.distance[..., None] >= 4, 2, axis=2)
        )
        assert (np.asarray(one.share)[batch.distance >= 4] > 0).all()


def test_measure_counts_what_mqar_counts():
    run = small()
    model = random_model(run.model)
    shape = ModelConfig.from_config(run.model)
    values = capacity.measure(model, shape, run.eval, quiet)
    expected = mqar.evaluate(run)(model, quiet).values
    for name in ("by_pairs", "by_pairs_and_distance"):
        for row, same in zip(values[name], expected[name], strict=True):
            assert {key: row[key] for key in same} == same
    assert values["reader"]["layer"] == 0  # the other has no slots
    for row in values["by_pairs"]:
        assert sum(row["missed"].values()) == row["asked"] - row["correct"]
        assert sum(row["answered"].values()) == row["correct"]


def seen(**of):
    values = dict(
        right=np.array([[True, False, False, False]]),
        where=np.array([[0, 1, 1, 1]]),
        heads=[(0, 0), (0, 1), (1, 0)],
        share=np.full((1, 4, 3), 0.5),
        stored=np.array([[True, True, True, False]])[..., None].repeat(3, -1),
        measures={name: np.zeros((1, 4, 3)) for name in capacity.MEASURES},
    )
    return capacity.Seen(**{**values, **of})


def test_causes_and_means_by_hand():
    one = seen()
    one.measures["used"][..., :] = [0.4, 0.3, 0.1]  # heads 0 and 1 read, head 2 does not
    # head 0 keeps query 2, but not apart; head 1 keeps nothing; head 2 would keep query 1.
    one.measures["survival"][0, :, 0] = [1.0, 0.2, 0.9, 0.0]
    one.measures["separate"][0, :, 0] = [1, 1, 0, 0]
    one.measures["survival"][0, 1, 2] = one.measures["separate"][0, 1, 2] = 1
    values = capacity.summary([mqar.Cell(16, 4, 0)], [1, 4, 16], [one])
    assert values["reader"] == {"layer": 0, "head": 0}
    assert values["readers"] == [{"layer": 0, "head": 0}, {"layer": 0, "head": 1}]
    (row,) = values["by_pairs"]
    # Query 1 was overwritten, 2 collides, 3 is still in the window: not the slots' fault.
    assert row["missed"] == {"overwritten": 1, "collision": 1, "not_asked": 1}
    assert row["answered"] == {"overwritten": 0, "collision": 0, "not_asked": 1}
    assert row["survival"] == pytest.approx((1.0 + 0.2 + 0.9) / 3)
    assert (row["stored"], row["slot_share"], row["asked"]) == (3, 0.5, 4)
    near, far = values["by_pairs_and_distance"]
    assert (near["asked"], near["correct"], near["survival"]) == (1, 1, 1.0)
    assert (far["asked"], far["stored"]) == (3, 2)


def test_evaluate_and_bad_input():
    run = small()
    model = random_model(run.model)
    result = capacity.evaluate(run)(model, quiet)
    assert list(result.table.columns[0].cells) == ["1 in 16", "3 in 16"]
    names = [score["name"] for score in result.scores]
    assert names[:2] == ["pairs=1,recall", "pairs=1,own"]
    assert len(set(names)) == len(names)
    assert len(result.figure.axes) == 4
    run.eval.slots = (8,)
    with pytest.raises(UserError, match="other numbers than the trained model's 4 slots"):
        capacity.evaluate(run)
    run.eval.slots = ()
    for change in ({"slots": 0, "windows": "4"}, {"windows": "full"}):
        run.model.update(change)
        with pytest.raises(UserError, match="no layer with slots"):
            capacity.evaluate(run)


def test_train_one_model_for_each_number_of_slots(tmp_path, monkeypatch):
    run = small(windows="4", layers=1, heads=1)
    run.eval.slots = (2, 1)
    trained = []

    def train_run(one, place):
        trained.append((one.model.slots, place, dict(one.eval)))
        return 0

    class Found:
        def __init__(self, place):
            self.slots = int(place.name.removeprefix("slots="))

        def model(self, shape):
            assert shape.slots == self.slots
            return random_model({**run.model, "slots": self.slots})

    monkeypatch.setattr(capacity, "train_run", train_run)
    monkeypatch.setattr(capacity, "Checkpoint", Found)
    result = capacity.train(run.lock())(tmp_path, quiet)
    assert trained == [
        (n, tmp_path / "capacity" / f"slots={n}", {"every": 0, "examples": 0}) for n in (1, 2)
    ]
    assert [found["slots"] for found in result.values["by_slots"]] == [1, 2]
    assert [c.header for c in result.table.columns] == ["pairs", "1 slots", "2 slots"]
    assert result.scores[0]["name"] == "pairs=1,slots=2"
    with run.unlocked():
        run.eval.slots = (0, 4)
    with pytest.raises(UserError, match="a model without slots"):
        capacity.train(run)
    with run.unlocked():
        run.eval.slots, run.model.windows = (4,), "full"
    with pytest.raises(UserError, match="no layer with slots"):
        capacity.train(run)
    assert len(trained) == 2


def test_state_of_the_op_agrees():
    """The slots rebuilt from the weights are the op's own state."""
    rng = np.random.default_rng(1)
    t, d, m, window = 9, 4, 3, 2
    k, v, q = (jnp.asarray(rng.normal(size=(1, t, 1, d)), jnp.float32) for _ in range(3))
    log_alpha = jnp.asarray(-rng.exponential(0.5, size=(1, t, 1, m)), jnp.float32)
    start = init_state(1, 1, d, d, m, window)
    _, state = nha_attention(
        q, k, v, log_alpha, window=window, initial_state=start, return_state=True, impl="reference"
    )
    w = weights(log_alpha[0, :, 0], jnp.asarray(t - window))
    np.testing.assert_allclose(w.T @ k[0, :, 0], state.slot_k[0, 0], atol=1e-5)
    np.testing.assert_allclose(w.T @ v[0, :, 0], state.slot_v[0, 0], atol=1e-5)

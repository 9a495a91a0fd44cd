"""Class-balanced and weighted `jl.batches`, and `jl.mixture`: what an epoch is, and resuming."""

import collections

import jax.numpy as jnp
import numpy as np
import pytest

import jaxloop as jl
from jaxloop._data.in_memory import Batches

N = 60
X = np.arange(N, dtype=np.float32)
LABELS = np.array([0] * 50 + [7] * 8 + [9] * 2)


def examples(data, epoch=0):
    return np.concatenate([np.asarray(batch) for batch in data.epoch(epoch)]).astype(int)


def step(batch, state):
    # Another number for another order of the examples, in integers, so that no rounding hides it.
    place = jnp.arange(1, batch.shape[0] + 1, dtype=jnp.int32)
    seen = jnp.sum(place * batch.astype(jnp.int32))
    return 3 * state + seen


ZERO = np.int32(0)
LOOP = jl.loop(step)


def halted_at(data, steps):
    """The state after so many steps of several epochs."""
    seen = []
    loop = LOOP.handle("iteration_completed", lambda state: seen.append(state), jl.only(steps))
    loop.run(data, ZERO, epochs=3)
    return jl.deserialize_state(jl.serialize_state(seen[0]), like=ZERO)


# --- balance -------------------------------------------------------------------------------------


@pytest.mark.parametrize("labels", [LABELS, LABELS.astype(str), list(LABELS), jnp.asarray(LABELS)])
def test_each_class_comes_equally_often(labels):
    data = jl.batches(X, 7, balance=labels)
    for epoch in range(3):
        drawn = examples(data, epoch)
        assert collections.Counter(LABELS[drawn]) == {0: 20, 7: 20, 9: 20}
        counts = np.bincount(drawn, minlength=N)
        assert counts[:50].max() == 1  # a large class has none twice
        assert set(counts[50:58]) == {2, 3} and set(counts[58:]) == {10}
    assert not np.array_equal(examples(data, 0), examples(data, 1))
    seen = np.unique(np.concatenate([examples(data, epoch) for epoch in range(20)]))
    assert len(seen) == N  # in some epoch, each example comes


def test_what_remains_goes_to_other_classes_in_other_epochs():
    labels = np.arange(10) % 4
    data = jl.batches(np.arange(10.0), 5, balance=labels)
    counts = [tuple(np.bincount(labels[examples(data, e)])) for e in range(20)]
    assert {n for count in counts for n in count} == {2, 3} and len(set(counts)) > 2


def test_batches_are_mixed_and_not_class_by_class():
    first = LABELS[np.asarray(next(iter(jl.batches(X, 15, balance=LABELS)))).astype(int)]
    assert len(set(first)) == 3


def test_a_class_may_be_named():
    data = jl.batches({"x": X, "label": LABELS}, 7, balance="label", pad=True)
    by_array = jl.batches(X, 7, balance=LABELS)
    for batch, x in zip(data, by_array, strict=True):
        np.testing.assert_array_equal(batch["x"][batch["mask"]], x)


def test_two_labels_of_very_different_frequency_are_quick():
    labels = np.zeros(300_000, bool)
    labels[5] = True
    order = jl.batches(np.zeros(300_000, np.int8), 100, balance=labels).order(0)
    assert (order == 5).sum() == 150_000 and len(order) == 300_000


# --- weights -------------------------------------------------------------------------------------


def test_examples_are_drawn_in_proportion_to_their_weights():
    weights = np.array([0.0, 1.0, 3.0, 0.0] * 500)
    data = jl.batches(np.arange(2000), 100, sampling_weights=weights)
    drawn = np.concatenate([examples(data, epoch) for epoch in range(10)])
    assert len(drawn) == 20_000
    share = np.bincount(drawn % 4, minlength=4) / len(drawn)
    assert share[0] == share[3] == 0
    assert abs(share[2] - 0.75) < 0.02


@pytest.mark.parametrize("weights", [[0, 0, 5, 0], [1e308] * 4, [5e-324, 0, 0, 0], [0, 0, 0, True]])
def test_extreme_weights(weights):
    data = jl.batches(np.arange(4), 2, sampling_weights=weights)
    drawn = {i for epoch in range(20) for i in examples(data, epoch)}
    assert drawn <= set(np.flatnonzero(weights)) and drawn


# --- an epoch is a function of (seed, epoch) -----------------------------------------------------

WAYS = [
    {"balance": LABELS},
    {"sampling_weights": np.arange(N)},
]


@pytest.mark.parametrize("how", WAYS)
def test_the_order_is_a_function_of_seed_and_epoch(how):
    data, again = (jl.batches(X, 7, seed=4, **how) for _ in range(2))
    for epoch in (0, 1, 5):
        np.testing.assert_array_equal(examples(data, epoch), examples(again, epoch))
    assert not np.array_equal(examples(data, 0), examples(jl.batches(X, 7, seed=5, **how)))
    assert len(examples(data)) == N


@pytest.mark.parametrize("device", [False, True])
@pytest.mark.parametrize("last", [{}, {"drop_remainder": True}])
@pytest.mark.parametrize("how", WAYS)
def test_a_run_resumes_in_mid_epoch(how, last, device):
    def data():
        return jl.batches(X, 7, device=device, **how, **last)

    want = ZERO
    for epoch in range(3):
        for batch in data().epoch(epoch):
            want = np.asarray(step(jnp.asarray(batch), want))
    whole = LOOP.run(data(), ZERO, epochs=3)
    assert int(whole.step_state) == int(want)
    state = halted_at(data(), len(data()) + 3)
    resumed = LOOP.from_state(state).run(data(), epochs=3)
    assert int(resumed.step_state) == int(want) and resumed.step == whole.step


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"shuffle": True},
        {"balance": LABELS[::-1]},
        {"sampling_weights": np.arange(N)},
        {"balance": LABELS, "seed": 1},
    ],
)
def test_other_batches_are_refused_in_mid_epoch(changed):
    state = halted_at(jl.batches(X, 7, balance=LABELS), 3)
    with pytest.raises(jl.errors.DataError, match="in the middle of epoch 0"):
        LOOP.from_state(state).run(jl.batches(X, 7, **changed), epochs=2)
    assert LOOP.from_state(state).run(jl.batches(X, 7, balance=LABELS), epochs=2).epoch == 2


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"balance": LABELS[1:]}, r"one label for each of the 60 examples, got shape \(59,\)"),
        ({"balance": np.eye(3)[np.arange(N) % 3]}, r"argmax\(-1\)"),
        ({"balance": X}, "integers, booleans or strings, got float32"),
        ({"balance": [None] * N}, "integers, booleans or strings"),
        ({"balance": [[1], [1, 2]]}, "balance must be an array"),
        ({"sampling_weights": [[1], [1, 2]]}, "sampling_weights must be an array"),
        ({"balance": "label"}, "part of the data for balance= 'label'"),
        ({"balance": LABELS, "sampling_weights": X}, "cannot both be given"),
        ({"sampling_weights": X[1:]}, r"for each of the 60 examples, got shape \(59,\)"),
        ({"sampling_weights": X * 0}, "not all 0, got only zeros"),
        ({"sampling_weights": X - 1}, r"at least 0 and not all 0, got -1\.0"),
        ({"sampling_weights": np.where(X == 3, np.nan, X)}, "got nan"),
        ({"sampling_weights": np.where(X == 3, np.inf, X)}, "got inf"),
        ({"sampling_weights": ["a"] * N}, "must be real numbers"),
        ({"sampling_weights": 1j * X}, "must be real numbers"),
    ],
)
def test_unsuitable_labels_and_weights(arguments, message):
    with pytest.raises(jl.JaxloopError, match=message):
        jl.batches(X, 7, **arguments)


def test_no_examples_are_no_batches():
    for how in ({"balance": np.zeros(0, int)}, {"sampling_weights": np.zeros(0)}):
        assert list(jl.batches(X[:0], 7, **how)) == []


def test_a_sampled_validation_and_a_prediction_of_it():
    with pytest.raises(jl.errors.DataError, match="in a random order"):
        model = (lambda key, x: jnp.zeros(()), lambda w, x: x * w)
        jl.predictor(model).run(jl.batches(X, 7, balance=LABELS), 1.0)


# --- mixtures ------------------------------------------------------------------------------------

A = jl.batches(np.arange(20, dtype=np.float32), 2, shuffle=True, seed=1)  # 10 batches
B = [np.full(2, 100.0 + i, np.float32) for i in range(3)]


def sources(batches):
    return ["b" if batch[0] >= 100 else "a" for batch in batches]


def test_by_default_each_batch_comes_once():
    data = jl.mixture([A, B], seed=3)
    assert len(data) == 13
    for epoch in range(3):
        batches = list(data.epoch(epoch))
        np.testing.assert_array_equal(
            np.concatenate([b for b in batches if b[0] < 100]), np.concatenate(list(A.epoch(epoch)))
        )
        assert [b[0] for b in batches if b[0] >= 100] == [100, 101, 102]
    orders = {"".join(sources(data.epoch(epoch))) for epoch in range(4)}
    assert len(orders) == 4


def test_each_epoch_has_exactly_the_shares_and_no_batch_is_skipped():
    data = jl.mixture([A, B], weights=[1, 3], num_batches=8)
    assert all(collections.Counter(sources(data.epoch(e))) == {"a": 2, "b": 6} for e in range(9))
    batches = [batch for epoch in range(10) for batch in data.epoch(epoch)]
    of_a = np.concatenate([b for b in batches if b[0] < 100])
    np.testing.assert_array_equal(of_a[:20], np.concatenate(list(A.epoch(0))))
    np.testing.assert_array_equal(of_a[20:], np.concatenate(list(A.epoch(1))))
    assert [b[0] for b in batches if b[0] >= 100] == [100, 101, 102] * 20


def test_mixtures_of_mixtures_and_of_data_sets_with_an_index():
    class Squares:
        def __len__(self):
            return 4

        def __getitem__(self, index):
            return np.full(2, 10.0 * index, np.float32)

    inner = jl.mixture([Squares(), B], num_batches=4, weights=[1, 1])
    outer = jl.mixture([inner, A], weights=[3, 1], num_batches=8)
    found = [b.tolist() for e in range(3) for b in outer.epoch(e) if b[0] >= 100 or b[0] == b[1]]
    want = [b.tolist() for e in range(5) for b in inner.epoch(e)][:18]
    assert found == want


@pytest.mark.parametrize("steps", [1, 4, 8, 11, 13, 20])
def test_a_mixture_resumes_anywhere(steps):
    def data():
        return jl.mixture([A, jl.mixture([B, A], seed=9)], weights=[2, 3], num_batches=8, seed=2)

    want = ZERO
    for epoch in range(3):
        for batch in data().epoch(epoch):
            want = np.asarray(step(jnp.asarray(batch), want))
    assert int(LOOP.run(data(), ZERO, epochs=3).step_state) == int(want)
    state = halted_at(data(), steps)
    assert int(LOOP.from_state(state).run(data(), epochs=3).step_state) == int(want)


def test_a_resumed_mixture_gathers_only_what_it_needs(monkeypatch):
    data = jl.mixture([jl.batches(np.arange(400, dtype=np.float32), 2, shuffle=True), B])
    state = halted_at(data, 150)
    gathered = []
    batch = Batches.batch
    monkeypatch.setattr(
        Batches, "batch", lambda self, *args: gathered.append(1) or batch(self, *args)
    )
    LOOP.from_state(state).run(data)
    assert len(gathered) <= 203 - 150 + 64 + 2  # the position is known every 64 batches


def test_another_mixture_is_refused_in_mid_epoch():
    state = halted_at(jl.mixture([A, B]), 3)
    for other in (
        jl.mixture([A, B], seed=1),
        jl.mixture([A, B], weights=[1, 1]),
        jl.mixture([B, A]),
        jl.mixture([jl.batches(np.arange(20, dtype=np.float32), 2), B]),
        jl.batches(np.arange(26, dtype=np.float32), 2),
    ):
        with pytest.raises(jl.errors.DataError, match="to resume from"):
            LOOP.from_state(state).run(other, epochs=2)
    assert LOOP.from_state(state).run(jl.mixture([A, B]), epochs=2).epoch == 2


def test_a_mixture_trains_validates_and_is_checked_for_padding():
    x = np.linspace(-1, 1, 12, dtype=np.float32)[:, None]
    one, two = jl.batches((x, 2 * x), 5, pad=True), jl.batches((x, 2 * x), 4, pad=True)
    model = (lambda key, x: jnp.zeros((1, 1)), lambda w, x: x @ w)
    loop = jl.trainer(model, "mean_squared_error", "sgd", log=0).validate(jl.mixture([one, two]))
    state = loop.final_state(jl.mixture([one, two]), epochs=2)
    assert state.history[1]["validation_loss"] < state.history[0]["validation_loss"]
    with pytest.raises(jl.errors.DataError, match="padded"):
        named = jl.mixture([jl.batches({"x": x, "y": 2 * x}, 5, pad=True)])
        jl.trainer(model, "mean_squared_error", "sgd", log=0, inputs="x", targets="y").run(named)
    with pytest.raises(jl.errors.DataError, match="got a mixture"):
        jl.predictor(model).run(jl.mixture([one]), np.ones((1, 1)))


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"data": []}, "must be a list of data sets"),
        ({"data": A}, "must be a list of data sets"),
        ({"data": [A, iter(B)]}, "must have a length and an index, got a list_iterator at 1"),
        ({"data": [A, lambda epoch: B]}, "got a function at 1"),
        ({"data": [A, {"x": X}]}, "got a dict at 1"),
        ({"data": [A, []]}, "got an empty one at 1"),
        ({"data": [A, B], "weights": [1]}, "must be 2 finite numbers above 0"),
        ({"data": [A, B], "weights": [1, 0]}, "must be 2 finite numbers above 0"),
        ({"data": [A, B], "weights": [1, np.nan]}, "must be 2 finite numbers above 0"),
        ({"data": [A, B], "weights": ["x", "y"]}, "must be 2 finite numbers above 0"),
        ({"data": [A, B], "weights": [1000, 1]}, "got none for that at 1"),
        ({"data": [A, B], "num_batches": 0}, "num_batches must be at least 1"),
        ({"data": [A, B], "seed": -1}, "seed must be at least 0"),
        ({"data": [A, B], "seed": 0.5}, "seed must be a whole number"),
        ({"data": [A, [np.zeros((2, 3))]]}, "must agree except for the number of examples"),
        ({"data": [A, [np.zeros(2, np.int32)]]}, "must agree except for the number of examples"),
        ({"data": [A, [(B[0], B[0])]]}, "must agree except for the number of examples"),
    ],
)
def test_unsuitable_mixtures(arguments, message):
    with pytest.raises(jl.JaxloopError, match=message):
        jl.mixture(**arguments)

"""`jl.predictor`: all predictions, in order, without padding, in memory or streamed."""

import functools
import gc
import weakref

import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import jaxloop as jl

pytestmark = pytest.mark.slow  # CI counts their coverage all the same

X = np.random.default_rng(0).normal(size=(23, 3)).astype(np.float32)
Y = np.arange(23, dtype=np.int32)
W = np.random.default_rng(1).normal(size=(3, 2)).astype(np.float32)
PAIR = (lambda key, x: jnp.zeros((3, 2)), lambda w, x: x @ w)
WANT = X @ W


def same(found, want=WANT):
    np.testing.assert_allclose(found, want, rtol=1e-5, atol=1e-6)


class Net(nn.Module):
    @nn.compact
    def __call__(self, x, train: bool):
        x = nn.BatchNorm(use_running_average=not train)(nn.Dense(4)(x))
        return nn.Dropout(0.5, deterministic=not train)(x)


class Nnx(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.dense, self.norm = nnx.Linear(3, 4, rngs=rngs), nnx.BatchNorm(4, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        return self.drop(self.norm(self.dense(x)))


@functools.cache
def linen():
    model = Net()
    state = jax.jit(model.init, static_argnames="train")(jax.random.key(1), X[:1], train=False)
    return model, state, model.apply(state, X, train=False)


def of_nnx():
    model = Nnx()
    quiet = nnx.clone(model)
    quiet.eval()
    return model, model, quiet(X)


def equinox():
    model = eqx.nn.Linear(3, 2, key=jax.random.key(0))
    return model, model, X @ np.asarray(model.weight).T + np.asarray(model.bias)


def haiku():
    model = hk.without_apply_rng(hk.transform(lambda x: hk.Linear(2)(x)))
    params = model.init(jax.random.key(0), X)
    return model, params, model.apply(params, X)


def with_state():
    model = jl.Model(
        lambda key, x: (jnp.zeros((3, 2)), {"n": jnp.zeros(())}),
        lambda w, s, x, *, train, key: (x @ w + s["n"], {"n": s["n"] + 1}),
    )
    return model, (W, {"n": np.float32(2)}), WANT + 2


def container():
    return {"a": PAIR, "b": (lambda k, x: jnp.zeros(()), lambda w, x: w * x)}, None, None


@pytest.mark.slow
@pytest.mark.parametrize("make", [linen, of_nnx, equinox, haiku, with_state])
def test_models_of_every_kind(make):
    model, state, want = make()
    predictor = jl.predictor(model)
    for data in (jl.batches((X, Y), 5), jl.batches((X, Y), 5, pad=True), jl.batches(X, 30)):
        found = predictor.run(data, state)
        assert type(found) is np.ndarray and found.flags.writeable
        same(found, want)
        same(np.concatenate(list(predictor.stream(data, state))), want)


@pytest.mark.parametrize("make", [of_nnx, equinox])
def test_a_module_that_holds_its_state_needs_no_other(make):
    model, _, want = make()
    same(jl.predictor(model).run(jl.batches(X, 5)), want)


def test_it_predicts_what_the_evaluator_sees():
    model, state, _ = linen()
    state = jax.tree.map(lambda leaf: np.asarray(leaf) + np.float32(0.5), state)
    data = jl.batches((X, np.zeros((23, 4), np.float32)), 8)
    found = jl.predictor(model).run(data, state)
    value = jl.evaluator(model, "mean_squared_error").run(data, state)
    np.testing.assert_allclose(value["loss"], np.mean(found**2), rtol=1e-5)


def test_a_pytree_of_predictions_is_joined_leaf_by_leaf():
    model = {"a": PAIR, "b": (lambda k, x: jnp.zeros(()), lambda w, x: (w * x, x[:, 0] > 0))}
    found = jl.predictor(model).run(jl.batches(X, 4), {"a": W, "b": np.float32(2)})
    same(found["a"])
    same(found["b"][0], 2 * X)
    assert found["b"][1].dtype == bool
    np.testing.assert_array_equal(found["b"][1], X[:, 0] > 0)


@pytest.mark.parametrize(
    "data",
    [
        [X[:9], X[9:]],
        [(X[:9], Y[:9]), (X[9:], Y[9:])],
        [(X[:9], Y[:9], np.zeros(9)), (X[9:], Y[9:], np.zeros(14))],
        [[X[:9]], [X[9:]]],
        [jnp.asarray(X[:9]), jnp.asarray(X[9:])],
        lambda epoch: iter([X[:9], X[9 + epoch :]]),
    ],
)
def test_batches_of_every_kind(data):
    same(jl.predictor(PAIR).run(data, W))


def test_a_one_shot_iterator_is_read_once():
    same(jl.predictor(PAIR).run((x for x in np.split(X, [7])), W))


def test_named_inputs():
    data = jl.batches({"image": X, "other": Y}, 5, pad=True)
    same(jl.predictor(PAIR, inputs="image").run(data, W))
    both = (lambda key, a, b: jnp.zeros((3, 2)), lambda w, a, b: a @ w + b[:, None])
    found = jl.predictor(both, inputs=("image", lambda d: d["other"].astype(jnp.float32)))
    same(found.run(data, W), WANT + Y[:, None])
    with pytest.raises(jl.errors.DataError, match="inputs='image'"):
        jl.predictor(PAIR).run(data, W)
    with pytest.raises(jl.errors.UnknownNameError, match="imagee"):
        jl.predictor(PAIR, inputs="imagee").run(data, W)


# --- padding -------------------------------------------------------------------------------------


def test_examples_of_weight_0_are_no_padding():
    weight = np.where(np.arange(23) % 3 == 0, 0.0, 1.0).astype(np.float32)
    weight[-2:] = 0  # also at the end, where the padding is
    found = jl.predictor(PAIR).run(jl.batches((X, Y, weight), 5, pad=True), W)
    same(found)


def test_padding_alone_is_dropped_and_full_batches_have_none():
    for size in (1, 5, 23, 64):
        same(jl.predictor(PAIR).run(jl.batches((X, Y), size, pad=True), W))
    shapes = [y.shape[0] for y in jl.predictor(PAIR).stream(jl.batches((X, Y), 5, pad=True), W)]
    assert shapes == [5, 5, 5, 5, 3]


def test_a_mask_drops_examples_of_every_batch():
    there = np.arange(23) % 4 != 1
    there[:5] = False
    arrays = {"x": X, "there": there}
    for pad in (False, True):
        data = jl.batches(arrays, 5, pad=pad)
        predictor = jl.predictor(PAIR, inputs="x", mask="there")
        same(predictor.run(data, W), WANT[there])
        assert next(predictor.stream(data, W)).shape == (0, 2)
    by_function = jl.predictor(PAIR, inputs="x", mask=lambda batch: batch["x"][:, 0] > 0)
    same(by_function.run(jl.batches(arrays, 5), W), WANT[X[:, 0] > 0])
    with pytest.raises(jl.errors.DataError, match=r"booleans of shape \(batch,\), got float32"):
        jl.predictor(PAIR, inputs="x", mask="x").run(jl.batches(arrays, 5), W)


# --- what it costs -------------------------------------------------------------------------------


def test_a_ragged_last_batch_compiles_once_and_later_runs_nothing():
    traced = []

    def apply(w, x):
        traced.append(x.shape)
        return x @ w

    predictor = jl.predictor((PAIR[0], apply))
    data = jl.batches(X, 5)
    for _ in range(3):
        same(predictor.run(data, W))
    assert traced == [(5, 3), (3, 3)]


def test_shapes_that_keep_changing_are_warned_of():
    with pytest.warns(UserWarning, match="the shapes of the batches keep changing"):
        same(jl.predictor(PAIR).run([X[:2], X[2:5], X[5:]], W))


@pytest.mark.slow
def test_a_stream_holds_a_few_batches_and_reads_as_few_ahead():
    alive, read = [], []

    def batches():
        for index in range(200):
            x = jnp.full((4, 3), index, jnp.float32)
            alive.append(weakref.ref(x))
            read.append(index)
            yield x
            del x

    stream = jl.predictor(PAIR).stream(batches(), W)
    assert read == [0]
    for index, y in enumerate(stream):
        same(y, np.full((4, 3), index, np.float32) @ W)
        assert len(read) <= index + 1 + 33
        if index % 50 == 0:
            gc.collect()
            assert sum(ref() is not None for ref in alive) <= 40


def test_few_large_batches_are_ahead():
    read = []

    def batches():
        for index in range(6):
            read.append(index)
            yield np.zeros((2**21, 3), np.float32)  # 24 MiB

    stream = jl.predictor((lambda k, x: jnp.zeros(()), lambda w, x: w + x[:2])).stream(
        batches(), 0.0
    )
    next(stream)
    assert len(read) <= 4
    stream.close()


def test_data_that_reuse_their_memory():
    def batches():
        x = np.empty((4, 3), np.float32)
        for index in range(50):
            x[:] = index
            yield x

    found = jl.predictor(PAIR).run(batches(), W)
    same(found, np.repeat(np.arange(50, dtype=np.float32), 4)[:, None] * W.sum(0))


def test_a_streamed_prediction_may_be_written():
    for y in jl.predictor(PAIR).stream(jl.batches(X, 5), W):
        y[:] = 0


def test_transfers_are_explicit():
    with jax.transfer_guard("disallow"):
        same(jl.predictor(PAIR).run(jl.batches(X, 5), jax.device_put(W)))


def test_a_state_on_several_devices_and_data_on_another():
    mesh = jax.make_mesh((4,), ("i",), axis_types=(jax.sharding.AxisType.Auto,))
    where = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    same(jl.predictor(PAIR).run(jl.batches(X, 5), jax.device_put(W, where)))
    other = [jax.device_put(X, jax.devices()[2])]
    same(jl.predictor(PAIR).run(other, jax.device_put(W, jax.devices()[1])))


def test_dtypes_stay():
    model = (lambda key, x: jnp.zeros((3, 2), jnp.bfloat16), lambda w, x: x.astype(w.dtype) @ w)
    found = jl.predictor(model).run(jl.batches(X, 5), W)  # cast to the model's own dtype
    assert found.dtype == jnp.bfloat16
    whole = jl.predictor((lambda k, x: jnp.zeros(()), lambda w, x: x)).run(jl.batches(Y, 5), 0.0)
    assert whole.dtype == np.int32


@pytest.mark.slow
def test_a_model_that_draws_repeats_itself():
    class Noisy(nn.Module):
        @nn.compact
        def __call__(self, x):
            return x + jax.random.normal(self.make_rng("noise"), x.shape)

    data = jl.batches(X, 5)
    first, again = (jl.predictor(Noisy()).run(data, {}) for _ in range(2))
    np.testing.assert_array_equal(first, again)
    assert len(np.unique(first - X)) > 60


# --- mistakes ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "data, message",
    [
        (X, r"iterable of batches, got an array of shape \(23, 3\)"),
        ({"x": X}, "iterable of batches, got a dict"),
        (None, "iterable of batches, got a NoneType"),
        (3, "iterable of batches, got an int"),
        ([], "at least one batch"),
        (iter(()), "at least one batch"),
        (lambda epoch: [], "at least one batch"),
        (jl.batches(X[:0], 4), "at least one batch"),
        (jl.batches(X, 4, shuffle=True), "in their own order, got data in a random order"),
        (jl.batches(X, 4, drop_remainder=True), "got data that drop their remainder"),
        ([{"x": X}], "got a dict with 'x'"),
        ([(X,) * 4], "got a tuple"),
        ([["a", "b"]], "must be an array of numbers"),
    ],
)
def test_data_that_are_no_batches(data, message):
    with pytest.raises(jl.JaxloopError, match=message):
        jl.predictor(PAIR).stream(data, W)  # before the first prediction is asked for


def test_a_remainder_that_does_not_exist_is_not_missed():
    same(jl.predictor(PAIR).run(jl.batches(X, 23, drop_remainder=True), W))


def test_a_state_that_does_not_fit_is_an_error_before_the_first_prediction():
    model, state, _ = linen()
    stream = jl.predictor(model).stream
    data = jl.batches(X, 5)
    for given, message in (
        (None, "must have the state of its model, got none"),
        ({"params": state["params"]}, r"got none for 'batch_stats'"),
        ({**state, "other": {}}, "got 'other'"),
        (jax.tree.map(lambda a: a[None], state), r"must have shape \(4,\), got \(1, 4\)"),
        (jl.trainer(model, "mean_squared_error", "adam", log=0), "structure"),
    ):
        with pytest.raises(jl.JaxloopError, match=message):
            stream(data, given)
    loop = jl.loop(lambda batch, state: state)
    with pytest.raises(jl.errors.ArgumentTypeError, match=r"loop\.output\(state\)"):
        stream(data, loop.run([1.0], {"model_state": 0.0}))


def test_data_that_fail_give_their_earlier_predictions_first():
    def batches():
        yield X[:3]
        yield X[3:6]
        raise OSError("gone")

    seen = []
    with pytest.raises(OSError, match="gone") as raised:
        seen.extend(jl.predictor(PAIR).stream(batches(), W))
    same(np.concatenate(seen), WANT[:6])
    assert "while predicting batch 2 of the data" in raised.value.__notes__[0]


def test_predictions_that_cannot_be_joined():
    model = (lambda k, x: jnp.zeros(()), lambda w, x: {"y": x * w})
    with pytest.raises(jl.errors.ShapeError, match=r"\['y'\] float32\[3\].*float32\[2\]"):
        jl.predictor(model).run([X, X[:, :2]], 1.0)
    assert len(list(jl.predictor(model).stream([X, X[:, :2]], 1.0))) == 2


def test_predictions_without_rows():
    scalar = (lambda k, x: jnp.zeros(()), lambda w, x: {"y": x * w, "mean": x.mean()})
    with pytest.raises(jl.errors.ShapeError, match=r"\['mean'\] must have one row for each of the"):
        jl.predictor(scalar).run([X], 1.0)
    flat = jl.predictor((lambda k, x: jnp.zeros(()), lambda w, x: (x * w).reshape(-1)))
    with pytest.raises(jl.errors.ShapeError, match=r"23 examples of batch 0, got shape \(69,\)"):
        flat.run([X], 1.0)
    with pytest.raises(jl.errors.ShapeError, match=r"5 examples of batch 4, got shape \(15,\)"):
        list(flat.stream(jl.batches((X, Y), 5, pad=True), 1.0))
    # Without padding, a stream takes any shape.
    assert [y.shape for y in flat.stream([X, X], 1.0)] == [(69,)] * 2
    assert [y["mean"].shape for y in jl.predictor(scalar).stream([X, X], 1.0)] == [()] * 2


def test_examples_that_are_no_batches():
    with pytest.raises(jl.errors.ShapeError, match=r"3 examples of batch 0, got shape \(2,\)"):
        jl.predictor(PAIR).run(list(X), W)


def test_inputs_of_several_sizes_may_give_predictions_of_another():
    graph = (lambda key, g: jnp.zeros(()), lambda w, g: w * g["nodes"][:2])
    batch = ({"nodes": X, "edges": X[:5]}, Y[:2])
    assert jl.predictor(graph).run([batch, batch], 1.0).shape == (4, 3)


def test_the_arguments_are_checked():
    with pytest.raises(jl.errors.ModelError, match="got a int"):
        jl.predictor(3)
    with pytest.raises(jl.errors.ArgumentTypeError, match="inputs must be a name"):
        jl.predictor(PAIR, inputs=3)
    with pytest.raises(jl.errors.ArgumentTypeError, match="mask must be a name"):
        jl.predictor(PAIR, mask=3)
    with pytest.raises(jl.errors.ArgumentTypeError, match="progress must be a function"):
        jl.predictor(PAIR).run([X], W, progress="yes")


# --- progress ------------------------------------------------------------------------------------


def test_progress(capsys):
    seen = []
    predictor = jl.predictor(PAIR)
    predictor.run(jl.batches(X, 5), W, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 5), (2, 5), (3, 5), (4, 5), (5, 5)]
    seen.clear()
    predictor.run(iter([X, X]), W, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(1, None), (2, None)]
    assert not capsys.readouterr().out
    predictor.run(jl.batches(X, 5), W, progress=True)
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "predicted 5 of 5 batches" and all(line.isprintable() for line in lines)
    predictor.run([X] * 1000, W, progress=True)
    assert len(capsys.readouterr().out.splitlines()) == 11

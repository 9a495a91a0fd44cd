"""Supervised training against hand-written Optax loops, for every kind of model."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jaxloop as jl

RNG = np.random.default_rng(0)
X = RNG.normal(size=(50, 6)).astype(np.float32)
Y = RNG.integers(0, 3, 50).astype(np.int32)
DATA = jl.batches((X, Y), 16)
LOSS = optax.softmax_cross_entropy_with_integer_labels


class Plain(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3)(nn.relu(nn.Dense(16)(x)))


class Stateful(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = nn.BatchNorm(use_running_average=not train)(nn.Dense(16)(x))
        return nn.Dense(3)(nn.Dropout(0.5, deterministic=not train)(x))


class Module(nnx.Module):
    def __init__(self, rngs):
        self.a = nnx.Linear(6, 16, rngs=rngs)
        self.norm = nnx.BatchNorm(16, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)
        self.b = nnx.Linear(16, 3, rngs=rngs)

    def __call__(self, x):
        return self.b(self.drop(nnx.relu(self.norm(self.a(x)))))


def by_hand(apply, params, epochs=3):
    optimizer = optax.adam(1e-2)

    # What Optax adds up inside is its own affair.
    @jax.jit
    def step(params, state, x, y):
        grads = jax.grad(lambda p: LOSS(apply(p, x), y).mean())(params)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    state = optimizer.init(params)
    with jax.numpy_dtype_promotion("standard"):
        for _ in range(epochs):
            for x, y in DATA:
                params, state = step(params, state, x, y)
    return params


def close(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-6)


def trained(model, init_state=None, **kwargs):
    loop = jl.trainer(model, LOSS, optax.adam(1e-2), log=0)
    return loop.run(DATA, init_state, epochs=3, **kwargs)


def test_linen_is_the_hand_written_loop():
    model = Plain()
    variables = model.init(jax.random.key(3), X[:1])
    ours = trained(model, variables)
    close(ours, by_hand(model.apply, variables))


@pytest.mark.slow
def test_pair_and_model_are_the_hand_written_loop():
    def init(key, x):
        return jax.random.normal(key, (6, 3))

    start = init(jax.random.key(1), X)
    expected = by_hand(lambda w, x: x @ w, start)
    close(trained((init, lambda w, x: x @ w), start), expected)
    model = jl.Model(
        lambda key, x: (init(key, x), {"calls": jnp.int32(0)}),
        lambda w, s, x, *, train, key: (x @ w, {"calls": s["calls"] + int(train)}),
    )
    params, state = trained(model, (start, {"calls": 0}))
    close(params, expected)
    assert int(state["calls"]) == 3 * len(DATA)


def test_linen_state_and_dropout_are_handled():
    loop = jl.trainer(Stateful(), LOSS, optax.adam(1e-2), log=0)
    variables = loop.run(DATA, epochs=3)
    assert set(variables) == {"params", "batch_stats"}
    assert np.abs(variables["batch_stats"]["BatchNorm_0"]["mean"]).max() > 0
    close(variables, loop.run(DATA, epochs=3))


def test_nnx_module_is_not_changed_and_a_new_one_comes_back():
    module = Module(nnx.Rngs(0))
    before = jax.tree.map(np.asarray, nnx.state(module, nnx.Param))
    out = trained(module)
    close(before, nnx.state(module, nnx.Param))
    assert isinstance(out, Module) and out is not module
    assert np.abs(out.norm.mean[...]).max() > 0
    moved = [
        np.abs(np.asarray(a) - np.asarray(b)).max()
        for a, b in zip(
            jax.tree.leaves(before), jax.tree.leaves(nnx.state(out, nnx.Param)), strict=True
        )
    ]
    assert max(moved) > 0


@pytest.mark.slow
def test_equinox_and_haiku_train():
    equinox = pytest.importorskip("equinox")
    haiku = pytest.importorskip("haiku")
    out = trained(equinox.nn.MLP(6, 3, 8, 1, key=jax.random.key(0)))
    assert jax.vmap(out)(X).shape == (50, 3)
    params = trained(haiku.transform(lambda x: haiku.Linear(3)(x)))
    assert params["linear"]["w"].shape == (6, 3)


def test_a_container_of_models_has_several_outputs():
    model = {"a": Plain(), "b": Plain()}
    data = jl.batches((X, {"a": Y, "b": Y}), 16)
    loop = jl.trainer(model, [(LOSS, 1.0), (LOSS, 0.5)], "adam", log=0)
    out = loop.run(data)
    assert set(out) == {"a", "b"} and set(out["a"]) == {"params"}


@pytest.fixture(scope="module")
def plain():
    """The plain model, its variables and predictions, and loops that share what they compile."""
    model = Plain()
    variables = model.init(jax.random.key(3), X[:1])
    evaluator = jl.evaluator(model).metric("accuracy")
    trainer = jl.trainer(model, LOSS, optax.sgd(0.0), log=0).metric("accuracy")
    return variables, np.asarray(model.apply(variables, X)), evaluator, trainer


@pytest.mark.parametrize("size", [7, pytest.param(16, marks=pytest.mark.slow), 50])
@pytest.mark.parametrize("pad", [False, True])
def test_every_number_is_the_data_sets(size, pad, plain):
    variables, logits, evaluator, trainer = plain
    data = jl.batches((X, Y), size, pad=pad)
    out = evaluator.run(data, variables)
    assert float(out["accuracy"]) == pytest.approx(float((logits.argmax(-1) == Y).mean()), abs=1e-7)
    state = trainer.validate(data).run(data, variables, output_transform=lambda s: s)
    expected = float(LOSS(logits, Y).mean())
    for name in ("loss", "validation_loss"):
        assert float(state.history[0][name]) == pytest.approx(expected, rel=1e-6)
    assert state.history[0]["accuracy"] == state.history[0]["validation_accuracy"]


def test_validation_leaves_the_epochs_accumulators_alone():
    loop = jl.trainer(Plain(), LOSS, "adam", log=0).metric("accuracy")
    alone = loop.run(DATA, epochs=2, output_transform=lambda s: s)
    watched = loop.validate(DATA, event="iteration_completed", filter=jl.every(2)).run(
        DATA, epochs=2, output_transform=lambda s: s
    )
    for epoch in alone.history:
        for name, value in alone.history[epoch].items():
            assert watched.history[epoch][name] == value
    for a, b in zip(
        jax.tree.leaves(alone.step_state["model_state"]),
        jax.tree.leaves(watched.step_state["model_state"]),
        strict=True,
    ):
        assert (a == b).all()


def test_dynamic_loss_scale_steps_over_what_is_not_finite():
    w = (lambda key, x: jnp.ones((1, 1)), lambda w, x: x @ w)
    good, bad = np.ones((2, 1), np.float32), np.full((2, 1), np.inf, np.float32)
    loop = jl.trainer(w, "mean_squared_error", "sgd", log=0, loss_scale="dynamic")
    state = loop.run([(bad, good)], output_transform=lambda s: s)
    assert float(state.step_state["model_state"][0, 0]) == 1
    assert float(state.step_state["loss_scale_state"]["scale"]) == 2.0**14
    state = loop.run([(good, 2 * good)], output_transform=lambda s: s)
    assert float(state.step_state["model_state"][0, 0]) > 1
    assert float(state.step_state["loss_scale_state"]["scale"]) == 2.0**15


def test_a_large_loss_scale_does_not_stop_float16_parameters():
    # Every period, the scale doubles: after 2,000 steps it is 2**16, which float16 cannot hold.
    w = (lambda key, x: jnp.ones((1, 1), jnp.float16), lambda w, x: x @ w)
    x = np.full((2, 1), 0.25, np.float16)
    loss = lambda y, y_pred: y_pred[:, 0] - y[:, 0]  # noqa: E731  its gradient is 1/4
    loop = jl.trainer(w, loss, optax.sgd(2.0**-8), log=0, loss_scale="dynamic")
    state = loop.run([(x, x)] * 100, epochs=21, output_transform=lambda s: s)
    assert float(state.step_state["loss_scale_state"]["scale"]) == 2.0**16
    assert state.step_state["model_state"].tolist() == [[1 - 2100 * 2.0**-10]]


class Noisy(nn.Module):
    """A module with all that a skipped step must leave alone: statistics and a dropout key."""

    @nn.compact
    def __call__(self, x, train):
        x = nn.BatchNorm(use_running_average=not train)(nn.Dense(4)(x))
        return nn.Dense(1)(nn.Dropout(0.5, deterministic=not train)(x))


def one_minus_root(y, y_pred):
    # The loss of y = NaN is NaN, although no gradient depends on y.
    return y[:, 0] + (y_pred[:, 0] - 1) ** 2


SKIPS = [
    (scale, bad, guard)
    for scale in ("static", "dynamic", "own")
    for bad in ("loss", "gradient", "weighted")
    for guard in (False, True)
]
QUICK_SKIPS = [("dynamic", "gradient", True)]


@pytest.mark.parametrize(
    ("scale", "bad", "guard"),
    [pytest.param(*s, marks=[] if s in QUICK_SKIPS else [pytest.mark.slow]) for s in SKIPS],
)
def test_a_skipped_step_is_as_if_its_batch_were_not_there(scale, bad, guard):
    own = (lambda: {"seen": jnp.int32(0)}, lambda loss, s: loss, lambda g, s: (g, s))
    loop = jl.trainer(
        Noisy(),
        one_minus_root,
        optax.adam(0.1),
        log=0,
        loss_scale=own if scale == "own" else scale,
    ).metric(lambda y, y_pred: y_pred[:, 0], "prediction")
    if guard:
        loop = loop.nan_guard("skip")
    x, y = X[:24].reshape(3, 8, 6), np.zeros((3, 8, 1), np.float32)
    weight = np.linspace(0, 1, 8, dtype=np.float32)
    batches = [(x[i], y[i], weight) if bad == "weighted" else (x[i], y[i]) for i in range(3)]
    spoilt_x, spoilt_y = x[1].copy(), y[1].copy()
    if bad == "gradient":
        spoilt_x[3] = np.inf
    else:
        spoilt_y[3] = np.nan
    spoilt = (spoilt_x, spoilt_y, *batches[1][2:])
    got, expected = (
        loop.run(data, epochs=2, output_transform=lambda s: s)
        for data in ([batches[0], spoilt, batches[2]], [batches[0], batches[2]])
    )
    for key in ("model_state", "optimizer_state", "key"):
        a, b = (jax.tree.leaves(state.step_state[key]) for state in (got, expected))
        assert all((x == y).all() for x, y in zip(a, b, strict=True)), key
    for epoch in (0, 1):
        for name in ("loss", "prediction"):
            assert got.history[epoch][name] == expected.history[epoch][name], name
        if guard:
            assert got.history[epoch]["skipped_steps"] == 1
    if scale == "dynamic":
        # Only gradients that are not finite make the scale smaller.
        shrunk = 2.0**-2 if bad == "gradient" else 1.0
        assert float(got.step_state["loss_scale_state"]["scale"]) == 2.0**15 * shrunk


def test_the_trainers_log(capsys):
    jl.trainer(Plain(), LOSS, "adam", log=2).run(DATA, epochs=1)
    *lines, ending, titles, _ = capsys.readouterr().out.splitlines()[:6]
    assert len(lines) == 3 and all("loss" in line and "epoch 0" in line for line in lines)
    assert ending.startswith("completed: 1 epoch, ") and titles.split()[:2] == ["time", "share"]


@pytest.mark.parametrize("name", sorted(jl.optimizers.DEFAULT_LEARNING_RATES))
def test_every_optimizer_by_name_trains(name):
    loop = jl.trainer((lambda k, x: jnp.ones((6, 1)), lambda w, x: x @ w), "huber", name, log=0)
    w = loop.run([(X, X[:, :1])])
    assert np.isfinite(w).all() and (w != 1).any()


def test_bare_steps():
    init_fn, step_fn = jl.train_step(Plain(), LOSS, "adam")
    state = init_fn((X, Y), None)
    names = "key learning_rate_scale loss_scale_state model_state num_steps optimizer_state"
    assert sorted(state) == names.split()
    out = jax.jit(step_fn)((X, Y), state)
    assert out.outputs["y_pred"].shape == (50, 3) and out.outputs["loss"].shape == ()
    init_fn, step_fn = jl.eval_step(Plain())
    assert step_fn((X, Y), init_fn((X, Y), state["model_state"])).outputs["y_pred"].shape == (50, 3)


@pytest.mark.parametrize(
    "options",
    [
        {"report": ["gradient_norm", "update_norm", "parameter_norm"]},
        {"accumulate_gradients": 2},
        {"ema_decay": 0.9},
    ],
    ids=["report", "accumulate_gradients", "ema_decay"],
)
def test_parameters_in_half_precision_under_strict_promotion(options):
    model = nn.Dense(2, param_dtype=jnp.bfloat16, dtype=jnp.bfloat16)
    data = [(np.ones((8, 4), np.float32), np.zeros((8, 2), np.float32))]
    state = jl.trainer(model, "mean_squared_error", "sgd", log=0, **options).final_state(data)
    assert np.isfinite(state.history[0]["loss"])
    assert state.step_state["model_state"]["params"]["kernel"].dtype == jnp.bfloat16

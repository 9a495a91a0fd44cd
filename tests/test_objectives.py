"""Objectives: losses with their model in hand, for every kind of model, and their errors."""

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jaxloop as jl
from jaxloop.errors import (
    ArgumentError,
    ArgumentTypeError,
    DataError,
    ModelError,
    ShapeError,
    UnknownNameError,
)

RNG = np.random.default_rng(0)
X = RNG.normal(size=(16, 6)).astype(np.float32)
Y = RNG.integers(0, 3, 16).astype(np.int32)
DATA = jl.batches((X, Y), 8)
SLOW = pytest.mark.slow
XENT = optax.softmax_cross_entropy_with_integer_labels


class Linen(nn.Module):
    width: int = 8

    def setup(self):
        self.norm = nn.BatchNorm()
        self.drop = nn.Dropout(0.5)
        self.hidden = nn.Dense(self.width)
        self.head = nn.Dense(3)

    def encode(self, x, train):
        x = self.norm(self.hidden(x), use_running_average=not train)
        self.sow("intermediates", "encoded", x)
        return self.drop(x, deterministic=not train)

    def __call__(self, x, train):
        return self.head(self.encode(x, train))


class Module(nnx.Module):
    def __init__(self, rngs):
        self.a = nnx.Linear(6, 8, rngs=rngs)
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)
        self.b = nnx.Linear(8, 3, rngs=rngs)

    def __call__(self, x):
        return self.b(self.drop(self.norm(self.a(x))))


class Equinox(eqx.Module):
    a: eqx.nn.Linear
    drop: eqx.nn.Dropout

    def __init__(self, key):
        self.a = eqx.nn.Linear(6, 3, key=key)
        self.drop = eqx.nn.Dropout(0.5)

    def __call__(self, x, key=None):
        return self.a(self.drop(x, key=key))


def haiku():
    def forward(x, is_training):
        x = hk.Linear(8)(x)
        x = (
            x * jax.random.bernoulli(hk.next_rng_key(), 0.5, x.shape).astype(x.dtype)
            if is_training
            else x
        )
        return hk.Linear(3)(x)

    return hk.transform_with_state(forward)


PAIR = (lambda key, x: jnp.zeros((6, 3)), lambda w, x: x @ w)
MODELS = {
    "linen": Linen,
    "nnx": lambda: Module(nnx.Rngs(0)),
    "equinox": lambda: Equinox(jax.random.key(0)),
    "haiku": haiku,
    "pair": lambda: PAIR,
    "model": lambda: jl.Model(
        lambda key, x: (jax.random.normal(key, (6, 3)), {"calls": jnp.int32(0)}),
        lambda w, s, x, *, train, key: (x @ w, {"calls": s["calls"] + int(train)}),
    ),
}


def close(a, b, rtol=1e-6):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        if not jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
            np.testing.assert_allclose(x, y, rtol=rtol, atol=1e-6)


def final(loop, data=DATA, epochs=2, **kwargs):
    return loop.run(data, epochs=epochs, output_transform=lambda state: state, **kwargs)


def trainer(model, loss, **kwargs):
    return jl.trainer(model, loss, optax.adam(0.01), log=0, **kwargs)


@jl.objective
def classify(model, batch):
    x, y = batch
    logits = jax.vmap(model)(x) if isinstance(model, eqx.Module) else model(x)
    return XENT(logits, y), {"y_true": y, "y_pred": logits}


@pytest.mark.parametrize(
    "kind",
    ["linen", *(pytest.param(name, marks=SLOW) for name in ("nnx", "haiku", "pair", "model"))],
)
def test_an_objective_is_the_plain_loss(kind):
    model = MODELS[kind]()
    plain = trainer(model, XENT).metric("accuracy").validate(DATA)
    mine = trainer(model, classify).metric("accuracy").validate(DATA)
    a, b = final(plain), final(mine)
    close(a.step_state, b.step_state)
    assert a.history[1].keys() == b.history[1].keys() >= {"validation_loss", "validation_accuracy"}
    close(dict(a.history[1]), dict(b.history[1]))


def test_an_equinox_module_is_itself():
    @jl.objective(key=True, train=True)
    def loss(model, batch, *, key, train):
        assert isinstance(model, Equinox) and model.drop.inference is not train
        keys = jax.random.split(key, len(batch[0]))
        return XENT(jax.vmap(lambda x, k: model(x, key=k))(batch[0], keys), batch[1])

    state = final(trainer(MODELS["equinox"](), loss).validate(DATA), epochs=9)
    assert state.history[8]["validation_loss"] < state.history[0]["validation_loss"]


@pytest.mark.slow
def test_a_linen_module_has_its_methods_its_parameters_and_what_it_sows():
    @jl.objective(train=True)
    def loss(model, batch, *, train):
        x, y = batch
        encoded = model.encode(x)
        logits = model.head(encoded)
        (sown,) = model.sown("intermediates")["encoded"]
        assert model.width == 8 and sown.shape == (len(x), 8)
        penalty = 0.01 * sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(model.params))
        evaluated = model(x, train=False)  # a flag that is passed wins
        return XENT(logits, y) + penalty, {
            "penalty": penalty,
            "spread": jnp.std(sown, axis=-1),
            "same": jnp.all(evaluated == logits, axis=-1) == (not train),
        }

    loop = trainer(Linen(), loss).metric("same")
    state = final(loop.validate(DATA))
    assert set(state.step_state["model_state"]) == {"params", "batch_stats"}
    assert state.history[1]["validation_same"] == 1.0
    (moved,) = {
        float(x) for x in [state.step_state["model_state"]["batch_stats"]["norm"]["mean"][0]]
    }
    assert moved != 0


def test_two_calls_in_one_step_draw_twice_and_change_the_statistics_twice():
    class Noise(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            count = self.variable("counts", "calls", lambda: jnp.int32(0))
            if train:
                count.value += 1
            w = self.param("w", nn.initializers.ones, ())
            noise = jax.random.normal(self.make_rng("noise"), x.shape[:1]) if train else 0.0
            other = jax.random.normal(self.make_rng("other"), x.shape[:1]) if train else 0.0
            return w * x[:, 0] + noise, noise - other

    @jl.objective
    def loss(model, batch):
        (a, gap), (b, _) = model(batch[0]), model(batch[0])
        return (a - b) ** 2, {"gap": jnp.abs(gap) + jnp.zeros(len(a))}

    loop = trainer(Noise(), loss).metric("gap", accumulate="running_min")
    state = final(loop, epochs=1)
    assert int(state.step_state["model_state"]["counts"]["calls"]) == 2 * state.step
    assert state.history[0]["loss"] > 0.5 and state.history[0]["gap"] > 0
    losses = {float(s) for s in _losses(loop)}
    assert len(losses) == len(_losses(loop))  # new noise at each step


def _losses(loop):
    seen = []
    keep = loop.handle("iteration_completed", lambda s: seen.append(float(s.outputs["loss"])))
    final(keep, epochs=1)
    return seen


def test_gradients_of_the_model_inside_an_objective():
    # A penalty on the gradient of a scalar field, as in a physics-informed network.
    class Field(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(1)(jnp.tanh(nn.Dense(8)(x)))[..., 0]

    @jl.objective
    def loss(model, x):
        slope = jax.vmap(jax.grad(model))(x)
        return jnp.sum((slope - 1) ** 2, axis=-1)

    state = final(trainer(Field(), loss), jl.batches(X, 8), epochs=30)
    assert state.history[29]["loss"] < 0.5 * state.history[0]["loss"]


@pytest.mark.slow
def test_a_container_arrives_as_that_container():
    @jl.objective
    def loss(models, batch):
        a, b = models["a"](batch[0]), models["b"](batch[0])
        return XENT(a + b, batch[1])

    for models in ({"a": PAIR, "b": MODELS["nnx"]()},):
        state = final(trainer(models, loss).validate(DATA), epochs=5)
        assert set(state.step_state["model_state"]) == {"a", "b"}
        assert state.history[4]["validation_loss"] < state.history[0]["validation_loss"]


class VAE(nn.Module):
    def setup(self):
        self.encoder, self.decoder = nn.Dense(4), nn.Dense(6)

    def encode(self, x):
        return jnp.split(self.encoder(x), 2, axis=-1)

    def decode(self, z):
        return self.decoder(z)


@jl.objective(key=True)
def vae_loss(model, batch, *, key):
    mean, log_variance = model.encode(batch["image"])
    noise = jax.random.normal(key, mean.shape)
    decoded = model.decode(mean + jnp.exp(0.5 * log_variance) * noise)
    kl = 0.5 * jnp.sum(jnp.exp(log_variance) + mean**2 - 1 - log_variance, axis=-1)
    return jnp.sum((decoded - batch["image"]) ** 2, axis=-1) + kl, {"kl": kl}


def test_a_module_without_call_is_initialized_by_the_objective_and_its_noise_is_repeatable():
    data = jl.batches({"image": X}, 8)
    loop = trainer(VAE(), vae_loss).metric("kl").validate(data)
    a, b = final(loop, data), final(loop, data)
    assert dict(a.history[1]) == dict(b.history[1])
    values = jl.evaluator(VAE(), vae_loss).run(data, a.step_state["model_state"])
    assert values == {
        "loss": a.history[1]["validation_loss"],
        "kl": a.history[1]["validation_kl"],
    }
    assert a.history[1]["validation_kl"] > 0


def test_elements_are_weighted_exactly_whatever_the_batch_size():
    lengths = RNG.integers(0, 5, 16)
    mask = np.arange(4)[None] < lengths[:, None]
    sequences = RNG.normal(size=(16, 4)).astype(np.float32)
    sequences[~mask] = np.nan  # never read

    @jl.objective
    def own(w, batch):
        error = jnp.where(batch["mask"], (w(1.0) - batch["x"]) ** 2, 0)
        return error, {"sample_weight": batch["mask"], "error": error}

    named = jl.objective(lambda w, batch: (w(1.0) - batch["x"]) ** 2)
    model = (lambda key, x: jnp.float32(0.5), lambda w, x: w * x)
    values = {}
    for size in (16, 7):
        data = jl.batches({"x": sequences, "mask": mask}, size)
        for name, loss, kwargs in (("own", own, {}), ("named", named, {"weights": "mask"})):
            loop = jl.evaluator(model, loss, **kwargs)
            values[name, size] = loop.run(data, jnp.float32(0.5))["loss"]
    expected = np.mean((0.5 - sequences[mask]) ** 2)
    np.testing.assert_allclose(list(values.values()), expected, rtol=1e-6)
    trained = trainer(model, named, weights="mask")
    w = trained.run(jl.batches({"x": sequences, "mask": mask}, 7), epochs=2)
    assert np.isfinite(w) and w != 0.5


def test_a_scalar_counts_for_its_examples_and_a_loss_may_have_another_length():
    @jl.objective
    def scalar(model, batch):
        return jnp.mean(model(batch["x"])[:, 0]), {}

    @jl.objective
    def graphs(model, batch):  # four nodes a graph
        return jnp.mean(model(batch["nodes"])[:, 0].reshape(-1, 4), axis=-1)

    model = (lambda key, x: jnp.ones((6, 1)), lambda w, x: x @ w)
    w = jnp.ones((6, 1))
    found = jl.evaluator(model, scalar).run(jl.batches({"x": X}, 8), w)["loss"]
    np.testing.assert_allclose(found, X.sum(-1).mean(), rtol=1e-5)
    data = [
        {"nodes": X[:12], "labels": np.zeros(3)},
        {"nodes": X[12:], "labels": np.zeros(1)},
    ]
    found = jl.evaluator(model, graphs).run(data, w)["loss"]
    np.testing.assert_allclose(found, X.sum(-1).mean(), rtol=1e-5)


# --- errors --------------------------------------------------------------------------------------


def returning(value):
    return jl.objective(lambda model, batch: value(XENT(model(batch[0]), batch[1])))


WRONG = {
    "a broadcast": (returning(lambda v: v[:, None] - v), ShapeError, "one value per example"),
    "a column": (returning(lambda v: v[:, None]), ShapeError, r"got shape \(8, 1\)"),
    "another length": (returning(lambda v: v[:3]), ShapeError, r"got shape \(3,\)"),
    "nothing": (returning(lambda v: None), ArgumentTypeError, "got a NoneType as the loss"),
    "integers": (returning(lambda v: jnp.int32(1)), ArgumentTypeError, "dtype int32"),
    "a triple": (returning(lambda v: (v, {}, {})), ArgumentTypeError, "a tuple of"),
    "an array": (returning(lambda v: (v, v)), ArgumentTypeError, "dict of values"),
    "a wrong name": (returning(lambda v: (v, {1: v})), ArgumentTypeError, "name 1"),
    "loss": (returning(lambda v: (v, {"loss": v})), ArgumentError, "another name"),
    "weights of another shape": (
        returning(lambda v: (v, {"sample_weight": jnp.ones((8, 2))})),
        ShapeError,
        r"of their shape \(8, 2\)",
    ),
    "a scalar with weights": (
        returning(lambda v: (jnp.mean(v), {"sample_weight": jnp.ones(8)})),
        ShapeError,
        "one value per element",
    ),
    "no call": (jl.objective(lambda model, batch: jnp.zeros(8)), ModelError, "must call its model"),
}


@pytest.mark.parametrize("name", WRONG)
def test_an_objective_that_returns_the_wrong_thing(name):
    loss, error, sentence = WRONG[name]
    events = []
    with pytest.raises(error, match=sentence):
        trainer(PAIR, loss).observe("all", lambda s: events.append(s.event)).run(DATA)
    assert not events


def test_an_objective_is_the_whole_loss():
    for make in (
        lambda: trainer(PAIR, [(classify, 1.0)]),
        lambda: trainer(PAIR, classify).metric(classify, "again"),
    ):
        with pytest.raises(ArgumentTypeError, match="inside another objective"):
            make()
    with pytest.raises(TypeError) as caught:
        trainer(PAIR, lambda model, batch: model(batch[0])).run(DATA)
    assert any("@jl.objective" in note for note in caught.value.__notes__)


def test_padding_must_be_known_to_an_objective():
    padded = jl.batches({"x": X, "y": Y}, 8, pad=True)

    @jl.objective
    def loss(model, batch):
        return XENT(model(batch["x"]), batch["y"])

    with pytest.raises(DataError, match="padded.*weights='mask'|must know which"):
        trainer(PAIR, loss).run(padded)
    with pytest.raises(DataError, match="validation.*must know which"):
        trainer(PAIR, loss).validate(padded).run(jl.batches({"x": X, "y": Y}, 8))
    with pytest.raises(DataError, match="must know which"):
        jl.evaluator(PAIR, loss).run(padded, jnp.zeros((6, 3)))
    weighted = trainer(PAIR, loss, weights="mask").validate(padded)
    plain = trainer(PAIR, loss).validate(jl.batches({"x": X, "y": Y}, 8))
    a = final(weighted, padded)
    b = final(plain, jl.batches({"x": X, "y": Y}, 8))
    np.testing.assert_allclose(a.history[1]["loss"], b.history[1]["loss"], rtol=1e-6)

    @jl.objective
    def own(model, batch):
        return loss(model, batch), {"sample_weight": batch["mask"]}

    c = final(trainer(PAIR, own), padded)
    np.testing.assert_allclose(a.history[1]["loss"], c.history[1]["loss"], rtol=1e-6)
    with pytest.raises(ArgumentError, match="got both"):
        trainer(PAIR, own, weights="mask").run(padded)


def test_without_any_weight_nothing_moves_and_the_loss_has_no_value():
    nothing = [(X[:8], Y[:8], np.zeros(8, np.float32))]
    weights = {"weights": lambda batch: batch[2]}
    own = jl.objective(lambda model, batch: classify(model, batch[:2]))
    for loss, kwargs in ((XENT, {}), (own, weights)):
        state = final(trainer(PAIR, loss, **kwargs).validate(nothing), nothing)
        assert np.isnan(state.history[1]["loss"]) and np.isnan(state.history[1]["validation_loss"])
        np.testing.assert_array_equal(state.step_state["model_state"], np.zeros((6, 3)))


def test_a_triple_is_a_batch_like_any_other():
    @jl.objective
    def loss(model, batch):
        x, y, other = batch
        return XENT(model(x), y) + 0 * other[:, 0]

    data = [(X[:8], Y[:8], np.ones((8, 2), np.float32))]
    assert np.isfinite(final(trainer(PAIR, loss), data).history[0]["loss"])
    weights = lambda batch: batch[2][:, 0] > 0  # noqa: E731
    assert "sample_weight" in final(trainer(PAIR, loss, weights=weights), data).outputs


# --- the parts of a batch ------------------------------------------------------------------------


def test_parts_by_name_are_the_pair():
    data = jl.batches({"image": X, "label": Y}, 8, pad=True)
    names = {"inputs": "image", "targets": "label", "weights": "mask"}
    functions = {name: (lambda batch, part=part: batch[part]) for name, part in names.items()}
    expected = trainer(PAIR, XENT).run(jl.batches((X, Y), 8, pad=True), epochs=2)
    for given in (names, functions, {**names, "inputs": ("image",)}):
        close(trainer(PAIR, XENT, **given).run(data, epochs=2), expected)
        values = jl.evaluator(PAIR, XENT, **given).metric("accuracy").run(data, expected)
        assert set(values) == {"loss", "accuracy"}


@pytest.mark.slow
def test_several_inputs_by_position_and_by_name():
    class Two(nn.Module):
        @nn.compact
        def __call__(self, x, scale, *, train):
            return nn.Dense(3)(x) * scale[:, None]

    class TwoNnx(nnx.Module):
        def __init__(self, rngs):
            self.a = nnx.Linear(6, 3, rngs=rngs)

        def __call__(self, x, scale):
            return self.a(x) * scale[:, None]

    data = jl.batches({"x": X, "s": X[:, 0], "y": Y}, 8)
    for model in (Two(), TwoNnx(nnx.Rngs(0))):
        position = trainer(model, XENT, inputs=("x", "s"), targets="y").validate(data)
        name = trainer(model, XENT, inputs={"scale": "s", "x": "x"}, targets="y").validate(data)
        a, b = final(position, data), final(name, data)
        close(a.step_state, b.step_state)
        assert np.isfinite(a.history[1]["validation_loss"])


def test_a_missing_part_has_its_nearest_name():
    data = jl.batches({"image": X, "label": Y}, 8)
    with pytest.raises(UnknownNameError, match="did you mean 'label'"):
        trainer(PAIR, XENT, inputs="image", targets="labels").run(data)
    with pytest.raises(DataError, match="inputs=, targets= and weights="):
        trainer(PAIR, XENT).run(data)
    with pytest.raises(DataError, match="a batch without names"):
        trainer(PAIR, XENT, inputs="image", targets="label").run(DATA)
    with pytest.raises(ArgumentTypeError, match="targets must be a name"):
        trainer(PAIR, XENT, targets=3)
    with pytest.raises(ArgumentError, match="inputs must name"):
        trainer(PAIR, XENT, inputs=())
    with pytest.raises(ArgumentError, match="targets= must be left out"):
        trainer(PAIR, classify, targets="label")


@pytest.mark.slow
def test_weights_of_tokens_in_a_plain_loss():
    tokens = RNG.integers(0, 3, (16, 5))
    mask = RNG.random((16, 5)) < 0.6
    mask[3] = False
    inputs = RNG.normal(size=(16, 5, 6)).astype(np.float32)
    inputs[3] = np.nan
    for size in (16, 6):
        data = jl.batches((inputs, tokens, mask), size)
        loop = trainer(PAIR, XENT).metric("accuracy")
        state = final(loop, data, epochs=1)
        assert np.isfinite(np.asarray(state.step_state["model_state"])).all()
    values = jl.evaluator(PAIR, XENT).metric("accuracy").run(data, jnp.ones((6, 3)))
    logits = (inputs @ np.ones((6, 3), np.float32))[mask]
    np.testing.assert_allclose(values["loss"], XENT(logits, tokens[mask]).mean(), rtol=1e-6)
    expected = np.mean(logits.argmax(-1) == tokens[mask])
    np.testing.assert_allclose(values["accuracy"], expected, rtol=1e-6)


# --- reports, averages and micro-batches ---------------------------------------------------------


def test_reports_are_what_the_step_used():
    optimizer = optax.chain(
        optax.clip_by_global_norm(1e-3),
        optax.inject_hyperparams(optax.sgd)(learning_rate=optax.linear_schedule(0.4, 0.0, 4)),
    )
    names = ("gradient_norm", "update_norm", "parameter_norm", "learning_rate", "gradients")
    seen = []

    def keep(state):
        seen.append(state.outputs)

    for scale in ("identity", "static"):
        loop = jl.trainer(PAIR, XENT, optimizer, log=0, report=names, loss_scale=scale)
        state = final(loop.handle("iteration_completed", keep), [(X, Y)], epochs=3)
        by_hand = jax.grad(lambda w: XENT(X @ w, Y).mean())(jnp.zeros((6, 3)))
        first = seen[0]
        np.testing.assert_allclose(first["gradient_norm"], optax.tree.norm(by_hand), rtol=1e-5)
        np.testing.assert_allclose(first["gradients"], by_hand, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(first["update_norm"], 0.4e-3, rtol=1e-5)
        np.testing.assert_allclose(first["parameter_norm"], 0.4e-3, rtol=1e-5)
        rates = [float(one["learning_rate"]) for one in seen]
        np.testing.assert_allclose(rates, [0.4, 0.3, 0.2], rtol=1e-5)
        assert "updates" not in first
        seen.clear()
    assert state.step_state["learning_rate_scale"] == 1
    with pytest.raises(ArgumentError, match="report= names too"):
        loss = jl.objective(lambda m, b: (XENT(m(b[0]), b[1]), {"updates": jnp.zeros(())}))
        trainer(PAIR, loss, report=["updates"]).run(DATA)
    with pytest.raises(ArgumentError, match="inject_hyperparams"):
        trainer(PAIR, XENT, report=["learning_rate"]).run(DATA)
    with pytest.raises(UnknownNameError, match="gradient_norm"):
        trainer(PAIR, XENT, report=["gradients_norm"])
    with pytest.raises(ArgumentTypeError, match="tuple of names"):
        trainer(PAIR, XENT, report="gradients")


def test_averaged_parameters_are_validated_and_returned():
    decay, average = 0.7, np.zeros((6, 3), np.float32)
    params = []
    loop = trainer(PAIR, XENT, ema_decay=decay).validate(DATA)
    keep = loop.handle(
        "iteration_completed", lambda s: params.append(np.asarray(s.step_state["model_state"]))
    )
    state = final(keep, epochs=2)
    for one in params:
        average = decay * average + (1 - decay) * one
    returned = loop.run(DATA, epochs=2)
    np.testing.assert_allclose(returned, average, rtol=1e-5, atol=1e-6)
    expected = XENT(X @ average, Y).mean()
    np.testing.assert_allclose(state.history[1]["validation_loss"], expected, rtol=1e-5)
    for wrong in (1.0, -0.1, "a"):
        with pytest.raises((ArgumentError, ArgumentTypeError), match="ema_decay"):
            trainer(PAIR, XENT, ema_decay=wrong)
    with pytest.raises(ArgumentTypeError, match="eval_params must return"):
        trainer(PAIR, XENT, eval_params=lambda s: {"w": s["model_state"]}).run(DATA)


@pytest.mark.parametrize("number", [3, pytest.param(2, marks=SLOW), pytest.param(16, marks=SLOW)])
def test_micro_batches_are_the_large_batch(number):
    weight = RNG.random(16).astype(np.float32) * (RNG.random(16) < 0.7)
    data = jl.batches((X, Y, weight), 11)
    whole, split = (
        final(
            trainer(PAIR, XENT, report=["gradient_norm"], accumulate_gradients=parts)
            .metric("accuracy")
            .metric("gradient_norm"),
            data,
        )
        for parts in (1, number)
    )
    close(whole.step_state["model_state"], split.step_state["model_state"], rtol=1e-4)
    close(dict(whole.history[1]), dict(split.history[1]), rtol=1e-5)
    assert split.outputs["y_pred"].shape == whole.outputs["y_pred"].shape == (5, 3)
    counts = final(trainer(MODELS["model"](), classify, accumulate_gradients=number), [(X, Y)])
    assert int(counts.step_state["model_state"][1]["calls"]) == 2 * number
    with pytest.raises(DataError, match="share their first axis"):
        loss = jl.objective(lambda model, batch: jnp.mean(model(batch["x"])))
        trainer(PAIR, loss, accumulate_gradients=2).run([{"x": X, "n": np.float32(1)}])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["haiku", "linen"])
def test_a_resumed_run_draws_the_same_random_numbers(kind, tmp_path):
    loop = trainer(MODELS[kind](), classify, ema_decay=0.9, accumulate_gradients=2)
    straight = final(loop, epochs=3)
    saving = loop.checkpoint(tmp_path)
    final(saving, epochs=2)
    resumed = final(saving.resume(tmp_path), epochs=3)
    for a, b in zip(
        jax.tree.leaves(straight.step_state), jax.tree.leaves(resumed.step_state), strict=True
    ):
        if jax.dtypes.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        np.testing.assert_array_equal(a, b)


def test_a_validation_leaves_out_what_only_the_training_reports():
    loop = trainer(PAIR, XENT, report=("gradient_norm", "gradients"))
    loop = loop.validate(DATA).metric("gradient_norm").derive("log", np.log, of="gradient_norm")
    loop = loop.metric(jnp.max, "largest", "running_max", ["gradients"], per="batch")
    state = final(loop.derive("perplexity", np.exp, of="loss").nan_guard("skip"))
    assert {name for name in state.history[1] if name.startswith("validation_")} == {
        "validation_loss",
        "validation_perplexity",
    }
    assert state.history[1]["gradient_norm"] > 0 and "log" in state.history[1]


@pytest.mark.parametrize("loss", ["softmax_cross_entropy_with_integer_labels", classify])
@pytest.mark.parametrize("compiled", [True, pytest.param(False, marks=SLOW)])
def test_debug_nans_finds_the_operation(loss, compiled):
    def shrink(updates, state, params=None):
        return jax.tree.map(lambda g: g * jnp.sqrt(jnp.sum(0 * g) - 1), updates), state

    bad = optax.GradientTransformation(lambda params: (), shrink)
    for optimizer in (optax.sgd(0.1), bad):
        loop = jl.trainer(PAIR, loss, optimizer, log=0)
        state = loop.final_state([(X, Y)], epochs=0)
        batch, step_state = jax.tree.map(jnp.asarray, (X, Y)), state.step_state
        with jax.debug_nans(True), jax.disable_jit(not compiled):
            if optimizer is bad:
                with pytest.raises(FloatingPointError, match="sqrt"):
                    jax.jit(loop.step_fn)(batch, step_state)
            else:
                jax.jit(loop.step_fn)(batch, step_state)


def test_the_loss_of_the_trainer_may_have_more_metrics_also_with_weights():
    weight = RNG.random(16).astype(np.float32)
    data = jl.batches((X, Y, weight), 8)
    loop = trainer(PAIR, XENT).metric("loss", "last", "last").metric("loss", "two", jl.window(2))
    state = final(loop.validate(data, metrics={"own": "loss"}), data, epochs=1)
    values = state.history[0]
    np.testing.assert_allclose(values["two"], values["loss"], rtol=1e-6)
    np.testing.assert_allclose(values["last"], state.outputs["loss"], rtol=1e-6)
    expected = np.average(XENT(X @ state.step_state["model_state"], Y), weights=weight)
    np.testing.assert_allclose(values["validation_own"], expected, rtol=1e-5)


def test_errors_name_what_is_missing():
    with pytest.raises(UnknownNameError) as caught:
        trainer(PAIR, XENT).metric("gradient_norm").run(DATA)
    assert "report=('gradient_norm',)" in str(caught.value)
    loss = jl.objective(lambda model, batch: XENT(model(batch["image"]), batch["lable"]))
    with pytest.raises(KeyError) as missing:
        trainer(PAIR, loss).run(jl.batches({"image": X, "label": Y}, 8))
    assert any("did you mean 'label'" in note for note in missing.value.__notes__)

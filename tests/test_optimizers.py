"""Every optimizer of Optax in the trainer, against a hand-written Optax loop.

The table below is sampled in the everyday suite. All of it: ``python -m pytest -m slow
tests/test_optimizers.py``.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax import contrib

import jaxloop as jl

RNG = np.random.default_rng(0)
X = RNG.normal(size=(40, 4)).astype(np.float32)
Y = np.tanh(X[:, :2] * 2 + X[:, 1:3]).astype(np.float32)
DATA = [(X[i : i + 8], Y[i : i + 8]) for i in range(0, 40, 8)]


def init(key, x):
    a, b = jax.random.split(jax.random.key(1))
    return {
        "a": {"w": 0.5 * jax.random.normal(a, (4, 16)), "b": jnp.zeros(16)},
        "b": {"w": 0.5 * jax.random.normal(b, (16, 2)), "b": jnp.zeros(2)},
    }


def apply(p, x):
    return jnp.tanh(x @ p["a"]["w"] + p["a"]["b"]) @ p["b"]["w"] + p["b"]["b"]


def loss(params, batch):
    x, y = batch
    return jnp.mean(jnp.mean((apply(params, x) - y) ** 2, axis=-1))


def by_layer(params):
    return jax.tree_util.tree_map_with_path(lambda path, _: path[0].key, params)


def only_weights(params):
    return jax.tree.map(lambda p: p.ndim > 1, params)


def plain_sam(**kwargs):
    rho = optax.chain(contrib.normalize(), optax.sgd(0.05))
    return contrib.sam(optax.sgd(0.05), rho, **kwargs)


# What the hand-written loop passes to `update`, besides gradients, state and parameters.
VALUE, SEARCH, SAM, SOPHIA = ("value",), ("value", "grad", "value_fn"), ("grad_fn",), ("obj_fn",)

CASES = {
    # The aliases of Optax.
    "adabelief": (lambda: optax.adabelief(1e-2), ()),
    "adadelta": (lambda: optax.adadelta(1.0), ()),
    "adafactor": (lambda: optax.adafactor(1e-2, min_dim_size_to_factor=4), ()),
    "adagrad": (lambda: optax.adagrad(1e-1), ()),
    "adam": (lambda: optax.adam(1e-2), ()),
    "adamax": (lambda: optax.adamax(1e-2), ()),
    "adamaxw": (lambda: optax.adamaxw(1e-2), ()),
    "adamw": (lambda: optax.adamw(1e-2, mask=only_weights), ()),
    "adan": (lambda: optax.adan(1e-2), ()),
    "amsgrad": (lambda: optax.amsgrad(1e-2), ()),
    "fromage": (lambda: optax.fromage(1e-2), ()),
    "lamb": (lambda: optax.lamb(1e-2), ()),
    "lars": (lambda: optax.lars(1e-1), ()),
    "lbfgs": (lambda: optax.lbfgs(), SEARCH),
    "lbfgs without a search": (lambda: optax.lbfgs(0.1, linesearch=None), ()),
    "lbfgs backtracking": (
        lambda: optax.lbfgs(linesearch=optax.scale_by_backtracking_linesearch(10)),
        SEARCH,
    ),
    "lion": (lambda: optax.lion(1e-3), ()),
    "nadam": (lambda: optax.nadam(1e-2), ()),
    "nadamw": (lambda: optax.nadamw(1e-2), ()),
    "noisy_sgd": (lambda: optax.noisy_sgd(1e-2, key=0), ()),
    "novograd": (lambda: optax.novograd(1e-2), ()),
    "optimistic_adam": (lambda: optax.optimistic_adam_v2(1e-2), ()),
    "optimistic_gradient_descent": (lambda: optax.optimistic_gradient_descent(1e-2), ()),
    "polyak_sgd": (lambda: optax.polyak_sgd(0.1), VALUE),
    "radam": (lambda: optax.radam(1e-2), ()),
    "rmsprop": (lambda: optax.rmsprop(1e-2, momentum=0.9), ()),
    "rprop": (lambda: optax.rprop(1e-2), ()),
    "sgd": (lambda: optax.sgd(1e-2, momentum=0.9, nesterov=True), ()),
    "sign_sgd": (lambda: optax.sign_sgd(1e-3), ()),
    "signum": (lambda: optax.signum(1e-3), ()),
    "sm3": (lambda: optax.sm3(1e-2), ()),
    "yogi": (lambda: optax.yogi(1e-2), ()),
    # optax.contrib.
    "acprop": (lambda: contrib.acprop(1e-2), ()),
    "ademamix": (lambda: contrib.ademamix(1e-2), ()),
    "adopt": (lambda: contrib.adopt(1e-2), ()),
    "cocob": (lambda: contrib.cocob(), ()),
    "dadapt_adamw": (lambda: contrib.dadapt_adamw(1.0), ()),
    "dog": (lambda: contrib.dog(1.0), ()),
    "dowg": (lambda: contrib.dowg(1.0), ()),
    "galore": (lambda: contrib.galore(1e-2, rank=2), ()),
    "madgrad": (lambda: contrib.madgrad(1e-2), ()),
    "mechanize": (lambda: contrib.mechanize(optax.sgd(1.0)), ()),
    "momo": (lambda: contrib.momo(0.1), VALUE),
    "momo_adam": (lambda: contrib.momo_adam(0.1), VALUE),
    "muon": (lambda: contrib.muon(1e-2), ()),
    "prodigy": (lambda: contrib.prodigy(1.0), ()),
    "reduce_on_plateau": (
        lambda: optax.chain(
            optax.adam(1e-2), contrib.reduce_on_plateau(patience=1, accumulation_size=2)
        ),
        VALUE,
    ),
    "sam": (lambda: plain_sam(), ()),
    "sam with three steps": (lambda: plain_sam(sync_period=3, reset_state=False), ()),
    "sam opaque": (lambda: plain_sam(opaque_mode=True), SAM),
    "sam opaque with three steps": (lambda: plain_sam(opaque_mode=True, sync_period=3), SAM),
    "sam in a chain": (lambda: optax.chain(optax.clip(0.5), plain_sam(opaque_mode=True)), SAM),
    "schedule_free": (lambda: contrib.schedule_free(optax.sgd(1e-1), 1e-1), ()),
    "schedule_free_adamw": (lambda: contrib.schedule_free_adamw(1e-2), ()),
    "schedule_free_sgd": (lambda: contrib.schedule_free_sgd(1e-1), ()),
    "simplified_ademamix": (lambda: contrib.simplified_ademamix(1e-3), ()),
    "sophia": (lambda: contrib.sophia(1e-2), SOPHIA),
    # Line searches.
    "backtracking": (
        lambda: optax.chain(optax.sgd(1.0), optax.scale_by_backtracking_linesearch(15)),
        SEARCH,
    ),
    "backtracking that keeps the gradient": (
        lambda: optax.chain(
            optax.sgd(1.0), optax.scale_by_backtracking_linesearch(15, store_grad=True)
        ),
        SEARCH,
    ),
    "zoom": (
        lambda: optax.chain(optax.sgd(1.0), optax.scale_by_zoom_linesearch(15)),
        SEARCH,
    ),
    # Wrappers.
    "apply_if_finite": (lambda: optax.apply_if_finite(optax.adam(1e-2), 3), ()),
    "apply_if_finite of momo": (lambda: optax.apply_if_finite(contrib.momo(0.1), 3), VALUE),
    "clipped": (lambda: optax.chain(optax.clip_by_global_norm(0.1), optax.adam(1e-2)), ()),
    "accumulated": (lambda: optax.MultiSteps(optax.adam(1e-2), 2), ()),
    "accumulated and skipped": (
        lambda: optax.MultiSteps(optax.adam(1e-2), 2, should_skip_update_fn=optax.skip_not_finite),
        (),
    ),
    "accumulated momo": (lambda: optax.MultiSteps(contrib.momo(0.1), 2), VALUE),
    "accumulated, as a transformation": (
        lambda: optax.MultiSteps(optax.adam(1e-2), 2).gradient_transformation(),
        (),
    ),
    "apply_every": (lambda: optax.chain(optax.apply_every(2), optax.sgd(1e-2)), ()),
    "injected": (lambda: optax.inject_hyperparams(optax.adam)(learning_rate=1e-2), ()),
    "injected schedule": (
        lambda: optax.inject_hyperparams(optax.sgd)(optax.linear_schedule(0.1, 0.0, 10)),
        (),
    ),
    "injected momo": (lambda: optax.inject_hyperparams(contrib.momo)(learning_rate=0.1), VALUE),
    "flattened": (lambda: optax.flatten(optax.adam(1e-2)), ()),
    "masked": (lambda: optax.masked(optax.adam(1e-2), only_weights), ()),
    "masked with its arguments": (
        lambda: optax.masked(optax.adam(1e-2), only_weights, mask_compatible_extra_args=True),
        (),
    ),
    "frozen": (lambda: optax.freeze({"a": True, "b": False}), ()),
    "partitioned": (
        lambda: optax.partition({"a": optax.adam(1e-2), "b": optax.set_to_zero()}, by_layer),
        (),
    ),
    "partitioned momo": (
        lambda: optax.partition({"a": contrib.momo(0.1), "b": optax.sgd(1e-2)}, by_layer),
        VALUE,
    ),
    "named_chain": (
        lambda: optax.named_chain(("clip", optax.clip(0.1)), ("sgd", optax.sgd(1e-1))),
        (),
    ),
    "weight decay by parameters": (
        lambda: optax.chain(optax.add_decayed_weights(1e-2), optax.sgd(1e-2)),
        (),
    ),
    "a schedule": (lambda: optax.sgd(optax.cosine_decay_schedule(0.1, 8)), ()),
}
SAMPLE = ["sam", "sam opaque", "backtracking"]


def by_hand(optimizer, extras, epochs=2):
    @jax.jit
    def step(params, state, batch):
        def value_fn(params):
            return loss(params, batch)

        value, grads = jax.value_and_grad(value_fn)(params)
        offered = {
            "value": value,
            "grad": grads,
            "value_fn": value_fn,
            "obj_fn": value_fn,
            "grad_fn": lambda p, i: jax.grad(value_fn)(p),
        }
        updates, state = optimizer.update(
            grads, state, params, **{name: offered[name] for name in extras}
        )
        return optax.apply_updates(params, updates), state

    with jax.numpy_dtype_promotion("standard"):
        params = init(None, None)
        state = optimizer.init(params)
        for _ in range(epochs):
            for batch in DATA:
                params, state = step(params, state, batch)
    return params, state


def by_trainer(optimizer, epochs=2):
    loop = jl.trainer((init, apply), "mean_squared_error", optimizer, log=0)
    return loop.run(DATA, epochs=epochs, output_transform=lambda state: state).step_state


def close(a, b, rtol=2e-5, atol=1e-6):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=rtol, atol=atol)


def check_case(name):
    make, extras = CASES[name]
    try:
        make()
    except AttributeError:
        pytest.skip("this version of Optax does not have it")
    ours = by_trainer(make())
    params, state = by_hand(make(), extras)
    moved = max(
        float(jnp.abs(a - b).max())
        for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(init(None, None)), strict=True)
    )
    assert moved > 1e-5
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params))
    close(ours["model_state"], params)
    found, expected = ours["optimizer_state"], state
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        if not jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-5)


@pytest.mark.parametrize("name", SAMPLE)
def test_an_optimizer_is_the_hand_written_loop(name):
    check_case(name)


# Those that are not one optimizer, or that are in the table under another name.
OTHER_NAMES = {
    "differentially_private_aggregate",
    "dpsgd",
    "hutchinson_estimator_diag_hessian",
    "normalize",
    "optimistic_adam_v2",
    "split_real_and_imaginary",
}


def test_the_table_has_every_optimizer():
    names = {
        name
        for module in (optax, contrib)
        for name, value in vars(module).items()
        if callable(value)
        and not isinstance(value, type)
        and (value.__module__.endswith("._src.alias") or module is contrib)
        and not name.startswith(("scale_by_", "schedule_free_eval", "_"))
    }
    assert names - OTHER_NAMES <= set(CASES)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in CASES if name not in SAMPLE])
def test_every_other_optimizer_is_the_hand_written_loop(name):
    check_case(name)


def needs_the_batch():
    def update(updates, state, params=None, *, batch):
        return updates, state

    return optax.GradientTransformationExtraArgs(lambda params: (), update)


def private():
    return contrib.differentially_private_aggregate(1.0, 1.0, key=jax.random.key(0))


def compares_the_value():
    def update(updates, state, params=None, *, value=None, **extra_args):
        if value is not None and value > 1:
            updates = jax.tree.map(jnp.zeros_like, updates)
        return updates, state

    return optax.GradientTransformationExtraArgs(lambda params: (), update)


# An optimizer that cannot work, and what the message says.
IMPOSSIBLE = {
    "lookahead": (lambda: optax.lookahead(optax.sgd(0.1), 2, 0.5), "no attribute 'fast'"),
    "the batch": (needs_the_batch, "'batch'"),
    "gradients by example": (private, "batch dimension"),
    "a branch on a value": (compares_the_value, "TracerBoolConversionError"),
    "refused arguments": (
        lambda: optax.chain(plain_sam(opaque_mode=True), contrib.momo(0.1)),
        "unexpected keyword argument 'value'",
    ),
    "a search over a part": (
        lambda: optax.partition({"a": optax.lbfgs(), "b": optax.sgd(0.1)}, by_layer),
        "pytree structure error",
    ),
}
QUICK = ("lookahead", "refused arguments")


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[pytest.mark.slow] * (n not in QUICK)) for n in IMPOSSIBLE],
)
def test_an_optimizer_that_needs_more_is_an_error_before_step_1(name):
    make, message = IMPOSSIBLE[name]
    events = []
    loop = jl.trainer((init, apply), "mean_squared_error", make(), log=0)
    loop = loop.handle("all", lambda state: events.append(state.event))
    with pytest.raises(jl.JaxloopError, match="(?s)the optimizer must be able to.*fix:") as caught:
        loop.run(DATA)
    assert message in str(caught.value)
    assert not events


@pytest.mark.slow
def test_an_optimizer_op_by_op_and_with_a_loss_scale():
    def loop(**kwargs):
        optimizer = plain_sam(opaque_mode=True)
        return jl.trainer((init, apply), "mean_squared_error", optimizer, log=0, **kwargs)

    expected = loop().run(DATA[:2])
    close(loop().run(DATA[:2], jit=False), expected)
    close(loop(loss_scale="static").run(DATA[:2]), expected)


@pytest.mark.slow
def test_schedule_free_is_validated_and_returned_with_the_parameters_that_eval_params_names():
    # Optax evaluates the gradient at one point and the model at another.
    def averaged(step_state):
        state, params = step_state["optimizer_state"], step_state["model_state"]
        return contrib.schedule_free_eval_params(state, params)

    params, hand = by_hand(contrib.schedule_free_sgd(1e-1), ())
    expected = {None: params, averaged: contrib.schedule_free_eval_params(hand, params)}
    assert abs(loss(expected[None], (X, Y)) - loss(expected[averaged], (X, Y))) > 1e-4
    for eval_params, found in expected.items():
        optimizer = contrib.schedule_free_sgd(1e-1)
        make = functools.partial(jl.trainer, (init, apply), "mean_squared_error", optimizer, log=0)
        loop = make(eval_params=eval_params).validate(DATA)
        state = loop.run(DATA, epochs=2, output_transform=lambda state: state)
        np.testing.assert_allclose(
            state.history[1]["validation_loss"], loss(found, (X, Y)), rtol=1e-5
        )
        close(loop.run(DATA, epochs=2), found)

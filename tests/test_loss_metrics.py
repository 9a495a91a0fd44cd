"""Losses as metrics: Optax's however they are wrapped, exact over the data set, or an error."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.special

import jaxloop as jl
from jaxloop import errors, losses, metrics
from jaxloop.metrics.binding import bind
from jaxloop.metrics.declare import declare

RNG = np.random.default_rng(0)
LOGITS = RNG.normal(size=(10, 3)).astype(np.float32)
LABELS = RNG.integers(0, 3, 10).astype(np.int32)
HOT = np.eye(3, dtype=np.float32)[LABELS]
EXPECTED = -scipy.special.log_softmax(LOGITS, axis=1)[np.arange(10), LABELS]
WEIGHT = np.array([1, 0, 2, 0.5, 1, 1, 0, 3, 1, 1], np.float32)
CE = optax.softmax_cross_entropy_with_integer_labels


@functools.wraps(CE)
def wrapped(*args, **keywords):
    return CE(*args, **keywords)


OPTAX_FORMS = {
    "function": CE,
    "partial": functools.partial(CE, axis=-1),
    "jit": jax.jit(CE),
    "jit of partial": jax.jit(functools.partial(CE, axis=-1)),
    "partial of jit": functools.partial(jax.jit(CE)),
    "wraps": wrapped,
    "jit of wraps": jax.jit(wrapped),
    "vmap": jax.vmap(CE),
}


def evaluate(spec, y_true, y_pred, sizes=(10,), weight=None):
    """The value of a declared metric over the data, in batches of these sizes."""
    cuts = np.cumsum((0, *sizes))
    batches = []
    for a, b in zip(cuts, cuts[1:], strict=False):
        batch = {"y_true": y_true[a:b], "y_pred": y_pred[a:b]}
        batches.append(batch if weight is None else {**batch, "sample_weight": weight[a:b]})
    bound = bind([spec], batches[0], {}, None)
    accs, update = bound.init(), jax.jit(bound.update)
    for batch in batches:
        accs = update(accs, jax.tree.map(jnp.asarray, batch), {}, None)
    (value,) = bound.compute(accs).values()
    return np.asarray(value)


@pytest.mark.parametrize("form", OPTAX_FORMS)
def test_a_loss_of_optax_is_recognized(form):
    fn = OPTAX_FORMS[form]
    expected = EXPECTED
    np.testing.assert_allclose(losses.get(fn).fn(LABELS, LOGITS), expected, rtol=1e-6)
    (part,) = losses.get([(fn, 1.0)]).labels(LABELS, LOGITS)
    assert part.num_classes == 3
    spec = declare(fn, "m")
    assert declare(fn, "m") == spec and hash(declare(fn, "m")) == hash(spec)
    assert declare(fn).name == "softmax_cross_entropy_with_integer_labels"
    if form in ("function", "jit of partial"):
        mean = metrics.mean(fn)
        value = evaluate(declare(mean, "m"), LABELS, LOGITS, (5, 5))
        np.testing.assert_allclose(value, expected.mean(), rtol=1e-6)
        for accumulate in (None, "running_average"):
            value = evaluate(declare(fn, "m", accumulate), LABELS, LOGITS, (5, 5), WEIGHT)
            np.testing.assert_allclose(value, np.average(expected, weights=WEIGHT), rtol=1e-6)


def test_evaluator_trainer_and_validation_agree():
    model = (lambda key, x: jnp.zeros((3, 3)), lambda w, x: x @ w + x)
    fn = functools.partial(CE, axis=-1)
    data = jl.batches((LOGITS, LABELS), 4, pad=True)
    loop = jl.trainer(model, fn, optax.sgd(0.0), log=0).metric(fn, "again").validate(data)
    last = loop.output_transform and loop.run(data, output_transform=lambda state: state.history[0])
    expected = EXPECTED.mean()
    for name in ("loss", "again", "validation_loss", "validation_again"):
        np.testing.assert_allclose(last[name], expected, rtol=1e-6)


def test_a_function_of_optax_that_is_no_loss_of_a_pair_stays_a_function():
    for other in (optax.sgd, optax.projections.projection_simplex, optax.ctc_loss, jnp.mean, 3):
        assert not losses.is_optax_loss(other)
    errors_only = declare(optax.l2_loss, "l2", None, ("y_pred",))
    np.testing.assert_allclose(
        evaluate(errors_only, LABELS, LOGITS), (LOGITS**2).mean() / 2, rtol=1e-6
    )
    for wrong in (functools.partial(optax.ctc_loss, blank_id=1), jax.jit(optax.smooth_labels)):
        with pytest.raises(errors.ArgumentTypeError, match="one prediction and one target"):
            losses.get(wrong)


def test_fields_in_the_order_of_optax_are_an_error():
    with pytest.raises(errors.ArgumentError, match="target and its prediction"):
        declare(CE, transform_or_fields=("y_pred", "y_true"))


def test_own_losses_behind_wrappers():
    partial = functools.partial(losses.categorical_cross_entropy, sparse=True)
    assert losses.get(partial).probabilities and losses.get(jax.jit(partial)).labels is not None
    logits = jax.jit(functools.partial(partial, from_logits=True))
    assert not losses.get(logits).probabilities

    @functools.wraps(losses.categorical_cross_entropy)
    def with_softmax(y_true, y_pred):
        return losses.categorical_cross_entropy(y_true, jax.nn.softmax(y_pred))

    assert not losses.get(with_softmax).probabilities


# --- losses that are not means over examples ------------------------------------------------------

IMAGES = RNG.normal(size=(10, 2, 2, 3)).astype(np.float32)
MASKS = np.eye(3, dtype=np.float32)[RNG.integers(0, 3, (10, 2, 2))]
# Optax has dice losses since 0.2.6.
DICE = {}
if hasattr(optax.losses, "dice_loss"):
    DICE = {
        "generalized": optax.losses.multiclass_generalized_dice_loss,
        "generalized no background": functools.partial(
            optax.losses.multiclass_generalized_dice_loss, smooth=0.5, ignore_background=True
        ),
        "over the batch": functools.partial(optax.losses.dice_loss, axis=(0, 1, 2), alpha=0.25),
        "over the batch, weighted": jax.jit(
            functools.partial(
                optax.losses.dice_loss,
                axis=(0, 1, 2),
                class_weights=np.array([0.5, 1, 2], np.float32),
                reduction="sum",
                ignore_background=True,
            )
        ),
        "by example": optax.losses.dice_loss,
    }
QUICK = ("generalized no background",)


@pytest.mark.parametrize(
    "name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in DICE]
)
def test_dice_is_that_of_the_whole_data_set(name):
    fn, spec = jax.jit(DICE[name]), declare(DICE[name], "dice")
    whole = np.mean(fn(IMAGES, MASKS))
    np.testing.assert_allclose(evaluate(spec, MASKS, IMAGES, (5, 5)), whole, rtol=2e-6)
    present = WEIGHT > 0
    for sizes in ((4, 4, 2), (10,)):
        value = evaluate(spec, MASKS, IMAGES, sizes, present)
        expected = np.mean(fn(IMAGES[present], MASKS[present]))
        np.testing.assert_allclose(value, expected, rtol=2e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", DICE)
def test_dice_outside_a_loop(name):
    metric = metrics.of_loss(DICE[name])
    acc = metric.merge(metric.init(), metric.update(metric.init(), MASKS[:3], IMAGES[:3]))
    acc = metric.update(acc, MASKS[3:], IMAGES[3:])
    expected = np.mean(DICE[name](IMAGES, MASKS))
    np.testing.assert_allclose(metric.compute(acc), expected, rtol=2e-6)
    in_a_loop = evaluate(declare(metric, "m"), MASKS, IMAGES, (5, 5))
    np.testing.assert_allclose(in_a_loop, expected, rtol=2e-6)


def test_ranking_is_a_mean_over_lists():
    value = evaluate(declare("ranking_softmax_loss"), HOT, LOGITS, (5, 5), WEIGHT)
    rows = jax.vmap(optax.losses.ranking_softmax_loss)(LOGITS, HOT)
    np.testing.assert_allclose(value, np.average(rows, weights=WEIGHT), rtol=1e-6)


@pytest.mark.parametrize(
    "loss",
    [
        "ntxent",
        functools.partial(optax.losses.ntxent, temperature=0.5),
        functools.partial(optax.losses.cosine_distance, axis=None),
    ],
)
def test_a_loss_of_one_batch_is_no_metric(loss):
    with pytest.raises(errors.ArgumentError, match="mean over examples[\\s\\S]*running_average"):
        declare(loss)
    with pytest.raises(errors.ArgumentError, match="batch size"):
        metrics.of_loss(loss)
    targets = LABELS if losses.get(loss).name == "ntxent" else HOT
    value = evaluate(declare(loss, "m", "running_average"), targets, LOGITS, (5, 5))
    fn = jax.jit(losses.get(loss).fn)
    parts = [fn(targets[s], LOGITS[s]) for s in (slice(5), slice(5, 10))]
    np.testing.assert_allclose(value, np.mean(parts), rtol=1e-5)


def test_a_scalar_that_could_not_be_foreseen_is_an_error_before_the_first_step():
    ranking = functools.partial(optax.losses.ranking_softmax_loss, reduce_fn=jnp.sum)
    with pytest.raises(errors.ArgumentError, match="mean over examples"):
        evaluate(declare(ranking), HOT, LOGITS)
    with pytest.raises(errors.ShapeError, match="axis must not include 0"):
        losses.get(functools.partial(optax.softmax_cross_entropy, axis=0)).fn(HOT, LOGITS)


# --- the trainer: labels of the first batch, and examples of weight 0 -----------------------------

MODEL = (lambda key, x: jnp.eye(3), lambda w, x: jnp.tanh(x) @ w)
# One loop, so that batches of one shape are compiled once.
TRAINER = jl.trainer(MODEL, CE, optax.sgd(0.5), log=0)


def train(x, y, weight, loop=TRAINER):
    return np.asarray(loop.run([(x, y, weight)], epochs=2))


def test_a_label_that_is_no_class_is_an_error_before_the_first_step():
    wrong, present = LABELS.copy(), np.arange(10) != 3
    wrong[3] = 3
    with pytest.raises(errors.DataError, match="from 0 to 2, got 3 in the first batch"):
        TRAINER.run([(LOGITS, wrong)])
    with pytest.raises(errors.DataError, match="got 3"):
        train(LOGITS, wrong, np.ones(10, np.float32))
    assert np.all(np.isfinite(train(LOGITS, wrong, present.astype(np.float32))))
    # A later batch is read in the compiled step, where the loss can only become NaN.
    weight = np.ones(10, np.float32)
    assert np.isnan(TRAINER.run([(LOGITS, LABELS, weight), (LOGITS, wrong, weight)])).any()


def test_nothing_of_an_example_of_weight_0_reaches_the_parameters():
    absent = WEIGHT == 0
    x, y = LOGITS.copy(), LABELS.copy()
    x[absent], y[absent] = [np.nan, np.inf, -np.inf], -1
    np.testing.assert_array_equal(train(x, y, WEIGHT), train(LOGITS, LABELS, WEIGHT))
    # A batch of nothing but absent examples changes nothing.
    x[:], y[:] = np.nan, -1
    np.testing.assert_array_equal(train(x, y, 0 * WEIGHT), np.eye(3))


@pytest.mark.slow
def test_finite_inputs_of_weight_0_stay_for_models_that_mix_examples():
    graph = (lambda key, x: jnp.eye(3), lambda w, x: jnp.cumsum(x, 0) @ w)
    loop = jl.trainer(graph, CE, optax.sgd(0.5), log=0)
    with_rows = loop.run([(LOGITS, LABELS, WEIGHT)])
    grads = jax.grad(lambda w: losses.reduce(CE(jnp.cumsum(LOGITS, 0) @ w, LABELS), WEIGHT, 10))
    np.testing.assert_allclose(with_rows, jnp.eye(3) - 0.5 * grads(jnp.eye(3)), rtol=1e-5)

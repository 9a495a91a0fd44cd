"""Evaluations inside a run: the values are those of a run of their own, and little is done."""

import collections
import contextlib
import signal
import threading
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxloop as jl
from jaxloop._core import arrays as core_arrays
from jaxloop._core.interrupts import Interrupted, Interrupts
from jaxloop._data import superbatch
from jaxloop._data.array_reader import ArrayReader
from jaxloop._data.device_rows import Stacked
from jaxloop._data.prefetch import Prefetcher
from jaxloop._engine import carry
from jaxloop._engine.evaluating import evaluate
from jaxloop._engine.in_flight import InFlight
from jaxloop._program import cache
from jaxloop._program.fold import Fold
from jaxloop.errors import DataError
from tests.test_costs import counting


def weighted(batch, state):
    x, y = batch[:2]
    weight = batch[2] if len(batch) > 2 else jnp.ones(x.shape[0])
    return jl.emit(state, y_true=y, y_pred=x @ state["w"], sample_weight=weight)


def rolling(batch, state):
    """A step that changes its state: a counter, a float, and what is swapped."""
    w, v = state["w"], state["v"]
    new = {**state, "n": state["n"] + 1, "scale": state["scale"] * 0.5, "w": v, "v": w}
    seen = batch[0] @ w * state["scale"]
    return jl.emit(new, x=seen, last=state["n"])


STATE = {"w": np.float32([1.0, 2.0, -1.0])}
ROLLING = {**STATE, "v": -STATE["w"], "n": np.int32(5), "scale": np.float32(8)}
METRICS = jl.loop(weighted).metric("mean_absolute_error").metric("mean_squared_error")
METRICS = METRICS.metric(lambda y: y, "window", jl.window(3), ["y_pred"])
METRICS = METRICS.metric(lambda y: y, "peak", "running_max", ["y_pred"])
METRICS = METRICS.derive("twice", lambda value: 2 * value, "mean_absolute_error")
CHANGING = jl.loop(rolling).metric(lambda x: x, "mean", None, ["x"])
CHANGING = CHANGING.metric(lambda n: n, "last", "last", ["last"])

DATA = [np.ones(3, np.float32)] * 4


def of_run(loop, data, state):
    return loop.final_state(data, state).history[0]


def of_evaluation(loop, data, state):
    state = jax.tree.map(jnp.asarray, state)
    values = evaluate(loop, data, state)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(state))
    return values


def check_equal(found, expected):
    assert list(found) == list(expected)
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)
        assert found[name].dtype == value.dtype and isinstance(found[name], np.ndarray | np.generic)


def examples(num, seed=0):
    # Small integers: their sums and squares are exact, so the order of additions does not matter.
    draw = np.random.default_rng(seed).integers
    return draw(-8, 8, (num, 3)).astype(np.float32), draw(-8, 8, num).astype(np.float32)


@settings(max_examples=6, deadline=None)
@given(
    num=st.integers(1, 23),
    size=st.sampled_from([1, 4]),
    kind=st.sampled_from(["list", "batches", "device", "shuffled", "generator", "weights"]),
    changing=st.booleans(),
)
def test_the_values_are_those_of_a_run(num, size, kind, changing):
    arrays = examples(num, num)
    if kind == "weights":
        arrays = (*arrays, np.arange(num, dtype=np.float32) % 3)
    data = jl.batches(arrays, size, device=kind == "device", shuffle=kind == "shuffled")
    if kind in ("list", "weights"):
        data = list(data)
    elif kind == "generator":
        data = (lambda rows: lambda epoch: iter(rows))(list(data))
    loop, state = (CHANGING, ROLLING) if changing else (METRICS, STATE)
    expected = of_run(loop, data, state)
    for _ in range(3):  # the first one measures, and the later ones use its buffers
        check_equal(of_evaluation(loop, data, state), expected)


def test_batches_of_many_shapes_are_evaluated_and_reported():
    data = [tuple(a[:n] for a in examples(8)) for n in (8, 8, 3, 8, 5, 1)]
    with pytest.warns(UserWarning, match="the shapes of the batches keep changing"):
        expected = of_run(METRICS, data, STATE)
    with pytest.warns(UserWarning, match="the shapes of the batches keep changing") as caught:
        check_equal(of_evaluation(METRICS, data, STATE), expected)
    assert len(caught) == 1


def test_the_last_batch_on_the_device_is_not_gathered_on_the_host(monkeypatch):
    monkeypatch.setattr(ArrayReader, "_on_host", None)
    data = jl.batches(examples(10), 4, device=True)
    check_equal(of_evaluation(METRICS, data, STATE), of_run(METRICS, list(data), STATE))
    data = jl.batches(examples(3), 4, device=True)
    check_equal(of_evaluation(METRICS, data, STATE), of_run(METRICS, list(data), STATE))


@pytest.mark.slow
def test_accumulators_that_are_too_large_for_the_host():
    loop = jl.loop(weighted).metric(lambda y: y, "x", jl.window(10_000), ["y_pred"])
    data = list(jl.batches(examples(20), 4))
    expected = of_run(loop, data, STATE)
    check_equal(of_evaluation(loop, data, STATE), expected)
    (program,) = loop.programs._folds
    assert not program.values.on_host
    with counting() as counts, jax.transfer_guard("disallow"):
        values = evaluate(loop, jl.batches(examples(20), 4), jax.device_put(STATE))
    check_equal(values, expected)
    assert counts["compilations"] == 0


def test_a_loop_without_metrics():
    assert evaluate(jl.loop(lambda batch, state: state), DATA, jax.device_put(STATE)) == {}


@contextlib.contextmanager
def watching(patch):
    """Counts dispatches, and the blocks in flight before each one."""
    counts = collections.Counter()
    run, settle = Fold.run, InFlight.settle

    def counted_run(self, *args):
        counts["windows"] += 1
        out = run(self, *args)
        counts["largest output"] = max(
            counts["largest output"], sum(x.nbytes for x in jax.tree.leaves(out[1:]))
        )
        return out

    def counted_settle(self, most):
        counts["in flight"] = max(counts["in flight"], len(self.blocks))
        settle(self, most)

    patch.setattr(Fold, "run", counted_run)
    patch.setattr(InFlight, "settle", counted_settle)
    yield counts


def as_long_as_possible(loop):
    loop.programs.block_lengths.update(dict.fromkeys(loop.programs.block_lengths, 10**6))


@pytest.mark.parametrize("kind, windows", [("device", 2), ("list", 5), ("batches", 5)])
def test_a_window_is_one_dispatch_and_nothing_else_comes_out(kind, windows, monkeypatch):
    arrays = examples(4 * 64 * 2 + 1)
    data = jl.batches(arrays, 2, device=kind == "device")
    data = list(data) if kind == "list" else data
    loop = jl.loop(weighted).metric("mean_absolute_error")
    monkeypatch.setattr(cache, "rows_of", lambda capacity, batch: 64)
    of_evaluation(loop, data, STATE)
    as_long_as_possible(loop)
    with watching(monkeypatch) as counts, counting() as costs:
        of_evaluation(loop, data, STATE)
    assert counts["windows"] == windows and counts["in flight"] <= 3
    assert counts["largest output"] < 2000  # accumulators and a marker, and no ring of them
    assert costs["compilations"] == costs["blocks"] == costs["computed"] - 1 == 0


def test_buffers_serve_all_evaluations_and_no_thread_is_started(monkeypatch):
    made, make = [], superbatch._aligned
    monkeypatch.setattr(superbatch, "_aligned", lambda *a: made.append(a) or make(*a))
    monkeypatch.setattr(Prefetcher, "ahead", None)
    data, loop = jl.batches(examples(12), 4), jl.loop(weighted).metric("mean_absolute_error")
    of_evaluation(loop, data, STATE)
    assert made
    made.clear()
    of_evaluation(loop, data, STATE)
    assert not made


def test_a_validation_leaves_the_state_and_the_metrics_of_the_epoch_alone(monkeypatch):
    model = (lambda key, x: jnp.zeros((3,)), lambda w, x: x @ w)
    trainer = jl.trainer(model, "mean_squared_error", "sgd", log=0)
    data = jl.batches(examples(12), 4)
    loop = trainer.validate(data)
    loop.run(data, epochs=2)
    copies = []
    for owner in (carry, core_arrays):
        monkeypatch.setattr(owner, "copy_later", lambda tree: copies.append(tree) or tree)
    with counting() as with_validation:
        state = loop.final_state(data, epochs=4)
    with counting() as without:
        plain = trainer.final_state(data, epochs=4)
    assert not copies
    assert with_validation["compilations"] == 0
    assert with_validation["computed"] == without["computed"] + 4  # the values, once an epoch
    assert [state.history[e]["loss"] for e in range(4)] == [
        plain.history[e]["loss"] for e in range(4)
    ]


def test_a_step_that_must_not_be_fused_runs_batch_by_batch(monkeypatch):
    def step(batch, kernel):
        x = jax.lax.conv_general_dilated(batch, kernel, (1,), "VALID")
        return jl.emit(kernel, x=x.sum((1, 2)))

    loop = jl.loop(step).metric(lambda x: x, "mean", None, ["x"])
    data, kernel = [np.full((2, 1, 4), i, np.float32) for i in range(5)], jnp.ones((1, 1, 2))
    of_evaluation(loop, data, kernel)
    with watching(monkeypatch) as counts:
        values = of_evaluation(loop, data, kernel)
    assert counts["windows"] == 5
    check_equal(values, of_run(loop, data, kernel))
    assert "while" not in str(jax.make_jaxpr(step)(data[0], kernel))


@pytest.mark.parametrize("kind", ["device", "list"])
def test_constant_lengths(kind, monkeypatch):
    monkeypatch.setattr(cache, "static_lengths", lambda platform, capacity: (8, 4))
    data = jl.batches(examples(2 * 23), 2, device=True)
    data = data if kind == "device" else list(data)
    loop = jl.loop(rolling).metric(lambda x: x, "mean", None, ["x"])
    of_evaluation(loop, data, ROLLING)
    as_long_as_possible(loop)
    lengths = []
    run = Fold.run
    monkeypatch.setattr(Fold, "run", lambda *a: (lengths.append(a[-1]), run(*a))[1])
    values = of_evaluation(loop, data, ROLLING)
    assert lengths == [8, 8, 4, 3]
    expected = of_run(jl.loop(rolling).metric(lambda x: x, "mean", None, ["x"]), data, ROLLING)
    check_equal(values, expected)


def test_a_counter_that_nothing_reads_is_not_carried_through_the_loop():
    def step(batch, state):
        return jl.emit({**state, "n": state["n"] + 1}, x=batch[0] @ state["w"])

    loop = jl.loop(step).metric(lambda x: x, "mean", None, ["x"])
    state = jax.tree.map(jnp.asarray, {**STATE, "n": np.uint32(2**32 - 3)})
    rows = list(jl.batches(examples(20), 4))
    of_evaluation(loop, rows, state)
    (fold,) = loop.programs._folds.values()
    leaves = jax.tree.leaves(state)
    assert fold._changing(rows[0], leaves) == ([], [0])
    stacked = Stacked(jax.tree.map(lambda *b: np.stack(b), *rows))
    packed = next(iter(loop.programs._folds)).values.init()
    new, _, _ = fold.run(leaves, packed, stacked, jnp.int32(0), jnp.int32(5), 5)
    assert new[0] == 2 and new[0].dtype == jnp.uint32  # it wraps, as it does in a run
    assert new[1] is leaves[1]


# --- errors and signals --------------------------------------------------------------------------


def test_errors_say_where_they_happened():
    def data():
        yield from jl.batches(examples(12), 4)
        raise RuntimeError("the disk is gone")

    with pytest.raises(RuntimeError, match="disk") as caught:
        of_evaluation(METRICS, lambda epoch: data(), STATE)
    assert caught.value.__notes__ == [
        "jaxloop: while reading the data of epoch 0 from iteration 3 on"
    ]
    with pytest.raises(DataError, match="at least one batch, got empty data") as caught:
        of_evaluation(METRICS, [], STATE)
    assert not hasattr(caught.value, "__notes__")


def test_an_evaluation_works_after_an_error():
    rows = list(jl.batches(examples(40), 4))
    expected = of_run(METRICS, rows, STATE)
    for _ in range(3):
        with pytest.raises(DataError):
            of_evaluation(METRICS, [*rows, ("x", "y")], STATE)
        check_equal(of_evaluation(METRICS, rows, STATE), expected)


@pytest.mark.usefixtures("default_signals")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_an_evaluation_between_two_windows_and_while_data_wait(number):
    rows, waiting = list(jl.batches(examples(40), 4)), threading.Event()

    def send():
        signal.pthread_kill(threading.main_thread().ident, number)

    def sending(epoch):
        for index, row in enumerate(rows):
            if index == 4:
                send()
            yield row

    def slow(epoch):
        yield from rows[:3]
        threading.Timer(0.05, send).start()
        for _ in range(10_000):
            waiting.wait(0.01)
        raise AssertionError("the signal was not seen")

    for data in (sending, slow):
        handlers = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)}
        with Interrupts() as outer:
            with pytest.raises(Interrupted, match=signal.Signals(number).name):
                of_evaluation(METRICS, data, STATE)
            assert outer.flag.name == signal.Signals(number).name
        assert {n: signal.getsignal(n) for n in handlers} == handlers


def test_sharded_and_committed_states():
    device = jax.devices()[1]
    rows = list(jl.batches(examples(20), 4))
    expected = of_run(CHANGING, rows, ROLLING)
    committed = jax.device_put(ROLLING, device)
    loop = jl.loop(rolling).metric(lambda x: x, "mean", None, ["x"])
    loop = loop.metric(lambda n: n, "last", "last", ["last"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_equal(evaluate(loop, rows, committed), expected)
        with counting() as counts:
            check_equal(evaluate(loop, rows, committed), expected)
        assert counts["compilations"] == 0
    mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    check_equal(evaluate(loop, rows, jax.device_put(ROLLING, everywhere)), expected)

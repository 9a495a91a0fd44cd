"""The driver against the naive interpreter, over random loops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import jaxloop as jl
from tests.reference import EVENTS, Reference

PREDICATES = {
    "every": lambda n: lambda count: count % n == 0,
    "only": lambda n: lambda count: count == n,
    "after": lambda n: lambda count: count > n,
    "before": lambda n: lambda count: count < n,
}


def leaf(kind, n, per):
    test = PREDICATES[kind](n)
    predicate = (lambda t, e: test(t)) if per is None else (lambda t, e: test(e))
    return getattr(jl, kind)(n, per=per), predicate


def either(a, b):
    return a[0] | b[0], lambda t, e: a[1](t, e) or b[1](t, e)


def both(a, b):
    return a[0] & b[0], lambda t, e: a[1](t, e) and b[1](t, e)


def neither(a):
    return ~a[0], lambda t, e: not a[1](t, e)


leaves = st.builds(
    leaf, st.sampled_from(list(PREDICATES)), st.integers(1, 6), st.sampled_from([None, "epoch"])
)
filters = st.recursive(
    leaves,
    lambda inner: (
        st.builds(either, inner, inner) | st.builds(both, inner, inner) | st.builds(neither, inner)
    ),
    max_leaves=3,
)


class Reiterable:
    """Neither sized nor a list."""

    def __init__(self, batches):
        self.batches = batches

    def __iter__(self):
        return iter(self.batches)


KINDS = {
    "list": list,
    "reiterable": Reiterable,
    "function": lambda batches: lambda epoch: iter(batches),
    "generator": lambda batches: lambda epoch: (batch for batch in batches),
    "jax": lambda batches: [jnp.asarray(batch) for batch in batches],
    "batches": lambda batches: jl.batches(np.concatenate(batches), 2),
    "device": lambda batches: jl.batches(np.concatenate(batches), 2, device=True),
}
events = st.lists(st.sampled_from(EVENTS), min_size=1, max_size=3, unique=True)
IN_EPOCH = ("epoch_started", "iteration_started", "iteration_completed")


@st.composite
def handlers(draw):
    names = draw(events)
    action = draw(st.sampled_from([None, None, None, "halt_loop", "halt_epoch"]))
    if action == "halt_epoch" and not set(names) <= set(IN_EPOCH):
        action = None
    return names, draw(filters), action


def step(batch, total):
    both = jnp.stack([batch, batch + 1], axis=1)  # (batch, 2), with a mask of the same shape
    s = jnp.sum(batch)
    return jl.emit((3 * total + s) % 65536, s=s, both=both, mask=both % 3 != 0)


@st.composite
def totals(draw):
    steps = draw(st.none() | st.integers(1, 20))
    epochs = draw(st.integers(1, 3) if steps is None else st.none() | st.integers(1, 3))
    return {"epochs": epochs, "steps": steps}


def made():
    """A loop with its own programs."""
    return (
        jl.loop(step)
        .metric(lambda s: s.astype(jnp.float32), "sum", "running_sum", ["s"])
        .metric("s", "recent", jl.window(3))
        .metric("both", "masked", "running_sum", where="mask")
        .derive("twice", lambda total: 2 * total, of="sum")
    )


# One loop for all examples: what was compiled once serves the others.
BASE = made()


def numbers(metrics):
    """The metrics as numbers. Before the first update, a mean is NaN here and 0 there."""
    return {name: float(np.nan_to_num(value)) for name, value in metrics.items()}


@settings(
    max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
@given(
    sizes=st.lists(st.sampled_from([2, 2, 2, 3]), min_size=1, max_size=9),
    totals=totals(),
    more=st.none() | totals(),
    iterations=st.sampled_from([None, None, 1, 4]),
    attached=st.lists(handlers(), max_size=4),
    watching=st.lists(st.tuples(events, filters), max_size=3),
    fuse=st.sampled_from([1, 2, 5, "auto"]),
    kind=st.sampled_from(list(KINDS)),
    asked=st.booleans(),
)
@pytest.mark.filterwarnings("ignore:the shapes of the batches keep changing")
@pytest.mark.filterwarnings("ignore:nothing remains to be done")
def test_driver_does_what_the_interpreter_does(
    sizes, totals, more, iterations, attached, watching, fuse, kind, asked
):
    if any(action == "halt_epoch" for _, _, action in attached):
        # If each epoch is halted before its first iteration, only `epochs` ends the run.
        totals, more = (one and {**one, "epochs": one["epochs"] or 3} for one in (totals, more))
    if kind in ("batches", "device"):
        sizes = [2] * len(sizes)  # but for the last, batches are of one size
    batches = [[i + j for j in range(size)] for i, size in enumerate(sizes)]
    expected = Reference(
        batches,
        totals["epochs"],
        iterations,
        [(on, f"h{i}", f[1], action) for i, (on, f, action) in enumerate(attached)],
        [(on, f"o{i}", f[1]) for i, (on, f) in enumerate(watching)],
        totals["steps"],
    ).run()
    if more is not None:
        expected.go_on(**more)

    trace = []

    def seen(name, state):
        event = state.event
        trace.append(
            (
                name,
                event.value,
                state.epoch,
                state.iteration,
                state.step,
                state.event_counts[event],
                numbers(state.metrics),
            )
        )

    loop = BASE
    for i, (on, f, action) in enumerate(attached):

        def handler(state, i=i, action=action):
            seen(f"h{i}", state)
            return None if action is None else (action, state)

        loop = loop.handle(on, handler, f[0], name=f"h{i}")
    for i, (on, f) in enumerate(watching):
        # A function as a filter is asked at every firing, and may say what a count would.
        filter = f[0] & (lambda shot: shot.step >= 0) if asked else f[0]
        loop = loop.observe(on, lambda shot, i=i: seen(f"o{i}", shot), filter, name=f"o{i}")
    data = KINDS[kind]([np.array(batch, np.int32) for batch in batches])
    state = loop.run(data, 0, **totals, iterations=iterations, fuse=fuse)
    if more is not None:
        state = loop.from_state(state).run(data, **more, iterations=iterations, fuse=fuse)

    assert trace == expected.trace
    assert int(state.step_state) == expected.total
    assert (state.epoch, state.iteration, state.step) == (expected.epoch, 0, expected.step)
    assert (state.status, state.halted_by) == (expected.status, expected.halted_by)
    assert {e: numbers(metrics) for e, metrics in state.history.items()} == expected.history
    assert set(state.times) == set(expected.history)


def mlp(batch, state):
    x, y = batch

    def objective(params):
        logits = jnp.tanh(x @ params["w"]) @ params["v"]
        losses = -jnp.take_along_axis(jax.nn.log_softmax(logits), y[:, None], 1)[:, 0]
        return jnp.mean(losses), (losses, logits)

    (_, (losses, logits)), grads = jax.value_and_grad(objective, has_aux=True)(state["params"])
    moment = jax.tree.map(lambda m, g: 0.9 * m + g, state["moment"], grads)
    params = jax.tree.map(lambda p, m: p - 0.1 * m, state["params"], moment)
    return jl.emit({"params": params, "moment": moment}, loss=losses, y_true=y, y_pred=logits)


def mlp_init(batch, _):
    w, v = jax.random.split(jax.random.key(0))
    params = {"w": jax.random.normal(w, (6, 16)), "v": jax.random.normal(v, (16, 3))}
    return {"params": params, "moment": jax.tree.map(jnp.zeros_like, params)}


def bits(state):
    return [np.asarray(x).tobytes() for x in jax.tree.leaves(state.step_state)]


@pytest.mark.parametrize("device", [False, True])
@pytest.mark.parametrize("fuse", [1, 2, 7, "auto"])
def test_watchers_change_no_bit(fuse, device):
    rng = np.random.default_rng(0)
    data = jl.batches(
        (rng.normal(size=(59, 6)).astype(np.float32), rng.integers(0, 3, 59).astype(np.int32)),
        8,
        shuffle=True,
        device=device,
    )
    base = jl.loop(mlp, mlp_init).metric("accuracy").metric(lambda x: x, "loss", None, ["loss"])
    kept = []

    def look(state):
        kept.append((state, dict(state.metrics), bits(state)))

    alone = base.run(data, epochs=3, fuse=fuse)
    watched = (
        base.handle("iteration_completed", look, jl.every(3))
        .handle("iteration_started", lambda s: None, {"every": 4, "per": "epoch"})
        .handle("epoch_completed", lambda s: ("continue", s.replace(metrics={**s.metrics, "a": 1})))
        .observe("all", lambda s: dict(s.metrics))
        .run(data, epochs=3, fuse=fuse)
    )
    assert bits(alone) == bits(watched)
    for epoch, metrics in alone.history.items():
        assert {**metrics, "a": 1} == dict(watched.history[epoch])
    # What a handler was given stays valid for as long as it is kept.
    for state, metrics, was in kept:
        assert bits(state) == was
        assert dict(state.metrics) == metrics


def test_going_on_from_any_state_gives_the_same_bits():
    rng = np.random.default_rng(1)
    data = jl.batches(
        (rng.normal(size=(30, 6)).astype(np.float32), rng.integers(0, 3, 30).astype(np.int32)),
        8,
        shuffle=True,
    )
    base = jl.loop(mlp, mlp_init).metric("accuracy")
    whole = base.run(data, epochs=3)
    kept = []
    base.handle("all", lambda s: kept.append(s)).run(data, epochs=3)
    for state in kept:
        again = base.from_state(state).run(data, epochs=3)
        assert bits(again) == bits(whole), state
        assert again.history == whole.history, state

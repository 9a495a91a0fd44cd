"""Blocks of constant lengths, as on CUDA and ROCm: the same bits, few programs, one plain loop."""

import collections
import functools
import re
import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import jaxloop as jl
from jaxloop._core.placement import devices_of
from jaxloop._data.device_rows import Stacked
from jaxloop._engine.options import RunOptions
from jaxloop._engine.parts import Parts
from jaxloop._engine.start import begin
from jaxloop._program import cache
from jaxloop._program.block import Program
from jaxloop._program.sizing import static_lengths as sizing
from tests import test_differential
from tests.test_costs import counting
from tests.test_differential import Reiterable, bits, filters, mlp, mlp_init


def choose(patch, *lengths):
    """Lets programs have blocks of these lengths, as far as their capacity allows."""
    patch.setattr(
        cache, "static_lengths", lambda _, capacity: tuple(n for n in lengths if n <= capacity)
    )


def made():
    """A loop of its own, with its own programs."""
    return jl.loop(mlp, mlp_init).metric("loss")


@pytest.fixture
def blocks(monkeypatch):
    """The lengths of the blocks that run, in order."""
    lengths = []
    run = Program.run

    def counted(self, *args):
        lengths.append(args[-1])
        return run(self, *args)

    monkeypatch.setattr(Program, "run", counted)
    return lengths


# --- which lengths -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "platform, capacity, lengths",
    [
        ("cpu", 64, ()),
        ("tpu", 1024, ()),
        ("cuda", 1024, (1024, 64, 8)),
        ("rocm", 64, (64, 8)),
        ("gpu", 100, (100, 64, 8)),
        ("cuda", 32, (32, 8)),
        ("cuda", 8, (8,)),
        ("cuda", 2, (2,)),
        ("cuda", 1, ()),
        ("cuda", 4096, (4096, 64, 8)),
        ("rocm", 2**30, (4096, 64, 8)),
    ],
)
def test_the_platform_decides(platform, capacity, lengths):
    assert sizing(platform, capacity) == lengths


def test_the_platform_is_that_of_the_state():
    last = jax.devices()[-1]
    state = {"w": jax.device_put(np.zeros(2), last), "host": np.zeros(2)}
    assert devices_of(state) == [last]
    assert devices_of({}) == [jax.devices()[0]]
    with jax.default_device(last):
        assert devices_of({}) == [last]
    with jax.default_device("cpu"):
        assert devices_of({}) == [jax.devices("cpu")[0]]


def test_a_block_is_the_longest_that_fits():
    cut = functools.partial(Program.cut, types.SimpleNamespace(lengths=(64, 8)))
    assert list(map(cut, (1, 7, 8, 63, 64, 200))) == [1, 7, 8, 8, 64, 64]
    assert Program.cut(types.SimpleNamespace(lengths=()), 63) == 63


# --- the same bits -------------------------------------------------------------------------------


def pairs(num_batches, ragged):
    """Batches of four examples, and perhaps one of three."""
    rng = np.random.default_rng(num_batches)
    sizes = [4] * num_batches + [3] * ragged
    return [
        (rng.normal(size=(n, 6)).astype(np.float32), rng.integers(0, 3, n).astype(np.int32))
        for n in sizes
    ]


def as_arrays(batches, **options):
    x, y = (np.concatenate(part) for part in zip(*batches, strict=True))
    return jl.batches((x, y), 4, shuffle=True, **options)


KINDS = {
    "list": list,
    "reiterable": Reiterable,
    "function": lambda batches: lambda epoch: iter(batches),
    "batches": as_arrays,
    "device": lambda batches: as_arrays(batches, device=True),
}
# What was compiled once serves the other examples.
TRACED, STATIC = made(), {lengths: made() for lengths in ((8, 4), (64, 8))}


def trail(loop, data, handled, observed, halt, **options):
    """What a run and its handlers and observers saw, as bits. It continues after a halt."""
    seen = []

    def look(shot):
        seen.append((shot.event, shot.step, shot.metrics["loss"].tobytes()))

    for index, filter in enumerate(handled):
        loop = loop.handle("iteration_completed", look, filter[0], name=f"h{index}")
    for index, filter in enumerate(observed):
        loop = loop.observe("iteration_started", look, filter[0], name=f"o{index}")
    watched = loop.handle(
        "iteration_completed", lambda s: ("halt_loop", s), jl.only(halt), name="halt"
    )
    state = watched.run(data, epochs=2, **options)
    seen += bits(state)
    state = loop.from_state(state).run(data, epochs=3, **options)
    history = {epoch: dict(metrics) for epoch, metrics in state.history.items()}
    return seen, bits(state), history


def compared(lengths, kind, num_batches, ragged, options, *watching):
    data = KINDS[kind](pairs(num_batches, ragged))
    traced = trail(TRACED, data, *watching, **options)
    with pytest.MonkeyPatch.context() as patch:
        choose(patch, *lengths)
        static = trail(STATIC[lengths], data, *watching, **options)
    assert static == traced


def test_constant_lengths_change_no_bit():
    handled, observed = [(jl.every(13), None), (jl.only(3), None)], [(jl.every(5), None)]
    compared((8, 4), "list", 40, False, {"fuse": 16}, handled, observed, 29)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:the shapes of the batches keep changing")
@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    lengths=st.sampled_from(list(STATIC)),
    kind=st.sampled_from(list(KINDS)),
    num_batches=st.sampled_from([3, 11, 40, 130]),
    ragged=st.booleans(),
    fuse=st.sampled_from([5, 70, "auto"]),
    iterations=st.sampled_from([None, None, 2, 9]),
    handled=st.lists(filters, max_size=2),
    observed=st.lists(filters, max_size=1),
    halt=st.sampled_from([1, 9, 29, 10**6]),
)
def test_constant_lengths_change_no_bit_of_random_loops(
    lengths, kind, num_batches, ragged, fuse, iterations, handled, observed, halt
):
    options = {"fuse": fuse, "iterations": iterations}
    compared(lengths, kind, num_batches, ragged, options, handled, observed, halt)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:the shapes of the batches keep changing")
@pytest.mark.filterwarnings("ignore:nothing remains to be done")
def test_the_driver_does_what_the_interpreter_does_with_constant_lengths(monkeypatch):
    choose(monkeypatch, 4, 2)
    monkeypatch.setattr(test_differential, "BASE", test_differential.made())
    test_differential.test_driver_does_what_the_interpreter_does()


def test_a_resumed_run_ends_with_the_same_bits(monkeypatch, tmp_path):
    data = pairs(30, False)
    whole = TRACED.run(data, epochs=2, fuse=16)
    choose(monkeypatch, 8, 4)
    static = STATIC[8, 4]
    watched = static.checkpoint(tmp_path, event="iteration_completed", filter=jl.every(17))
    assert bits(watched.run(data, epochs=2, fuse=16)) == bits(whole)
    for step in (34, 51):
        state = jl.restore(tmp_path, step, like=whole)
        again = static.from_state(state).run(data, epochs=2, fuse=16)
        assert bits(again) == bits(whole)
        assert again.history == whole.history


def wave(_, state):
    x, n = state
    return jl.emit((jnp.sin(x) + 0.1 * n, n + 1), x=x)


def as_long_as_possible(loop):
    """Lets the clock allow blocks of any length. It does after one short run."""
    loop.programs.block_lengths.update(dict.fromkeys(loop.programs.block_lengths, 10**6))


@pytest.mark.parametrize("metric", [pytest.param(True, marks=pytest.mark.slow), False])
def test_steps_without_data_run_in_long_blocks(monkeypatch, blocks, metric):
    def run():
        loop = jl.loop(wave)
        if metric:
            loop = loop.metric(lambda x: x, "mean", None, ["x"])
        loop.run(None, (np.float32(1), np.float32(0)), iterations=1)
        as_long_as_possible(loop)
        blocks.clear()
        state = loop.run(None, (np.float32(1), np.float32(0)), iterations=10_000)
        return bits(state), dict(state.history[0])

    traced = run()
    monkeypatch.setattr(cache, "static_lengths", lambda _, capacity: sizing("cuda", capacity))
    assert run() == traced
    rest = 10_000 - 2 * 4096
    assert blocks == [4096] * 2 + [64] * (rest // 64) + [8] * (rest % 64 // 8)


# --- few programs --------------------------------------------------------------------------------


def total(batch, state):
    return jl.emit(state + jnp.sum(batch[0]), x=batch[0])


def test_each_length_is_compiled_once(monkeypatch, blocks):
    choose(monkeypatch, 64, 8)
    loop = jl.loop(total).metric(lambda x: x, "mean", None, ["x"])
    data = pairs(200, False)
    with counting() as first:
        loop.run(data[:1], 0.0, fuse=128)
        as_long_as_possible(loop)
        for every in (3, 8, 13, 21, 100, 200):
            once = loop.handle("iteration_completed", lambda s: None, jl.every(every))
            once.run(data, 0.0, fuse=128)
    # A traced bound and two constant ones; and a copy of the state, of which there are more.
    assert first["compilations"] <= 4
    assert set(blocks) == {1, 2, 3, 4, 5, 8, 64}
    with counting() as more:
        loop.run(data, 0.0, fuse=128, epochs=2)
        loop.run([*data, *pairs(0, True)], 0.0, fuse=128, epochs=2)
    assert more["compilations"] == 1  # the ragged batch


def test_blocks_of_a_handler_are_cut_from_the_longest_on(monkeypatch, blocks):
    choose(monkeypatch, 8, 4)
    loop = jl.loop(total).handle("iteration_completed", lambda s: None, jl.every(15))
    data = pairs(30, False)
    loop.run(data[:1], 0.0, fuse=30)
    as_long_as_possible(loop)
    blocks.clear()
    loop.run(data, 0.0, fuse=30)
    assert blocks == [8, 4, 3] * 2


def test_the_length_by_time_grows_past_a_cut(monkeypatch):
    """A block that was cut is shorter than the clock allows. Its time counts all the same."""
    choose(monkeypatch, 64, 8)
    parts = Parts.of(jl.loop(total), pairs(9, False), RunOptions.of({"fuse": 128}))
    begin(parts, 0.0)
    running = parts.blocks._in_flight
    running.fit(1, 0.03 / 9.5)
    assert running.length == 9
    running.fit(8, 0.03 / 16)
    assert running.length == 8 * 16
    running.fit(8, 0.03 / 20)  # a block that a handler cut short
    assert running.length == 8 * 16


# --- the compiled block --------------------------------------------------------------------------


def program_of(loop):
    """The program of a loop, and its carry and first batch."""
    parts = Parts.of(loop, as_arrays(pairs(20, False)), RunOptions.of({}))
    begin(parts, None)
    return parts.blocks.program, parts.carry.values, parts.blocks.sample.value


def compiled(loop, length=0):
    """The compiled block of a length, as text."""
    program, carry, batch = program_of(loop)
    return program.lower(carry, batch, length).compile().as_text()


def count(text):
    """How many instructions of a kind there are."""
    return collections.Counter(
        re.findall(r"^\s+(?:ROOT )?%\S+ = .*?\s([a-z][\w\-]*)\(", text, re.M)
    )


def body_of(text):
    """The computation that the only loop repeats."""
    (name,) = re.findall(r"\swhile\(.*?body=%([\w.\-]+)", text)
    return re.search(rf"^%{re.escape(name)} .*?^}}", text, re.M | re.S)[0]


def trip_counts(text):
    return re.findall(r'"known_trip_count":\{"n":"(\d+)"', text)


class Mlp(nn.Module):
    rate: float = 0.0

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.relu(nn.Dense(16)(x))
        if self.rate:
            x = nn.Dropout(self.rate, deterministic=not train)(x)
        return nn.Dense(3)(x)


PAIR = (
    lambda key, x: jax.random.normal(key, (6, 3)),
    lambda w, x: x @ w,
)


def trainer(model=None, **options):
    loss = optax.softmax_cross_entropy_with_integer_labels
    model = Mlp() if model is None else model
    return jl.trainer(model, loss, optax.adam(1e-3), log=0, **options).metric("accuracy")


@pytest.mark.parametrize("make", [made, pytest.param(trainer, marks=pytest.mark.slow)])
def test_a_constant_length_is_one_plain_loop(monkeypatch, make):
    choose(monkeypatch, 64, 8)
    loop = make()
    traced, static = compiled(loop), compiled(loop, 64)
    assert count(traced)["while"] == 1 and trip_counts(traced) == []
    assert count(static)["while"] == 1 and trip_counts(static) == ["64"]
    assert not {"conditional", "sort", "call"} & count(static).keys()
    assert count(body_of(static))["copy"] <= count(body_of(traced))["copy"]
    assert count(body_of(static))["fusion"] == count(body_of(traced))["fusion"]


@pytest.mark.parametrize("platform", ["cuda", pytest.param("rocm", marks=pytest.mark.slow)])
def test_the_bound_is_a_constant_of_the_condition_on_a_gpu(monkeypatch, platform):
    """A program can be lowered for a GPU without one, though not compiled."""
    monkeypatch.setattr(cache, "static_lengths", lambda _, capacity: sizing(platform, capacity))
    program, carry, batch = program_of(trainer(Mlp(rate=0.2)))
    assert program.lengths == (1024, 64, 8)
    stack = jax.tree.map(lambda x: jnp.zeros((program.num_rows, *x.shape), x.dtype), batch)
    for length, call in {0: program._call, **program._static}.items():
        traced = call.trace(carry, Stacked(stack), np.int32(0), np.int32(1))
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        # One loop: unlike a CPU, a GPU draws random bits without one. And nothing to decide inside.
        assert text.count("stablehlo.while") == 1
        assert not re.search(r"stablehlo\.(case|if|sort)\b", text)
        (condition,) = re.findall(r"cond \{(.*?)\} do", text, re.S)
        constants = re.findall(r"stablehlo.constant dense<(\d+)>", condition)
        assert constants == ([str(length)] if length else [])


@pytest.mark.parametrize(
    "model, options",
    [
        (Mlp(), {}),
        (PAIR, {}),
        pytest.param(Mlp(), {"loss_scale": "dynamic"}, marks=pytest.mark.slow),
        pytest.param(Mlp(), {"ema_decay": 0.9, "report": ["update_norm"]}, marks=pytest.mark.slow),
    ],
    ids=["linen", "pair", "loss_scale", "ema"],
)
def test_nothing_moves_a_block_off_the_sequential_path(model, options):
    """On a CPU, XLA runs a block with a loop inside its loop on several threads that spin.

    Splitting a key is such a loop, and so is sorting.
    """
    loop = trainer(model, **options).metric("top_k_categorical_accuracy")
    found = count(compiled(loop))
    assert found["while"] == 1, found
    assert not {"sort", "call", "conditional", "custom-call", "rng-bit-generator"} & found.keys()


@pytest.mark.slow
def test_only_random_bits_loop_inside_a_block():
    text = compiled(trainer(Mlp(rate=0.2)))
    inner = re.findall(r"\swhile\(.*", text)
    assert len(inner) > 1
    # Threefry: deriving the step's key and the dropout layer's, and drawing the bits.
    random = [line for line in inner if re.search(r"threefry|random|dropout|fold_in", line, re.I)]
    assert len(random) == len(inner) - 1
    assert count(text)["sort"] == 0

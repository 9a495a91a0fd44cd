"""The programs of `tests.programs`, and the command that prints their digests."""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxloop as jl
from tests import programs
from tests.digest import digest, hash_tree
from tests.programs.data import RESUMED
from tests.programs.loops import (
    arrays_of,
    mean_loop,
    metrics_loop,
    mlp_data,
    mlp_loop,
    random_integers,
    stable,
    values_of,
)
from tests.programs.models import LOSS, LOSSES, MODELS, OPTIMIZERS, X, Y, digits_model, linen_model


class Result(NamedTuple):
    """What a program gives: its final state, its output, and what handlers and observers saw."""

    state: jl.State
    output: Any = None
    trace: Any = ()


PROGRAMS: dict[str, Callable[[Path], Result]] = {}


def program(*cases: Any) -> Callable[[Callable[..., Result]], Callable[..., Result]]:
    """Adds a function to the programs, once for each case; it gets the case and a folder."""

    def add(fn: Callable[..., Result]) -> Callable[..., Result]:
        if not cases:
            PROGRAMS[fn.__name__] = fn
        for case in cases:
            name = "-".join(map(str, case)) if isinstance(case, tuple) else str(case)
            PROGRAMS[f"{fn.__name__}[{name}]"] = functools.partial(fn, case)
        return fn

    return lambda fn: add(fn)


def whole(state: jl.State) -> jl.State:
    """An output transform that keeps the final state."""
    return state


def run_both(loop: jl.Loop, data: Any, init_state: Any = None, **options: Any) -> Result:
    """Runs a loop once; the final state, and what its own output transform makes of it."""
    seen: list[Any] = []
    loop = loop.observe("all", lambda snapshot: seen.append(values_of(snapshot)), name="trace")
    state = loop.run(data, init_state, output_transform=whole, **options)
    output = state if loop.output_transform is None else loop.output_transform(state)
    if isinstance(output, jl.State):
        output = None
    elif not isinstance(output, dict | tuple):
        output = arrays_of(output)
    return Result(state, output, seen)


class Stop(Exception):
    """Ends a run in its middle."""


def stop(state: jl.State) -> None:
    """A handler that ends the run with an exception."""
    raise Stop


# --- loops of the user's own step ---


@program(*[(where, fuse) for where in ("host", "device") for fuse in (1, 2, 7, "auto")])
def mlp(case: Any, folder: Path) -> Result:
    """A small network by hand, alone."""
    where, fuse = case
    return run_both(mlp_loop(), mlp_data(where == "device"), epochs=3, fuse=fuse)


@program(*[(where, fuse) for where in ("host", "device") for fuse in (1, 2, 7, "auto")])
def mlp_watched(case: Any, folder: Path) -> Result:
    """The same with handlers that read states, keep them and change metrics."""
    where, fuse = case
    kept: list[jl.State] = []
    loop = (
        mlp_loop()
        .handle("iteration_completed", kept.append, jl.every(3))
        .handle("iteration_started", lambda s: None, {"every": 4, "per": "epoch"})
        .handle("epoch_completed", lambda s: ("continue", s.replace(metrics={**s.metrics, "a": 1})))
    )
    result = run_both(loop, mlp_data(where == "device"), epochs=3, fuse=fuse)
    kept_values = [(one.step_state, dict(one.metrics), one.outputs) for one in kept]
    return result._replace(trace=(result.trace, kept_values))


@program()
def mlp_continued(folder: Path) -> Result:
    """The small network, continued from each state that a handler saw."""
    base, data, kept = mlp_loop(), mlp_data(False), []
    state = base.handle("all", lambda s: kept.append(s)).run(data, epochs=2)
    ends = [base.from_state(one).run(data, epochs=2) for one in kept[::5]]
    return Result(state, None, [(one.step_state, dict(one.history)) for one in ends])


@program(*range(40))
def integers(seed: int, folder: Path) -> Result:
    """A random loop over integers: data, handlers, filters, halts and observers from a seed."""
    return Result(*random_integers(seed))


@program("stream", "eager", "one-shot", "no data", "halted epoch", "changed")
def ways(case: str, folder: Path) -> Result:
    """Other ways to run a loop."""
    loop = mean_loop()
    data = jl.batches(np.arange(28, dtype=np.float32), 4, shuffle=True)
    if case == "stream":
        states = list(loop.stream(data, 0.0, epochs=3))
        return Result(states[-1], None, [(s.step_state, dict(s.history)) for s in states])
    if case == "eager":
        return run_both(loop, data, 0.0, epochs=2, jit=False)
    if case == "one-shot":
        iterator = iter([np.full(4, i, np.float32) for i in range(20)])
        first = loop.run(iterator, 0.0, epochs=2, iterations=3)
        return run_both(loop.from_state(first), iterator, epochs=3, iterations=5)
    if case == "no data":
        pure = jl.loop(lambda _, s: jl.emit(s + 1, x=s)).metric(lambda x: x, "x", "last", ["x"])
        return run_both(pure, None, 0, iterations=300, epochs=2)
    if case == "halted epoch":
        halt = loop.handle("iteration_completed", lambda s: ("halt_epoch", s), jl.only(10))
        return run_both(halt, data, 0.0, epochs=3)
    reset = loop.handle(
        "iteration_completed", lambda s: ("continue", s.replace(step_state=100)), jl.every(5)
    )
    return run_both(reset, data, 0.0, epochs=2)


# --- metrics ---


@program(*[(weights, fuse) for weights in ("none", "weights", "mask") for fuse in (1, "auto")])
def many_metrics(case: Any, folder: Path) -> Result:
    """Every built-in metric and accumulator, over ragged batches, with weights and masks."""
    weights, fuse = case
    loop, data = metrics_loop(weights)
    return run_both(loop, data, epochs=2, fuse=fuse)


@program("plain", "padded", "weighted")
def evaluation(case: str, folder: Path) -> Result:
    """An evaluator over a ragged data set."""
    model = linen_model()
    x, y = X, Y
    arrays = (
        (x, y, np.linspace(0.5, 2, len(x)).astype(np.float32)) if case == "weighted" else (x, y)
    )
    variables = model.init(jax.random.key(3), x[:1], train=False)
    loop = jl.evaluator(model).metric("accuracy")
    loop = loop.metric("softmax_cross_entropy_with_integer_labels")
    return run_both(loop, jl.batches(arrays, 16, pad=case == "padded"), variables)


# --- supervised training ---


@program()
def digits(folder: Path) -> Result:
    """The demo: digits with dropout, validation, early stopping and checkpoints; three epochs."""
    train, validation = jl.datasets.digits()
    path = str(folder / "checkpoints")
    loop = (
        jl.trainer(digits_model(), LOSS, "adam", log=0)
        .metric("accuracy")
        .validate(jl.batches(validation, 128))
        .checkpoint(path, criteria="validation_accuracy", mode="max")
        .early_stop("validation_accuracy", mode="max", patience=8, restore_best=True)
        .resume(path)
    )
    data = jl.batches(train, 32, shuffle=True, pad=True)
    first = loop.run(data, epochs=2, output_transform=whole)
    result = run_both(loop, data, epochs=3)
    saved = jl.restore(path, like=result.state)
    return result._replace(trace=(result.trace, digest(stable(first)), saved.step_state))


@program(*MODELS)
def models(kind: str, folder: Path) -> Result:
    """Every kind of model, with validation between epochs."""
    model, data = MODELS[kind]()
    loss = [(LOSS, 1.0), (LOSS, 0.5)] if kind == "container" else LOSS
    loop = jl.trainer(model, loss, optax.adam(1e-2), log=0)
    if kind != "container":
        loop = loop.metric("accuracy").validate(data)
    return run_both(loop, data, epochs=3)


@program("identity", "static", "dynamic", "own")
def loss_scale(kind: str, folder: Path) -> Result:
    """Every loss scale, with a batch whose gradients are not finite."""
    x = X.copy()
    x[20] = np.inf
    # With "identity" the state would be NaN from there on.
    data = jl.batches((X if kind == "identity" else x, Y), 8, shuffle=True)
    scale: Any = kind
    if kind == "own":
        scale = (
            lambda: jnp.float32(4),
            lambda loss, s: loss * s,
            lambda grads, s: (jax.tree.map(lambda g: g / s, grads), s * 0.5),
        )
    loop = jl.trainer(linen_model(), LOSS, "adam", loss_scale=scale, log=0)
    return run_both(loop, data, epochs=2)


@program(*OPTIMIZERS)
def optimizer(name: str, folder: Path) -> Result:
    """Every optimizer by its name."""
    pair = (lambda key, x: jnp.ones((6, 1)), lambda w, x: x @ w)
    target = np.float32(0.1) * X[:, :1]
    data = jl.batches((X, target), 16)
    return run_both(jl.trainer(pair, "huber", name, log=0), data, epochs=2)


@program(*LOSSES)
def loss(name: str, folder: Path) -> Result:
    """Losses by name, with weights, also as a validation metric."""
    y_true, model = LOSSES[name]()
    weight = np.linspace(0.5, 2, len(X)).astype(np.float32)
    data = jl.batches((X, y_true, weight), 16, pad=True)
    loop = jl.trainer(model, name, optax.sgd(0.05, 0.9), log=0).validate(data)
    return run_both(loop, data, epochs=2)


@program("plateau", "early_stop", "monitor")
def watching(case: str, folder: Path) -> Result:
    """Handlers with a memory."""
    calls: list[Any] = []
    loop = jl.trainer(linen_model(), LOSS, optax.adam(0.3), log=0).metric("accuracy")
    data = jl.batches((X, Y), 8, shuffle=True)
    loop = loop.validate(jl.batches((X[::2], Y[::2]), 16))
    look = {"event": "iteration_completed", "filter": jl.every(3), "patience": 1}
    if case == "plateau":
        loop = loop.reduce_lr_on_plateau("loss", factor=0.5, cooldown=1, min_scale=0.1, **look)
    elif case == "early_stop":
        loop = loop.early_stop("validation_accuracy", mode="max", patience=1, restore_best=True)
    else:
        loop = loop.monitor("loss", lambda s: calls.append(s.step), name="m", **look)
    result = run_both(loop, data, epochs=5)
    return result._replace(trace=(result.trace, calls))


@program(*[(action, fuse) for action in ("skip", "halt", "rewind") for fuse in (1, "auto")])
def nan_guard(case: Any, folder: Path) -> Result:
    """Bad batches, skipped, halted at and rewound from."""
    action, fuse = case
    data = [np.float32(i) for i in range(1, 13)]
    data[4], data[7] = np.float32("nan"), np.float32("inf")
    loop = mean_loop().checkpoint(folder / "a", event="iteration_completed", filter=jl.every(2))
    loop = loop.nan_guard(action, filter=jl.every(3))
    return run_both(loop, data, 0.0, epochs=2, fuse=fuse)


@program("skip")
def nan_guard_trainer(action: str, folder: Path) -> Result:
    """A trainer that skips bad steps, with a mask and a validation."""
    spoilt = X.copy()
    spoilt[7] = np.nan
    loop = jl.trainer(linen_model(), LOSS, optax.adam(0.1), log=0).metric("accuracy")
    loop = loop.nan_guard(action).validate(jl.batches((X, Y), 16, pad=True))
    return run_both(loop, jl.batches((spoilt, Y), 16, pad=True), epochs=2)


# --- resuming ---


@program(*[(kind, at) for kind in RESUMED for at in (3, 9, 13)])
def resumed(case: Any, folder: Path) -> Result:
    """A run that fails in mid-epoch, and resumes from its checkpoint, for each kind of data."""
    kind, at = case
    options = {"epochs": 3, "iterations": 6}
    loop = mean_loop().checkpoint(folder, event="iteration_completed", filter=jl.every(2))
    with contextlib.suppress(Stop):
        loop.handle("iteration_completed", stop, jl.only(at)).run(RESUMED[kind](), 0.0, **options)
    return run_both(loop.resume(folder), RESUMED[kind](), 0.0, **options)


@program("linen", "nnx", "equinox")
def resumed_trainer(kind: str, folder: Path) -> Result:
    """A trainer with everything that fails in mid-epoch, and resumes."""
    model, data = MODELS[kind]()
    look = {"event": "iteration_completed", "filter": jl.every(3)}
    loop = (
        jl.trainer(model, LOSS, optax.adam(0.1), loss_scale="dynamic", log=0)
        .metric("accuracy")
        .validate(data, **look)
        .reduce_lr_on_plateau("validation_loss", patience=1, cooldown=1, factor=0.5, **look)
        .early_stop("loss", patience=50, restore_best=True)
        .checkpoint(folder, event="iteration_completed", filter=jl.every(4))
    )
    with contextlib.suppress(Stop):
        loop.handle("iteration_completed", stop, jl.only(10)).run(data, epochs=3)
    return run_both(loop.resume(folder), data, epochs=3)


@program("plain", "compressed")
def as_bytes(case: str, folder: Path) -> Result:
    """A halted run as bytes, and on from there."""
    loop, data = mlp_loop().early_stop("loss", mode="min"), mlp_data(False)
    halt = loop.handle("iteration_completed", lambda s: ("halt_loop", s), jl.only(11))
    state = halt.run(data, epochs=3)
    saved = jl.serialize_state(state, compress=case == "compressed")
    back = jl.deserialize_state(saved, like=state.step_state)
    result = run_both(loop.from_state(back), data, epochs=4)
    return result._replace(trace=(result.trace, digest(back)))


# --- the command ---


def run_program(name: str) -> dict[str, str]:
    """Runs one program in a folder of its own; returns its digest."""
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = PROGRAMS[name](Path(folder))
        state = stable(result.state)
        return {**digest(state, result.output), "trace": hash_tree(result.trace)}


def differences(found: Any, expected: Any) -> list[str]:
    """A line for each program that does not give what it should."""
    lines = []
    for name, hashes in found.items():
        other = expected.get(name)
        if other is None:
            lines.append(f"{name}: not in the file")
            continue
        wrong = sorted(what for what in hashes | other if hashes.get(what) != other.get(what))
        if wrong:
            lines.append(f"{name}: {', '.join(wrong)}")
    return lines


def main(arguments: list[str] | None = None) -> int:
    """The command; returns 1 if a program fails or differs from those of ``--against``."""
    parser = argparse.ArgumentParser(description=programs.__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="run the programs with one of these in their name")
    parser.add_argument("--against", type=Path, help="compare with the digests in this file")
    options = parser.parse_args(arguments)
    selected = [n for n in PROGRAMS if not options.names or any(s in n for s in options.names)]
    found, failed = {}, []
    for index, name in enumerate(selected):
        print(f"{index + 1}/{len(selected)} {name}", file=sys.stderr)
        try:
            found[name] = run_program(name)
        except Exception:
            traceback.print_exc()
            failed.append(f"{name}: failed")
    if options.against is None:
        print(json.dumps(found, indent=1))
        print("\n".join(failed), file=sys.stderr)
        return bool(failed)
    lines = failed + differences(found, json.loads(options.against.read_text()))
    print("\n".join([*lines, f"{len(selected) - len(lines)} of {len(selected)} are the same"]))
    return bool(lines)


if __name__ == "__main__":
    sys.exit(main())

"""Loops of the user's own step, and what is recorded of their states."""

from __future__ import annotations

import random
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx, struct

import jaxloop as jl
from tests.programs.data import KINDS


def values_of(snapshot: jl.Snapshot) -> Any:
    """What an observer sees at one firing."""
    event = snapshot.event
    counters = (snapshot.epoch, snapshot.iteration, snapshot.step)
    limits = (snapshot.max_epoch, snapshot.max_iteration)
    ending = (str(snapshot.status), snapshot.halted_by)
    counts = snapshot.event_counts[event]
    return event.value, counters, limits, ending, counts, dict(snapshot.metrics)


def arrays_of(output: Any) -> Any:
    """A trained module as a pytree of arrays."""
    if isinstance(output, nnx.Module):
        return nnx.to_pure_dict(nnx.state(output))
    return [leaf for leaf in jax.tree.leaves(output) if hasattr(leaf, "dtype")]


def stable(state: jl.State) -> jl.State:
    """The state without what differs from run to run: names made of temporary folders."""
    memory = {}
    for name, value in state.handler_state.items():
        is_checkpoint = name.startswith("checkpoint")
        memory[f"checkpoint {len(memory)}" if is_checkpoint else name] = value
    return state.replace(handler_state=memory)


def mlp_step(batch: Any, state: Any) -> Any:
    """One step of gradient descent with momentum."""
    x, y = batch

    def objective(params: Any) -> Any:
        logits = jnp.tanh(x @ params["w"]) @ params["v"]
        losses = -jnp.take_along_axis(jax.nn.log_softmax(logits), y[:, None], 1)[:, 0]
        return jnp.mean(losses), (losses, logits)

    (_, (losses, logits)), grads = jax.value_and_grad(objective, has_aux=True)(state["params"])
    moment = jax.tree.map(lambda m, g: 0.9 * m + g, state["moment"], grads)
    params = jax.tree.map(lambda p, m: p - 0.1 * m, state["params"], moment)
    return jl.emit({"params": params, "moment": moment}, loss=losses, y_true=y, y_pred=logits)


def mlp_init(batch: Any, _: Any) -> Any:
    """Parameters and moments of the network."""
    w, v = jax.random.split(jax.random.key(0))
    params = {"w": jax.random.normal(w, (6, 16)), "v": jax.random.normal(v, (16, 3))}
    return {"params": params, "moment": jax.tree.map(jnp.zeros_like, params)}


def mlp_loop() -> Any:
    """The network with two metrics."""
    loop = jl.loop(mlp_step, mlp_init).metric("accuracy")
    return loop.metric(lambda x: x, "loss", None, ["loss"])


def mlp_data(device: bool) -> Any:
    """Its data, shuffled, with a ragged last batch."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(59, 6)).astype(np.float32), rng.integers(0, 3, 59).astype(np.int32)
    return jl.batches((x, y), 8, shuffle=True, device=device)


def mean_loop() -> Any:
    """A running number with the mean of its data."""

    def step(batch: Any, total: Any) -> Any:
        return jl.emit(total * 0.5 + jnp.sum(batch), x=batch)

    return jl.loop(step).metric(lambda x: x, "mean", None, ["x"])


EVENTS = [event.value for event in jl.Event]
IN_EPOCH = {"epoch_started", "iteration_started", "iteration_completed"}


def random_filter(rng: random.Random, depth: int = 2) -> Any:
    """A filter from a few leaves, combined at random."""
    kind = rng.randrange(6 if depth else 2)
    if kind <= 2:
        made = getattr(jl, rng.choice(["every", "only", "after", "before"]))
        return made(rng.randint(1, 6), per=rng.choice([None, "epoch"]))
    if kind == 3:
        return random_filter(rng, depth - 1) & random_filter(rng, depth - 1)
    if kind == 4:
        return random_filter(rng, depth - 1) | random_filter(rng, depth - 1)
    return ~random_filter(rng, depth - 1)


def integer_step(batch: Any, total: Any) -> Any:
    """Exact in 32 bits, and another number for another order."""
    return jl.emit((3 * total + jnp.sum(batch)) % 65536, s=jnp.sum(batch))


# One loop for all seeds, so that they share what was compiled.
INTEGERS = jl.loop(integer_step).metric(
    lambda s: s.astype(jnp.float32), "sum", "running_sum", ["s"]
)


def random_integers(seed: int) -> tuple[Any, None, Any]:
    """Runs the loop of a seed; returns its final state, no output, and its trace."""
    rng = random.Random(seed)
    kind = rng.choice(list(KINDS))
    sizes = [rng.choice([2, 2, 2, 3]) for _ in range(rng.randint(1, 9))]
    if kind in ("batches", "device"):
        sizes = [2] * len(sizes)
    data = KINDS[kind]([np.arange(i, i + size, dtype=np.int32) for i, size in enumerate(sizes)])
    trace: list[Any] = []

    def look(name: str, state: Any) -> None:
        trace.append((name, *values_of(state)))

    loop: Any = INTEGERS
    for index in range(rng.randint(0, 4)):
        events = rng.sample(EVENTS, rng.randint(1, 3))
        action = rng.choice([None, None, None, "halt_loop", "halt_epoch"])
        if action == "halt_epoch" and not set(events) <= IN_EPOCH:
            action = None

        def handler(state: Any, index: int = index, action: str | None = action) -> Any:
            look(f"h{index}", state)
            return None if action is None else (action, state)

        loop = loop.handle(events, handler, random_filter(rng), name=f"h{index}")
    for index in range(rng.randint(1, 3)):
        chosen = random_filter(rng)
        if rng.random() < 0.5:
            # A function makes the driver ask at every firing.
            chosen = chosen & (lambda snapshot: snapshot.step >= 0)
        events = rng.sample(EVENTS, rng.randint(1, 3))
        loop = loop.observe(
            events, lambda s, index=index: look(f"o{index}", s), chosen, name=f"o{index}"
        )
    state = loop.run(
        data,
        0,
        epochs=rng.randint(1, 3),
        iterations=rng.choice([None, None, 1, 4]),
        fuse=rng.choice([1, 2, 5, "auto"]),
    )
    return state, None, trace


@struct.dataclass
class OwnAverage:
    """A metric with the protocol of CLU: the average of ``y_pred``."""

    total: Any
    count: Any

    @classmethod
    def from_model_output(cls, y_pred: Any, **_: Any) -> OwnAverage:
        return cls(jnp.sum(y_pred), jnp.float32(y_pred.size))

    def merge(self, other: Any) -> OwnAverage:
        return OwnAverage(self.total + other.total, self.count + other.count)

    def compute(self) -> Any:
        return self.total / self.count


NAMES = [
    "accuracy",
    "precision",
    "recall",
    "sensitivity",
    "specificity",
    "true_positives",
    "false_positives",
    "true_negatives",
    "false_negatives",
    "mean_absolute_error",
    "mean_squared_error",
    "huber",
    "log_cosh",
]


def metrics_loop(weights: str) -> tuple[Any, Any]:
    """A loop with many metrics over predictions of two classes, and its data."""
    rng = np.random.default_rng(4)
    y = rng.integers(0, 2, 37).astype(np.float32)
    p = rng.random(37).astype(np.float32)
    scores = rng.normal(size=(37, 5)).astype(np.float32)
    arrays = {"y": y, "p": p, "scores": scores}
    if weights == "weights":
        arrays["w"] = rng.random(37).astype(np.float32)

    def step(batch: Any, n: Any) -> Any:
        reported = {"y_true": batch["y"], "y_pred": batch["p"], "scores": batch["scores"]}
        for name in ("w", "mask"):
            if name in batch:
                reported["sample_weight"] = batch[name]
        reported["labels5"] = jnp.argmax(batch["scores"] * batch["p"][:, None], -1)
        return jl.emit(n + jnp.sum(batch["p"]), **reported)

    loop: Any = jl.loop(step, lambda batch, _: jnp.float32(0))
    for name in NAMES:
        loop = loop.metric(name)
    loop = loop.metric(
        jl.metrics.top_k_categorical_accuracy(k=2), "top2", None, ["labels5", "scores"]
    )
    loop = loop.metric(jl.metrics.mean(lambda x: x), "mean_scores", None, ["y_pred"])
    loop = loop.metric(lambda t, p: jnp.abs(t - p), "distance")
    for how in ("running_average", "running_sum", "running_min", "running_max", "last"):
        loop = loop.metric(lambda p: p, how, how, ["y_pred"])
    loop = loop.metric(
        lambda p: jnp.max(p),
        "largest",
        lambda acc, new, i: jnp.maximum(acc, new) + 0 * i,
        ["y_pred"],
    )
    if weights == "none":
        loop = loop.metric(OwnAverage, "own")
    return loop, jl.batches(arrays, 8, shuffle=True, pad=weights == "mask")

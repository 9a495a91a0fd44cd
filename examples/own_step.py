"""Mixup: a step of your own around the step of the trainer.

    python examples/own_step.py

`jl.train_step` returns the trainer's pair of functions. The step of this script mixes the examples
of a batch in pairs, calls the trainer's step on them, and carries its state beside a key.

What a bare step returns has two parts: `.state`, the next step state, and `.outputs`, a dict of
what it reports.

Source: H. Zhang and others, mixup: Beyond empirical risk minimization, 2018.
"""

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

import jaxloop as jl


class MLP(nn.Module):
    @nn.compact
    def __call__(self, images):
        return nn.Dense(10)(nn.relu(nn.Dense(128)(images.reshape(len(images), -1))))


init_fn, train_step = jl.train_step(MLP(), optax.softmax_cross_entropy, optax.adam(1e-3))
eval_init_fn, eval_step = jl.eval_step(MLP())


def init(batch, _):
    images, labels = batch
    return {
        "training": init_fn((images, jax.nn.one_hot(labels, 10)), None),
        "mix_key": jax.random.key(1),
    }


def step(batch, state):
    images, labels = batch[0], jax.nn.one_hot(batch[1], 10)
    mix_key, share_key, order_key = jax.random.split(state["mix_key"], 3)
    share = jax.random.beta(share_key, 0.4, 0.4)
    order = jax.random.permutation(order_key, len(images))
    mixed = jax.tree.map(lambda x: share * x + (1 - share) * x[order], (images, labels))
    result = train_step(mixed, state["training"])
    state = {"training": result.state, "mix_key": mix_key}
    return jl.emit(state, loss=result.outputs["loss"], share=jnp.maximum(share, 1 - share))


def evaluate(batch, state):
    # Reports y_true and y_pred, which is what "accuracy" reads.
    return eval_step(batch, eval_init_fn(batch, state["training"]["model_state"]))


def main():
    train, test = jl.datasets.digits()
    loop = (
        jl.loop(step, init)
        .metric("loss")
        .metric("share")
        .validate(jl.batches(test, 128), eval_step=evaluate, metrics={"accuracy": "accuracy"})
    )
    state = loop.final_state(jl.batches(train, 64, shuffle=True), epochs=20)
    for epoch in range(0, 20, 5):
        values = state.history[epoch]
        print(f"epoch {epoch}: " + ", ".join(f"{n} {v:.3f}" for n, v in values.items()))
    assert state.history[19]["validation_accuracy"] > 0.95


if __name__ == "__main__":
    main()

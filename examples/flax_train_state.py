"""A Flax project with a `TrainState`, moved into jaxloop by one line.

    python examples/flax_train_state.py

`train_step` and `eval_step` are the project's own and stay as they are. `jl.from_train_step` makes
a loop from them: each scalar in their metrics is a metric of its name. The loop brings compiled
blocks, events, checkpoints and exact resume.
"""

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from flax.training import train_state

import jaxloop as jl


class CNN(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = nn.Conv(8, (3, 3))(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9)(x))
        x = nn.avg_pool(x, (2, 2), (2, 2))
        return nn.Dense(10)(x.reshape(len(x), -1))


class TrainState(train_state.TrainState):
    batch_stats: dict


def create_train_state(seed=0):
    model = CNN()
    variables = model.init(jax.random.key(seed), jnp.zeros((1, 8, 8, 1)), train=False)
    return TrainState.create(
        apply_fn=model.apply,
        params=variables["params"],
        batch_stats=variables["batch_stats"],
        tx=optax.sgd(0.05, momentum=0.9),
    )


@jax.jit
def train_step(state, batch):
    images, labels = batch

    def loss_fn(params):
        variables = {"params": params, "batch_stats": state.batch_stats}
        logits, updates = state.apply_fn(variables, images, train=True, mutable=["batch_stats"])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return losses.mean(), (logits, updates)

    (loss, (logits, updates)), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
    state = state.apply_gradients(grads=grads, batch_stats=updates["batch_stats"])
    return state, {"loss": loss, "accuracy": jnp.mean(jnp.argmax(logits, axis=-1) == labels)}


@jax.jit
def eval_step(state, batch):
    images, labels = batch
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    logits = state.apply_fn(variables, images, train=False)
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
    return {"loss": loss, "accuracy": jnp.mean(jnp.argmax(logits, axis=-1) == labels)}


def train(data, held_out, *, epochs):
    # --- the loop
    loop = jl.from_train_step(train_step, eval_step=eval_step).validate(held_out)
    return loop.run(data, create_train_state(), epochs=epochs)
    # --- end


def main():
    train_digits, test_digits = jl.datasets.digits()
    data = jl.batches(train_digits, 32, shuffle=True)
    state = train(data, jl.batches(test_digits, 128), epochs=5)
    for epoch, values in state.history.items():
        print(f"epoch {epoch}: " + ", ".join(f"{n} {v:.3f}" for n, v in values.items()))
    assert state.history[4]["validation_accuracy"] > 0.95
    assert state.step_state.step == state.step


if __name__ == "__main__":
    main()

"""Handwritten digits, classified by a Flax Linen, a Flax NNX and an Equinox model.

    python examples/digits.py

One loop trains all three. What `train` returns holds the history of the metrics, and
`loop.output(state)` is the trained model as its framework knows it.
"""

import equinox as eqx
import jax
import optax
from flax import linen as nn
from flax import nnx

import jaxloop as jl


class LinenMLP(nn.Module):
    @nn.compact
    def __call__(self, images):
        hidden = nn.relu(nn.Dense(64)(images.reshape(len(images), -1)))
        return nn.Dense(10)(hidden)


class NNXMLP(nnx.Module):
    def __init__(self, rngs):
        self.hidden = nnx.Linear(64, 64, rngs=rngs)
        self.out = nnx.Linear(64, 10, rngs=rngs)

    def __call__(self, images):
        return self.out(nnx.relu(self.hidden(images.reshape(len(images), -1))))


class EquinoxMLP(eqx.Module):
    hidden: eqx.nn.Linear
    out: eqx.nn.Linear

    def __init__(self, key):
        hidden_key, out_key = jax.random.split(key)
        self.hidden = eqx.nn.Linear(64, 64, key=hidden_key)
        self.out = eqx.nn.Linear(64, 10, key=out_key)

    def __call__(self, image):  # one image: the trainer maps an Equinox module over the batch
        return self.out(jax.nn.relu(self.hidden(image.reshape(-1))))


def train(model, data, held_out, *, epochs):
    # --- the loop
    loss = optax.softmax_cross_entropy_with_integer_labels
    loop = jl.trainer(model, loss, optax.adam(1e-3), log=0).metric("accuracy").validate(held_out)
    return loop.final_state(data, epochs=epochs)
    # --- end


def main():
    train_digits, test_digits = jl.datasets.digits()
    data = jl.batches(train_digits, 32, shuffle=True)
    held_out = jl.batches(test_digits, 128)
    models = {
        "Linen": LinenMLP(),
        "NNX": NNXMLP(nnx.Rngs(0)),
        "Equinox": EquinoxMLP(jax.random.key(0)),
    }
    for name, model in models.items():
        state = train(model, data, held_out, epochs=10)
        accuracy = state.history[9]["validation_accuracy"]
        print(f"{name}: validation accuracy {accuracy:.1%}")
        assert accuracy > 0.93


if __name__ == "__main__":
    main()

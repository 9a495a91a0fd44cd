"""A variational autoencoder: a loss that needs more than targets and predictions.

    python examples/vae.py

An objective gets the model and the batch. `key=True` gives it a new random key at each step, and
`train=True` tells it whether it trains. What it returns beside the loss is reported: a metric of
that name averages it, in training and, as `validation_kl`, in validation.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

import jaxloop as jl

NUM_LATENTS = 8


class VAE(nn.Module):
    @nn.compact
    def __call__(self, pixels, noise):
        hidden = nn.relu(nn.Dense(128)(pixels))
        mean, log_variance = nn.Dense(NUM_LATENTS)(hidden), nn.Dense(NUM_LATENTS)(hidden)
        latents = mean + jnp.exp(log_variance / 2) * noise
        return nn.Dense(64)(nn.relu(nn.Dense(128)(latents))), mean, log_variance


def kl_divergence(mean, log_variance):
    """From a standard normal distribution, ``(batch,)``."""
    return 0.5 * jnp.sum(jnp.exp(log_variance) + mean**2 - 1 - log_variance, axis=-1)


def train(data, held_out, *, epochs):
    # --- the loop
    @jl.objective(key=True, train=True)
    def vae_loss(model, pixels, *, key, train):
        noise = jax.random.normal(key, (len(pixels), NUM_LATENTS)) * train
        logits, mean, log_variance = model(pixels, noise)
        kl = kl_divergence(mean, log_variance)
        return optax.sigmoid_binary_cross_entropy(logits, pixels).sum(axis=-1) + kl, {"kl": kl}

    loop = jl.trainer(VAE(), vae_loss, optax.adam(1e-3), log=0).metric("kl").validate(held_out)
    return loop.final_state(data, epochs=epochs)
    # --- end


def main():
    (train_images, _), (test_images, _) = jl.datasets.digits()
    data = jl.batches(train_images.reshape(-1, 64), 64, shuffle=True)
    state = train(data, jl.batches(test_images.reshape(-1, 64), 128), epochs=40)
    for epoch in range(0, 40, 13):
        values = state.history[epoch]
        print(f"epoch {epoch}: " + ", ".join(f"{n} {v:.2f}" for n, v in values.items()))
    losses = np.asarray([values["validation_loss"] for values in state.history.values()])
    assert losses[-1] < 0.7 * losses[0]


if __name__ == "__main__":
    main()

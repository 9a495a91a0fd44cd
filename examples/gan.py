"""A GAN: two models and two optimizers in a step of your own.

    python examples/gan.py

`jl.loop` takes any pure step. The step returns the next state and, through `jl.emit`, what it
reports. A metric with the name of a reported value is its average over the epoch.
"""

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from flax.training.train_state import TrainState

import jaxloop as jl

NOISE_SIZE = 16


class Generator(nn.Module):
    @nn.compact
    def __call__(self, noise):
        return nn.sigmoid(nn.Dense(64)(nn.relu(nn.Dense(128)(noise))))


class Discriminator(nn.Module):
    @nn.compact
    def __call__(self, pixels):
        return nn.Dense(1)(nn.leaky_relu(nn.Dense(128)(pixels)))[:, 0]


def init(seed=0):
    generator_key, discriminator_key, key = jax.random.split(jax.random.key(seed), 3)

    def make(model, model_key, num_inputs):
        params = model.init(model_key, jnp.zeros((1, num_inputs)))
        return TrainState.create(apply_fn=model.apply, params=params, tx=optax.adam(2e-4, b1=0.5))

    return {
        "generator": make(Generator(), generator_key, NOISE_SIZE),
        "discriminator": make(Discriminator(), discriminator_key, 64),
        "key": key,
    }


def discriminator_loss(discriminator, params, real, fake):
    """One value per example: small if real pixels score high and fake ones low."""
    real_score = discriminator.apply_fn(params, real)
    fake_score = discriminator.apply_fn(params, fake)
    return jax.nn.softplus(-real_score) + jax.nn.softplus(fake_score)


def step(pixels, state):
    generator, discriminator = state["generator"], state["discriminator"]
    key, noise_key = jax.random.split(state["key"])
    noise = jax.random.normal(noise_key, (len(pixels), NOISE_SIZE))

    def of_discriminator(params):
        fake = generator.apply_fn(generator.params, noise)
        losses = discriminator_loss(discriminator, params, pixels, fake)
        return losses.mean(), losses

    grads, d_losses = jax.grad(of_discriminator, has_aux=True)(discriminator.params)
    discriminator = discriminator.apply_gradients(grads=grads)

    def of_generator(params):
        score = discriminator.apply_fn(discriminator.params, generator.apply_fn(params, noise))
        losses = jax.nn.softplus(-score)
        return losses.mean(), losses

    grads, g_losses = jax.grad(of_generator, has_aux=True)(generator.params)
    generator = generator.apply_gradients(grads=grads)
    state = {"generator": generator, "discriminator": discriminator, "key": key}
    return jl.emit(state, discriminator_loss=d_losses, generator_loss=g_losses)


def train(data, *, epochs):
    # --- the loop
    loop = jl.loop(step).metric("generator_loss").metric("discriminator_loss")
    return loop.final_state(data, init(), epochs=epochs)
    # --- end


def main():
    (images, _), _ = jl.datasets.digits()
    data = jl.batches(images.reshape(-1, 64), 64, shuffle=True, drop_remainder=True)
    state = train(data, epochs=60)
    for epoch in range(0, 60, 15):
        values = state.history[epoch]
        print(f"epoch {epoch}: " + ", ".join(f"{n} {v:.3f}" for n, v in values.items()))
    generator = state.step_state["generator"]
    noise = jax.random.normal(jax.random.key(1), (500, NOISE_SIZE))
    fake = generator.apply_fn(generator.params, noise)
    distance = float(jnp.abs(fake.mean(0) - images.reshape(-1, 64).mean(0)).mean())
    print(f"the mean image of the fakes differs from the real one by {distance:.3f} a pixel")
    assert distance < 0.1


if __name__ == "__main__":
    main()

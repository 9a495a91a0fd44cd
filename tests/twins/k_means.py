"""The twin of ``examples/k_means.py``."""

import jax
import jax.numpy as jnp

from tests.twins import load

k_means = load("k_means")


@jax.jit
def assign(pixels, centers, sums, counts):
    distances = jnp.sum((pixels[:, None] - centers) ** 2, axis=-1)
    nearest = jax.nn.one_hot(jnp.argmin(distances, axis=-1), len(centers))
    return sums + nearest.T @ pixels, counts + nearest.sum(axis=0), distances.min(axis=-1)


def train(data, centers, *, epochs):
    # --- the loop
    history = []
    best, epochs_without = float("inf"), 0
    for epoch in range(epochs):
        sums, counts = jnp.zeros_like(centers), jnp.zeros(len(centers))
        total = num_examples = 0
        for pixels in data(epoch):
            sums, counts, distances = assign(pixels, centers, sums, counts)
            total += float(distances.sum())
            num_examples += len(pixels)
        centers = jax.jit(k_means.next_centers)(sums, counts, centers)
        distance = total / num_examples
        history.append({"distance": distance})
        if distance < best - 0.01:
            best, epochs_without = distance, 0
        else:
            epochs_without += 1
        if epochs_without == 2:
            break
    return history
    # --- end


def moments(data, num_features):
    count, mean, squares = jnp.zeros(()), jnp.zeros(num_features), jnp.zeros(num_features)

    @jax.jit
    def merge(pixels, count, mean, squares):
        total = count + len(pixels)
        delta = pixels.mean(axis=0) - mean
        squares = squares + len(pixels) * (pixels.var(axis=0) + delta**2 * count / total)
        return total, mean + delta * len(pixels) / total, squares

    # --- the loop
    for pixels in data:
        count, mean, squares = merge(pixels, count, mean, squares)
    return mean, squares / count
    # --- end

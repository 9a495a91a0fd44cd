"""K-means, mean and variance: loops without gradients.

    python examples/k_means.py

The step of `train` collects the sums of an epoch, and a handler moves the centers when the epoch
ends. The step of `moments` carries the mean and the variance of everything that it has seen.
"""

import jax
import jax.numpy as jnp
import numpy as np

import jaxloop as jl


def step(pixels, state):
    differences = pixels[:, None] - state["centers"]
    distances = jnp.sum(differences**2, axis=-1)
    nearest = jax.nn.one_hot(jnp.argmin(distances, axis=-1), len(state["centers"]))
    state = {
        "centers": state["centers"],
        "sums": state["sums"] + nearest.T @ pixels,
        "counts": state["counts"] + nearest.sum(axis=0),
    }
    return jl.emit(state, distance=distances.min(axis=-1))


def init(centers):
    return {
        "centers": centers,
        "sums": jnp.zeros_like(centers),
        "counts": jnp.zeros(len(centers)),
    }


def next_centers(sums, counts, centers):
    """The mean of each cluster; an empty cluster keeps its center."""
    return jnp.where(counts[:, None] > 0, sums / jnp.maximum(counts, 1)[:, None], centers)


def train(data, centers, *, epochs):
    # --- the loop
    def move_centers(state):
        s = state.step_state
        centers = next_centers(s["sums"], s["counts"], s["centers"])
        return jl.Status.CONTINUE, state.replace(step_state=init(centers))

    loop = jl.loop(step).metric("distance").handle("epoch_completed", move_centers)
    loop = loop.early_stop("distance", mode="min", min_delta=0.01, patience=2)
    return loop.final_state(data, init(centers), epochs=epochs)
    # --- end


def moments_step(pixels, state):
    """Merges the moments of a batch (Chan, Golub and LeVeque, 1979)."""
    count, mean, squares = state["count"], state["mean"], state["squares"]
    total = count + len(pixels)
    delta = pixels.mean(axis=0) - mean
    return {
        "count": total,
        "mean": mean + delta * len(pixels) / total,
        "squares": squares + len(pixels) * (pixels.var(axis=0) + delta**2 * count / total),
    }


def moments(data, num_features):
    zeros = jnp.zeros(num_features)
    first = {"count": jnp.zeros(()), "mean": zeros, "squares": zeros}
    # --- the loop
    final = jl.loop(moments_step).final_state(data, first).step_state
    return final["mean"], final["squares"] / final["count"]
    # --- end


def main():
    (images, labels), _ = jl.datasets.digits()
    pixels = images.reshape(-1, 64)
    data = jl.batches(pixels, 128)
    state = train(data, jnp.asarray(pixels[:20]), epochs=50)
    distances = [float(values["distance"]) for values in state.history.values()]
    print(f"{len(distances)} epochs")
    print(f"the mean distance fell from {distances[0]:.2f} to {distances[-1]:.2f}")

    differences = pixels[:, None] - np.asarray(state.step_state["centers"])
    clusters = np.sum(differences**2, axis=-1).argmin(axis=-1)
    pure = sum(np.bincount(labels[clusters == c]).max() for c in set(clusters)) / len(labels)
    print(f"{pure:.1%} of the digits are in a cluster of their own kind")

    mean, variance = moments(data, 64)
    error = float(np.abs(np.sqrt(variance) - pixels.std(axis=0)).max())
    print(f"mean pixel {float(mean.mean()):.4f}; the deviations differ from NumPy's by {error:.0e}")
    assert pure > 0.7 and error < 1e-5


if __name__ == "__main__":
    main()

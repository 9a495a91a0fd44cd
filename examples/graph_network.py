"""A graph network that labels nodes: padded graphs, and a weight for each node.

    python examples/graph_network.py

A node is an image of a digit. Edges join it to the images that look most like it. Some nodes show
their label, and the network tells the labels of the others from what their neighbors show. Graphs
differ in size, so they are padded. Padding and nodes that show their label have weight 0.

Source: T. N. Kipf and M. Welling, Semi-supervised classification with graph convolutional networks,
2017.
"""

import jax
import numpy as np
import optax
from flax import linen as nn

import jaxloop as jl

MAX_NODES, NUM_NEIGHBORS, NUM_CLASSES = 128, 5, 10


def graph(pixels, labels, random):
    """Makes one padded graph of ``(nodes, 64)`` pixels as a dict of arrays."""
    num_nodes = len(pixels)
    distances = np.sum((pixels[:, None] - pixels) ** 2, axis=-1)
    nearest = np.argsort(distances, axis=1)[:, : NUM_NEIGHBORS + 1]  # each node is its own nearest
    edges = np.zeros((MAX_NODES, MAX_NODES), np.float32)
    edges[np.arange(num_nodes)[:, None], nearest] = 1
    edges = np.maximum(edges, edges.T)
    degree = np.maximum(edges.sum(axis=1), 1)
    shown = random.random(num_nodes) < 0.5
    nodes = np.zeros((MAX_NODES, NUM_CLASSES + 1), np.float32)  # the label, or the last if hidden
    nodes[np.arange(num_nodes), np.where(shown, labels, NUM_CLASSES)] = 1
    padding = (0, MAX_NODES - num_nodes)
    return {
        "nodes": nodes,
        "edges": edges / np.sqrt(degree[:, None] * degree),
        "labels": np.pad(labels, padding),
        "weight": np.pad(1 - shown.astype(np.float32), padding),
    }


def graphs(images, labels, num_graphs):
    """Draws graphs of 80 to 128 images each: a dict of arrays ``(num_graphs, ...)``."""
    random, made = np.random.default_rng(0), []
    for _ in range(num_graphs):
        chosen = random.choice(len(images), random.integers(80, MAX_NODES + 1), replace=False)
        made.append(graph(images[chosen].reshape(-1, 64), labels[chosen], random))
    return jax.tree.map(lambda *leaves: np.stack(leaves), *made)


class GraphNetwork(nn.Module):
    @nn.compact
    def __call__(self, nodes, edges):
        for _ in range(2):
            nodes = nn.relu(nn.Dense(64)(edges @ nodes))
        return nn.Dense(NUM_CLASSES)(nodes)


def train(data, held_out, *, epochs):
    # --- the loop
    @jl.objective
    def node_loss(model, batch):
        logits, labels = model(batch["nodes"], batch["edges"]), batch["labels"]
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return losses, {"y_true": labels, "y_pred": logits, "sample_weight": batch["weight"]}

    loop = jl.trainer(GraphNetwork(), node_loss, optax.adam(1e-2), log=0)
    loop = loop.metric("accuracy").validate(held_out)
    return loop.final_state(data, epochs=epochs)
    # --- end


def main():
    train_digits, test_digits = jl.datasets.digits()
    data = jl.batches(graphs(*train_digits, 200), 8, shuffle=True)
    state = train(data, jl.batches(graphs(*test_digits, 40), 8), epochs=20)
    for epoch in range(0, 20, 6):
        values = state.history[epoch]
        print(f"epoch {epoch}: " + ", ".join(f"{n} {v:.3f}" for n, v in values.items()))
    assert state.history[19]["validation_accuracy"] > 0.75


if __name__ == "__main__":
    main()

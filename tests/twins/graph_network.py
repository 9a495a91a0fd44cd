"""The twin of ``examples/graph_network.py``."""

import jax
import jax.numpy as jnp
import optax

from tests.twins import load

graph_network = load("graph_network")


def train(variables, data, held_out, *, epochs):
    model = graph_network.GraphNetwork()
    # --- the loop
    optimizer = optax.adam(1e-2)

    def loss_fn(variables, batch):
        logits, labels = model.apply(variables, batch["nodes"], batch["edges"]), batch["labels"]
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        total_weight = jnp.sum(batch["weight"])
        correct = jnp.sum((jnp.argmax(logits, axis=-1) == labels) * batch["weight"])
        return jnp.sum(losses * batch["weight"]) / total_weight, (correct, total_weight)

    @jax.jit
    def train_step(variables, optimizer_state, batch):
        gradient = jax.value_and_grad(loss_fn, has_aux=True)
        (loss, (correct, weight)), grads = gradient(variables, batch)
        updates, optimizer_state = optimizer.update(grads, optimizer_state, variables)
        return optax.apply_updates(variables, updates), optimizer_state, loss, correct, weight

    eval_step = jax.jit(loss_fn)
    optimizer_state = optimizer.init(variables)
    history = []
    for epoch in range(epochs):
        total_loss = total_correct = total_weight = 0
        for batch in data(epoch):
            variables, optimizer_state, loss, correct, weight = train_step(
                variables, optimizer_state, batch
            )
            total_loss += float(loss) * float(weight)
            total_correct += float(correct)
            total_weight += float(weight)
        values = {"loss": total_loss / total_weight, "accuracy": total_correct / total_weight}
        total_loss = total_correct = total_weight = 0
        for batch in held_out:
            loss, (correct, weight) = eval_step(variables, batch)
            total_loss += float(loss) * float(weight)
            total_correct += float(correct)
            total_weight += float(weight)
        values["validation_loss"] = total_loss / total_weight
        values["validation_accuracy"] = total_correct / total_weight
        history.append(values)
    return history
    # --- end

"""The twin of ``examples/distillation.py``."""

import jax
import jax.numpy as jnp
import optax

from tests.twins import load

distillation = load("distillation")


def train(variables, teacher, data, held_out, *, epochs):
    # --- the loop
    optimizer = optax.adam(3e-3)

    def loss_fn(variables, batch):
        images, labels = batch
        logits = distillation.STUDENT.apply(variables, images)
        soft = distillation.distance(distillation.TEACHER.apply(teacher, images), logits).mean()
        hard = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
        accuracy = jnp.mean(jnp.argmax(logits, axis=-1) == labels)
        loss = soft + 0.1 * hard
        return loss, {"loss": loss, "soft": soft, "accuracy": accuracy}

    @jax.jit
    def train_step(variables, optimizer_state, batch):
        grads, metrics = jax.grad(loss_fn, has_aux=True)(variables, batch)
        updates, optimizer_state = optimizer.update(grads, optimizer_state, variables)
        return optax.apply_updates(variables, updates), optimizer_state, metrics

    @jax.jit
    def eval_step(variables, batch):
        return loss_fn(variables, batch)[1]

    optimizer_state = optimizer.init(variables)
    history = []
    for epoch in range(epochs):
        totals, num_examples = {"loss": 0.0, "soft": 0.0, "accuracy": 0.0}, 0
        for batch in data(epoch):
            variables, optimizer_state, metrics = train_step(variables, optimizer_state, batch)
            num_examples += len(batch[0])
            for name in totals:
                totals[name] += float(metrics[name]) * len(batch[0])
        values = {name: total / num_examples for name, total in totals.items()}
        totals, num_examples = {"loss": 0.0, "soft": 0.0, "accuracy": 0.0}, 0
        for batch in held_out:
            metrics = eval_step(variables, batch)
            num_examples += len(batch[0])
            for name in totals:
                totals[name] += float(metrics[name]) * len(batch[0])
        values.update({f"validation_{name}": v / num_examples for name, v in totals.items()})
        history.append(values)
    return history
    # --- end

"""The twin of ``examples/digits.py`` with Equinox."""

import equinox as eqx
import jax
import jax.numpy as jnp
import optax


def train(model, data, held_out, *, epochs):
    # --- the loop
    optimizer = optax.adam(1e-3)

    def loss_fn(model, batch):
        images, labels = batch
        logits = jax.vmap(model)(images)
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
        correct = jnp.sum(jnp.argmax(logits, axis=-1) == labels)
        return loss, correct

    @eqx.filter_jit
    def train_step(model, optimizer_state, batch):
        (loss, correct), grads = eqx.filter_value_and_grad(loss_fn, has_aux=True)(model, batch)
        params = eqx.filter(model, eqx.is_inexact_array)
        updates, optimizer_state = optimizer.update(grads, optimizer_state, params)
        return eqx.apply_updates(model, updates), optimizer_state, loss, correct

    eval_step = eqx.filter_jit(loss_fn)
    optimizer_state = optimizer.init(eqx.filter(model, eqx.is_inexact_array))
    history = []
    for epoch in range(epochs):
        total_loss = total_correct = num_examples = 0
        for batch in data(epoch):
            batch = jax.device_put(batch)
            model, optimizer_state, loss, correct = train_step(model, optimizer_state, batch)
            total_loss += float(loss) * len(batch[0])
            total_correct += int(correct)
            num_examples += len(batch[0])
        values = {"loss": total_loss / num_examples, "accuracy": total_correct / num_examples}
        total_loss = total_correct = num_examples = 0
        for batch in held_out:
            loss, correct = eval_step(model, jax.device_put(batch))
            total_loss += float(loss) * len(batch[0])
            total_correct += int(correct)
            num_examples += len(batch[0])
        values["validation_loss"] = total_loss / num_examples
        values["validation_accuracy"] = total_correct / num_examples
        history.append(values)
    return history
    # --- end

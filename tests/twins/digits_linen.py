"""The twin of ``examples/digits.py`` with Flax Linen."""

import jax
import jax.numpy as jnp
import optax


def train(model, variables, data, held_out, *, epochs):
    # --- the loop
    optimizer = optax.adam(1e-3)

    def loss_fn(variables, batch):
        images, labels = batch
        logits = model.apply(variables, images)
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
        correct = jnp.sum(jnp.argmax(logits, axis=-1) == labels)
        return loss, correct

    @jax.jit
    def train_step(variables, optimizer_state, batch):
        gradient = jax.value_and_grad(loss_fn, has_aux=True)
        (loss, correct), grads = gradient(variables, batch)
        updates, optimizer_state = optimizer.update(grads, optimizer_state, variables)
        return optax.apply_updates(variables, updates), optimizer_state, loss, correct

    eval_step = jax.jit(loss_fn)
    optimizer_state = optimizer.init(variables)
    history = []
    for epoch in range(epochs):
        total_loss = total_correct = num_examples = 0
        for batch in data(epoch):
            variables, optimizer_state, loss, correct = train_step(
                variables, optimizer_state, batch
            )
            total_loss += float(loss) * len(batch[0])
            total_correct += int(correct)
            num_examples += len(batch[0])
        values = {"loss": total_loss / num_examples, "accuracy": total_correct / num_examples}
        total_loss = total_correct = num_examples = 0
        for batch in held_out:
            loss, correct = eval_step(variables, batch)
            total_loss += float(loss) * len(batch[0])
            total_correct += int(correct)
            num_examples += len(batch[0])
        values["validation_loss"] = total_loss / num_examples
        values["validation_accuracy"] = total_correct / num_examples
        history.append(values)
    return history
    # --- end

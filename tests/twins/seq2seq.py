"""The twin of ``examples/seq2seq.py``."""

import jax
import jax.numpy as jnp
import optax

from tests.twins import load

seq2seq = load("seq2seq")


def train(variables, data, held_out, *, epochs):
    model = seq2seq.Seq2Seq()
    # --- the loop
    optimizer = optax.adam(5e-3)

    def loss_fn(variables, batch):
        logits, target = model.apply(variables, *seq2seq.inputs(batch)), batch["target"]
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, target)
        mask = seq2seq.mask(batch)
        num_tokens = jnp.sum(mask)
        correct = jnp.sum((jnp.argmax(logits, axis=-1) == target) & mask)
        return jnp.sum(losses * mask) / num_tokens, (correct, num_tokens)

    @jax.jit
    def train_step(variables, optimizer_state, batch):
        gradient = jax.value_and_grad(loss_fn, has_aux=True)
        (loss, (correct, num_tokens)), grads = gradient(variables, batch)
        updates, optimizer_state = optimizer.update(grads, optimizer_state, variables)
        return optax.apply_updates(variables, updates), optimizer_state, loss, correct, num_tokens

    eval_step = jax.jit(loss_fn)
    optimizer_state = optimizer.init(variables)
    history = []
    for epoch in range(epochs):
        total_loss = total_correct = total_tokens = 0
        for batch in data(epoch):
            variables, optimizer_state, loss, correct, num_tokens = train_step(
                variables, optimizer_state, batch
            )
            total_loss += float(loss) * int(num_tokens)
            total_correct += int(correct)
            total_tokens += int(num_tokens)
        values = {"loss": total_loss / total_tokens, "accuracy": total_correct / total_tokens}
        total_loss = total_correct = total_tokens = 0
        for batch in held_out:
            loss, (correct, num_tokens) = eval_step(variables, batch)
            total_loss += float(loss) * int(num_tokens)
            total_correct += int(correct)
            total_tokens += int(num_tokens)
        values["validation_loss"] = total_loss / total_tokens
        values["validation_accuracy"] = total_correct / total_tokens
        history.append(values)
    return history
    # --- end

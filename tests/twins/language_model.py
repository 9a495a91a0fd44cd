"""The twin of ``examples/language_model.py``."""

import math

import jax
import optax

from tests.twins import load

language_model = load("language_model")


def train(variables, data, held_out, *, steps):
    model = language_model.Transformer()
    # --- the loop
    optimizer = language_model.OPTIMIZER

    def loss_fn(variables, tokens):
        logits = model.apply(variables, tokens[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

    @jax.jit
    def train_step(variables, optimizer_state, tokens):
        loss, grads = jax.value_and_grad(loss_fn)(variables, tokens)
        updates, optimizer_state = optimizer.update(grads, optimizer_state, variables)
        return optax.apply_updates(variables, updates), optimizer_state, loss

    eval_step = jax.jit(loss_fn)
    optimizer_state = optimizer.init(variables)
    history, step, epoch = [], 0, 0
    while step < steps:
        total = num_examples = 0
        for tokens in data(epoch):
            if step == steps:
                break
            variables, optimizer_state, loss = train_step(variables, optimizer_state, tokens)
            total += float(loss) * len(tokens)
            num_examples += len(tokens)
            step += 1
        values = {"loss": total / num_examples, "bits": total / num_examples / math.log(2)}
        total = num_examples = 0
        for tokens in held_out:
            total += float(eval_step(variables, tokens)) * len(tokens)
            num_examples += len(tokens)
        values["validation_loss"] = total / num_examples
        values["validation_bits"] = total / num_examples / math.log(2)
        history.append(values)
        epoch += 1
    return history
    # --- end

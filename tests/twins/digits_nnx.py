"""The twin of ``examples/digits.py`` with Flax NNX."""

import jax
import jax.numpy as jnp
import optax
from flax import nnx


def train(model, data, held_out, *, epochs):
    # --- the loop
    model = nnx.clone(model)
    optimizer = nnx.Optimizer(model, optax.adam(1e-3), wrt=nnx.Param)

    def loss_fn(model, batch):
        images, labels = batch
        logits = model(images)
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
        correct = jnp.sum(jnp.argmax(logits, axis=-1) == labels)
        return loss, correct

    @nnx.jit
    def train_step(model, optimizer, batch):
        (loss, correct), grads = nnx.value_and_grad(loss_fn, has_aux=True)(model, batch)
        optimizer.update(model, grads)
        return loss, correct

    eval_step = nnx.jit(loss_fn)
    history = []
    for epoch in range(epochs):
        total_loss = total_correct = num_examples = 0
        for batch in data(epoch):
            loss, correct = train_step(model, optimizer, jax.device_put(batch))
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

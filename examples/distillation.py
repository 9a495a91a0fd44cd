"""Distillation: a small student learns from the predictions of a frozen teacher.

    python examples/distillation.py

The teacher is an ordinary trained model. The objective closes over it, and only the student, which
the trainer knows, is trained.

Source: G. Hinton, O. Vinyals and J. Dean, Distilling the knowledge in a neural network, 2015.
"""

import jax
import optax
from flax import linen as nn

import jaxloop as jl

TEMPERATURE = 3.0


class MLP(nn.Module):
    num_hidden: int

    @nn.compact
    def __call__(self, images):
        hidden = nn.relu(nn.Dense(self.num_hidden)(images.reshape(len(images), -1)))
        return nn.Dense(10)(hidden)


TEACHER, STUDENT = MLP(256), MLP(8)


def train_teacher(data, *, epochs):
    loss = optax.softmax_cross_entropy_with_integer_labels
    return jl.trainer(TEACHER, loss, optax.adam(1e-3), log=0).run(data, epochs=epochs)


def distance(teacher_logits, student_logits):
    """The Kullback-Leibler divergence of the softened predictions, ``(batch,)``."""
    teacher = jax.nn.softmax(teacher_logits / TEMPERATURE)
    student = jax.nn.log_softmax(student_logits / TEMPERATURE)
    return TEMPERATURE**2 * optax.losses.kl_divergence(student, teacher)


def train(teacher, data, held_out, *, epochs):
    # --- the loop
    @jl.objective
    def distillation_loss(model, batch):
        images, labels = batch
        logits = model(images)
        soft = distance(TEACHER.apply(teacher, images), logits)
        hard = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return soft + 0.1 * hard, {"soft": soft, "y_true": labels, "y_pred": logits}

    loop = jl.trainer(STUDENT, distillation_loss, optax.adam(3e-3), log=0)
    loop = loop.metric("soft").metric("accuracy").validate(held_out)
    return loop.final_state(data, epochs=epochs)
    # --- end


def main():
    train_digits, test_digits = jl.datasets.digits()
    data = jl.batches(train_digits, 32, shuffle=True)
    teacher = train_teacher(data, epochs=10)
    state = train(teacher, data, jl.batches(test_digits, 128), epochs=20)
    for epoch in range(0, 20, 6):
        values = state.history[epoch]
        print(f"epoch {epoch}: " + ", ".join(f"{n} {v:.3f}" for n, v in values.items()))
    assert state.history[19]["validation_accuracy"] > 0.9


if __name__ == "__main__":
    main()

"""A sequence-to-sequence model that spells words backwards: lengths and masks.

    python examples/seq2seq.py

The words come from the help texts of Python, and are padded to one length. The objective returns a
loss for each token, and a `sample_weight` of the same shape that leaves out the padding. It
weights the loss and every metric.
"""

import pydoc_data.topics
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

import jaxloop as jl

MAX_LENGTH, NUM_TOKENS = 8, 28  # 0 is padding, 1 to 26 are letters, 27 starts a word


def words():
    """All words of 3 to 8 letters as ``{"source", "target": (num_words, 8), "length"}``."""
    text = " ".join(pydoc_data.topics.topics.values()).lower()
    found = sorted(set(re.findall(rf"\b[a-z]{{3,{MAX_LENGTH}}}\b", text)))
    np.random.default_rng(0).shuffle(found)

    def encode(word):
        return [ord(letter) - ord("a") + 1 for letter in word] + [0] * (MAX_LENGTH - len(word))

    return {
        "source": np.array([encode(word) for word in found], np.int32),
        "target": np.array([encode(word[::-1]) for word in found], np.int32),
        "length": np.array([len(word) for word in found], np.int32),
    }


class Seq2Seq(nn.Module):
    @nn.compact
    def __call__(self, source, length, previous):
        embed = nn.Embed(NUM_TOKENS, 32)
        encoder = nn.RNN(nn.GRUCell(96), return_carry=True)
        carry, _ = encoder(embed(source), seq_lengths=length)
        decoded = nn.RNN(nn.GRUCell(96))(embed(previous), initial_carry=carry)
        return nn.Dense(NUM_TOKENS)(decoded)


def inputs(batch):
    """The arguments of the model: the decoder sees the target shifted by one token."""
    start = jnp.full((len(batch["target"]), 1), NUM_TOKENS - 1)
    previous = jnp.concatenate([start, batch["target"][:, :-1]], axis=1)
    return batch["source"], batch["length"], previous


def mask(batch):
    return jnp.arange(MAX_LENGTH) < batch["length"][:, None]


def train(data, held_out, *, epochs):
    # --- the loop
    @jl.objective
    def token_loss(model, batch):
        logits, target = model(*inputs(batch)), batch["target"]
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, target)
        return losses, {"y_true": target, "y_pred": logits, "sample_weight": mask(batch)}

    loop = jl.trainer(Seq2Seq(), token_loss, optax.adam(5e-3), log=0)
    loop = loop.metric("accuracy").validate(held_out)
    return loop.final_state(data, epochs=epochs)
    # --- end


def main():
    examples = words()
    cut = len(examples["length"]) // 5
    held_out = jl.batches(jax.tree.map(lambda x: x[:cut], examples), 128)
    data = jl.batches(jax.tree.map(lambda x: x[cut:], examples), 64, shuffle=True)
    state = train(data, held_out, epochs=9)
    for epoch in range(0, 9, 2):
        values = state.history[epoch]
        print(f"epoch {epoch}: " + ", ".join(f"{n} {v:.3f}" for n, v in values.items()))
    assert state.history[8]["validation_accuracy"] > 0.8


if __name__ == "__main__":
    main()

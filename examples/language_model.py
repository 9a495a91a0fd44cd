"""A small transformer that learns to write Python's help texts, character by character.

    python examples/language_model.py

The targets of a language model are its inputs, shifted by one. So the batch is only text, and the
objective takes it apart. `derive` makes the bits per character from the exact average of the loss.
"""

import pydoc_data.topics

import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

import jaxloop as jl

LENGTH, NUM_FEATURES, NUM_LAYERS = 32, 64, 2
NUM_CHARACTERS = 97  # 0 is everything else, 1 is a new line, 2 to 96 are printable ASCII


def text(num_characters):
    """The start of the help texts as rows of LENGTH + 1 tokens, int32."""
    characters = "".join(
        pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics)
    )
    codes = np.frombuffer(characters.encode("ascii", "replace"), np.uint8)[:num_characters]
    tokens = np.where(codes == 10, 1, np.where(codes < 32, 0, codes - 30)).astype(np.int32)
    return tokens[: len(tokens) // (LENGTH + 1) * (LENGTH + 1)].reshape(-1, LENGTH + 1)


class Transformer(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        positions = nn.Embed(LENGTH, NUM_FEATURES)(jnp.arange(tokens.shape[1]))
        x = nn.Embed(NUM_CHARACTERS, NUM_FEATURES)(tokens) + positions
        mask = nn.make_causal_mask(tokens)
        for _ in range(NUM_LAYERS):
            x = x + nn.MultiHeadDotProductAttention(num_heads=4)(nn.LayerNorm()(x), mask=mask)
            hidden = nn.gelu(nn.Dense(4 * NUM_FEATURES)(nn.LayerNorm()(x)))
            x = x + nn.Dense(NUM_FEATURES)(hidden)
        return nn.Dense(NUM_CHARACTERS)(nn.LayerNorm()(x))


NUM_STEPS = 200
SCHEDULE = optax.warmup_cosine_decay_schedule(0.0, 3e-3, NUM_STEPS // 10, NUM_STEPS)
OPTIMIZER = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(SCHEDULE))


def train(data, held_out, *, steps):
    # --- the loop
    @jl.objective
    def next_character(model, tokens):
        losses = optax.softmax_cross_entropy_with_integer_labels(
            model(tokens[:, :-1]), tokens[:, 1:]
        )
        return losses.mean(axis=-1)

    loop = jl.trainer(Transformer(), next_character, OPTIMIZER, log=0)
    loop = loop.derive("bits", lambda loss: loss / jnp.log(2.0), of="loss").validate(held_out)
    return loop.final_state(data, steps=steps)
    # --- end


def main():
    rows = text(100_000)
    held_out, rows = rows[:256], rows[256:]
    data = jl.batches(rows, 32, shuffle=True)
    state = train(data, jl.batches(held_out, 64), steps=NUM_STEPS)
    for epoch, values in state.history.items():
        print(f"epoch {epoch}: " + ", ".join(f"{n} {v:.2f}" for n, v in values.items()))
    last = state.history[max(state.history)]
    assert state.step == NUM_STEPS and last["validation_bits"] < 3.7


if __name__ == "__main__":
    main()

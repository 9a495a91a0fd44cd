"""The twin of ``examples/actor_critic.py``."""

import jax
import jax.numpy as jnp
import optax

from tests.twins import load

game = load("actor_critic")


@jax.jit
def train_step(state):
    key, play_key = jax.random.split(state["key"])
    games, moves = game.play(state["params"], state["games"], play_key)
    gradient = jax.value_and_grad(game.actor_critic_loss)
    loss, grads = gradient(state["params"], moves, games)
    optimizer_state = state["optimizer_state"]
    updates, optimizer_state = game.OPTIMIZER.update(grads, optimizer_state, state["params"])
    params = optax.apply_updates(state["params"], updates)
    state = {"params": params, "optimizer_state": optimizer_state, "games": games, "key": key}
    return state, {"loss": loss, "falls": jnp.mean(moves[2], dtype=jnp.float32)}


def train(*, epochs, iterations):
    # --- the loop
    state = game.init()
    history = []
    for _ in range(epochs):
        totals = {"loss": 0.0, "falls": 0.0}
        for _ in range(iterations):
            state, metrics = train_step(state)
            for name in totals:
                totals[name] += float(metrics[name])
        history.append({name: total / iterations for name, total in totals.items()})
    return history
    # --- end

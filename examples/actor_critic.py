"""Advantage actor-critic on a pure JAX environment: a step without data.

    python examples/actor_critic.py

Each iteration plays 32 moves in 32 copies of the pole-balancing game and learns from them. With
`data=None` the step gets None as its batch, and `iterations=` says how long an epoch is.

Source: the dynamics are those of A. G. Barto, R. S. Sutton and C. W. Anderson, Neuronlike adaptive
elements that can solve difficult learning control problems, 1983.
"""

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

import jaxloop as jl

NUM_GAMES, NUM_MOVES, DISCOUNT = 32, 32, 0.99
OPTIMIZER = optax.chain(optax.clip_by_global_norm(0.5), optax.adam(3e-3))


class ActorCritic(nn.Module):
    @nn.compact
    def __call__(self, observation):
        hidden = nn.tanh(nn.Dense(64)(observation))
        return nn.Dense(2)(hidden), nn.Dense(1)(hidden)[..., 0]


MODEL = ActorCritic()


def push(game, action):
    """Moves a cart with a pole for 0.02 s; returns the next game and whether the pole fell."""
    x, speed, angle, turning = game
    force = jnp.where(action == 1, 10.0, -10.0)
    sine, cosine = jnp.sin(angle), jnp.cos(angle)
    drive = (force + 0.05 * turning**2 * sine) / 1.1
    bend = (9.8 * sine - cosine * drive) / (0.5 * (4 / 3 - 0.1 * cosine**2 / 1.1))
    acceleration = drive - 0.05 * bend * cosine / 1.1
    game = game + 0.02 * jnp.stack([speed, acceleration, turning, bend])
    return game, (jnp.abs(game[0]) > 2.4) | (jnp.abs(game[2]) > 0.21)


def new_games(key):
    return jax.random.uniform(key, (NUM_GAMES, 4), minval=-0.05, maxval=0.05)


def play(params, games, key):
    """Plays NUM_MOVES in each game. Fallen poles are put up again."""

    def move(games, key):
        action_key, game_key = jax.random.split(key)
        logits, _ = MODEL.apply(params, games)
        actions = jax.random.categorical(action_key, logits)
        moved, fell = jax.vmap(push)(games, actions)
        return jnp.where(fell[:, None], new_games(game_key), moved), (games, actions, fell)

    return jax.lax.scan(move, games, jax.random.split(key, NUM_MOVES))


def actor_critic_loss(params, moves, last_games):
    observations, actions, fell = moves
    logits, values = MODEL.apply(params, observations)
    last_values = MODEL.apply(params, last_games)[1]

    def discount(value, fell):
        value = jnp.where(fell, -1.0, DISCOUNT * value)  # the reward of a fall is -1
        return value, value

    returns = jax.lax.stop_gradient(jax.lax.scan(discount, last_values, fell, reverse=True)[1])
    advantages = jax.lax.stop_gradient(returns - values)
    log_probabilities = jax.nn.log_softmax(logits)
    chosen = jnp.take_along_axis(log_probabilities, actions[..., None], axis=-1)[..., 0]
    entropy = -jnp.sum(jnp.exp(log_probabilities) * log_probabilities, axis=-1)
    value_loss = (returns - values) ** 2
    return jnp.mean(-chosen * advantages + value_loss - 0.001 * entropy)


def step(_, state):
    key, play_key = jax.random.split(state["key"])
    games, moves = play(state["params"], state["games"], play_key)
    loss, grads = jax.value_and_grad(actor_critic_loss)(state["params"], moves, games)
    updates, optimizer_state = OPTIMIZER.update(grads, state["optimizer_state"], state["params"])
    params = optax.apply_updates(state["params"], updates)
    state = {"params": params, "optimizer_state": optimizer_state, "games": games, "key": key}
    return jl.emit(state, loss=loss, falls=jnp.mean(moves[2], dtype=jnp.float32))


def init(seed=0):
    params_key, games_key, key = jax.random.split(jax.random.key(seed), 3)
    params = MODEL.init(params_key, jnp.zeros(4))
    state = {"params": params, "optimizer_state": OPTIMIZER.init(params)}
    return {**state, "games": new_games(games_key), "key": key}


def train(*, epochs, iterations):
    # --- the loop
    loop = jl.loop(step).metric("loss").metric("falls")
    return loop.final_state(None, init(), epochs=epochs, iterations=iterations)
    # --- end


def main():
    state = train(epochs=10, iterations=100)
    for epoch in (0, 1, 3, 9):
        print(f"epoch {epoch}: the pole fell in {state.history[epoch]['falls']:.2%} of the moves")
    assert state.history[9]["falls"] < 0.001 < state.history[0]["falls"]


if __name__ == "__main__":
    main()

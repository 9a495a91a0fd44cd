"""PPO: a step that is itself a loop over the epochs and minibatches of an update.

    python examples/ppo.py

One iteration plays a game, then learns from the same moves for several epochs. To jaxloop that is
one step: pure, compiled, and free to contain `jax.lax.scan`.

The game is Catch: a ball falls down a board of 8 by 5, and the paddle must be under it.

Source: J. Schulman and others, Proximal policy optimization algorithms, 2017.
"""

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

import jaxloop as jl

NUM_GAMES, HEIGHT, WIDTH = 64, 8, 5
NUM_EPOCHS, NUM_MINIBATCHES, CLIP = 4, 4, 0.2
OPTIMIZER = optax.adam(3e-3)


class ActorCritic(nn.Module):
    @nn.compact
    def __call__(self, board):
        hidden = nn.tanh(nn.Dense(64)(board))
        return nn.Dense(3)(hidden), nn.Dense(1)(hidden)[..., 0]


MODEL = ActorCritic()


def observe(row, ball, paddle):
    """The board as ``(games, 3 * ...)`` numbers: the ball's row and column, and the paddle's."""
    parts = (jnp.full(ball.shape, row), HEIGHT), (ball, WIDTH), (paddle, WIDTH)
    return jnp.concatenate([jax.nn.one_hot(value, size) for value, size in parts], axis=-1)


def play(params, key):
    """Plays NUM_GAMES games to their end; returns the moves, and the rewards of -1 or 1."""
    ball_key, paddle_key, key = jax.random.split(key, 3)
    ball = jax.random.randint(ball_key, (NUM_GAMES,), 0, WIDTH)
    paddle = jax.random.randint(paddle_key, (NUM_GAMES,), 0, WIDTH)

    def move(paddle, now):
        row, key = now
        boards = observe(row, ball, paddle)
        logits, values = MODEL.apply(params, boards)
        actions = jax.random.categorical(key, logits)
        chosen = log_probability(logits, actions)
        return jnp.clip(paddle + actions - 1, 0, WIDTH - 1), (boards, actions, chosen, values)

    rows = jnp.arange(HEIGHT - 1), jax.random.split(key, HEIGHT - 1)
    paddle, moves = jax.lax.scan(move, paddle, rows)
    return moves, jnp.where(paddle == ball, 1.0, -1.0)


def log_probability(logits, actions):
    return jnp.take_along_axis(jax.nn.log_softmax(logits), actions[..., None], axis=-1)[..., 0]


def ppo_loss(params, moves, rewards):
    boards, actions, old_chosen, old_values = moves
    logits, values = MODEL.apply(params, boards)
    ratio = jnp.exp(log_probability(logits, actions) - old_chosen)
    advantages = rewards - old_values
    advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-6)
    clipped = jnp.clip(ratio, 1 - CLIP, 1 + CLIP)
    policy_loss = -jnp.minimum(ratio * advantages, clipped * advantages)
    probabilities = jax.nn.softmax(logits)
    entropy = -jnp.sum(probabilities * jax.nn.log_softmax(logits), axis=-1)
    return jnp.mean(policy_loss + 0.5 * (values - rewards) ** 2 - 0.01 * entropy)


def step(_, state):
    key, play_key, order_key = jax.random.split(state["key"], 3)
    moves, rewards = play(state["params"], play_key)
    moves = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), moves)  # (moves * games, ...)
    targets = jnp.tile(rewards, HEIGHT - 1)

    def learn(carried, indices):
        params, optimizer_state = carried
        minibatch = jax.tree.map(lambda x: x[indices], (moves, targets))
        loss, grads = jax.value_and_grad(ppo_loss)(params, *minibatch)
        updates, optimizer_state = OPTIMIZER.update(grads, optimizer_state, params)
        return (optax.apply_updates(params, updates), optimizer_state), loss

    orders = [
        jax.random.permutation(epoch_key, len(targets)).reshape(NUM_MINIBATCHES, -1)
        for epoch_key in jax.random.split(order_key, NUM_EPOCHS)
    ]
    carried = state["params"], state["optimizer_state"]
    (params, optimizer_state), losses = jax.lax.scan(learn, carried, jnp.concatenate(orders))
    state = {"params": params, "optimizer_state": optimizer_state, "key": key}
    return jl.emit(state, loss=losses.mean(), caught=jnp.mean(rewards > 0, dtype=jnp.float32))


def init(seed=0):
    params_key, key = jax.random.split(jax.random.key(seed))
    params = MODEL.init(params_key, jnp.zeros(HEIGHT + 2 * WIDTH))
    return {"params": params, "optimizer_state": OPTIMIZER.init(params), "key": key}


def main():
    loop = jl.loop(step).metric("loss").metric("caught")
    state = loop.final_state(None, init(), epochs=6, iterations=20)
    for epoch, values in state.history.items():
        print(f"epoch {epoch}: loss {values['loss']:.3f}, caught {values['caught']:.1%}")
    assert state.history[5]["caught"] > 0.95


if __name__ == "__main__":
    main()

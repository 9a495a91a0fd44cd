"""What a sceptical reader of the objectives found: numbers that were silently wrong."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jaxloop as jl
from jaxloop.errors import ModelError

PAIR = (lambda key, x: jnp.zeros(2), lambda w, x: x @ w)
X = np.arange(8, dtype=np.float32).reshape(4, 2)


@pytest.mark.parametrize("number", [1, 2, 4])
def test_a_part_without_weight_reports_nothing(number):
    @jl.objective
    def masked(model, batch):
        loss = (model(batch["x"]) - 1) ** 2
        mean = jnp.sum(loss * batch["mask"]) / jnp.sum(batch["mask"])  # NaN for no example
        return loss, {"sample_weight": batch["mask"], "masked_mean": mean}

    data = [{"x": X, "mask": np.float32([0, 0, 1, 1])}]
    loop = jl.trainer(PAIR, masked, "sgd", accumulate_gradients=number, log=0)
    state = loop.metric("masked_mean", per="batch").final_state(data)
    assert state.history[0] == {"loss": 1.0, "masked_mean": 1.0}
    assert np.isfinite(state.step_state["model_state"]).all()


class Head(nnx.Module):
    def __init__(self, body, rngs):
        self.body, self.dropout = body, nnx.Dropout(0.5, rngs=rngs)
        self.out = nnx.Linear(2, 1, rngs=rngs)

    def __call__(self, x):
        return self.out(self.dropout(self.body(x)))[:, 0]


def test_nnx_modules_of_a_container_do_not_share_variables():
    @jl.objective
    def both(models, batch):
        return (models["a"](batch) - models["b"](batch)) ** 2

    rngs = nnx.Rngs(0)
    body = nnx.Linear(2, 2, rngs=rngs)
    heads = {"a": Head(body, rngs), "b": Head(body, rngs)}
    with pytest.raises(ModelError, match=r"share variables, got 'body\.(bias|kernel)'"):
        jl.trainer(heads, both, optax.sgd(0.01), log=0)
    with pytest.raises(ModelError, match="share variables"):
        jl.trainer([body, {"a": body}], both, optax.sgd(0.01), log=0)
    tied = jl.trainer(nnx.Dict(**heads), both, optax.sgd(0.01), log=0).run([X])
    assert tied["a"].body is tied["b"].body
    other = Head(nnx.Linear(2, 2, rngs=rngs), rngs)  # random streams may be shared
    jl.trainer({**heads, "b": other}, both, optax.sgd(0.01), log=0).run([X])

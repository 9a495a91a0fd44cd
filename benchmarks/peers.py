"""The same training in other libraries. The benchmark skips libraries that are not installed.

    train = PEERS["keras"](work)        # None if this workload is not written for the library
    loss = train()

Each case follows the documentation of its library. The model, the data, the batch size and Adam
are those of the workload. Each library draws its initial parameters itself, so losses differ
slightly.
"""

import logging
import os
import warnings

import numpy as np
import optax

from benchmarks.workloads import HEADS, LAYERS, LENGTH, VOCABULARY, WIDTH

# --- Flax NNX ------------------------------------------------------------------------------------


def _nnx_model(work):
    import jax
    from flax import nnx

    class MLP(nnx.Module):
        def __init__(self, rngs):
            pairs = zip(work.sizes, work.sizes[1:], strict=False)
            self.layers = nnx.List([nnx.Linear(a, b, rngs=rngs) for a, b in pairs])

        def __call__(self, x):
            for layer in self.layers[:-1]:
                x = nnx.relu(layer(x))
            return self.layers[-1](x)

    class CNN(nnx.Module):
        def __init__(self, rngs):
            self.c1 = nnx.Conv(1, 8, (3, 3), use_bias=False, rngs=rngs)
            self.c2 = nnx.Conv(8, 16, (3, 3), use_bias=False, rngs=rngs)
            self.out = nnx.Linear(784, 10, rngs=rngs)

        def __call__(self, x):
            x = nnx.max_pool(nnx.relu(self.c1(x)), (2, 2), (2, 2))
            x = nnx.max_pool(nnx.relu(self.c2(x)), (2, 2), (2, 2))
            return self.out(x.reshape(len(x), -1))

    class Block(nnx.Module):
        def __init__(self, rngs):
            self.n1, self.n2 = nnx.LayerNorm(WIDTH, rngs=rngs), nnx.LayerNorm(WIDTH, rngs=rngs)
            self.attend = nnx.MultiHeadAttention(HEADS, WIDTH, decode=False, rngs=rngs)
            self.up = nnx.Linear(WIDTH, 4 * WIDTH, rngs=rngs)
            self.down = nnx.Linear(4 * WIDTH, WIDTH, rngs=rngs)

        def __call__(self, x):
            x = x + self.attend(self.n1(x))
            return x + self.down(nnx.gelu(self.up(self.n2(x))))

    class Transformer(nnx.Module):
        def __init__(self, rngs):
            self.embed = nnx.Embed(VOCABULARY, WIDTH, rngs=rngs)
            self.place = nnx.Param(jax.random.normal(rngs.params(), (LENGTH, WIDTH)))
            self.blocks = nnx.List([Block(rngs) for _ in range(LAYERS)])
            self.head = nnx.Linear(WIDTH, 10, rngs=rngs)

        def __call__(self, x):
            x = self.embed(x) + self.place[...]
            for block in self.blocks:
                x = block(x)
            return self.head(x.mean(1))

    return {"mlp": MLP, "cnn": CNN, "transformer": Transformer}[work.kind](nnx.Rngs(0))


def nnx(work):
    """Uses `nnx.jit` on the model, the optimizer and the metrics, as in the tutorial."""
    return _nnx(work, cached=False)


def nnx_cached(work):
    """Does the same with `nnx.cached_partial`, as in the performance guide."""
    return _nnx(work, cached=True)


def _nnx(work, cached):
    from flax import nnx

    model = _nnx_model(work)
    optimizer = nnx.Optimizer(model, optax.adam(1e-3), wrt=nnx.Param)
    metrics = nnx.MultiMetric(loss=nnx.metrics.Average("loss"))

    def loss_fn(model, batch):
        logits = model(batch[0])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch[1])
        return losses.mean(), logits

    @nnx.jit
    def train_step(model, optimizer, metrics, batch):
        (loss, _), grads = nnx.value_and_grad(loss_fn, has_aux=True)(model, batch)
        metrics.update(loss=loss)
        optimizer.update(model, grads)

    if cached:
        step = nnx.cached_partial(train_step, model, optimizer, metrics)
    else:

        def step(batch):
            train_step(model, optimizer, metrics, batch)

    def train():
        for _ in range(work.epochs):
            metrics.reset()
            for batch in work.batches:
                step(batch)
        return float(metrics.compute()["loss"])

    return train


# --- Keras on JAX --------------------------------------------------------------------------------


def keras(work):
    """Calls `model.fit`."""
    return _keras(work, 1)


def keras_50(work):
    """Calls `model.fit` with ``steps_per_execution=50``."""
    return _keras(work, 50)


def _keras(work, steps_per_execution):
    os.environ["KERAS_BACKEND"] = "jax"
    import keras as k

    if work.kind == "mlp":
        layers = [k.layers.Dense(n, activation="relu") for n in work.sizes[1:-1]]
        model = k.Sequential([k.Input(work.sizes[:1]), *layers, k.layers.Dense(work.sizes[-1])])
    elif work.kind == "cnn":
        convolutions = []
        for width in (8, 16):
            convolutions.append(
                k.layers.Conv2D(width, 3, padding="same", activation="relu", use_bias=False)
            )
            convolutions.append(k.layers.MaxPooling2D())
        model = k.Sequential(
            [k.Input((28, 28, 1)), *convolutions, k.layers.Flatten(), k.layers.Dense(10)]
        )
    else:
        return None
    model.compile(
        optimizer=k.optimizers.Adam(1e-3),
        loss=k.losses.SparseCategoricalCrossentropy(from_logits=True),
        steps_per_execution=steps_per_execution,
    )
    size = len(work.batches) * work.batch_size
    x, y = work.x[:size], work.y[:size]

    def train():
        fitted = model.fit(
            x, y, batch_size=work.batch_size, epochs=work.epochs, shuffle=False, verbose=0
        )
        return fitted.history["loss"][-1]

    return train


# --- PyTorch and libraries on top of it ----------------------------------------------------------


def _torch_model(work):
    import torch
    from torch import nn

    torch.manual_seed(0)
    if work.kind == "mlp":
        layers = []
        for a, b in zip(work.sizes, work.sizes[1:], strict=False):
            layers += [nn.Linear(a, b), nn.ReLU()]
        return nn.Sequential(*layers[:-1])
    if work.kind == "cnn":
        return nn.Sequential(
            *(nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(8, 16, 3, padding=1, bias=False), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Flatten(), nn.Linear(784, 10)),
        )

    class Transformer(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(VOCABULARY, WIDTH)
            self.place = nn.Parameter(torch.randn(LENGTH, WIDTH))
            layer = nn.TransformerEncoderLayer(
                WIDTH, HEADS, 4 * WIDTH, 0.0, "gelu", batch_first=True, norm_first=True
            )
            self.blocks = nn.TransformerEncoder(layer, LAYERS, enable_nested_tensor=False)
            self.head = nn.Linear(WIDTH, 10)

        def forward(self, x):
            return self.head(self.blocks(self.embed(x) + self.place).mean(1))

    return Transformer()


def _torch_batches(work):
    import torch

    batches = []
    for x, y in work.batches:
        x = x.transpose(0, 3, 1, 2) if work.kind == "cnn" else x
        x = x.astype(np.int64) if work.kind == "transformer" else x
        batches.append((torch.from_numpy(x.copy()), torch.from_numpy(y.astype(np.int64))))
    return batches


def torch(work):
    """Runs the eager loop of the tutorial, and sums the loss on the device."""
    import torch as t

    model, batches = _torch_model(work), _torch_batches(work)
    optimizer, loss_fn = t.optim.Adam(model.parameters(), 1e-3), t.nn.CrossEntropyLoss()

    def train():
        for _ in range(work.epochs):
            total = t.zeros(())
            for x, y in batches:
                optimizer.zero_grad()
                loss = loss_fn(model(x), y)
                loss.backward()
                optimizer.step()
                total += loss.detach()
        return float(total) / len(batches)

    return train


def ignite(work):
    """Uses `create_supervised_trainer`, with a running average of the loss."""
    import torch as t
    from ignite.engine import create_supervised_trainer
    from ignite.metrics import Average

    model, batches = _torch_model(work), _torch_batches(work)
    optimizer, loss_fn = t.optim.Adam(model.parameters(), 1e-3), t.nn.CrossEntropyLoss()
    trainer = create_supervised_trainer(model, optimizer, loss_fn)
    Average().attach(trainer, "loss")

    def train():
        return trainer.run(batches, max_epochs=work.epochs).metrics["loss"]

    return train


def lightning(work):
    """Uses `Trainer(barebones=True)`, which disables everything that costs time."""
    import lightning as L
    import torch as t

    batches, loss_fn = _torch_batches(work), t.nn.CrossEntropyLoss()

    class Module(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = _torch_model(work)

        def training_step(self, batch, index):
            loss = loss_fn(self.model(batch[0]), batch[1])
            self.total = self.total + loss.detach() if index else loss.detach()
            return loss

        def configure_optimizers(self):
            return t.optim.Adam(self.parameters(), 1e-3)

    module = Module()
    loader = t.utils.data.DataLoader(batches, batch_size=None)

    def train():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for name in ("lightning.pytorch", "lightning.fabric", "lightning"):
                logging.getLogger(name).setLevel(logging.ERROR)
            trainer = L.Trainer(barebones=True, max_epochs=work.epochs, accelerator="cpu")
            trainer.fit(module, loader)
        return float(module.total) / len(batches)

    return train


PEERS = {
    "nnx": nnx,
    "nnx_cached": nnx_cached,
    "keras": keras,
    "keras_50": keras_50,
    "torch": torch,
    "ignite": ignite,
    "lightning": lightning,
}

"""The twin of ``examples/vae.py``."""

import jax
import jax.numpy as jnp
import optax

from tests.twins import load

vae = load("vae")


def train(variables, key, data, held_out, *, epochs):
    model = vae.VAE()
    # --- the loop
    optimizer = optax.adam(1e-3)

    def loss_fn(variables, pixels, noise):
        logits, mean, log_variance = model.apply(variables, pixels, noise)
        kl = vae.kl_divergence(mean, log_variance)
        losses = optax.sigmoid_binary_cross_entropy(logits, pixels).sum(axis=-1) + kl
        return losses.mean(), kl.mean()

    @jax.jit
    def train_step(variables, optimizer_state, step, pixels):
        noise_key = jax.random.fold_in(jax.random.fold_in(key, step), 1)  # as an objective gets it
        noise = jax.random.normal(noise_key, (len(pixels), vae.NUM_LATENTS))
        gradient = jax.value_and_grad(loss_fn, has_aux=True)
        (loss, kl), grads = gradient(variables, pixels, noise)
        updates, optimizer_state = optimizer.update(grads, optimizer_state, variables)
        return optax.apply_updates(variables, updates), optimizer_state, loss, kl

    @jax.jit
    def eval_step(variables, pixels):
        return loss_fn(variables, pixels, jnp.zeros((len(pixels), vae.NUM_LATENTS)))

    optimizer_state = optimizer.init(variables)
    history, step = [], 0
    for epoch in range(epochs):
        total_loss = total_kl = num_examples = 0
        for pixels in data(epoch):
            variables, optimizer_state, loss, kl = train_step(
                variables, optimizer_state, step, pixels
            )
            step += 1
            total_loss += float(loss) * len(pixels)
            total_kl += float(kl) * len(pixels)
            num_examples += len(pixels)
        values = {"loss": total_loss / num_examples, "kl": total_kl / num_examples}
        total_loss = total_kl = num_examples = 0
        for pixels in held_out:
            loss, kl = eval_step(variables, pixels)
            total_loss += float(loss) * len(pixels)
            total_kl += float(kl) * len(pixels)
            num_examples += len(pixels)
        values["validation_loss"] = total_loss / num_examples
        values["validation_kl"] = total_kl / num_examples
        history.append(values)
    return history
    # --- end

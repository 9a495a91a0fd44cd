"""The twin of ``examples/gan.py``."""

import jax

from tests.twins import load

gan = load("gan")


@jax.jit
def train_step(state, pixels):
    generator, discriminator = state["generator"], state["discriminator"]
    key, noise_key = jax.random.split(state["key"])
    noise = jax.random.normal(noise_key, (len(pixels), gan.NOISE_SIZE))

    def of_discriminator(params):
        fake = generator.apply_fn(generator.params, noise)
        return gan.discriminator_loss(discriminator, params, pixels, fake).mean()

    d_loss, grads = jax.value_and_grad(of_discriminator)(discriminator.params)
    discriminator = discriminator.apply_gradients(grads=grads)

    def of_generator(params):
        score = discriminator.apply_fn(discriminator.params, generator.apply_fn(params, noise))
        return jax.nn.softplus(-score).mean()

    g_loss, grads = jax.value_and_grad(of_generator)(generator.params)
    generator = generator.apply_gradients(grads=grads)
    return {"generator": generator, "discriminator": discriminator, "key": key}, g_loss, d_loss


def train(data, *, epochs):
    # --- the loop
    state = gan.init()
    history = []
    for epoch in range(epochs):
        g_total = d_total = num_examples = 0
        for pixels in data(epoch):
            state, g_loss, d_loss = train_step(state, pixels)
            g_total += float(g_loss) * len(pixels)
            d_total += float(d_loss) * len(pixels)
            num_examples += len(pixels)
        history.append(
            {
                "generator_loss": g_total / num_examples,
                "discriminator_loss": d_total / num_examples,
            }
        )
    return history
    # --- end

"""The twin of ``examples/flax_train_state.py``: the loop that the project had before."""

from tests.twins import load

project = load("flax_train_state")


def train(data, held_out, *, epochs):
    # --- the loop
    state = project.create_train_state()
    history = []
    for epoch in range(epochs):
        totals, num_examples = {"loss": 0.0, "accuracy": 0.0}, 0
        for batch in data(epoch):
            state, metrics = project.train_step(state, batch)
            num_examples += len(batch[0])
            for name in totals:
                totals[name] += float(metrics[name]) * len(batch[0])
        values = {name: total / num_examples for name, total in totals.items()}
        totals, num_examples = {"loss": 0.0, "accuracy": 0.0}, 0
        for batch in held_out:
            metrics = project.eval_step(state, batch)
            num_examples += len(batch[0])
            for name in totals:
                totals[name] += float(metrics[name]) * len(batch[0])
        values.update({f"validation_{name}": v / num_examples for name, v in totals.items()})
        history.append(values)
    return history
    # --- end

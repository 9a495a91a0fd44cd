"""An observer that fails at a step, in place of a process that is killed there."""


def failing_at(loop, step):
    """The loop with an observer that raises `KeyError` at a step, or the loop itself for None."""

    def fail(snapshot):
        if snapshot.step == step:
            raise KeyError("killed")

    return loop if step is None else loop.observe("iteration_completed", fail)

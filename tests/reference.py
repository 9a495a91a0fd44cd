"""A naive interpreter of the contract: plain Python, nothing compiled, nothing fused.

It shares no code with the driver. A loop here is: batches of numbers, handlers, observers. A
handler is ``(events, name, predicate(total, epoch), action)`` with an action of None, "halt_epoch"
or "halt_loop". ``epochs`` and ``steps`` are totals, and None is no bound.
"""

from __future__ import annotations

EVENTS = (
    "started",
    "epoch_started",
    "iteration_started",
    "iteration_completed",
    "epoch_completed",
    "epoch_halted",
    "halted",
    "completed",
)


class Halt(Exception):
    """A handler halted."""

    def __init__(self, status, name):
        super().__init__(status)
        self.status, self.name = status, name


class Reference:
    """Runs ``total = 3 * total + sum(batch)`` in 16 bits, with metrics over the epoch.

    The metrics are the sum of all numbers, twice that sum, the mean of ``sum(batch)`` over the last
    three iterations, where each number is an example, and the sum of those of ``x`` and ``x + 1``
    that three does not divide.
    """

    def __init__(self, batches, epochs, iterations, handlers, observers, steps=None):
        self.batches, self.epochs, self.iterations = batches, epochs, iterations
        self.steps = steps
        self.handlers, self.observers = handlers, observers
        self.counts = {event: [0, 0] for event in EVENTS}
        self.epoch = self.iteration = self.step = self.total = 0
        self.seen_batches = []
        self.history, self.trace = {}, []
        self.status, self.halted_by = "running", None

    def metrics(self):
        numbers = [number for batch in self.seen_batches for number in batch]
        last = self.seen_batches[-3:]
        num_last = sum(map(len, last))
        recent = sum(sum(batch) * len(batch) for batch in last) / num_last if last else 0.0
        masked = sum(x + d for x in numbers for d in (0, 1) if (x + d) % 3)
        return {
            "sum": sum(numbers),
            "twice": 2 * sum(numbers),
            "recent": recent,
            "masked": masked,
        }

    def seen(self, name, event):
        counts = tuple(self.counts[event])
        metrics = self.metrics()
        self.trace.append((name, event, self.epoch, self.iteration, self.step, counts, metrics))

    def fire(self, event):
        self.counts[event][0] += 1
        self.counts[event][1] += 1
        halt = None
        for events, name, predicate, action in self.handlers:
            if event in events and predicate(*self.counts[event]):
                self.seen(name, event)
                if action is not None:
                    halt = Halt(action, name)
                    break
        if halt is not None and halt.status == "halt_loop" and event not in ("halted", "completed"):
            self.status, self.halted_by = "halted", halt.name
        if event in ("epoch_completed", "epoch_halted"):
            self.history[self.epoch] = self.metrics()
        for events, name, predicate in self.observers:
            if event in events and predicate(*self.counts[event]):
                self.seen(name, event)
        if halt is not None and event not in ("halted", "completed"):
            raise halt

    def remains(self):
        epochs_remain = self.epochs is None or self.epoch < self.epochs
        return epochs_remain and (self.steps is None or self.step < self.steps)

    def go_on(self, epochs, steps):
        """A second run, from the state of the first, with other totals."""
        self.epochs, self.steps = epochs, steps
        if not self.remains():
            return self
        self.status, self.halted_by, self.seen_batches = "running", None, []
        for event in ("started", "completed", "halted"):
            self.counts[event] = [0, 0]
        return self.run()

    def run(self):
        try:
            self.fire("started")
            while self.remains():
                self.one_epoch()
        except Halt:
            self.fire("halted")
            return self
        self.status = "completed"
        self.fire("completed")
        return self

    def one_epoch(self):
        for event in EVENTS:
            self.counts[event][1] = 0
        self.seen_batches = []
        halt = None
        try:
            self.fire("epoch_started")
            for batch in self.batches[: self.iterations]:
                if self.step == self.steps:
                    break
                self.fire("iteration_started")
                self.total = (3 * self.total + sum(batch)) % 65536
                self.seen_batches.append(batch)
                self.step += 1
                try:
                    self.fire("iteration_completed")
                finally:
                    self.iteration += 1
        except Halt as error:
            halt = error
        try:
            self.fire("epoch_completed" if halt is None else "epoch_halted")
        finally:
            self.epoch, self.iteration = self.epoch + 1, 0
        if halt is not None and halt.status == "halt_loop":
            raise halt


def early_stop(values, *, mode, patience, min_delta=0.0, start_from=0, baseline=None):
    """What `early_stop` does with one value per epoch: ``(epochs run, best epoch)``.

    It reads the values so far anew at each epoch, and remembers nothing. The best epoch is None if
    no value counts.
    """
    sign = 1 if mode == "max" else -1

    def better(new, old):
        return sign * (new - old) > min_delta

    def scan(seen):
        """The epoch of the best value, and the number of events since the last improvement."""
        best, since = None, 0
        for epoch, value in enumerate(seen):
            if epoch < start_from:
                continue
            since += 1
            if value == value and (best is None or better(value, seen[best])):
                best = epoch
                if baseline is None or better(value, baseline):
                    since = 0
        return best, since

    for epoch in range(len(values)):
        best, since = scan(values[: epoch + 1])
        if since >= patience:
            return epoch + 1, best
    return len(values), scan(values)[0]

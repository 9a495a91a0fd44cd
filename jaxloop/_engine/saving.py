"""Savers: the stores of a run, and the saves that the triggers of a firing requested.

    savers = Savers(spec)
    savers.open()
    savers.request(trigger)                 # when the trigger's turn comes
    savers.save(state, ending=False)        # at the end of the firing
    savers.begin()                          # once the carry is copied
    savers.close(error=None)

A state in which a guard finds a problem is never saved.
"""

from __future__ import annotations

import logging

from jaxloop._core.state import State
from jaxloop._spec import CheckpointTrigger, Guard, LoopSpec, Store
from jaxloop.errors import CheckpointError

logger = logging.getLogger("jaxloop")


class Savers:
    """The stores of a run.

    Args:
        spec: The loop.

    Attributes:
        open_stores: The triggers of the loop, each with its store. Empty until the run begins.
        requested: The triggers that asked for a save in this firing.
        last_checkpoint: The folder of the newest checkpoint that was complete when `note_complete`
            was called last, or that the run resumed from.
    """

    def __init__(self, spec: LoopSpec) -> None:
        self._triggers = spec.triggers()
        self._guards = [one for one in spec.attachments if isinstance(one, Guard)]
        self.open_stores: list[tuple[CheckpointTrigger, Store]] = []
        self.requested: list[CheckpointTrigger] = []
        self.last_checkpoint: str | None = None

    def open(self) -> None:
        """Opens the stores."""
        for trigger in self._triggers:
            opened = [store for _, store in self.open_stores]
            self.open_stores.append((trigger, trigger.open_store(opened)))

    def request(self, trigger: CheckpointTrigger) -> None:
        """Asks for a save at the end of this firing."""
        self.requested.append(trigger)

    def save(self, state: State, *, ending: bool) -> None:
        """Makes the requested saves or, if the run ends here, saves to all stores."""
        requested, self.requested = self.requested, []
        self._save(
            [(one, store) for one, store in self.open_stores if ending or one in requested], state
        )

    def save_after_error(self, state: State) -> None:
        """Saves the last good state to the stores with ``on_exception``."""
        self._save([(one, store) for one, store in self.open_stores if store.on_exception], state)

    def _save(self, stores: list[tuple[CheckpointTrigger, Store]], state: State) -> None:
        if not stores:
            return
        for guard in self._guards:
            problem = guard.inspect(state)
            if problem is not None:
                logger.warning("step %d is not saved: `%s`: %s", state.step, guard.name, problem)
                return
        for trigger, store in stores:
            store.save(state, trigger.value(state))

    def begin(self) -> None:
        """Starts writing the saves."""
        for _, store in self.open_stores:
            store.begin()

    def poll(self) -> None:
        """Raises if a save in the background has failed."""
        for _, store in self.open_stores:
            store.poll()

    def note_complete(self) -> None:
        """Records the folder of the newest complete checkpoint. Does not wait."""
        for _, store in self.open_stores:
            self.last_checkpoint = store.newest_complete() or self.last_checkpoint

    def newest(self, state: State) -> State | None:
        """Returns the newest good state of all stores, of the run of ``state`` and not later."""
        found = [store.newest(state) for _, store in self.open_stores]
        states = [state for state in found if state is not None]
        return max(states, key=lambda one: one.step, default=None)

    def newest_name(self) -> str | None:
        """Returns the name and the step of the newest good checkpoint of all stores."""
        found = [store.newest_name() for _, store in self.open_stores]
        named = [one for one in found if one is not None]
        if not named:
            return None
        step, name = max(named)
        return f"{name} (step {step})"

    def close(self, error: BaseException | None) -> None:
        """Waits until everything is written.

        Args:
            error: The error that ends the run, or None. If a save fails now, it gets a note.

        Raises:
            CheckpointError: A save failed, and no error ends the run.
        """
        failed: CheckpointError | None = None
        for _, store in self.open_stores:
            try:
                store.close()
            except CheckpointError as problem:
                leaving = error or failed
                if leaving is None:
                    failed = problem
                else:
                    leaving.add_note(f"jaxloop: another error followed: {problem}")
        self.note_complete()
        self.open_stores = []
        if failed is not None:
            raise failed

"""The seconds of an epoch, as a number with a breakdown.

    time = EpochTime(2.0, data_s=0.5)
    time, time.device_s                     # 2.0, 1.5

The seconds that no part claims are those in which the device worked.
"""

from __future__ import annotations


class EpochTime(float):
    """The seconds that an epoch took, as a float with a breakdown.

    An epoch lasts from its first event to the end of its last iteration. What handlers of
    "epoch_completed" do is not in it; see `Session` for the time of a whole run.

    Args:
        elapsed_s: The total.
        data_s: Seconds spent waiting for data.
        dispatch_s: Seconds spent dispatching blocks to the device.
        handlers_s: Seconds spent in handlers and observers, without the three below.
        compile_s: Seconds spent compiling the step, or loading it from JAX's cache.
        validation_s: Seconds spent in validations during the epoch.
        saves_s: Seconds spent waiting for checkpoints during the epoch.

    Example:
        >>> time = EpochTime(2.0, data_s=0.5, dispatch_s=0.25, handlers_s=0.25)
        >>> time, time.device_s
        (2.0, 1.0)
    """

    data_s: float
    dispatch_s: float
    handlers_s: float
    compile_s: float
    validation_s: float
    saves_s: float

    def __new__(
        cls,
        elapsed_s: float,
        data_s: float = 0.0,
        dispatch_s: float = 0.0,
        handlers_s: float = 0.0,
        compile_s: float = 0.0,
        validation_s: float = 0.0,
        saves_s: float = 0.0,
    ) -> EpochTime:
        """See the class."""
        time = super().__new__(cls, elapsed_s)
        time.data_s, time.dispatch_s, time.handlers_s = data_s, dispatch_s, handlers_s
        time.compile_s, time.validation_s, time.saves_s = compile_s, validation_s, saves_s
        return time

    @classmethod
    def of(cls, seconds: float) -> EpochTime:
        """Converts seconds to an `EpochTime`. A plain number has no breakdown."""
        return seconds if isinstance(seconds, cls) else cls(seconds)

    @property
    def device_s(self) -> float:
        """The remaining seconds: the device worked, and the engine waited or was idle."""
        elapsed_s, *parts = self.parts
        return max(0.0, elapsed_s - sum(parts))

    @property
    def parts(self) -> tuple[float, float, float, float, float, float, float]:
        """The constructor arguments."""
        return (
            float(self),
            self.data_s,
            self.dispatch_s,
            self.handlers_s,
            self.compile_s,
            self.validation_s,
            self.saves_s,
        )

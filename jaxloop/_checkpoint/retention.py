"""Which checkpoints of a folder a run keeps.

    rule = Rule("checkpoint", keep=3, keep_best=1, keep_every=None)
    needed = kept(own_entries, [rule])

Each trigger of a loop has a rule, and several may save to one folder. A checkpoint stays as long as
the rule of one of the triggers that asked for it keeps it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

from jaxloop._checkpoint.layout import Entry


@dataclasses.dataclass(frozen=True)
class Rule:
    """Which of the checkpoints that one trigger asked for are kept.

    Attributes:
        name: The name of the trigger.
        keep: How many of the newest. None keeps all.
        keep_best: How many of those that were the best when they were saved.
        keep_every: Every checkpoint whose step is a multiple of this, unless None.
    """

    name: str
    keep: int | None = 3
    keep_best: int = 1
    keep_every: int | None = None


def kept(own: Sequence[Entry], rules: Iterable[Rule]) -> list[Entry]:
    """Returns the checkpoints of a run that its rules keep.

    Args:
        own: The checkpoints that the run has written, the newest first.
        rules: The rules of its triggers. A checkpoint of a trigger without a rule is kept, because
            an earlier version of the script may have had that trigger.
    """
    rules = list(rules)
    known = {rule.name for rule in rules}
    return [
        entry
        for entry in own
        if not known.issuperset(entry.saved_by or [""])
        or any(_keeps(rule, entry, own) for rule in rules if rule.name in entry.saved_by)
    ]


def best(own: Sequence[Entry], rules: Iterable[Rule]) -> list[Entry]:
    """Returns the best checkpoints that the rules keep."""
    most = max((rule.keep_best for rule in rules), default=0)
    return [entry for entry in own if entry.value is not None][:most]


def _keeps(rule: Rule, entry: Entry, own: Sequence[Entry]) -> bool:
    if rule.keep is None or (rule.keep_every is not None and entry.step % rule.keep_every == 0):
        return True
    mine = [other for other in own if rule.name in other.saved_by]
    return entry in mine[: rule.keep] or entry in best(mine, [rule])

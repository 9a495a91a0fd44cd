"""What attachments may know in a dry run.

    Observer(events, filter, "write", write, in_dry_run=left_out)

A dry run leaves no trace outside the run; see `jaxloop._engine.dry_run`.
"""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class DryRun:
    """What an attachment may need to know in a dry run.

    Attributes:
        folder: A folder that is deleted after the dry run. It may not exist yet.
        iterations: The maximum number of batches to read from any data.
    """

    folder: str
    iterations: int


def left_out(attachment: object, dry: DryRun) -> None:
    """Leaves an attachment out of a dry run, because it has effects outside the run.

    Pass this as ``in_dry_run`` of the attachment.
    """

"""The command line of jaxloop.

    python -m jaxloop                           # the demo: trains on handwritten digits
    python -m jaxloop inspect runs/digits       # `python -m jaxloop --help` lists the commands

The script ``jaxloop`` has the same commands.
"""

from __future__ import annotations

import sys

from jaxloop._cli.main import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], prog="python -m jaxloop"))

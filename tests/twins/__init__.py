"""Hand-written twins of the examples: the same training as a plain loop, without jaxloop.

    example = load("vae")                # the module examples/vae.py
    history = vae.train(...)             # the twin, tests/twins/vae.py

A twin imports the model and the data from its example, and writes the loop by hand. Both mark
their loop part with the comments ``# --- the loop`` and ``# --- end``.
"""

import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent


def load(name):
    """Returns the module ``examples/<name>.py``, imported once."""
    qualified = f"examples.{name}"
    if qualified not in sys.modules:
        spec = importlib.util.spec_from_file_location(qualified, ROOT / "examples" / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        sys.modules[qualified] = module
        spec.loader.exec_module(module)
    return sys.modules[qualified]

"""The engine: the only part of jaxloop that changes while a loop runs, and the only clock.

`run.py` makes a run from its parts. `walk.py` is the flat loop over the order of events.
"""

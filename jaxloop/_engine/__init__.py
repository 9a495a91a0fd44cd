"""The engine, the only part of jaxloop that changes while a loop runs and that reads a clock.

`run.py` makes a run from its parts. `walk.py` is the flat loop over the order of events.
"""

"""How far jaxloop is from the limit, where users start from; see `python -m benchmarks.limits`.

This file imports nothing, because the hand-written processes must not import jaxloop.
"""

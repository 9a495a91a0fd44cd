"""A fixed set of programs and the digests of their results, to compare two versions of jaxloop.

    python -m tests.programs > before.json             # before the change
    python -m tests.programs --against before.json     # after it
    python -m tests.programs digits linen              # only the programs with these in their names

Each program runs through the public names of jaxloop and gives a final `State`, an output and a
trace. The command prints ``{program: {what: hash}}`` as JSON. If a refactoring changes one hash, it
changes a number, a dtype, a key or an order that users can see.

This package and `tests.digest` import no private module, so a copy of them also runs against an
older version. Hashes are only comparable on one machine with one version of JAX.
"""

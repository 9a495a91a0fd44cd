"""A `State` on disk and as bytes.

`record.py` turns a state into a record and trees of arrays: `packing.py` writes the values in it,
`unpacking.py` reads them, and `dtypes.py` names their types. `schema.py` and `parsing.py` check a
record that a stranger may have written, and `digests.py` checks arrays.

`layout.py` knows a folder of checkpoints, `names.py` the paths and names in it, and `lock.py` who
may write. `writer.py` writes to it, and keeps what `retention.py` says. `reader.py` reads from it;
`reshaped.py` finds the structure that a handler changed. Both use Orbax through `orbax_io.py`.
`bytes.py` needs no folder.
"""

"""A `State` on disk and as bytes.

`record.py` turns a state into a record and trees of arrays. `layout.py` knows the folder,
`writer.py` writes to it and `reader.py` reads from it, through Orbax (`orbax_io.py`). `bytes.py`
needs no folder.
"""

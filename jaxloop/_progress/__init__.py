"""What a run shows of itself: lines, a terminal display, a notebook's table, and a summary.

`figures` and `summary` are plain data and text, `meter` turns snapshots into what is shown now,
and `lines`, `terminal` and `notebook` show it.
"""

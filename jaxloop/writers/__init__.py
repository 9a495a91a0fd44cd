"""Writers of metrics, for `Loop.write`, and what you need to write your own.

    import jaxloop as jl

    loop = loop.write(jl.writers.csv("runs/a/metrics.csv"))
    loop = loop.write(jl.writers.tensorboard("runs/a"), every=50)

A writer of your own is an object with two methods, ``write(step, values)`` and ``close()``. The
packages behind the writers are imported when a run opens them.
"""

from __future__ import annotations

from jaxloop.writers._csv import csv
from jaxloop.writers._functions import histograms, predictions
from jaxloop.writers._jsonl import jsonl
from jaxloop.writers._mlflow import mlflow
from jaxloop.writers._protocol import (
    FailingWriter,
    FlushingWriter,
    PlacedWriter,
    Writer,
    WriterDescription,
    WriterStart,
)
from jaxloop.writers._tensorboard import tensorboard
from jaxloop.writers._trackio import trackio
from jaxloop.writers._values import Histogram, Image, Text, Value
from jaxloop.writers._wandb import wandb

__all__ = [
    "FailingWriter",
    "FlushingWriter",
    "Histogram",
    "Image",
    "PlacedWriter",
    "Text",
    "Value",
    "Writer",
    "WriterDescription",
    "WriterStart",
    "csv",
    "histograms",
    "jsonl",
    "mlflow",
    "predictions",
    "tensorboard",
    "trackio",
    "wandb",
]

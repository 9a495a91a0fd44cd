"""MLflow, Weights & Biases and Trackio, on this machine alone."""

import json
import math
import os
import struct
import tempfile
import time

import numpy as np
import pytest

import jaxloop as jl
from jaxloop.writers import Histogram, Image, Text

from .failing import failing_at

# Trackio reads it when it is imported.
os.environ.setdefault("TRACKIO_DIR", tempfile.mkdtemp(prefix="trackio"))

pytestmark = pytest.mark.slow  # these packages take seconds to import and to begin a run

DATA = [1.0, 2.0, 6.0, 3.0, 0.5]
PIXELS = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)


def step_fn(batch, total):
    return jl.emit(total + batch, x=batch)


def add_validation(state):
    return "continue", state.replace(metrics={**state.metrics, "validation_x": 7.0})


def values(state):
    return {
        "nan": float("nan"),
        "odd[name]": state.step,
        "text": Text(f"step {state.step}"),
        "histogram": Histogram.of([1.0, 2.0, 2.0], bins=2),
        "image": Image(PIXELS),
        "array": np.ones(3),
    }


def train(writer, folder, *, epochs=3, fail_at=None):
    """Trains, and fails at a step after its row was written."""
    loop = jl.loop(step_fn).metric("x").handle("epoch_completed", add_validation)
    loop = loop.write(writer, every=2, values=values, hyperparameters={"rate": 0.1})
    loop = loop.checkpoint(
        folder, event="iteration_completed", filter=jl.every(3), on_exception=False
    ).resume(folder)
    return failing_at(loop, fail_at).run(DATA, 0.0, epochs=epochs)


def train_with_errors(writer, folder):
    for step in (5, 8, 8, 14):
        with pytest.raises(KeyError, match="killed"):
            train(writer, folder, fail_at=step)
    return train(writer, folder)


STEPS = [2, 4, 5, 6, 8, 10, 12, 14, 15]


# --- MLflow --------------------------------------------------------------------------------------


@pytest.fixture
def mlflow_uri(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    return (tmp_path / "store").as_uri()


def mlflow_runs(uri, experiment):
    tracking = pytest.importorskip("mlflow.tracking")
    client = tracking.MlflowClient(tracking_uri=uri)
    found = client.get_experiment_by_name(experiment)
    return client, client.search_runs([found.experiment_id])


def test_mlflow(mlflow_uri, tmp_path):
    pytest.importorskip("mlflow")
    writer = jl.writers.mlflow("digits", run_name="torn", tracking_uri=mlflow_uri)
    train_with_errors(writer, tmp_path / "saved")
    client, (run,) = mlflow_runs(mlflow_uri, "digits")
    assert run.info.status == "FINISHED" and run.info.run_name == "torn"
    assert run.data.params == {"rate": "0.1"}
    id = run.info.run_id
    for name, steps in {"x": STEPS, "nan": STEPS, "odd_name_": STEPS}.items():
        assert [p.step for p in client.get_metric_history(id, name)] == steps
    assert [p.step for p in client.get_metric_history(id, "validation_x")] == [5, 10, 15]
    assert [p.value for p in client.get_metric_history(id, "odd_name_")] == STEPS
    assert math.isnan(client.get_metric_history(id, "nan")[0].value)
    names = [f"{step:08d}" for step in STEPS]
    for folder, ending in {"texts/text": "md", "images/image": "png"}.items():
        found = [one.path for one in client.list_artifacts(id, folder)]
        assert found == [f"{folder}/{name}.{ending}" for name in names]
    path = client.download_artifacts(id, "histograms/histogram/00000004.json", str(tmp_path))
    with open(path) as file:
        assert json.load(file) == {"counts": [1, 2], "edges": [1.0, 1.5, 2.0]}


def test_mlflow_marks_a_failed_run(mlflow_uri, tmp_path):
    pytest.importorskip("mlflow")
    with pytest.raises(KeyError):
        train(jl.writers.mlflow("a", tracking_uri=mlflow_uri), tmp_path / "saved", fail_at=2)
    _, (run,) = mlflow_runs(mlflow_uri, "a")
    assert run.info.status == "FAILED"


# --- Weights & Biases ----------------------------------------------------------------------------


def wandb_records(path):
    """Yields the records of W&B's file, which has the form of a log of LevelDB."""
    data = path.read_bytes()
    assert data[:4] in (b":W&B", b"")
    at, block, parts = 7, 32768, []
    while at + 7 <= len(data):
        if block - at % block < 7:  # the rest of a block is padding
            at += block - at % block
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        parts.append(data[at + 7 : at + 7 + length])
        at += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            yield b"".join(parts)
            parts = []


def wandb_history(path):
    """Returns ``{step: values}`` of the file of an offline run, and its config."""
    messages = pytest.importorskip("wandb.proto.wandb_internal_pb2")
    rows, config, records = {}, {}, []
    # W&B's process may still write when `finish` has returned.
    for _ in range(600):
        records = [messages.Record.FromString(data) for data in wandb_records(path)]
        if records and records[-1].HasField("exit"):
            break
        time.sleep(0.1)
    for record in records:
        for item in record.run.config.update:
            config[item.key] = json.loads(item.value_json)
        if record.HasField("history"):
            row = {
                item.key or "/".join(item.nested_key): json.loads(item.value_json)
                for item in record.history.item
            }
            step = record.history.step.num
            assert step not in rows
            rows[step] = row
    return rows, config


def test_wandb_offline(tmp_path):
    pytest.importorskip("wandb")
    writer = jl.writers.wandb("digits", mode="offline", folder=tmp_path)
    train(writer, tmp_path / "saved")
    (path,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    rows, config = wandb_history(path)
    assert config["rate"] == 0.1
    assert list(rows) == STEPS
    assert [step for step, row in rows.items() if "validation_x" in row] == [5, 10, 15]
    assert rows[5]["x"] == 2.5 and rows[5]["odd[name]"] == 5 and rows[5]["text"] == "step 5"
    assert math.isnan(float(rows[5]["nan"]))
    assert rows[5]["histogram/_type"] == "histogram" and rows[5]["histogram/values"] == [1, 2]
    assert rows[5]["image/_type"] == "image-file"


def test_wandb_offline_sessions_have_every_step(tmp_path):
    pytest.importorskip("wandb")
    writer = jl.writers.wandb("digits", mode="offline", folder=tmp_path)
    with pytest.raises(KeyError):
        train(writer, tmp_path / "saved", fail_at=8)
    train(writer, tmp_path / "saved")
    paths = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    first, second = sorted(paths, key=lambda path: path.parent.name)
    # The same run, whose second session begins after the checkpoint at step 6.
    assert first.name == second.name
    assert list(wandb_history(first)[0]) == [2, 4, 5, 6, 8]
    assert list(wandb_history(second)[0]) == [8, 10, 12, 14, 15]


# --- Trackio -------------------------------------------------------------------------------------


def test_trackio(tmp_path):
    trackio = pytest.importorskip("trackio")
    project = f"digits-{tmp_path.name}"
    train_with_errors(jl.writers.trackio(project, name="torn"), tmp_path / "saved")
    (run,) = trackio.Api().runs(project)
    assert run.name == "torn" and run.config["rate"] == 0.1
    rows = trackio.SQLiteStorage.get_logs(project, "torn")
    assert [row["step"] for row in rows] == STEPS
    points = [row["step"] for row in rows if "validation_x" in row]
    assert points == [5, 10, 15]
    assert [row["x"] for row in rows if row["step"] == 5] == [2.5]
    assert rows[0]["text"] == {"_type": "trackio.markdown", "_value": "step 2"}
    assert rows[0]["histogram"]["values"] == [1, 2]


def test_trackio_renames_its_own_names(tmp_path):
    trackio = pytest.importorskip("trackio")
    project = f"names-{tmp_path.name}"
    loop = jl.loop(step_fn).write(
        jl.writers.trackio(project, name="a"), values=lambda s: {"time": 1.0, "metrics": 2.0}
    )
    loop.run([1.0], 0.0)
    (row,) = trackio.SQLiteStorage.get_logs(project, "a")
    assert row["__time"] == 1.0 and row["__metrics"] == 2.0


# --- descriptions --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["mlflow", "wandb", "trackio"])
def test_a_missing_package_is_an_error_before_the_first_step(kind, monkeypatch):
    import sys

    for name in (kind, f"{kind}.tracking"):
        monkeypatch.setitem(sys.modules, name, None)
    calls = []
    loop = jl.loop(step_fn).write(getattr(jl.writers, kind)("p")).observe("started", calls.append)
    with pytest.raises(jl.errors.MissingExtraError, match=rf"functional-jaxloop\[{kind}\]"):
        loop.run(DATA, 0.0)
    assert not calls


@pytest.mark.parametrize("kind", ["mlflow", "trackio"])
def test_a_wrong_name_is_an_error_at_once(kind):
    with pytest.raises(jl.errors.ArgumentTypeError, match=f"{kind}: .* must be a string"):
        getattr(jl.writers, kind)(3)

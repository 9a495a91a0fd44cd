"""Rows as metrics of an MLflow run.

    loop = loop.write(mlflow("digits", tracking_uri="sqlite:///mlflow.db"))

Invariant: no point of a metric is logged twice with the same step and value.
"""

from __future__ import annotations

import dataclasses
import datetime
import math
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxloop._core.checks import check_string
from jaxloop._core.extras import import_extra
from jaxloop.writers._png import png
from jaxloop.writers._protocol import WriterStart
from jaxloop.writers._values import Histogram, Image, Text, Value

_MOST_AT_ONCE = 1000
"""The number of metrics that a tracking server takes in one request."""

_TAG = "jaxloop.run_id"


def mlflow(
    experiment: str = "jaxloop", *, run_name: str | None = None, tracking_uri: str | None = None
) -> MlflowDescription:
    """Describes a writer to MLflow. It needs the extra ``functional-jaxloop[mlflow]``.

    Numbers become metrics, and hyperparameters become parameters. Images, texts and histograms are
    artifacts, such as ``images/digit/00000100.png``, and arrays are left out. A character that
    MLflow does not allow in a name becomes "_".

    A run that resumes continues its MLflow run, which it finds by a tag. MLflow cannot delete
    points, so those after the checkpoint stay, and are not logged again if their values are the
    same. A run that was killed before its first checkpoint begins a new MLflow run.

    Args:
        experiment: The name of the experiment, which is made if it is missing.
        run_name: The name of the MLflow run. MLflow makes one by default.
        tracking_uri: The address of the tracking server or the store. Defaults to MLflow's own.

    Returns:
        A description, to be passed to `Loop.write`.

    Raises:
        ArgumentTypeError: ``experiment`` is not a string.
        MissingExtraError: Raised by `run`, before the first step, if MLflow is missing.

    Example:
        >>> mlflow("digits", run_name="wide").experiment
        'digits'
    """
    check_string("mlflow", "experiment", experiment, fix="pass the name of the experiment")
    return MlflowDescription(experiment, run_name, tracking_uri)


@dataclasses.dataclass(frozen=True)
class MlflowDescription:
    """An experiment of MLflow as a value. Made by `mlflow`."""

    experiment: str
    run_name: str | None
    tracking_uri: str | None

    def open(self, start: WriterStart) -> MlflowWriter:
        """Begins an MLflow run, or continues the one of the run that resumes."""
        tracking = import_extra(
            "mlflow.tracking", what="writers.mlflow", extra="mlflow", package="mlflow-skinny"
        )
        entities = import_extra(
            "mlflow.entities", what="writers.mlflow", extra="mlflow", package="mlflow-skinny"
        )
        client = tracking.MlflowClient(tracking_uri=self.tracking_uri)
        found = client.get_experiment_by_name(self.experiment)
        experiment = (
            client.create_experiment(self.experiment) if found is None else (found.experiment_id)
        )
        runs = client.search_runs([experiment], f"tags.`{_TAG}` = '{start.run_id}'")
        if start.step and runs:
            run_id = runs[0].info.run_id
            client.update_run(run_id, status="RUNNING")
        else:
            tags = {_TAG: start.run_id}
            run = client.create_run(experiment, tags=tags, run_name=self.run_name)
            run_id = run.info.run_id
            parameters = [
                entities.Param(_allowed(str(name)), str(value))
                for name, value in start.hyperparameters.items()
            ]
            client.log_batch(run_id, params=parameters)
        return MlflowWriter(client, entities.Metric, run_id, start.step)


class MlflowWriter:
    """A run of MLflow.

    Args:
        client: A client of MLflow.
        metric: MLflow's class of a point.
        run_id: MLflow's name of the run.
        step: The step from which the run resumes.
    """

    def __init__(self, client: Any, metric: Any, run_id: str, step: int) -> None:
        self._client, self._metric, self._run_id, self._step = client, metric, run_id, step
        self._logged: dict[str, dict[int, float]] = {}
        self._status = "FINISHED"

    def write(self, step: int, values: Mapping[str, Value]) -> None:
        """Logs the values of a step."""
        now_ms = int(datetime.datetime.now().timestamp() * 1000)
        points = []
        for name, value in values.items():
            key = _allowed(name)
            if isinstance(value, int | float):
                if not self._is_logged(key, step, float(value)):
                    points.append(self._metric(key, float(value), now_ms, step))
            elif isinstance(value, Image | Text | Histogram):
                self._log_artifact(key, step, value)
        for at in range(0, len(points), _MOST_AT_ONCE):
            self._client.log_batch(self._run_id, metrics=points[at : at + _MOST_AT_ONCE])

    def fail(self, error: BaseException) -> None:
        """Marks the run as failed or, after a signal, as killed."""
        self._status = "FAILED" if isinstance(error, Exception) else "KILLED"

    def close(self) -> None:
        """Ends the run."""
        self._client.set_terminated(self._run_id, self._status)

    def _is_logged(self, key: str, step: int, value: float) -> bool:
        """Returns whether an earlier session, which was killed later, has logged a point."""
        if not self._step:
            return False
        if key not in self._logged:
            history = self._client.get_metric_history(self._run_id, key)
            self._logged[key] = {one.step: one.value for one in history if one.step >= self._step}
        old = self._logged[key].get(step)
        return old is not None and (old == value or (math.isnan(old) and math.isnan(value)))

    def _log_artifact(self, key: str, step: int, value: Image | Text | Histogram) -> None:
        name = f"{step:08d}"
        if isinstance(value, Text):
            self._client.log_text(self._run_id, value.text, f"texts/{key}/{name}.md")
        elif isinstance(value, Histogram):
            counted = {"counts": value.counts.tolist(), "edges": value.edges.tolist()}
            self._client.log_dict(self._run_id, counted, f"histograms/{key}/{name}.json")
        else:
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder, f"{name}.png")
                path.write_bytes(png(value.to_uint8()))
                self._client.log_artifact(self._run_id, str(path), f"images/{key}")


def _allowed(name: str) -> str:
    """Returns the name with "_" in place of what MLflow does not allow.

    Example:
        >>> _allowed("loss[0]/train")
        'loss_0_/train'
    """
    return re.sub(r"[^\w\-. /]", "_", name, flags=re.ASCII)

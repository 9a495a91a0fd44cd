"""alert: a function or a webhook hears of the end of a run and of NaN, and never harms the run."""

import contextlib
import json
import logging
import socket
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import jax.numpy as jnp
import numpy as np
import pytest

import jaxloop as jl
from jaxloop.handlers import Alert

LOOP = jl.loop(lambda batch, state: jl.emit(state + 1, x=batch)).metric("x", per="batch")
GOOD = [jnp.float32(1.0), jnp.float32(3.0)]
BAD = [jnp.float32(1.0), jnp.float32("nan")]


class Boom(Exception):
    pass


def boom(state):
    raise Boom("it broke\nand more")


@contextlib.contextmanager
def server(status=200):
    """A web server on this machine, and what it gets."""
    got = []

    class Server(BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            got.append((self.path, self.headers["Content-Type"], json.loads(body)))
            self.send_response(status)
            self.end_headers()

        def log_message(self, *args):
            pass

    with HTTPServer(("127.0.0.1", 0), Server) as web:
        thread = threading.Thread(target=web.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{web.server_port}/secret-token", got
        finally:
            web.shutdown()
            thread.join()


def heard(loop, data=GOOD, **kwargs):
    """Runs a loop with an alert to a function, and returns what that got."""
    alerts = []
    with contextlib.suppress(Boom):
        loop.alert(alerts.append, **kwargs).run(data, 0, epochs=3)
    return alerts


def test_a_halt_an_error_and_nan_are_told_and_nothing_else():
    assert heard(LOOP) == []
    [alert] = heard(LOOP.early_stop("x", mode="min", patience=1))
    assert (alert.kind, alert.epoch, alert.iteration, alert.step) == ("halted", 2, 0, 4)
    assert alert.metrics == {"x": 2.0} and alert.error is None
    assert alert.message == "jaxloop: halted by early_stop_x in epoch 2, after step 4, x 2"
    [alert] = heard(LOOP.handle("iteration_completed", boom, jl.only(3)), title="digits")
    assert (alert.kind, alert.epoch, alert.step, alert.metrics) == ("failed", 1, 3, {"x": 1.0})
    assert type(alert.error) is Boom
    assert alert.message == "digits: failed with Boom: it broke (epoch 1, after step 3)"


def test_nan_is_told_once_for_each_metric():
    loop = LOOP.metric(lambda x: 1 / (x - 3), "y", None, ["x"], per="batch")
    data = lambda epoch: BAD if epoch else GOOD  # noqa: E731
    first, second = heard(loop, data)
    assert (first.kind, first.epoch, first.step) == ("nan", 0, 2)
    assert first.message == "jaxloop: y is inf in epoch 0, after step 2"
    assert second.message == "jaxloop: x is nan in epoch 1, after step 4"
    assert np.isnan(second.metrics["y"])
    assert [alert.epoch for alert in heard(loop, data, metrics=["x"])] == [1]
    assert heard(loop, data, on="halted") == heard(loop, data, metrics=[]) == []
    # Each run tells it again, because nothing is remembered between two runs.
    alerts = []
    loop = LOOP.alert(alerts.append)
    loop.run(BAD, 0)
    loop.run(BAD, 0)
    assert len(alerts) == 2


def test_nan_may_be_looked_for_inside_an_epoch():
    data = [*GOOD, *BAD, *GOOD]
    [alert] = heard(LOOP, data, every=2)
    assert (alert.epoch, alert.iteration, alert.step) == (0, 3, 4)
    [alert] = heard(LOOP, data, every=None)
    assert (alert.epoch, alert.iteration, alert.step) == (0, 6, 6)
    [alert] = heard(LOOP, data, every=jl.after(4))
    assert alert.step == 5


def test_the_ends_of_a_run_are_told_if_asked_for():
    [alert] = heard(LOOP, on=["completed", "failed"])
    assert alert.message == "jaxloop: completed 3 epochs and 6 steps, x 2"
    alerts = []
    LOOP.alert(alerts.append, on="completed").run(GOOD[:1], 0, epochs=1)
    assert alerts[0].message.startswith("jaxloop: completed 1 epoch and 1 step, x ")

    def interrupt(state):
        raise KeyboardInterrupt

    alerts = []
    loop = LOOP.alert(alerts.append, on=("failed", "interrupted"))
    with pytest.raises(KeyboardInterrupt):
        loop.handle("iteration_completed", interrupt).run(GOOD, 0)
    assert [(alert.kind, alert.message) for alert in alerts] == [
        ("interrupted", "jaxloop: interrupted with KeyboardInterrupt (epoch 0, after step 1)")
    ]


def test_an_error_of_the_data_of_the_step_and_of_an_observer_is_told():
    def data():
        yield GOOD[0]
        raise Boom("disk")

    def observe(snapshot):
        raise Boom("full")

    for loop, batches, text in (
        (LOOP, lambda epoch: data(), "disk"),
        (LOOP.observe("iteration_completed", observe), GOOD, "full"),
    ):
        [alert] = heard(loop, batches)
        assert alert.kind == "failed" and text in alert.message


def test_a_webhook_gets_json():
    with server() as (url, got):
        LOOP.alert(url, on=["nan", "completed"], title="digits").run(BAD, 0, epochs=2)
    assert [(path, kind) for path, kind, _ in got] == [("/secret-token", "application/json")] * 2
    records = [record for _, _, record in got]
    [nan], [end] = ([one for one in records if one["kind"] == k] for k in ("nan", "completed"))
    assert nan == {
        "text": "digits: x is nan in epoch 0, after step 2",
        "content": "digits: x is nan in epoch 0, after step 2",
        "kind": "nan",
        "message": "digits: x is nan in epoch 0, after step 2",
        "epoch": 0,
        "iteration": 2,
        "step": 2,
        "metrics": {"x": "nan"},
    }
    assert end["step"] == 4


def test_a_webhook_gets_the_error_of_a_run():
    with server() as (url, got), pytest.raises(Boom) as info:
        LOOP.alert(url).handle("epoch_completed", boom).run(GOOD, 0)
    assert [record["kind"] for _, _, record in got] == ["failed"]
    assert not any("another error" in note for note in info.value.__notes__)


def test_a_server_that_fails_is_a_warning_without_the_secret(caplog):
    with server(status=500) as (url, got):
        assert LOOP.alert(url, on="completed").run(GOOD, 0).status == "completed"
    assert len(got) == 1 and "127.0.0.1 failed: HTTP 500" in caplog.text
    with socket.socket() as free:  # nobody listens
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/secret-token"
        with pytest.raises(Boom) as info:
            LOOP.alert(url).handle("epoch_completed", boom).run(GOOD, 0)
    assert caplog.text.count("alert: the request to 127.0.0.1 failed") == 2
    assert "secret" not in caplog.text
    assert "secret" not in repr(LOOP.alert(url).attachments)
    assert not any("another error" in note for note in info.value.__notes__)


def test_a_server_that_never_answers_does_not_hold_the_run(caplog):
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/secret-token"
        state = LOOP.alert(url, on="completed", timeout_s=0.05).run(GOOD, 0)
        assert state.status == "completed"
        threads = [one for one in threading.enumerate() if one.name == "jaxloop-alert"]
        for thread in threads:
            assert thread.daemon
            thread.join()
    assert "127.0.0.1" in caplog.text and "secret" not in caplog.text


def test_a_function_that_fails_does_not_fail_the_run(caplog):
    def fail(alert):
        raise RuntimeError("no network")

    with caplog.at_level(logging.WARNING):
        assert LOOP.alert(fail).run(BAD, 0, epochs=2).status == "completed"
    assert "the function failed for: jaxloop: x is nan" in caplog.text
    with pytest.raises(Boom) as info:
        LOOP.alert(fail).handle("epoch_completed", boom).run(GOOD, 0)
    assert not any("another error" in note for note in info.value.__notes__)


def test_an_alert_changes_no_bit_and_no_block():
    loop = jl.loop(lambda b, s: jl.emit(0.9 * s + b, x=s)).metric("x", per="batch")
    data = [np.float32(i) for i in range(40)]
    alone, watched = loop.run(data, 0.0, epochs=2), None
    watched = loop.alert(lambda alert: None, on=jl_kinds()).run(data, 0.0, epochs=2)
    assert alone.history == watched.history
    assert alone.step_state.tobytes() == watched.step_state.tobytes()
    reports = [one.check(data, 0.0) for one in (loop, loop.alert(print))]
    assert reports[0].block_length == reports[1].block_length


def jl_kinds():
    return ["halted", "failed", "nan", "completed", "interrupted"]


MISTAKES = {
    "no recipient": (lambda: LOOP.alert(None), "to must be a function or a URL, got None"),
    "a path": (lambda: LOOP.alert("/tmp/alerts"), "web server, got one with no scheme"),
    "a file": (lambda: LOOP.alert("file:///secret"), "web server, got one with file"),
    "no host": (lambda: LOOP.alert("https:///secret"), "web server"),
    "an unknown kind": (lambda: LOOP.alert(print, on="nan_seen"), "kind of alert"),
    "no kind": (lambda: LOOP.alert(print, on=[]), r"on must be .*got \[\]"),
    "a number as kind": (lambda: LOOP.alert(print, on=3), "on must be .*got 3"),
    "no title": (lambda: LOOP.alert(print, title=None), "title must be a string, got None"),
    "one name": (lambda: LOOP.alert(print, metrics="loss"), "metrics must be a list of names"),
    "no timeout": (lambda: LOOP.alert(print, timeout_s=0), "timeout_s must be .*got 0"),
    "a text as timeout": (lambda: LOOP.alert(print, timeout_s="5"), "timeout_s must be .*got '5'"),
    "every 0": (lambda: LOOP.alert(print, every=0), "alert: every must be at least 1, got 0"),
    "a text as cadence": (lambda: LOOP.alert(print, every="10"), "every must be a whole number"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_an_error_at_the_call(case):
    make, pattern = MISTAKES[case]
    with pytest.raises(jl.JaxloopError, match=f"(?s){pattern}.*\n  fix: [a-z]") as info:
        make()
    assert "secret" not in str(info.value)


def test_an_alert_as_json_has_only_what_json_has():
    alert = Alert("failed", "m", metrics={"a": float("-inf"), "b": 1.5}, error=Boom())
    text = json.dumps(alert.to_json(), allow_nan=False)
    assert json.loads(text)["metrics"] == {"a": "-inf", "b": 1.5}

"""The structure of the pictures: panels, lines, marks, labels. Nothing global changes."""

import io
import subprocess
import sys

import matplotlib
import numpy as np
import pytest
from matplotlib.figure import Figure

import jaxloop as jl
from jaxloop._core.lazy import EpochRecords
from jaxloop._core.sessions import Session, Sessions
from jaxloop._core.state import Snapshot
from jaxloop._core.times import EpochTime

pytestmark = pytest.mark.slow  # CI counts their coverage all the same

HISTORY = {
    0: {"loss": 3.0, "accuracy": 0.2, "validation_loss": 3.5, "validation_accuracy": 0.1},
    1: {"loss": 2.0, "accuracy": 0.5, "validation_loss": 2.5, "validation_accuracy": 0.4},
    2: {"loss": 1.0, "accuracy": 0.9, "validation_loss": 2.8, "validation_accuracy": 0.4},
}


def snapshot(history=HISTORY, times=(), sessions=(), **fields):
    return Snapshot(
        lazy_history=EpochRecords.of(history),
        lazy_times=EpochRecords.of(dict(enumerate(times))),
        lazy_sessions=Sessions(tuple(sessions)),
        **fields,
    )


def legend(figure):
    return [text.get_text() for one in figure.legends for text in one.get_texts()]


def lines(axes, label):
    return [line for line in axes.get_lines() if line.get_label() == label]


def png(figure):
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=30)
    return image.getvalue()


def ys(line):
    return list(np.asarray(line.get_ydata(), float))


# --- curves --------------------------------------------------------------------------------------


def test_one_panel_for_each_metric_with_its_validation():
    figure = jl.plot(HISTORY, title="mine")
    assert [axes.get_ylabel() for axes in figure.axes] == ["loss", "accuracy"]
    loss = figure.axes[0]
    assert loss.get_xlabel() == "epoch (from 0)"
    (training,), (validation,) = lines(loss, "training"), lines(loss, "validation")
    assert ys(training) == [3, 2, 1] and ys(validation) == [3.5, 2.5, 2.8]
    assert training.get_linestyle() != validation.get_linestyle()
    assert training.get_color() != validation.get_color()
    assert training.get_marker() != validation.get_marker()
    assert legend(figure) == ["training", "validation", "best epoch"]
    assert figure.get_suptitle() == "mine"


def test_the_best_epoch_of_the_validation_is_marked_as_the_metric_says():
    loss, accuracy = jl.plot(HISTORY).axes
    (star,) = lines(loss, "best epoch")
    assert (star.get_xdata()[0], star.get_ydata()[0]) == (1, 2.5)
    assert loss.get_title(loc="left") == "best 2.5 at epoch 1"
    (star,) = lines(accuracy, "best epoch")
    assert (star.get_xdata()[0], star.get_ydata()[0]) == (1, 0.4)  # the first of equals


def test_without_a_direction_nothing_is_the_best():
    history = {0: {"mine": 1.0}, 1: {"mine": 2.0}}
    (axes,) = jl.plot(history).axes
    assert not lines(axes, "best epoch")
    (axes,) = jl.plot(history, better={"mine": "max"}).axes
    assert lines(axes, "best epoch")[0].get_xdata()[0] == 1


def test_a_run_is_drawn_with_all_its_metrics_but_arrays():
    step = lambda batch, total: jl.emit(total + batch, x=batch, y_true=1, y_pred=1)  # noqa: E731
    loop = jl.loop(step).metric("x")
    loop = loop.metric(lambda x: x * np.ones(3), "three", None, ["x"], per="batch")
    state = loop.final_state([1.0, 2.0], init_state=0.0, epochs=4)
    (axes,) = jl.plot(state).axes
    assert axes.get_ylabel() == "x" and ys(axes.get_lines()[0]) == [1.5] * 4
    assert len(png(jl.plot(state))) > 1000


@pytest.mark.parametrize("num", [1, 3, 4, 5, 10])
def test_the_panels_of_many_metrics(num):
    history = {0: {f"m{i}": float(i) for i in range(num)}}
    figure = jl.plot(history)
    assert len(figure.axes) == num
    assert len({axes.get_position().bounds for axes in figure.axes}) == num


def test_the_loss_comes_first():
    figure = jl.plot({0: {"accuracy": 0.5, "validation_loss": 2.0, "loss": 1.0}})
    assert [axes.get_ylabel() for axes in figure.axes] == ["loss", "accuracy"]


def test_chosen_metrics_in_their_order():
    figure = jl.plot(HISTORY, metrics=["accuracy", "loss"])
    assert [axes.get_ylabel() for axes in figure.axes] == ["accuracy", "loss"]
    with pytest.raises(jl.errors.UnknownNameError, match="did you mean 'accuracy'"):
        jl.plot(HISTORY, metrics=["acuracy"])
    with pytest.raises(jl.errors.UnknownNameError):
        jl.plot(HISTORY, better={"f1": "max"})
    with pytest.raises(jl.errors.ArgumentTypeError, match="list of names"):
        jl.plot(HISTORY, metrics="loss")


def test_a_validation_of_some_epochs_is_a_line_through_them():
    history = {
        e: {"loss": 1.0} | ({"validation_loss": 2.0} if e % 5 == 0 else {}) for e in range(11)
    }
    (axes,) = jl.plot(history).axes
    (validation,) = lines(axes, "validation")
    assert list(validation.get_xdata()) == [0, 5, 10]


def test_a_validation_alone_and_another_prefix():
    (axes,) = jl.plot({0: {"validation_loss": 2.0}}).axes
    assert axes.get_ylabel() == "loss" and lines(axes, "validation")
    history = {0: {"loss": 1.0, "validation_loss": 2.0, "test_loss": 3.0}}
    (axes,) = jl.plot(history, prefixes=["validation_", "test_"]).axes
    styles = {lines(axes, kind)[0].get_linestyle() for kind in ("training", "validation", "test")}
    colours = {lines(axes, kind)[0].get_color() for kind in ("training", "validation", "test")}
    assert len(colours) == 3 and len(styles) >= 2


def test_values_that_are_not_finite_are_gaps_with_a_mark():
    values = [1.0, np.nan, 0.5, np.inf, 0.2, 0.1]
    figure = jl.plot({e: {"loss": value} for e, value in enumerate(values)})
    (axes,) = figure.axes
    (training,) = lines(axes, "training")
    assert [e for e, y in enumerate(ys(training)) if np.isnan(y)] == [1, 3]
    crosses = [line for line in axes.get_lines() if line.get_marker() == "x"]
    assert [list(line.get_xdata()) for line in crosses] == [[1, 3]]
    assert lines(axes, "best epoch")[0].get_xdata()[0] == 5
    assert "not finite" in legend(figure)
    assert png(figure)


def test_no_finite_value():
    figure = jl.plot({0: {"loss": np.nan}, 1: {"loss": np.inf}}, log_scale=True)
    assert [text.get_text() for text in figure.axes[0].texts] == ["no finite value"]
    assert png(figure)


def test_a_logarithmic_scale_where_it_is_possible():
    history = {e: {"loss": 10.0**-e, "mine": -1.0} for e in range(5)}
    assert [a.get_yscale() for a in jl.plot(history, log_scale=True).axes] == ["log", "linear"]
    assert [a.get_yscale() for a in jl.plot(history, log_scale=["mine"]).axes] == ["linear"] * 2
    with pytest.raises(jl.errors.UnknownNameError):
        jl.plot(history, log_scale=["los"])


def test_comparison_of_runs():
    other = {e: {name: value + 1 for name, value in m.items()} for e, m in HISTORY.items()}
    figure = jl.plot({"adam": HISTORY, "sgd": snapshot(other, epoch=3, status="halted")})
    loss = figure.axes[0]
    colours = {lines(loss, f"{run}, training")[0].get_color() for run in ("adam", "sgd")}
    assert len(colours) == 2 and len(lines(loss, "best epoch")) == 2
    (solid,), (dashed,) = lines(loss, "sgd, training"), lines(loss, "sgd, validation")
    assert solid.get_color() == dashed.get_color()
    assert solid.get_linestyle() != dashed.get_linestyle()
    assert legend(figure) == ["adam", "sgd", "training", "validation", "best epoch"]
    assert "run 1" in legend(jl.plot([HISTORY, other]))


def test_events_are_marked():
    sessions = [
        Session(began=0, first_step=0, last_step=20, elapsed_s=1),
        Session(began=9, first_step=20, last_step=30, elapsed_s=1),
    ]
    state = snapshot(
        sessions=sessions, epoch=3, step=30, status="halted", halted_by="early_stop_loss"
    )
    figure = jl.plot(state)
    assert legend(figure)[3:] == ["resumed", "halted by early_stop_loss"]
    vertical = {
        line.get_xdata()[0]
        for line in figure.axes[1].get_lines()
        if len(line.get_ydata()) == 2 and line.get_xdata()[0] == line.get_xdata()[-1]
    }
    assert {1.5, 2.0} <= vertical  # after two epochs of ten steps, and at the last
    state = snapshot(epoch=3, iteration=5, step=35, status="interrupted", halted_by="SIGTERM")
    assert "interrupted by SIGTERM" in legend(jl.plot(state))


def test_a_lowered_learning_rate_is_marked_and_a_schedule_is_not():
    rates = [1e-3] * 4 + [1e-4] * 3
    figure = jl.plot({e: {"loss": 1.0, "learning_rate": rate} for e, rate in enumerate(rates)})
    assert "learning rate lowered" in legend(figure)
    figure = jl.plot({e: {"loss": 1.0, "learning_rate": 1.0 / (e + 9)} for e in range(50)})
    assert "learning rate lowered" not in legend(figure)


def test_what_cannot_be_drawn():
    for wrong in (3, "runs/a", None, {0: 1.0}, {"a": 3}, [HISTORY, "b"], {"loss": [1.0, 2.0]}):
        with pytest.raises(jl.errors.ArgumentTypeError, match="a run must be"):
            jl.plot(wrong)
    for empty in ({}, [], Snapshot(), {"a": {}}):
        with pytest.raises(jl.errors.ArgumentError, match="finished epoch"):
            jl.plot(empty)
    with pytest.raises(jl.errors.ArgumentError, match="one number"):
        jl.plot({0: {"matrix": np.eye(2)}})


# --- the timeline --------------------------------------------------------------------------------


TIMES = [EpochTime(4.0, 1.0, 0.5, 0.25, compile_s=0.75), EpochTime(3.0, 1.0, 0.5, 0.25)]


def test_the_timeline_stacks_the_parts_of_each_epoch_and_session():
    sessions = [
        Session(began=0, first_step=0, last_step=7, elapsed_s=6, data_s=2, start_s=1, lost_s=2),
        Session(began=9, first_step=5, last_step=9, elapsed_s=4, validation_s=1, saves_s=1),
    ]
    figure = jl.plot_timeline(snapshot(times=TIMES, sessions=sessions, step=9))
    epochs, by_session = figure.axes
    assert epochs.get_ylabel() == "time (s)" and by_session.get_xlabel() == "time (s)"
    tops = [
        max(p.get_y() + p.get_height() for p in epochs.patches if round(p.get_x() + 0.4) == e)
        for e in (0, 1)
    ]
    assert tops == pytest.approx([4.0, 3.0])
    ends = [
        max(p.get_x() + p.get_width() for p in by_session.patches if round(p.get_y() + 0.35) == i)
        for i in (0, 1)
    ]
    assert ends == pytest.approx([8.0, 4.0])  # with what was lost
    assert [t.get_text() for t in by_session.get_yticklabels()] == [
        "steps 0\nto 7",
        "steps 5\nto 9",
    ]
    shares = dict(text.rsplit(" ", 2)[:2] for text in legend(figure))
    assert shares["device"] == "42" and shares["lost"] == "17" and shares["start"] == "8"
    assert "12 s" in figure.get_suptitle() and "42%" in figure.get_suptitle()
    hatches = {(p.get_facecolor(), p.get_hatch()) for p in figure.legends[0].get_patches()}
    assert len(hatches) == len(shares)
    assert len({hatch for _, hatch in hatches}) == len(shares)


def test_the_timeline_of_a_run():
    loop = jl.loop(lambda batch, total: total + batch)
    state = loop.run([1, 2], init_state=0, epochs=3)
    assert len(jl.plot_timeline(state).axes) == 2
    assert jl.plot_timeline(state, title="mine").get_suptitle() == "mine"


def test_many_epochs_and_plain_seconds():
    figure = jl.plot_timeline(snapshot(times=[0.001] * 200))
    (axes,) = figure.axes
    assert axes.get_ylabel() == "time (ms)" and not axes.patches and axes.collections
    assert png(figure)


def test_a_timeline_of_nothing():
    with pytest.raises(jl.errors.ArgumentError, match="must have ended"):
        jl.plot_timeline(Snapshot())
    with pytest.raises(jl.errors.ArgumentTypeError, match="a State or a Snapshot"):
        jl.plot_timeline(HISTORY)


# --- confusion matrices --------------------------------------------------------------------------


def texts(figure):
    return [text.get_text() for text in figure.axes[0].texts]


def test_a_confusion_matrix_has_true_classes_as_rows():
    figure = jl.plot_confusion_matrix(np.array([[5, 1], [2, 30]]), ["cat", "dog"])
    axes, bar = figure.axes
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("predicted class", "true class")
    assert texts(figure) == ["5", "1", "2", "30"] and bar.get_ylabel() == "examples"
    assert [(t.get_position(), t.get_text()) for t in axes.texts][1] == ((1, 0), "1")
    assert [label.get_text() for label in axes.get_xticklabels()] == ["cat", "dog"]


@pytest.mark.parametrize(
    "normalize, expected",
    [
        ("true", ["75 %", "25 %"]),
        ("predicted", ["100 %", "100 %", "0", "0"]),
        ("all", ["75 %", "25 %", "0", "0"]),
    ],
)
def test_normalized(normalize, expected):
    figure = jl.plot_confusion_matrix([[3, 1], [0, 0]], normalize=normalize)
    assert texts(figure) == expected  # a row of zeros has no shares
    assert figure.axes[1].get_ylabel().startswith("share of")
    assert png(figure)


def test_large_and_empty_matrices():
    figure = jl.plot_confusion_matrix(np.eye(100))
    assert not texts(figure) and len(figure.axes[0].get_xticks()) < 30
    assert png(jl.plot_confusion_matrix(np.zeros((3, 3)), normalize="all"))


def test_the_metric_is_drawn():
    loop = jl.loop(lambda b, s: jl.emit(s, y_true=b, y_pred=b)).metric(
        jl.metrics.confusion_matrix(3)
    )
    state = loop.run([np.array([0, 2, 2])])
    matrix = state.history[0]["confusion_matrix"]
    assert texts(jl.plot_confusion_matrix(matrix))[::4] == ["1", "0", "2"]


def test_wrong_matrices():
    for wrong in (np.zeros((2, 3)), np.zeros(4), np.zeros((0, 0))):
        with pytest.raises(jl.errors.ShapeError):
            jl.plot_confusion_matrix(wrong)
    for wrong in ([[1, np.nan], [0, 1]], [[-1, 0], [0, 1]]):
        with pytest.raises(jl.errors.ArgumentError, match="at least 0"):
            jl.plot_confusion_matrix(wrong)
    with pytest.raises(jl.errors.ShapeError, match="2 classes, got 3"):
        jl.plot_confusion_matrix(np.eye(2), ["a", "b", "c"])
    with pytest.raises(jl.errors.UnknownNameError):
        jl.plot_confusion_matrix(np.eye(2), normalize="rows")
    with pytest.raises(jl.errors.ArgumentTypeError):
        jl.plot_confusion_matrix("matrix")


# --- the figure ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_nothing_global_changes_and_pyplot_is_not_imported():
    code = """
import sys, numpy as np, matplotlib
rc = matplotlib.rcParams
before = {k: dict.__getitem__(rc, k) for k in dict.keys(rc)}  # resolves no backend
import jaxloop as jl
assert jl.plot and "matplotlib.figure" not in sys.modules
state = jl.loop(lambda b, s: jl.emit(s, x=b)).metric("x").run([1.0, 2.0], epochs=2)
for figure in (jl.plot(state), jl.plot_timeline(state), jl.plot_confusion_matrix(np.eye(2))):
    assert figure._repr_png_().startswith(b"\\x89PNG")
assert {k: dict.__getitem__(rc, k) for k in dict.keys(rc)} == before
assert "matplotlib.pyplot" not in sys.modules
"""
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, timeout=120)


def test_a_given_figure_is_used_and_keeps_its_size():
    mine = Figure(figsize=(3, 3))
    mine.add_subplot()
    assert jl.plot(HISTORY, figure=mine) is mine
    assert len(mine.axes) == 2 and mine.get_size_inches().tolist() == [3, 3]


def test_the_style_of_the_user_is_kept():
    with matplotlib.rc_context({"figure.facecolor": "black", "text.color": "white"}):
        figure = jl.plot(HISTORY)
        assert figure.get_facecolor()[:3] == (0, 0, 0)
        assert figure.legends[0].get_texts()[0].get_color() == "white"


def test_without_matplotlib_the_error_names_the_extra(monkeypatch):
    monkeypatch.delitem(sys.modules, "jaxloop._plotting.canvas", raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(jl.errors.MissingExtraError, match=r"functional-jaxloop\[plot\]"):
        jl.plot(HISTORY)
    with pytest.raises(ImportError):
        jl.plot_confusion_matrix(np.eye(2))

"""TensorBoard's files, read with TensorBoard's own reader."""

import os
import sys

import jax.numpy as jnp
import numpy as np
import pytest

import jaxloop as jl
from jaxloop.writers import Histogram, Image, Text

from .failing import failing_at

pytestmark = pytest.mark.slow  # CI counts their coverage all the same

pytest.importorskip("tensorboardX")
accumulator = pytest.importorskip(
    "tensorboard.backend.event_processing.event_accumulator",
    # A dependency of TensorBoard warns of its own.
    exc_type=ImportError,
)

DATA = [1.0, 2.0, 6.0, 3.0, 0.5]


def step_fn(batch, total):
    return jl.emit(total + batch, x=batch)


def load(folder):
    loaded = accumulator.EventAccumulator(
        str(folder), size_guidance=dict.fromkeys(accumulator.DEFAULT_SIZE_GUIDANCE, 0)
    )
    loaded.Reload()
    return loaded


def scalars(folder):
    loaded = load(folder)
    return {
        tag: [(event.step, event.value) for event in loaded.Scalars(tag)]
        for tag in loaded.Tags()["scalars"]
    }


def add_validation(state):
    return "continue", state.replace(metrics={**state.metrics, "validation_x": 7.0})


def test_everything_is_read_back(tmp_path):
    pixels = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)

    def values(state):
        return {
            "picture": Image(pixels),
            "gray": Image(jnp.full((3, 2), 0.5)),
            "note": Text(f"step **{state.step}**"),
            "weights/a b": Histogram(jnp.array([1, 0, 2]), jnp.array([0.0, 1.0, 2.0, 3.0])),
            "array": np.ones(3),
        }

    loop = jl.loop(step_fn).metric("x").handle("epoch_completed", add_validation)
    writer = jl.writers.tensorboard(tmp_path / "a")
    loop = loop.write(
        writer, every=2, values=values, hyperparameters={"rate": 0.1, "name": "sgd", "odd": (1, 2)}
    )
    state = loop.run(DATA, 0.0, epochs=2)
    read = scalars(tmp_path / "a")
    steps = [2, 4, 5, 6, 8, 10]
    assert [step for step, _ in read["x"]] == steps
    assert read["x"][2] == (5, np.float32(state.history[0]["x"]))
    assert read["validation_x"] == [(5, 7.0), (10, 7.0)]
    assert [value for _, value in read["epoch"]] == [0, 0, 0, 1, 1, 1]
    loaded = load(tmp_path / "a")
    assert [event.step for event in loaded.Histograms("weights/a b")] == steps
    histogram = loaded.Histograms("weights/a b")[0].histogram_value
    assert (histogram.min, histogram.max, histogram.num) == (0.0, 3.0, 3.0)
    assert histogram.bucket == [0.0, 1.0, 0.0, 2.0]
    assert histogram.bucket_limit == [0.0, 1.0, 2.0, 3.0]
    assert [event.step for event in loaded.Images("picture")] == steps
    picture = loaded.Images("picture")[0]
    assert (picture.width, picture.height) == (4, 2)
    texts = loaded.Tensors("note/text_summary")
    assert [event.step for event in texts] == steps
    assert texts[0].tensor_proto.string_val == [b"step **2**"]
    (table,) = loaded.Tensors("hyperparameters/text_summary")
    assert b"| rate | 0.1 |" in table.tensor_proto.string_val[0]
    assert (
        "hparams" in loaded.summary_metadata["_hparams_/session_start_info"].plugin_data.plugin_name
    )


def test_images_are_exact(tmp_path):
    image = pytest.importorskip("PIL.Image")
    import io

    for channels in (1, 3, 4):
        pixels = np.random.default_rng(0).integers(0, 256, (5, 7, channels)).astype(np.uint8)
        folder = tmp_path / str(channels)
        loop = jl.loop(step_fn).write(
            jl.writers.tensorboard(folder), values=lambda s, p=pixels: {"p": Image(p)}
        )
        loop.run([1.0], 0.0)
        (event,) = load(folder).Images("p")
        read = np.asarray(image.open(io.BytesIO(event.encoded_image_string)))
        assert (read.reshape(pixels.shape) == pixels).all()


def run(folder, *, epochs, fail_at=None):
    loop = jl.loop(step_fn).metric("x").handle("epoch_completed", add_validation)
    loop = loop.write(
        jl.writers.tensorboard(folder / "tb"),
        every=1,
        values=lambda s: {"h": Histogram.of([s.step]), "t": Text(str(s.step))},
        hyperparameters={"rate": 0.1},
    )
    loop = loop.checkpoint(
        folder / "saved", event="iteration_completed", filter=jl.every(3), on_exception=False
    ).resume(folder / "saved")
    return failing_at(loop, fail_at).run(DATA, 0.0, epochs=epochs)


def test_the_end_of_an_epoch_that_a_resumed_run_wrote_first_is_kept(tmp_path):
    def train(*, fail_at=None):
        def fail(snapshot):
            if snapshot.step == fail_at:
                raise KeyError("killed")

        loop = jl.loop(step_fn).metric("x").handle("epoch_completed", add_validation)
        loop = loop.write(jl.writers.tensorboard(tmp_path / "tb"))
        saved = tmp_path / "saved"
        loop = loop.checkpoint(
            saved, event="iteration_completed", filter=jl.every(5), name="a", on_exception=False
        )
        loop = loop.checkpoint(saved, name="b", on_exception=False, resume=True)
        return loop.observe("iteration_completed", fail).run(DATA, 0.0, epochs=2)

    # Saved before the end of the epoch, then after it, at the same step.
    for step in (5, 8, 8):
        with pytest.raises(KeyError, match="killed"):
            train(fail_at=step)
    train()
    assert scalars(tmp_path / "tb")["validation_x"] == [(5, 7.0), (10, 7.0)]
    assert [step for step, _ in scalars(tmp_path / "tb")["x"]] == [5, 10]


def test_no_step_is_doubled_missing_or_stale_after_a_resume(tmp_path):
    run(tmp_path / "whole", epochs=3)
    for step in (2, 5, 8, 8, 11, 14):
        with pytest.raises(KeyError, match="killed"):
            run(tmp_path / "torn", epochs=3, fail_at=step)
    folder = tmp_path / "torn" / "tb"
    assert len(os.listdir(folder)) == 5
    # A killed process may tear the last record of a file.
    last = folder / sorted(os.listdir(folder))[-1]
    last.write_bytes(last.read_bytes()[:-7])
    watching = load(folder)
    run(tmp_path / "torn", epochs=3)
    # A TensorBoard that has read what was dropped forgets it.
    watching.Reload()
    assert [e.step for e in watching.Scalars("x")] == list(range(1, 16))
    torn, whole = load(folder), load(tmp_path / "whole" / "tb")
    assert torn.Tags() == whole.Tags()
    assert scalars(folder) == scalars(tmp_path / "whole" / "tb")
    assert [s for s, _ in scalars(folder)["x"]] == list(range(1, 16))
    assert [e.step for e in torn.Histograms("h")] == list(range(1, 16))
    assert [e.step for e in torn.Tensors("t/text_summary")] == list(range(1, 16))
    assert len(torn.Tensors("hyperparameters/text_summary")) == 1


@pytest.mark.slow
def test_the_end_of_an_epoch_is_not_doubled(tmp_path):
    """The checkpoint at the last iteration is older than the row of the epoch, at the same step."""

    def fail(snapshot):
        raise KeyError("killed")

    def attach(every, *, fails):
        loop = jl.loop(step_fn).metric("x").handle("epoch_completed", add_validation)
        folder = tmp_path / str(every)
        loop = loop.write(
            jl.writers.tensorboard(folder / "tb"), every=every, values=lambda s: {"t": Text("a")}
        )
        loop = loop.checkpoint(
            folder, event="iteration_completed", filter=jl.every(5), on_exception=False
        ).resume(folder)
        return loop.observe("epoch_completed", fail) if fails else loop

    for every in (2, 5):
        with pytest.raises(KeyError):
            attach(every, fails=True).run(DATA, 0.0, epochs=2)
        folder = tmp_path / str(every) / "tb"
        assert scalars(folder)["validation_x"] == [(5, 7.0)]
        attach(every, fails=False).run(DATA, 0.0, epochs=2)
        read = scalars(folder)
        assert read["validation_x"] == [(5, 7.0), (10, 7.0)]
        steps = [5, 10] if every == 5 else [2, 4, 5, 6, 8, 10]
        assert [step for step, _ in read["x"]] == steps
        assert [e.step for e in load(folder).Tensors("t/text_summary")] == steps


def test_a_fresh_run_moves_earlier_files_aside(tmp_path):
    loop = jl.loop(step_fn).metric("x").write(jl.writers.tensorboard(tmp_path / "a"))
    for epochs in (1, 2, 3):
        loop.run(DATA, 0.0, epochs=epochs)
    (tmp_path / "a" / "mine").write_text("kept")
    assert [len(scalars(tmp_path / name)["x"]) for name in ("a.1", "a.2", "a")] == [1, 2, 3]
    first = loop.run(DATA, 0.0, epochs=1)
    assert len(scalars(tmp_path / "a.3")["x"]) == 3
    assert (tmp_path / "a" / "mine").read_text() == "kept"
    loop.from_state(first).run(DATA, epochs=3)
    assert not (tmp_path / "a.4").exists()  # nothing had to go
    assert len(scalars(tmp_path / "a")["x"]) == 3
    loop.from_state(first).run(DATA, epochs=2)
    assert len(scalars(tmp_path / "a.4")["x"]) == 3
    assert len(scalars(tmp_path / "a")["x"]) == 2


def test_a_clock_that_went_back_does_not_change_the_order(tmp_path):
    loop = jl.loop(step_fn).metric("x").write(jl.writers.tensorboard(tmp_path))
    state = loop.run(DATA, 0.0, epochs=1)
    (file,) = tmp_path.iterdir()
    seconds = file.name.split(".")[3]
    later = file.with_name(file.name.replace(seconds, f"{int(seconds) + 1000:010d}"))
    file.rename(later)
    loop.from_state(state).run(DATA, epochs=2)
    assert sorted(os.listdir(tmp_path))[0] == later.name
    assert [step for step, _ in scalars(tmp_path)["x"]] == [5, 10]


def test_numbers_that_are_not_finite(tmp_path):
    values = {"a": float("nan"), "b": float("inf"), "c": True, "d": 2**40}
    loop = jl.loop(step_fn).write(jl.writers.tensorboard(tmp_path), values=lambda s: values)
    loop.run([1.0], 0.0)
    read = scalars(tmp_path)
    assert np.isnan(read["a"][0][1]) and np.isinf(read["b"][0][1])
    assert read["c"][0][1] == 1.0 and read["d"][0][1] == 2.0**40


def test_files_of_other_programs_are_an_error_and_stay(tmp_path):
    (tmp_path / "events.out.tfevents.1.host").write_bytes(b"theirs")
    loop = jl.loop(step_fn).metric("x").write(jl.writers.tensorboard(tmp_path))
    with pytest.raises(jl.errors.WriterError, match="must have no event files of other programs"):
        loop.run(DATA, 0.0)
    assert os.listdir(tmp_path) == ["events.out.tfevents.1.host"]
    assert (tmp_path / "events.out.tfevents.1.host").read_bytes() == b"theirs"


def test_a_missing_package_is_an_error_that_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX.proto.event_pb2", None)
    loop = jl.loop(step_fn).write(jl.writers.tensorboard(tmp_path))
    with pytest.raises(jl.errors.MissingExtraError, match=r"functional-jaxloop\[tensorboard\]"):
        loop.run(DATA, 0.0)

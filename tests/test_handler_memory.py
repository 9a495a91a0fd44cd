"""What handlers remember comes back exactly, or the first save is an error that says where."""

import collections
import dataclasses
import datetime
import decimal
import enum
import fractions
import json
import math
import pathlib
import struct

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import jaxloop as jl
from jaxloop.errors import SerializationError

SUM = jl.loop(lambda batch, total: total + batch)


@pytest.fixture(scope="module")
def ended():
    return SUM.run([np.float32(1)], 0.0)


def there_and_back(state, value):
    state = state.replace(handler_state={"mine": {"value": value}})
    back = jl.deserialize_state(jl.serialize_state(state), like=state)
    return back.handler_state["mine"]["value"]


def assert_same(back, value):
    """Types, dtypes, order, and bits that ``==`` does not compare."""
    assert type(back) is type(value)
    if isinstance(value, np.ma.MaskedArray):
        assert_same(np.ma.getmaskarray(back), np.ma.getmaskarray(value))
        assert_same(np.ma.getdata(back), np.ma.getdata(value))
        assert (back.mask is np.ma.nomask) == (value.mask is np.ma.nomask)
        assert back.hardmask == value.hardmask
        assert repr(back.fill_value) == repr(value.fill_value)
    elif isinstance(value, np.ndarray | np.generic):
        assert repr(back.dtype) == repr(value.dtype) and back.dtype.char == value.dtype.char
        assert back.shape == value.shape
        if value.dtype == object:
            for one, other in zip(back.flat, value.flat, strict=True):
                assert_same(one, other)
        elif value.dtype.names or value.dtype.char in "gG":  # these have bytes without a meaning
            assert repr(back) == repr(value)
        else:
            assert back.tobytes() == value.tobytes()
    elif isinstance(value, jax.Array):
        assert back.aval == value.aval  # shape, dtype and weak type
        if jax.dtypes.issubdtype(value.dtype, jax.dtypes.prng_key):
            back, value = jax.random.key_data(back), jax.random.key_data(value)
        assert np.asarray(back).tobytes() == np.asarray(value).tobytes()
    elif isinstance(value, dict):
        assert len(back) == len(value)
        for (key, one), (name, other) in zip(back.items(), value.items(), strict=True):
            assert_same(key, name)
            assert_same(one, other)
        if isinstance(value, collections.defaultdict):
            assert back.default_factory is value.default_factory
    elif isinstance(value, list | tuple):
        assert len(back) == len(value)
        for one, other in zip(back, value, strict=True):
            assert_same(one, other)
    elif isinstance(value, float):
        assert struct.pack("<d", back) == struct.pack("<d", value)
        assert getattr(back, "parts", None) == getattr(value, "parts", None)  # of an EpochTime
    elif isinstance(value, complex):
        assert_same(back.real, value.real)
        assert_same(back.imag, value.imag)
    else:
        assert back == value


def float_of(bits):
    return struct.unpack("<d", struct.pack("<Q", bits))[0]


RECORDS = [("a", "<i4"), ("b", ">f8"), ("c", "U2", (2,))]

EXACT = {
    "negative zero": -0.0,
    "infinities": [math.inf, -math.inf],
    "a NaN with a payload": float_of(0x7FF8DEAD00000001),
    "a NaN with a sign": float_of(0xFFF8000000000000),
    "a complex number": complex(float_of(0xFFF8000000000000), -0.0),
    "large whole numbers": [2**63, -(2**64), 10**5000],
    "half of a surrogate pair": "\ud83d",
    "both halves apart": "\ud83d\ude00",
    "much text": "ä" * 2_000_000,
    "many bytes": b"\x00\xff" * 1_000_000,
    "keys of many types": {
        1.5: 1,
        -0.0: 2,
        (1, "b"): 3,
        None: 5,
        b"a": 6,
        np.int8(7): 8,
        10**5000: 9,
    },
    "NumPy's strings": [np.str_("a"), np.str_("a\0"), np.bytes_(b"a"), np.bytes_(b"a\0")],
    "arrays of strings": [np.array(["a", "bcd"]), np.array([b"a", b"bc"]), np.array([""])],
    "strings in the other byte order": np.array(["a", "bcd"], ">U3"),
    "structured": np.array([(1, 2.0, ["x", "y"])], RECORDS),
    "one record": np.array([(1, 2.0, ["x", "y"])], RECORDS)[0],
    "aligned records": np.zeros(2, np.dtype([("a", "i1"), ("b", "i8")], align=True)),
    "records with a bfloat16": np.zeros(2, [("a", ml_dtypes.bfloat16), ("b", np.longdouble)]),
    "raw bytes": [np.zeros(2, "V8"), np.void(b"abc")],
    "an object array": np.array([[1, "a"], [None, np.float32(2)]], object),
    "one object": np.array(collections.Counter("aab"), object),
    "big-endian": [np.arange(3, dtype=">i4"), np.arange(400, dtype=">f8"), np.array(3, ">i2")],
    "masked": np.ma.array([1, 2, 3], mask=[0, 1, 0], fill_value=7),
    "masked in no place": np.ma.array(np.arange(300.0)),
    "masked for good": np.ma.array([1.5, 2], mask=True, hard_mask=True),
    "masked records": np.ma.array([(1, 2.0)], [("a", "i4"), ("b", "f8")], mask=[(1, 0)]),
    "masked strings": np.ma.array(["a", "bcd"], mask=[1, 0]),
    "masked objects": np.ma.array([None, "b"], mask=[1, 0], dtype=object),
    "no axes": [np.array(3.0), np.float64(3.0), np.array(True), np.array("a")],
    "dates": np.array(["2020-01-01", "NaT"], "M8[D]"),
    "dates with units": [np.arange(400).astype("M8[25s]"), np.timedelta64(3, "ms")],
    "no date": [
        np.datetime64("NaT", "s"),
        np.datetime64("NaT", "ns"),
        np.array(["NaT"], ">M8[us]"),
    ],
    "long doubles": [np.longdouble("1.1"), np.arange(400, dtype=np.longdouble) / 3],
    "complex long doubles": np.clongdouble(1 + 2j) / 3,
    "long longs": [np.longlong(3), np.zeros(400, np.ulonglong)],
    "small types": [np.array([1, -2], ml_dtypes.int4), ml_dtypes.float8_e4m3fn(1), np.bool_(1)],
    "no elements": [np.zeros((0, 3)), np.zeros(0, "U3"), np.zeros((2, 0), ">i4")],
    "columns": np.asfortranarray(np.arange(6).reshape(2, 3)),
    "a counter": collections.Counter("abracadabra"),
    "an ordered dict": collections.OrderedDict(b=1, a=2),
    "a default": collections.defaultdict(int, b=1, a=2),
    "other defaults": [collections.defaultdict(list, a=[1]), collections.defaultdict(None, a=1)],
    "what a state shows": [
        jl.Event.STARTED,
        jl.Status.HALT_LOOP,
        {jl.Event.COMPLETED: (1, 0)},
    ],
    "on the device": [jnp.arange(3, dtype=jnp.bfloat16), jnp.arange(400), jnp.zeros((0, 2))],
    "weak types": [jnp.asarray(0.0), jnp.asarray(3), jnp.full((2, 3), 1.5)],
    "keys": [jax.random.key(3), jax.random.split(jax.random.key(1, impl="rbg"), 2)],
    "deep": json.loads("[" * 60 + "]" * 60),
}


@pytest.mark.parametrize("kind", EXACT)
def test_what_a_handler_remembers_comes_back_exactly(kind, ended):
    assert_same(there_and_back(ended, EXACT[kind]), EXACT[kind])


def test_what_a_handler_remembers_comes_back_exactly_from_a_folder(tmp_path):
    def remember(state):
        return "continue", state.replace(handler_state={"mine": EXACT})

    loop = SUM.handle("epoch_completed", remember).checkpoint(tmp_path)
    loop.run([np.float32(1)], 0.0)
    assert_same(dict(jl.restore(tmp_path).handler_state["mine"]), EXACT)


def test_what_a_state_shows_can_be_remembered(tmp_path):
    """Handlers remember `state.metrics` and `state.times` as they are."""
    remembered = []

    def remember(state):
        seen = [state.metrics, state.history, state.times[0], state.event_counts]
        remembered.append(seen)
        return "continue", state.replace(handler_state={"mine": seen})

    loop = jl.loop(lambda b, s: jl.emit(s + b, x=b)).metric(lambda x: x, "mean", None, ["x"])
    loop.handle("epoch_completed", remember).checkpoint(tmp_path).run([np.float32(1)], 0.0)
    assert_same(jl.restore(tmp_path).handler_state["mine"], remembered[0])


class Whole(enum.IntEnum):
    ONE = 1


class Word(enum.StrEnum):
    ONE = "one"


class Text(str):
    pass


class Own(dict):
    pass


class Table(np.ndarray):
    pass


Pair = collections.namedtuple("Pair", "a b")


@dataclasses.dataclass
class Data:
    a: int = 1


def in_itself():
    value = []
    value.append(value)
    return value


def donated():
    array = jnp.arange(3)
    array.delete()
    return array


INEXACT = {
    "IntEnum": Whole.ONE,
    "StrEnum": Word.ONE,
    "a str of one's own": Text("a"),
    "an int of one's own": type("Mine", (int,), {})(3),
    "a float of one's own": type("Mine", (float,), {})(3),
    "a dict of one's own": Own(a=1),
    "an array of one's own": np.arange(3).view(Table),
    "a record array": np.zeros(2, [("a", "i4")]).view(np.recarray),
    "the masked constant": np.ma.masked,
    "a named tuple": Pair(1, 2),
    "a data class": Data(),
    "a date": datetime.date(2020, 1, 1),
    "a time span": datetime.timedelta(1),
    "a set": {1, 2},
    "a frozen set": frozenset([1]),
    "a range": range(3),
    "a decimal": decimal.Decimal("1.1"),
    "a fraction": fractions.Fraction(1, 3),
    "a deque": collections.deque([1]),
    "a path": pathlib.PurePath("a"),
    "a function": len,
    "a default that is a function": collections.defaultdict(lambda: 3),
    "objects in records": np.zeros(2, [("a", object)]),
    "an object in an object array": np.array([{1}], object),
    "text without a length": np.array(["a"], np.dtypes.StringDType()),
    "a dtype with titles": np.zeros(2, np.dtype([(("title", "a"), "i1")])),
    "a dtype with metadata": np.zeros(2, np.dtype("i4", metadata={"a": 1})),
    "a list in itself": in_itself(),
    "too deep": json.loads("[" * 80 + "]" * 80),
    "a donated array": donated(),
}


@pytest.mark.parametrize("kind", INEXACT)
def test_what_cannot_be_kept_exactly_is_an_error_that_names_it(kind, ended):
    state = ended.replace(handler_state={"mine": {"best": [0, {"table": INEXACT[kind]}]}})
    with pytest.raises(SerializationError, match=r"^handler_state\['mine'\]\['best'\]\[1\]"):
        jl.serialize_state(state)


def test_the_first_save_is_the_error(tmp_path):
    def remember(state):
        return "continue", state.replace(handler_state={"mine": {"table": Whole.ONE}})

    loop = SUM.handle("iteration_completed", remember).checkpoint(tmp_path)
    with pytest.raises(SerializationError, match=r"handler_state\['mine'\]\['table'\].*Whole") as e:
        loop.run([np.float32(1)] * 9, 0.0, epochs=9)
    assert "fix: remember" in str(e.value)


def test_a_copy_of_the_step_state_comes_back_as_it_was_remembered(tmp_path):
    """On the device, on the host or as scalars; a dict in the order of its keys."""
    start = {"a": jnp.zeros(3), "b": (jnp.float32(2), jax.random.key(0))}
    state = jl.loop(lambda b, s: s).run([1.0], start)
    device, key = state.step_state, start["b"][1]
    values = [
        device,
        {"a": np.ones(3, np.float32), "b": (np.float32(2), key)},
        {"a": np.ones(3, np.float32), "b": (np.array(2, np.float32), key)},
        {"b": device["b"], "a": device["a"]},
        {"a": jnp.zeros(3), "b": (jnp.asarray(2.0), key)},
        {"a": np.zeros(3, ">f4"), "b": device["b"]},
    ]
    for value in values:
        assert_same(there_and_back(state, value), value)


def test_a_table_that_a_handler_fills_in_place_is_saved_as_it_was(tmp_path):
    """The save is written in the background, while the handler already writes on."""
    table = np.zeros(200_000)

    def fill(state):
        table[:] = state.step
        return "continue", state.replace(handler_state={"mine": table})

    loop = SUM.handle("iteration_completed", fill)
    loop = loop.checkpoint(tmp_path, event="iteration_completed", keep=None)
    loop.run([np.float32(1)] * 6, 0.0)
    for step in range(1, 7):
        assert set(jl.restore(tmp_path, step).handler_state["mine"].tolist()) == {float(step)}


def test_other_fields_are_kept_exactly_or_are_an_error(ended):
    def back(**changes):
        state = ended.replace(**changes)
        return jl.deserialize_state(jl.serialize_state(state), like=state)

    values = {
        "a": np.float32(1),
        "b": np.array(2.0),
        "c": [1],
        "d": np.zeros(2, ">f4"),
        "\ud800": 1,
    }
    history = {np.int64(0): values, 1: {"a": np.float32(2)}, 5: {}}
    assert_same(dict(back(history=history).history), {0: values, 1: {"a": np.float32(2)}, 5: {}})
    assert_same(dict(back(metrics=values).metrics), values)
    assert back(max_epoch=np.int64(7)).max_epoch == 7
    with pytest.raises(SerializationError, match=r"State.max_epoch must be int \| None, got 'x'"):
        back(max_epoch="x")
    with pytest.raises(SerializationError, match="keys of history must be numbers of epochs"):
        back(history={"first": {}})
    with pytest.raises(SerializationError, match=r"step_state\['n'\] must be an array, got 3"):
        back(step_state={"n": 3})


def test_handlers_and_metrics_may_be_named_by_an_enum(tmp_path):
    loop = jl.loop(lambda b, s: jl.emit(s + b, x=b)).metric(lambda x: x, Word.ONE, None, ["x"])
    loop = loop.early_stop(Word.ONE, mode="min", patience=1, name=Word.ONE).checkpoint(tmp_path)
    ended = loop.run([np.float32(1)], 0.0, epochs=5)
    assert ended.halted_by == "one" and ended.epoch == 2
    for state in (
        jl.restore(tmp_path),
        jl.deserialize_state(jl.serialize_state(ended), like=ended),
        loop.resume(tmp_path).run([np.float32(1)], 0.0, epochs=5),
    ):
        assert type(state.halted_by) is str and state.halted_by == "one"
        assert [type(name) for name in state.handler_state] == [str]
        assert state.history == ended.history


def test_a_long_history_is_kept_beside_the_record(ended):
    """Tens of thousands of epochs do not meet the limits on a record."""
    rows = np.arange(300 * 640, dtype=np.float64).reshape(300, 640)
    history = {epoch: {"rows": row, "more": 1.5} for epoch, row in enumerate(rows)}
    times = dict.fromkeys(range(30_000), 1.5)
    data = jl.serialize_state(ended.replace(history=history, times=times))
    assert len(data) < rows.nbytes + 30_000 * 64 + 200_000  # and not in base64
    back = jl.deserialize_state(data, like=ended)
    assert back.times == times
    assert_same(dict(back.history), history)


def test_a_record_that_could_not_be_read_is_an_error_when_it_is_saved(ended, monkeypatch, tmp_path):
    monkeypatch.setattr("jaxloop._checkpoint.schema._MOST_VALUES", 4000)

    def remember(state):
        return "continue", state.replace(handler_state={"mine": [0] * 4000})

    with pytest.raises(SerializationError, match="at most .* values.*\n.*as NumPy arrays"):
        jl.serialize_state(ended.replace(handler_state={"mine": [0] * 4000}))
    loop = SUM.handle("epoch_completed", remember).checkpoint(tmp_path)
    with pytest.raises(jl.JaxloopError, match="at most .* values"):
        loop.run([np.float32(1)], 0.0)

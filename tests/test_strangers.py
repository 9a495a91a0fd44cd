"""Bytes and folders from strangers: only our own errors, bounded memory, and nothing imported.

The quick part is in the suite. The long part is ``pytest -m slow tests/test_strangers.py``.
"""

import copy
import hashlib
import json
import os
import struct
import subprocess
import sys
import textwrap
import tracemalloc
import types
import warnings
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxloop as jl
from jaxloop._checkpoint.record import checksum
from jaxloop.errors import ArgumentTypeError, DamagedError, SerializationError

DATA = jl.batches((np.arange(24, dtype=np.float32).reshape(12, 2),), 4, shuffle=True, seed=1)


def step(batch, s):
    total = jnp.sum(batch[0])
    return jl.emit({"w": s["w"] + total, "key": jax.random.split(s["key"])[0]}, loss=total)


def remember(state):
    memory = {
        "array": np.arange(3.0),
        "large": np.arange(400.0),
        "large dates": np.arange(400).astype("M8[s]"),
        "on device": jnp.arange(400),
        "containers": [1, (2, 3.5), None, {"a": jl.Event.STARTED}],
        "masked": np.ma.array([1, 2], mask=[0, 1]),
        "key": jax.random.key(3),
        "records": np.zeros(2, [("a", ">i4"), ("b", "U2")]),
        "objects": np.array([1, None], object),
        "scalars": [1j, "\ud800", b"abc", 10**50, np.str_("a"), jnp.asarray(1.0)],
        "best": {"state": state.step_state, "metrics": state.metrics, "history": state.history},
    }
    return "continue", state.replace(handler_state={"mine": memory})


LOOP = (
    jl.loop(step, lambda batch, _: {"w": jnp.zeros(3), "key": jax.random.key(0)})
    .metric(lambda loss: loss, "loss", None, ["loss"])
    .handle("iteration_completed", remember, jl.only(2))
)


class Stop(Exception):
    pass


def stop(state):
    raise Stop


@pytest.fixture(scope="module")
def state():
    with pytest.raises(Stop) as caught:
        LOOP.handle("iteration_completed", stop, jl.only(5)).run(DATA, epochs=3)
    return caught.value.loop_state


# --- bytes: their parts, with a checksum that is right -------------------------------------------


def sealed(body, compressed=False):
    flag = bytes([compressed])
    body = zlib.compress(body, 9) if compressed else body
    return b"JAXLOOP\x01" + flag + hashlib.sha256(flag + body).digest() + body


def parts(data):
    (size,) = struct.unpack("<Q", data[41:49])
    return json.loads(data[49 : 49 + size]), data[49 + size :]


def joined(record, content, compressed=False):
    header = record if isinstance(record, bytes) else json.dumps(record).encode()
    return sealed(struct.pack("<Q", len(header)) + header + content, compressed)


def read(state):
    """Reads all of a state, because some of it is only made when it is read."""
    repr(state)
    for mapping in (state.metrics, state.history, state.times, state.event_counts):
        dict(mapping)
    repr(state.handler_state)
    jl.serialize_state(state)


# --- bombs ---------------------------------------------------------------------------------------


def zeros(total, before):
    """``before`` and then zeros, compressed without ever being in memory."""
    compressor = zlib.compressobj(9)
    body = compressor.compress(before) + compressor.flush(zlib.Z_FULL_FLUSH)
    # After a full flush, a chunk does not depend on what is before it.
    chunk = compressor.compress(bytes(10**7)) + compressor.flush(zlib.Z_FULL_FLUSH)
    body += chunk * (total // 10**7)
    return b"JAXLOOP\x01\x01" + hashlib.sha256(b"\x01" + body).digest() + body


def header_of(record):
    header = json.dumps(record).encode()
    return struct.pack("<Q", len(header)) + header


def with_array(record, size):
    record = copy.deepcopy(record)
    arrays = record["leaves"]["arrays"]
    arrays.append([f"['{len(arrays):05d}']", "int8", [size]])
    return record


def with_metric(record, value):
    return {**record, "metrics": {"$dict": [["a", value]]}}


def nested(value, depth, make):
    for _ in range(depth):
        value = make(value)
    return value


def array(data="", dtype="int8", shape=(0,), **more):
    return {"$array": data, "dtype": dtype, "shape": list(shape), **more}


GB = 10**9
BOMBS = {
    "zeros": lambda r, c: zeros(3 * GB, b""),
    "zeros after the header": lambda r, c: zeros(3 * GB, header_of(r)),
    "an array of zeros": lambda r, c: zeros(3 * GB, header_of(with_array(r, 3 * GB))),
    "zeros of its own": lambda r, c: zeros(3 * GB, header_of({**r, "own_bytes": 3 * GB})),
    "a header of zeros": lambda r, c: zeros(10**8, struct.pack("<Q", 6 * 10**7)),
    "a header that is too long": lambda r, c: sealed(struct.pack("<Q", 2**62)),
    "an array that is not there": lambda r, c: joined(with_array(r, 10**12), c),
    "a size with 30 digits": lambda r, c: joined(with_array(r, 10**30), c),
    "a negative size": lambda r, c: joined(with_array(r, -1), c),
    "deep JSON": lambda r, c: joined(b"[" * 10**6, c),
    "deep JSON, compressed": lambda r, c: joined(b"[" * 10**6, c, True),
    "wide JSON": lambda r, c: joined(b"[" + b"{}," * 2**22 + b"0]", c),
    "wide JSON, compressed": lambda r, c: joined(b"[" + b"{}," * 2**22 + b"0]", c, True),
    "a number with many digits": lambda r, c: joined(b'{"format":' + b"9" * 10**6 + b"}", c),
    "a deep value": lambda r, c: joined(
        with_metric(r, nested(0, 300, lambda v: {"$list": [v]})), c
    ),
    "a deep dtype": lambda r, c: joined(
        with_metric(
            r, array("AA==", nested("int8", 200, lambda d: {"base": d, "shape": [1]}), [1])
        ),
        c,
    ),
    "a wide dtype": lambda r, c: joined(
        with_metric(r, array("AA==", {"base": "int8", "shape": [2**31]}, [1])), c
    ),
    "many axes": lambda r, c: joined(with_metric(r, array(shape=[0] * 70)), c),
    "large axes": lambda r, c: joined(with_metric(r, array(shape=[0] + [2**31] * 10)), c),
    "a shape without its bytes": lambda r, c: joined(with_metric(r, array(shape=[10**12])), c),
    "a negative shape": lambda r, c: joined(with_metric(r, array("AAAA", shape=[-1])), c),
    "one array many times": lambda r, c: joined(
        with_metric(r, {"$list": [{"$at": "00000"}] * 20_000}), c
    ),
    "one tree many times": lambda r, c: joined(
        with_metric(r, {"$list": [{"$like": "like_3", "kinds": "aa"}] * 20_000}), c
    ),
}


@pytest.mark.parametrize("kind", BOMBS)
def test_a_bomb_is_damage_before_it_takes_memory(kind, state):
    record, content = parts(jl.serialize_state(state))
    data = BOMBS[kind](record, content)
    del record
    tracemalloc.start()
    try:
        with pytest.raises(DamagedError):
            jl.deserialize_state(data, like=state)
        assert tracemalloc.get_traced_memory()[1] < 20 * (len(data) + 2**20)
    finally:
        tracemalloc.stop()


def test_what_compresses_too_well_is_not_compressed(state):
    """A state that would be taken for a bomb is never written."""
    small = state.replace(handler_state={"mine": np.zeros(10**6)})
    assert len(jl.serialize_state(small, compress=True)) < 10**5
    memory = {"mine": np.zeros(7 * 10**7, np.int8)}
    large = state.replace(handler_state=memory)
    data = jl.serialize_state(large, compress=True)
    back = jl.deserialize_state(data, like=state).handler_state["mine"]
    assert back.shape == (7 * 10**7,) and not back.any()


# --- values that a record may name ---------------------------------------------------------------

VALUES = {
    "an object": array("AAAAAAAAAAA=", "O", [1]),
    "an object's name": array("AAAAAAAAAAA=", "object", [1]),
    "objects in records": array(
        "AAAAAAAAAAA=",
        {"names": ["a"], "formats": ["O"], "offsets": [0], "itemsize": 8, "aligned": False},
        [1],
    ),
    "nothing": array("", "V0", [0]),
    "a list of types": array("AAAAAAAA", "i4,i2", [1]),
    "an unknown type": array("AA==", "int128", [1]),
    "a number for a type": array("AA==", 3, [1]),
    "text that is none": array("/////w==", "<U1", [1]),
    "text on the device": array("AAAAAA==", "<U1", [1], device=True),
    "not base64": array("%%%%", "int8", [3]),
    "a bool for a size": array("AA==", "int8", [True]),
    "a list for a key": {"$dict": [[{"$list": []}, 1]]},
    "another class": {"$dict": [[1, 2]], "kind": "os.environ"},
    "another factory": {"$dict": [[1, 2]], "kind": "defaultdict", "factory": "eval"},
    "another enum": {"$enum": "x", "kind": "Event"},
    "two kinds at once": {"$list": [], "$dict": []},
    "no kind": {"a": 1},
    "a bare list": [1],
    "an array beside": {"$at": "../../step_state"},
    "a tree beside": {"$like": "step_state"},
    "a tree that is none": {"$like": "like_77"},
    "a mask of another shape": {
        "$masked": array("AAA=", shape=[2]),
        "mask": array("AA==", "bool", [1]),
        "fill": 0,
        "hard": False,
    },
    "too few objects": {"$object": [1], "shape": [2]},
    "key data of another type": {"$key": array("AAAA", shape=[3]), "impl": "threefry2x32"},
    "key data of another shape": {"$key": array("AAAAAA==", "uint32", [1]), "impl": "rbg"},
    "no number": {"$int": "0x"},
    "no float": {"$float": "00"},
    "no complex number": {"$complex": [1, 2, 3]},
    "no time": {"$time": ["x"]},
}


@pytest.mark.parametrize("kind", VALUES)
def test_a_value_that_jaxloop_never_writes_is_damage(kind, state):
    record, content = parts(jl.serialize_state(state))
    with pytest.raises(DamagedError):
        jl.deserialize_state(joined(with_metric(record, VALUES[kind]), content), like=state)


def test_what_another_process_can_read_is_an_error_but_no_damage(state):
    record, content = parts(jl.serialize_state(state))
    key = {"$key": array("AAAAAAAAAAA=", "uint32", [2]), "impl": "mine"}
    long = array("AA" * 8, {"name": "longdouble", "swapped": False, "mantissa_bits": 1}, [])
    wide = array("AAAAAAAAAAA=", "float64", [1], device=True)
    newer = {"format": 99, "and": "more"}
    for changed, words in (
        (with_metric(record, key), "PRNG implementation .* 'mine'"),
        (with_metric(record, long), "long double"),
        (with_metric(record, wide), "float64.*\n.*jax_enable_x64"),
        (newer, "format 99"),
    ):
        with pytest.raises(SerializationError, match=words) as caught:
            jl.deserialize_state(joined(changed, content), like=state)
        assert not isinstance(caught.value, DamagedError)


def test_only_bytes_are_bytes(state):
    data = jl.serialize_state(state)
    for same in (bytearray(data), memoryview(data)):
        assert jl.deserialize_state(same, like=state).step == state.step
    for wrong in (None, data.hex(), list(data), 3):
        with pytest.raises(ArgumentTypeError, match="data must be bytes"):
            jl.deserialize_state(wrong, like=state)
    flag = data[:8] + b"\x02" + hashlib.sha256(b"\x02" + data[41:]).digest() + data[41:]
    for wrong in (b"", data[:8], data[:41], data + b"x", data[:-1], flag, b"pickle" * 20):
        with pytest.raises(DamagedError):
            jl.deserialize_state(wrong, like=state)
    numbers = jl.loop(lambda batch, s: s).run([1.0], {"n": 0})
    assert jl.deserialize_state(jl.serialize_state(numbers), like={"n": 0}).step == 1


TENSOR = {"$torch": array("AQID", "uint8", [3])}


def test_a_record_does_not_decide_what_is_imported(state, tmp_path):
    record, content = parts(jl.serialize_state(jl.loop(lambda b, s: s).run([1.0], 0.0)))
    (tmp_path / "bytes").write_bytes(joined(with_metric(record, TENSOR), content))
    (tmp_path / "torch.py").write_text("raise SystemExit('imported')")
    code = """
        import sys, warnings, jaxloop as jl, numpy as np
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            state = jl.deserialize_state(open("bytes", "rb").read(), like=np.float32(0))
        print(type(state.metrics["a"]).__name__, "torch" in sys.modules, *caught)
    """
    run = [sys.executable, "-c", textwrap.dedent(code)]
    path = os.pathsep.join([str(tmp_path), os.getcwd()])
    out = subprocess.run(
        run, cwd=tmp_path, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True
    )
    assert out.stdout.startswith("ndarray False") and "import torch before" in out.stdout, (
        out.stderr
    )


def test_a_tensor_comes_back_if_torch_is_there(state, monkeypatch):
    tensor = lambda array: ("tensor", array.tolist())  # noqa: E731
    monkeypatch.setitem(sys.modules, "torch", types.SimpleNamespace(from_numpy=tensor))
    record, content = parts(jl.serialize_state(state))
    back = jl.deserialize_state(joined(with_metric(record, TENSOR), content), like=state)
    assert back.metrics["a"] == ("tensor", [1, 2, 3])


# --- folders -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with the checkpoints of steps 3 and 4."""
    path = tmp_path_factory.mktemp("strangers") / "saved"
    loop = LOOP.checkpoint(path, event="iteration_completed", keep=2)
    with pytest.raises(Stop):
        loop.handle("iteration_completed", stop, jl.only(5)).run(DATA, epochs=3)
    return path


@pytest.fixture
def newest(saved):
    """The record of step 4. What a test does to it is undone."""
    file = saved / "4" / "meta" / "metadata"
    text = file.read_text()
    yield file
    if file.is_dir() and not file.is_symlink():
        file.rmdir()
    else:
        file.unlink(missing_ok=True)
    file.write_text(text)


def write(file, record):
    file.write_text(json.dumps({**record, "sha256": checksum(record)}))


def altered(change):
    def alter(file):
        record = json.loads(file.read_text())
        change(record)
        write(file, record)

    return alter


def pipe(file):
    file.unlink()
    os.mkfifo(file)


def link(file):
    file.unlink()
    file.symlink_to("/dev/zero")


def folder(file):
    file.unlink()
    file.mkdir()


def itself(file):
    file.unlink()
    file.symlink_to(file)


def without_digest(record):
    del record["digests"]["step_state"]


FOREIGN = {
    "a pipe": pipe,
    "a device": link,
    "a folder": folder,
    "a link to itself": itself,
    "50 GB": lambda file: os.truncate(file, 50 * GB),
    "nothing": lambda file: file.write_text(""),
    "no text": lambda file: file.write_bytes(b"\xff\xfe\x00"),
    "no dict": lambda file: file.write_text("[1]"),
    "deep": lambda file: file.write_text("[" * 10**6),
    "cut": lambda file: os.truncate(file, file.stat().st_size - 1),
    "a way out": altered(lambda r: r["leaves"].update({"../../x": []})),
    "an absolute path": altered(lambda r: r["leaves"].update({"/etc": [["x", "int8", [1]]]})),
    "a tree that is not there": altered(
        lambda r: r["leaves"].update(like_9=r["leaves"]["step_state"])
    ),
    "a huge array": altered(lambda r: r["leaves"]["arrays"][0].__setitem__(2, [10**12])),
    "another shape": altered(lambda r: r["leaves"]["arrays"][0].__setitem__(2, [20, 20])),
    "one array less": altered(lambda r: r["leaves"]["arrays"].pop()),
    "an order of text": altered(lambda r: r.update(order="x")),
    "a negative step": altered(lambda r: r.update(step=-1)),
    "a value that is a list": altered(lambda r: r.update(value=[1])),
    "a tree without a digest": altered(without_digest),
    "digests of another type": altered(lambda r: r.update(digests={"step_state": [["w", 3]]})),
    "no version": altered(lambda r: r.pop("format")),
    "no position": altered(lambda r: r.pop("position")),
}


@pytest.mark.parametrize("kind", FOREIGN)
@pytest.mark.filterwarnings("ignore:coroutine")
def test_a_foreign_record_does_not_hide_the_good_one_beside_it(kind, saved, newest, state):
    FOREIGN[kind](newest)
    tracemalloc.start()
    try:
        with pytest.warns(UserWarning, match=f"{saved}/4 is damaged and skipped: ."):
            back = jl.restore(saved, like=state)
        assert tracemalloc.get_traced_memory()[1] < 30 * 2**20
    finally:
        tracemalloc.stop()
    assert back.step == 3 and back.metrics


def test_a_pipe_among_the_arrays_is_damage(saved, newest, state):
    file = saved / "4" / "step_state" / "pipe"
    os.mkfifo(file)
    try:
        with pytest.warns(UserWarning, match=f"{saved}/4 is damaged.*pipe is not a file"):
            assert jl.restore(saved, like=state).step == 3
    finally:
        file.unlink()


@pytest.mark.parametrize("what", ["memory", "accumulators", "step_state"])
def test_arrays_of_64_bits_are_no_damage_where_jax_has_32(what, tmp_path):
    def remember(state):
        memory = {"mine": jnp.arange(3.0) if what == "memory" else 1}
        return "continue", state.replace(handler_state=memory)

    loop = jl.loop(lambda batch, s: jl.emit(s + batch.astype(s.dtype), x=batch))
    if what == "accumulators":
        loop = loop.metric(lambda x: x, "mean", None, ["x"])
    loop = loop.handle("epoch_completed", remember)
    with jax.enable_x64(True):
        start = np.float64(0) if what == "step_state" else np.float32(0)
        ended = loop.checkpoint(tmp_path).run([np.float64(1)], start)
        data = jl.serialize_state(ended)
    wide = [leaf for leaf in jax.tree.leaves(ended.loan.accumulators) if leaf.dtype == np.float64]
    if what == "accumulators" and not wide:
        return  # the metric does not need 64 bits
    like = None if what == "step_state" else np.float32(0)
    with pytest.raises(SerializationError, match="float64.*\n.*jax_enable_x64") as caught:
        jl.restore(tmp_path, like=like)
    assert not isinstance(caught.value, DamagedError)
    with pytest.raises(SerializationError, match="float64") as caught:
        jl.deserialize_state(data, like=np.float32(0))
    assert not isinstance(caught.value, DamagedError)


def test_a_record_of_a_later_format_is_no_damage(saved, newest):
    write(newest, {"format": 98, "order": 99, "step": 4, "value": None, "another": "world"})
    with pytest.raises(SerializationError, match="format 98") as caught:
        jl.restore(saved)
    assert not isinstance(caught.value, DamagedError)


# --- fuzzing -------------------------------------------------------------------------------------

WORDS = (None, True, False, 0, -1, 1, 7, 10**6, 10**12, 2**63, 10**30, 0.5, -0.5, 1e308)
WORDS += (float("nan"), float("inf"), "", "a", "O", "V8", ">f4", "object", "float64", "M8[s]")
WORDS += ("../x", "/etc/passwd", "like_3", "00000", "step_state", "arrays", "key<fry>", "fetch")
WORDS += ("step", "end", "epoch_completed", "halted", "threefry2x32", [], [[]], [0], [10**12], {})
HOSTILE = [*WORDS, *VALUES.values(), {"$at": "00000"}, {"$like": "like_3"}, {"$list": []}, TENSOR]
NEW_KEYS = ["x", "$list", "$dict", "$at", "device", "kind", "weak", "zero_d", "format", "own"]


def places(tree, at=()):
    """The path of everything in data from JSON."""
    inner = tree.items() if isinstance(tree, dict) else enumerate(tree)
    for key, value in inner:
        yield (*at, key)
        if isinstance(value, dict | list):
            yield from places(value, (*at, key))


def mutated(record, random):
    """A record with one to three changes, each in a field that is drawn first."""
    record = copy.deepcopy(record)
    for _ in range(random.choice([1, 1, 1, 2, 3])):
        field = random.choice(sorted(record))
        inner = record[field]
        inside = places(inner, (field,)) if isinstance(inner, dict | list) else ()
        where = random.choice([(field,), *inside])
        holder = record
        for key in where[:-1]:
            holder = holder[key]
        key, how = where[-1], random.randrange(10)
        if how == 0:
            del holder[key]
        elif how == 1 and isinstance(holder, list):
            holder.insert(key, copy.deepcopy(holder[key]))
        elif how == 2 and isinstance(holder, dict):
            holder[random.choice(NEW_KEYS)] = holder.pop(key)
        elif how == 3:
            holder[key] = copy.deepcopy(record[random.choice(sorted(record))])
        else:
            holder[key] = copy.deepcopy(random.choice(HOSTILE))
    return record


def flipped(data, random):
    """Bytes with flipped bits, missing or extra bytes, or cut off."""
    data = bytearray(data)
    for _ in range(random.choice([1, 1, 3])):
        at, how = random.randrange(len(data)), random.randrange(10)
        if how < 6:
            data[at] ^= 1 << random.randrange(8)
        elif how < 8:
            del data[at + 1 :]
        else:
            data[at:at] = bytes(random.randrange(256) for _ in range(random.randrange(1, 9)))
    return bytes(data)


def fuzz(check, count):
    """Calls ``check`` with many sources of random choices."""
    quick = count < 1000  # the same each time
    how = settings(max_examples=count, deadline=None, database=None, derandomize=quick)
    how(given(st.randoms(use_true_random=False))(check))()


def only_ours(act):
    """The result of ``act``, or None after one of our errors."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return act()
        except jl.JaxloopError:
            return None


@pytest.mark.parametrize(
    "count",
    [
        100,
        pytest.param(1500, marks=pytest.mark.slow),
        pytest.param(20_000, marks=pytest.mark.endurance),
    ],
)
def test_altered_records_in_bytes_are_our_errors(count, state):
    record, content = parts(jl.serialize_state(state))

    def check(random):
        data = joined(mutated(record, random), content, compressed=random.random() < 0.3)
        back = only_ours(lambda: jl.deserialize_state(data, like=state))
        if back is not None:
            read(back)
            assert (back.step_state["w"] == state.step_state["w"]).all()

    fuzz(check, count)


@pytest.mark.parametrize(
    "count",
    [
        200,
        pytest.param(1500, marks=pytest.mark.slow),
        pytest.param(20_000, marks=pytest.mark.endurance),
    ],
)
def test_altered_bytes_are_our_errors(count, state):
    plain = jl.serialize_state(state)
    compressed = zlib.compress(plain[41:])

    def check(random):
        packed = random.random() < 0.5
        body = flipped(compressed if packed else plain[41:], random)
        flag = bytes([packed])
        right = b"JAXLOOP\x01" + flag + hashlib.sha256(flag + body).digest() + body
        back = only_ours(lambda: jl.deserialize_state(right, like=state))
        if back is not None:
            read(back)
        with pytest.raises(DamagedError):  # with the checksum of the whole
            jl.deserialize_state(flipped(plain, random), like=state)

    fuzz(check, count)


@pytest.mark.parametrize(
    "count",
    [
        12,
        pytest.param(250, marks=pytest.mark.slow),
        pytest.param(3000, marks=pytest.mark.endurance),
    ],
)
@pytest.mark.filterwarnings("ignore")  # Orbax leaves coroutines behind
def test_altered_records_in_folders_are_our_errors(count, saved, newest, state):
    """The arrays are those of step 4 or, if its record is damaged, those of step 3."""
    text = newest.read_text()
    record = json.loads(text)
    good = {jl.restore(saved, step).step_state["w"].tobytes() for step in (3, 4)}

    def check(random):
        if random.random() < 0.7:
            write(newest, mutated(record, random))
        else:
            newest.write_bytes(flipped(text.encode(), random))
        like = state if random.random() < 0.5 else None
        back = only_ours(lambda: jl.restore(saved, like=like))
        if back is not None:
            read(back)
            assert back.step_state["w"].tobytes() in good

    fuzz(check, count)


@pytest.mark.parametrize(
    "count",
    [
        6,
        pytest.param(80, marks=pytest.mark.slow),
        pytest.param(1000, marks=pytest.mark.endurance),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_a_run_that_resumes_from_an_altered_record_ends_or_is_our_error(
    count, saved, newest, state
):
    record = json.loads(newest.read_text())

    def check(random):
        write(newest, mutated(record, random))
        ended = only_ours(lambda: LOOP.resume(saved).run(DATA, epochs=3))
        if ended is not None:
            read(ended)

    fuzz(check, count)

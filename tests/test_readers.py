"""The reader of iterables: its short path equals the long one, and what it costs is counted."""

import collections
import dataclasses
import gc
import itertools
import sys
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxloop as jl
from jaxloop._core.batch import as_batch
from jaxloop._core.placement import Placement, placement
from jaxloop._data.iterator_reader import IteratorReader
from jaxloop._data.position import Stateful
from jaxloop._data.readers import Fill
from jaxloop._data.rows import RowCopier
from jaxloop._data.superbatch import BufferPool
from jaxloop.errors import DataError

READY = jax.block_until_ready(jnp.int32(0) + 1)


class Pair(NamedTuple):
    x: Any
    y: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Example:
    x: Any
    y: Any
    kind: str = dataclasses.field(default="a", metadata={"static": True})


class ArrayLike:
    """What a tensor of another library is to NumPy."""

    def __init__(self, array):
        self.array = array

    def __array__(self, dtype=None, copy=None):
        return self.array


class TensorLike(ArrayLike):
    """Also has the faster method of PyTorch's tensors."""

    def numpy(self):
        return self.array


class OtherLike(ArrayLike):
    """Has a method of that name with another meaning."""

    def numpy(self):
        return self.array + 1


class Batched:
    """A superbatch as it was when it was made."""

    def __init__(self, superbatch):
        self.signature, self.count = superbatch.signature, superbatch.num_left
        value = jax.tree.map(lambda x: np.array(x[: self.count]), superbatch.rows.value)
        self.leaves = jax.tree.leaves(value)


def read(batches, limit=4, num_rows=4, one_shot=False, place=None, late=None):
    """Reads everything, and returns the superbatches and the error."""
    reader = IteratorReader(iter(batches), 0, one_shot)
    pool = BufferPool(num_rows, place or Placement())
    made = []
    while True:
        fill = Fill(reader, limit, pool, late)
        fill.run()
        if fill.error is not None or fill.superbatch is None:
            return made, fill.error
        made.append(Batched(fill.superbatch))
        fill.superbatch.next_row, fill.superbatch.num_left = fill.superbatch.num_left, 0
        fill.superbatch.marker = READY


def refuse(item):
    raise ValueError("does not fit")


def both_ways(batches, **options):
    short = read(batches, **options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("jaxloop._data.rows._structure", lambda tree: (None, refuse))
        long = read(batches, **options)
    return short, long


def assert_equal(short, long):
    (mine, error), (want, expected) = short, long
    assert type(error) is type(expected) and str(error) == str(expected)
    assert [(m.signature, m.count) for m in mine] == [(w.signature, w.count) for w in want]
    for m, w in zip(mine, want, strict=True):
        for a, b in zip(m.leaves, w.leaves, strict=True):
            assert a.dtype == b.dtype and a.shape == b.shape
            np.testing.assert_array_equal(a, b)


DTYPES = ["float32", "float64", "int32", "int64", "uint8", "uint64", "bool", "float16", "bfloat16"]
DTYPES += ["complex64", "complex128", ">f4", "longdouble"]


@st.composite
def leaves(draw):
    """A leaf of one of many kinds, mostly NumPy arrays, with values that a narrower dtype lacks."""
    shape = draw(st.sampled_from([(), (1,), (3,), (2, 3), (0,)]))
    dtype = draw(st.sampled_from(DTYPES))
    value = draw(st.sampled_from([0.1, 3.0, 2.0**20 + 0.3, 2.0**40 + 1, -5.0]))
    if dtype in ("uint8", "uint64"):
        value = abs(value) % 200
    array = np.arange(np.prod(shape, dtype=int)).reshape(shape) + np.asarray(value)
    # The platform decides what a float that does not fit in an integer becomes.
    with np.errstate(over="ignore"):
        array = (array.astype("int64") if "int" in dtype else array).astype(dtype)
    make = draw(
        st.sampled_from(
            [
                lambda a: a,
                lambda a: a,
                lambda a: a,
                lambda a: np.asfortranarray(a),
                lambda a: np.repeat(a, 2, axis=-1)[..., ::2] if a.ndim else a,
                lambda a: a[()] if a.ndim == 0 else a,
                lambda a: a.item() if a.ndim == 0 and a.dtype.kind in "fibu" else a,
                ArrayLike,
                TensorLike,
                OtherLike,
                lambda a: np.ma.MaskedArray(a, mask=np.zeros(a.shape, bool)),
                lambda a: a if a.dtype.str == ">f4" or a.dtype.char == "g" else jnp.asarray(a),
            ]
        )
    )
    return make(array)


SHAPES = {
    "leaf": lambda x, y: x,
    "pair": lambda x, y: (x, y),
    "list": lambda x, y: [x, y],
    "single": lambda x, y: (x,),
    "dict": lambda x, y: {"x": x, "y": y},
    "other order": lambda x, y: {"y": y, "x": x},
    "another key": lambda x, y: {"x": x, "z": y},
    "one key": lambda x, y: {"x": x},
    "more keys": lambda x, y: {"x": x, "y": y, "z": x},
    "ordered": lambda x, y: collections.OrderedDict(b=x, a=y),
    "named": Pair,
    "dataclass": Example,
    "another field": lambda x, y: Example(x, y, "b"),
    "nested": lambda x, y: ({"a": x, "b": (y, None)}, [x]),
    "none": lambda x, y: (x, None),
    "empty": lambda x, y: (x, ()),
    "subtree": lambda x, y: (x, [y]),
    "numbers": lambda x, y: (x, [1.0, 2]),
}


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_the_short_path_gives_what_the_long_one_gives(data):
    kinds = data.draw(st.lists(st.sampled_from(sorted(SHAPES)), min_size=1, max_size=2))
    pairs = [(data.draw(leaves()), data.draw(leaves())) for _ in range(2)]
    batches = []
    for _ in range(data.draw(st.integers(1, 3))):
        kind, (x, y) = data.draw(st.sampled_from(kinds)), data.draw(st.sampled_from(pairs))
        batches += [SHAPES[kind](x, y)] * data.draw(st.integers(1, 6))
    with np.errstate(all="ignore"):
        assert_equal(*both_ways(batches))


@pytest.mark.parametrize("x64", [False, True])
@pytest.mark.parametrize("kind", ["pair", "dict", "named", "nested", "leaf"])
def test_wide_dtypes_are_cast_by_the_copy_as_jax_casts_them(kind, x64):
    rng = np.random.default_rng(0)
    with jax.enable_x64(x64):
        batches = [
            SHAPES[kind](rng.normal(size=(2, 3)), rng.integers(-(2**40), 2**40, 2))
            for _ in range(9)
        ]
        short, long = both_ways(batches)
        assert_equal(short, long)
        assert short[0][0].leaves[0].dtype == (np.float64 if x64 else np.float32)


def test_arrays_of_jax_keep_their_dtype_and_are_not_cast():
    with jax.enable_x64(True):
        wide = jnp.arange(3.0)
    narrow = jnp.arange(3.0)
    short, long = both_ways([narrow, narrow, narrow, wide])
    assert_equal(short, long)
    assert [made.count for made in short[0]] == [3, 1]


def test_a_masked_array_and_a_matrix_take_the_long_path(monkeypatch):
    plain = np.ones((2, 2), np.float32)
    asked = []
    original = as_batch

    def counted(item, *rest):
        asked.append(type(item[0]))
        return original(item, *rest)

    monkeypatch.setattr("jaxloop._data.iterator_reader.as_batch", counted)
    odd = [(np.ma.MaskedArray(plain),)] * 3 + [(plain.view(type("Sub", (np.ndarray,), {})),)] * 3
    made, error = read([(plain,)] * 3 + odd + [(plain,)] * 3, limit=100, num_rows=100)
    assert error is None and made[0].count == 12
    assert len(asked) == 1 + 6  # the first batch, and the odd ones


@pytest.mark.parametrize("kind", ["array", "float64", "jax", "like", "tensor", "other"])
def test_only_the_first_batches_are_converted(kind, monkeypatch):
    make = {
        "array": lambda i: np.full(3, i, np.float32),
        "float64": lambda i: np.full(3, i, np.float64),
        "jax": lambda i: jnp.full(3, i, jnp.float32),
        "like": lambda i: ArrayLike(np.full(3, i, np.float64)),
        "tensor": lambda i: TensorLike(np.full(3, i, np.int64)),
        "other": lambda i: OtherLike(np.full(3, i, np.int64)),
    }[kind]
    asked = []
    original = as_batch
    monkeypatch.setattr(
        "jaxloop._data.iterator_reader.as_batch",
        lambda *rest: asked.append(1) or original(*rest),
    )
    made, error = read([(make(i), make(-i)) for i in range(40)], limit=40, num_rows=40)
    assert error is None and made[0].count == 40
    np.testing.assert_array_equal(made[0].leaves[1][:, 0], -np.arange(40))
    assert len(asked) <= 2


@pytest.mark.parametrize("num_rows", [1, 4, 100])
@pytest.mark.parametrize("one_shot", [False, True])
def test_data_may_reuse_their_arrays(num_rows, one_shot):
    def reusing():
        # Aligned memory is what JAX would read without copying it.
        x = np.zeros(64, np.float32)[:48]
        y = np.zeros(2, np.int64)
        for i in range(11):
            x[:], y[:] = i, -i
            yield x, y

    made, error = read(reusing(), num_rows, num_rows, one_shot, placement(READY))
    assert error is None
    x, y = (np.concatenate([one.leaves[i][:, 0] for one in made]) for i in range(2))
    np.testing.assert_array_equal(x, np.arange(11))
    np.testing.assert_array_equal(y, -np.arange(11))


@pytest.mark.parametrize("beside", [jax.random.key(0), READY])
@pytest.mark.parametrize("num_rows", [1, 4])
def test_data_may_reuse_their_arrays_beside_arrays_of_jax(beside, num_rows):
    """Such batches wait for the others of their superbatch, or are read where they are."""

    def reusing():
        x = np.zeros(64, np.float32)
        for i in range(8):
            x[:] = i
            yield x, beside

    place = placement(READY)
    reader = IteratorReader(reusing(), 0, one_shot=True)
    found = []
    while True:
        fill = Fill(reader, num_rows, BufferPool(num_rows, place), None)
        fill.run()
        assert fill.error is None
        if (made := fill.superbatch) is None:
            break
        rows = range(made.next_row, made.next_row + made.num_left)
        found += [(made, row) for row in rows]
    values = [float(made.rows.row(row)[0][-1]) for made, row in found]
    assert values == list(range(8))


@pytest.mark.parametrize("size", [16, 3_000_000])
def test_large_batches_in_a_reused_array_arrive_as_they_were(size):
    """Superbatches of large batches have one row, and that too is a copy."""

    def reusing(epoch):
        x = np.empty(size, np.float32)
        for i in range(8):
            x[:] = i
            yield x

    state = jl.loop(lambda x, total: (total * 3 + x[0] + x[-1]) % 4096).run(reusing, 0.0)
    want = 0.0
    for i in range(8):
        want = (want * 3 + 2 * i) % 4096
    assert float(state.step_state) == want


@pytest.mark.parametrize(
    "other", [np.ones(2, np.float32), np.ones(3, np.int16), (np.ones(3, np.float32),), 1.0]
)
def test_another_signature_ends_a_superbatch(other):
    same = np.ones(3, np.float32)
    batches = [same] * 6 + [other] + [same] * 3
    short, long = both_ways(batches, limit=50, num_rows=50)
    assert_equal(short, long)
    assert [made.count for made in short[0]] == [6, 1, 3]


@pytest.mark.parametrize("bad", ["text", object(), np.array(["a"]), None])
def test_a_bad_batch_is_reported_after_those_before_it(bad):
    same = (np.ones(3, np.float32), np.float32(1))
    made, error = read([same] * 5 + [(same[0], bad)], limit=50, num_rows=50)
    assert [one.count for one in made][0] == 5
    if bad is None:  # another structure
        assert error is None and len(made) == 2
    else:
        assert isinstance(error, DataError) and "batch 5 of the data" in str(error)
        assert "batch[1]" in str(error)


@pytest.mark.parametrize("at", [0, 1, 5, 8])
def test_an_error_of_the_data_is_raised_after_the_batches_before_it(at):
    class Broken(Exception):
        pass

    def data():
        for i in range(10):
            if i == at:
                raise Broken
            yield np.full(2, i, np.float32)

    made, error = read(data(), limit=5, num_rows=5)
    assert isinstance(error, Broken)
    assert sum(one.count for one in made) == at


class Interrupting:
    """An iterator whose batches have a leaf during whose conversion a signal arrives."""

    def __init__(self, at, inside):
        self.at, self.inside, self.index = at, inside, 0

    def __iter__(self):
        return self

    def __next__(self):
        index = self.index
        if index == self.at and not self.inside:
            self.at = None
            raise KeyboardInterrupt
        if index == 12:
            raise StopIteration
        self.index += 1
        return np.full(2, index, np.float32), self if index == self.at else np.int32(index)

    def __array__(self, dtype=None, copy=None):
        if self.at is not None:
            self.at = None
            raise KeyboardInterrupt
        return np.asarray(self.index - 1, np.int32)


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("at", [2, 3, 7, 9])
def test_a_signal_loses_no_batch_of_a_one_shot_iterator(at, inside):
    reader = IteratorReader(Interrupting(at, inside), 0, one_shot=True)
    pool = BufferPool(5, Placement())
    seen, interrupts = [], 0
    for _ in range(20):
        fill = Fill(reader, 5, pool, None)
        fill.run()
        if isinstance(fill.error, KeyboardInterrupt):
            interrupts += 1
            continue
        assert fill.error is None
        if fill.superbatch is None:
            break
        seen += [int(b.value[1]) for b in fill.superbatch.unread()]
        fill.superbatch.num_left, fill.superbatch.marker = 0, READY
    assert interrupts == 1 and seen == list(range(12))


@pytest.mark.parametrize("num_rows", [1, 4])
@pytest.mark.parametrize("kind", ["numpy", "another device"])
def test_a_signal_after_any_call_loses_no_batch_of_a_one_shot_iterator(kind, num_rows):
    """Python raises a signal's exception after a call; each of the calls is tried in turn."""
    device = jax.devices()[1]

    def batches():
        for i in range(9):
            x = np.full(3 if i in (5, 6) else 2, i, np.float32)
            if kind == "another device":
                x = jax.device_put(x, device)
            yield (x, i) if i % 4 else (x, np.int32(i))

    batches = list(batches())

    def interrupt(frame, event, _):
        nonlocal left
        if event == "c_return" and "jaxloop/_data" in frame.f_code.co_filename:
            left -= 1
            if not left:
                sys.setprofile(None)
                raise KeyboardInterrupt

    for call in range(1, 1000):
        reader = IteratorReader(iter(batches), 0, one_shot=True)
        pool = BufferPool(num_rows, Placement())
        left, seen, interrupted = call, [], False
        while True:
            sys.setprofile(interrupt if left > 0 else None)
            try:
                superbatch = reader.fill(Fill(reader, num_rows, pool, None))
            except KeyboardInterrupt:
                interrupted = True
                assert reader.num_read == len(reader.held) + len(seen)
                continue
            finally:
                sys.setprofile(None)
            if superbatch is None:
                assert seen == list(range(9)) and reader.num_read == 9
                break
            seen += [int(batch.value[1]) for batch in superbatch.unread()]
            superbatch.num_left, superbatch.marker = 0, READY
        if not interrupted:
            break
    assert call > 50


def test_an_iterator_is_asked_for_its_next_batch_only():
    class Odd:
        """Starts over if it is asked for an iterator."""

        def __init__(self):
            self.index = 0

        def __iter__(self):
            self.index = 0
            return self

        def __next__(self):
            if self.index == 11:
                raise StopIteration
            self.index += 1
            return np.full(2, self.index, np.float32)

    class Bare:
        """Has no `__iter__`."""

        def __init__(self):
            self.odd = Odd()

        def __next__(self):
            return next(self.odd)

    for iterator in (Odd(), Bare()):
        reader = IteratorReader(iterator, 0, True)
        assert reader.sample() is not None
        made = []
        pool = BufferPool(4, Placement())
        while (superbatch := reader.fill(Fill(reader, 4, pool, None))) is not None:
            made += [int(batch.value[0]) for batch in superbatch.unread()]
        assert made == list(range(1, 12))


def test_unread_batches_are_those_that_were_read_and_stay_so():
    def reusing():
        x = np.zeros(2, np.float32)
        for i in itertools.count():
            x[:] = i
            yield {"x": x, "n": np.int64(i)}

    reader = IteratorReader(reusing(), 0, one_shot=True)
    pool = BufferPool(6, placement(READY))
    fill = Fill(reader, 6, pool, None)
    fill.run()
    superbatch = fill.superbatch
    superbatch.next_row, superbatch.num_left = 2, 4
    unread = superbatch.unread()
    superbatch.num_left, superbatch.marker = 0, READY
    assert superbatch.unread() == []
    again = Fill(reader, 6, pool, None)
    again.run()  # in the same memory
    assert [float(b.value["x"][0]) for b in unread] == [2, 3, 4, 5]
    assert [int(b.value["n"]) for b in again.superbatch.unread()] == [6, 7, 8, 9, 10, 11]


def test_a_run_that_failed_resumes_with_the_unread_batches_of_a_reused_array():
    def reusing():
        x = np.zeros(4, np.float32)
        for i in range(30):
            x[:] = i
            yield x

    def fail(snapshot):
        raise ZeroDivisionError

    loop = jl.loop(lambda batch, total: (3 * total + jnp.sum(batch)) % 4096)
    iterator = reusing()
    with pytest.raises(ZeroDivisionError) as caught:
        loop.observe("iteration_completed", fail, jl.only(5)).run(iterator, 0.0, fuse=4)
    state = loop.from_state(caught.value.loop_state).run(iterator)
    assert state.step == 30
    assert float(state.step_state) == float(loop.run([*map(np.copy, reusing())], 0.0).step_state)


@pytest.mark.parametrize("num_late", [1, 3, 7])
def test_a_late_request_ends_with_the_batches_it_has(num_late):
    answers = itertools.cycle([False] * (num_late - 1) + [True])
    made, _ = read([np.ones(2, np.float32)] * 21, limit=50, num_rows=50, late=lambda: next(answers))
    assert [one.count for one in made] == [num_late] * (21 // num_late)


def test_states_of_an_iterator_are_kept_every_64_batches():
    asked = []

    class Own:
        def __init__(self):
            self.index = 0

        def __iter__(self):
            return self

        def __next__(self):
            if self.index == 200:
                raise StopIteration
            self.index += 1
            return np.full(2, self.index, np.float32)

        def get(self):
            asked.append(self.index)
            return self.index

    own = Own()
    reader = IteratorReader(own, 0, False, Stateful(own.get, None))
    pool = BufferPool(1000, Placement())
    fill = Fill(reader, 1000, pool, None)
    fill.run()
    assert fill.superbatch.num_left == reader.num_read == 200
    assert max(b - a for a, b in itertools.pairwise(asked)) <= 64 and asked[-1] == 200
    for consumed in (0, 1, 63, 64, 130, 199, 200):
        reader.num_consumed = consumed
        skip, state, at_end = reader.consumed_state()
        assert state + skip == consumed and skip < 64 and at_end == (consumed == 200)


# --- what it costs -------------------------------------------------------------------------------


def calls_of_reading(batches):
    """Calls of Python and C functions."""
    counts = collections.Counter()

    def count(frame, event, _):
        counts[event] += 1

    reader = IteratorReader(iter(batches), 0, False)
    fill = Fill(reader, len(batches), BufferPool(len(batches), Placement()), None)
    gc.disable()  # its callbacks would be counted
    sys.setprofile(count)
    try:
        fill.run()
    finally:
        sys.setprofile(None)
        gc.enable()
    assert fill.superbatch.num_left == len(batches)
    return counts


@pytest.mark.parametrize(
    "kind, python, c",
    [
        ("pair", 0, 1),  # C: `len`
        ("list", 0, 1),
        ("dict", 1, 2),
        ("nested", 0, 1),
        ("leaf", 1, 0),
    ],
)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_batch_is_a_short_way(kind, python, c, dtype):
    make = SHAPES[kind]
    batches = [make(np.ones((8, 8), dtype), np.ones(8, np.int32)) for _ in range(200)]
    # The difference of two lengths leaves out what a superbatch costs once.
    short, long = calls_of_reading(batches[:50]), calls_of_reading(batches)
    assert (long["call"] - short["call"]) / 150 <= python
    assert (long["c_call"] - short["c_call"]) / 150 <= c


@pytest.mark.parametrize("leaf", ["jax", "like"])
def test_a_batch_of_other_arrays_is_a_short_way(leaf):
    one = {"jax": jnp.ones((8, 8)), "like": ArrayLike(np.ones((8, 8)))}[leaf]
    short, long = calls_of_reading([(one,)] * 50), calls_of_reading([(one,)] * 200)
    assert (long["call"] - short["call"]) / 150 <= 6


def test_a_buffer_is_put_on_the_device_once():
    data = [np.full((8, 8), i, np.float32) for i in range(40)]
    loop = jl.loop(lambda batch, total: total + jnp.sum(batch))
    puts = []
    original = jax.device_put

    def counted(x, *rest, **options):
        puts.append([leaf.shape for leaf in jax.tree.leaves(x)])
        return original(x, *rest, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "device_put", counted)
        loop.run(data, 0.0, fuse=4)
        state = loop.run(data, 0.0, fuse=4, epochs=20)
    assert float(state.step_state) == 20 * 64 * sum(range(40))
    stacks = [shapes for shapes in puts if (4, 8, 8) in shapes]
    assert 1 <= len(stacks) <= 6  # of 200 superbatches


def test_an_array_of_jax_is_reused_only_if_it_reads_the_buffer():
    data = [np.full((8, 8), i, np.float32) for i in range(12)]

    class Copying:
        """A placement that copies, as that on a GPU does."""

        num_puts = 0

        def __call__(self, tree):
            Copying.num_puts += 1
            return jax.tree.map(lambda x: jnp.array(x, copy=True), tree)

    made, _ = read(data, place=Copying())
    assert Copying.num_puts == len(made) == 3
    np.testing.assert_array_equal(np.concatenate([m.leaves[0][:, 0, 0] for m in made]), range(12))


def test_a_state_over_several_devices_gets_a_copy_of_each_superbatch():
    mesh = jax.make_mesh((4,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    spread = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("d"))
    state = jax.device_put(np.zeros(8, np.float32), spread)
    data = [np.full(8, i, np.float32) for i in range(40)]
    end = jl.loop(lambda batch, s: s + batch).run(data, state, fuse=4, epochs=3).step_state
    np.testing.assert_array_equal(end, np.full(8, 3.0 * sum(range(40)), np.float32))


def test_batches_that_the_user_donates_are_put_again():
    data = [np.full(8, i, np.float32) for i in range(40)]
    loop = jl.loop(lambda batch, total: total + jnp.sum(batch))
    pool = BufferPool(4, placement(READY))
    reader = IteratorReader(iter(data), 0, False)
    for _ in range(2):
        fill = Fill(reader, 4, pool, None)
        fill.run()
        superbatch = fill.superbatch
        array = jax.tree.leaves(superbatch.rows)[0]
        assert not array.is_deleted()
        array.delete()
        superbatch.num_left, superbatch.marker = 0, READY
    assert float(loop.run(data, 0.0, fuse=4).step_state) == 8 * sum(range(40))


def test_what_was_learned_of_a_type_holds_for_its_structure_only():
    """A type is a leaf wherever it occurs; a list in place of a leaf is another structure."""
    copier = RowCopier(as_batch((ArrayLike(np.ones(2)), 1.0), "it").signature)
    item = (ArrayLike(np.ones(2)), 1.0)
    copier.learn(item, as_batch(item, "it"))
    short, long = both_ways([item, item, ([1.0, 2.0], 1.0), item])
    assert_equal(short, long)
    assert [made.count for made in short[0]] == [2, 1, 1]


def addresses(loop):
    return {
        array.ctypes.data
        for buffers in loop.programs.reusable.buffers.values()
        for buffer in buffers
        for array in buffer.arrays
    }


def test_a_run_leaves_its_buffers_to_the_next_one():
    loop = jl.loop(lambda batch, total: total + batch.sum())
    data = [np.full((4, 3), i, np.float32) for i in range(300)]
    loop.run(data, 0.0, fuse=8)
    before = addresses(loop)
    assert before
    assert float(loop.run(data, 0.0, fuse=8, epochs=3).step_state) == 3 * 12 * sum(range(300))
    assert addresses(loop) == before

    def inside(state):  # a run in a run takes other buffers
        assert not addresses(loop)
        assert float(loop.run(data[:5], 0.0, fuse=8).step_state) == 12 * 10

    outer = loop.handle("epoch_completed", inside)
    assert outer.programs is loop.programs
    assert float(outer.run(data, 0.0, fuse=8).step_state) == 12 * sum(range(300))


def test_a_run_that_fails_leaves_no_buffer():
    def batches():
        yield from [np.ones(3, np.float32)] * 9
        raise OSError("gone")

    loop = jl.loop(lambda batch, total: total + batch.sum())
    with pytest.raises(OSError, match="gone"):
        loop.run(lambda epoch: batches(), 0.0, fuse=2)
    assert not addresses(loop)

"""`jl.save_weights` and `jl.load_weights`: the same bits, by name, in a file that others read."""

import json
import os
import struct
import sys
import threading

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
from flax import linen as nn
from flax import nnx
from safetensors.numpy import load_file, save_file

import jaxloop as jl
from jaxloop._weights.named_leaves import NamedLeaves

pytestmark = pytest.mark.slow  # CI counts their coverage all the same


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.safetensors"


def bits(tree):
    def of(leaf):
        if hasattr(leaf, "dtype") and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        array = np.asarray(leaf)
        return str(array.dtype), array.shape, array.tobytes()

    return jax.tree.map(of, tree)


def randomized(tree):
    """The tree with other bits in every array."""
    rng = np.random.default_rng(5)

    def of(leaf):
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jax.random.key(77)
        if not jax.dtypes.issubdtype(leaf.dtype, np.inexact):
            return leaf + 1
        return jnp.asarray(rng.normal(size=leaf.shape)).astype(leaf.dtype)

    return jax.tree.map(of, tree)


class Mlp(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        x = nn.BatchNorm(use_running_average=not train)(nn.Dense(4)(x))
        return nn.Dense(2)(x)


class Net(nnx.Module):
    def __init__(self, seed=0):
        rngs = nnx.Rngs(seed)
        self.layers = nnx.List([nnx.Linear(2, 3, rngs=rngs), nnx.Linear(3, 2, rngs=rngs)])
        self.norm = nnx.BatchNorm(2, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)
        self.tied = self.layers[0].kernel

    def __call__(self, x):
        return self.drop(self.norm(self.layers[1](self.layers[0](x))))


# --- models of every framework -------------------------------------------------------------------


def test_linen(path):
    variables = Mlp().init(jax.random.key(0), jnp.ones((1, 3)))
    jl.save_weights(path, variables)
    assert "params.Dense_0.kernel" in load_file(path)
    assert "batch_stats.BatchNorm_0.mean" in load_file(path)
    loaded = jl.load_weights(path, randomized(variables))
    assert bits(loaded) == bits(variables)
    like = jax.eval_shape(Mlp().init, jax.random.key(0), jnp.ones((1, 3)))
    assert bits(jl.load_weights(path, like)) == bits(variables)


def test_nnx(path):
    model, other = Net(0), Net(1)
    before = bits(nnx.state(other))
    jl.save_weights(path, model)
    names = set(load_file(path))
    assert {"layers.0.kernel", "layers.1.bias", "norm.mean", "drop.rngs.key"} <= names
    loaded = jl.load_weights(path, other)
    assert isinstance(loaded, Net) and bits(nnx.state(loaded)) == bits(nnx.state(model))
    assert loaded.tied is loaded.layers[0].kernel
    assert bits(nnx.state(other)) == before
    # A state has the names of its module.
    state = jl.load_weights(path, nnx.state(other))
    assert isinstance(state, nnx.State) and bits(state) == bits(nnx.state(model))
    jl.save_weights(path, nnx.state(model))
    assert set(load_file(path)) == names


def test_equinox(path):
    model, other = (eqx.nn.MLP(2, 3, 4, 1, key=jax.random.key(i)) for i in range(2))
    jl.save_weights(path, model)
    assert set(load_file(path)) == {f"layers.{i}.{n}" for i in "01" for n in ("weight", "bias")}
    loaded = jl.load_weights(path, other)
    np.testing.assert_array_equal(loaded(jnp.ones(2)), model(jnp.ones(2)))
    dropout = {"net": eqx.nn.Sequential([model, eqx.nn.Dropout(0.5)])}
    jl.save_weights(path, dropout)
    assert jl.load_weights(path, dropout)["net"].layers[1].p == 0.5


def test_params_and_state_and_bare_arrays(path):
    pair = ({"w": np.ones((2, 2), np.float32)}, {"count": np.int32(3)})
    jl.save_weights(path, pair)
    assert sorted(load_file(path)) == ["0.w", "1.count"]
    assert bits(jl.load_weights(path, pair)) == bits(pair)
    jl.save_weights(path, jnp.arange(3))
    assert list(load_file(path)) == ["value"]
    np.testing.assert_array_equal(jl.load_weights(path, jnp.zeros(3, jnp.int32)), [0, 1, 2])


def test_a_state_of_a_loop(path):
    data = [(np.ones((4, 3), np.float32), np.zeros((4, 2), np.float32))]
    model = (lambda key, x: {"w": jnp.ones((3, 2))}, lambda params, x: x @ params["w"])
    loop = jl.trainer(model, "mean_squared_error", "adam", log=0)
    state = loop.final_state(data, epochs=2)
    jl.save_weights(path, state)
    assert list(load_file(path)) == ["w"]
    variables = loop.output(state)
    assert bits(jl.load_weights(path, variables)) == bits(variables)
    first = loop.final_state(data, epochs=0)
    loaded = jl.load_weights(path, first)
    assert loaded.step == 0 and bits(loop.output(loaded)) == bits(variables)
    assert bits(loaded.step_state["optimizer_state"]) == bits(first.step_state["optimizer_state"])
    own = jl.loop(lambda batch, total: {"total": total["total"] + batch})
    ended = own.run([1.0, 2.0], {"total": 0.0})
    jl.save_weights(path, ended)
    assert load_file(path)["total"] == 3.0
    assert jl.load_weights(path, own.run([1.0], {"total": 0.0})).step_state["total"] == 3.0


def test_weights_of_a_part_start_a_training(path):
    variables = Mlp().init(jax.random.key(0), jnp.ones((1, 3)))
    jl.save_weights(path, {"params": {"Dense_0": variables["params"]["Dense_0"]}})
    fresh = randomized(variables)
    mixed = jl.load_weights(path, fresh, missing="keep")
    assert bits(mixed["params"]["Dense_0"]) == bits(variables["params"]["Dense_0"])
    assert bits(mixed["params"]["Dense_1"]) == bits(fresh["params"]["Dense_1"])


# --- arrays of every kind ------------------------------------------------------------------------

DTYPES = [
    "bool int8 uint8 int16 uint16 int32 uint32 int64 uint64 float16 bfloat16 float32 float64",
    "complex64 float8_e4m3fn float8_e4m3fnuz float8_e5m2 float8_e5m2fnuz float8_e8m0fnu",
]


@pytest.mark.parametrize("dtype", " ".join(DTYPES).split())
def test_every_bit_of_every_dtype(dtype, path):
    numpy_dtype = jnp.dtype(dtype)
    raw = np.random.default_rng(0).integers(0, 256, 64 * numpy_dtype.itemsize, dtype=np.uint8)
    raw = raw % 2 if dtype == "bool" else raw  # NaNs with payloads too
    array = raw.view(numpy_dtype).reshape(4, 16)
    jl.save_weights(path, {"a": array})
    assert bits(jl.load_weights(path, {"a": array})) == bits({"a": array})
    assert bits(jl.load_weights(path)) == bits({"a": array})
    with safetensors.safe_open(path, "np") as file:
        assert file.get_slice("a").get_shape() == [4, 16]
    [(name, found)] = safetensors.deserialize(path.read_bytes())
    assert name == "a" and bytes(found["data"]) == array.tobytes()
    if "float8" not in dtype:  # which the library cannot make for NumPy
        assert bits(load_file(path)["a"]) == bits(array)
    if jax.dtypes.canonicalize_dtype(numpy_dtype) == numpy_dtype:
        loaded = jl.load_weights(path, {"a": jnp.asarray(array)})["a"]
        assert isinstance(loaded, jax.Array) and bits(loaded) == bits(array)


def test_files_of_the_library_are_read(path):
    arrays = {"b": np.arange(6, dtype=np.float32).reshape(2, 3), "a": np.ones(3, np.int8)}
    save_file(arrays, path, metadata={"format": "pt"})
    assert bits(jl.load_weights(path, arrays)) == bits(arrays)


@pytest.mark.parametrize(
    "array",
    [
        np.float32(2),
        np.zeros((0, 3), np.float32),
        np.zeros((3, 0), np.int8),
        np.arange(12, dtype=np.int32).reshape(3, 4).T,
        np.arange(12, dtype=np.int32)[::-2],
        np.broadcast_to(np.float32(3), (2, 5)),
        np.arange(3, dtype=">f8"),
        np.arange(3, dtype=">i2"),
        np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    ],
)
def test_arrays_of_every_layout(array, path):
    jl.save_weights(path, {"x": array, "y": np.ones(1, np.int8)})
    native = np.asarray(array).astype(np.asarray(array).dtype.newbyteorder("="))
    assert bits(load_file(path)["x"]) == bits(jl.load_weights(path)["x"]) == bits(native)


def test_numbers_and_kinds_stay(path):
    like = {"i": 2**40 + 1, "f": 0.1, "b": True, "n": np.float32(1), "a": np.ones(1)}
    jl.save_weights(path, like)
    other = {"i": 0, "f": 0.0, "b": False, "n": np.float32(0), "a": np.zeros(1)}
    loaded = jl.load_weights(path, other)
    assert bits(loaded) == bits(like)
    assert jax.tree.map(type, loaded) == jax.tree.map(type, like)


def test_tied_arrays_are_written_twice(path):
    w = jnp.ones(2)
    jl.save_weights(path, {"a": w, "b": w})
    assert bits(load_file(path)) == bits({"a": w, "b": w})


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg"])
def test_random_keys(impl, path):
    keys = {"one": jax.random.key(3, impl=impl), "two": jax.random.split(jax.random.key(4), 3)}
    jl.save_weights(path, keys)
    zeros = {"one": jax.random.key(0, impl=impl), "two": jax.random.split(jax.random.key(0), 3)}
    loaded = jl.load_weights(path, zeros)
    assert bits(loaded) == bits(keys) and loaded["one"].dtype == keys["one"].dtype
    assert bits(jl.load_weights(path, jax.eval_shape(lambda: keys))) == bits(keys)
    if impl == "rbg":
        with pytest.raises(jl.errors.ModelError, match="'one'"):
            jl.load_weights(path, {**zeros, "one": jax.random.key(0)})


def test_keys_of_another_implementation_of_the_same_size(path):
    jl.save_weights(path, {"k": jax.random.key(0, impl="rbg")})
    with pytest.raises(jl.errors.ModelError, match="a key of rbg in place of unsafe_rbg"):
        jl.load_weights(path, {"k": jax.random.key(0, impl="unsafe_rbg")})


def test_arrays_on_several_devices(path):
    mesh = jax.make_mesh((4,), ("i",), axis_types=(jax.sharding.AxisType.Auto,))
    where = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("i"))
    spread = jax.device_put(np.arange(8, dtype=np.float32), where)
    jl.save_weights(path, {"w": spread})
    np.testing.assert_array_equal(load_file(path)["w"], np.arange(8))
    loaded = jl.load_weights(path, {"w": jax.device_put(np.zeros(8, np.float32), where)})["w"]
    assert loaded.sharding == where and bits(loaded) == bits(spread)
    free = jl.load_weights(path, {"w": jnp.zeros(8)})["w"]
    assert not free.committed


# --- what does not fit ---------------------------------------------------------------------------

SAVED = {"a": np.ones((2, 3), np.float32), "b": np.ones(2, np.int32)}


@pytest.mark.parametrize(
    "change, options, message",
    [
        ({"c": np.ones(1)}, {}, "got no 'c'"),
        ({"b": None}, {}, "got an unexpected 'b'"),
        (
            {"a": np.ones((3, 2), np.float32)},
            {},
            r"'a' float32\[2, 3\] in place of float32\[3, 2\]",
        ),
        (
            {"a": np.ones((2, 3), np.float16)},
            {},
            r"'a' float32\[2, 3\] in place of float16\[2, 3\]",
        ),
        ({"a": np.ones((3, 2), np.float32)}, {"missing": "keep"}, "in place of"),
        ({"a": np.ones((2, 3), np.int32)}, {"cast": True}, "in place of int32"),
        ({"a": None, "b": None, "z": np.ones(1)}, {"missing": "keep"}, "unexpected 'a'"),
        (
            {"a": None, "b": None, "z": np.ones(1)},
            {"missing": "keep", "unexpected": "ignore"},
            "none of its names, but 'a', 'b'",
        ),
        (
            {"c": jax.ShapeDtypeStruct((1,), np.float32)},
            {"missing": "keep"},
            "no 'c', of which like has only the shape",
        ),
    ],
)
def test_what_does_not_fit_is_named(change, options, message, path):
    jl.save_weights(path, SAVED)
    like = {name: x for name, x in {**SAVED, **change}.items() if x is not None}
    with pytest.raises(jl.errors.ModelError, match=message):
        jl.load_weights(path, like, **options)


def test_a_part_if_asked(path):
    jl.save_weights(path, SAVED)
    like = {"b": np.zeros(2, np.int32), "c": np.full(1, 7.0)}
    loaded = jl.load_weights(path, like, missing="keep", unexpected="ignore")
    assert bits(loaded) == bits({"b": SAVED["b"], "c": np.full(1, 7.0)})
    loaded = jl.load_weights(
        path, {"a": jnp.zeros((2, 3), jnp.bfloat16)}, unexpected="ignore", cast=True
    )
    assert loaded["a"].dtype == jnp.bfloat16
    with pytest.raises(jl.errors.UnknownNameError, match="'ignore'.*'error', 'keep'|error, keep"):
        jl.load_weights(path, like, missing="ignore")


@pytest.mark.parametrize(
    "weights, message",
    [
        ({}, "must have an array, got none"),
        (None, "must have an array, got none"),
        ({"a": {"b": np.ones(1)}, "a.b": np.ones(1)}, "'a.b' twice"),
        ({"__metadata__": np.ones(1)}, "the format uses itself"),
        ({"a": "text"}, "'a' must be an array, got str"),
        ({"a": jnp.ones(2, jnp.int4)}, "'a' must have a dtype of bool, int8"),
        ({"a": np.array(["text"])}, "'a' must have a dtype of bool, int8"),
        ({"a": np.array([None])}, "'a' must have a dtype of bool, int8"),
        ({"a": np.ones(1, np.complex128)}, "'a' must have a dtype of bool, int8"),
        ({"a": np.ones(1, np.longdouble)}, "'a' must have a dtype of bool, int8"),
        (
            {"a": jax.ShapeDtypeStruct((1,), np.float32)},
            "'a' must be an array, got its shape alone",
        ),
        ({"a": optimizer} if (optimizer := len) else {}, "'a' must be an array, got builtin"),
    ],
)
def test_what_cannot_be_written_leaves_the_old_file(weights, message, path):
    jl.save_weights(path, SAVED)
    with pytest.raises(jl.JaxloopError, match=message):
        jl.save_weights(path, weights)
    assert bits(load_file(path)) == bits(SAVED)
    assert os.listdir(path.parent) == [path.name]


def test_inside_jit_there_is_nothing_to_write(path):
    with pytest.raises(jl.errors.ArgumentTypeError, match="outside jax.jit"):
        jax.jit(lambda w: jl.save_weights(path, {"a": w}))(jnp.ones(1))


def test_names_that_are_not_ascii(path):
    weights = {"Straße": {"ключ": np.ones(1)}, "": np.zeros(1)}
    jl.save_weights(path, weights)
    assert set(load_file(path)) == {"Straße.ключ", ""}
    assert bits(jl.load_weights(path, weights)) == bits(weights)


# --- files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrong", [3, None, b"x", "", "a\0b", {"w": np.ones(1)}])
def test_what_is_no_path(wrong):
    for call in (lambda: jl.save_weights(wrong, SAVED), lambda: jl.load_weights(wrong, SAVED)):
        with pytest.raises(jl.JaxloopError, match="path must be"):
            call()


def test_folders_are_made_and_a_folder_is_no_file(tmp_path):
    jl.save_weights(tmp_path / "new" / "deep" / "w.safetensors", SAVED)
    assert bits(load_file(tmp_path / "new" / "deep" / "w.safetensors")) == bits(SAVED)
    for call in (jl.save_weights, jl.load_weights):
        with pytest.raises(jl.errors.CheckpointError, match="path must be a file"):
            call(tmp_path / "new", SAVED)
    with pytest.raises(jl.errors.CheckpointError, match=r"nothing \(FileNotFoundError\)"):
        jl.load_weights(tmp_path / "nothing")
    (tmp_path / "file").touch()
    with pytest.raises(jl.errors.CheckpointError, match="can be written"):
        jl.save_weights(tmp_path / "file" / "w", SAVED)


def test_a_failed_write_leaves_the_old_file(path, monkeypatch):
    jl.save_weights(path, SAVED)

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(jl.errors.CheckpointError, match="No space left"):
        jl.save_weights(path, {"a": np.zeros(1000)})
    assert bits(load_file(path)) == bits(SAVED) and os.listdir(path.parent) == [path.name]

    def interrupted(descriptor):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        jl.save_weights(path, {"a": np.zeros(1000)})
    assert bits(load_file(path)) == bits(SAVED) and os.listdir(path.parent) == [path.name]


def test_a_link_stays_a_link(tmp_path):
    target = tmp_path / "v1.safetensors"
    target.touch()
    link = tmp_path / "latest.safetensors"
    link.symlink_to(target)
    jl.save_weights(link, SAVED)
    assert link.is_symlink() and bits(load_file(target)) == bits(SAVED)


def test_readers_see_a_whole_file_while_others_write(path):
    jl.save_weights(path, {"a": np.full(1000, 0.0)})
    writers = [
        threading.Thread(target=lambda i=i: jl.save_weights(path, {"a": np.full(1000, i)}))
        for i in (1.0, 2.0)
    ]
    for one in writers:
        one.start()
    for _ in range(20):
        assert len(set(jl.load_weights(path)["a"].tolist())) == 1
    for one in writers:
        one.join()
    assert os.listdir(path.parent) == [path.name]


def test_a_file_that_becomes_shorter_is_an_error(path, monkeypatch):
    jl.save_weights(path, {"a": np.ones(1000)})
    whole = NamedLeaves.of

    def shortened(*args):  # after the header was read, before the arrays are
        os.truncate(path, 1000)
        return whole(*args)

    monkeypatch.setattr(NamedLeaves, "of", shortened)
    with pytest.raises(jl.errors.DamagedError, match="must be a whole safetensors file"):
        jl.load_weights(path, {"a": np.ones(1000)})


def test_others_may_read_the_file_as_any_other(path):
    path.with_name("other").touch()
    jl.save_weights(path, SAVED)
    assert path.stat().st_mode == path.with_name("other").stat().st_mode


def test_float8_beside_empty_and_other_arrays(path):
    weights = {
        "a": jnp.ones((2, 2), jnp.float8_e4m3fn),
        "b": jnp.zeros((0, 3), jnp.float8_e5m2),
        "c": np.arange(3.0),
        "d": np.float32(2),
        "k": jax.random.key(3),
    }
    jl.save_weights(path, weights)
    assert bits(jl.load_weights(path, weights)) == bits(weights)
    assert jl.load_weights(path)["c"].flags.writeable


@pytest.mark.parametrize("found", [None, "0.7.3"])
def test_without_the_library_or_with_an_old_one(found, path, monkeypatch):
    jl.save_weights(path, SAVED)
    if found is None:
        monkeypatch.setitem(sys.modules, "safetensors", None)
    else:
        monkeypatch.setattr(safetensors, "__version__", found)
    for call in (jl.save_weights, jl.load_weights):
        with pytest.raises(jl.errors.MissingExtraError, match=r"functional-jaxloop\[safetensors\]"):
            call(path, SAVED)
    assert os.listdir(path.parent) == [path.name]


def of_header(header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(shape=(2,), begin=0, end=8, dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"PK\x03\x04" * 100,
        of_header({"a": entry()}, b"\0" * 7),
        of_header({"a": entry()}, b"\0" * 9),
        of_header({"a": entry()}, b"\0" * 8, length=2**63),
        of_header({"a": entry()}, b"\0" * 8, length=10),
        of_header(b"[1]"),
        of_header(b"\xff\xfe"),
        of_header(b"[" * 100_000),
        of_header({"a": entry(shape=(3,))}, b"\0" * 8),
        of_header({"a": entry(shape=(-2,))}, b"\0" * 8),
        of_header({"a": entry(shape=(2.0,))}, b"\0" * 8),
        of_header({"a": entry(shape=(True, 2))}, b"\0" * 8),
        of_header({"a": entry(shape=(2**62, 4))}, b"\0" * 8),
        of_header({"a": entry(begin=4, end=12)}, b"\0" * 12),
        of_header({"a": entry(), "b": entry()}, b"\0" * 8),
        of_header({"a": {"dtype": "F32", "shape": [2]}}, b"\0" * 8),
        of_header({"a": {**entry(), "data_offsets": [0, 4, 8]}}, b"\0" * 8),
        of_header(b'{"a": {"dtype":"F32","shape":[2],"data_offsets":[0,8]}, "a": 1}', b"\0" * 8),
        of_header({"a": entry(), "__metadata__": 3}, b"\0" * 8),
        of_header({"a": entry(dtype="NEW", end=9)}, b"\0" * 8),
    ],
)
def test_files_of_strangers(content, path):
    path.write_bytes(content)
    with pytest.raises(jl.errors.DamagedError, match="must be a whole safetensors file"):
        jl.load_weights(path)


def test_a_dtype_of_later_versions(path):
    path.write_bytes(of_header({"a": entry(), "b": entry((16,), 8, 16, "F4")}, b"\0" * 16))
    like = {"a": np.ones(2, np.float32)}
    assert bits(jl.load_weights(path, like, unexpected="ignore")) == bits({"a": like["a"] * 0})
    with pytest.raises(jl.errors.SerializationError, match="'b' must have a dtype of .*, got F4"):
        jl.load_weights(path)
    with pytest.raises(jl.errors.ModelError, match="'b' F4"):
        jl.load_weights(path, {**like, "b": np.ones(16)})


def test_keys_whose_metadata_are_nonsense(path):
    key = jax.random.key(3)
    for text in ("{", "[]", "3", '{"k": 3}'):
        save_file(
            {"k": np.asarray(jax.random.key_data(key))}, path, metadata={"jaxloop.keys": text}
        )
        if "3}" in text:
            with pytest.raises(jl.errors.ModelError, match="a key of 3"):
                jl.load_weights(path, {"k": key})
        else:
            assert bits(jl.load_weights(path, {"k": key})) == bits({"k": key})

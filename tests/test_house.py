"""The layout: floors, private names, sizes, public names, and what an import brings."""

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

import jaxloop as jl

ROOT = Path(jl.__file__).parent

# From low to high. A module may import modules of its own room and of lower floors.
FLOORS = [
    ["_installation"],
    ["errors"],
    ["_core"],
    ["losses", "optimizers", "datasets"],
    ["metrics"],
    ["_data"],
    ["_supervised"],
    ["_program"],
    ["_checkpoint"],
    ["_spec"],
    ["_plotting", "_progress", "writers"],
    ["_engine"],
    ["handlers"],
    ["_learning_rates"],
    ["_loop"],
    ["_factories", "_adopted", "_predict", "_weights"],
    ["__init__"],
    ["_cli"],
    ["__main__"],
]
# Rooms that must not know a clock, a file, or the loop.
NEVER_IMPORTS = {
    "_core": {"time", "os", "pathlib"},
    "metrics": {"time", "os", "pathlib"},
    "_program": {"time", "os", "pathlib"},
    "_data": {"time", "os", "pathlib"},
    "_spec": {"time", "os", "pathlib"},
    "handlers": {"time"},
}
PUBLIC_MODULES = {"errors", "handlers", "metrics", "losses", "optimizers", "datasets", "writers"}
# What is asked of private parts of other projects, and where.
FOREIGN_PRIVATE = {"_checkpoint/orbax_io.py"}


@cache
def parse(path):
    return ast.parse(path.read_text())


def modules():
    return sorted(ROOT.rglob("*.py"))


def name_of(path):
    return path.relative_to(ROOT).as_posix()


def room_of(path):
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def floor_of(room):
    return next(i for i, rooms in enumerate(FLOORS) if room in rooms)


def typing_only(tree):
    """The nodes under ``if TYPE_CHECKING``, which nothing imports at run time."""
    return {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
        if id(inner) not in {id(n) for other in node.orelse for n in ast.walk(other)}
    }


def imports(path):
    """``(node, module, name)`` of each import that runs; ``name`` is None for a whole module."""
    tree = parse(path)
    skipped = typing_only(tree)
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node, alias.name, None
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                yield node, node.module, alias.name


def target(module, name):
    """The file of jaxloop that an import names, or None."""
    if module is None or module.split(".")[0] != "jaxloop":
        return None
    for dotted in ([f"{module}.{name}"] if name else []) + [module]:
        base = ROOT.joinpath(*dotted.split(".")[1:])
        for path in (base.with_suffix(".py"), base / "__init__.py"):
            if path.exists() and path != ROOT / "__init__.py":
                return path
    return ROOT / "__init__.py"


def test_every_module_has_a_floor():
    rooms = {room for floor in FLOORS for room in floor}
    assert {room_of(path) for path in modules()} == rooms


def test_no_import_points_upward():
    wrong = []
    for path in modules():
        mine = room_of(path)
        for _, module, name in imports(path):
            other = target(module, name)
            if other is None:
                continue
            if room_of(other) != mine and floor_of(room_of(other)) >= floor_of(mine):
                wrong.append(f"{name_of(path)} imports {name_of(other)}")
    assert not wrong


def test_imports_make_no_circle():
    top = {
        path: {
            other
            for node, module, name in imports(path)
            if (other := target(module, name)) is not None and other != path
        }
        for path in modules()
    }
    done, walking = set(), []

    def visit(path):
        assert path not in walking, " -> ".join(map(name_of, [*walking, path]))
        if path in done:
            return
        walking.append(path)
        for other in top[path]:
            visit(other)
        walking.pop()
        done.add(path)

    for path in top:
        visit(path)


def test_an_import_inside_a_function_says_why():
    silent = []
    for path in modules():
        lines = path.read_text().splitlines()
        tree = parse(path)
        skipped = typing_only(tree)
        inside = {
            id(node)
            for function in ast.walk(tree)
            if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            for node in ast.walk(function)
        }
        for node in ast.walk(tree):
            if not isinstance(node, ast.Import | ast.ImportFrom) or id(node) in skipped:
                continue
            if id(node) not in inside:
                continue
            before = node.lineno - 2
            while lines[before].strip().startswith(("import ", "from ")):
                before -= 1  # several imports share a comment
            if not lines[before].strip().startswith("#"):
                silent.append(f"{name_of(path)}:{node.lineno}")
    assert not silent


def private(name):
    return name.startswith("_") and not name.startswith("__")


def test_no_private_name_of_another_room_is_used():
    own = {}
    for path in modules():
        names = own.setdefault(room_of(path), set())
        for node in ast.walk(parse(path)):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                names.add(node.name)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                names.add(node.attr)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                names.add(node.id)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                names.add(node.value)  # in __slots__
    wrong = []
    for path in modules():
        mine = room_of(path)
        for node in ast.walk(parse(path)):
            if isinstance(node, ast.Attribute) and private(node.attr):
                foreign = node.attr not in own[mine]
                if foreign and name_of(path) not in FOREIGN_PRIVATE:
                    wrong.append(f"{name_of(path)}:{node.lineno} uses .{node.attr}")
        for node, module, name in imports(path):
            other = target(module, name)
            if other is None:
                parts = (module or "").split(".")
                if any(map(private, parts)) and name_of(path) not in FOREIGN_PRIVATE:
                    wrong.append(f"{name_of(path)}:{node.lineno} imports {module}")
            elif name is not None and private(name) and other.stem != name:
                wrong += [f"{name_of(path)}:{node.lineno} imports {name}"] * (
                    room_of(other) != mine
                )
    assert not wrong


@pytest.mark.parametrize(
    "kind, most", [(ast.Module, 400), (ast.ClassDef, 250), (ast.FunctionDef, 60)]
)
def test_sizes(kind, most):
    """What is longer says in a comment or a docstring why it is one idea."""
    long = []
    for path in modules():
        lines = path.read_text().splitlines()
        for node in [parse(path)] if kind is ast.Module else ast.walk(parse(path)):
            if not isinstance(node, kind):
                continue
            first, last = (1, len(lines)) if kind is ast.Module else (node.lineno, node.end_lineno)
            if kind is ast.FunctionDef and ast.get_docstring(node, clean=False):
                first = node.body[0].end_lineno  # the docs of a public name may be long
            if last - first >= most and "one idea" not in "\n".join(
                lines[max(0, first - 4) : last]
            ):
                long.append(f"{name_of(path)}:{first} has {last - first + 1} lines")
    assert not long


def test_rooms_know_no_clock_and_no_files():
    wrong = [
        f"{name_of(path)} imports {module}"
        for path in modules()
        for _, module, _ in imports(path)
        if module is not None
        and module.split(".")[0] in NEVER_IMPORTS.get(room_of(path), ())
        # `os.PathLike` names a type; nothing is opened.
        and name_of(path) not in ("handlers/attach.py", "handlers/checkpoint.py")
    ]
    assert not wrong


# A display is drawn by time: at most ten times a second, and with rates. It measures no run.
CLOCKS = {"_engine/clock.py", "_progress/meter.py"}


def test_the_engine_has_the_only_clock():
    for path in modules():
        names = {module for _, module, _ in imports(path)}
        # A command line is not part of a run.
        assert "time" not in names or name_of(path) in CLOCKS or room_of(path) == "_cli"
        if room_of(path) != "_engine":
            assert "jaxloop._engine.clock" not in names


def test_models_know_nothing_of_the_loop():
    for path in (ROOT / "_supervised" / "models").glob("*.py"):
        for _, module, name in imports(path):
            other = target(module, name)
            if other is not None:
                known = ("errors.py", "_core/types.py", "_core/fingerprint.py")
                assert name_of(other).startswith("_supervised/models") or name_of(other) in known


def test_public_names():
    assert jl.__all__ == sorted(jl.__all__)
    assert len(jl.__all__) <= 60
    for name in jl.__all__:
        thing = getattr(jl, name)
        assert thing.__doc__, name
    shown = {name for name in dir(jl) if not name.startswith("_")}
    assert shown == set(jl.__all__)
    public = {path.relative_to(ROOT).parts[0].removesuffix(".py") for path in modules()}
    assert {name for name in public if not name.startswith("_")} == PUBLIC_MODULES
    for name in PUBLIC_MODULES:
        module = getattr(jl, name)
        assert module.__doc__


def test_a_module_is_never_hidden_by_a_name():
    for path in ROOT.iterdir():
        stem = path.stem
        if path.suffix == ".py" or (path / "__init__.py").exists():
            there = getattr(jl, stem, None)
            assert (
                there is None
                or type(there).__name__ in ("module", "MethodType")
                or (stem.startswith("__"))
            ), stem


def test_methods_of_a_loop_are_the_functions_of_handlers():
    for name in jl.handlers.__all__:
        if name in vars(jl.Loop):
            assert vars(jl.Loop)[name] is getattr(jl.handlers, name)
            assert vars(jl.Loop)[name].__doc__


def test_import_is_light():
    code = (
        "import sys, jaxloop; "
        "heavy = {'flax', 'orbax', 'optax', 'matplotlib', 'equinox', 'haiku'}; "
        "print(sorted(heavy & {m.split('.')[0] for m in sys.modules}))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_a_field_of_state_is_declared_once():
    """Adding a field to `State` is one line: whatever else needs the fields reads that line."""
    from jaxloop._core.state import State

    fields = {name for name in State.__dataclass_fields__ if name not in ("epoch", "step")}
    for path in modules():
        if name_of(path) == "_core/state.py":
            continue
        for node in ast.walk(parse(path)):
            if isinstance(node, ast.List | ast.Tuple | ast.Set | ast.Dict):
                parts = node.keys if isinstance(node, ast.Dict) else node.elts
                listed = {p.value for p in parts if isinstance(p, ast.Constant)}
                assert len(listed & fields) <= 6, f"{name_of(path)}:{node.lineno} lists {listed}"


def test_digits():
    (x, y), (a, b) = jl.datasets.digits()
    assert x.shape == (1438, 8, 8, 1) and a.shape == (359, 8, 8, 1)
    assert x.min() == 0 and x.max() == 1 and set(y) == set(b) == set(range(10))
    (again, _), _ = jl.datasets.digits()
    assert (again == x).all()

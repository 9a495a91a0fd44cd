"""The layering, the public names, and what an import brings."""

import ast
import subprocess
import sys
from pathlib import Path

import jaxloop as jl

ROOT = Path(jl.__file__).parent

# From low to high: a module may import, at its top, only modules of lower layers or its own.
LAYERS = [
    ["errors"],
    ["events", "filters"],
    ["state", "losses", "optimizers", "loss_scale", "models", "datasets"],
    ["metrics", "data", "plan", "timing", "signals"],
    ["sources", "positions"],
    ["stacks"],
    ["cursors"],
    ["feed", "compile", "supervised"],
    ["loop"],
    ["packing"],
    ["folders"],
    ["store"],
    ["handlers", "checkpoint", "serialize", "check", "observing"],
    ["driver"],
    ["factories"],
    ["demo"],
]
# Imported inside functions; these alone may point up: the loop's thin methods, and resuming.
LAZY_UP = {"loop": {"handlers", "driver"}, "handlers": {"factories"}}
PLAIN = {"plan": {"jax", "numpy", "time", "os"}, "compile": {"time", "os", "pathlib"}}


def layer(name):
    return next(i for i, names in enumerate(LAYERS) if name in names)


def imports(path):
    """``(module, whether at the top)`` of each import; those for the type checker do not count."""
    tree = ast.parse(path.read_text())
    typing_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    top = {id(node) for node in tree.body}
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, id(node) in top
        elif isinstance(node, ast.ImportFrom):
            if node.module == "jaxloop":
                for alias in node.names:
                    yield f"jaxloop.{alias.name}", id(node) in top
            else:
                yield node.module, id(node) in top


def modules():
    for path in sorted(ROOT.rglob("*.py")):
        if path != ROOT / "__init__.py":
            yield path, path.relative_to(ROOT).parts[0].removesuffix(".py")


def test_arrows_point_down():
    wrong = []
    for path, mine in modules():
        for module, top in imports(path):
            if not module.startswith("jaxloop."):
                continue
            other = module.split(".")[1]
            if other == mine or mine == "demo" or layer(other) < layer(mine):
                continue
            if layer(other) == layer(mine) and other != mine and top:
                continue  # side by side: a cycle would fail at import
            if not top and other in LAZY_UP.get(mine, set()):
                continue
            wrong.append(f"{path.relative_to(ROOT)} imports {module}")
    assert not wrong


def test_models_know_nothing_of_the_loop():
    for path in (ROOT / "models").glob("*.py"):
        for module, _ in imports(path):
            if module.startswith("jaxloop."):
                assert module.split(".")[1] in ("errors", "models")


def test_plan_is_pure_and_compile_knows_no_clock_and_no_files():
    for name, forbidden in PLAIN.items():
        found = {module.split(".")[0] for module, _ in imports(ROOT / f"{name}.py")}
        assert not found & forbidden


def test_the_driver_has_the_only_clock():
    for path, mine in modules():
        found = {module for module, _ in imports(path)}
        if mine not in ("timing", "demo"):
            assert "time" not in found
        if mine != "driver":
            assert "jaxloop.timing" not in found


def test_public_names():
    assert jl.__all__ == sorted(jl.__all__)
    assert len(jl.__all__) <= 40
    for name in jl.__all__:
        thing = getattr(jl, name)
        assert thing.__doc__, name


def test_import_is_light():
    code = (
        "import sys, jaxloop; "
        "heavy = {'flax', 'orbax', 'matplotlib', 'equinox', 'haiku'}; "
        "print(sorted(heavy & {m.split('.')[0] for m in sys.modules}))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_digits():
    (x, y), (a, b) = jl.datasets.digits()
    assert x.shape == (1438, 8, 8, 1) and a.shape == (359, 8, 8, 1)
    assert x.min() == 0 and x.max() == 1 and set(y) == set(b) == set(range(10))
    (again, _), _ = jl.datasets.digits()
    assert (again == x).all()

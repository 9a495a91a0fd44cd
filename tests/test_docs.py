"""The Python blocks of ``README.md`` and of every page in ``docs/`` run, in the order of the page.

The blocks of a how-to guide under one heading run in a copy of the namespace that the blocks before
the first heading make, so each entry works after the setup of its page alone. On other pages, one
namespace serves the whole page. A block that starts with a comment of `OTHER` belongs to another
framework, and does not run. Commands of ``python -m jaxloop`` run too.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

ROOT = Path(__file__).parent.parent
FENCE = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
COMMANDS = re.compile(r"^```shell\n((?:python -m jaxloop .*\n)+)```", re.MULTILINE)
OTHER = re.compile(r"# (Keras|Lightning|Ignite|PyTorch|JAX)\b")
PAGES = [
    path.relative_to(ROOT).as_posix()
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
    if FENCE.search(path.read_text())
]
GUIDES = [page for page in PAGES if page.startswith("docs/how-to/")]

NEEDS = {"MLflow": "mlflow.tracking", "wandb": "wandb"}  # extras that may be missing
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}  # the pages run in another folder

pytestmark = pytest.mark.slow


def blocks(page, text=None):
    """``(number of the line, code)`` of the Python blocks, except those of other frameworks."""
    text = (ROOT / page).read_text() if text is None else text
    for found in FENCE.finditer(text):
        if not OTHER.match(found[1]):
            yield text.count("\n", 0, found.start()) + 1, found[1]


def entries(page):
    """``[(heading, number of its line, text)]`` of a page, with None for what comes before."""
    text = (ROOT / page).read_text()
    starts = [*re.finditer(r"^## (.*)$", text, re.MULTILINE)]
    ends = [found.start() for found in starts] + [len(text)]
    yield None, 0, text[: ends[0]]
    for found, end in zip(starts, ends[1:], strict=True):
        yield found[1], text.count("\n", 0, found.start()), text[found.start() : end]


def run(page, line, code, namespace):
    # As many lines as are above the block, so that a traceback names a line of the page.
    source = "\n" * line + code
    with jax.numpy_dtype_promotion("standard"):
        exec(compile(source, str(ROOT / page), "exec"), namespace)


@pytest.fixture(scope="module", autouse=True)
def programs(tmp_path_factory):
    """Compiles fast, and keeps the programs, because most entries train the same model."""
    settings = {
        # The processes of a run share it.
        "jax_compilation_cache_dir": str(tmp_path_factory.getbasetemp().parent / "programs"),
        "jax_persistent_cache_min_compile_time_secs": 0,
        "jax_disable_most_optimizations": True,
    }
    before = {name: jax.config.values[name] for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.fixture
def namespace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "agg")
    cache = jax.config.jax_compilation_cache_dir
    yield {"__name__": "docs"}
    if jax.config.jax_compilation_cache_dir != cache:  # a page about it
        jax.config.update("jax_compilation_cache_dir", cache)
        compilation_cache.reset_cache()


@pytest.mark.filterwarnings("default")  # those of other packages, which the pages do not hide
@pytest.mark.parametrize("page", [page for page in PAGES if page not in GUIDES])
def test_page(page, namespace):
    for line, code in blocks(page):
        run(page, line, code, namespace)


@pytest.mark.parametrize(
    ("page", "heading"),
    [
        pytest.param(page, heading, id=f"{Path(page).stem}: {heading}")
        for page in GUIDES
        for heading, _, text in entries(page)
        if heading is not None and FENCE.search(text)
    ],
)
def test_entry(page, heading, namespace):
    for word, module in NEEDS.items():
        if word in heading:
            pytest.importorskip(module, exc_type=ImportError)
    for found, start, text in entries(page):
        if found in (None, heading):
            for line, code in blocks(page, text):
                run(page, start + line, code, namespace)
            for commands in COMMANDS.findall(text):
                for command in commands.splitlines():
                    call = [sys.executable, *command.split()[1:]]
                    ended = subprocess.run(call, env=ENVIRONMENT)
                    differs = command.split()[3] == "diff" and ended.returncode == 1
                    assert ended.returncode == 0 or differs, command


def test_guides_have_one_setup():
    setups = {next(FENCE.finditer((ROOT / page).read_text()))[1] for page in GUIDES}
    assert len(setups) == 1

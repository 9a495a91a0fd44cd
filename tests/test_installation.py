"""What is installed: the versions that CI tests, and files of another distribution."""

import os
import re
import runpy
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import jaxloop as jl
from jaxloop._installation import FOREIGN_FILES, check_no_foreign_files

PACKAGE = Path(jl.__file__).parent


@pytest.fixture
def copied(tmp_path):
    """A copy of the package that a subprocess can import instead of this one."""
    ignored = shutil.ignore_patterns("__pycache__")
    return shutil.copytree(PACKAGE, tmp_path / "jaxloop", ignore=ignored)


def import_from(folder, statement):
    """Runs ``statement`` in a new interpreter that finds packages in ``folder`` first."""
    environment = {**os.environ, "PYTHONPATH": str(folder), "JAX_PLATFORMS": "cpu"}
    return subprocess.run(
        [sys.executable, "-c", statement],
        env=environment,
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )


def assert_refused(result):
    assert result.returncode == 1
    message = result.stderr[result.stderr.index("ImportError: ") :]
    assert "functional-jaxloop" in message
    assert "google/jaxloop" in message
    assert "fix: run `pip uninstall -y jaxloop functional-jaxloop`" in message


def test_the_package_alone_imports(copied):
    result = import_from(copied.parent, "import jaxloop; print(jaxloop.__file__)")
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == str(copied / "__init__.py")


def test_a_foreign_file_is_refused(copied):
    (copied / "actions.py").write_text("")
    assert_refused(import_from(copied.parent, "import jaxloop"))


@pytest.mark.parametrize("module", ["metrics", "losses", "errors", "_loop"])
def test_a_replaced_init_is_refused_by_every_other_module(copied, module):
    # If google/jaxloop is installed last, the package's `__init__.py` is its empty one.
    (copied / "actions.py").write_text("")
    (copied / "__init__.py").write_text("\n")
    assert_refused(import_from(copied.parent, f"import jaxloop.{module}"))


def test_the_package_has_no_file_that_the_check_refuses():
    check_no_foreign_files(PACKAGE)
    assert not {path.name for path in PACKAGE.iterdir()} & set(FOREIGN_FILES)


def test_ci_tests_the_lower_bounds():
    root = Path(__file__).parent.parent
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    bounds = dict(
        re.match(r"([\w-]+)>=([\d.]+)", line).groups() for line in project["dependencies"]
    )
    pinned = re.findall(
        r"^([\w-]+)==([\d.]+)$", (root / ".ci/oldest.txt").read_text(), re.MULTILINE
    )
    assert bounds == dict(pinned)


def test_every_file_names_the_same_version():
    check = runpy.run_path(str(PACKAGE.parent / ".ci" / "check_release.py"))
    assert check["problems"]() == []
    assert check["notes"](f"v{jl.__version__}").startswith("### ")
    wrong = check["problems"]("v99.0")
    assert f"the tag must be v{jl.__version__}" in wrong[0] and "got v99.0" in wrong[0]
    with pytest.raises(SystemExit, match="no version v99.0"):
        check["notes"]("v99.0")

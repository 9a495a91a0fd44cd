"""Builds the wheel and the sdist, checks what they contain, and trains with the installed wheel.

    python .ci/check_package.py

Leaves both in `dist/`. With PIP_CONSTRAINT=.ci/oldest.txt, the wheel is tried with the oldest
dependencies.
"""

import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import venv
import zipfile
from email.parser import Parser
from pathlib import Path

ROOT = Path(__file__).parent.parent
DIST = ROOT / "dist"


def run(*command, cwd=ROOT, status=0):
    """Runs a command, and returns what it printed to standard error."""
    print("$", *command, flush=True)
    command = list(map(str, command))
    done = subprocess.run(command, cwd=cwd, stderr=subprocess.PIPE, text=True)
    print(done.stderr, end="", file=sys.stderr)
    assert done.returncode == status, f"expected status {status}, got {done.returncode}"
    return done.stderr


def check_contents(wheel, sdist):
    """Raises unless the wheel is the package alone, and the sdist has the package and tests."""
    with zipfile.ZipFile(wheel) as archive:
        infos = {info.filename: info for info in archive.infolist()}
        about = {name.rpartition("/")[2]: name for name in infos if ".dist-info/" in name}
        metadata = Parser().parsestr(archive.read(about["METADATA"]).decode())
        entry_points = archive.read(about["entry_points.txt"]).decode()
    names = {name for name in infos if ".dist-info/" not in name}
    package = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "jaxloop").rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    }
    assert names == package, names ^ package
    assert {"jaxloop/py.typed", "jaxloop/datasets/digits.npz"} <= names
    assert all(info.file_size < 2**20 for info in infos.values()), "a file of the wheel is large"
    assert "LICENSE" in about
    assert "jaxloop = jaxloop._cli.main:script" in entry_points
    check_metadata(metadata)
    with tarfile.open(sdist) as archive:
        sources = {name.partition("/")[2] for name in archive.getnames()}
    needed = {"tests/conftest.py", "LICENSE", "README.md", "CITATION.cff", "pyproject.toml"}
    assert package | needed <= sources, (package | needed) - sources
    foreign = [name for name in sources if name.startswith((".venv", "dist/", "runs/", "site/"))]
    assert not foreign, foreign


def check_metadata(metadata):
    """Raises unless an index shows what the package needs, and no link that leads nowhere."""
    assert metadata["Name"] == "functional-jaxloop" and metadata["Requires-Python"] == ">=3.11"
    assert metadata["License-Expression"] == "Apache-2.0"
    assert not metadata.get_all("Project-URL"), "no public address of the project is known yet"
    # A relative link of the README leads nowhere on the page of an index.
    relative = re.findall(r"\]\((?!https?:)[^)]+\)", metadata.get_payload())
    assert "```python" in metadata.get_payload() and not relative, relative
    # Without an extra, only what the core imports is installed.
    core = [one for one in metadata.get_all("Requires-Dist") if "extra ==" not in one]
    assert len(core) == 7, core


def first_example():
    """The first Python block of README.md."""
    return re.search(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.M | re.S)[1]


def check_installed(python, folder):
    """Tries the installed wheel: the first example, the command line, and what an extra needs."""
    script = Path(folder, "first_example.py")
    script.write_text(first_example())
    run(python, script, cwd=folder)
    command = python.with_name("jaxloop")
    run(command, "--version", cwd=folder)
    run(command, "env", cwd=folder)
    run(command, "inspect", "runs/readme", cwd=folder)
    run(command, "verify", "runs/readme", cwd=folder)
    run(command, "diff", "runs/readme", "runs/readme", cwd=folder)
    run(command, "watch", "runs/readme", "--once", cwd=folder)
    # matplotlib is not installed here, so these say which extra to install.
    for arguments in (["demo"], ["plot", "runs/readme"]):
        message = run(command, *arguments, cwd=folder, status=2)
        assert "pip install 'functional-jaxloop[" in message, message


def main():
    shutil.rmtree(DIST, ignore_errors=True)
    run(sys.executable, "-m", "build", "--outdir", DIST)
    (wheel,), (sdist,) = DIST.glob("*.whl"), DIST.glob("*.tar.gz")
    run(sys.executable, "-m", "twine", "check", "--strict", wheel, sdist)
    check_contents(wheel, sdist)
    with tempfile.TemporaryDirectory() as folder:
        # An empty environment and an empty folder: nothing of the repository can be imported.
        python = Path(folder, "venv", "bin", "python")
        venv.create(Path(folder, "venv"), with_pip=True)
        run(python, "-m", "pip", "install", "-q", "--disable-pip-version-check", wheel)
        run(python, "-m", "pip", "check", "--disable-pip-version-check")
        check_installed(python, folder)
    print(f"package: {wheel.name} ({wheel.stat().st_size} bytes) and {sdist.name} are good")


if __name__ == "__main__":
    main()

"""Builds the wheel and the sdist, checks what they contain, and trains with the installed wheel.

    python .ci/check_package.py

Leaves both in `dist/`.
"""

import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
DIST = ROOT / "dist"


def run(*command, cwd=ROOT):
    print("$", *command, flush=True)
    subprocess.run(command, check=True, cwd=cwd)


def check_contents(wheel, sdist):
    """Raises unless the wheel is the package alone, and the sdist has the package and tests."""
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    package = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "jaxloop").rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    }
    assert names == package, names ^ package
    assert {"jaxloop/py.typed", "jaxloop/datasets/digits.npz"} <= names
    with tarfile.open(sdist) as archive:
        sources = {name.partition("/")[2] for name in archive.getnames()}
    assert package | {"tests/conftest.py", "LICENSE", "README.md", "pyproject.toml"} <= sources


def first_example():
    """The first Python block of README.md."""
    return re.search(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.M | re.S)[1]


def main():
    shutil.rmtree(DIST, ignore_errors=True)
    run(sys.executable, "-m", "build", "--outdir", str(DIST))
    (wheel,), (sdist,) = DIST.glob("*.whl"), DIST.glob("*.tar.gz")
    run(sys.executable, "-m", "twine", "check", "--strict", str(wheel), str(sdist))
    check_contents(wheel, sdist)
    with tempfile.TemporaryDirectory() as folder:
        # An empty environment and an empty folder: nothing of the repository can be imported.
        python = Path(folder, "venv", "bin", "python")
        venv.create(Path(folder, "venv"), with_pip=True)
        run(python, "-m", "pip", "install", "-q", "--disable-pip-version-check", str(wheel))
        script = Path(folder, "first_example.py")
        script.write_text(first_example())
        run(python, script, cwd=folder)
    print(f"package: {wheel.name} and {sdist.name} are good")


if __name__ == "__main__":
    main()

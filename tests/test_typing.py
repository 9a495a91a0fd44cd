"""mypy and pyright find in `tests/typing` exactly the errors that are written there."""

import collections
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "tests" / "typing"
FILES = sorted(FOLDER.glob("*/*.py"))
COMMENT = re.compile(r"# error: ([\w -]*), ([\w ]*)$")

pytestmark = pytest.mark.typing


def expected(checker):
    """``{(file, line): codes}`` of the comments; the codes of one line are sorted."""
    found = {}
    for path in FILES:
        for number, line in enumerate(path.read_text().splitlines(), 1):
            match = COMMENT.search(line)
            assert bool(match) == ("# error" in line), f"{path}:{number}: unreadable comment"
            if match:
                found[path.relative_to(FOLDER).as_posix(), number] = sorted(
                    match[1 if checker == "mypy" else 2].split()
                )
    return found


def run(*command):
    """What a checker prints; it must find errors, and must not crash."""
    done = subprocess.run(
        [sys.executable, "-m", *map(str, command)], cwd=FOLDER, capture_output=True, text=True
    )
    assert done.returncode in (0, 1), done.stdout + done.stderr
    return done.stdout


def mypy():
    """``(path, line, code, message)`` of each error."""
    out = run("mypy", "--config-file", FOLDER / "mypy.ini", "--output", "json", *FILES)
    for error in map(json.loads, out.splitlines()):
        if error["severity"] == "error":
            yield FOLDER / error["file"], error["line"], error["code"], error["message"]


def pyright():
    """``(path, line, rule, message)`` of each error."""
    out = run("pyright", "--project", FOLDER, "--pythonpath", sys.executable, "--outputjson")
    for error in json.loads(out)["generalDiagnostics"]:
        if error["severity"] == "error":
            line = error["range"]["start"]["line"] + 1
            yield Path(error["file"]), line, error.get("rule", "syntax"), error["message"]


@pytest.mark.parametrize("checker", [mypy, pyright], ids=lambda checker: checker.__name__)
def test_errors_are_exactly_those_in_the_comments(checker):
    found, messages = collections.defaultdict(set), {}
    for path, line, code, message in checker():
        where = path.resolve().relative_to(FOLDER).as_posix(), line
        found[where].add(code)
        messages[where] = message.splitlines()[0]
    wanted = expected(checker.__name__)
    wrong = [
        f"{file}:{line}: expected {wanted.get((file, line), [])}, "
        f"got {sorted(found.get((file, line), []))} {messages.get((file, line), '')}"
        for file, line in sorted(wanted.keys() | found.keys())
        if wanted.get((file, line), []) != sorted(found.get((file, line), []))
    ]
    assert not wrong, "\n" + "\n".join(wrong)


def test_every_wrong_program_expects_errors():
    files = {file for file, _ in expected("mypy")}
    assert files == {f"wrong/{path.name}" for path in (FOLDER / "wrong").glob("*.py")}

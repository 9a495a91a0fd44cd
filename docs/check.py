"""Checks the Markdown files: links, names of files and tests, and the syntax of Python blocks.

    python docs/check.py

It does not fetch addresses on the web. A path in backticks, such as `jaxloop/errors.py`, must
exist in the repository, in `jaxloop/`, or beside the file that names it. A path with a
placeholder (`<name>`), a wildcard or no slash is not checked. A test in backticks, such as
`test_digits`, must exist in `tests/`.
"""

import ast
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
SUFFIXES = "py|md|png|toml|ipynb|yml|yaml|txt|npz"
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)[^)]*\)")
NAMED_FILE = re.compile(rf"`([\w.-]+/[\w./-]*\.(?:{SUFFIXES}))`")
NAMED_TEST = re.compile(r"`(?:[\w/]+\.py::)?(test_\w+)(?:\[[^`]*\])?`")
HEADING = re.compile(r"^#+ +(.*)$", re.MULTILINE)


def markdown_files():
    """The Markdown files of the repository, without those of hidden or generated folders."""
    for path in sorted(ROOT.rglob("*.md")):
        parts = path.relative_to(ROOT).parts
        if not any(part.startswith(".") and part != ".github" for part in parts):
            yield path


def anchors(text):
    """The anchors that GitHub makes for the headings of ``text``."""
    found = set()
    for heading in HEADING.findall(FENCE.sub("", text)):
        words = re.sub(r"[^\w\- ]", "", heading.strip().lower())
        found.add(words.replace(" ", "-"))
    return found


def broken_links(path, text):
    for target in LINK.findall(FENCE.sub("", text)):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        file = path.parent / name if name else path
        if not file.exists():
            yield f"link to {target}: no such file"
        elif anchor and file.suffix == ".md" and anchor not in anchors(file.read_text()):
            yield f"link to {target}: no such heading"


def missing_files(path, text):
    for name in NAMED_FILE.findall(FENCE.sub("", text)):
        if not any((base / name).exists() for base in (ROOT, ROOT / "jaxloop", path.parent)):
            yield f"`{name}`: no such file"


def missing_tests(text, tests):
    for name in NAMED_TEST.findall(FENCE.sub("", text)):
        if name not in tests:
            yield f"`{name}`: no such test"


def broken_blocks(text):
    for language, code in FENCE.findall(text):
        if language == "python":
            try:
                ast.parse(code)
            except SyntaxError as error:
                yield f"Python block that starts with {code.splitlines()[0]!r}: {error}"


def main():
    sources = "\n".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    tests = {*re.findall(r"def (test_\w+)", sources)}
    problems = [
        f"{path.relative_to(ROOT)}: {problem}"
        for path in markdown_files()
        for text in [path.read_text()]
        for problem in (
            *broken_links(path, text),
            *missing_files(path, text),
            *missing_tests(text, tests),
            *broken_blocks(text),
        )
    ]
    print("\n".join(problems) or "docs: all links, files, tests and Python blocks are good")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())

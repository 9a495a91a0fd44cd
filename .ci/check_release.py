"""Checks that everything names the version that a tag releases.

    python .ci/check_release.py v0.1.0          # before the tag is published
    python .ci/check_release.py                 # the version of the package, also if unreleased
    python .ci/check_release.py --notes v0.1.0  # prints the changes of that version

The version is in `jaxloop/__init__.py`, in `CITATION.cff` and in the newest heading of
`CHANGELOG.md`, which has a date once the version is released: `## 0.1.0 (2026-12-31)`.
"""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
HEADING = re.compile(r"^## (\S+) \((\d{4}-\d{2}-\d{2}|unreleased)\)$", re.MULTILINE)


def found(pattern, name):
    match = re.search(pattern, (ROOT / name).read_text(), re.MULTILINE)
    return match[1] if match else "nothing"


def problems(tag=None):
    """Returns a line for each place that does not fit the tag, or the version without one."""
    version = found(r'^__version__ = "(.+)"$', "jaxloop/__init__.py")
    wrong = []
    if tag is not None and tag != f"v{version}":
        wrong.append(f"the tag must be v{version}, as in jaxloop/__init__.py, got {tag}")
    cited = found(r"^version: (.+)$", "CITATION.cff")
    if cited != version:
        wrong.append(f"CITATION.cff must have the version {version}, got {cited}")
    newest = HEADING.search((ROOT / "CHANGELOG.md").read_text())
    if newest is None or newest[1] != version:
        got = "none" if newest is None else newest[1]
        wrong.append(f"the newest heading of CHANGELOG.md must be of {version}, got {got}")
    elif tag is not None and newest[2] == "unreleased":
        wrong.append(f"the heading of {version} in CHANGELOG.md must have a date, got 'unreleased'")
    return wrong


def notes(tag):
    """Returns the section of a version in CHANGELOG.md."""
    text = (ROOT / "CHANGELOG.md").read_text()
    headings = list(HEADING.finditer(text))
    for heading, following in zip(headings, [*headings[1:], None], strict=True):
        if f"v{heading[1]}" == tag:
            return text[heading.end() : following.start() if following else None].strip()
    raise SystemExit(f"CHANGELOG.md has no version {tag}")


def main(arguments):
    if arguments[:1] == ["--notes"]:
        print(notes(arguments[1]))
        return 0
    wrong = problems(*arguments[:1])
    print("\n".join(wrong) or "release: every file names the same version")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Checks the Markdown files: links, names of files and tests, and the syntax of Python blocks.

    python docs/check.py
    python docs/check.py --fix      # also writes the list of questions in docs/guide.md

It checks that the reference has every public name, and that `docs/guide.md` lists every question.
It does not fetch addresses on the web. A path in backticks, such as `jaxloop/errors.py`, must
exist in the repository, in `jaxloop/`, or beside the file that names it. A path with a
placeholder (`<name>`), a wildcard or no slash is not checked. A test in backticks, such as
`test_digits`, must exist in `tests/`.
"""

import ast
import importlib
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
QUESTION = re.compile(r"^## (.*)$", re.MULTILINE)
DIRECTIVE = re.compile(r"^::: ([\w.]+)$", re.MULTILINE)
PAGE = re.compile(r"^ +- (how-to/[\w-]+\.md)$", re.MULTILINE)
PUBLIC = ("metrics", "losses", "optimizers", "datasets", "handlers", "writers", "errors")


def markdown_files():
    """The Markdown files of the repository, without those of hidden or generated folders."""
    for path in sorted(ROOT.rglob("*.md")):
        parts = path.relative_to(ROOT).parts
        hidden = any(part.startswith(".") and part != ".github" for part in parts)
        if not hidden and parts[0] not in ("site", "build", "dist"):
            yield path


def anchors(text):
    """The anchors of the headings of ``text``, and of the names that it documents."""
    return {*map(anchor, HEADING.findall(FENCE.sub("", text))), *DIRECTIVE.findall(text)}


def anchor(heading):
    """The anchor that GitHub makes for a heading."""
    words = re.sub(r"[^\w\- ]", "", heading.strip().lower())
    return words.replace(" ", "-")


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


def public_names():
    """The full names of everything that users may use."""
    jaxloop = importlib.import_module("jaxloop")
    modules = [name for name in PUBLIC if name in jaxloop.__all__]
    loop_methods = {name for name in vars(jaxloop.Loop) if not name.startswith("_")}
    yield from (f"jaxloop.Loop.{name}" for name in loop_methods)
    yield from (f"jaxloop.{name}" for name in jaxloop.__all__ if name not in modules)
    for name in modules:
        module = importlib.import_module(f"jaxloop.{name}")
        own = [
            one
            for one, value in vars(module).items()
            if not one.startswith("_") and getattr(value, "__module__", "") == module.__name__
        ]
        for one in getattr(module, "__all__", own):
            if not (name == "handlers" and one in loop_methods):  # documented as methods
                yield f"jaxloop.{name}.{one}"


def missing_names():
    """The public names that no page of the reference documents, and those that are not public."""
    pages = (ROOT / "docs" / "reference").glob("*.md")
    documented = {name for page in pages for name in DIRECTIVE.findall(page.read_text())}
    documented = {name for name in documented if "._" not in name}  # results of methods
    # `Metric` and the two errors at the top have two names.
    again = {f"jaxloop.{name}" for name in ("metrics.Metric", "errors.JaxloopError")}
    public = {*public_names()} - again - {"jaxloop.errors.Terminated"}
    yield from (f"docs/reference: no page has `{name}`" for name in sorted(public - documented))
    gone = documented - public - {"jaxloop.optimizers.OptimizerLike"}
    gone -= {f"jaxloop.optimizers.{one}" for one in ("DEFAULT_LEARNING_RATES", "SCHEDULES")}
    yield from (f"docs/reference: `{name}` is not public" for name in sorted(gone))


def guide():
    """The text of `docs/guide.md`: the questions of all how-to guides."""
    lines = [
        "# How do I ...?",
        "",
        "Short answers with code that runs. Type your question into the search, or find it here.",
        "",
        "To move a program from Keras, Lightning, Ignite or Axon, see",
        "[Coming from another framework](migration/index.md). Longer programs are in `examples/`.",
    ]
    for name in PAGE.findall((ROOT / "mkdocs.yml").read_text()):
        text = FENCE.sub("", (ROOT / "docs" / name).read_text())
        lines += ["", f"## [{HEADING.search(text)[1]}]({name})", ""]
        lines += [f"- [{one}]({name}#{anchor(one)})" for one in QUESTION.findall(text)]
    return "\n".join(lines) + "\n"


def main():
    path = ROOT / "docs" / "guide.md"
    if "--fix" in sys.argv:
        path.write_text(guide())
    lists = [*missing_names()]
    if path.read_text() != guide():
        lists.append("docs/guide.md: misses a question; run: python docs/check.py --fix")
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
    problems += lists
    print("\n".join(problems) or "docs: all links, files, tests and Python blocks are good")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())

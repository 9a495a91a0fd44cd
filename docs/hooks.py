"""Hooks of the documentation site, which write Markdown copies of the pages and `llms.txt`.

    site/how-to/data.html      a page
    site/how-to/data.md        its Markdown, with the docstrings in place of their directives
    site/llms.txt              a list of all copies, see https://llmstxt.org
    site/llms-full.txt         all copies in one file

`mkdocs.yml` names this file.
"""

import functools
import importlib
import inspect
import re
import sys
from pathlib import Path

import griffe

sys.path.insert(0, str(Path(__file__).parent))
from griffe_jaxloop import JaxloopDocs  # noqa: E402  beside this file

DIRECTIVE = re.compile(r"^::: ([\w.]+)\n(?:    .*\n?)*", re.MULTILINE)
LEVEL = re.compile(r"heading_level: (\d)")
SNIPPET = re.compile(r"^--8<-- .*\n", re.MULTILINE)
FRONT_MATTER = re.compile(r"\A---\n.*?\n---\n", re.DOTALL)
REFERENCE = re.compile(r"\[(`[^`]+`)\]\[[^\]]+\]")
LINK = re.compile(r"\[([^\]]*)\]\([^)]*\)")
FIRST_SENTENCE = re.compile(r"\A\s*# .*\n+([A-Za-z`\[](?:.|\n(?!\n))*?\.)(?=\s)")

# How much more, or less, than others the search prefers the pages of a folder.
BOOSTS = {"how-to/": 4, "tutorial/": 1, "reference/": 1, "migration/": 0.5, "faq": 0.7}
OTHER_BOOST = 0.1

copies: dict[str, str] = {}


def on_page_markdown(markdown, *, page, **kwargs):
    """Keeps the Markdown of a page, and says how the search ranks it."""
    path = page.file.src_uri
    boost = next((one for start, one in BOOSTS.items() if path.startswith(start)), OTHER_BOOST)
    page.meta.setdefault("search", {"boost": boost})
    text = SNIPPET.sub("", FRONT_MATTER.sub("", markdown))
    copies[path] = DIRECTIVE.sub(documented, text)


def documented(directive):
    """The heading, the signature and the docstring of the object that a directive names."""
    path = directive[1]
    level = LEVEL.search(directive[0])
    lines = ["#" * int(level[1] if level else 2) + f" {path}", ""]
    value = found(path)
    if inspect.isroutine(value):
        lines += ["```python", f"{value.__name__}{signature(value)}", "```", ""]
    lines.append(described(path, value))
    if "members: null" in directive[0]:
        lines += ["", *members(path)]
    return "\n".join(lines) + "\n"


@functools.cache
def source():
    """The package as Griffe reads it."""
    return griffe.load("jaxloop", search_paths=["."], extensions=griffe.Extensions(JaxloopDocs()))


def members(path):
    """A line for each public attribute and method of a class that has a docstring."""
    owner = source()[path.removeprefix("jaxloop.")]
    for name, member in owner.all_members.items():
        if member.docstring is not None and not name.startswith("_"):
            first = REFERENCE.sub(r"\1", member.docstring.value).split("\n\n")[0]
            yield f"- `{name}`: " + " ".join(first.split())


class Annotation(str):
    """A text that is not in quotes in a signature."""

    __slots__ = ()
    __repr__ = str.__str__


def signature(function):
    def unquoted(annotation):
        return Annotation(annotation) if isinstance(annotation, str) else annotation

    found = inspect.signature(function)
    parameters = [
        one.replace(annotation=unquoted(one.annotation)) for one in found.parameters.values()
    ]
    return found.replace(parameters=parameters, return_annotation=unquoted(found.return_annotation))


def found(path):
    value = importlib.import_module("jaxloop")
    for name in path.split(".")[1:]:
        if inspect.ismodule(value) and not hasattr(value, name):
            importlib.import_module(f"{value.__name__}.{name}")
        value = getattr(value, name)
    return value


def described(path, value):
    """The docstring. Those of constants and of aliases are only in the source."""
    if not (inspect.isclass(value) or inspect.isroutine(value)):
        entry = source()[path.removeprefix("jaxloop.")]
        return entry.docstring.value if entry.docstring else ""
    return inspect.getdoc(value) or ""


def on_post_build(*, config, **kwargs):
    """Writes the copies, in the order of the navigation."""
    site = Path(config.site_dir)
    index = [f"# {config.site_name}", "", f"> {config.site_description}", ""]
    full = []
    for title, pages in sections(config.nav):
        index += [f"## {title}", ""]
        for page in pages:
            text = copies[page]
            heading = re.search(r"^# (.*)$", text, re.MULTILINE)[1]
            index.append(f"- [{heading}]({page}){about(text)}")
            full.append(text)
            path = site / page
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        index.append("")
    (site / "llms.txt").write_text("\n".join(index))
    (site / "llms-full.txt").write_text("\n\n".join(full))


def about(text):
    """The first sentence of a page."""
    first = FIRST_SENTENCE.search(text)
    return ": " + LINK.sub(r"\1", " ".join(first[1].split())) if first else ""


def sections(nav):
    """``(title, [path of a page])`` for each top entry of the navigation."""
    for entry in nav:
        for title, value in entry.items():
            yield title, list(paths(value))


def paths(value):
    if isinstance(value, str):
        yield value
    else:
        for one in value:
            yield from paths(one if isinstance(one, str) else next(iter(one.values())))

"""What the API reference needs to know about jaxloop's docstrings. `mkdocs.yml` names this file.

It shows the arguments of `run` in place of ``**arguments``, as `help` does. It finds the methods of
`Loop` that are functions bound in its body. It turns the name of a public object in single
backticks into a link to its entry, and the examples into code.
"""

import ast
import importlib
import inspect
import re

from griffe import Alias, Extension, Parameter, ParameterKind, Parameters

NAME_IN_BACKTICKS = re.compile(r"(?<![`\w\[])`([A-Za-z_][\w.]*)`(?!`)")
KINDS = {
    inspect.Parameter.POSITIONAL_ONLY: ParameterKind.positional_only,
    inspect.Parameter.POSITIONAL_OR_KEYWORD: ParameterKind.positional_or_keyword,
    inspect.Parameter.VAR_POSITIONAL: ParameterKind.var_positional,
    inspect.Parameter.KEYWORD_ONLY: ParameterKind.keyword_only,
    inspect.Parameter.VAR_KEYWORD: ParameterKind.var_keyword,
}


def public_names():
    """``{name in a docstring: its entry in the reference}``, for every public name."""
    jaxloop = importlib.import_module("jaxloop")
    entries = {}
    modules = ["metrics", "losses", "handlers", "datasets", "errors"]
    modules += [name for name in ("writers",) if name in jaxloop.__all__]
    for name in modules:
        module = importlib.import_module(f"jaxloop.{name}")
        public = getattr(module, "__all__", None) or vars(module)
        for one in public:
            if not one.startswith("_"):
                entries[f"{name}.{one}"] = f"jaxloop.{name}.{one}"
                if name in ("handlers", "errors"):
                    entries[one] = f"jaxloop.{name}.{one}"
    for name in jaxloop.__all__:
        if name not in (*modules, "optimizers"):
            entries[name] = f"jaxloop.{name}"
    for name in vars(jaxloop.Loop):
        if not name.startswith("_"):
            for one in (name, f"Loop.{name}", f"handlers.{name}"):
                entries[one] = f"jaxloop.Loop.{name}"
    return entries | {f"jaxloop.{name}": entry for name, entry in entries.items()}


class JaxloopDocs(Extension):
    """Shows real signatures, and links names. See the module."""

    def __init__(self):
        self.entries = public_names()

    def on_function(self, *, func, **kwargs):
        documented = func.docstring.value if func.docstring else ""
        if "**arguments:" not in documented and any(
            "takes_run_arguments" in str(one.value) for one in func.decorators
        ):
            module = importlib.import_module(func.module.path)
            signature = inspect.signature(getattr(module, func.name))
            func.parameters = Parameters(*map(_parameter, signature.parameters.values()))
            func.overloads = None

    def on_object(self, *, obj, **kwargs):
        if obj.docstring is not None:
            own = obj.name

            def link(match):
                name = match[1]
                entry = self.entries.get(name)
                if entry is None or name == own:
                    return match[0]
                return f"[`{name}`][{entry}]"

            text, example, code = obj.docstring.value.partition("\nExample:\n")
            text = NAME_IN_BACKTICKS.sub(link, text)
            if obj.is_class and "__new__" in obj.members:
                text = text.replace("\nArgs:\n", "\nAttributes:\n")  # griffe reads `__init__`
            # Griffe knows the section by its plural.
            obj.docstring.value = text + (f"\nExamples:\n{code}" if example else "")

    def on_package(self, *, pkg, **kwargs):
        for name in ("Snapshot", "State"):
            fields = pkg["_core.state"].members[name]
            for field, member in list(fields.members.items()):
                if member.is_attribute and "_field(" in str(member.value):
                    if "internal=True" in str(member.value):
                        fields.del_member(field)
                    member.value = None  # how it is declared says nothing to a user
        loop = pkg["_loop.Loop"]
        for name, member in list(loop.members.items()):
            method = getattr(importlib.import_module("jaxloop").Loop, name, None)
            if member.is_attribute and inspect.isfunction(method):
                target = f"{method.__module__}.{method.__name__}"
                loop.set_member(name, Alias(name, target, parent=loop))


def _parameter(one):
    annotation, default = one.annotation, one.default
    return Parameter(
        one.name,
        kind=KINDS[one.kind],
        annotation=None if annotation is one.empty else _text(annotation),
        default=None if default is one.empty else repr(default),
    )


def _text(annotation):
    text = annotation if isinstance(annotation, str) else getattr(annotation, "__name__", "")
    ast.parse(text, mode="eval")  # an annotation that is no expression is a mistake
    return text

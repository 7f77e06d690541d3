"""Pages with directives and TeX in; the same with generated reference and MathML out.

mkdocs calls the functions `on_*` while it builds the site, mkdocstrings the class `Doctests` while
it reads the code (mkdocs.yml). Directives stand on a line of their own:

    {{ configuration }}      every section and field of a run's configuration
    {{ service }}            every setting of the service
    {{ recipes }}            the recipes that jobs.train knows
    {{ programs }}           the flags of every program in rlrag.cli
    {{ packages }}           the pinned packages that are installed, with their licences
    {{ file PATH }}          a Markdown file as it is, or a program
    {{ modules PACKAGE }}    the reference of every module in a package
"""

from __future__ import annotations

import ast
import html
import pkgutil
import re
import sys
import types
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import griffe
import package_licences  # beside this file, whose folder mkdocs looks into
from latex2mathml.converter import convert
from pydantic import BaseModel
from pydantic.fields import FieldInfo

ROOT = Path(__file__).resolve().parents[1]
_DIRECTIVE = re.compile(r"^\{\{ (\w+)(?: ([\w./-]+))? \}\}$", re.MULTILINE)
_TEX = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)
_EXAMPLE = re.compile(r"^( *)Example:$", re.MULTILINE)
_BOUNDS = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}


def on_config(config: Any) -> Any:
    """Let the project's packages that are not installed be imported, whatever started mkdocs."""
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))
    return config


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Replace every directive by what it stands for."""

    def generated(match: re.Match[str]) -> str:
        name, argument = match.groups()
        make: Callable[..., Iterator[str]] = _DIRECTIVES[name]
        return "\n".join(make(argument) if argument else make())

    return _DIRECTIVE.sub(generated, markdown)


def on_page_content(content: str, **_: Any) -> str:
    """Turn TeX into MathML, which needs no script."""

    def drawn(match: re.Match[str]) -> str:
        tag, bracket, tex = match.groups()
        spaced = html.unescape(tex).replace(r"\log ", r"\log\, ")  # TeX has that space by itself
        display = "block" if bracket == "[" else "inline"
        return f'<{tag} class="arithmatex">{convert(spaced, display=display)}</{tag}>'

    return _TEX.sub(drawn, content)


class Doctests(griffe.Extension):
    """Shows what stands under `Example:` in a docstring as code, as under the plural."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Change one docstring."""
        if obj.docstring is not None:
            obj.docstring.value = _EXAMPLE.sub(r"\1Examples:", obj.docstring.value)


def configuration() -> Iterator[str]:
    """One table for each section of `RunConfig`, under the name that flags and files use."""
    from rlrag.config import ALGORITHMS, OwnTrainerConfig, RunConfig

    yield from _table(RunConfig, "", whole=False)
    for name, field in RunConfig.model_fields.items():
        if name == "algorithm":
            for one, section in {**ALGORITHMS, "package.module:name": OwnTrainerConfig}.items():
                yield from ("", f"## algorithm.name {one}", "", section.__doc__ or "", "")
                yield from _table(section, "algorithm.", whole=False)
        elif isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from ("", f"## {name}", "", field.annotation.__doc__ or "", "")
            yield from _table(field.annotation, f"{name}.")


def service() -> Iterator[str]:
    """All settings of `ServeSettings` in one table."""
    from rlrag.serving.settings import ServeSettings

    yield from _table(ServeSettings, "")


def recipes() -> Iterator[str]:
    """Name and first paragraph of each recipe's docstring."""
    from rlrag.recipes import RECIPES

    yield from ("| recipe | what it trains |", "|---|---|")
    for name, make in RECIPES.items():
        yield f"| `{name}` | {(make.__doc__ or '').splitlines()[0]} |"


def file(path: str) -> Iterator[str]:
    """A file of the project; Python under its name, as code."""
    text = (ROOT / path).read_text()
    yield from [f'```python title="{path}"', text, "```"] if path.endswith(".py") else [text]


def programs() -> Iterator[str]:
    """What each program does, and the flags in its class `...Arguments`."""
    for path in sorted((ROOT / "rlrag" / "cli").rglob("*.py")):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for arguments in re.findall(r"^class (\w+Arguments)\b", path.read_text(), re.MULTILINE):
            command = name.removeprefix("rlrag.cli.").removesuffix(".program")
            summary = ast.get_docstring(ast.parse(path.read_text())) or ""
            yield from ("", f"## rlrag {command}", "", *_as_markdown(summary), "")
            yield from (f"::: {name}.{arguments}", "    options:", "      heading_level: 3", "")


def packages() -> Iterator[str]:
    """Name, version and licence of each pinned package."""
    yield from ("| package | version | licence |", "|---|---|---|")
    for name, version, licence, _ in package_licences.packages():
        yield f"| {name} | {version} | {licence} |"


def _as_markdown(docstring: str) -> Iterator[str]:
    """A module's docstring, whose indented lines are commands."""
    for paragraph in docstring.split("\n\n"):
        lines = paragraph.splitlines()
        is_code = all(line.startswith(("    ", "rlrag ")) for line in lines)
        yield from (
            ["", "```bash", *(line.strip() for line in lines), "```"] if is_code else ["", *lines]
        )


def modules(package: str) -> Iterator[str]:
    """A heading and the reference of each module of a package that has documented names."""
    spec = find_spec(package)
    if spec is None or spec.submodule_search_locations is None:
        raise ValueError(f"{package} is no package; name one in the directive")
    found = pkgutil.walk_packages(spec.submodule_search_locations, f"{package}.")
    for module in sorted(each.name for each in found if not each.ispkg):
        yield from ("", f"::: {module}", "    options:", "      heading_level: 2", "")


_DIRECTIVES: dict[str, Callable[..., Iterator[str]]] = {
    "configuration": configuration,
    "service": service,
    "recipes": recipes,
    "file": file,
    "packages": packages,
    "programs": programs,
    "modules": modules,
}


def _table(section: type[BaseModel], prefix: str, whole: bool = True) -> Iterator[str]:
    yield from ("| field | values | default | meaning |", "|---|---|---|---|")
    yield from _rows(section, prefix, whole)


def _rows(section: type[BaseModel], prefix: str, whole: bool) -> Iterator[str]:
    for name, field in section.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            if whole:
                yield from _rows(kind, f"{prefix}{name}.", whole)
            continue
        if isinstance(field.default, BaseModel):  # one of several, which have tables of their own
            continue
        default = "required" if field.is_required() else _code(_plain(field.default))
        cells = (_code(prefix + name), _values(field), default, field.description or "")
        yield "| " + " | ".join(" ".join(cell.split()) for cell in cells) + " |"


def _values(field: FieldInfo) -> str:
    """What a field takes, in words: its type or its choices, and its bounds."""
    bounds = [
        f"{words} {getattr(limit, name):,}"
        for limit in field.metadata
        for name, words in _BOUNDS.items()
        if getattr(limit, name, None) is not None
    ]
    return ", ".join([_kind(field.annotation), *bounds])


def _kind(annotation: Any) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return " ".join(_code(choice) for choice in arguments)
    if origin in (Union, types.UnionType):
        kinds = [_kind(kind) for kind in arguments if kind is not type(None)]
        return " or ".join([*kinds, "None"] if type(None) in arguments else kinds)
    if origin is tuple:
        return f"several of: {_kind(arguments[0])}"
    words = {str: "text", int: "integer", float: "number", bool: "True or False"}
    return words.get(annotation, annotation.__name__)


def _plain(value: Any) -> Any:
    """A tuple as the words that a command line takes."""
    return " ".join(map(str, value)) or "none" if isinstance(value, tuple) else value


def _code(value: Any) -> str:
    text = str(value).replace("\n", "\\n").replace("|", "\\|")
    return f"`{text}`" if text else "empty"

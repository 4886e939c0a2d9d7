"""The Jinja sandbox that chat templates are compiled in, and what a compiled template expects.

Called by ``template``, in the template process only: compiling evaluates constant expressions, so it needs
the process's limits as well. Templates are written for transformers, so they get the helpers that
transformers gives them, and nothing else. It must not know about requests or tokens.
"""

import json
from collections.abc import Iterator
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

_OVER_ITEMS = frozenset({"map", "select", "reject", "selectattr", "rejectattr"})
"""Filters that visit each item of a list."""


class Raised(jinja2.TemplateError):
    """A template called ``raise_exception``: the message is meant for the user."""


class Environment(ImmutableSandboxedEnvironment):
    """Compiles chat templates."""

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlocks, "jinja2.ext.loopcontrols"]
        )
        self.filters["tojson"] = tojson
        self.globals |= {
            "raise_exception": _refuse,
            "strftime_now": _strftime_now,
            "dict": _Dict(),
            "namespace": _Namespace,
        }


class _GenerationBlocks(Extension):
    """``{% generation %}…{% endgeneration %}`` marks text for training. Here it renders its body only, in a
    scope of its own, as in transformers."""

    tags = {"generation"}  # noqa: RUF012 - Jinja declares tags like this

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

    def _body(self, caller: Any) -> str:
        return caller()


class _Dict:
    """``dict`` without the attributes of a Python type."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict:
        return dict.fromkeys(*args)


class _Namespace(Namespace):
    """Refuses underscored names, which reach Python's internals."""

    # Jinja's own signature: any keyword may be given, also ``self``.
    def __init__(*args: Any, **kwargs: Any) -> None:
        self, *rest = args
        values = dict(*rest, **kwargs)
        for name in values:
            _check_name(name)
        Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace can't hold {name!r}: no underscore may lead")


def _refuse(message: Any) -> None:
    raise Raised(str(message))


def tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON text. Jinja's own filter escapes HTML, which a model would see as text."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _strftime_now(form: str) -> str:
    # Local time without a zone, as transformers gives it.
    return datetime.now().strftime(form)


def takes_parts(tree: nodes.Template) -> bool:
    """Whether the template visits the parts of a message's content.

    True if it loops over ``message.content`` (or over a variable or a macro's parameter that holds it),
    filters its items, or reads the text of one. Such a template gets content that consists of parts as it is;
    any other template gets the parts joined to one string by newlines. vLLM decides alike. A test such as
    ``content is string`` alone means nothing: the other branch may only raise.
    """
    names = _content_names(tree)
    return any(_visits_items(node, names) for node in tree.find_all((nodes.Expr, nodes.For)))


def _visits_items(node: nodes.Node, names: set[str]) -> bool:
    if isinstance(node, nodes.For):
        return _is_content(node.iter, names)
    if isinstance(node, nodes.Filter):
        return node.name in _OVER_ITEMS and _is_content(node.node, names)
    if _key(node) == "text" and isinstance(node.node, nodes.Getitem):
        item = node.node
        return isinstance(_key(item), int) and _is_content(item.node, names)
    return False


def _key(node: nodes.Node | None) -> Any:
    """K of ``x.K`` and ``x[K]``; None for other nodes and computed keys."""
    if isinstance(node, nodes.Getattr):
        return node.attr
    if isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Const):
        return node.arg.value
    return None


def _content_names(tree: nodes.Template) -> set[str]:
    """Names of variables and of macros' parameters that hold a message's content. Ignores scopes."""
    names = {"content"}
    macros = {macro.name: [arg.name for arg in macro.args] for macro in tree.find_all(nodes.Macro)}
    known = 0
    while len(names) > known:
        known = len(names)
        names.update(
            name for name, value in _bindings(tree, macros) if name is not None and _is_content(value, names)
        )
    return names


def _bindings(
    tree: nodes.Template, macros: dict[str, list[str]]
) -> Iterator[tuple[str | None, nodes.Node | None]]:
    """(name, the expression that it is bound to) of assignments and of macros' calls."""
    for assignment in tree.find_all(nodes.Assign):
        yield getattr(assignment.target, "name", None), assignment.node
    for call in tree.find_all(nodes.Call):
        parameters = macros.get(getattr(call.node, "name", ""), [])
        yield from zip(parameters, call.args, strict=False)
        yield from ((argument.key, argument.value) for argument in call.kwargs if argument.key in parameters)


def _is_content(node: nodes.Node | None, names: set[str]) -> bool:
    """Whether an expression is a message's content, or is made from it by filters, slices and defaults."""
    if isinstance(node, nodes.Name):
        return node.name in names
    if _key(node) == "content":
        return True
    if isinstance(node, nodes.Filter) or (
        isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Slice)
    ):
        return _is_content(node.node, names)
    if isinstance(node, nodes.CondExpr):
        return _is_content(node.expr1, names) or _is_content(node.expr2, names)
    if isinstance(node, nodes.BinExpr):
        return isinstance(node, nodes.Or) and _is_content(node.left, names)
    if isinstance(node, nodes.Call):  # message.get('content')
        return _key(node.node) == "get" and any(
            isinstance(argument, nodes.Const) and argument.value == "content" for argument in node.args[:1]
        )
    return False

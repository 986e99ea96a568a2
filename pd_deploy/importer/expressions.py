"""Jinja expressions of inventories and playbooks, as far as they are arithmetic. Pure.

Jinja's parser takes them apart; nothing is rendered. Of its syntax only names, constants, sums,
products, and the filters below are evaluated, so there is no call, no attribute of an object, no
lookup, and no loop.
"""

import operator
import re
from collections.abc import Callable, Mapping
from typing import Any

import jinja2
from jinja2 import nodes

MAX_LENGTH = 4000  # of a template; those of playbooks have some tens of characters
_MAX_NUMBER = 1 << 62
_PARSER = jinja2.Environment(autoescape=True)  # parses only; nothing is ever rendered


class Refused(Exception):
    """An expression that is not evaluated; the message says what it has."""


class UnknownName(Refused):
    """An expression with a name that has no value here."""


def has_expression(text: str) -> bool:
    """Tell whether a text has an expression or a statement of Jinja's."""
    return any(mark in text for mark in ("{{", "{%", "{#"))


def evaluate(text: str, names: Mapping[str, Any]) -> Any:
    """Return the value of a template: that of its expression if it is nothing else, else text.

    Raises:
        UnknownName: a name has no value.
        Refused: it is more than arithmetic, or too long.
    """
    if not has_expression(text):
        return text
    if len(text) > MAX_LENGTH:
        raise Refused(f"an expression of more than {MAX_LENGTH} characters")
    try:
        body = _PARSER.parse(text).body
    except (jinja2.TemplateError, RecursionError, ValueError) as error:
        raise Refused("no valid expression") from error
    outputs = [part for output in body for part in _parts(output)]
    expressions = [part for part in outputs if not _is_blank(part)]
    if len(expressions) == 1 and not isinstance(expressions[0], nodes.TemplateData):
        return _value(expressions[0], names)
    return "".join(str(_value(part, names)) for part in outputs)


def _parts(output: nodes.Node) -> list[nodes.Node]:
    if not isinstance(output, nodes.Output):
        raise Refused(f"the statement `{type(output).__name__.lower()}`")
    return list(output.nodes)


def _is_blank(part: nodes.Node) -> bool:
    return isinstance(part, nodes.TemplateData) and not part.data.strip()


def _value(node: nodes.Node, names: Mapping[str, Any]) -> Any:
    value: Any
    match node:
        case nodes.TemplateData(data=text):
            value = text
        case nodes.Const(value=constant):
            value = _bounded(constant)
        case nodes.Name(name=name):
            value = _entry(names, name)
        case nodes.Getattr(node=container, attr=key):
            value = _entry(_value(container, names), key)
        case nodes.Getitem(node=container, arg=key):
            value = _entry(_value(container, names), _value(key, names))
        case nodes.Neg(node=operand):
            value = -_number(_value(operand, names))
        case nodes.Add() | nodes.Sub() | nodes.Mul():
            left, right = _number(_value(node.left, names)), _number(_value(node.right, names))
            value = _bounded(_OPERATORS[type(node)](left, right))
        case nodes.Filter():
            value = _filtered(node, names)
        case _:
            raise Refused(_described(node))
    return value


_OPERATORS: dict[type[nodes.Node], Callable[[int, int], int]] = {
    nodes.Add: operator.add,
    nodes.Sub: operator.sub,
    nodes.Mul: operator.mul,
}


def _entry(container: Any, key: Any) -> Any:
    if not isinstance(container, Mapping) or not isinstance(key, str) or key not in container:
        raise UnknownName(f"the name `{key}`, which has no value here")
    return container[key]


def _number(value: Any) -> int:
    if isinstance(value, str) and re.fullmatch(r"\s*[-+]?\d{1,18}\s*", value, re.ASCII):
        return int(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise Refused(f"a calculation with {type(value).__name__}, which is no whole number")
    return value


def _bounded(value: Any) -> Any:
    if isinstance(value, int) and abs(value) > _MAX_NUMBER:
        raise Refused("a number that is too large")
    return value


def _filtered(node: nodes.Filter, names: Mapping[str, Any]) -> Any:
    if node.node is None or node.kwargs or node.dyn_args or node.dyn_kwargs:
        raise Refused(f"the filter `{node.name}`")
    if node.name in ("default", "d") and len(node.args) in (1, 2):
        try:
            value = _value(node.node, names)
        except UnknownName:
            return _value(node.args[0], names)
        takes_empty = len(node.args) == 2 and _value(node.args[1], names) is True
        return _value(node.args[0], names) if takes_empty and not value else value
    if node.name == "int" and not node.args:
        return _number(_value(node.node, names))
    if node.name == "string" and not node.args:
        return str(_value(node.node, names))
    raise Refused(f"the filter `{node.name}`")


def _described(node: nodes.Node) -> str:
    if isinstance(node, nodes.Call):
        called = node.node
        name = called.name if isinstance(called, nodes.Name) else type(called).__name__.lower()
        return f"the call of `{name}`"
    return f"the expression `{type(node).__name__.lower()}`"

"""Reading YAML of others, within bounds: size, depth, number of values, aliases.

Every value knows its line. Nothing is constructed but text, numbers, true, false and null; of an
encrypted value (`!vault`) only that it is one.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from pd_deploy.errors import InvalidInput, Problem
from pd_deploy.importer.report import Place

MAX_BYTES = 1 << 20  # the largest of upstream's files has 80 KB
MAX_VALUES = 50_000  # aliases included, each time they are used
MAX_DEPTH = 40
_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_COLLECTION_STARTS = (yaml.MappingStartEvent, yaml.SequenceStartEvent)
_COLLECTION_ENDS = (yaml.MappingEndEvent, yaml.SequenceEndEvent)


@dataclass(frozen=True)
class Node:
    """A value of a document.

    Attributes:
        value: a mapping, a list, or a scalar.
        text: a scalar as it is written, without quotes.
        first_line: where the content of a block scalar begins; else as `place`.
        is_encrypted: whether it is an encrypted value, which is not read.
        is_literal: whether each line of its text is a line of the file.
    """

    value: "dict[str, Node] | list[Node] | str | int | float | bool | None"
    place: Place
    text: str = ""
    first_line: int = 0
    is_encrypted: bool = False
    is_literal: bool = False

    @property
    def mapping(self) -> "dict[str, Node]":
        """Its entries; none if it is no mapping."""
        return self.value if isinstance(self.value, dict) else {}

    @property
    def items(self) -> "list[Node]":
        """Its items; none if it is no list."""
        return self.value if isinstance(self.value, list) else []

    @property
    def is_scalar(self) -> bool:
        """Whether it is neither a mapping nor a list."""
        return not isinstance(self.value, dict | list)

    @property
    def is_null(self) -> bool:
        """Whether it has no value."""
        return self.value is None

    def at(self, *keys: str) -> "Node | None":
        """Return the value below some keys; None where there is none, or where it is null."""
        node: Node | None = self
        for key in keys:
            node = node.mapping.get(key) if node is not None else None
        return None if node is None or node.is_null else node

    def mentions(self, name: str) -> bool:
        """Tell whether a key below has a name, or an expression refers to it."""
        word = re.compile(rf"(?<!\w){re.escape(name)}(?!\w)")
        return any(
            key == name or ("{{" in node.text and word.search(node.text) is not None)
            for key, node in self._below()
        )

    def _below(self) -> "Iterator[tuple[str, Node]]":
        pairs = [*self.mapping.items(), *(("", item) for item in self.items)]
        for key, node in pairs:
            yield key, node
            yield from node._below()

    @property
    def plain(self) -> Any:
        """The value without its places, as JSON has it."""
        if isinstance(self.value, dict):
            return {key: node.plain for key, node in self.value.items()}
        if isinstance(self.value, list):
            return [node.plain for node in self.value]
        return self.value


def read(path: Path) -> Node:
    """Read a file.

    Raises:
        InvalidInput: it can't be read, is too large, not UTF-8, not YAML, too deep, or has more
            values than any such file.
    """
    return parse(_text(path), path.name)


def parse(text: str, file: str) -> Node:
    """Parse the text of a file; see `read`."""
    try:
        root = _composed(text, file)
        return _Builder(file).node(root, 0)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise refused(Place(file, line), f"not valid YAML: {error.problem}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise refused(Place(file, 1), f"not valid YAML: {error}") from error


def refused(place: Place, message: str) -> InvalidInput:
    """Make the error of a file that can't be read at all."""
    return InvalidInput([Problem(f"line {place.line}", message)], source=place.file)


def _text(path: Path) -> str:
    try:
        if not path.is_file():
            raise refused(Place(path.name, 1), f"expected a file, found none at {path}")
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise refused(Place(path.name, 1), f"cannot be read: {error.strerror}") from error
    if len(content) > MAX_BYTES:
        message = f"expected at most {MAX_BYTES >> 20} MB, found more: no playbook is as large"
        raise refused(Place(path.name, 1), message)
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise refused(Place(path.name, line), "expected UTF-8 text, found other bytes") from error


def _composed(text: str, file: str) -> yaml.Node:
    _check_bounds(text, file)
    nodes = list(yaml.compose_all(text, Loader=_LOADER))
    if len(nodes) != 1 or nodes[0] is None:
        raise refused(Place(file, 1), f"expected one YAML document, found {len(nodes)}")
    return nodes[0]


def _check_bounds(text: str, file: str) -> None:
    """Read the file's events, which takes no recursion and next to no memory, and count them."""
    depth = 0
    for count, event in enumerate(yaml.parse(text, Loader=_LOADER)):
        depth += isinstance(event, _COLLECTION_STARTS) - isinstance(event, _COLLECTION_ENDS)
        if depth > MAX_DEPTH:
            message = f"expected at most {MAX_DEPTH} levels of nesting, found more"
            raise refused(Place(file, _line(event)), message)
        if count > MAX_VALUES:
            raise _too_many(Place(file, _line(event)))


def _line(event: yaml.Event) -> int:
    return event.start_mark.line + 1 if event.start_mark else 1


def _too_many(place: Place) -> InvalidInput:
    return refused(place, f"expected at most {MAX_VALUES} values, aliases included, found more")


class _Builder:
    """Makes nodes of YAML's own; aliases count each time, so that they can't multiply."""

    def __init__(self, file: str) -> None:
        self._file = file
        self._count = 0

    def node(self, raw: yaml.Node, depth: int) -> Node:
        self._count += 1
        place = Place(self._file, raw.start_mark.line + 1)
        if self._count > MAX_VALUES:
            raise _too_many(place)
        if depth > MAX_DEPTH:
            raise refused(place, "expected no alias to what it is in, found one")
        if isinstance(raw, yaml.MappingNode):
            return Node(dict(self._pairs(raw, depth)), place)
        if isinstance(raw, yaml.SequenceNode):
            return Node([self.node(item, depth + 1) for item in raw.value], place)
        if not isinstance(raw, yaml.ScalarNode):
            raise refused(place, "expected a value, found something else")
        return _scalar(raw, place)

    def _pairs(self, raw: yaml.MappingNode, depth: int) -> Iterator[tuple[str, Node]]:
        for key, value in raw.value:
            if not isinstance(key, yaml.ScalarNode):
                line = key.start_mark.line + 1
                raise refused(Place(self._file, line), "expected a simple key, found a collection")
            node = self.node(value, depth + 1)
            if key.tag == "tag:yaml.org,2002:merge":
                yield from node.mapping.items()
            else:
                # The line of the key: a block or a mapping begins on a later one.
                place = Place(self._file, key.start_mark.line + 1)
                yield key.value, replace(node, place=place)


def _scalar(raw: yaml.ScalarNode, place: Place) -> Node:
    text, tag = raw.value, raw.tag.removeprefix("tag:yaml.org,2002:")
    is_block = raw.style in ("|", ">")
    first_line = place.line + 1 if is_block else place.line
    if tag == "!vault":
        return Node("", place, "", first_line, is_encrypted=True)
    value: str | int | float | bool | None = text
    if tag == "null":
        value = None
    elif tag == "bool" and text.lower() in ("true", "false", "yes", "no", "on", "off"):
        value = text.lower() in ("true", "yes", "on")
    elif tag == "int" and re.fullmatch(r"[-+]?(0|[1-9][0-9]{0,17})", text):
        value = int(text)
    elif tag == "float" and re.fullmatch(r"[-+]?[0-9]*\.?[0-9]+([eE][-+]?[0-9]{1,3})?", text):
        value = float(text)
    return Node(value, place, text, first_line, is_literal=raw.style == "|")

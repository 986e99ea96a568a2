"""Reading YAML documents: `extends`, no key given twice, clear errors for what can't be read."""

import re
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any, NoReturn

import yaml

from pd_deploy.config import text_files
from pd_deploy.config.fields import FILE, WrittenFloat, archive_of, is_git_url, shown
from pd_deploy.errors import InvalidInput, Problem

Document = dict[str, Any]

# Tagged values such as `!!int ""` or `!!bool x` make the YAML library raise other errors.
_UNREADABLE = (
    yaml.YAMLError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    ArithmeticError,
    RecursionError,
)


MAX_VALUES = 100_000
"""What aliases may stand for: a deployment file has some hundred values."""


class _StrictLoader(yaml.SafeLoader):
    """A safe loader that refuses a key given twice: the earlier value would be lost silently."""

    def get_single_node(self) -> yaml.Node | None:
        """Compose the document; refuse one that a few aliases of aliases make endless."""
        node: yaml.Node | None = super().get_single_node()
        if node and (values := _values(node, {})) > MAX_VALUES:
            raise ValueError(f"its aliases stand for {values:.3g} values, at most {MAX_VALUES} may")
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """Make the value of a node; say where the document has what can't be made one."""
        try:
            return super().construct_object(node, deep)
        except (yaml.YAMLError, RecursionError):
            raise
        except _UNREADABLE as error:
            raise yaml.MarkedYAMLError(problem=str(error), problem_mark=node.start_mark) from error


def _values(node: yaml.Node, known: dict[int, int]) -> int:
    """Count the values that a node stands for, those of each alias anew."""
    if id(node) not in known:
        known[id(node)] = 1
        parts = node.value if isinstance(node, yaml.CollectionNode) else ()
        if isinstance(node, yaml.MappingNode):
            parts = [part for pair in parts for part in pair]
        known[id(node)] += sum(_values(part, known) for part in parts)
    return known[id(node)]


def _mapping(loader: yaml.SafeLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    own_pairs = [pair for pair in node.value if pair[0].tag != "tag:yaml.org,2002:merge"]
    result = _without_repeats(loader, own_pairs)
    # Keys merged by `<<` come before the mapping's own, which take precedence.
    loader.flatten_mapping(node)
    merged = yaml.MappingNode(node.tag, node.value[: len(node.value) - len(own_pairs)])
    return {**dict(loader.construct_pairs(merged, deep=True)), **result}


def _without_repeats(
    loader: yaml.SafeLoader, pairs: list[tuple[yaml.Node, yaml.Node]]
) -> dict[Any, Any]:
    result: dict[Any, Any] = {}
    for key_node, value_node in pairs:
        key = loader.construct_object(key_node, deep=True)
        if not isinstance(key, Hashable):
            raise yaml.constructor.ConstructorError(
                None, None, "expected a simple key, found a collection", key_node.start_mark
            )
        if key in result:
            raise yaml.constructor.ConstructorError(
                None, None, f"the key {key!r} is given twice", key_node.start_mark
            )
        result[key] = loader.construct_object(value_node, deep=True)
    return result


class _Surprise(yaml.MarkedYAMLError):
    """A value that YAML 1.1 takes for something else than what is written there."""


def _expected(node: yaml.ScalarNode, found: str) -> _Surprise:
    return _Surprise(
        problem=f"expected text in quotes ('{node.value}'), or a plain value; found "
        f"{node.value}, which YAML reads as {found}",
        problem_mark=node.start_mark,
    )


def _whole(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    value = int(loader.construct_yaml_int(node))
    if not re.fullmatch(r"[-+]?(0|[1-9][0-9]*)", node.value):
        raise _expected(node, f"the number {value}")
    return value


def _number(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> float:
    value = float(loader.construct_yaml_float(node))
    if ":" in node.value:
        raise _expected(node, f"the number {value}")
    if repr(value) == node.value:
        return value
    number = WrittenFloat(value)
    number.written = node.value
    return number


def _truth(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> bool:
    value = bool(loader.construct_yaml_bool(node))
    if node.value.lower() not in ("true", "false"):
        raise _expected(node, str(value).lower())
    return value


def _date(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> NoReturn:
    if not loader.timestamp_regexp.match(node.value):
        raise ValueError(f"{node.value} is no date")
    raise _expected(node, "a date")


_StrictLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)
_StrictLoader.add_constructor("tag:yaml.org,2002:int", _whole)
_StrictLoader.add_constructor("tag:yaml.org,2002:float", _number)
_StrictLoader.add_constructor("tag:yaml.org,2002:bool", _truth)
_StrictLoader.add_constructor("tag:yaml.org,2002:timestamp", _date)


def read(
    path: Path, *, names_file: tuple[str, ...] = (), named_by: tuple[str, str] | None = None
) -> Document:
    """Read the mapping that a YAML file holds, merged over the file that it `extends`.

    Mappings merge key by key, lists and scalars replace, and a key set to null removes what the
    extended file gave. The path of an `image: file:PATH`
    and of a directory in `code` become absolute ones.

    Args:
        names_file: keys whose value may be the path of a file, relative to the file that has the
            key; such a path is returned as an absolute one.
        named_by: the key that names this file, and the file which has that key, if one does: where
            this one can't be read, that one is to be changed.

    Raises:
        InvalidInput: the file is missing, not a file, not UTF-8, not YAML, not a mapping, has a
            key twice, or extends itself.
    """
    return _read(_resolved(path, path), names_file, named_by, seen=())


def compose(text: str) -> yaml.Node | None:
    """Parse a document into nodes with their lines.

    Raises:
        yaml.YAMLError, ValueError, RecursionError: it can't be read.
    """
    node: yaml.Node | None = yaml.compose(text, _StrictLoader)
    return node


def is_path(value: str) -> bool:
    """Tell whether a value is written as a path, not as a name."""
    return "/" in value or value.endswith((".yaml", ".yml"))


def placed(image: str, named_in: Path) -> str:
    """Make the path of an image in a file absolute: it is relative to the file that names it."""
    path = archive_of(image)
    return image if path is None else f"{FILE}{_resolved(named_in.parent / path, named_in)}"


def _code_placed(code: Document, named_in: Path) -> Document:
    source = code.get("source")
    if not isinstance(source, str) or is_git_url(source):
        return code
    return {**code, "source": str(_resolved(named_in.parent / source, named_in))}


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> Document:
    """Merge `over` over `base`; see `read` for the rules."""
    result = dict(base)
    for key, value in over.items():
        below = result.get(key)
        if value is None:
            result.pop(key, None)
        elif isinstance(value, Mapping) and isinstance(below, Mapping):
            result[key] = merge(below, value)
        else:
            result[key] = value
    return result


def _read(
    path: Path,
    names_file: tuple[str, ...],
    named_by: tuple[str, str] | None,
    seen: tuple[Path, ...],
) -> Document:
    if path in seen:
        chain = " → ".join(p.name for p in (*seen, path))
        raise _invalid(path, "extends", f"the files extend each other in a circle: {chain}")
    document = _parse(path, named_by)
    for key, value in document.items():
        if key in names_file and isinstance(value, str) and is_path(value):
            document[key] = str(_resolved(path.parent / value, path))
        elif key == "image" and isinstance(value, str):
            document[key] = placed(value, path)
        elif key == "code" and isinstance(value, dict):
            document[key] = _code_placed(value, path)
    parent = document.pop("extends", None)
    if parent is None:
        return document
    if not isinstance(parent, str):
        raise _invalid(path, "extends", f"expected the path of a file, found {shown(parent)}")
    extended = _resolved(path.parent / parent, path)
    base = _read(extended, names_file, ("extends", str(path)), (*seen, path))
    return merge(base, document)


def _resolved(path: Path, named_in: Path) -> Path:
    try:
        return path.resolve()
    except (OSError, ValueError, RuntimeError) as error:
        raise _invalid(named_in, "", f"{str(path)!r} cannot be found: {error}") from error


def _parse(path: Path, named_by: tuple[str, str] | None) -> Document:
    text = text_files.read(path, *named_by) if named_by else text_files.read(path)
    try:
        document = yaml.load(text, _StrictLoader)  # noqa: S506
    except yaml.MarkedYAMLError as error:
        where = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        fault = "" if isinstance(error, _Surprise) else "not valid YAML: "
        raise _invalid(path, "", f"{fault}{where}{error.problem}") from error
    except _UNREADABLE as error:
        raise _invalid(path, "", f"not valid YAML: {error}") from error
    if not isinstance(document, dict):
        kind = "nothing" if document is None else type(document).__name__
        raise _invalid(path, "", f"expected a mapping of keys to values, found {kind}")
    odd = [key for key in document if not isinstance(key, str)]
    if odd:
        raise _invalid(path, str(odd[0]), f"expected keys that are text, found {odd[0]!r}")
    return document


def _invalid(path: Path, key: str, message: str) -> InvalidInput:
    return InvalidInput([Problem(key, message)], source=str(path))

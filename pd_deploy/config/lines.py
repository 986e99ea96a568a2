"""Where the keys that problems name stand: looked up only once something is wrong, so that reading
a good file costs nothing more."""

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import yaml

from pd_deploy.config import text_files
from pd_deploy.config.yaml_files import compose, is_path
from pd_deploy.errors import InvalidInput, Problem

Parts = tuple[str, ...]
# A file's name and what it holds, those that take precedence first.
Layers = list[tuple[Path, yaml.Node]]

_ROLES = ("prefill", "decode")
_OF_PROFILE = "profile_settings."


@contextlib.contextmanager
def named(file: Path, shipped: Path, *, without: Parts = ()) -> Iterator[None]:
    """Name file and line in problems that are found within.

    Args:
        file: the deployment file.
        shipped: the directory of the profiles that come with pd-deploy.
        without: keys whose values come from elsewhere, as from an option.
    """
    try:
        yield
    except InvalidInput as error:
        # A file that it extends, or its profile, may be the one that is wrong.
        source = error.source if error.source and is_path(error.source) else str(file)
        layers = _layers(Path(source))
        places = _Places(layers, _profile(layers, shipped))
        problems = [
            problem if problem.place or problem.key in without else _placed(problem, places)
            for problem in error.problems
        ]
        raise InvalidInput(problems, source=source, hint=error.hint) from error


def _placed(problem: Problem, places: "_Places") -> Problem:
    place = places.find(problem.key) if problem.key else None
    if place is None:
        return problem
    (path, _), (found, line) = places.layers[0], place
    words = f"line {line}" if found == path else f"{_relative(found, path)}, line {line}"
    return replace(problem, key=problem.key.removeprefix(_OF_PROFILE), place=words)


def _relative(path: Path, file: Path) -> Path:
    directory = file.parent
    return path.relative_to(directory) if path.is_relative_to(directory) else path


def _layers(path: Path) -> Layers:
    """Read a file and those that it extends, as far as they can be read."""
    layers: Layers = []
    with contextlib.suppress(InvalidInput, yaml.YAMLError, OSError, ValueError, RuntimeError):
        path = path.resolve()
        while path not in [known for known, _ in layers]:
            root = compose(text_files.read(path))
            if root is None:
                break
            layers.append((path, root))
            extended = _text_of("extends", layers[-1:])
            if extended is None:
                break
            path = (path.parent / extended[1]).resolve()
    return layers


def _profile(layers: Layers, shipped: Path) -> Layers:
    """Read the profile that a file names, and those below it."""
    profile = _text_of("profile", layers)
    if profile is None:
        return []
    file, name = profile
    if not is_path(name):
        return _layers(shipped / f"{name}.yaml")
    own = _layers(file.parent / name)
    return own + _profile(own, shipped)


def _text_of(key: str, layers: Layers) -> tuple[Path, str] | None:
    for file, root in layers:
        for name, value in _pairs(root):
            if name.value == key and isinstance(value, yaml.ScalarNode):
                return file, str(value.value)
    return None


class _Places:
    """The files and lines that keys' values come from.

    Each mapping is gone through once, however many of its keys are looked up.

    Args:
        layers: the deployment file and those that it extends.
        profile: the file's profile, and those below it.
    """

    def __init__(self, layers: Layers, profile: Layers) -> None:
        self.layers = layers
        self._profile = profile
        self._mappings: dict[yaml.Node, _Mapping] = {}

    def find(self, key: str) -> tuple[Path, int] | None:
        """Find the file and line of a key's value; of an absent key, of what it is part of.

        A value of an instance may come from the settings of its role or of all; see `settings_of`.
        """
        parts, layers, profile = tuple(key.split(".")), self.layers, self._profile
        if key.startswith(_OF_PROFILE):
            parts = parts[1:]
            ways = [(layer, parts) for layer in profile]
        elif parts[0] in _ROLES:
            levels = [(parts[0], *parts[2:]), ("all", *parts[2:])] if len(parts) > 2 else []
            ways = [(layer, parts) for layer in layers]
            ways += [(layer, ("settings", *level)) for level in levels for layer in layers]
            ways += [(layer, level) for level in levels for layer in profile]
        else:
            ways = [(layer, parts) for layer in layers + profile]
        best: tuple[int, Path, int] | None = None
        for (file, root), way in ways:
            depth, line = self._follow(root, way)
            if depth == len(way):
                return file, line
            if way == parts and depth and (best is None or depth > best[0]):
                best = depth, file, line
        return best[1:] if best else None

    def _follow(self, node: yaml.Node, parts: Parts, line: int = 0) -> tuple[int, int]:
        """Follow a path as far as it leads; return how many of its parts, and the line of the
        last."""
        best = 0, line
        if isinstance(node, yaml.SequenceNode) and parts and parts[0].isdecimal():
            for item in node.value[int(parts[0]) :][:1]:
                depth, line = self._follow(item, parts[1:], item.start_mark.line + 1)
                return depth + 1, line
        if node not in self._mappings:
            self._mappings[node] = _Mapping(node)
        for size, name, value in self._mappings[node].begin(parts):
            depth, line = self._follow(value, parts[size:], name.start_mark.line + 1)
            best = max(best, (depth + size, line))
        return best


class _Mapping:
    """A mapping's keys and values, by the parts of a path that they stand for."""

    def __init__(self, node: yaml.Node) -> None:
        self._entries: dict[Parts, list[tuple[yaml.Node, yaml.Node]]] = {}
        for name, value in _pairs(node):
            # A key may have dots of its own, as a variable's name may.
            key = tuple(_plain(str(name.value)).split("."))
            self._entries.setdefault(key, []).append((name, value))
        self._sizes = {len(key) for key in self._entries}

    def begin(self, parts: Parts) -> Iterator[tuple[int, yaml.Node, yaml.Node]]:
        """List the entries with which a path may begin, and how many of its parts each is."""
        for size in self._sizes:
            for name, value in self._entries.get(tuple(map(_plain, parts[:size])), ()):
                yield size, name, value


def _pairs(
    node: yaml.Node, within: tuple[yaml.Node, ...] = ()
) -> Iterator[tuple[yaml.Node, yaml.Node]]:
    """List a mapping's keys and values, its own before those that it merges by `<<`."""
    if not isinstance(node, yaml.MappingNode) or node in within:
        return
    merged: list[yaml.Node] = []
    for name, value in node.value:
        if name.tag == "tag:yaml.org,2002:merge":
            merged += value.value if isinstance(value, yaml.SequenceNode) else [value]
        else:
            yield name, value
    for value in merged:
        yield from _pairs(value, (*within, node))


def _plain(key: str) -> str:
    """Arguments may be written either way."""
    return key.replace("_", "-")

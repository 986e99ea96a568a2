"""Following the start scripts of a playbook, for each server, to what they give the launcher. Pure.

Nothing is run: `shell` tells which commands would be, with which words, as far as that is known.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

from pd_deploy.importer import expressions, launcher, shell
from pd_deploy.importer.documents import Node
from pd_deploy.importer.report import Kind, Place, Report
from pd_deploy.importer.shell import Budget, Choice, Command, Shell, Statement
from pd_deploy.importer.source import Argument, Server

# What ~/.bashrc and the container have: not known here, so nothing is made of it.
OF_CONTAINER = ("PATH", "LD_LIBRARY_PATH", "PYTHONPATH", "HOME", "PWD", "ASCEND_HOME_PATH",
                "ASCEND_TOOLKIT_HOME", "HOSTNAME", "USER")  # fmt: skip
_IMPLIED = {
    "cd", "source", ".", "ray", "unset", "mkdir", "echo", "printf", "set", "sleep", "wait", "kill",
    "pkill", "ps", "awk", "tr", "grep", "xargs", "true", ":", "exit", "chmod", "tail", "ls", "tee",
    "cat", "fi", "touch", "((", "let", "shopt", "IFS",
}  # fmt: skip
_PREPARATION = {
    "pip", "pip3", "yum", "apt", "apt-get", "dnf", "wget", "curl", "rm", "cp", "mv", "ln", "sed",
    "tar", "make", "git", "rpm", "unzip", "sysctl", "taskset", "numactl", "build.sh",
    "process_nz_config.py", "install.sh", "pip.sh",
}  # fmt: skip
_TEMPLATE = re.compile(r"\{\{.*?\}\}|\{%.*?%\}|\{#.*?#\}", re.DOTALL)


Run = Callable[[str, list[Argument], Place], bool]
"""Takes a program's name, its arguments and its place; returns whether it is done with it."""


@dataclass
class Script:
    """A script of a playbook, taken apart once for all servers.

    `templates` are its Jinja expressions, in their order; a statement is None, and has no value.
    """

    node: Node
    statements: tuple[Statement, ...]
    templates: list[str | None] = field(default_factory=list)

    def line(self, number: int) -> Place:
        """Return where a line of the script is in the playbook."""
        first = self.node.first_line
        return Place(self.node.place.file, first + number - 1 if self.node.is_literal else first)

    def place(self, statement: Statement) -> Place:
        """Return where a statement begins in the playbook."""
        return self.line(statement.line)

    def values(self, names: Mapping[str, Any]) -> dict[int, str | None]:
        """Evaluate the expressions; None where one is more than arithmetic."""
        return {index: _value(text, names) for index, text in enumerate(self.templates)}


def parse(node: Node) -> Script:
    """Take a script apart, its Jinja expressions marked."""
    templates: list[str | None] = []

    def marked(match: re.Match[str]) -> str:
        templates.append(match[0] if match[0].startswith("{{") else None)
        lines = match[0].count("\n")
        return shell.mark(len(templates) - 1, lines) if templates[-1] else "\n" * lines

    text = _TEMPLATE.sub(marked, node.text)
    return Script(node, shell.commands(text), templates)


def _value(text: str | None, names: Mapping[str, Any]) -> str | None:
    if text is None:
        return None
    try:
        return str(expressions.evaluate(text, names))
    except expressions.Refused:
        return None


@dataclass
class Follower:
    """Follows scripts; `names` are what Jinja expressions may refer to.

    `run` is asked first about each command that runs a program; it returns whether that is done.
    """

    report: Report
    names: Mapping[str, Any]
    budget: Budget
    run: Run

    def follow(self, script: Script, variables: Mapping[str, str | None]) -> Shell:
        """Follow a script whose variables begin with some values."""
        begin = {**dict.fromkeys(OF_CONTAINER), **variables}
        result = Shell(begin, budget=self.budget, templates=script.values(self.names))
        for statement in result.followed(script.statements):
            place = script.place(statement)
            if isinstance(statement, Command):
                self._command(statement, result, script)
            elif isinstance(statement, Choice):
                last = script.line(statement.last_line).line
                note = f"only the host can tell; nothing of it is taken, to line {last}"
                self.report.add("unmapped", place, shell.unmarked(statement.text), note)
            else:
                self._opaque(statement, place)
        return result

    def _command(self, command: Command, state: Shell, script: Script) -> None:
        place = script.place(command)
        assigned = state.assignments(command)
        exported = state.exports(command)
        if exported:
            for name in exported:
                value = assigned.get(name, state.variables.get(name))
                self.run("export", [Argument(name, place), Argument(value, place)], place)
        elif assigned:
            note = "a variable of the script; see what uses it"
            self.report.add("implied", place, shell.unmarked(command.text), note)
        else:
            words = [Argument(text, script.line(line)) for text, line in state.words(command)]
            before = []
            while words and re.match(r"[A-Za-z_]\w*=", words[0].text or ""):
                before.append((words.pop(0).text or "").partition("="))
            if words and self._is_run(words, place):
                for name, _, value in before:
                    self.run("export", [Argument(name, place), Argument(value, place)], place)
            elif words:
                self.report.add(_kind(words), place, shell.unmarked(command.text))

    def _is_run(self, words: list[Argument], place: Place) -> bool:
        """Ask whoever reads the scripts, by the program or the script that a command runs."""
        return any(
            word.text is not None
            and self.run(PurePosixPath(word.text).name, words[index + 1 :], place)
            for index, word in enumerate(words[:4])
        )

    def _opaque(self, statement: Statement, place: Place) -> None:
        is_arithmetic = statement.text.startswith(("((", "for var in", "for ((", "declare -A"))
        kind: Kind = "implied" if is_arithmetic else "unmapped"
        self.report.add(
            kind, place, shell.unmarked(statement.text), "" if is_arithmetic else "not followed"
        )


def _kind(words: list[Argument]) -> Kind:
    if words[0].text in ("source", ".") and len(words) > 1:
        is_known = str(words[1].text).endswith("/.bashrc")
        return "implied" if is_known else "preparation"
    names = [PurePosixPath(word.text or "").name or word.text for word in words[:2]]
    if any(name in _PREPARATION for name in names):
        return "preparation"
    return "implied" if names[0] in _IMPLIED else "unmapped"


def reader_of(
    server: Server,
    report: Report,
    interfaces: dict[str, str],
    enter: Callable[[str | None], None] = lambda _: None,
) -> Run:
    """Return what enters a script's exports and its launcher's flags into a server.

    Args:
        interfaces: gets the interface of the server's host, by address, where a script names it.
        enter: is given the directories that the script changes to.
    """

    def run(program: str, words: list[Argument], place: Place) -> bool:
        if program == "export":
            name, value = (word.text for word in words)
            interface = launcher.take_environment(name or "", value, server, place, report)
            if interface:
                interfaces[server.address] = interface
            return True
        if program == "cd" and words:
            enter(words[0].text)
        if program in launcher.LAUNCHERS:
            report.add("implied", place, program, "the launcher; see its flags")
            launcher.read(words, program, server, place, report)
            return True
        if program in launcher.OTHER_ENGINES:
            report.add(
                "problem",
                place,
                program,
                "expected vLLM; the importer reads no commands "
                "of SGLang: docs/sglang.md shows how to write its deployment file",
            )
            return True
        return False

    return run

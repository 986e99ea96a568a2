"""Reading shell scripts without running them: commands, words, assignments, known conditions. Pure.

`commands` takes a script apart. A `Shell` follows the commands that would run, with what its
variables hold as far as that is known; whatever only running it would tell is unknown (None), and
nothing is guessed.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import NamedTuple

MAX_LENGTH = 100_000  # of a script; the longest of upstream's have 8 KB
MAX_TOKENS = 10_000
_MAX_VALUE = 20_000  # characters that a variable may hold; `A=$A$A` doubles
_MAX_DEPTH = 30
_MARKS = ("\ue000", "\ue001")  # of the private use area: no script has them
_SPECIAL = re.compile(r"[\s;&|()<>]")
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_OPERATOR = re.compile(r"\n|;;|&&|\|\||[0-9]*(?:<<<|<<-?|<>|>>|>&|<&|&>>?|>\||[<>])|[;&|()]")
# Within a construct, or a sum: `NAME=…`, `NAME+=…`, `NAME++`.
_ASSIGNING = re.compile(r"(?<![\w$])([A-Za-z_]\w*)(?=[-+*/%]?=|\+\+|--)")
_NAMING = ("for", "select", "read")
_OPENING = {"if", "for", "while", "until", "case", "select"}
_CLOSING = {"fi", "done", "esac"}


class Piece(NamedTuple):
    """A part of a word: literal text, a variable, or what only a shell can tell.

    `kind` is text, name, sum (an arithmetic expansion) or other (a command substitution).
    """

    kind: str
    text: str
    default: str | None = None
    quoted: bool = False


Word = tuple[Piece, ...]


class Expanded(NamedTuple):
    """A word as a program would get it, and its line; an unknown one is None."""

    text: str | None
    line: int


@dataclass(frozen=True)
class Command:
    """A simple command, with the first and last line that it takes in its script; `lines` are those
    of its words."""

    words: tuple[Word, ...]
    lines: tuple[int, ...]
    line: int
    last_line: int
    text: str


@dataclass(frozen=True)
class Choice:
    """An `if`: conditions with the commands that follow each; that of `else` is None."""

    branches: tuple[tuple[Command | None, "tuple[Statement, ...]"], ...]
    line: int
    last_line: int
    text: str


@dataclass(frozen=True)
class Opaque:
    """A loop, a function or another construct that is not followed, with the names that it may
    assign to."""

    line: int
    last_line: int
    text: str
    assigns: frozenset[str] = frozenset()


Statement = Command | Choice | Opaque


class _Token(NamedTuple):
    word: Word | None  # None for an operator
    text: str
    line: int


def mark(number: int, lines: int) -> str:
    """Return what stands in a script for an expression of a template that takes some lines more."""
    return f"{_MARKS[0]}{number}{_MARKS[1]}" + "\\\n" * lines


def unmarked(text: str) -> str:
    """Return a text for people, without the numbers of its marked expressions."""
    return re.sub(f"{_MARKS[0]}\\d+{_MARKS[1]}", "{{…}}", text)


def commands(script: str) -> tuple[Statement, ...]:
    """Take a script apart. One that is too long is a single opaque statement."""
    text = script.replace("\r\n", "\n")
    lines = text.split("\n")
    tokens = list(islice(_Lexer(text[:MAX_LENGTH]).tokens(), MAX_TOKENS + 1))
    if len(text) > MAX_LENGTH or len(tokens) > MAX_TOKENS:
        return (Opaque(1, len(lines), f"a script of more than {MAX_LENGTH >> 10} KB or words"),)
    return _Reader(tokens, lines).statements(())


class _Lexer:
    def __init__(self, text: str) -> None:
        self._text, self._at, self._line = text, 0, 1
        self._documents: list[str] = []

    def tokens(self) -> Iterator[_Token]:
        while self._at < len(self._text):
            char = self._text[self._at]
            if char in " \t\r":
                self._at += 1
            elif self._text.startswith("\\\n", self._at):
                self._advance(2)
            elif char == "#":
                self._advance(len(self._rest_of_line()))
            elif operator := _OPERATOR.match(self._text, self._at):
                yield from self._operator(operator[0])
            else:
                line, start = self._line, self._at
                word = self._word()
                yield _Token(word, self._text[start : self._at], line)

    def _operator(self, operator: str) -> Iterator[_Token]:
        token = _Token(None, operator, self._line)
        self._advance(len(operator))
        if operator.lstrip("0123456789") in ("<<", "<<-"):
            name = re.match(r"\s*['\"]?(\w+)", self._text[self._at : self._at + 100])
            self._documents.append(name[1] if name else "EOF")
        if operator == "\n" and self._documents:
            for end in self._documents:
                self._skip_document(end)
            self._documents = []
        yield token

    def _skip_document(self, end: str) -> None:
        while self._at < len(self._text):
            line = self._rest_of_line()
            self._advance(len(line) + 1)
            if line.strip() == end:
                return

    def _rest_of_line(self) -> str:
        end = self._text.find("\n", self._at)
        return self._text[self._at : end if end >= 0 else len(self._text)]

    def _advance(self, count: int) -> None:
        self._line += self._text.count("\n", self._at, self._at + count)
        self._at = min(self._at + count, len(self._text))

    def _word(self) -> Word:
        pieces: list[Piece] = []
        while self._at < len(self._text) and not _SPECIAL.match(self._text, self._at):
            char = self._text[self._at]
            if char == "'":
                end = self._text.find("'", self._at + 1)
                end = end if end >= 0 else len(self._text)
                pieces.append(Piece("text", self._text[self._at + 1 : end], quoted=True))
                self._advance(end + 1 - self._at)
            elif char == '"':
                self._advance(1)
                pieces += self._quoted()
            elif char == "\\":
                pieces += self._escaped(quoted=False)
            elif char in "$`":
                pieces.append(self._expansion(quoted=False))
            else:
                pieces.append(self._literal(r"[^\s;&|()<>'\"\\$`]+"))
        return tuple(pieces)

    def _quoted(self) -> list[Piece]:
        pieces = [Piece("text", "", quoted=True)]
        while self._at < len(self._text) and self._text[self._at] != '"':
            char = self._text[self._at]
            if char == "\\":
                pieces += self._escaped(quoted=True)
            elif char in "$`":
                pieces.append(self._expansion(quoted=True))
            else:
                pieces.append(self._literal(r'[^"\\$`]+', quoted=True))
        self._advance(1)
        return pieces

    def _literal(self, pattern: str, quoted: bool = False) -> Piece:
        match = re.compile(pattern).match(self._text, self._at)
        text = match[0] if match else self._text[self._at]
        self._advance(len(text))
        return Piece("text", text, quoted=quoted)

    def _escaped(self, quoted: bool) -> list[Piece]:
        char = self._text[self._at + 1 : self._at + 2]
        self._advance(2)
        if char == "\n":
            return []
        keeps_backslash = quoted and char not in '"\\$`'
        return [Piece("text", f"\\{char}" if keeps_backslash else char, quoted=True)]

    def _expansion(self, quoted: bool) -> Piece:
        text, start = self._text, self._at
        if text[start] == "`":
            end = text.find("`", start + 1)
            end = end if end >= 0 else len(text)
            self._advance(end + 1 - start)
            return Piece("other", text[start + 1 : end], quoted=quoted)
        if text.startswith(("$(", "${"), start):
            return self._bracketed(quoted)
        if name := _NAME.match(text, start + 1):
            self._advance(1 + len(name[0]))
            return Piece("name", name[0], quoted=quoted)
        following = text[start + 1 : start + 2]
        if following in ("?", "!", "@", "*", "#", "$", "-") or following.isdecimal():
            self._advance(2)
            return Piece("other", f"${following}", quoted=quoted)
        self._advance(1)
        return Piece("text", "$", quoted=quoted)

    def _bracketed(self, quoted: bool) -> Piece:
        if self._text.startswith("$((", self._at):
            return Piece("sum", self._nested("))", 3), quoted=quoted)
        if self._text.startswith("$(", self._at):
            return Piece("other", self._nested(")", 2), quoted=quoted)
        return _parameter(self._nested("}", 2), quoted)

    def _nested(self, end: str, opening: int) -> str:
        """Return what is between an opening and its end, which may hold others of its kind."""
        start, closes = self._at + opening, end[0]
        opens = "{" if closes == "}" else "("
        depth, at = len(end), start
        while at < len(self._text) and depth:
            depth += (self._text[at] == opens) - (self._text[at] == closes)
            at += 1
        self._advance(at - self._at)
        return self._text[start : max(start, at - len(end))]


def _parameter(inner: str, quoted: bool) -> Piece:
    match = re.fullmatch(r"([A-Za-z_]\w*)(?::?-(.*))?", inner, re.DOTALL)
    if match and not (match[2] and re.search(r"[$`]", match[2])):
        return Piece("name", match[1], match[2], quoted)
    return Piece("other", f"${{{inner}}}", quoted=quoted)


class _Reader:
    """Makes statements of tokens."""

    def __init__(self, tokens: list[_Token], lines: list[str]) -> None:
        self._tokens, self._lines, self._at = tokens, lines, 0
        self._depth = 0

    def statements(self, ends: tuple[str, ...]) -> tuple[Statement, ...]:
        result: list[Statement] = []
        while (token := self._peek()) is not None:
            if token.word is not None and token.text in ends:
                break
            if token.word is None and token.text not in "(":
                self._at += 1
            else:
                result.append(self._statement(token))
        return tuple(result)

    def _peek(self) -> _Token | None:
        return self._tokens[self._at] if self._at < len(self._tokens) else None

    def _statement(self, token: _Token) -> Statement:
        if token.text == "if" and self._depth < _MAX_DEPTH:
            return self._choice(token)
        following = self._tokens[self._at + 1] if self._at + 1 < len(self._tokens) else None
        is_function = token.text == "function" or (
            following is not None
            and following.word is None
            and following.text == "("
            and token.word is not None
            and _assigned(token.word) is None
        )
        if token.text in (*_OPENING, "{", "(") or is_function:
            return self._opaque(token, is_function)
        return self._command()

    def _choice(self, opening: _Token) -> Statement:
        self._depth += 1
        branches: list[tuple[Command | None, tuple[Statement, ...]]] = []
        self._at += 1
        while True:
            condition = self.statements(("then",))
            self._at += 1
            simple = condition[0] if len(condition) == 1 else None
            unknown = Command((), (), opening.line, opening.line, "")
            body = self.statements(("elif", "else", "fi"))
            branches.append((simple if isinstance(simple, Command) else unknown, body))
            token = self._peek()
            self._at += 1
            if token is None or token.text == "fi":
                break
            if token.text == "else":
                branches.append((None, self.statements(("fi",))))
                token = self._peek()
                self._at += 1
                break
        self._depth -= 1
        last = token.line if token else len(self._lines)
        return Choice(tuple(branches), opening.line, last, self._line(opening.line))

    def _opaque(self, opening: _Token, is_function: bool) -> Opaque:
        """Skip to the end of a construct, by its words and parentheses."""
        depth, last = 0, opening.line
        assigns: set[str] = set()
        begins = self._at
        while (token := self._peek()) is not None:
            last = token.line
            self._at += 1
            assigns.update(_ASSIGNING.findall(token.text) if token.word is not None else ())
            if self._at >= begins + 2 and self._tokens[self._at - 2].text in _NAMING:
                assigns.add(token.text)
            depth += token.text in _OPENING or token.text in ("(", "{")
            depth -= token.text in _CLOSING or token.text in (")", "}")
            following = self._peek()
            ended = following is None or following.word is None or following.text in _CLOSING
            named = is_function and self._at - begins <= 3
            if depth <= 0 and ended and not named and self._at > begins + 1:
                break
        return Opaque(opening.line, last, self._line(opening.line), frozenset(assigns))

    def _command(self) -> Command:
        first = self._tokens[self._at]
        words: list[Word] = []
        lines: list[int] = []
        last = first.line
        while (token := self._peek()) is not None:
            if token.word is not None:
                words.append(token.word)
                lines.append(token.line)
                last = token.line + token.text.count("\n")
                self._at += 1
            elif token.text.lstrip("0123456789")[:1] in ("<", ">") or token.text.startswith("&>"):
                self._skip_target()
            elif token.text == "(" and words and _assigned(words[-1]) is not None:
                # An array: `NAME=(…)`.
                array = self._opaque(token, is_function=False)
                words[-1] = (*words[-1], Piece("other", array.text))
                last = array.last_line
            else:
                break
        return Command(tuple(words), tuple(lines), first.line, last, self._line(first.line))

    def _skip_target(self) -> None:
        self._at += 1
        following = self._peek()
        if following is not None and following.word is not None:
            self._at += 1

    def _line(self, number: int) -> str:
        return self._lines[number - 1].strip() if number <= len(self._lines) else ""


def _assigned(word: Word) -> str | None:
    """Return the name that a word assigns to; None if it assigns nothing."""
    if not word or word[0].kind != "text" or word[0].quoted:
        return None
    match = re.match(r"([A-Za-z_]\w*)=", word[0].text)
    return match[1] if match else None


class TooLong(Exception):
    """Scripts whose values take more work than any playbook's."""


@dataclass
class Budget:
    """How many characters may still be made of variables, in all scripts together."""

    characters: int = 20_000_000

    def spend(self, characters: int) -> None:
        """Take some away.

        Raises:
            TooLong: there are no more.
        """
        self.characters -= characters
        if self.characters < 0:
            raise TooLong


@dataclass
class Shell:
    """What a shell's variables hold while its commands are followed; None is unknown.

    `exported` are the names that programs are given. `templates` are the values of marked
    expressions (`mark`), by number.
    """

    variables: dict[str, str | None]
    exported: set[str] = field(default_factory=set)
    budget: Budget = field(default_factory=Budget)
    templates: Mapping[int, str | None] = field(default_factory=dict)

    def followed(self, statements: tuple[Statement, ...]) -> Iterator[Statement]:
        """Yield the statements that would run, each before its assignments take effect.

        An `if` whose condition is not known is yielded itself; what it assigns is unknown then.
        """
        for statement in statements:
            if isinstance(statement, Choice):
                taken = self._branch(statement)
                if taken is None:
                    yield statement
                    self._forget(statement)
                else:
                    yield from self.followed(taken)
            else:
                yield statement
                if isinstance(statement, Command):
                    self._assign(statement)
                else:
                    self._forget_assigned(statement)

    def expand(self, word: Word) -> str | None:
        """Return the text of a word; None if any of it is unknown."""
        parts = [self._piece(piece) for piece in word]
        known = [part for part in parts if part is not None]
        text = "".join(known)
        self.budget.spend(len(text) + len(word))
        return text if len(known) == len(parts) and len(text) <= _MAX_VALUE else None

    def words(self, command: Command) -> list["Expanded"]:
        """Return a command's words; what is not in quotes is split at blanks, as a shell does."""
        result: list[Expanded] = []
        for word, line in zip(command.words, command.lines, strict=True):
            text = self.expand(word)
            splits = any(p.kind != "text" and not p.quoted for p in word)
            if text is not None and splits and all(not p.quoted for p in word):
                result += [Expanded(part, line) for part in text.split()]
            else:
                result.append(Expanded(text, line))
        return result

    def assignments(self, command: Command) -> dict[str, str | None]:
        """Return what a command assigns, alone or by `export`; nothing if it runs a program."""
        words = list(command.words)
        if words and _plain(words[0]) in ("export", "declare", "readonly", "local"):
            words = words[1:]
        elif any(_assigned(word) is None for word in words):
            return {}
        return {
            name: self._value_assigned(word)
            for word in words
            if (name := _assigned(word)) is not None
        }

    def exports(self, command: Command) -> list[str]:
        """List the names that a command exports."""
        words = [_plain(word) or "" for word in command.words[1:]]
        if not command.words or _plain(command.words[0]) != "export":
            return []
        names = [_assigned(word) for word in command.words[1:]]
        return [name or text for name, text in zip(names, words, strict=True) if name or text]

    def _assign(self, command: Command) -> None:
        self.variables.update(self.assignments(command))
        self.exported.update(self.exports(command))
        program = _plain(command.words[0]) if command.words else None
        if program in _CHANGING:
            names = [name for word in command.words[1:] if (name := _plain(word))]
            self.variables.update(dict.fromkeys(names, "" if program == "unset" else None))

    def _forget_assigned(self, opaque: Opaque) -> None:
        counted = re.fullmatch(r"\(\(\s*(\w+)(\+\+|--)\s*\)\)", opaque.text)
        if counted:
            operator = counted[2][0]
            self.variables[counted[1]] = _sum(f"{counted[1]} {operator} 1", self.variables)
        else:
            self.variables.update(dict.fromkeys(opaque.assigns))

    def _forget(self, choice: Choice) -> None:
        for _, body in choice.branches:
            for statement in body:
                if isinstance(statement, Command):
                    self.variables.update(dict.fromkeys(self.assignments(statement)))
                elif isinstance(statement, Choice):
                    self._forget(statement)
                else:
                    self.variables.update(dict.fromkeys(statement.assigns))

    def _value_assigned(self, word: Word) -> str | None:
        name, _, rest = word[0].text.partition("=")
        return self.expand((Piece("text", rest), *word[1:])) if name else None

    def _piece(self, piece: Piece) -> str | None:
        if piece.kind == "text":
            return self._filled(piece.text)
        if piece.kind == "name":
            value = self.variables.get(piece.text, "")
            return piece.default if value == "" and piece.default is not None else value
        if piece.kind == "sum":
            return _sum(piece.text, self.variables)
        return _substituted(piece.text, self.variables)

    def _filled(self, text: str) -> str | None:
        """Put the values of marked expressions into a text; None if one is unknown."""
        if _MARKS[0] not in text:
            return text
        parts = re.split(f"{_MARKS[0]}(\\d+){_MARKS[1]}", text)
        values = [self.templates.get(int(part)) for part in parts[1::2]]
        if None in values:
            return None
        parts[1::2] = [value or "" for value in values]
        return "".join(parts)

    def _branch(self, choice: Choice) -> tuple[Statement, ...] | None:
        for condition, body in choice.branches:
            truth = True if condition is None else self._truth(condition)
            if truth is None:
                return None
            if truth:
                return body
        return ()

    def _truth(self, condition: Command) -> bool | None:
        words = [self.expand(word) for word in condition.words]
        if len(words) < 3 or words[0] not in ("[", "[["):
            return None
        inner = words[1:-1]
        if None in inner:
            return None
        return _tested([word for word in inner if word is not None])


def _plain(word: Word) -> str | None:
    """Return the text of a word without expansions."""
    if any(piece.kind != "text" for piece in word):
        return None
    return "".join(piece.text for piece in word)


def _tested(words: list[str]) -> bool | None:
    if len(words) == 2 and words[0] in ("-z", "-n"):
        return (words[1] == "") == (words[0] == "-z")
    if len(words) != 3:
        return None
    left, operator, right = words
    if operator in ("=", "==", "!="):
        return (left == right) == (operator != "!=")
    if operator in _COMPARISONS and _is_number(left) and _is_number(right):
        order = (int(left) > int(right)) - (int(left) < int(right))
        return order in _COMPARISONS[operator]
    return None


_CHANGING = ("unset", "read", "mapfile", "readarray", "printf", "getopts", "let")
_COMPARISONS = {
    "-eq": (0,),
    "-ne": (-1, 1),
    "-gt": (1,),
    "-ge": (0, 1),
    "-lt": (-1,),
    "-le": (-1, 0),
}


def _is_number(text: str) -> bool:
    return re.fullmatch(r"-?\d{1,18}", text, re.ASCII) is not None


def _sum(text: str, variables: Mapping[str, str | None]) -> str | None:
    """Evaluate `NAME + 1` and the like; other arithmetic is unknown."""
    match = re.fullmatch(r"\s*\$?(\w{1,60})\s*(?:([-+*])\s*\$?(\w{1,60})\s*)?", text, re.ASCII)
    if not match:
        return None
    operands = [
        word if _is_number(word) else variables.get(word) or ""
        for word in match.group(1, 3)
        if word
    ]
    if not all(map(_is_number, operands)):
        return None
    left, right = int(operands[0]), int(operands[-1])
    results = {None: left, "+": left + right, "-": left - right, "*": left * right}
    return str(results[match[2]])


def _substituted(text: str, variables: Mapping[str, str | None]) -> str | None:
    """Evaluate the few command substitutions whose result is clear: a list trimmed, its commas
    taken out or counted."""
    match = re.fullmatch(
        r"\s*echo (-n )?\"?\$\{?(\w+)\}?\"?\s*((?:\|\s*(?:awk '\$1=\$1'|tr -d ['\"],['\"]|"
        r"tr -d ['\"] ['\"]|tr -cd ['\"],['\"]|wc -c|xargs)\s*)*)",
        text,
    )
    value = variables.get(match[2], "") if match else None
    if match is None or value is None:
        return None
    for program in match[3].split("|")[1:]:
        value = _piped(program.strip(), value)
    return value.strip()


def _piped(program: str, value: str) -> str:
    if program == "wc -c":
        return str(len(value))
    if program.startswith("tr -cd"):
        return "," * value.count(",")
    if program.startswith("tr -d"):
        return value.replace(program[-2], "")
    return " ".join(value.split())

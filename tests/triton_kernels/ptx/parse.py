"""The text of one PTX kernel as instructions."""

from __future__ import annotations

import functools
import re
from typing import NamedTuple


class Address(NamedTuple):
    """``[base + offset]``."""

    base: str | int
    offset: int


#: A register, symbol or label; a literal's bits; registers in braces; a place in memory.
Operand = str | int | tuple[str | int, ...] | Address


class Instruction(NamedTuple):
    """``@guard opcode.modifiers operands;``, where ``negated`` means ``@!guard``."""

    opcode: str
    modifiers: tuple[str, ...]
    operands: tuple[Operand, ...]
    guard: str | None
    negated: bool
    text: str

    @property
    def type(self) -> str:
        """The last modifier, such as "f32": of ``cvt`` the source's type."""
        return self.modifiers[-1]


class Program(NamedTuple):
    """A kernel; ``labels`` are positions in ``instructions``."""

    name: str
    parameters: tuple[str, ...]
    threads: int
    instructions: tuple[Instruction, ...]
    labels: dict[str, int]


_ENTRY = re.compile(r"\.visible \.entry (\w+)\(([^)]*)\)\s*\.reqntid (\d+)[^{]*\{(.*?)\$L__func_end0", re.DOTALL)
_IGNORED = re.compile(r"//[^\n]*|^\s*\.(?:loc|pragma)\b[^\n]*", re.MULTILINE)
_LABEL = re.compile(r"([$\w]+):\s*")
_INSTRUCTION = re.compile(r"(?:@(!?)(%?\w+)\s+)?([\w.:]+)\s*(.*)", re.DOTALL)
#: Before an instruction a brace opens or closes a scope; registers of scopes have names of their own, or are set there first.
_SCOPES = " \t\n{}"
_OPERAND = re.compile(r"\{[^}]*\}|\[[^]]*\]|[^,\s]+")


def _scalar(text: str) -> str | int:
    if text[:2].lower() in ("0f", "0d"):
        return int(text[2:], 16)
    return int(text.rstrip("U"), 0) if re.match(r"-?\d", text) else text


def _operand(text: str) -> Operand:
    if text[0] == "{":
        return tuple(_scalar(part.strip()) for part in text[1:-1].split(","))
    if text[0] == "[":
        base, _, offset = text[1:-1].partition("+")
        return Address(_scalar(base.strip()), int(offset.strip() or "0", 0))
    return _scalar(text)


@functools.cache
def parse(ptx: str, without: str = "") -> Program:
    """The kernel in ``ptx``, where of a kernel ``k`` the instructions that begin with ``i`` are left out, if ``without`` is "k:i"."""
    entry = _ENTRY.search(ptx)
    assert entry is not None, "no kernel with a fixed number of threads"
    kernel, _, dropped = without.partition(":")
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    for statement in _IGNORED.sub("", entry[4]).split(";"):
        statement = statement.lstrip(_SCOPES).rstrip()
        while label := _LABEL.match(statement):
            labels[label[1]] = len(instructions)
            statement = statement[label.end() :].lstrip(_SCOPES)
        if not statement or statement.startswith(".") or (kernel == entry[1] and statement.startswith(dropped)):
            continue
        found = _INSTRUCTION.fullmatch(statement)
        assert found is not None, statement
        opcode, *modifiers = found[3].replace("::", ":").split(".")
        operands = tuple(_operand(text) for text in _OPERAND.findall(found[4]))
        instructions.append(Instruction(opcode, tuple(modifiers), operands, found[2], bool(found[1]), " ".join(statement.split())))
    parameters = tuple(line.split()[-1] for line in entry[2].split(",") if line.strip())
    return Program(entry[1], parameters, int(entry[3]), tuple(instructions), labels)

"""Reads the text of a compiled program: the kind of work of each operation, and the line of the
source behind it."""

import re
from typing import NamedTuple

PRODUCTS = {"dot", "convolution"}
MOVES = {
    "copy",
    "slice",
    "dynamic-slice",
    "dynamic-update-slice",
    "concatenate",
    "transpose",
    "reverse",
    "pad",
}
LOOKUPS = {"gather", "scatter"}
CONTAINERS = {"while", "call", "conditional"}  # the time of what they run is counted there
_NOTHING = {"parameter", "constant", "bitcast", "tuple", "get-tuple-element"}  # never run
_FREE = _NOTHING | {"reshape", "broadcast", "iota", "convert"}
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
_OPERATION = re.compile(r"^\s+(?:ROOT )?%([\w.\-]+) = (?:\(.*?\)|\S+) ([\w\-]+)\(")
_FRAME = re.compile(r"^(\d+) \{file_name_id=(\d+) function_name_id=\d+ line=(\d+)")
_PARENT = re.compile(r"^(\d+) \{file_location_id=(\d+)")


class Operation(NamedTuple):
    kind: str
    asked_by: str  # path of names in the program, as JAX gave them
    source: str  # file:line, where known


def kind(opcodes: set[str], asked_by: str = "") -> str:
    """The kind of an operation made of these opcodes: the costliest of them names it."""
    if opcodes & PRODUCTS:
        return "matrix products"
    if opcodes & LOOKUPS:
        return "lookups"
    if "sort" in opcodes or "top-k" in opcodes:
        return "sorting"
    if "rng-bit-generator" in opcodes or "random" in asked_by or "threefry" in asked_by:
        return "random numbers"
    working = opcodes - _FREE
    if working <= MOVES:
        return "copies and slices" if working else "fills and conversions"
    if "attention" in asked_by and "norm" not in asked_by:
        return "attention, element by element"
    if "reduce" in opcodes or "reduce-window" in opcodes:
        return "sums and maxima"
    return "other, element by element"


def operations(text: str) -> dict[str, Operation]:
    """Operation name -> what it is, containers left out. `text` is `compiled.as_text()`."""
    bodies: dict[str, list[tuple[str, str, str]]] = {}
    files, lines, frames = _tables(text)
    body: list[tuple[str, str, str]] = []
    for line in text.splitlines():
        if found := _COMPUTATION.match(line):
            body = bodies.setdefault(found[1], [])
        elif found := _OPERATION.match(line):
            body.append((found[1], found[2], line))
    opcodes = {name: {opcode for _, opcode, _ in body} for name, body in bodies.items()}
    made = {}
    for body in bodies.values():
        for name, opcode, line in body:
            if opcode in CONTAINERS or opcode in _NOTHING:
                continue
            called = _first(r"calls=%([\w.\-]+)", line)
            asked_by = _first(r'op_name="([^"]*)"', line)
            number = _first(r"stack_frame_id=(\d+)", line)
            file, at = lines.get(frames.get(number, ""), ("", ""))
            source = f"{files[file]}:{at}" if file in files else ""
            made[name] = Operation(kind(opcodes.get(called, {opcode}), asked_by), asked_by, source)
    return made


def _tables(text: str) -> tuple[dict[str, str], dict[str, tuple[str, str]], dict[str, str]]:
    """Numbers -> names of files, numbers of places -> (file, line), numbers of frames -> places."""
    files, lines, frames, section = {}, {}, {}, ""
    for line in text.splitlines():
        if line.startswith(("%", "ENTRY")):
            break
        section = (
            line
            if line in ("FileNames", "FileLocations", "StackFrames")
            else ""
            if line == ""
            else section
        )
        if section == "FileNames" and line[:1].isdigit():
            number, _, name = line.partition(" ")
            files[number] = name.strip('"')
        elif section == "FileLocations" and (found := _FRAME.match(line)):
            lines[found[1]] = (found[2], found[3])
        elif section == "StackFrames" and (found := _PARENT.match(line)):
            frames[found[1]] = found[2]
    return files, lines, frames


def _first(pattern: str, line: str) -> str:
    found = re.search(pattern, line)
    return found[1] if found else ""

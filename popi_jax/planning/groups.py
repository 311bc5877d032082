"""Which devices a collective joins, and along which axes of the mesh they lie: the syntaxes of
groups in HLO text."""

import math
import re
from collections.abc import Mapping, Sequence

Groups = list[tuple[int, ...]]


def parse_groups(attributes: str, num_devices: int) -> Groups:
    """The groups of positions that `replica_groups=...` says; without any, all devices are one
    group.

    Explicit lists "{{0,1},{2,3}}"; counted "[4,16]<=[16,4]T(1,0)": the positions 0, 1, ... as an
    array of the sizes on the right, axes permuted, cut into rows of the sizes on the left; and axes
    of a mesh of its own, "mesh['a'=16,'b'=4], device_ids=([16,4]T(1,0)) {'a'}", where 'a':(2)4 is
    the part of 4 of an axis that lies behind a part of 2.

    Raises ValueError on a syntax that is none of these."""
    found = re.search(
        r"replica_groups=(\{\{[\d,{} ]*\}\}|\{\}|\[[\d,]+\]<=\S+|mesh\[.*?\}|@\S+)", attributes
    )
    if found is None or found[1] == "{}":
        return [tuple(range(num_devices))]
    text = found[1]
    if text.startswith("{{"):
        return [_parse_numbers(group) for group in re.findall(r"\{([\d, ]*)\}", text[1:-1])]
    if text.startswith("mesh["):
        return _parse_mesh(text)
    counted = re.match(r"\[([\d,]+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)", text)
    if counted is None:
        raise ValueError(f"replica_groups of an unknown form: {text[:80]}")
    rows, size = _parse_numbers(counted[1])
    ids = _expand(counted[2])
    return [tuple(ids[row * size : (row + 1) * size]) for row in range(rows)]


def find_axes(groups: Groups, mesh_shape: Mapping[str, int]) -> tuple[str, ...]:
    """The axes along which members of a group differ, in the order of the mesh.

    Raises ValueError if a position lies outside of the mesh."""
    differing: set[str] = set()
    for group in groups:
        first = _locate(group[0], mesh_shape)
        for position in group[1:]:
            here = _locate(position, mesh_shape)
            differing |= {axis for axis in mesh_shape if here[axis] != first[axis]}
    return tuple(axis for axis in mesh_shape if axis in differing)


def parse_permute(attributes: str, mesh_shape: Mapping[str, int]) -> tuple[tuple[str, ...], float]:
    """Of `source_target_pairs`: the axes that they cross, and the steps of a device's data as a
    mean over all devices.

    Each axis is taken for a ring; a device that sends nothing counts as no step."""
    found = re.search(r"source_target_pairs=\{(\{[\d,{} ]*\})\}", attributes)
    pairs = (
        [_parse_numbers(pair) for pair in re.findall(r"\{([\d, ]+)\}", found[1])] if found else []
    )
    axes, steps = find_axes([*pairs], mesh_shape), 0
    for source, target in pairs:
        here, there = _locate(source, mesh_shape), _locate(target, mesh_shape)
        for axis, size in mesh_shape.items():
            away = abs(here[axis] - there[axis])
            steps += min(away, size - away)
    return axes, steps / max(len({source for source, _ in pairs}), 1)


def count_ring_hops(n: int) -> float:
    """Links that a byte of an all-to-all crosses on a ring of n, going the shorter way; a mean over
    all targets."""
    return n * n // 4 / n


def _locate(position: int, mesh_shape: Mapping[str, int]) -> dict[str, int]:
    left, found = position, {}
    for axis, size in reversed(list(mesh_shape.items())):
        left, found[axis] = divmod(left, size)
    if left:
        raise ValueError(f"device {position} lies outside of the mesh {dict(mesh_shape)}")
    return found


def _parse_mesh(text: str) -> Groups:
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", text)}
    order = re.search(r"device_ids=\((\[[\d,]+\](?:T\([\d,]+\))?|[\d, ]+)\)", text)
    if order is None:
        ids: Sequence[int] = range(math.prod(sizes.values()))
    else:
        ids = _expand(order[1]) if order[1].startswith("[") else _parse_numbers(order[1])
    chosen = re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", text[text.rindex("{") :])
    parts: dict[str, list[tuple[int, int]]] = {}
    for name, before, size in chosen:
        parts.setdefault(name, []).append((int(before or 1), int(size or sizes[name])))
    groups: dict[tuple[int, ...], list[int]] = {}
    for place, device in enumerate(ids):
        key = []
        for name, at in _locate(place, sizes).items():
            for before, size in parts.get(name, []):
                block = sizes[name] // (before * size)  # numbers within the part that is left
                at -= at // block % size * block
            key.append(at)
        groups.setdefault(tuple(key), []).append(device)
    return [tuple(group) for group in groups.values()]


def _expand(text: str) -> list[int]:
    """The positions 0, 1, ... as "[16,4]T(1,0)" orders them."""
    found = re.match(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", text)
    assert found is not None, text
    dims = _parse_numbers(found[1])
    order = _parse_numbers(found[2]) if found[2] else tuple(range(len(dims)))
    strides = [math.prod(dims[axis + 1 :]) for axis in range(len(dims))]
    ids = [0]
    for axis in order:
        ids = [at + step * strides[axis] for at in ids for step in range(dims[axis])]
    return ids


def _parse_numbers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in text.replace(" ", "").split(",") if number)

"""A pickle machine that cannot run anything: it builds plain containers, and asks its owner for every name.

Python's own Unpickler is not safe enough to be restricted: BUILD and APPENDS call methods of what lies on the stack,
one LONG_BINPUT opcode takes 64 GB, and a nested tuple as a key overflows the C stack. Here a name becomes whatever
`Owner` gives for it, an object is never called, and memory grows with the size of the pickle only.

Source: https://github.com/python/cpython/blob/main/Lib/pickletools.py (the opcodes)
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from itertools import repeat
from typing import Any, Protocol

# Each opcode makes at most one object of some 100 bytes, and takes up to two microseconds.
MAX_OPCODES = 400_000

_STOP = ord(".")

# What a handler raises when it meets what it does not expect.
_FAULTS = (AttributeError, IndexError, KeyError, RecursionError, TypeError, ValueError, struct.error)


class EndOfPickleError(ValueError):
    """The bytes end before the pickle does."""


class MalformedPickleError(ValueError):
    """The bytes are not a pickle."""


class LongPickleError(ValueError):
    """The pickle has more opcodes than were allowed."""


class Owner(Protocol):
    """Says what names, calls and persistent ids stand for; nothing of it may run what the pickle holds."""

    def find(self, module: str, name: str) -> Any:
        """What stands for `module.name`; raises to refuse it."""

    def call(self, function: Any, args: Any) -> Any:
        """What stands for the result of a call of something that `find` gave."""

    def persistent(self, pid: Any) -> Any:
        """What stands for a persistent id."""


def run_pickle(data: bytes, owner: Owner, start: int = 0, max_opcodes: int = MAX_OPCODES) -> tuple[Any, int]:
    """Run one pickle.

    Args:
        data: the bytes, at most some tens of megabytes: the caller's cap bounds the memory.
        owner: is asked for names.
        start: where the pickle begins.
        max_opcodes: more are refused: they bound the time and the memory.

    Returns:
        The object, and where the pickle ends.

    Raises:
        EndOfPickleError: `data` ends first.
        MalformedPickleError: it is not a pickle.
        LongPickleError: it has more opcodes than allowed.
    """
    machine = _Machine(data, owner, start)
    opcodes = _OPCODES
    try:
        for _ in repeat(None, max_opcodes):
            opcode = data[machine.position]
            machine.position += 1
            if opcode == _STOP:
                return machine.stack.pop(), machine.position
            opcodes[opcode](machine)
    except _FAULTS as error:
        if machine.position >= len(data):
            raise EndOfPickleError from error
        raise MalformedPickleError(f"at byte {machine.position}") from error
    raise LongPickleError(f"more than {max_opcodes} opcodes")


class _Machine:
    __slots__ = ("data", "marks", "memo", "owner", "position", "stack")

    def __init__(self, data: bytes, owner: Owner, position: int) -> None:
        self.data = data
        self.owner = owner
        self.position = position
        self.stack: list[Any] = []
        self.marks: list[list[Any]] = []
        self.memo: dict[int, Any] = {}

    def take(self, nbytes: int) -> bytes:
        begin = self.position
        self.position = begin + nbytes
        if self.position > len(self.data):
            raise EndOfPickleError
        return self.data[begin : self.position]

    def take_int(self, nbytes: int) -> int:
        return int.from_bytes(self.take(nbytes), "little")

    def take_line(self) -> str:
        begin = self.position
        end = self.data.find(b"\n", begin)
        if end < 0:
            self.position = len(self.data)
            raise EndOfPickleError
        self.position = end + 1
        return self.data[begin:end].decode("utf-8", "replace")

    def pop_mark(self) -> list[Any]:
        items = self.stack
        self.stack = self.marks.pop()
        return items


def _push(value: Any) -> Callable[[_Machine], None]:
    return lambda machine: machine.stack.append(value)


def _push_new(kind: Callable[[], Any]) -> Callable[[_Machine], None]:
    return lambda machine: machine.stack.append(kind())


def _push_int(nbytes: int) -> Callable[[_Machine], None]:
    return lambda machine: machine.stack.append(machine.take_int(nbytes))


def _push_text(length_bytes: int) -> Callable[[_Machine], None]:
    return lambda machine: machine.stack.append(machine.take(machine.take_int(length_bytes)).decode())


def _push_latin(length_bytes: int) -> Callable[[_Machine], None]:
    return lambda machine: machine.stack.append(machine.take(machine.take_int(length_bytes)).decode("latin-1"))


def _push_bytes(length_bytes: int) -> Callable[[_Machine], None]:
    return lambda machine: machine.stack.append(machine.take(machine.take_int(length_bytes)))


def _push_line(convert: Callable[[str], Any]) -> Callable[[_Machine], None]:
    return lambda machine: machine.stack.append(convert(machine.take_line()))


def _push_long(length_bytes: int) -> Callable[[_Machine], None]:
    return lambda machine: machine.stack.append(
        int.from_bytes(machine.take(machine.take_int(length_bytes)), "little", signed=True)
    )


def _skip(nbytes: int) -> Callable[[_Machine], None]:
    def run(machine: _Machine) -> None:
        machine.take(nbytes)

    return run


def _tuple(length: int) -> Callable[[_Machine], None]:
    def run(machine: _Machine) -> None:
        items = tuple(machine.stack[-length:])
        if len(items) < length:
            raise IndexError
        machine.stack[-length:] = [items]

    return run


def _tuple_of_mark(machine: _Machine) -> None:
    items = tuple(machine.pop_mark())
    machine.stack.append(items)


def _list_of_mark(machine: _Machine) -> None:
    items = machine.pop_mark()
    machine.stack.append(items)


def _dict_of_mark(machine: _Machine) -> None:
    items = machine.pop_mark()
    machine.stack.append({})
    _set_items(machine.stack[-1], items)


def _mark(machine: _Machine) -> None:
    machine.marks.append(machine.stack)
    machine.stack = []


def _pop(machine: _Machine) -> None:
    if machine.stack:
        machine.stack.pop()
    else:
        machine.pop_mark()


def _drop_to_mark(machine: _Machine) -> None:
    machine.pop_mark()


def _put(index: Callable[[_Machine], int]) -> Callable[[_Machine], None]:
    def run(machine: _Machine) -> None:
        machine.memo[index(machine)] = machine.stack[-1]

    return run


def _get(index: Callable[[_Machine], int]) -> Callable[[_Machine], None]:
    return lambda machine: machine.stack.append(machine.memo[index(machine)])


def _append(machine: _Machine) -> None:
    item = machine.stack.pop()
    _extend(machine.stack[-1], [item])


def _appends(machine: _Machine) -> None:
    items = machine.pop_mark()
    _extend(machine.stack[-1], items)


def _extend(target: Any, items: list[Any]) -> None:
    if type(target) is not list:
        raise TypeError
    target.extend(items)


def _set_item(machine: _Machine) -> None:
    items = machine.stack[-2:]
    del machine.stack[-2:]
    _set_items(machine.stack[-1], items)


def _set_items_of_mark(machine: _Machine) -> None:
    items = machine.pop_mark()
    _set_items(machine.stack[-1], items)


def _set_items(target: Any, items: list[Any]) -> None:
    if type(target) is not dict:
        raise TypeError
    for index in range(0, len(items), 2):
        # A tensor's name is text; other keys, whose hash can be made slow or recursive, are dropped.
        if type(items[index]) is str:
            target[items[index]] = items[index + 1]


def _build(machine: _Machine) -> None:
    # The state of an object: `_metadata` of a state_dict, the step of an optimizer. No tensor is in it.
    machine.stack.pop()
    if not machine.stack:
        raise IndexError


def _reduce(machine: _Machine) -> None:
    args = machine.stack.pop()
    machine.stack[-1] = machine.owner.call(machine.stack[-1], args)


def _call_with_keywords(machine: _Machine) -> None:
    machine.stack.pop()
    _reduce(machine)


def _instance(machine: _Machine) -> None:
    module, name = machine.take_line(), machine.take_line()
    args = tuple(machine.pop_mark())
    machine.stack.append(machine.owner.call(machine.owner.find(module, name), args))


def _object(machine: _Machine) -> None:
    function, *args = machine.pop_mark()
    machine.stack.append(machine.owner.call(function, tuple(args)))


def _global(machine: _Machine) -> None:
    module = machine.take_line()
    machine.stack.append(machine.owner.find(module, machine.take_line()))


def _stack_global(machine: _Machine) -> None:
    name = machine.stack.pop()
    module = machine.stack[-1]
    if type(name) is not str or type(module) is not str:
        raise TypeError
    machine.stack[-1] = machine.owner.find(module, name)


def _persistent(machine: _Machine) -> None:
    machine.stack[-1] = machine.owner.persistent(machine.stack[-1])


def _persistent_of_line(machine: _Machine) -> None:
    machine.stack.append(machine.owner.persistent(machine.take_line()))


def _extension(length_bytes: int) -> Callable[[_Machine], None]:
    return lambda machine: machine.stack.append(
        machine.owner.find("copyreg", f"extension_{machine.take_int(length_bytes)}")
    )


def _unquote(line: str) -> str:
    return line[1:-1] if len(line) >= 2 else line


def _line_index(machine: _Machine) -> int:
    return int(machine.take_line())


def _unknown(machine: _Machine) -> None:
    raise ValueError


_HANDLERS: dict[bytes, Callable[[_Machine], None]] = {
    # protocol 0 and 1
    b"(": _mark,
    b"0": _pop,
    b"1": _drop_to_mark,
    b"2": lambda machine: machine.stack.append(machine.stack[-1]),
    b"F": _push_line(float),
    b"I": _push_line(lambda line: line == "01" if line in {"00", "01"} else int(line)),
    b"J": lambda machine: machine.stack.append(int.from_bytes(machine.take(4), "little", signed=True)),
    b"K": _push_int(1),
    b"L": _push_line(lambda line: int(line.rstrip("L"))),
    b"M": _push_int(2),
    b"N": _push(None),
    b"P": _persistent_of_line,
    b"Q": _persistent,
    b"R": _reduce,
    b"S": _push_line(_unquote),
    b"T": _push_latin(4),
    b"U": _push_latin(1),
    b"V": _push_line(str),
    b"X": _push_text(4),
    b"a": _append,
    b"b": _build,
    b"c": _global,
    b"d": _dict_of_mark,
    b"}": _push_new(dict),
    b"e": _appends,
    b"g": _get(_line_index),
    b"h": _get(lambda machine: machine.take_int(1)),
    b"i": _instance,
    b"j": _get(lambda machine: machine.take_int(4)),
    b"l": _list_of_mark,
    b"]": _push_new(list),
    b"o": _object,
    b"p": _put(_line_index),
    b"q": _put(lambda machine: machine.take_int(1)),
    b"r": _put(lambda machine: machine.take_int(4)),
    b"s": _set_item,
    b"t": _tuple_of_mark,
    b")": _push(()),
    b"u": _set_items_of_mark,
    b"G": lambda machine: machine.stack.append(struct.unpack(">d", machine.take(8))[0]),
    # protocol 2
    b"\x80": _skip(1),
    b"\x81": _reduce,
    b"\x82": _extension(1),
    b"\x83": _extension(2),
    b"\x84": _extension(4),
    b"\x85": _tuple(1),
    b"\x86": _tuple(2),
    b"\x87": _tuple(3),
    b"\x88": _push(True),
    b"\x89": _push(False),
    b"\x8a": _push_long(1),
    b"\x8b": _push_long(4),
    # protocols 3 to 5
    b"B": _push_bytes(4),
    b"C": _push_bytes(1),
    b"\x8c": _push_text(1),
    b"\x8d": _push_text(8),
    b"\x8e": _push_bytes(8),
    b"\x8f": _push_new(list),  # a set holds no tensors by name; a list stands for it
    b"\x90": _appends,
    b"\x91": _list_of_mark,
    b"\x92": _call_with_keywords,
    b"\x93": _stack_global,
    b"\x94": lambda machine: machine.memo.__setitem__(len(machine.memo), machine.stack[-1]),
    b"\x95": _skip(8),
    b"\x96": _push_bytes(8),
}

_OPCODES = tuple(_HANDLERS.get(bytes((code,)), _unknown) for code in range(256))

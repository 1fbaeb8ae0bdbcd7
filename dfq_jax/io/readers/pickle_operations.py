"""The pickle stack machine: one small function per operation, none of which runs anything."""

import struct
from collections.abc import Callable
from typing import Any

from dfq_jax.errors import CheckpointError, UnsafeInputError
from dfq_jax.io.readers.pickle_policy import show
from dfq_jax.io.readers.pickle_values import Global, Object, PersistentId, construct, put_item

MAX_OPERATIONS = 1_500_000  # about 30,000 tensors; keeps a hostile pickle near one second
MAX_LINE = 65_536  # bytes of one newline-terminated argument
MAX_INT_BYTES = 255
MAX_NAME = 1000  # characters; a file may repeat one at the cost of two bytes


class PickleMachine:
    """Reads consecutive pickles from one buffer.

    Attributes:
      pos: offset of the next unread byte.
      globals: every name met so far, in file order.
      persistent: every persistent id met so far.
    """

    def __init__(self, data: bytes, where: str, pos: int = 0, budget: int = MAX_OPERATIONS):
        """Starts at `pos` of `data`, which messages call `where`, with `budget` operations."""
        self.data, self.where, self.pos, self.budget = data, where, pos, budget
        self.globals: dict[Global, None] = {}
        self.persistent: list[PersistentId] = []
        self.stack: list[Any] = []
        self.outer: list[list[Any]] = []
        self.memo: dict[int, Any] = {}

    def load(self) -> Any:
        """The value of the next pickle.

        Returns:
          Plain Python data and the descriptions of `pickle_values`.

        Raises:
          CheckpointError: if the pickle is damaged or cut short.
          UnsafeInputError: if it is absurdly long, or computes a name.
        """
        self.stack, self.outer, self.memo = [], [], {}
        try:
            self._run()
            return self.stack.pop()
        except (LookupError, OverflowError, TypeError, ValueError, struct.error) as error:
            raise self.damaged(f"{type(error).__name__}, {show(error)}") from error

    def _run(self) -> None:
        data, end = self.data, len(self.data)
        while self.pos < end:
            code = data[self.pos]
            self.pos += 1
            if code == STOP:
                return
            self.budget -= 1
            if self.budget < 0:
                raise UnsafeInputError(
                    f"{self.where} holds more than {MAX_OPERATIONS:,} pickle operations, far "
                    "beyond any state_dict. Save the weights alone, or as .safetensors."
                )
            operation = OPERATIONS.get(code)
            if operation is None:
                raise self.damaged(f"unknown operation 0x{code:02x}")
            operation(self)
        raise self.damaged("1 more bytes expected, 0 left (cut short?)")

    def damaged(self, detail: str) -> CheckpointError:
        """The error for a pickle that makes no sense at the current position."""
        return CheckpointError(
            f"{self.where} is damaged: at byte {self.pos} of its pickle: {detail}. "
            "Download or save the file again."
        )

    def take(self, count: int) -> bytes:
        """The next `count` bytes, which must exist."""
        left = len(self.data) - self.pos
        if not 0 <= count <= left:
            raise self.damaged(f"{count} more bytes expected, {left} left (cut short?)")
        self.pos += count
        return self.data[self.pos - count : self.pos]

    def number(self, fmt: str) -> Any:
        """The next number in `struct` format `fmt`."""
        return struct.unpack(fmt, self.take(struct.calcsize(fmt)))[0]

    def sized(self, fmt: str) -> bytes:
        """The next bytes, after their count in format `fmt`."""
        return self.take(self.number(fmt))

    def line(self) -> bytes:
        """The next newline-terminated argument, without its newline."""
        end = self.data.find(b"\n", self.pos, self.pos + MAX_LINE)
        if end < 0:
            raise self.damaged("a text argument without end")
        line, self.pos = self.data[self.pos : end], end + 1
        return line

    def marked(self) -> list[Any]:
        """Takes everything above the last mark off the stack."""
        items, self.stack = self.stack, self.outer.pop()
        return items

    def name(self, module: Any, name: Any) -> Global:
        """Records a global, whose parts must be plain text and not something computed."""
        if type(module) is not str or type(name) is not str:
            raise UnsafeInputError(f"{self.where} computes the name of the code it wants to run.")
        if len(module) + len(name) > MAX_NAME:
            raise UnsafeInputError(
                f"{self.where} refers to a name of {len(module) + len(name):,} characters; refused."
            )
        found = Global(module, name)
        self.globals[found] = None
        return found

    def name_line(self) -> Global:
        """Reads and records a global written as two lines."""
        module = self.line().decode()
        return self.name(module, self.line().decode())


Operation = Callable[[PickleMachine], None]


def _push(read: Callable[[PickleMachine], Any]) -> Operation:
    return lambda m: m.stack.append(read(m))


def _integer(m: PickleMachine, fmt: str) -> int:
    digits = m.sized(fmt)
    if len(digits) > MAX_INT_BYTES:
        raise m.damaged(f"an integer of {len(digits)} bytes")
    return int.from_bytes(digits, "little", signed=True)


def _integer_line(m: PickleMachine) -> int | bool:
    line = m.line()
    return line == b"01" if line in (b"00", b"01") else int(line.removesuffix(b"L"))


def _python2_text(text: bytes) -> str:
    try:
        return text.decode()
    except UnicodeDecodeError:
        return text.decode("latin-1")


def _quoted_line(m: PickleMachine) -> str:
    line = m.line().strip()
    if len(line) < 2 or line[:1] != line[-1:] or line[:1] not in b"'\"" or b"\\" in line:
        raise m.damaged("a text argument without plain quotes")
    return _python2_text(line[1:-1])


def _tuple_of(count: int) -> Operation:
    def operation(m: PickleMachine) -> None:
        if len(m.stack) < count:
            raise IndexError("stack underflow")
        m.stack[-count:] = [tuple(m.stack[-count:])]

    return operation


def _mark(m: PickleMachine) -> None:
    m.outer.append(m.stack)
    m.stack = []


def _pop(m: PickleMachine) -> None:
    if m.stack:
        m.stack.pop()
    else:
        m.stack = m.outer.pop()


def _from_mark(make: Callable[[list[Any]], Any]) -> Operation:
    def operation(m: PickleMachine) -> None:
        items = m.marked()  # first: it changes which stack is current
        m.stack.append(make(items))

    return operation


def _dict_from_mark(m: PickleMachine) -> None:
    items = m.marked()
    m.stack.append({})
    _set_items(m, items)


def _set_items(m: PickleMachine, items: list[Any]) -> None:
    for key, value in zip(items[::2], items[1::2], strict=True):
        put_item(m.stack[-1], key, value)


def _append(m: PickleMachine, items: list[Any]) -> None:
    target = m.stack[-1]
    if type(target) is list:
        target.extend(items)
    elif type(target) is not Object:
        raise TypeError(f"elements appended to {type(target).__name__}")


def _memoize(m: PickleMachine, index: int) -> None:
    if not 0 <= index < 1 << 32:  # others can be chosen to have equal hashes
        raise m.damaged(f"{index} is no place in the memo")
    m.memo[index] = m.stack[-1]


def _stack_global(m: PickleMachine) -> None:
    name, module = m.stack.pop(), m.stack.pop()
    m.stack.append(m.name(module, name))


def _instance(m: PickleMachine) -> None:
    cls, args = m.name_line(), tuple(m.marked())
    m.stack.append(construct(cls, args))


def _object(m: PickleMachine) -> None:
    cls, *args = m.marked()
    m.stack.append(construct(cls, tuple(args)))


def _call(m: PickleMachine) -> None:
    args, cls = m.stack.pop(), m.stack.pop()
    m.stack.append(construct(cls, args))


def _call_with_keywords(m: PickleMachine) -> None:
    del m.stack[-1]  # only classes we do not construct take keywords
    _call(m)


def _build(m: PickleMachine) -> None:
    state = m.stack.pop()
    if type(m.stack[-1]) is Object:
        m.stack[-1].state = state


def _extension(fmt: str) -> Operation:
    def operation(m: PickleMachine) -> None:
        m.stack.append(m.name("copyreg", f"extension_{m.number(fmt)}"))

    return operation


def _protocol(m: PickleMachine) -> None:
    if (version := m.number("<B")) > 5:
        raise m.damaged(f"pickle protocol {version}, newer than any known")


def _persistent(m: PickleMachine, value: Any) -> None:
    m.persistent.append(PersistentId(value))
    m.stack.append(m.persistent[-1])


STOP = ord(".")
OPERATIONS: dict[int, Operation] = {
    code[0]: operation
    for code, operation in {
        b"(": _mark,
        b"0": _pop,
        b"1": lambda m: m.marked().clear(),
        b"2": _push(lambda m: m.stack[-1]),
        b"N": _push(lambda m: None),
        b"\x88": _push(lambda m: True),
        b"\x89": _push(lambda m: False),
        b"I": _push(_integer_line),
        b"J": _push(lambda m: m.number("<i")),
        b"K": _push(lambda m: m.number("<B")),
        b"M": _push(lambda m: m.number("<H")),
        b"L": _push(_integer_line),
        b"\x8a": _push(lambda m: _integer(m, "<B")),
        b"\x8b": _push(lambda m: _integer(m, "<i")),
        b"F": _push(lambda m: float(m.line())),
        b"G": _push(lambda m: m.number(">d")),
        b"S": _push(_quoted_line),
        b"T": _push(lambda m: _python2_text(m.sized("<i"))),
        b"U": _push(lambda m: _python2_text(m.sized("<B"))),
        b"V": _push(lambda m: m.line().decode("raw-unicode-escape")),
        b"X": _push(lambda m: m.sized("<I").decode("utf-8", "surrogatepass")),
        b"\x8c": _push(lambda m: m.sized("<B").decode("utf-8", "surrogatepass")),
        b"\x8d": _push(lambda m: m.sized("<Q").decode("utf-8", "surrogatepass")),
        b"B": _push(lambda m: m.sized("<I")),
        b"C": _push(lambda m: m.sized("<B")),
        b"\x8e": _push(lambda m: m.sized("<Q")),
        b"\x96": _push(lambda m: m.sized("<Q")),
        b")": _push(lambda m: ()),
        b"]": _push(lambda m: []),
        b"}": _push(lambda m: {}),
        b"\x8f": _push(lambda m: []),  # a set: kept as a list, nothing untrusted is hashed
        b"t": _from_mark(tuple),
        b"l": _from_mark(list),
        b"\x91": _from_mark(tuple),
        b"\x85": _tuple_of(1),
        b"\x86": _tuple_of(2),
        b"\x87": _tuple_of(3),
        b"d": _dict_from_mark,
        b"s": lambda m: _set_items(m, [m.stack.pop(), m.stack.pop()][::-1]),
        b"u": lambda m: _set_items(m, m.marked()),
        b"a": lambda m: _append(m, [m.stack.pop()]),
        b"e": lambda m: _append(m, m.marked()),
        b"\x90": lambda m: _append(m, m.marked()),
        b"p": lambda m: _memoize(m, int(m.line())),
        b"q": lambda m: _memoize(m, m.number("<B")),
        b"r": lambda m: _memoize(m, m.number("<I")),
        b"\x94": lambda m: _memoize(m, len(m.memo)),
        b"g": _push(lambda m: m.memo[int(m.line())]),
        b"h": _push(lambda m: m.memo[m.number("<B")]),
        b"j": _push(lambda m: m.memo[m.number("<I")]),
        b"c": _push(lambda m: m.name_line()),
        b"\x93": _stack_global,
        b"i": _instance,
        b"o": _object,
        b"R": _call,
        b"\x81": _call,
        b"\x92": _call_with_keywords,
        b"b": _build,
        b"P": lambda m: _persistent(m, m.line().decode()),
        b"Q": lambda m: _persistent(m, m.stack.pop()),
        b"\x80": _protocol,
        b"\x95": lambda m: m.number("<Q") and None,
        b"\x82": _extension("<B"),
        b"\x83": _extension("<H"),
        b"\x84": _extension("<i"),
    }.items()
}

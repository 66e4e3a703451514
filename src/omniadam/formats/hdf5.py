"""What Keras's HDF5 files are made of: groups, arrays stored as they are, and text.

They are read here and not by HDF5's library. That crashes on files that were altered, or does not
come back from them (version 1.14.6, each within 3,000 variants with a few other bytes), and it goes
wherever a file sends it: to other files, through filters that inflate. Here a file is bytes. What
is not such a group, array or text is refused; each look at a file costs, and what it may cost in
all is bounded; so are memory and time. It also needs no library.

Source: HDF5 File Format Specification Version 3.0,
https://support.hdfgroup.org/documentation/hdf5/latest/_f_m_t3.html.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import suppress
from typing import Any, NamedTuple

import numpy as np

from .source import Array, Source

MAGIC = b"\x89HDF\r\n\x1a\n"
# The cost, in bytes, of all looks at what is not data: 128 MiB, some two seconds. A variable of a
# model costs 8 KB.
_ALLOWED = 1 << 27
_LOOK = 512
_UNDEFINED = (1 << 64) - 1
# Kinds of messages in the header of an object.
_DATASPACE, _LINKS, _DATATYPE, _LINK, _OUTSIDE, _LAYOUT = 0x1, 0x2, 0x3, 0x6, 0x7, 0x8
_FILTERS, _ATTRIBUTE, _CONTINUED, _SYMBOLS, _ATTRIBUTES = 0xB, 0xC, 0x10, 0x11, 0x15
# Offset, precision, place and size of exponent and of mantissa, and bias, of float types.
_FLOATS: dict[tuple[int, ...], str] = {
    (0, 16, 10, 5, 0, 10, 15): "f2",
    (0, 32, 23, 8, 0, 23, 127): "f4",
    (0, 64, 52, 11, 0, 52, 1023): "f8",
    (0, 16, 7, 8, 0, 7, 127): "bfloat16",
}


class Part(NamedTuple):
    """Bytes, and where in the file they are."""

    place: int
    content: bytes


class Message(NamedTuple):
    """A part of an object's header."""

    kind: int
    flags: int
    place: int
    content: bytes


class Dataset(NamedTuple):
    """An array in a file."""

    shape: tuple[int, ...]
    dtype: str  # as NumPy, or ml_dtypes, calls it
    place: int
    stored: np.dtype[Any]  # with its byte order

    @property
    def nbytes(self) -> int:
        """How much room it takes."""
        return math.prod(self.shape) * self.stored.itemsize


class Bytes:
    """Numbers one after another."""

    def __init__(self, content: bytes, place: int = 0) -> None:
        self._content, self._at, self._place = content, 0, place

    @property
    def left(self) -> int:
        """How many bytes there still are."""
        return len(self._content) - self._at

    @property
    def place(self) -> int:
        """Where in the file the next byte is."""
        return self._place + self._at

    def take(self, count: int) -> bytes:
        """The next bytes."""
        if not 0 <= count <= self.left:
            raise ValueError("one of its parts is shorter than it says")
        self._at += count
        return self._content[self._at - count : self._at]

    def number(self, size: int) -> int:
        """The next number, of so many bytes."""
        return int.from_bytes(self.take(size), "little")


class File:
    """An HDF5 file.

    Args:
        source: its bytes.

    Raises:
        ValueError: if it is none, or not whole.
    """

    def __init__(self, source: Source) -> None:
        self.source = source
        self._cost = 0
        self._looks: list[tuple[int, int]] = []  # where, and up to where
        self._texts: dict[int, dict[int, Part]] = {}
        self._groups: dict[int, dict[str, int | None]] = {}
        head = Bytes(self._look(0, min(96, source.size)))
        if head.take(8) != MAGIC:
            raise ValueError("it is no HDF5 file")
        version = head.number(1)
        if version in (0, 1):
            head.take(4)
            sizes = head.number(1), head.number(1)
            head.take(9 + 4 * version)
            base, _, end, _ = (head.number(8) for _ in range(4))
            head.take(8)
        elif version in (2, 3):
            sizes = head.number(1), head.number(1)
            head.take(1)
            base, _, end = (head.number(8) for _ in range(3))
        else:
            raise ValueError(f"its HDF5 is of version {version}, which is not known")
        if sizes != (8, 8) or base != 0:
            raise ValueError("its HDF5 is of a form that Keras does not write")
        if end > source.size:
            raise ValueError(f"it is cut off: {end} bytes were written, {source.size} are there")
        self.root = head.number(8)

    def _look(self, place: int, count: int) -> bytes:
        self._cost += count + _LOOK
        if self._cost > _ALLOWED:
            raise ValueError("its parts lead in circles, or are too many")
        self._looks.append((place, place + count))
        return self.source.at(place, count)

    # --- objects ---

    def messages(self, address: int) -> list[Message]:
        """The header of an object."""
        head = self._look(address, 16)
        if head[:4] == b"OHDR" and head[4] == 2:
            flags = head[5]
            place = address + 6 + (16 if flags & 0x20 else 0) + (4 if flags & 0x10 else 0)
            size = 1 << (flags & 3)
            length = int.from_bytes(self._look(place, size), "little")
            return list(self._messages_2(place + size, length, with_order=bool(flags & 4)))
        if head[0] != 1:
            raise ValueError("there is no object where one should be")
        count, length = int.from_bytes(head[2:4], "little"), int.from_bytes(head[8:12], "little")
        found = list(self._messages_1(address + 16, length))[:count]
        if len(found) != count:
            raise ValueError("the header of an object is shorter than it says")
        return found

    def _messages_1(self, place: int, length: int) -> Iterator[Message]:
        rest = [(place, length)]
        while rest:
            place, length = rest.pop(0)
            part = Bytes(self._look(place, length), place)
            while part.left >= 8:
                kind, size, flags = part.number(2), part.number(2), part.number(1)
                part.take(3)
                found = Message(kind, flags, part.place, part.take(size))
                if kind == _CONTINUED:
                    more = Bytes(found.content)
                    rest.append((more.number(8), more.number(8)))
                yield found

    def _messages_2(self, place: int, length: int, *, with_order: bool) -> Iterator[Message]:
        head = 6 if with_order else 4
        rest = [(place, length)]
        while rest:
            place, length = rest.pop(0)
            part = Bytes(self._look(place, length), place)
            while part.left >= head:
                kind, size, flags = part.number(1), part.number(2), part.number(1)
                part.take(head - 4)
                found = Message(kind, flags, part.place, part.take(size))
                if kind == _CONTINUED:
                    more = Bytes(found.content)
                    begin, whole = more.number(8), more.number(8)
                    if self._look(begin, 4) != b"OCHK":
                        raise ValueError("the header of an object does not go on")
                    rest.append((begin + 4, whole - 8))  # without a sum at its end
                yield found

    def _only(self, messages: list[Message], kind: int, what: str) -> Message:
        found = [each for each in messages if each.kind == kind]
        if len(found) != 1 or found[0].flags & 2:
            raise ValueError(f"an array must have one {what} of its own. Received: {len(found)}")
        return found[0]

    # --- groups ---

    def children(self, address: int) -> dict[str, int | None]:
        """What is in a group: addresses by name, None where a name leads elsewhere."""
        if address not in self._groups:
            self._groups[address] = self._children(address)
        return self._groups[address]

    def _children(self, address: int) -> dict[str, int | None]:
        messages = self.messages(address)
        found: dict[str, int | None] = {}
        is_group = False
        for each in messages:
            if each.kind == _SYMBOLS:
                is_group = True
                part = Bytes(each.content)
                pairs = list(self._symbols(part.number(8), part.number(8)))
            elif each.kind == _LINKS:
                is_group = True
                pairs = list(self._dense_links(each.content))
            elif each.kind == _LINK:
                is_group = True
                pairs = [_link(each.content)]
            else:
                continue
            for name, target in pairs:
                if name in found:
                    raise ValueError(f"a group has two parts of the name {name!r}")
                found[name] = target
        if not is_group:
            raise ValueError("there is no group where one should be")
        return found

    def _symbols(self, tree: int, heap: int) -> Iterator[tuple[str, int | None]]:
        part = Bytes(self._look(heap, 32))
        if part.take(4) != b"HEAP":
            raise ValueError("the names in a group are missing")
        part.take(4)
        size, _, begin = (part.number(8) for _ in range(3))
        names = self._look(begin, size)
        yield from self._tree(tree, names)

    def _tree(self, address: int, names: bytes) -> Iterator[tuple[str, int | None]]:
        rest = [address]
        while rest:
            place = rest.pop()
            part = Bytes(self._look(place, 24))
            magic = part.take(4)
            if magic == b"TREE":
                kind, _ = part.number(1), part.number(1)
                count = part.number(2)
                if kind != 0:
                    raise ValueError("there is no tree of names where one should be")
                part = Bytes(self._look(place + 24, 16 * count + 8))
                for _ in range(count):
                    part.take(8)
                    rest.append(part.number(8))
            elif magic == b"SNOD":
                part = Bytes(self._look(place, 8))
                part.take(6)
                count = part.number(2)
                part = Bytes(self._look(place + 8, 40 * count))
                for _ in range(count):
                    name, target, kind = part.number(8), part.number(8), part.number(4)
                    part.take(20)
                    yield _ended(names, name), None if kind == 2 else target
            else:
                raise ValueError("a tree of names does not go on")

    def _dense_links(self, content: bytes) -> Iterator[tuple[str, int | None]]:
        part = Bytes(content)
        part.take(1)
        if part.number(1) & 1:
            part.take(8)
        heap, tree = part.number(8), part.number(8)
        if heap != _UNDEFINED:
            for link in self._dense(heap, tree, 5, lambda record: record[4:]):
                yield _link(link.content)

    def _dense(self, heap: int, tree: int, kind: int, id_of: Any) -> Iterator[Part]:
        """What is in a heap, by an index of it."""
        find = self._heap(heap)
        part = Bytes(self._look(tree, 38))
        if part.take(4) != b"BTHD" or part.number(1) != 0 or part.number(1) != kind:
            raise ValueError("an index of names is missing")
        node, record, depth = part.number(4), part.number(2), part.number(2)
        part.take(2)
        root, count = part.number(8), part.number(2)
        if depth > 8:
            raise ValueError("an index of names is deeper than any group is large")
        # How many records fit in a node of each level, and how many bytes tell their number.
        most = [(node - 10) // record]
        total, widths = most[0], [_width(most[0])]
        totals = [0]
        for level in range(1, depth + 1):
            pointer = 8 + widths[0] + (totals[level - 1] if level > 1 else 0)
            most.append((node - 10 - pointer) // (record + pointer))
            total = most[level] + (most[level] + 1) * total
            totals.append(_width(total))
        rest = [(root, count, depth)]
        while rest:
            place, count, level = rest.pop()
            if root == _UNDEFINED:
                return
            part = Bytes(self._look(place, node))
            if part.take(4) != (b"BTIN" if level else b"BTLF") or part.number(1) != 0:
                raise ValueError("an index of names does not go on")
            part.take(1)
            for _ in range(count):
                yield find(id_of(part.take(record)))
            for _ in range(count + 1 if level else 0):
                child, inside = part.number(8), part.number(widths[0])
                part.take(totals[level - 1] if level > 1 else 0)
                rest.append((child, inside, level - 1))

    def _heap(self, address: int) -> Any:
        """How to find in a heap what its index names."""
        part = Bytes(self._look(address, 144))
        if part.take(4) != b"FRHP":
            raise ValueError("the names in a group are missing")
        part.take(1)
        _, filters, _, largest = (part.number(size) for size in (2, 2, 1, 4))
        part.take(12 * 8)
        columns, first, last, bits = (part.number(size) for size in (2, 8, 8, 2))
        part.take(2)
        root, rows = part.number(8), part.number(2)
        if filters or rows * columns > 1 << 12:
            raise ValueError("the names in a group are stored in a form that Keras does not write")
        width = (bits + 7) // 8
        length = min(_width(largest), _width(last))
        blocks: list[tuple[int, int, int]] = []  # begin and end in the heap, and address
        if rows == 0:
            blocks.append((0, first, root))
        else:
            part = Bytes(self._look(root, 13 + width + 8 * rows * columns))
            if part.take(4) != b"FHIB":
                raise ValueError("the names in a group do not go on")
            part.take(9 + width)
            begin = 0
            for row in range(rows):
                size = first << max(0, row - 1)
                if size > last:
                    raise ValueError("a group has more names than Keras's have")
                for _ in range(columns):
                    blocks.append((begin, begin + size, part.number(8)))
                    begin += size

        def find(key: bytes) -> Part:
            parts = Bytes(key)
            if parts.number(1) & 0x30:
                raise ValueError("a name is stored in a form that Keras does not write")
            offset, size = parts.number(width), parts.number(length)
            for begin, end, place in blocks:
                if begin <= offset < end and place != _UNDEFINED:
                    place += offset - begin
                    return Part(place, self._look(place, size))
            raise ValueError("a name is missing")

        return find

    def find(self, path: str, start: int | None = None) -> int:
        """The address of what a path leads to; raises LookupError if there is nothing."""
        address = self.root if start is None else start
        for name in filter(None, path.split("/")):
            children = self.children(address)
            if name not in children:
                raise LookupError(f"there is no '{path}'")
            found = children[name]
            if found is None:
                raise ValueError(f"'{path}' leads elsewhere: links are not followed")
            address = found
        return address

    # --- arrays ---

    def check_places(self) -> None:
        """Raise ValueError if an array is where another one is, or what describes the file.

        Files have no sums: this is how most altered places of arrays are noticed.
        """
        arrays, seen, rest = [], set(), [self.root]
        while rest:
            address = rest.pop()
            if address in seen:
                continue
            seen.add(address)
            kinds = {each.kind for each in self.messages(address)}
            if _LAYOUT not in kinds:
                rest += [each for each in self.children(address).values() if each is not None]
                continue
            with suppress(ValueError):  # of a kind that is none of an optimizer's
                found = self.dataset(address)
                if found.nbytes:
                    arrays.append((found.place, found.place + found.nbytes))
        places = [(*place, True) for place in arrays]
        places += [(*look, False) for look in set(self._looks)]
        end_of_array = end_of_look = 0
        for begin, end, is_array in sorted(places):
            if begin < end_of_array or (is_array and begin < end_of_look):
                raise ValueError("two of its parts are in one place")
            if is_array:
                end_of_array = end
            else:
                end_of_look = max(end_of_look, end)

    def dataset(self, address: int) -> Dataset:
        """An array."""
        messages = self.messages(address)
        shape = _shape(self._only(messages, _DATASPACE, "shape").content)
        name, stored = self._type(self._only(messages, _DATATYPE, "type").content, messages)
        layout = Bytes(self._only(messages, _LAYOUT, "place").content)
        kinds = {each.kind for each in messages}
        if kinds & {_OUTSIDE, _FILTERS}:
            raise ValueError("an array is compressed, or in another file, as Keras's are not")
        version, kind = layout.number(1), layout.number(1)
        if version not in (3, 4, 5) or kind != 1:
            raise ValueError(
                "an array must be stored as it is, as Keras stores it. Received one in pieces: "
                "h5repack -l CONTI -f NONE IN OUT makes it so"
            )
        found = Dataset(shape, name, layout.number(8), stored)
        size = layout.number(8)
        if found.nbytes and found.place == _UNDEFINED:
            raise ValueError("an array was never written")
        if found.nbytes and (size != found.nbytes or found.place + size > self.source.size):
            raise ValueError("an array is not as long as its shape")
        return found

    def array(self, found: Dataset) -> Array:
        """What an array holds."""
        if not found.nbytes:
            return np.zeros(found.shape, found.stored.newbyteorder("="))
        value = self.source.array(found.place, found.shape, found.stored)
        return value.view(_bfloat16()) if found.dtype == "bfloat16" else value

    def _type(self, content: bytes, messages: list[Message]) -> tuple[str, np.dtype[Any]]:
        part = Bytes(content)
        kind = part.number(1) & 15
        bits = part.take(3)
        size = part.number(4)
        order = ">" if bits[0] & 1 else "<"
        if kind == 0 and size in (1, 2, 4, 8):
            if (part.number(2), part.number(2)) == (0, 8 * size):
                stored = np.dtype(f"{order}{'i' if bits[0] & 8 else 'u'}{size}")
                return stored.name, stored
        elif kind == 1:
            name = _FLOATS.get(tuple(part.number(n) for n in (2, 2, 1, 1, 1, 1, 4)))
            if name is not None and bits[0] & 0x40 == 0 and bits[1] == 8 * size - 1:
                stored = np.dtype(f"{order}{'u2' if name == 'bfloat16' else name}")
                if stored.itemsize == size:
                    return ("bfloat16" if name == "bfloat16" else stored.name), stored
        elif kind == 5 and size == 2:
            mark = self.attributes_in(messages).get("dtype")
            if mark is not None and self.text(mark) == "bfloat16":
                return "bfloat16", np.dtype("<u2")
        raise ValueError("an array must hold floats or integers")

    # --- text ---

    def attributes(self, address: int) -> dict[str, Message]:
        """Attributes of an object, by name."""
        return self.attributes_in(self.messages(address))

    def attributes_in(self, messages: list[Message]) -> dict[str, Message]:
        """Those in a header."""
        found = {}
        for each in messages:
            if each.kind == _ATTRIBUTE:
                found[_name_of_attribute(each.content)] = each
            elif each.kind == _ATTRIBUTES:
                part = Bytes(each.content)
                part.take(1)
                if part.number(1) & 1:
                    part.take(2)
                heap, tree = part.number(8), part.number(8)
                if heap != _UNDEFINED:
                    for place, content in self._dense(heap, tree, 8, lambda record: record[:8]):
                        found[_name_of_attribute(content)] = Message(0, 0, place, content)
        return found

    def text(self, attribute: Message) -> str:
        """An attribute that is one string."""
        shape, parts = self.texts(attribute)
        if shape not in ((), (1,)):
            raise ValueError("an attribute must be one string")
        return parts[0].content.decode()

    def texts(self, attribute: Message) -> tuple[tuple[int, ...], list[Part]]:
        """Shape and strings of an attribute."""
        kind, size, shape, part = _attribute(attribute)
        count = math.prod(shape)
        if count and (len(shape) > 1 or not kind):  # an empty list is one of no strings, too
            raise ValueError("an attribute must be strings")
        if count > part.left:
            raise ValueError("an attribute is shorter than it says")
        found = []
        for _ in range(count):
            if kind == "fixed":
                place, content = part.place, part.take(size)
                found.append(Part(place, content.rstrip(b"\0")))
            else:
                length, heap, index = part.number(4), part.number(8), part.number(4)
                found.append(self._from_heap(heap, index, length))
        return shape, found

    def _from_heap(self, address: int, index: int, length: int) -> Part:
        if length == 0:
            return Part(0, b"")
        if address not in self._texts:
            part = Bytes(self._look(address, 16))
            if part.take(4) != b"GCOL":
                raise ValueError("a string is missing")
            part.take(4)
            whole = part.number(8)
            part = Bytes(self._look(address, whole), address)
            part.take(16)
            found: dict[int, Part] = {}
            while part.left >= 16:
                number = part.number(2)
                part.take(6)
                size = part.number(8)
                if number == 0:
                    break
                place = part.place
                found[number] = Part(place, part.take(size))
                part.take(min(-size % 8, part.left))
            self._texts[address] = found
        found_at = self._texts[address].get(index)
        if found_at is None or len(found_at.content) < length:
            raise ValueError("a string is missing")
        return Part(found_at.place, found_at.content[:length].rstrip(b"\0"))


def _width(number: int) -> int:
    """How many bytes tell numbers up to this one."""
    return max(1, (number.bit_length() + 7) // 8)


def _ended(names: bytes, begin: int) -> str:
    end = names.find(b"\0", begin)
    if not 0 <= begin < end:
        raise ValueError("a name in a group has no end")
    return names[begin:end].decode()


def _link(content: bytes) -> tuple[str, int | None]:
    part = Bytes(content)
    version, flags = part.number(1), part.number(1)
    if version != 1:
        raise ValueError("a link is of a version that is not known")
    kind = part.number(1) if flags & 8 else 0
    part.take((8 if flags & 4 else 0) + (1 if flags & 0x10 else 0))
    name = part.take(part.number(1 << (flags & 3))).decode()
    return name, part.number(8) if kind == 0 else None


def _shape(content: bytes) -> tuple[int, ...]:
    part = Bytes(content)
    version, rank, flags = part.number(1), part.number(1), part.number(1)
    kind = part.number(1)
    if version == 1:
        part.take(4)
        kind = 1
    if version not in (1, 2) or kind not in (0, 1) or rank > 32 or flags > 3:
        raise ValueError("the shape of an array is of a form that Keras does not write")
    return tuple(part.number(8) for _ in range(rank))


def _name_of_attribute(content: bytes) -> str:
    return _attribute_parts(content)[0]


def _attribute_parts(content: bytes) -> tuple[str, bytes, bytes, int]:
    """Name, type, shape, and where the value begins."""
    part = Bytes(content)
    version, flags = part.number(1), part.number(1)
    sizes = [part.number(2) for _ in range(3)]
    if version not in (1, 2, 3) or (version > 1 and flags):
        raise ValueError("an attribute is of a form that Keras does not write")
    if version == 3:
        part.take(1)
    found = []
    for size in sizes:
        found.append(part.take(size))
        if version == 1:
            part.take(-size % 8)
    return found[0].rstrip(b"\0").decode(), found[1], found[2], part.place


def _attribute(message: Message) -> tuple[str, int, tuple[int, ...], Bytes]:
    """Whether its strings are of fixed length, which, its shape, and its value."""
    _, kind, space, begin = _attribute_parts(message.content)
    part = Bytes(kind)
    number = part.number(1) & 15
    bits = part.take(3)
    size = part.number(4)
    name = "fixed" if number == 3 else "variable" if number == 9 and bits[0] & 15 == 1 else ""
    return name, size, _shape(space), Bytes(message.content[begin:], message.place + begin)


def _bfloat16() -> np.dtype[Any]:
    import ml_dtypes  # which comes with Keras

    found: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16)
    return found

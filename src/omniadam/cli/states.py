"""`omniadam inspect`, `diff` and `convert`: files with the state of an optimizer."""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

from omniadam import schedules
from omniadam.cli import measures
from omniadam.cli.measures import Difference, Measures, Place
from omniadam.saving import file, matching, translate
from omniadam.saving.snapshot import ITERATION, Snapshot, Tensor, digest, hash_of

# As --setting gives them.
Settings = Sequence[tuple[str, Any]]
OURS = ".safetensors"
MANY = 8  # of a list in a line


def add_to(commands: Any) -> None:
    """Add the three commands to a parser's."""
    add_inspect(commands)
    add_diff(commands)
    add_convert(commands)


def add(commands: Any, name: str, text: str, more: str) -> argparse.ArgumentParser:
    """Add a command."""
    parser: argparse.ArgumentParser = commands.add_parser(
        name, help=text, description=f"{text} {more}", allow_abbrev=False
    )
    return parser


FILES = (
    "Files of omniadam.save; Keras's .keras and .h5, TensorFlow's checkpoints, PyTorch's .pt and "
    "folders of torch.distributed.checkpoint, orbax's folders, where the library is installed."
)
KEY = "Where in {} the optimizer is: names with dots between them."
AS = "Translate {} to the state of another class, such as omniadam.Adam."
BY = "By what variables are told: %(choices)s. Default: %(default)s."


def add_setting(parser: argparse.ArgumentParser, file: str) -> None:
    """Add the option that says what a file does not tell."""
    parser.add_argument(
        "--setting",
        dest="settings",
        action="append",
        type=setting,
        default=[],
        metavar="NAME=VALUE",
        help=f"A setting of the optimizer in {file} that the file does not tell, as .weights.h5 "
        "do not: use_ema=true. May be given several times.",
    )


def setting(text: str) -> tuple[str, Any]:
    """Name and value; the value is JSON, or a word."""
    name, found, value = text.partition("=")
    if not (name and found):
        raise argparse.ArgumentTypeError(f"must be NAME=VALUE: {text!r}")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def run_by(parser: argparse.ArgumentParser, run: Callable[..., int | None]) -> None:
    """Let a function do what a command is for: it returns the status to end with."""

    def checked(**options: Any) -> None:
        try:
            status = run(**options)
        except Failed as failed:
            print(f"Error: {failed}", file=sys.stderr)
            status = 2
        if status:
            sys.exit(status)

    parser.set_defaults(run=checked)


class Failed(Exception):
    """What is wrong with which file, in a line."""


@contextmanager
def named(*paths: Path) -> Iterator[None]:
    """Around what has to do with these files: what is said of an error names one of them."""
    try:
        yield
    except (OSError, ValueError, ImportError) as error:
        text = str(error)
        if isinstance(error, OSError) and error.strerror:
            text = error.strerror
            if error.filename is not None:
                text = f"{error.filename}: {text}"
        if not any(str(path) in text for path in paths):
            text = f"{paths[0]}: {text}"
        raise Failed(printable(" ".join(text.split()))) from error


# --- reading ---


def read(
    path: Path, key: str | None = None, settings: Settings = (), kind: str | None = None
) -> Snapshot:
    """The state in a file of any format, verified if it is ours; tensors are read when wanted.

    Args:
        path: of the file.
        key: where in it the optimizer is.
        settings: what the file does not tell.
        kind: the class that it is translated for.
    """
    given = dict(settings)
    found = read_as_it_is(path, key, given)
    with named(path):
        otherwise = [name for name in given if found.settings.get(name, given[name]) != given[name]]
        if otherwise:
            raise ValueError(f"it has another value of {', '.join(otherwise)}")
        found = replace(found, settings={**given, **found.settings})
        if kind is None:
            return found
        return translate.translated(found, kind)


def read_as_it_is(path: Path, key: str | None, settings: Mapping[str, Any]) -> Snapshot:
    """The same, with no more settings than the file tells."""
    with named(path):
        if not file.is_ours(path):
            with other_formats() as formats:
                found: Snapshot = formats.read(path, key, settings)
            return found
        if key is not None:
            raise ValueError(f"{path} holds one optimizer, and no place called '{key}'.")
        with progress(path.stat().st_size, f"verifying {path.name}") as told:
            return file.read(path, told).snapshot


@contextmanager
def other_formats() -> Iterator[Any]:
    """The module that knows other files, without what TensorFlow's C++ says when it is imported."""
    name = "TF_CPP_MIN_LOG_LEVEL"
    is_chosen = name in os.environ
    os.environ.setdefault(name, "1")
    try:
        yield import_module("omniadam.formats")
    finally:
        if not is_chosen:
            del os.environ[name]


@contextmanager
def progress(total: int, text: str) -> Iterator[Callable[[int], object]]:
    """Where what is called with numbers of bytes shows them, if it takes more than a second.

    Only on a terminal, and only if tqdm is installed.
    """
    if sys.stderr.isatty():
        try:
            from tqdm import tqdm
        except ModuleNotFoundError:
            pass
        else:
            settings: dict[str, Any] = {"unit": "B", "unit_scale": True, "unit_divisor": 1024}
            with tqdm(total=total, desc=text, delay=1, leave=False, **settings) as bar:
                yield bar.update
            return
    yield lambda count: None


def watched(snapshot: Snapshot, told: Callable[[int], object]) -> Snapshot:
    """The same state, which tells how many bytes of it are read."""

    def watch(tensor: Tensor) -> Tensor:
        def read() -> Any:
            value = tensor.read()
            told(value.nbytes)
            return value

        return tensor._replace(read=read)

    return replace(snapshot, tensors={k: watch(tensor) for k, tensor in snapshot.tensors.items()})


def bytes_in(snapshot: Snapshot) -> int:
    """The size of all tensors."""
    return sum(map(measures.size, snapshot.tensors.values()))


# --- what a state says of itself ---


def tells_settings(snapshot: Snapshot) -> bool:
    """Whether all settings are known, and not only those that the state shows."""
    return bool(snapshot.settings) and snapshot.is_complete


def calls(snapshot: Snapshot) -> int | None:
    """How often the optimizer was called, as far as one count says it."""
    count = snapshot.tensors.get(ITERATION)
    return None if count is None else int(count.read())


def iterations(snapshot: Snapshot) -> int | None:
    """How often variables were updated; where each has a count, the largest."""
    counted = calls(snapshot)
    if counted is not None:
        return counted // (snapshot.settings.get("gradient_accumulation_steps") or 1)
    steps = [v.slots["step"] for v in snapshot.variables if "step" in v.slots]
    return max((int(snapshot.tensors[name].read()) for name in steps), default=None)


def rate(snapshot: Snapshot) -> float | None:
    """The learning rate of the next step; None if the file does not tell, or there are several."""
    groups = snapshot.settings.get("groups", [])
    found = snapshot.settings.get("learning_rate")
    if isinstance(found, Mapping):
        try:
            found = float(schedules.deserialize(found)(calls(snapshot) or 0))
        except (TypeError, ValueError):  # a schedule of the user's
            found = None
    rates = {group.get("lr") for group in groups} or {found}
    value = rates.pop() if len(rates) == 1 else None
    return None if value is None else float(value)


def flat(settings: Any, name: str = "") -> dict[str, Any]:
    """Settings within settings, by names with dots between them."""
    if isinstance(settings, Mapping):
        items = [(str(key), value) for key, value in settings.items()]
    elif isinstance(settings, list) and settings and all(isinstance(x, Mapping) for x in settings):
        items = [(str(i), value) for i, value in enumerate(settings)]
    else:
        return {name: settings}
    found: dict[str, Any] = {}
    for key, value in items:
        found |= flat(value, f"{name}.{key}" if name else key)
    return found


# --- inspect ---


def add_inspect(commands: Any) -> None:
    """Add `omniadam inspect`."""
    text = "Show what is in a file with the state of an optimizer."
    parser = add(commands, "inspect", text, FILES)
    parser.add_argument("path", type=Path, metavar="FILE", help="File or folder to look into.")
    parser.add_argument("--key", help=KEY.format("FILE"))
    add_setting(parser, "FILE")
    parser.add_argument(
        "--json", action="store_true", help="Print JSON, with the keys that docs/cli.md lists."
    )
    run_by(parser, inspect)


def inspect(path: Path, key: str | None, settings: Settings, json: bool) -> None:
    """Print what a file holds."""
    snapshot = read(path, key, settings)
    rows: list[tuple[Place, Tensor, Measures]] = []
    digests = {}
    with named(path), progress(bytes_in(snapshot), f"reading {path.name}") as told:
        for place in measures.places(snapshot):
            tensor = snapshot.tensors[place.tensor]
            digests[place.tensor], found = looked_at(tensor)
            rows.append((place, tensor, found))
            told(measures.size(tensor))
    forms = {place.tensor: (tensor.dtype, tensor.shape) for place, tensor, _ in rows}
    facts: dict[str, Any] = {
        "file": str(path),
        "class": snapshot.kind,
        "generation": snapshot.generation,
        "written_by": dict(snapshot.origin),
        "iterations": iterations(snapshot),
        "calls": calls(snapshot),
        "learning_rate": rate(snapshot),
        "state_hash": hash_of(forms, digests).hex(),
        "settings": dict(snapshot.settings),
        "all_settings": tells_settings(snapshot),
    }
    if json:
        print(as_json({**facts, "tensors": [as_fact(snapshot, *row) for row in rows]}))
    else:
        print(as_text(snapshot, facts, rows))


def looked_at(tensor: Tensor) -> tuple[bytes, Measures]:
    """Its digest and its measures; it is in memory no longer than this takes."""
    value = tensor.read()
    return digest(value), measures.measured(value)


def as_fact(snapshot: Snapshot, place: Place, tensor: Tensor, found: Measures) -> dict[str, Any]:
    """A row of the table for JSON."""
    variable = next((v for v in snapshot.variables if v.name == place.variable), None)
    return {
        "tensor": place.tensor,
        "variable": place.variable,
        "slot": place.slot,
        "shape": list(tensor.shape),
        "dtype": tensor.dtype,
        **found._asdict(),
        "named": variable is None or variable.is_named,
        "extension": 0 if variable is None else variable.extension,
    }


def as_text(
    snapshot: Snapshot, facts: Mapping[str, Any], rows: Sequence[tuple[Place, Tensor, Measures]]
) -> str:
    """What `omniadam inspect` says."""
    wrote = ", ".join(f"{name} {version}" for name, version in facts["written_by"].items())
    count = len(snapshot.variables)
    head = {
        "class": f"{facts['class']} ({facts['generation']})",
        "written by": wrote or None,
        "iterations": facts["iterations"],
        "calls": facts["calls"] if facts["calls"] != facts["iterations"] else None,
        "learning rate": facts["learning_rate"],
        "variables": f"{count}, with {bytes_in(snapshot):,} bytes of state",
        "state hash": facts["state_hash"],
    }
    lines = [printable(facts["file"]), *listed({k: v for k, v in head.items() if v is not None})]
    settings = {name: as_value(value) for name, value in flat(facts["settings"]).items()}
    lines += ["", "settings", *listed(settings)]
    lines += [] if facts["all_settings"] else ["  (the file does not tell others)"]
    headings = ["variable", "slot", "shape", "dtype", "norm", "largest", "non-finite", "zeros"]
    cells = [
        [
            place.variable or place.tensor,
            place.slot or "-",
            as_shape(tensor.shape),
            tensor.dtype,
            f"{found.norm:.6g}",
            f"{found.largest:.6g}",
            str(found.non_finite),
            "-" if math.isnan(found.zeros) else f"{found.zeros:.1%}",
        ]
        for place, tensor, found in rows
    ]
    lines += ["", *table(headings, cells, left=4)]
    for number in sorted({v.extension for v in snapshot.variables} - {0}):
        names = [v.name for v in snapshot.variables if v.extension == number]
        since = snapshot.tensors.get(f"extension.{number}")
        at = "" if since is None else f" at iteration {int(since.read())}"
        lines += ["", printable(f"Extension {number}{at}: {', '.join(names)}")]
    if any(not v.is_named for v in snapshot.variables):
        lines += ["", "Not all names are their user's: load(..., by='position') takes the file."]
    return "\n".join(lines)


# --- diff ---


def add_diff(commands: Any) -> None:
    """Add `omniadam diff`."""
    text = "Show what differs between two files with the state of an optimizer, largest first."
    more = f"Ends with status 0 if nothing differs, 1 if something does, 2 for errors. {FILES}"
    parser = add(commands, "diff", text, more)
    parser.add_argument("a", type=Path, metavar="A", help="File or folder.")
    parser.add_argument("b", type=Path, metavar="B", help="Another one.")
    parser.add_argument("--key-a", metavar="KEY", help=KEY.format("A"))
    parser.add_argument("--key-b", metavar="KEY", help=KEY.format("B"))
    parser.add_argument("--by", choices=["name", "position"], default="name", help=BY)
    parser.add_argument("--as", dest="kind", metavar="CLASS", help=AS.format("both"))
    parser.add_argument(
        "--json", action="store_true", help="Print JSON, with the keys that docs/cli.md lists."
    )
    run_by(parser, diff)


def diff(
    a: Path,
    b: Path,
    key_a: str | None,
    key_b: str | None,
    by: str,
    kind: str | None,
    json: bool,
) -> int:
    """Print what differs; returns the status to end with."""
    ours, theirs = read(a, key_a, kind=kind), read(b, key_b, kind=kind)
    about = told_apart(ours, theirs, by)
    pairs = [p for p in measures.pairs(ours, theirs, by) if p.place.tensor != ITERATION]
    found = []
    with named(a, b), progress(bytes_in(ours) + bytes_in(theirs), "comparing") as told:
        for pair in pairs:
            difference = measures.compared(pair)
            if difference:
                found.append(difference)
            told(sum(map(measures.size, filter(None, pair[1:]))))
    found.sort(key=lambda difference: difference.order)
    if json:
        print(
            as_json(
                {
                    "files": [str(a), str(b)],
                    "differs": bool(about or found),
                    "compared": len(pairs),
                    "about": [{"what": k, "values": list(values)} for k, values in about.items()],
                    "tensors": [as_difference(each) for each in found],
                }
            )
        )
    else:
        print(differences_as_text(a, b, about, found, len(pairs)))
    return 1 if about or found else 0


def told_apart(ours: Snapshot, theirs: Snapshot, by: str) -> dict[str, tuple[Any, Any]]:
    """What two states say of themselves and of their variables, where it differs."""
    states = (ours, theirs)
    facts: list[dict[str, Any]] = []
    names_of_counts = {"iterations": iterations, "calls": calls}
    if all(calls(state) in (None, iterations(state)) for state in states):
        del names_of_counts["calls"]  # which would say it twice
    for state in states:
        counts = {name: count(state) for name, count in names_of_counts.items()}
        facts.append({"class": state.kind, "generation": state.generation})
        facts[-1] |= {name: count for name, count in counts.items() if count is not None}
        facts[-1] |= flat({**state.settings, **matching.meaning(state)})
    names = dict.fromkeys([*facts[0], *facts[1]])
    # What a file does not tell, or another generation does not have, is no difference.
    if not all(map(tells_settings, states)) or ours.generation != theirs.generation:
        names = {name: None for name in names if name in facts[0] and name in facts[1]}
    pairs = {name: (facts[0].get(name), facts[1].get(name)) for name in names}
    for one, other in measures.partners(ours, theirs, by):
        if one is not None and other is not None:
            pairs[f"dtype of {one.name}"] = one.dtype, other.dtype
            pairs[f"extension of {one.name}"] = one.extension, other.extension
        else:  # its slots are missing, too, if it has any
            name = next(each.name for each in (one, other) if each is not None)
            pairs[f"variable {name}"] = one is not None, other is not None
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def as_difference(difference: Difference) -> dict[str, Any]:
    """A row of the table for JSON."""
    place, *sides = difference.pair
    return {
        **place._asdict(),
        "problem": difference.problem or None,
        "relative": difference.relative,
        "largest": difference.largest,
        "elements": difference.elements,
        "forms": [
            None if side is None else {"shape": list(side.shape), "dtype": side.dtype}
            for side in sides
        ],
    }


def differences_as_text(
    a: Path,
    b: Path,
    about: Mapping[str, tuple[Any, Any]],
    found: Sequence[Difference],
    count: int,
) -> str:
    """What `omniadam diff` says."""
    if not about and not found:
        return f"{a} and {b} do not differ: {counted(count, 'tensor')} compared."
    lines = [f"A  {a}", f"B  {b}"]
    if about:
        cells = [[name, as_value(one), as_value(other)] for name, (one, other) in about.items()]
        lines += ["", *table(["", "A", "B"], cells, left=3)]
    if found:
        lines += [
            "",
            *table(
                ["tensor", "relative", "largest", "elements", ""],
                [as_row(difference) for difference in found],
                left=1,
                last_is_left=True,
            ),
        ]
    lines += ["", f"{len(found)} of {counted(count, 'tensor')} differ."]
    return "\n".join(lines)


def as_row(difference: Difference) -> list[str]:
    """A row of the table."""
    (place, ours, theirs), problem = difference.pair, difference.problem
    if ours is None or theirs is None:
        return [place.tensor, "-", "-", "-", f"only in {'B' if ours is None else 'A'}"]
    if problem == "shape":
        what = f"{as_shape(ours.shape)} in A, {as_shape(theirs.shape)} in B"
        return [place.tensor, "-", "-", "-", what]
    return [
        place.tensor,
        f"{difference.relative:.3g}",
        f"{difference.largest:.3g}",
        f"{difference.elements} of {math.prod(ours.shape)}",
        f"{ours.dtype} in A, {theirs.dtype} in B" if problem else "",
    ]


# --- convert ---


def add_convert(commands: Any) -> None:
    """Add `omniadam convert`."""
    text = "Write the state of an optimizer to a file of another format, or into one that is there."
    parser = add(commands, "convert", text, FILES)
    parser.usage = "%(prog)s [options] IN OUT\n       %(prog)s [options] IN --into FILE"
    parser.add_argument("source", type=Path, metavar="IN", help="File or folder to read.")
    parser.add_argument(
        "target",
        type=Path,
        metavar="OUT",
        nargs="?",
        help=f"File to write: {OURS}, .pt, or .dcp for a folder of torch.distributed.checkpoint.",
    )
    parser.add_argument(
        "--into",
        type=Path,
        metavar="FILE",
        help="File whose optimizer is replaced, and nothing else: .keras, .weights.h5, a "
        "checkpoint of TensorFlow, a folder of orbax.",
    )
    parser.add_argument("--key", help=KEY.format("IN"))
    add_setting(parser, "IN")
    parser.add_argument("--into-key", metavar="KEY", help=KEY.format("FILE"))
    parser.add_argument(
        "--as",
        dest="kind",
        metavar="CLASS",
        help=AS.format("it"),
    )
    parser.add_argument(
        "--by", choices=["name", "position"], default="name", help=f"With --into. {BY}"
    )
    parser.add_argument("--overwrite", action="store_true", help="Replace OUT if it is there.")

    def run(target: Path | None, into: Path | None, overwrite: bool, **options: Any) -> None:
        if (target is None) == (into is None):
            parser.error("Give OUT, or --into FILE: one of them.")
        if into is not None and overwrite:
            parser.error("--overwrite is for OUT: a part of FILE is replaced in any case.")
        convert(target=target, into=into, overwrite=overwrite, **options)

    run_by(parser, run)


def convert(
    source: Path,
    target: Path | None,
    into: Path | None,
    key: str | None,
    settings: Settings,
    into_key: str | None,
    kind: str | None,
    by: str,
    overwrite: bool,
) -> None:
    """Write what was read to `target`, or into `into`."""
    if target is not None and target.exists() and not overwrite:
        raise Failed(printable(f"{target} is there already: --overwrite replaces it"))
    snapshot = read(source, key, settings, kind)
    written = target or into
    assert written is not None
    with (
        named(written, source),
        progress(bytes_in(snapshot), f"writing {written.name}") as told,
    ):
        given = watched(snapshot, told)
        if target is not None and target.suffix == OURS:
            file.write(target, given)
        else:
            with other_formats() as formats:
                if target is not None:
                    formats.write(given, target)
                else:
                    formats.write_into(given, into, into_key, by)
    count = iterations(snapshot)
    print(
        f"{written}: {counted(len(snapshot.variables), 'variable')}"
        + ("" if count is None else f" after {counted(count, 'iteration')}")
    )
    if not tells_settings(snapshot):
        print(
            f"Note: {source} does not tell all settings, and {written} has what it and --setting "
            "say.",
            file=sys.stderr,
        )


# --- as text ---


def as_json(value: Any) -> str:
    """In lines; null stands for what is not finite, which JSON has not."""
    return json.dumps(_finite(value), indent=2, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def counted(number: int, what: str) -> str:
    """So many of them."""
    return f"{number} {what}{'s' * (number != 1)}"


def as_value(value: Any) -> str:
    """A setting."""
    if isinstance(value, list) and len(value) > MANY:
        return f"{json.dumps(value[:MANY])} and {len(value) - MANY} more"
    return value if isinstance(value, str) else json.dumps(value)


def as_shape(shape: tuple[int, ...]) -> str:
    """A shape without spaces."""
    return str(shape).replace(" ", "")


def printable(text: str) -> str:
    """What a file may contain in names, and a terminal would take for a command, is escaped."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def listed(items: Mapping[str, Any]) -> list[str]:
    """Names and values, each in a line."""
    items = {printable(name): printable(str(value)) for name, value in items.items()}
    width = max(map(len, items), default=0)
    return [f"  {name:{width}}  {value}" for name, value in items.items()]


def table(
    headings: Sequence[str],
    rows: Sequence[Sequence[str]],
    left: int,
    last_is_left: bool = False,
) -> list[str]:
    """Rows in columns as wide as what is in them, the first `left` of which begin at the left."""
    whole = [headings, *([printable(cell) for cell in row] for row in rows)]
    widths = [max(len(row[i]) for row in whole) for i in range(len(headings))]
    is_left = [i < left or (last_is_left and i == len(widths) - 1) for i in range(len(widths))]
    return [
        "  ".join(
            cell.ljust(width) if begins else cell.rjust(width)
            for cell, width, begins in zip(row, widths, is_left, strict=True)
        ).rstrip()
        for row in whole
    ]

"""Rows that are brought up to date when they are used: exact sparse steps at the rows' own cost.

A step with a sparse gradient moves every row, by its momentum. Here it moves the rows that have a
gradient, and notes the numbers it was made with; a row catches up when it is used next. Each step
that it missed is then made on it, in order, with the numbers that it had: the same operations in
the same order, so the same bits as if no step had been put off.

Catching up ends early where what is left could change no bit. For a step with a gradient of zero,
and 0 <= weight <= 1 of each mean:

- A row whose momentum and velocity are +0 stays as it is, if epsilon is not zero.
- |m| and v never grow: m + (0 - m) * weight lies between 0 and m, and so does its rounding. An
  update is therefore at most A |m| / (sqrt(L) + E), by the largest alpha A and the smallest epsilon
  E of all steps noted and a bound L <= v of the velocity after them. What is a quarter of the
  distance between two floats at w, or less, leaves w as it is, and so do all steps after it.
- m and v depend on themselves alone. Where a step leaves m as it is, and the weights do not change,
  so do all others; then v likewise. (Float32 stops at denormal numbers, not at zero.)
"""

from __future__ import annotations

import math
from array import array
from functools import cache
from operator import setitem
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from .. import rule as arithmetic
from ..rule import Pass, PassCoefficients, Rule, make_adam
from . import cpu, jit
from .cpu import ARITHMETIC, HELPERS, PASS_C, STORAGE, SparseRows, Sums, Team, Work
from .layout import Operand, narrowed, on_numpy, widened

Array = npt.NDArray[Any]

# A noted step, in doubles: the four coefficients of Adam, decay, factor, and two to spare.
_ALPHA, _WEIGHT_1, _WEIGHT_2, _EPSILON, _DECAY, _FACTOR = range(6)
NOTED = 8
# What holds for all noted steps: the largest alpha, the smallest epsilon, what part of a velocity a
# step leaves at least, whether rows may rest at all, and whether weights were the same.
_LARGEST, _SMALLEST, _LEFT, _RESTS, _STEADY = range(5)
_BOUNDS = 5

# Words of a job, after those that every kernel has.
(
    _HISTORY,
    _FIRST,
    _BEFORE,
    _NOW,
    _ROWS,
    _ROW_COUNT,
    _WIDTH,
    _STREAMS,
    _SEEN,
    _VALUES,
    _BY,
    _FRESH,
) = range(cpu.WORDS, cpu.WORDS + 12)
_ALL_WORDS = cpu.WORDS + 12

# Elements of rows that one thread takes at a time.
_TOGETHER = 2048
# Steps between two looks at whether a row rests.
_LOOK = 8
# Steps of m and v that are made while they are in registers.
_AT_ONCE = 8
# Bits of the significand of what is stored.
_PRECISION = {"float32": 24, "float64": 53, "float16": 11, "bfloat16": 8}
# A history is not let grow beyond this, of 64 bytes a step.
MOST_STEPS = 1 << 20


def is_deferrable(kind: Pass, rule: Rule) -> bool:
    """Whether a step can be put off for rows without a gradient."""
    settings = dict(rule.settings)
    return (
        rule.make is make_adam
        and not (settings.get("nesterov") or settings.get("rooted"))
        and kind.gradient
        and kind.updates
        and not (kind.accumulated or kind.averaged or kind.overwritten or kind.measured)
    )


def _after(njit: Any, first: Any, second: Any) -> Any:
    return njit(
        lambda slots, zero, rule_c, c: second(first(slots, zero, rule_c, c), zero, rule_c, c)
    )


def _twice(njit: Any, steps: Any) -> Any:
    return _after(njit, steps, steps)


def _build(kind: Pass, rule: Rule, dtype: str, gradient_dtype: str) -> Any:
    """The kernel that brings rows up to date and, where they have a gradient, makes their step."""
    import numba

    p = cpu._primitives()
    stored, read = STORAGE[dtype], STORAGE[gradient_dtype]
    real, double = np.dtype(ARITHMETIC[dtype]).type, np.float64
    stored_type, read_type = numba.from_dtype(np.dtype(stored)), numba.from_dtype(np.dtype(read))
    real_type, row_type = numba.from_dtype(np.dtype(real)), numba.uint32
    bits_type = numba.int64 if real is np.float64 else numba.int32
    stored_size, read_size = np.dtype(stored).itemsize, np.dtype(read).itemsize
    real_size = np.dtype(real).itemsize
    int64, float64, view, to_pointer = p.int64, p.float64, p.view, p.to_pointer
    fetch_add = p.fetch_add

    functions = cpu._functions(p)
    widen, narrow, rounded = cpu._conversions(p, dtype)
    widen_gradient, _, _ = cpu._conversions(p, gradient_dtype)
    is_half = dtype != ARITHMETIC[dtype]
    gradient = p.njit(arithmetic.make_gradient(kind, functions))
    update = cpu._update(p, rule)
    element = p.njit(arithmetic.make_element(kind, update, gradient, functions, rounded))
    has_hat = len(rule.slots) == 3
    may_rest = not (kind.decayed or kind.penalised)
    quarter, margin = double(2.0 ** -(_PRECISION[dtype] + 2)), double(1.0 + 2.0**-20)
    # The least float there is, and more than rounding can take from a velocity of such floats.
    least = double(2.0**-149 if real is np.float32 else 2.0**-1074)
    lost = double(2.0**-120 if real is np.float32 else 2.0**-1000)
    nought = int64(0)

    @p.njit
    def coefficients_of(noted: Any, pass_c: Any) -> Any:
        rule_c = (
            real(noted[_ALPHA]),
            real(noted[_WEIGHT_1]),
            real(noted[_WEIGHT_2]),
            real(noted[_EPSILON]),
        )
        scale, steps, clip, _, momentum, fresh, overwrite, zero = pass_c
        decay = real(noted[_DECAY])
        return rule_c, (scale, steps, clip, decay, momentum, fresh, overwrite, zero)

    @p.njit
    def slots_at(m: Any, v: Any, hat: Any, i: int) -> Any:
        return (m[i], v[i], hat[i]) if has_hat else (m[i], v[i])

    @p.njit
    def one_step(slots: Any, zero: Any, rule_c: Any, pass_c: Any) -> Any:
        return element(zero, zero, slots, zero, zero, zero, rule_c, pass_c)[1]

    two_steps = _twice(p.njit, one_step)
    three_steps = _after(p.njit, two_steps, one_step)
    most_steps = _after(p.njit, _twice(p.njit, two_steps), three_steps)  # seven

    @p.njit
    def put(m: Any, v: Any, hat: Any, i: int, slots: Any) -> None:
        m[i], v[i] = slots[0], slots[1]
        if has_hat:
            hat[i] = slots[2]

    @p.njit
    def is_untouched(n: int, row: Any, at: int, w: Any) -> Any:
        found = bits_type(0)
        for k in range(len(rule_slots)):
            bits = view(to_pointer(row[k + 1] + at, bits_type), (n,))
            for i in range(n):
                found |= bits[i]
        if is_half:  # a NaN would be stored in another form
            for i in range(n):
                x = widen(w[i])
                if x != x:
                    found |= bits_type(1)
        return found == 0

    rule_slots = tuple(range(len(rule.slots)))

    @p.njit
    def left_after(left: Any, steps: int) -> Any:
        result, factor = double(1.0), left
        while steps > 0:
            if steps & 1:
                result *= factor
            factor *= factor
            steps >>= 1
        return result

    @p.njit
    def is_at_rest(n: int, w: Any, m: Any, v: Any, by: Any, steps: int) -> Any:
        left = left_after(by[_LEFT], steps)
        largest, smallest = by[_LARGEST], by[_SMALLEST]
        moving = 0
        for i in range(n):
            velocity = double(v[i]) * left - lost
            velocity = velocity if velocity > 0 else double(0.0)
            product = largest * abs(double(m[i])) + (least if m[i] != 0 else double(0.0))
            bound = product * margin / (math.sqrt(velocity) + smallest)
            moving += 0 if bound <= quarter * abs(double(widen(w[i]))) else 1
        return moving == 0

    def kernel(job: int) -> Any:
        j = view(to_pointer(job, int64), (_ALL_WORDS,))
        count = j[cpu.COUNT]
        while True:
            k = fetch_add(job + 8 * cpu.NEXT, 1)
            if k >= count:
                break
            c = view(to_pointer(j[cpu.COEFFICIENTS], float64), (PASS_C,))
            pass_c = (
                real(c[0]), real(c[1]), real(c[2]), real(c[3]),
                real(c[4]), real(c[5]), real(c[6]), real(c[7]),
            )  # fmt: skip
            zero = pass_c[7]
            first, before, now, n = j[_FIRST], j[_BEFORE], j[_NOW], j[_WIDTH]
            row = view(to_pointer(j[_STREAMS], int64), (4,))
            by = view(to_pointer(j[_BY], float64), (_BOUNDS,))
            rests = may_rest and by[_RESTS] != 0
            steady = by[_STEADY] != 0
            per = max(_TOGETHER // max(n, 1), 1)
            for place in range(k * per, min((k + 1) * per, j[_ROW_COUNT])):
                r = nought + place
                if j[_ROWS] != 0:
                    r = view(to_pointer(j[_ROWS] + 8 * place, int64), (1,))[0]
                seen = view(to_pointer(j[_SEEN] + 4 * r, row_type), (1,))
                w = view(to_pointer(row[0] + r * n * stored_size, stored_type), (n,))
                at = r * n * real_size
                m = view(to_pointer(row[1] + at, real_type), (n,))
                v = view(to_pointer(row[2] + at, real_type), (n,))
                hat = view(to_pointer(row[3] + at, real_type), (n,))
                s = int64(seen[0])
                if s == 0 and rests and j[_FRESH] != 0:
                    if j[_VALUES] == 0:
                        continue
                    s = before
                s = max(s, first)
                if s < before and rests and is_untouched(n, row, at, w):
                    s = before
                looked, is_moving = nought, True
                while s < before and is_moving:
                    noted = view(to_pointer(j[_HISTORY] + 64 * (s - first), float64), (NOTED,))
                    rule_c, each_c = coefficients_of(noted, pass_c)
                    factor = real(noted[_FACTOR])
                    for i in range(n):
                        new_w, slots, _, _ = element(
                            widen(w[i]), zero, slots_at(m, v, hat, i), zero, zero, factor,
                            rule_c, each_c,
                        )  # fmt: skip
                        put(m, v, hat, i, slots)
                        w[i] = narrow(new_w)
                    s += 1
                    looked += 1
                    if rests and looked >= _LOOK:
                        looked = nought
                        is_moving = not is_at_rest(n, w, m, v, by, before - s)
                # w rests: m and v go on by themselves, until m rests, too, and then v alone. Their
                # weights stay the same, mostly: then several steps are made while they are at hand.
                is_moving = steady
                if s < before:
                    noted = view(to_pointer(j[_HISTORY] + 64 * (s - first), float64), (NOTED,))
                    rule_c, each_c = coefficients_of(noted, pass_c)
                    while s + _AT_ONCE <= before and is_moving:
                        changed = nought
                        for i in range(n):
                            last = most_steps(slots_at(m, v, hat, i), zero, rule_c, each_c)
                            slots = one_step(last, zero, rule_c, each_c)
                            changed += 1 if slots[0] != last[0] else 0
                            m[i], v[i] = slots[0], slots[1]
                        s += _AT_ONCE
                        is_moving = changed != 0
                    is_resting = steady and not is_moving
                    is_moving = is_resting
                    while s + _AT_ONCE <= before and is_moving:
                        changed = nought
                        for i in range(n):
                            last = most_steps(slots_at(m, v, hat, i), zero, rule_c, each_c)
                            slots = one_step(last, zero, rule_c, each_c)
                            changed += 1 if slots[1] != last[1] else 0
                            v[i] = slots[1]
                        s += _AT_ONCE
                        is_moving = changed != 0
                    if is_resting and not is_moving:
                        s = before
                while s < before:
                    noted = view(to_pointer(j[_HISTORY] + 64 * (s - first), float64), (NOTED,))
                    rule_c, each_c = coefficients_of(noted, pass_c)
                    for i in range(n):
                        slots = one_step(slots_at(m, v, hat, i), zero, rule_c, each_c)
                        m[i], v[i] = slots[0], slots[1]
                    s += 1
                if j[_VALUES] != 0:
                    noted = view(to_pointer(j[_HISTORY] + 64 * (before - first), float64), (NOTED,))
                    rule_c, each_c = coefficients_of(noted, pass_c)
                    factor = real(noted[_FACTOR])
                    g = view(to_pointer(j[_VALUES] + place * n * read_size, read_type), (n,))
                    for i in range(n):
                        new_w, slots, _, _ = element(
                            widen(w[i]), real(widen_gradient(g[i])), slots_at(m, v, hat, i),
                            zero, zero, factor, rule_c, each_c,
                        )  # fmt: skip
                        put(m, v, hat, i, slots)
                        w[i] = narrow(new_w)
                seen[0] = row_type(now)
            fetch_add(job + 8 * cpu.DONE, 1)
        return fetch_add(job + 8 * cpu.DONE, 0)

    return kernel


@cache
def _kernel(kind: Pass, rule: Rule, dtype: str, gradient_dtype: str) -> jit.Kernel:
    return jit.compiled(
        lambda: _build(kind, rule, dtype, gradient_dtype),
        repr((__name__, kind, rule.identity, dtype, gradient_dtype)),
        (
            jit.source_of(__name__),
            jit.source_of(cpu.__name__),
            jit.source_of(arithmetic.__name__),
            jit.source_of(rule.make.__module__),
        ),
        frozenset(),
    )


# Words of a job that sums rows.
_OF, _ORDER, _STARTS, _GROUPS, _WIDE, _TO = range(6)


def _build_sums(dtype: str) -> Any:
    import numba

    p = cpu._primitives()
    kind = numba.from_dtype(np.dtype(dtype))
    int64, view, to_pointer, size = p.int64, p.view, p.to_pointer, np.dtype(dtype).itemsize

    def kernel(job: int) -> Any:
        j = view(to_pointer(job, int64), (6,))
        n, groups = j[_WIDE], j[_GROUPS]
        starts = view(to_pointer(j[_STARTS], int64), (groups + 1,))
        order = view(to_pointer(j[_ORDER], int64), (starts[groups],))
        for k in range(groups):
            to = view(to_pointer(j[_TO] + k * n * size, kind), (n,))
            first = view(to_pointer(j[_OF] + order[starts[k]] * n * size, kind), (n,))
            for i in range(n):
                to[i] = first[i]
            for place in range(starts[k] + 1, starts[k + 1]):
                more = view(to_pointer(j[_OF] + order[place] * n * size, kind), (n,))
                for i in range(n):
                    to[i] += more[i]
        return groups

    return kernel


@cache
def _sums_kernel(dtype: str) -> jit.Kernel:
    sources = jit.source_of(__name__), jit.source_of(cpu.__name__)
    return jit.compiled(
        lambda: _build_sums(dtype), repr((__name__, "sums", dtype)), sources, frozenset()
    )


def sums_of_rows(
    values: Array, order: npt.NDArray[np.int64], starts: npt.NDArray[np.int64]
) -> Array:
    """The sums of groups of rows, each in order.

    Args:
        values: floats of shape `(n, *row)`.
        order: the n rows, group by group.
        starts: where in `order` each group begins, and where the last one ends.
    """
    groups = len(starts) - 1
    if groups == len(order):
        return np.ascontiguousarray(values[order])
    is_native = values.dtype in (np.float32, np.float64) and values.dtype.isnative
    is_plain = is_native and values.flags.c_contiguous and values.flags.aligned
    if not (is_plain and cpu.available()):
        sums = values[order[starts[:-1]]]
        is_more = np.ones(len(order), bool)
        is_more[starts[:-1]] = False
        groups_of = np.repeat(np.arange(groups), np.diff(starts))
        np.add.at(sums, groups_of[is_more], values[order[is_more]])
        return np.ascontiguousarray(sums)
    sums = np.empty((groups, *values.shape[1:]), values.dtype)
    width = math.prod(values.shape[1:])
    places = (each.ctypes.data for each in (values, order, starts))
    job, found = array("q", [*places, groups, width, sums.ctypes.data]), array("q", [0])
    _sums_kernel(values.dtype.name)(found.buffer_info()[0], 0, job.buffer_info()[0])
    return sums


class Log(NamedTuple):
    """The steps that some rows have not made yet, all of one kind."""

    kind: Pass
    rule: Rule
    operand: Operand
    held: Any  # what must live for that
    first: int  # the number of the first of them
    history: npt.NDArray[np.float64]  # a row a step
    by: npt.NDArray[np.float64]  # what holds for all of them


class Clock:
    """Up to which step each row of a variable has come, and the numbers of the steps since.

    Args:
        rows: how many rows there are.
        turn: the lock of whoever steps the variable.
        team: who shares large work.
    """

    def __init__(self, rows: int, turn: Any, team: Team = HELPERS) -> None:
        # 0 of those that never had a gradient, while `is_fresh`: their moments are zero.
        self.seen: npt.NDArray[np.uint32] = np.zeros(rows, np.uint32)
        self.is_fresh = True
        self.steps = 0  # that were made
        # A step that is only prepared changes nothing of it: another thread's may come first.
        self._log: Log | None = None
        self._turn, self._team = turn, team

    @property
    def is_behind(self) -> bool:
        """Whether there may be rows that have not come to the last step."""
        return self._log is not None and self._log.first < self.steps

    @property
    def waiting(self) -> int:
        """How many steps are noted for rows that may not have made them."""
        return 0 if self._log is None else self.steps - self._log.first

    def add_step(
        self,
        work: Work,
        kind: Pass,
        rule: Rule,
        operand: Operand,
        held: Any,
        gradient: SparseRows,
        gradient_dtype: str,
        factor: float,
        coefficients: array[float],
    ) -> None:
        """Make a step part of what is done as a whole; the rows without a gradient put it off."""
        full = self.waiting >= MOST_STEPS or self.steps >= 2**32 - 2
        if self._log is not None and (full or not _is_like(self._log, kind, rule, operand)):
            self.flush()
        if self.steps >= 2**32 - 2:  # seen counts no further
            with self._turn:
                self.seen[:], self.steps, self._log, self.is_fresh = 0, 0, None, False
        noted = np.zeros(NOTED)
        noted[:4] = coefficients[PASS_C:]
        noted[_DECAY] = coefficients[PassCoefficients._fields.index("decay")]
        noted[_FACTOR] = factor
        place, steps, log = self.waiting, self.steps, self._log
        history = np.zeros((64, NOTED)) if log is None else log.history
        if place >= len(history):
            history = np.concatenate([history, np.zeros_like(history)])
        bounds = self._bounds(noted, rule)
        log = Log(kind, rule, operand, held, steps - place, history, bounds)
        work.calls.append((setitem, history, place, noted))
        work.calls.append((setattr, self, "_log", log))
        rows, values = gradient
        self._add_rows(work, log, rows, values, gradient_dtype, coefficients)
        work.calls.append((setattr, self, "steps", steps + 1))

    def _bounds(self, noted: npt.NDArray[np.float64], rule: Rule) -> npt.NDArray[np.float64]:
        """What holds for the steps noted before and for one more."""
        alpha, weight_1, weight_2, epsilon = map(float, noted[:4])
        log = self._log if self.is_behind else None
        new = _new_bounds() if log is None else log.by.copy()
        new[_LARGEST] = max(new[_LARGEST], alpha)
        new[_SMALLEST] = min(new[_SMALLEST], epsilon)
        # Rounding takes no more than this of a normal float away.
        left = 0.0 if "short_2" in dict(rule.settings) else (1.0 - weight_2) * (1.0 - 2.0**-21)
        new[_LEFT] = min(new[_LEFT], max(left, 0.0))
        is_sound = bool(np.isfinite(noted).all()) and 0.0 <= alpha < 1e37 and epsilon > 1e-37
        if not (is_sound and 0.0 <= weight_1 <= 1.0 and 0.0 <= weight_2 <= 1.0):
            new[_RESTS] = 0.0
        if log is not None and not np.array_equal(noted[1:3], log.history[0, 1:3]):
            new[_STEADY] = 0.0
        return new

    def catch_up(self, rows: npt.NDArray[np.int64] | None = None) -> None:
        """Bring rows up to date: distinct ones, or all."""
        with self._turn:
            log = self._log
            if log is None or not self.is_behind:
                return
            work, numbers = Work(), array("d", PassCoefficients())
            self._add_rows(work, log, rows, None, log.operand.dtype, numbers)
            if rows is None:
                work.calls.append((setattr, self, "_log", log._replace(first=self.steps)))
            work.whole(work.do)

    def catch_up_with(self, ids: npt.NDArray[np.int64]) -> None:
        """Bring the rows of these numbers up to date; they may be repeated."""
        with self._turn:
            if self.is_behind:
                flat = ids.reshape(-1)
                late = flat[self.seen[flat] != self.steps]
                if late.size:
                    self.catch_up(np.unique(late))

    def flush(self) -> None:
        """Bring all rows up to date."""
        self.catch_up()

    def _add_rows(
        self,
        work: Work,
        log: Log,
        rows: npt.NDArray[np.int64] | None,
        values: Array | None,
        gradient_dtype: str,
        coefficients: array[float],
    ) -> None:
        operand, now = log.operand, self.steps + (values is not None)
        count = len(self.seen) if rows is None else len(rows)
        if count == 0:
            return
        width = operand.variable.size // len(self.seen)
        if not cpu.available():
            work.add_python(self._on_numpy, log, rows, values, gradient_dtype, coefficients, now)
            return
        kernel = _kernel(log.kind, log.rule, operand.dtype, gradient_dtype)
        streams = [operand.variable.address, *(slot.address for slot in operand.slots), 0]
        held = array("q", streams[:4])
        job = array("q", [0] * _ALL_WORDS)
        per = max(_TOGETHER // max(width, 1), 1)
        job[cpu.COUNT] = chunks = -(-count // per)
        job[cpu.COEFFICIENTS] = coefficients.buffer_info()[0]
        job[_HISTORY], job[_BY] = log.history.ctypes.data, log.by.ctypes.data
        job[_FIRST], job[_BEFORE], job[_NOW] = log.first, self.steps, now
        job[_ROWS] = 0 if rows is None else rows.ctypes.data
        job[_ROW_COUNT], job[_WIDTH] = count, width
        job[_STREAMS], job[_SEEN] = held.buffer_info()[0], self.seen.ctypes.data
        job[_FRESH] = self.is_fresh and operand.dtype == ARITHMETIC[operand.dtype]  # see is_half
        job[_VALUES] = 0 if values is None else values.ctypes.data
        all_held = log, rows, values, coefficients, held
        team = self._team
        if count * width < team.smallest >> 3 or (size := min(team.size(), chunks)) < 2:
            work.add_kernel(kernel, job, 0, all_held)
        else:
            team.add_to(work, kernel, job, size, all_held)

    def _on_numpy(
        self,
        log: Log,
        rows: npt.NDArray[np.int64] | None,
        values: Array | None,
        gradient_dtype: str,
        coefficients: array[float],
        now: int,
    ) -> None:
        kind, rule, operand = log.kind, log.rule, log.operand
        element = on_numpy(kind, rule, operand.dtype)
        shape = (len(self.seen), -1)
        w = operand.variable.array(STORAGE[operand.dtype]).reshape(shape)
        slots = [s.array(ARITHMETIC[operand.dtype]).reshape(shape) for s in operand.slots]
        every = np.arange(len(self.seen)) if rows is None else rows
        before = self.steps
        seen = self.seen[every].astype(np.int64)
        begun = np.maximum(seen, log.first)
        is_idle = np.zeros(len(every), bool)
        if self.is_fresh and log.by[_RESTS] and not (kind.decayed or kind.penalised):
            is_idle = seen == 0
            begun[is_idle] = before
        at_once = np.argsort(begun, kind="stable")
        order, begun = every[at_once], begun[at_once]
        pass_c = PassCoefficients(*coefficients[:PASS_C])

        def step(at: Any, g: Any, s: int) -> None:
            noted = log.history[s - log.first]
            new = element(
                widened(w[at], operand.dtype),
                g,
                tuple(slot[at] for slot in slots),
                None,
                None,
                float(noted[_FACTOR]),
                tuple(map(float, noted[:4])),
                pass_c._replace(decay=float(noted[_DECAY])),
            )
            w[at] = narrowed(new[0], operand.dtype)
            for slot, value in zip(slots, new[1], strict=True):
                slot[at] = value

        with np.errstate(all="ignore"):
            for s in range(int(begun[0]), before):
                at = order[: int(np.searchsorted(begun, s, "right"))]
                step(at, np.zeros((len(at), w.shape[1]), ARITHMETIC[operand.dtype]), s)
            if values is not None:
                real = ARITHMETIC[operand.dtype]
                g = widened(values.reshape(len(every), -1), gradient_dtype)
                step(every, g.astype(real, copy=False), before)
        self.seen[every if values is not None else every[~is_idle]] = now


class Step:
    """A step of a variable by some of its rows: see `Clock.add_step`."""

    def __init__(self, clock: Clock, *of: Any) -> None:
        self._clock, self._of = clock, of

    def add_to(self, work: Work, factors: array[float], coefficients: array[float]) -> Sums:
        """As `Sweep.add_to` for this variable."""
        add_step: Any = self._clock.add_step
        add_step(work, *self._of, factors[0] if factors else 1.0, coefficients)
        return list


def _is_like(log: Log, kind: Pass, rule: Rule, operand: Operand) -> bool:
    """Whether a step may be noted after others: of one kind, on the same memory."""
    own, other = log.operand, operand
    return (log.kind, log.rule, own.dtype, own.every()) == (kind, rule, other.dtype, other.every())


def _new_bounds() -> npt.NDArray[np.float64]:
    return np.array([0.0, math.inf, 1.0, 1.0, 1.0])

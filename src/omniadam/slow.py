"""What is said, once, where steps are slower than they could be and nobody chose that."""

from __future__ import annotations

import warnings

# The start of each warning, by which it is found and silenced.
_START = "omniadam is slow here"

# What was said in this process, in order; `omniadam.info` repeats it.
reasons: list[str] = []


def warn(reason: str) -> None:
    """Say once in a process why steps are slow: a RuntimeWarning. Results are the same.

    Args:
        reason: sentences that say what is missing, what it costs, and what helps if anything does.
    """
    if reason in reasons:
        return
    reasons.append(reason)  # before: where warnings are errors, the next step is made
    warnings.warn(
        f"{_START}: {reason} Results are the same. "
        f'To silence this: warnings.filterwarnings("ignore", "{_START}").',
        RuntimeWarning,
        stacklevel=2,
    )


def warn_gone(library: str, version: object, names: str, cost: str) -> None:
    """Say that names of a library, which are not public, are gone or mean something else.

    Args:
        library: its name.
        version: of it.
        names: what was tried, in words.
        cost: what is slower without it: the end of a sentence.
    """
    warn(
        f"{library} {version} lacks {names}, or it does something else than in the versions that "
        f"omniadam was tested with: {cost}. Another version of {library} or a newer omniadam helps."
    )

"""Errors a user can mend.

Every message is one line that names the thing, says what was found, what was expected, and how to mend it. The command line
prints it and exits 2; any other exception is a defect of ours and shows its traceback.
"""

import difflib
from collections.abc import Iterable


class RobopolicyError(Exception):
    """Root of all errors that the user can mend."""


class ConfigError(RobopolicyError):
    """A configuration key, value or type is wrong."""


class DataError(RobopolicyError):
    """A dataset is damaged, inconsistent, or lacks what was asked of it."""


class CheckpointError(RobopolicyError):
    """A checkpoint is damaged, foreign, or does not fit what it is loaded into."""


class TaskError(RobopolicyError):
    """A task (environment) is unknown, cannot be built, or was used against its declaration."""


class EvaluationError(RobopolicyError):
    """An evaluation cannot be run, read, or compared with another."""


def install(*extras: str) -> str:
    """How to get what is missing. Not by name from an index: nobody knows whose package that is."""
    return f"in the checkout of robopolicy, run: uv pip install -e '.[{','.join(extras)}]'"


def nearest(name: str, valid: Iterable[str]) -> str:
    """A sentence that names the valid entry closest to ``name``, or all of them when none is close."""
    options = sorted(valid)
    close = difflib.get_close_matches(name, options, n=1, cutoff=0.5)
    if close:
        return f"did you mean '{close[0]}'?"
    return f"valid: {', '.join(options)}." if options else "nothing is registered."

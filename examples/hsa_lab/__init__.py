"""What the commands of `examples` are made of: tasks, training, evaluation, benchmarks, and what these share."""

import sys


def _end_quietly(kind, error, trace) -> None:
    """The interrupt key ends a command without a word, also while it still imports what takes seconds to import."""
    if not issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, trace)


sys.excepthook = _end_quietly

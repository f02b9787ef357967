"""Everything that Louver refuses, as one tree.

    LouverError
    ├── InputError         what came in is wrong: mend the argument, file or image and run again
    │   ├── ConfigError    an experiment file or an option
    │   ├── DataError      images, labels or roles
    │   ├── WeightsError   a checkpoint that does not fit its model
    │   └── BundleError    an exported bundle, or one of its files
    ├── CutError           the network cannot be cut there: take one of the legal cuts that it lists
    ├── ThreatError        the threat model does not grant what the attack needs: grant it or drop the attack
    ├── AttackError        an attack broke (NaN, wrong shape): its result must not be read as privacy
    ├── CloudError         the cloud half gave no answer
    │   ├── CloudAwayError     not reached, too slow or too busy: the same request may be answered later
    │   ├── CloudRefusedError  it said no, or is not the one that it claims to be: mend what the message names
    │   └── AnswerError        it sent what is no answer (wrong shape, NaN, garbage): none of it was used
    ├── WorkerError        a process that shared in the work was lost: what was finished is kept, resume
    ├── BusyError          too much is under way or waiting already: let some of it end, or raise the bound
    ├── StorageError       the disk refused: what was finished is kept, free space and resume
    │   └── DamagedError       what is on it was cut short or changed since it was written
    └── MissingExtraError  an optional part is not installed: the message holds the command

Each message says what was expected, what came, and what to do. The command line prints it and exits with code 2.
"""

from __future__ import annotations

__all__ = [
    "AnswerError",
    "AttackError",
    "BundleError",
    "BusyError",
    "CloudAwayError",
    "CloudError",
    "CloudRefusedError",
    "ConfigError",
    "CutError",
    "DamagedError",
    "DataError",
    "InputError",
    "LouverError",
    "MissingExtraError",
    "StorageError",
    "ThreatError",
    "WeightsError",
    "WorkerError",
    "nearest",
]


class LouverError(Exception):
    """The root: `except LouverError` catches every refusal of this package."""


class InputError(LouverError, ValueError):
    """What came in is wrong; mend it and run again."""


class ConfigError(InputError):
    """An experiment file or an option is wrong."""


class DataError(InputError):
    """Images, labels or roles are wrong."""


class WeightsError(InputError):
    """A checkpoint does not fit its model, or is not a checkpoint."""


class BundleError(InputError):
    """A bundle is missing, damaged, changed, or not the one that was asked for."""


class CutError(LouverError, ValueError):
    """The network cannot be cut at that point; the message lists the nearest that can."""


class ThreatError(LouverError, ValueError):
    """The threat model does not grant what the attack needs."""


class AttackError(LouverError, RuntimeError):
    """An attack broke; a broken attack is never reported as a good defense."""


class WorkerError(LouverError, RuntimeError):
    """A process that shared in the work was lost; what was finished is kept."""


class CloudError(LouverError, RuntimeError):
    """The cloud half gave no answer."""


class CloudAwayError(CloudError):
    """The cloud was not reached, or was too slow or too busy; the same request may be answered later."""


class CloudRefusedError(CloudError):
    """The cloud said no (token, budget, version, size), or is not the one that it claims to be."""


class AnswerError(CloudError):
    """The cloud sent what is no answer to the request; none of it was used."""


class BusyError(LouverError, RuntimeError):
    """A bound on what may be under way or waiting at once was reached; nothing was taken on."""


class StorageError(LouverError, OSError):
    """The disk refused; what was finished before is kept."""


class DamagedError(StorageError):
    """What is on the disk was cut short or changed since it was written."""


class MissingExtraError(LouverError, ImportError):
    """An optional part of Louver is not installed."""


def nearest(wrong: str, legal: list[str], *, most: int = 3) -> str:
    """A phrase for the end of a message: the legal names closest to `wrong`, or all of them if none is close.

    >>> nearest("layer11", ["layer1", "layer2", "fc"])
    'nearest: layer1, layer2'
    >>> nearest("zzz", ["layer1", "fc"])
    'legal: layer1, fc'
    """
    import difflib

    close = difflib.get_close_matches(wrong, legal, n=most, cutoff=0.6)
    if close:
        return "nearest: " + ", ".join(close)
    shown = ", ".join(legal[:20]) + (f", … ({len(legal)} in all)" if len(legal) > 20 else "")
    return "legal: " + (shown or "none")

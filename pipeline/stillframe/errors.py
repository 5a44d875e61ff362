"""Exceptions that callers may want to distinguish; all others are built-in ones."""

import errno

_NO_SPACE_OR_PERMISSION = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM}
GONE = {errno.ESTALE, errno.ENOTCONN, errno.EHOSTDOWN, errno.ETIMEDOUT, errno.ENODEV}
"""Values of ``errno`` that mean that a whole file system cannot be reached any more."""


def hopeless(error: BaseException) -> bool:
    """Return True for errors that would hit every other unit as well.

    Those are: disk full, no permission, input or output gone, lease lost.

    Examples
    --------
    >>> hopeless(OSError(errno.ENOSPC, "No space left on device")), hopeless(ValueError())
    (True, False)
    """
    if isinstance(error, (InputLost, OutputLost, LeaseError)):
        return True
    return isinstance(error, OSError) and error.errno in _NO_SPACE_OR_PERMISSION | GONE


class LeaseError(RuntimeError):
    """Another driver holds the lease of the output folder."""


class OtherVersion(ValueError):
    """Another version of this package wrote a file, in a format that this version cannot read."""


class RunStopped(RuntimeError):
    """The run cannot go on now; finished units are kept."""


class WorkerUnfit(RunStopped):
    """A worker lacks what a run needs: equal package versions, the folders of the run, a correct clock."""


class InputLost(OSError):
    """The array of frames as a whole vanished while it was being read."""


class OutputLost(OSError):
    """The output folder vanished while results were being written."""

"""Errors that callers may want to tell apart; everything else is a built-in one."""

import errno

_HOPELESS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM}
GONE = {errno.ESTALE, errno.ENOTCONN, errno.EHOSTDOWN, errno.ETIMEDOUT, errno.ENODEV}
"""What a file system says that is not there any more."""


def hopeless(error: BaseException) -> bool:
    """Tell whether every further unit would meet the same: no space, no permission, no input, another driver.

    Examples
    --------
    >>> hopeless(OSError(errno.ENOSPC, "No space left on device")), hopeless(ValueError())
    (True, False)
    """
    if isinstance(error, (InputLost, OutputLost, LeaseError)):
        return True
    return isinstance(error, OSError) and error.errno in _HOPELESS | GONE


class LeaseError(RuntimeError):
    """Another driver works on this output."""


class NewerVersion(ValueError):
    """A newer version of this package wrote it."""


class RunStopped(RuntimeError):
    """The run cannot go on now; what is finished is kept."""


class WorkerUnfit(RunStopped):
    """A worker lacks what a run needs: the same packages, the same folders, a clock that is right."""


class InputLost(OSError):
    """The frames vanished as a whole while they were being read."""


class OutputLost(OSError):
    """The folder of the results vanished while it was being written."""

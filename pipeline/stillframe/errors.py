"""Errors that callers may want to tell apart; everything else is a built-in one."""

import errno

_HOPELESS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM}


def hopeless(error: BaseException) -> bool:
    """Tell whether every further unit would meet the same: no space, no permission.

    Examples
    --------
    >>> hopeless(OSError(errno.ENOSPC, "No space left on device")), hopeless(ValueError())
    (True, False)
    """
    return isinstance(error, OSError) and error.errno in _HOPELESS


class LeaseError(RuntimeError):
    """Another driver works on this output."""


class RunStopped(RuntimeError):
    """The run cannot go on now; what is finished is kept."""

"""Errors that callers may want to tell apart; everything else is a built-in one."""


class LeaseError(RuntimeError):
    """Another driver works on this output."""


class RunStopped(RuntimeError):
    """The run cannot go on now; what is finished is kept."""

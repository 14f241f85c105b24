"""The two exceptions that end a command with one line instead of a traceback; and the exit code of a run to be started
again."""

PREEMPTED = 75  # EX_TEMPFAIL in sysexits.h


class UserError(Exception):
    """A mistake in a flag, a config, a file or a folder.

    Commands print the message as one line and exit with code 2, without a traceback. The message names
    the field or file, the value that was seen, and what would be right.
    """


class Failure(Exception):
    """The run cannot go on, through no mistake in what was asked: a lost peer, a full disk, a diverged model.

    Commands print the message as one line and exit with code 1.
    """

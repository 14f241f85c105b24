"""The one exception that means "the user can mend this"."""


class UserError(Exception):
    """A mistake in a flag, a config, a file or a folder.

    Commands print the message as one line and exit with code 2, without a traceback. The message names
    the field or file, the value that was seen, and what would be right.
    """

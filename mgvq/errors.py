"""The one error that users are meant to see: a paragraph that names the value, the place and the fix."""


class UserError(ValueError):
    """Bad input. The commands print its text alone and exit with 2; everything else is a bug and keeps its traceback."""

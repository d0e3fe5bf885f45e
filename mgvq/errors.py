"""The one error that users are meant to see: a paragraph that names the value, the place and the fix."""


class UserError(ValueError):
    """Bad input. The commands print its text alone and exit with 2; everything else is a bug and keeps its traceback."""


class SharedFault(UserError):
    """A fault of the machine or of the results folder, which every other run would meet too: a full disk, a missing device.

    `MARK` ends what is told of it: by that a study knows, from the log of a run, that it need not start those that are left.
    """

    MARK = "Every other run would meet this too."

    def __str__(self) -> str:
        return f"{super().__str__()} {self.MARK}"

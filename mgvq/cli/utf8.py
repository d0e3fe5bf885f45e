"""Text is UTF-8 whatever the locale says: settings, paths, study files, and what the commands print."""

import locale
import os
import sys


def use_utf8() -> None:
    """Starts the command again, with the runs that it will start, in Python's UTF-8 mode where the locale has another encoding.

    By then Python has read the command line in that encoding: an umlaut of a path is no letter any more, and none can be printed.
    """
    if not sys.flags.utf8_mode and locale.getencoding().lower().replace("-", "") != "utf8":
        os.execve(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]], {**os.environ, "PYTHONUTF8": "1"})

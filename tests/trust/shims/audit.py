"""Notes in the file of `MGVQ_AUDIT` whom a process wants to reach and what it unpickles, a line each."""

import os
import socket
import sys
from typing import Any

VARIABLE = "MGVQ_AUDIT"


def listen() -> None:
    """From now on, in this process, where the variable is set."""
    if VARIABLE not in os.environ:
        return
    notes = os.open(os.environ[VARIABLE], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)

    def hear(event: str, given: tuple[Any, ...]) -> None:
        if event in ("socket.connect", "socket.sendto") and given[0].family != socket.AF_UNIX:
            os.write(notes, f"{event} {given[1]}\n".encode())
        elif event in ("socket.getaddrinfo", "socket.gethostbyname"):
            os.write(notes, f"{event} {given[0]}\n".encode())
        elif event == "pickle.find_class":
            os.write(notes, f"{event} {given[0]}.{given[1]} {_reader()}\n".encode())

    sys.addaudithook(hear)


def _reader() -> str:
    """The innermost code outside of Python's own that unpickles."""
    frame = sys._getframe(2)
    while frame.f_back and _is_pythons(frame.f_code.co_filename):
        frame = frame.f_back
    return frame.f_code.co_filename


def _is_pythons(file: str) -> bool:
    return "/lib/python3" in file and "/site-packages/" not in file

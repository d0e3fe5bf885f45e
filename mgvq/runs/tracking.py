"""Tells a tracker of finished runs, each once."""

import logging

from mgvq.runs.store import RunFolder
from mgvq.tracker import Tracker

# In the run folder, after DONE and no part of it: a line a place that has been told. Delete it to tell all again.
MARK = "TRACKED"
log = logging.getLogger(__name__)


def track(tracker: Tracker, folder: RunFolder) -> None:
    """Tells the tracker of the run, unless its place has been told before. Any process may call it at any time after the run.

    Whatever goes wrong in a tracker ends here, as a warning: the run is finished, and the next call tries again.
    """
    mark = folder.path / MARK
    if mark.is_file() and tracker.place in mark.read_text(encoding="utf-8").splitlines():
        return
    try:
        tracker(folder.path)
        with mark.open("a", encoding="utf-8") as file:
            file.write(f"{tracker.place}\n")
    except Exception as error:
        retry = "The run is complete; the same command tells it again."
        log.warning("tracker %s has not got %s (%r). %s", type(tracker).__name__, folder.path, error, retry)

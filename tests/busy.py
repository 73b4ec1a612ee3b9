"""Work for other processes, which are to import nothing else for it."""

import time


def spin(seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        pass

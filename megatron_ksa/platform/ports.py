"""Ports for processes that meet on one machine."""

import random
import socket

# Below the range from which Linux and other systems give ports to outgoing connections (32768 or 49152 and up): a port
# from there may be taken by any connection between its choice and its use, which is seconds later in another process.
FIRST, LAST = 15000, 32000
ATTEMPTS = 100


def free_port() -> int:
    """A TCP port of this machine that nobody listens on and that no outgoing connection will take.

    Raises:
        OSError: no free port was found.
    """
    numbers = random.SystemRandom()
    for _ in range(ATTEMPTS):
        port = numbers.randrange(FIRST, LAST)
        with socket.socket() as candidate:
            try:
                candidate.bind(("", port))
            except OSError:
                continue
        return port
    raise OSError(f"none of {ATTEMPTS} ports between {FIRST} and {LAST} is free")

"""Ends a rank once another one has ended: a rank that waits for it would wait for hours.

Every rank holds a connection to the first. The system closes it when a process ends, however it does: then the first rank ends,
and with it all others. A machine that is gone answers no more probes of the connection.
"""

import os
import secrets
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

ENDED = (
    "another process of this run ended before the run did; what was finished is kept, rerun the same command to go on"
)
# seconds after which all have to be there
_MEETING = 300.0
# seconds that a rank has to end by itself, with an error of its own
_GRACE = 1.0
# after 5 seconds of silence 3 probes, 5 seconds apart
_PROBES = {"TCP_KEEPIDLE": 5, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3}
_DONE = b"."


@contextmanager
def watched(
    rank: int, size: int, tell: Callable[[tuple[int, bytes] | None], tuple[int, bytes] | None]
) -> Iterator[threading.Event]:
    """A context after which all ranks may end, and before whose end none may: then this process exits with code 1.

    tell: gives all ranks what the first one says. Yields an event that is set as soon as another rank has ended.
    """
    lost, over = threading.Event(), threading.Event()
    links = _links(rank, size, tell)
    for link in links:
        threading.Thread(target=_watch, args=(link, lost, over), daemon=True).start()
    try:
        yield lost
        over.set()
        for link in links:
            with suppress(OSError):
                link.sendall(_DONE)
    finally:
        over.set()
        for link in links:
            # close() alone would wait for the thread that reads
            with suppress(OSError):
                link.shutdown(socket.SHUT_RDWR)
            link.close()


def _links(rank: int, size: int, tell: Callable[..., tuple[int, bytes] | None]) -> list[socket.socket]:
    """The connections of this rank: the first one's to all others, another one's to the first."""
    if rank:
        told = tell(None)
        assert told
        link = socket.create_connection((os.environ["MASTER_ADDR"], told[0]), timeout=_MEETING)
        link.sendall(told[1])
        return [_kept(link)]
    secret = secrets.token_bytes(16)
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    found: list[socket.socket] = []
    with socket.create_server(("", 0), family=family, dualstack_ipv6=both, backlog=size) as server:
        tell((server.getsockname()[1], secret))
        server.settimeout(_MEETING)
        while len(found) < size - 1:
            link, _ = server.accept()
            link.settimeout(_MEETING)
            # whoever does not know the secret is no rank
            if _received(link, len(secret)) == secret:
                found.append(_kept(link))
            else:
                link.close()
    return found


def _received(link: socket.socket, nbytes: int) -> bytes:
    found = b""
    while len(found) < nbytes and (more := link.recv(nbytes - len(found))):
        found += more
    return found


def _kept(link: socket.socket) -> socket.socket:
    link.settimeout(None)
    link.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _PROBES.items():
        if hasattr(socket, name):
            link.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    return link


def _watch(link: socket.socket, lost: threading.Event, over: threading.Event) -> None:
    try:
        said = link.recv(len(_DONE))
    except OSError:
        said = b""
    if said == _DONE or over.is_set():
        return
    lost.set()
    # where the same error ends all ranks, each says it itself
    if over.wait(_GRACE):
        return
    with suppress(OSError):
        print(f"error: {ENDED}", file=sys.stderr, flush=True)
    # the main thread may be in a product or a message for minutes; files are written beside their place, so none is left half
    os._exit(1)

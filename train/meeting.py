"""Waits for every host before JAX does: where one never arrives, JAX ends the process without saying which.

The first host listens at the coordinator's address, where JAX's service will be afterwards; the others say their number
and are told to go on, or whom it waited for in vain.
"""

import contextlib
import socket
import time

GO = b"go"
AGAIN = 0.1  # seconds between tries to reach the first host


def wait(address: str, count: int, number: int, seconds: float) -> None:
    """Returns when all hosts are there.

    Args:
      address: "host:port" of the first one.
      count: how many there are.
      number: of this one, from 0.
      seconds: to wait at most.

    Raises:
      ValueError: if the address has no port.
      TimeoutError: naming the hosts that did not come.
    """
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        raise ValueError(f"--coordinator={address}: give the first host and a free port of it, such as host0:1234")
    deadline = time.monotonic() + seconds
    missing = (
        _listen(int(port), count, deadline) if number == 0 else _call(host.strip("[]"), int(port), number, deadline)
    )
    if missing:
        raise TimeoutError(
            f"waited {seconds:g} s at {address} for {count} hosts, but not for {missing}: start it, see that it "
            "reaches that address, or wait longer with --arrival"
        )


def _listen(port: int, count: int, deadline: float) -> str:
    """Lets the others come; returns the numbers of those that did not."""
    there: dict[int, socket.socket] = {}
    with contextlib.ExitStack() as stack:
        listening = stack.enter_context(socket.create_server(("", port), backlog=count))
        while len(there) < count - 1 and (left := deadline - time.monotonic()) > 0:
            listening.settimeout(left)
            with contextlib.suppress(OSError, ValueError):  # of time, or of someone who is not one of them
                other = stack.enter_context(listening.accept()[0])
                other.settimeout(max(deadline - time.monotonic(), AGAIN))
                number = int(other.recv(32))
                if 0 < number < count:
                    there[number] = other
        missing = ", ".join(f"host {number}" for number in range(1, count) if number not in there)
        for other in there.values():
            with contextlib.suppress(OSError):
                other.sendall(missing.encode() or GO)
                other.recv(1)  # it hangs up first, and leaves the port free
    return missing


def _call(host: str, port: int, number: int, deadline: float) -> str:
    """Goes to the first one; returns which did not come."""
    while (left := deadline - time.monotonic()) > 0:
        with contextlib.suppress(OSError), socket.create_connection((host, port), timeout=left) as first:
            first.sendall(str(number).encode())
            first.settimeout(left + 60)  # it waits for others; only if it is gone no answer comes
            if answer := first.recv(4096):
                return "" if answer == GO else answer.decode()
        time.sleep(AGAIN)
    return "host 0"

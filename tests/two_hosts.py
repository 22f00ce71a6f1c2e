"""Two hosts on one machine: network namespaces joined by a virtual cable, each with a name, a shared memory and, for
the second one, a clock of its own. Needs root and Linux.

    host a  10.203.7.1  ---- veth ----  10.203.7.2  host b        no way to anywhere else
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

_NETWORK = "10.203.7"
CLOCK_AHEAD_S = 86_400
"""The monotonic clock of host b is ahead of that of host a."""


@dataclass(frozen=True)
class Host:
    """One of them.

    Attributes:
        name: its host name.
        address: its address.
        prefix: what a command on it begins with.
        cable: the namespace, and its end of the cable.
    """

    name: str
    address: str
    prefix: tuple[str, ...]
    cable: tuple[str, str]

    @contextlib.contextmanager
    def unplugged(self) -> Iterator[None]:
        """Nothing comes or goes any more, and nobody is told."""
        namespace, link = self.cable
        _ip("-n", namespace, "link", "set", link, "down")
        try:
            yield
        finally:
            _ip("-n", namespace, "link", "set", link, "up")


@contextlib.contextmanager
def two_hosts() -> Iterator[tuple[Host, Host]]:
    """Make them, and remove them at the end; skips the test where that cannot be done."""
    missing = [tool for tool in ("ip", "unshare", "mount", "hostname") if shutil.which(tool) is None]
    if os.geteuid() != 0 or missing:
        pytest.skip(f"network namespaces need root and {', '.join(missing) or 'ip, unshare and mount'}")
    names = [f"fw{os.getpid()}{letter}" for letter in "ab"]
    links = [f"fw{os.getpid()}v{k}" for k in range(2)]
    try:
        try:
            for name in names:
                _ip("netns", "add", name)
            _ip("link", "add", links[0], "netns", names[0], "type", "veth", "peer", "name", links[1], "netns", names[1])
        except subprocess.CalledProcessError as error:
            pytest.skip(f"no network namespaces here: {error.stderr.strip()}")
        for k, (name, link) in enumerate(zip(names, links, strict=True)):
            _ip("-n", name, "addr", "add", f"{_NETWORK}.{k + 1}/24", "dev", link)
            for device in ("lo", link):
                _ip("-n", name, "link", "set", device, "up")
        ahead = ["--time", f"--monotonic={CLOCK_AHEAD_S}", "--fork"]
        yield _host(names[0], links[0], "a", 1, []), _host(names[1], links[1], "b", 2, ahead)
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True, timeout=10)


def _host(namespace: str, link: str, letter: str, number: int, own: list[str]) -> Host:
    name, other = f"host-{letter}", "ba"["ab".index(letter)]
    # A host's own name leads to its loopback, as Debian writes it: no address to tell others.
    known = f"127.0.0.1 localhost\\n127.0.1.1 {name}\\n{_NETWORK}.{3 - number} host-{other}\\n"
    enter = ["ip", "netns", "exec", namespace, "unshare", "--uts", "--mount", *own, "--", "sh", "-c"]
    prepare = (
        f"hostname {name} && mount -t tmpfs tmpfs /dev/shm && printf '{known}' > /dev/shm/hosts && "
        'mount --bind /dev/shm/hosts /etc/hosts && exec "$@"'
    )
    return Host(name, f"{_NETWORK}.{number}", (*enter, prepare, "sh"), (namespace, link))


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True, timeout=10)

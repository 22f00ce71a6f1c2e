"""Two hosts on one machine: network namespaces joined by a virtual cable, each with a name, a shared memory and, for
the second one, a clock of its own. Needs root and Linux.

    host a  10.203.7.1  ---- veth ----  10.203.7.2  host b        no way to anywhere else

As a program it runs torchrun on both, over a cable of the wanted speed:

    python tests/two_hosts.py --rate-mbit 100 -- -m freewheel bench mlp --stages 2 --rows naive unlocked ddp
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

_NETWORK = "10.203.7"
_PORT = 29517
_CHECK_S = 2.0
_END_WITHIN_S = 40.0
CLOCK_AHEAD_S = 86_400
"""The monotonic clock of host b is ahead of that of host a."""


class NoNamespacesError(Exception):
    """They cannot be made here, and why."""


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

    def shape(self, rate_mbit: float) -> None:
        """Let no more than so many megabits a second out: a token bucket of 256 KiB, a queue of 0.4 s behind it."""
        namespace, link = self.cable
        bucket = ["tbf", "rate", f"{rate_mbit}mbit", "burst", "256kb", "latency", "400ms"]
        _run("ip", "netns", "exec", namespace, "tc", "qdisc", "replace", "dev", link, "root", *bucket)


@contextlib.contextmanager
def two_hosts() -> Iterator[tuple[Host, Host]]:
    """Make them, and remove them at the end.

    Raises:
        NoNamespacesError: they cannot be made here.
    """
    missing = [tool for tool in ("ip", "tc", "unshare", "mount", "hostname") if shutil.which(tool) is None]
    if os.geteuid() != 0 or missing:
        raise NoNamespacesError(f"network namespaces need root and {', '.join(missing) or 'ip, tc, unshare and mount'}")
    names = [f"fw{os.getpid()}{letter}" for letter in "ab"]
    links = [f"fw{os.getpid()}v{k}" for k in range(2)]
    try:
        try:
            for name in names:
                _ip("netns", "add", name)
            _ip("link", "add", links[0], "netns", names[0], "type", "veth", "peer", "name", links[1], "netns", names[1])
        except subprocess.CalledProcessError as error:
            raise NoNamespacesError(f"no network namespaces here: {error.stderr.strip()}") from error
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
    _run("ip", *arguments)


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=10)


# ---------------------------------------------------------------- as a program


def rate_mbit(sender: Host, receiver: Host, nominal_mbit: float) -> float:
    """Megabits a second of one plain TCP connection between them; takes about two seconds."""
    size = int(nominal_mbit * 1e6 / 8 * _CHECK_S)
    taking = subprocess.Popen(
        [*receiver.prefix, sys.executable, "-c", _TAKE, receiver.address], stdout=subprocess.PIPE, text=True
    )
    assert taking.stdout is not None
    port = taking.stdout.readline().strip()
    give = [*sender.prefix, sys.executable, "-c", _GIVE, receiver.address, port, str(size)]
    subprocess.run(give, check=True, timeout=10 * _CHECK_S)
    return float(taking.communicate(timeout=10 * _CHECK_S)[0])


_TAKE = """
import socket, sys, time
with socket.create_server((sys.argv[1], 0)) as server:
    print(server.getsockname()[1], flush=True)
    connection, _ = server.accept()
    first = len(connection.recv(1 << 20))
    begin, size = time.perf_counter(), 0
    while data := connection.recv(1 << 20):
        size += len(data)
    print(size * 8e-6 / (time.perf_counter() - begin))
"""
_GIVE = """
import socket, sys
with socket.create_connection((sys.argv[1], int(sys.argv[2]))) as connection:
    connection.sendall(bytes(int(sys.argv[3])))
"""


def torchrun_on_both(hosts: Sequence[Host], arguments: Sequence[str]) -> int:
    """Run it on both hosts, which meet at host a, in this folder; gives the worse of the two exit statuses."""
    path = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    env = {"TORCH_CPP_LOG_LEVEL": "ERROR", **os.environ, "PYTHONPATH": path}  # these hosts have no name service
    command = [sys.executable, "-m", "torch.distributed.run", f"--nnodes={len(hosts)}"]
    meet = [f"--master-addr={hosts[0].address}", f"--master-port={_PORT}"]
    programs: list[subprocess.Popen[bytes]] = []
    try:
        for index, host in enumerate(hosts):
            whole = [*host.prefix, *command, f"--node-rank={index}", *meet, *arguments]
            programs.append(subprocess.Popen(whole, env=env, start_new_session=True))
        return max(abs(program.wait()) for program in programs)
    finally:
        _end(programs)


def _end(programs: Sequence[subprocess.Popen[bytes]]) -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        for program in programs:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(program.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            for program in programs:
                program.wait(_END_WITHIN_S)
            return


def main() -> int:
    """torchrun on both hosts; see the top of this file."""
    parser = argparse.ArgumentParser(description=main.__doc__, usage="%(prog)s [--rate-mbit N] -- TORCHRUN ARGUMENTS")
    parser.add_argument("--rate-mbit", type=float, help="speed of the cable in each direction, in megabits a second")
    parser.add_argument("arguments", nargs="+", help="what torchrun gets behind --nnodes and where to meet")
    wanted = parser.parse_args()
    signal.signal(signal.SIGTERM, _interrupted)
    try:
        with two_hosts() as hosts:
            if wanted.rate_mbit is not None:
                for host in hosts:
                    host.shape(wanted.rate_mbit)
                there, back = (rate_mbit(*pair, wanted.rate_mbit) for pair in (hosts, hosts[::-1]))
                print(f"one TCP connection: {there:.1f} Mbit/s from a to b, {back:.1f} Mbit/s back", flush=True)
            return torchrun_on_both(hosts, wanted.arguments)
    except NoNamespacesError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _interrupted(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())

"""The network interfaces of this host, by name and by address (IPv4)."""

from __future__ import annotations

import fcntl
import ipaddress
import socket
import struct

from pipeline import PlanError
from workers.channels.net.gloo import INTERFACE, address_towards

__all__ = ["address_of", "interface_towards"]

_ADDRESS_OF_INTERFACE = 0x8915  # SIOCGIFADDR


def address_of(interface: str) -> str:
    """The IPv4 address of a network interface, or PlanError: there is no such interface, or it has none."""
    try:
        return _address(interface)
    except OSError as error:
        raise PlanError(
            f"{INTERFACE} is {interface}, which has no IPv4 address here ({error.strerror}): choose one of {_names()}."
        ) from error


def interface_towards(host: str, port: int) -> str:
    """Name of the interface on the way to a host (the loopback interface where that is this one), or OSError."""
    mine = address_towards(host, port)
    if ipaddress.ip_address(mine).is_loopback:  # lo on Linux, lo0 elsewhere
        return next((name for _, name in socket.if_nameindex() if name.startswith("lo")), "lo")
    for _, name in socket.if_nameindex():
        try:
            if _address(name) == mine:
                return name
        except OSError:  # it has no IPv4 address
            continue
    raise OSError(f"no interface here has the address {mine}: name one of {_names()} with {INTERFACE}")


def _address(interface: str) -> str:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        answer = fcntl.ioctl(probe.fileno(), _ADDRESS_OF_INTERFACE, struct.pack("256s", interface.encode()[:15]))
    return socket.inet_ntoa(answer[20:24])


def _names() -> str:
    return ", ".join(name for _, name in socket.if_nameindex())

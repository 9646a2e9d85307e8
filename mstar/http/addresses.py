"""Which addresses of the Internet protocol belong to the public."""

from __future__ import annotations

import ipaddress

__all__ = ["is_public"]

# IPv6 addresses for single hosts of the Internet begin with 001 (RFC 4291, 2.4).
_UNICAST = ipaddress.ip_network("2000::/3")
_NAT64 = ipaddress.ip_network("64:ff9b::/96")  # RFC 6052: the last 32 bits are an IPv4 address
# What `is_global` leaves in, or left in in some version of Python.
_NEVER = [
    ipaddress.ip_network(text)
    for text in (
        "192.0.0.0/24",  # assigned to protocols
        "192.88.99.0/24",  # relays of 6to4
        "168.63.129.16/32",  # the host below a virtual machine of Azure
        "2001::/23",  # assigned to protocols, Teredo among them
        "2002::/16",  # 6to4: an IPv4 address inside
        "3fff::/20",  # documentation
    )
]


def is_public(text: str) -> bool:
    """Whether an address is one of the public Internet, in whatever form it is written."""
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return False
    if address.version == 6:
        inner = address.ipv4_mapped
        if inner is None and address in _NAT64:
            inner = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
        if inner is not None:
            return is_public(str(inner))
        if address not in _UNICAST:
            return False
    if any(address in network for network in _NEVER):
        return False
    return address.is_global and not address.is_multicast

"""Ethernet frames as a pod with forged addresses would send them."""

from __future__ import annotations

import struct
from ipaddress import ip_address


def _mac(text: str) -> bytes:
    return bytes.fromhex(text.replace(":", ""))


def _checksum(data: bytes) -> int:
    data += bytes(len(data) % 2)
    total: int = sum(struct.unpack(f">{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def udp(macs: tuple[str, str], addresses: tuple[str, str], port: int, payload: bytes) -> bytes:
    """A UDP packet over IPv4; pairs are (source, destination)."""
    source, destination = (ip_address(text).packed for text in addresses)
    datagram = struct.pack(">HHHH", 40000, port, 8 + len(payload), 0) + payload
    head = struct.pack(">BBHHHBBH4s4s", 0x45, 0, 20 + len(datagram), 0, 0, 64, 17, 0, source, destination)
    head = head[:10] + struct.pack(">H", _checksum(head)) + head[12:]
    return _mac(macs[1]) + _mac(macs[0]) + b"\x08\x00" + head + datagram


def lldp(source: str) -> bytes:
    """An empty frame of the link layer discovery protocol."""
    return _mac("01:80:c2:00:00:0e") + _mac(source) + b"\x88\xcc" + bytes(46)


def crc32c(data: bytes) -> int:
    """The checksum of SCTP (RFC 9260, appendix A)."""
    register = 0xFFFFFFFF
    for byte in data:
        register ^= byte
        for _ in range(8):
            register = register >> 1 ^ (0x82F63B78 if register & 1 else 0)
    return register ^ 0xFFFFFFFF


def sctp_init(source_port: int, port: int) -> bytes:
    """An SCTP packet that opens an association (INIT, RFC 9260), without its IP header."""
    chunk = struct.pack(">BBHIIHHI", 1, 0, 20, 0x01020304, 65536, 1, 1, 0x05060708)
    head = struct.pack(">HHI", source_port, port, 0)
    return head + struct.pack("<I", crc32c(head + bytes(4) + chunk)) + chunk


def arp_reply(macs: tuple[str, str], sender: tuple[str, str], target: tuple[str, str]) -> bytes:
    """An ARP reply that says ``sender`` (MAC, address) to ``target``."""
    body = struct.pack(">HHBBH", 1, 0x0800, 6, 4, 2)
    body += _mac(sender[0]) + ip_address(sender[1]).packed + _mac(target[0]) + ip_address(target[1]).packed
    return _mac(macs[1]) + _mac(macs[0]) + b"\x08\x06" + body


def neighbour_advertisement(macs: tuple[str, str], addresses: tuple[str, str], target: str) -> bytes:
    """An IPv6 neighbour advertisement that says ``target`` is at the sender's MAC (RFC 4861, with override)."""
    source, destination = (ip_address(text).packed for text in addresses)
    message = struct.pack(">BBHI", 136, 0, 0, 0x60000000) + ip_address(target).packed + b"\x02\x01" + _mac(macs[0])
    pseudo = source + destination + struct.pack(">IxxxB", len(message), 58)
    message = message[:2] + struct.pack(">H", _checksum(pseudo + message)) + message[4:]
    head = struct.pack(">IHBB", 6 << 28, len(message), 58, 255) + source + destination
    return _mac(macs[1]) + _mac(macs[0]) + b"\x86\xdd" + head + message

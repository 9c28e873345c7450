"""Ports that stay free until they are used."""

import socket
from pathlib import Path

from megatron_ksa.platform.ports import free_port

RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")


def test_port_is_not_one_that_connections_get():
    """A killed run's successor once found its port taken: another process's connection had been given it meanwhile."""
    first = int(RANGE.read_text().split()[0]) if RANGE.exists() else 32768
    ports = {free_port() for _ in range(50)}
    assert max(ports) < first and len(ports) > 40


def test_port_in_use_is_passed_over(monkeypatch):
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        choices = [taken.getsockname()[1], free_port()]
        monkeypatch.setattr("random.SystemRandom.randrange", lambda *_: choices.pop(0))
        last = choices[1]
        assert free_port() == last

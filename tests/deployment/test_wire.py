"""The ledger against interface counters: nodes in network namespaces, every byte to and from them counted."""

import os
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from flwr.cli.build import build_fab_from_disk

from deployment.conftest import NODES
from deployment.federation import DEPLOY, Federation
from fedbt_app.config import APP_DIR

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
HEADERS = 14 + 20 + 32  # bytes of Ethernet, IPv4 and TCP with time stamps, a packet
IDLE_SECONDS = 20


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)


@dataclass(frozen=True)
class Host:
    """A network namespace joined to this machine by one cable, whose other end is `cable` with `address`."""

    name: str
    cable: str
    address: str

    def counters(self) -> dict[str, int]:
        """Return bytes and packets that came from the host (rx) and went to it (tx)."""
        folder = Path("/sys/class/net") / self.cable / "statistics"
        return {
            name: int((folder / name).read_text())
            for name in ("rx_bytes", "rx_packets", "tx_bytes", "tx_packets")
        }


@pytest.fixture
def hosts() -> Iterator[list[Host]]:
    """Make two hosts; packets are as small as on a real cable (no offloading)."""
    made = []
    for number, name in enumerate(NODES[:2]):
        host = Host(f"fedbt-{name}", f"fedbt{number}", f"10.231.{number}.1")
        ip("netns", "add", host.name)
        ip("link", "add", host.cable, "type", "veth", "peer", "name", "eth0", "netns", host.name)
        made.append(host)
        ip("address", "add", f"{host.address}/30", "dev", host.cable)
        ip("link", "set", host.cable, "up", "gso_max_segs", "1")
        inside = ("-netns", host.name)
        ip(*inside, "address", "add", f"10.231.{number}.2/30", "dev", "eth0")
        ip(*inside, "link", "set", "eth0", "up", "gso_max_segs", "1")
        ip(*inside, "link", "set", "lo", "up")
    yield made
    for host in made:
        ip("netns", "delete", host.name)


@pytest.fixture
def wide_certs(hosts: list[Host], tmp_path: Path) -> Path:
    """Make a certificate for the addresses under which the hosts reach the SuperLink."""
    folder, names = (
        tmp_path / "wide-certs",
        ",".join(["127.0.0.1", *(host.address for host in hosts)]),
    )
    environment = os.environ | {"CERTS": str(folder), "SERVER_NAMES": names}
    subprocess.run([str(DEPLOY / "make_certs.sh"), *NODES], env=environment, check=True)
    return folder


def total(hosts: list[Host]) -> dict[str, int]:
    counted = [host.counters() for host in hosts]
    return {name: sum(one[name] for one in counted) for name in counted[0]}


def test_the_ledger_agrees_with_the_interface_within_5_percent_and_the_stated_overhead(
    hosts: list[Host],
    wide_certs: Path,
    tmp_path: Path,
    settings: Callable[..., dict[str, Any]],
    site_data: Path,
    observe_wire: Callable[..., None],
) -> None:
    (tmp_path / "federation").mkdir()
    federation = Federation(
        tmp_path / "federation", wide_certs, settings, site_data, listen="0.0.0.0"
    )
    try:
        federation.register("alice", "bob")
        for name, host in zip(NODES, hosts, strict=False):
            address = federation.address.replace("127.0.0.1", host.address)
            federation.node(name, inside=host.name, SUPERLINK=address).wait_for("SuperNode ID")
        before = total(hosts)
        time.sleep(IDLE_SECONDS)
        idle = total(hosts)
        begin = time.monotonic()
        done = federation.submit(num_rounds=3, model="embedded", client_evaluation="final").finish(
            600
        )
        seconds, after = time.monotonic() - begin, total(hosts)
    finally:
        federation.close()
    assert done.status == 0, done.log
    assert done.clients == [2, 2, 2]
    assert done.report is not None
    cost = done.report["cost"]
    names = (
        "uplink_bytes",
        "downlink_bytes",
        "first_contact_bytes",
        "catch_up_bytes",
        "evaluation_bytes",
    )
    ledger = sum(cost[name] for name in names)

    moved = {name: after[name] - idle[name] for name in after}
    wire = moved["rx_bytes"] + moved["tx_bytes"]
    headers = HEADERS * (moved["rx_packets"] + moved["tx_packets"])
    quiet = {name: idle[name] - before[name] for name in idle}
    quiet_payload = sum(quiet[n] for n in ("rx_bytes", "tx_bytes")) - HEADERS * (
        quiet["rx_packets"] + quiet["tx_packets"]
    )
    polling = int(quiet_payload * seconds / IDLE_SECONDS)
    code = len(build_fab_from_disk(APP_DIR)) * len(hosts)
    rest = wire - headers - polling - code  # the messages, with what HTTP and TLS put around them
    observe_wire(
        ledger_bytes=ledger, wire_bytes=wire, tcp_ip_ethernet_bytes=headers, polling_bytes=polling, app_code_bytes=code,
        http_and_tls_bytes=rest - ledger, seconds=round(seconds), rounds=3, nodes=2,
    )  # fmt: skip
    assert ledger == pytest.approx(rest, rel=0.05)
    up = cost["uplink_bytes"] / (moved["rx_bytes"] - HEADERS * moved["rx_packets"])
    assert 0.9 < up <= 1.0

"""Write into docs/deployment.md what `make test-deployment` observed: faults, bytes on the wire."""

import json
from typing import Any

from benchmarks.publish.marks import filled
from benchmarks.results import ROOT

OBSERVED = ROOT / "tests" / "deployment" / "observed.json"
TARGET = ROOT / "docs" / "deployment.md"


def faults(book: dict[str, dict[str, Any]]) -> str:
    """Return one row a fault."""
    rows = ["| fault | observed | recovery | what the log says |", "|---|---|---|---|"]
    for fault, seen in book.items():
        recovery = ""
        if seen["seconds"]:
            recovery = f"{seen['seconds']} s"
        line = ""
        if seen["log"]:
            line = f"`` {seen['log']} ``"  # it may hold a single backtick
        rows.append(f"| {fault} | {seen['outcome']} | {recovery} | {line} |")
    return "\n".join(rows)


def wire(seen: dict[str, Any]) -> str:
    """Return what crossed the interface, by what it was."""
    total = seen["wire_bytes"]
    parts = {
        "messages, as the report's ledger counts them": seen["ledger_bytes"],
        "HTTP and TLS around them, and the app's code where it is sent again": seen[
            "http_and_tls_bytes"
        ],
        "TCP, IP and Ethernet headers": seen["tcp_ip_ethernet_bytes"],
        f"polling and signs of life, {seen['seconds']} s": seen["polling_bytes"],
        f"the app's code, once to each of {seen['nodes']} nodes": seen["app_code_bytes"],
    }
    rows = ["| what | both ways | share |", "|---|---|---|"]
    for what, size in parts.items():
        rows.append(f"| {what} | {size / 1e6:.2f} MB | {size / total * 100:.2f} % |")
    rows.append(f"| on the wire | {total / 1e6:.2f} MB | 100 % |")
    return "\n".join(rows)


def main() -> None:
    """Replace what stands between the marks."""
    book = json.loads(OBSERVED.read_text(encoding="utf-8"))
    blocks = {"faults": faults(book["faults"]), "wire": wire(book["wire"])}
    page = filled(TARGET, blocks, "benchmarks/publish/make_observed.py")
    TARGET.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()

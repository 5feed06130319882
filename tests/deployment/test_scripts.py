"""The scripts by themselves: what they hand on to Flower's programs."""

import os
import subprocess
from pathlib import Path

from flwr.common.config import parse_config_args

from deployment.federation import DEPLOY


def node_settings(tmp_path: Path, data: str) -> subprocess.CompletedProcess[str]:
    """Run supernode.sh with a stand-in for Flower's program, which prints what it is given."""
    programs = tmp_path / "programs"
    programs.mkdir(exist_ok=True)
    (programs / "flower-supernode").write_text(
        '#!/bin/sh\nfor word; do last=$word; done; printf %s "$last"\n'
    )
    (programs / "flower-supernode").chmod(0o755)
    environment = os.environ | {
        "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
        "SUPERLINK": "127.0.0.1:1",
        "STATE": str(tmp_path / "state"),
        "DATA": data,
    }
    script = str(DEPLOY / "supernode.sh")
    return subprocess.run(
        [script, "a"], env=environment, capture_output=True, text=True, check=False
    )


def test_a_path_with_blanks_or_an_apostrophe_arrives_whole(tmp_path: Path) -> None:
    for data in ("/srv/St John's/data", "/srv/two words", "/srv/plain"):
        done = node_settings(tmp_path, data)
        assert done.returncode == 0, done.stderr
        assert parse_config_args([done.stdout])["data-path"] == data


def test_a_path_that_no_quotes_can_hold_is_refused_in_one_line(tmp_path: Path) -> None:
    done = node_settings(tmp_path, "/srv/both\"'x")
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("supernode.sh: error: data-path")
    assert done.stderr.count("\n") == 1

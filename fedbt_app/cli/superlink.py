"""The local SuperLink that simulates: one for each app folder and Python; a run starts it.

Flower's own is one for each user, at one fixed port: a second checkout would be served by the first
one's environment, and its clients would load the first one's code. So each installation has a
folder of its own for Flower's settings, below the cache, and a free port. What was started is kept
there, by process id, so that it can be used again and ended.
"""

import hashlib
import http.client
import json
import os
import socket
import subprocess
import sys
import time
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path

from fedbt_app.config import APP_DIR, default_cache_folder
from fedbt_app.errors import FedBTError
from fedbt_app.files import alone_in, replace_text

PATIENCE = 60  # seconds until a SuperLink answers: a few on an idle machine
ATTEMPTS = 3  # another process may take the port that was free a moment ago
RECORD = "superlink.json"
DATABASE = "state.db"
LOG = "superlink.log"

# Flower reads it when a SuperLink starts: without it each run would install torch anew, into an
# environment of its own.
KEEP_ENVIRONMENT = "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION"

CONNECTION = """\
[superlink]
default = "local"

[superlink.local]
address = "127.0.0.1:{port}"
insecure = true
"""


@dataclass(frozen=True)
class Running:
    """A local SuperLink: its process and port, and where the app is that it was started for."""

    pid: int
    port: int
    app: str


def settings_folder() -> Path:
    """Return the folder of Flower's settings for this installation: this app and this Python."""
    place = f"{APP_DIR}\n{sys.prefix}"
    digest = hashlib.sha256(place.encode()).hexdigest()
    return default_cache_folder() / "flower" / digest[:12]


def environment(settings: Path | None) -> dict[str, str]:
    """Return the environment of Flower's commands; without a folder, with the user's settings."""
    beside = Path(sys.executable).parent  # Flower looks for its other commands on the path
    found = os.environ | {
        KEEP_ENVIRONMENT: "1",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "PYTHONUNBUFFERED": "1",
        "NO_COLOR": "1",
        "PATH": f"{beside}{os.pathsep}{os.environ.get('PATH', '')}",
    }
    if settings:
        found["FLWR_HOME"] = str(settings)
    return found


def script(name: str) -> str:
    """Return the path of one of Flower's commands: this environment's, else whichever is found."""
    beside = Path(sys.executable).with_name(name)
    if beside.exists():
        return str(beside)
    return name


def running(folder: Path) -> Running | None:
    """Return the SuperLink that was started with these settings, if it still runs."""
    import psutil

    try:
        found = Running(**json.loads((folder / RECORD).read_text(encoding="utf-8")))
        words = psutil.Process(found.pid).cmdline()
    except (OSError, ValueError, TypeError, psutil.Error):
        return None
    if str(folder / DATABASE) not in words:  # its process id went to another
        return None
    return found


def start() -> Path:
    """Start this installation's SuperLink unless it runs; returns its folder of settings."""
    folder = settings_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with alone_in(folder):  # two runs that begin together share one SuperLink
            if running(folder) is None:
                _start(folder)
    except OSError as error:
        raise FedBTError(
            f"{folder} cannot be written ({error.strerror}): free some space, or set HOME to a folder of yours"
        ) from None
    return folder


def stop(folder: Path) -> list[Running]:
    """End the SuperLink with these settings, and what it runs; returns what was ended."""
    import psutil

    found = running(folder)
    if found is None:
        return []
    try:
        process = psutil.Process(found.pid)
        family = [process, *process.children(recursive=True)]
        process.terminate()  # it ends its own first
        _, left = psutil.wait_procs(family, timeout=10)
        for stubborn in left:
            stubborn.kill()
    except psutil.NoSuchProcess:
        pass  # it ended by itself meanwhile
    return [found]


def stop_all() -> list[Running]:
    """End every local SuperLink that a FedBT of this user started; returns what was ended."""
    ended = []
    for folder in sorted((default_cache_folder() / "flower").glob("*")):
        ended += stop(folder)
    return ended


def free_port() -> int:
    """Return a port of this machine that nothing listens at just now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _start(folder: Path) -> None:
    for _ in range(ATTEMPTS):
        port = free_port()
        process = _spawn(folder, port)
        try:
            if _answers(process, port):
                return _keep(folder, process.pid, port)
        except BaseException:
            process.kill()
            raise
        if process.poll() is None:  # not the port: it hangs
            process.kill()
            break
    raise FedBTError(f"the local SuperLink did not start: see {folder / LOG}")


def _spawn(folder: Path, port: int) -> "subprocess.Popen[bytes]":
    command = [script("flower-superlink"), "--insecure", "--simulation"]
    command += ["--isolation", "subprocess", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--database", str(folder / DATABASE), "--log-file", str(folder / LOG)]
    command += ["--log-rotation-interval-hours", "24", "--log-rotation-backup-count", "7"]
    try:
        # Clients first look for their code in the SuperLink's working folder: it must hold none.
        return subprocess.Popen(
            command,
            cwd=folder,
            env=environment(folder),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
    except FileNotFoundError:
        raise FedBTError(f"{command[0]} is not installed: pip install 'flwr[simulation]'") from None


def _answers(process: "subprocess.Popen[bytes]", port: int) -> bool:
    """Wait until the SuperLink is up; False when it ended, or took too long."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline and process.poll() is None:
        if _healthy(port):
            # else another's answer, at a port that was taken in between
            return process.poll() is None
        time.sleep(0.1)
    return False


def _healthy(port: int) -> bool:
    # which asks no proxy
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=1)) as connection:
        try:
            connection.request("GET", "/health")
            return connection.getresponse().status == 200
        except (OSError, http.client.HTTPException):
            return False


def _keep(folder: Path, pid: int, port: int) -> None:
    """Note what runs, for us, and where, for Flower."""
    record = Running(pid, port, str(APP_DIR))
    replace_text(folder / "config.toml", CONNECTION.format(port=port))
    replace_text(folder / RECORD, json.dumps(asdict(record)))

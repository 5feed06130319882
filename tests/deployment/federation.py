"""A federation of real processes, started by deploy/*.sh: SuperLink, SuperNodes, a submitted run."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from safetensors.torch import load_file

from fedbt_app.config import APP_DIR
from fedbt_app.tensors import Tensors

DEPLOY = APP_DIR / "deploy"
ENVIRONMENT = os.environ | {
    "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    "OMP_NUM_THREADS": "1",
    "PYTHONUNBUFFERED": "1",
    "NO_COLOR": "1",
}
PATIENCE = 480.0  # seconds to wait for anything: the machine may be busy


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def eventually(what: str, test: Callable[[], Any], timeout: float = PATIENCE) -> Any:
    """Return the first truth of `test`; fail with `what` was waited for."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        if found := test():
            return found
        time.sleep(0.1)
    raise AssertionError(f"waited {timeout:.0f} s in vain for {what}")


class Service:
    """A process group of our own, with its log."""

    def __init__(self, log: Path, command: list[str], environment: Mapping[str, str]) -> None:
        self.log = log
        with log.open("ab") as file:
            self.process = psutil.Popen(
                command,
                cwd=APP_DIR,
                env=ENVIRONMENT | environment,
                stdout=file,
                stderr=subprocess.STDOUT,
            )

    def text(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")

    def wait_for(self, text: str, timeout: float = PATIENCE) -> None:
        eventually(f"{text!r} in {self.log}", lambda: text in self.text(), timeout)

    def descendants(self, word: str = "") -> list[psutil.Process]:
        """Return the running children, and theirs, with `word` in their command line."""
        found = []
        for child in self.process.children(recursive=True) if self.process.is_running() else []:
            try:
                if word in " ".join(child.cmdline()) and child.status() != psutil.STATUS_ZOMBIE:
                    found.append(child)
            except psutil.Error:
                continue
        return found

    def kill(self) -> None:
        """End it and all its children at once, as a power cut does."""
        doomed = [self.process, *self.descendants()]  # a supervisor first
        for process in doomed:
            try:
                process.send_signal(signal.SIGKILL)
            except psutil.NoSuchProcess:
                continue
        psutil.wait_procs(doomed, timeout=20)


class Node(Service):
    """A SuperNode with its own key, data and state folder; `inside` names the network namespace it is in."""

    def __init__(
        self,
        federation: "Federation",
        name: str,
        environment: Mapping[str, str],
        flags: list[str],
        inside: str = "",
    ) -> None:
        self.name, self.state = name, federation.folder / name
        self._environment = {"STATE": str(self.state)} | environment
        self._command = ["ip", "netns", "exec", inside] if inside else []
        self._command += [str(DEPLOY / "supernode.sh"), name, "--port", str(free_port()), *flags]
        super().__init__(federation.folder / f"{name}.log", self._command, self._environment)

    def restart(self) -> None:
        """Start it again, and as often as it ends: what systemd and Compose do (Restart=always, RestartSec=5)."""
        again = ["sh", "-c", 'while :; do "$@"; sleep 5; done', "supervisor", *self._command]
        super().__init__(self.log, again, self._environment)

    @property
    def pools(self) -> Path:
        return self.state / "pools"

    def app(self) -> psutil.Process:
        """Return the running client app, once there is one."""
        return eventually(
            f"a client app of {self.name}", lambda: self.descendants("flwr-clientapp")
        )[0]

    def training(self) -> psutil.Process:
        """Return the client app once it trains: its frozen-prefix cache is there then."""
        eventually(f"{self.name} to train", lambda: list(self.pools.rglob("states.f32")))
        return self.app()


@dataclass
class Finished:
    """A run that ended."""

    status: int
    log: list[str]
    report: dict[str, Any] | None

    @property
    def refused(self) -> list[tuple[int, str]]:
        return [(one["round"], one["client"]) for one in (self.report or {})["refused"]]

    @property
    def clients(self) -> list[int]:
        """How many clients counted, round by round."""
        return [one["clients"] for one in (self.report or {})["rounds"]]

    def model(self) -> Tensors:
        """Return the tensors of the exported model."""
        return load_file(Path((self.report or {})["model_dir"]) / "model.safetensors")

    def line(self, *words: str) -> str:
        """Return the one line of the log with all the words; the last lines sum up and do not count."""
        told = [line for line in self.log if not line.startswith("left out: ")]
        [line] = [line for line in told if all(word in line for word in words)]
        return line


class Run(Service):
    """A submitted run."""

    def __init__(self, federation: "Federation", number: int, settings: Mapping[str, Any]) -> None:
        self.settings, self.output = dict(settings), Path(settings["output-dir"])
        self._federation = federation
        pairs = [f"{key}={json.dumps(value)}" for key, value in settings.items()]
        super().__init__(
            federation.folder / f"run{number}.log",
            [str(DEPLOY / "admin.sh"), "submit", *pairs],
            federation.admin,
        )

    def finish(self, timeout: float = PATIENCE) -> Finished:
        """Wait for the end; a run that ended well leaves no half-written file anywhere."""
        status = self.process.wait(timeout)
        file = self.output / "report.json"
        report = json.loads(file.read_text()) if file.exists() else None
        assert status or self._federation.half_written() == []
        return Finished(status, self.text().splitlines(), report)


class Federation:
    """A SuperLink and its nodes, all below one folder."""

    def __init__(
        self,
        folder: Path,
        certs: Path,
        settings: Callable[..., dict[str, Any]],
        data: Path,
        listen: str = "127.0.0.1",
    ) -> None:
        self.folder, self.certs, self._settings, self._data, self._listen = (
            folder,
            certs,
            settings,
            data,
            listen,
        )
        self.address = f"127.0.0.1:{free_port()}"
        self.admin = {
            "SUPERLINK": self.address,
            "CERTS": str(certs),
            "STATE": str(folder / "admin"),
        }
        self._stack, self._runs = ExitStack(), 0
        self.link = self.start_link()

    def start_link(self) -> Service:
        host, port = self.address.split(":")
        environment = {
            "LISTEN": f"{self._listen}:{port}",
            "CERTS": str(self.certs),
            "STATE": str(self.folder / "link"),
        }
        link = Service(self.folder / "link.log", [str(DEPLOY / "superlink.sh")], environment)
        self._stack.callback(link.kill)

        def listening() -> bool:
            assert link.process.is_running(), link.text()[-2000:]
            with socket.socket() as probe:
                return probe.connect_ex((host, int(port))) == 0

        eventually("the SuperLink", listening)
        return link

    def administer(self, *words: str) -> str:
        """Run deploy/admin.sh; returns what it printed."""
        command = [str(DEPLOY / "admin.sh"), *words]
        done = subprocess.run(
            command,
            cwd=APP_DIR,
            env=ENVIRONMENT | self.admin,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def register(self, *names: str) -> None:
        self.administer("register", *(str(self.certs / f"{name}.pub") for name in names))

    def node(
        self,
        name: str,
        *flags: str,
        data: Path | None = None,
        settings: str = "",
        inside: str = "",
        **environment: str,
    ) -> Node:
        """Start a SuperNode, in the network namespace `inside` if there is one; `environment` is for supernode.sh."""
        environment = {
            "SUPERLINK": self.address,
            "CERTS": str(self.certs),
            "SETTINGS": settings,
        } | environment
        node = Node(
            self, name, environment | {"DATA": str(data or self._data)}, list(flags), inside
        )
        self._stack.callback(node.kill)
        return node

    def submit(self, **changes: Any) -> Run:
        self._runs += 1
        small = {
            "dataset": "none",
            "labels": "kidney,heart,liver",
            "output_dir": str(self.folder / f"run{self._runs}"),
            "client_evaluation": "never",
            "cache_dir": "",
            "pool_dir": "",
        }
        return self._start(self._settings(**small | changes))

    def resume(self, run: "Run") -> "Run":
        """Go on with a stopped run."""
        self._runs += 1
        return self._start(run.settings | {"resume": str(run.output)})

    def _start(self, settings: Mapping[str, Any]) -> "Run":
        run = Run(self, self._runs, settings)
        self._stack.callback(run.kill)
        return run

    def half_written(self) -> list[Path]:
        return sorted(self.folder.rglob("*.partial*"))

    def close(self) -> None:
        self._stack.close()

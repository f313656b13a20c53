"""A real ComfyUI server with this pack installed, on a folder of its own that goes away again."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import tempfile
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from dev.answers import content, execution_error, refusal
from dev.environment import python_command
from dev.machine import device_flags, free_port, link_folder, require_free, server_environment
from dev.places import DEMO_FOLDER, DEMO_PACK, PACK_FOLDER, ROOT, WINDOWS
from dev.say import Failure, disk_errors

START_SECONDS = 240


class Server:
    """ComfyUI on a free port; use as a context manager.

    Args:
        tree: the ComfyUI source tree to run.
        demo: install the demo model's development-only pack too.
        port: a fixed port, or None for any free one.
        models: show this folder as the server's `models`.
        frontend: serve this frontend, or None for the environment's.
        on_line: called with every line of the server's log.
    """

    def __init__(
        self,
        tree: Path,
        *,
        demo: bool = False,
        port: int | None = None,
        models: Path | None = None,
        frontend: Path | None = None,
        on_line: Callable[[str], None] | None = None,
    ) -> None:
        self.tree = tree
        self.packs = {PACK_FOLDER: ROOT, **({DEMO_FOLDER: DEMO_PACK} if demo else {})}
        self.port = port if port is not None else free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.lines: list[str] = []
        self._models = models
        self._frontend = frontend
        self._on_line = on_line
        self._process: subprocess.Popen[str] | None = None
        self._reader: threading.Thread | None = None
        self.base = Path()

    def __enter__(self) -> Server:
        try:
            self._start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *problem: object) -> None:
        self.stop()

    def is_alive(self) -> bool:
        """Tell whether the server is running."""
        return self._process is not None and self._process.poll() is None

    def _start(self) -> None:
        require_free(self.port)
        with disk_errors(tempfile.gettempdir()):
            self.base = Path(tempfile.mkdtemp(prefix="seg-host-"))
            for name in ("custom_nodes", "input", "output", "user"):
                (self.base / name).mkdir()
            if self._models is not None:
                link_folder(self._models, self.base / "models")
            for name in ("checkpoints", "controlnet"):
                (self.base / "models" / name).mkdir(parents=True, exist_ok=True)
            for name, source in self.packs.items():
                link_folder(source, self.base / "custom_nodes" / name)
        self._process = subprocess.Popen(
            self._command(),
            cwd=self.tree,
            env=server_environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            encoding="utf-8",
            errors="replace",
            start_new_session=not WINDOWS,  # Ctrl-C reaches us only; we stop the server
            creationflags=subprocess.CREATE_NEW_PROCESS_GROUP if WINDOWS else 0,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self._wait_until_ready()

    def _command(self) -> list[str]:
        database = (self.base / "user" / "comfyui.db").as_posix()
        frontend = ("--front-end-root", self._frontend) if self._frontend else ()
        return python_command(
            self.tree / "main.py",
            *("--base-directory", self.base),
            *("--port", self.port),
            *("--database-url", f"sqlite:///{database}"),
            *("--disable-auto-launch", "--disable-api-nodes", "--preview-method", "none"),
            *frontend,
            *device_flags(),
        )

    def _read(self) -> None:
        for line in self._process.stdout if self._process and self._process.stdout else ():
            text = re.sub(r"\x1b\[[0-9;]*m", "", line).rstrip()
            self.lines.append(text)
            if self._on_line:
                self._on_line(text)

    def _wait_until_ready(self) -> None:
        limit = time.monotonic() + START_SECONDS
        while time.monotonic() < limit:
            self._require_alive("while starting")
            with suppress(OSError):
                self.get("/system_stats")
                return self._require_packs()
            time.sleep(0.2)
        raise Failure(f"ComfyUI did not answer within {START_SECONDS} s; {self._last_words()}")

    def _require_packs(self) -> None:
        # Only what lies in our folder: a file of ComfyUI's own may lack a driver of this machine.
        ours = str(self.base / "custom_nodes")
        failed = [line for line in self.lines if "IMPORT FAILED" in line and ours in line]
        if failed:
            cause = next((line for line in self.lines if "Error while calling" in line), failed[0])
            raise Failure(f"ComfyUI could not load a pack: {cause.strip()}")

    def _require_alive(self, when: str) -> None:
        if not self.is_alive():
            time.sleep(0.2)  # let the reader take the last lines
            raise Failure(f"ComfyUI stopped {when}; {self._last_words()}")

    def _last_words(self) -> str:
        said = [line for line in self.lines if line.strip()]
        return f"its last line was: {said[-1].strip()}" if said else "it printed nothing"

    def stop(self) -> None:
        """End the server and remove its folder; safe to call again."""
        process, self._process = self._process, None
        if process is not None and process.poll() is None:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        if process is not None and process.stdout and self._reader:
            self._reader.join(5)
            process.stdout.close()
        if self.base != Path():
            shutil.rmtree(self.base, ignore_errors=True)
            self.base = Path()

    def get(self, path: str) -> bytes:
        """Return the body at `path`; an HTTP error status raises `HTTPError`."""
        with urllib.request.urlopen(self.url + urllib.parse.quote(path, safe="/?=&%")) as answer:
            return answer.read()

    def json(self, path: str) -> Any:
        """Return the JSON document at `path`."""
        return json.loads(self.get(path))

    def post(self, path: str, document: Mapping[str, Any]) -> tuple[int, Any]:
        """Post a JSON document; return the HTTP status and the answer's document."""
        request = urllib.request.Request(
            self.url + path,
            data=json.dumps(document).encode(),
            headers={"Content-Type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request) as answer:
                return answer.status, content(answer.read())
        except urllib.error.HTTPError as error:
            with error:
                return error.code, content(error.read())

    def queue(self, graph: Mapping[str, Any], client: str = "dev") -> str:
        """Queue an API-format workflow and return its id."""
        status, answer = self.post("/prompt", {"prompt": graph, "client_id": client})
        if status != 200:
            raise Failure(f"ComfyUI refused the workflow: {refusal(answer)}")
        return answer["prompt_id"]

    def finished(self, prompt_id: str, seconds: float = 300) -> dict[str, Any]:
        """Wait for a queued workflow and return its history entry, good or bad."""
        limit = time.monotonic() + seconds
        while time.monotonic() < limit:
            self._require_alive("while running a workflow")
            history = self.json(f"/history/{prompt_id}")
            if prompt_id in history and history[prompt_id].get("status"):
                return history[prompt_id]
            time.sleep(0.1)
        raise Failure(f"The workflow did not finish within {seconds:g} s.")

    def run(self, graph: Mapping[str, Any], seconds: float = 300) -> dict[str, Any]:
        """Queue a workflow, wait for it, and return its outputs by node id."""
        entry = self.finished(self.queue(graph), seconds)
        error = execution_error(entry)
        if error is not None:
            raise Failure(f"Node {error['node_type']} failed: {error['exception_message'].strip()}")
        return entry["outputs"]

    def image_bytes(self, image: Mapping[str, str]) -> bytes:
        """Return the file behind one entry of an output's `images`."""
        return self.get("/view?" + urllib.parse.urlencode(dict(image)))

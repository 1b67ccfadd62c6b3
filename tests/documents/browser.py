# SPDX-License-Identifier: Apache-2.0
"""Opens pages in one headless Chromium, over its own protocol, and says what it complains of."""

import contextlib
import itertools
import json
import subprocess
import threading
import time
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from websockets.sync.client import connect

#: Seconds that the browser has to start, and that a page has to load.
PATIENCE = 60.0


class Quiet(SimpleHTTPRequestHandler):
    """Serves a folder without a line for each request."""

    def log_message(self, *arguments: Any) -> None:
        pass


@contextlib.contextmanager
def served(folder: Path) -> Iterator[str]:
    """Serves a folder on this machine alone; yields its address."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


class Browser:
    """One tab of a headless Chromium that can reach no other host than ``address``."""

    def __init__(self, program: str, folder: Path, address: str) -> None:
        self.address = address
        rules = "MAP * ~NOTFOUND , EXCLUDE 127.0.0.1"
        flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
        flags += ["--disable-background-networking", f"--host-resolver-rules={rules}", "--remote-debugging-port=0"]
        self.process = subprocess.Popen(
            [program, *flags, f"--user-data-dir={folder}", "about:blank"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            self._connect(folder / "DevToolsActivePort")
        except BaseException:
            self.close()
            raise

    def _connect(self, file: Path) -> None:
        end = time.monotonic() + PATIENCE
        while not (file.exists() and len(file.read_text().split()) == 2):
            if time.monotonic() > end or self.process.poll() is not None:
                raise RuntimeError("Chromium has not started")
            time.sleep(0.05)
        port, path = file.read_text().split()
        self.numbers = itertools.count(1)
        self.events: list[dict[str, Any]] = []
        self.session = ""
        self.socket = connect(f"ws://127.0.0.1:{port}{path}", max_size=None, proxy=None)
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def close(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Sends one command and returns its result; events that come before it are kept."""
        number = next(self.numbers)
        message = {"id": number, "method": method, "params": parameters}
        self.socket.send(json.dumps(message | ({"sessionId": self.session} if self.session else {})))
        while True:
            answer = json.loads(self.socket.recv(timeout=PATIENCE))
            if answer.get("id") == number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return answer["result"]
            self.events.append(answer)

    def errors_on(self, page: str) -> list[str]:
        """Opens a page, waits until it and what it asks for is there, and returns what went wrong."""
        self.events = []
        self.call("Page.navigate", url=f"{self.address}/{page}")
        while not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            self.events.append(json.loads(self.socket.recv(timeout=PATIENCE)))
        self.value("new Promise(done => setTimeout(() => done(true), 50))")  # scripts of the theme run after the load
        return [error for event in self.events if (error := self._error(event))]

    def value(self, expression: str) -> Any:
        """Evaluates JavaScript on the open page."""
        result = self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        return result["result"].get("value")

    def _error(self, event: dict[str, Any]) -> str:
        method, what = event.get("method"), event.get("params", {})
        if method == "Runtime.exceptionThrown":
            return f"exception: {what['exceptionDetails'].get('exception', what).get('description', what)}"
        if method == "Log.entryAdded" and what["entry"]["level"] in ("error", "warning"):
            return f"{what['entry']['level']}: {what['entry']['text']} {what['entry'].get('url', '')}"
        if method == "Runtime.consoleAPICalled" and what["type"] in ("error", "warning", "assert"):
            return f"console.{what['type']}: {what['args']}"
        if method == "Network.requestWillBeSent":
            url = what["request"]["url"]
            return "" if url.startswith((self.address, "data:", "blob:")) else f"asks another host: {url}"
        if method == "Network.responseReceived" and what["response"]["status"] >= 400:
            return f"status {what['response']['status']}: {what['response']['url']}"
        if method == "Network.loadingFailed" and not what.get("canceled"):
            return f"not loaded: {what['errorText']}"
        return ""

"""Headless Chromium, driven by the DevTools protocol over two pipes: no driver and no package is needed."""

import base64
import json
import os
import shutil
import subprocess
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--remote-debugging-pipe")
PATIENCE = 60.0
"""Seconds that anything may take."""


class Browser:
    """One tab. Requests to anything but this machine fail, as they would without a network; `refused` lists them."""

    def __init__(self, profile: Path) -> None:
        assert CHROMIUM is not None
        (from_us, ours), (theirs, from_them) = os.pipe(), os.pipe()
        # Chromium reads from its descriptor 3 and writes to 4.
        command = f'exec "$0" "$@" 3<&{from_us} 4>&{from_them}'
        words = [CHROMIUM, *FLAGS, f"--user-data-dir={profile}", "about:blank"]
        self._process = subprocess.Popen(
            ["bash", "-c", command, *words], pass_fds=(from_us, from_them), stderr=subprocess.DEVNULL
        )
        os.close(from_us)
        os.close(from_them)
        self._out, self._in = os.fdopen(ours, "wb", buffering=0), os.fdopen(theirs, "rb", buffering=0)
        self._number, self._rest = 0, b""
        self.console: list[str] = []
        """What the page said on its console, errors and warnings."""
        self.refused: list[str] = []
        self._session = ""
        target = next(t for t in self.send("Target.getTargets")["targetInfos"] if t["type"] == "page")
        self._session = self.send("Target.attachToTarget", targetId=target["targetId"], flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "DOM", "Network", "Log"):
            self.send(f"{domain}.enable")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._process.terminate()
        self._process.wait(PATIENCE)
        self._out.close()
        self._in.close()

    def send(self, method: str, **params: Any) -> dict[str, Any]:
        """Calls a method of the protocol and returns its result."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        self._out.write(json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read()
            if answer.get("id") == self._number:
                assert "error" not in answer, (method, answer["error"])
                result: dict[str, Any] = answer["result"]
                return result
            self._note(answer)

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            part = self._in.read(1 << 16)
            assert part, "the browser has ended"
            self._rest += part
        line, self._rest = self._rest.split(b"\0", 1)
        message: dict[str, Any] = json.loads(line)
        return message

    def _note(self, event: dict[str, Any]) -> None:
        params = event.get("params", {})
        match event.get("method"):
            case "Network.requestWillBeSent":
                url = params["request"]["url"]
                if not url.startswith(("http://127.0.0.1", "http://localhost", "data:", "blob:", "about:")):
                    self.refused.append(url)
            case "Runtime.exceptionThrown":
                self.console.append(str(params["exceptionDetails"].get("exception", params)))
            case "Runtime.consoleAPICalled" if params["type"] == "error":
                self.console.append(str([argument.get("value") for argument in params["args"]]))

    def evaluate(self, script: str) -> Any:
        """The value of an expression in the page."""
        found = self.send("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in found, (script, found["exceptionDetails"])
        return found["result"].get("value")

    def wait(self, script: str, patience: float = PATIENCE) -> Any:
        """Waits until an expression has a value that counts as true, and returns it."""
        until = time.monotonic() + patience
        while not (value := self.evaluate(script)):
            assert time.monotonic() < until, f"still not so: {script}\n{self.evaluate('document.body.innerText')}"
            time.sleep(0.1)
        return value

    def open(self, url: str, width: int = 1400, height: int = 1000) -> None:
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        self.send("Page.navigate", url=url)

    def give_file(self, selector: str, path: Path) -> None:
        """Chooses a file in an input of the page."""
        root = self.send("DOM.getDocument")["root"]["nodeId"]
        node = self.send("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.send("DOM.setFileInputFiles", files=[str(path)], nodeId=node)

    def point(self, selector: str, x: float, y: float) -> None:
        """Moves the pointer to a place in an element, in fractions of its sides."""
        box = self.evaluate(
            f"(e => {{e.scrollIntoView({{block: 'center'}}); const r = e.getBoundingClientRect();"
            f"return [r.x, r.y, r.width, r.height]}})(document.querySelector({json.dumps(selector)}))"
        )
        at = {"x": box[0] + x * box[2], "y": box[1] + y * box[3]}
        self.send("Input.dispatchMouseEvent", type="mouseMoved", **at)

    def key(self, name: str) -> None:
        """Presses a key: Enter, Tab, Backspace."""
        code = {"Enter": 13, "Tab": 9, "Backspace": 8}[name]
        for kind in ("keyDown", "keyUp"):
            text = {"text": "\r"} if name == "Enter" and kind == "keyDown" else {}
            self.send("Input.dispatchKeyEvent", type=kind, key=name, code=name, windowsVirtualKeyCode=code, **text)

    def picture(self, path: Path) -> None:
        """A picture of what the window shows."""
        shot = self.send("Page.captureScreenshot")
        path.write_bytes(base64.b64decode(shot["data"]))

"""Headless Chromium, driven over a pipe by its DevTools protocol: no library, no port.

with Browser() as browser:
    browser.open(path)
    browser.run("document.title")
"""

import base64
import json
import os
import shutil
import subprocess
import tempfile

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


def chromium() -> str | None:
    """The path of an installed Chromium, if there is one."""
    paths = [shutil.which(name) for name in NAMES]
    return next((path for path in paths if path), None)


class Browser:
    """One page in a browser of its own. calm: the reader wants no animations."""

    def __init__(self, width=1280, height=800, dark=False, mobile=False, calm=True):
        self.mobile = mobile
        memory = "/dev/shm" if os.path.isdir("/dev/shm") else None  # a disk may be slow
        self.profile = tempfile.TemporaryDirectory(dir=memory, ignore_cleanup_errors=True)
        theirs, self.commands = os.pipe()
        self.answers, ours = os.pipe()

        def connect():  # the browser reads commands from 3 and writes to 4
            high = [os.dup2(theirs, 60), os.dup2(ours, 61)]
            for target, end in zip((3, 4), high, strict=True):
                os.dup2(end, target)

        flags = "--headless --no-sandbox --disable-gpu --remote-debugging-pipe --hide-scrollbars"
        command = [chromium(), *flags.split(), f"--user-data-dir={self.profile.name}"]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        keep = {"close_fds": False, "preexec_fn": connect}
        self.process = subprocess.Popen([*command, "about:blank"], **quiet, **keep)
        os.close(theirs)
        os.close(ours)
        self.unread = b""
        self.number = 0
        self.session = None
        self.problems = []  # what the console complains of

        targets = self.send("Target.getTargets")["targetInfos"]
        page = next(target["targetId"] for target in targets if target["type"] == "page")
        attached = self.send("Target.attachToTarget", targetId=page, flatten=True)
        self.session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.send(f"{domain}.enable")
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": mobile}
        self.send("Emulation.setDeviceMetricsOverride", **size)
        self.send("Emulation.setTouchEmulationEnabled", enabled=mobile)
        wishes = {
            "prefers-color-scheme": "dark" if dark else "light",
            "prefers-reduced-motion": "reduce" if calm else "no-preference",
        }
        features = [{"name": name, "value": value} for name, value in wishes.items()]
        self.send("Emulation.setEmulatedMedia", features=features)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.session = None
        self.send("Browser.close")
        self.process.wait(20)
        os.close(self.commands)
        os.close(self.answers)
        self.profile.cleanup()

    def send(self, method: str, **params) -> dict:
        """Send a command and wait for its result. RuntimeError where it fails."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": params}
        if self.session:
            message["sessionId"] = self.session
        rest = json.dumps(message).encode() + b"\0"
        while rest:
            rest = rest[os.write(self.commands, rest) :]
        while True:
            answer = self.receive()
            if answer.get("id") == self.number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']['message']}")
                return answer["result"]

    def receive(self) -> dict:
        """The next message. Complaints are noted."""
        while b"\0" not in self.unread:
            block = os.read(self.answers, 2**20)
            if not block:
                raise RuntimeError("the browser has ended")
            self.unread += block
        text, _, self.unread = self.unread.partition(b"\0")
        message = json.loads(text)
        kind, params = message.get("method"), message.get("params", {})
        if kind == "Runtime.exceptionThrown":
            details = params["exceptionDetails"]
            self.problems.append(details.get("exception", details).get("description", details))
        if kind == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning"):
            self.problems.append(params["args"])
        if kind == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
            self.problems.append(params["entry"]["text"])
        return message

    def open(self, path):
        """Open a file, and wait until it is loaded."""
        self.send("Page.navigate", url=path.resolve().as_uri())
        while self.receive().get("method") != "Page.loadEventFired":
            pass

    def run(self, script: str):
        """The value of an expression of JavaScript, a promise's too."""
        options = {"returnByValue": True, "awaitPromise": True}
        answer = self.send("Runtime.evaluate", expression=script, **options)
        if "exceptionDetails" in answer:
            raise RuntimeError(answer["exceptionDetails"]["exception"]["description"])
        return answer["result"].get("value")

    def click(self, selector: str):
        """Press an element with the mouse: this browser makes no click of a finger's tap."""
        x, y = self.centre(selector)
        self.mouse("start", x, y)
        self.mouse("end", x, y)

    def drag(self, selector: str, by: float):
        """Drag an element up by so many pixels, with the mouse or a finger."""
        x, y = self.centre(selector)
        points = [(x, y - by * tenth / 10) for tenth in range(1, 11)]
        touch = self.touch if self.mobile else self.mouse
        touch("start", x, y)
        for point in points:
            touch("move", *point)
        touch("end", x, y - by)

    def touch(self, kind: str, x: float, y: float):
        names = {"start": "touchStart", "move": "touchMove", "end": "touchEnd"}
        points = [] if kind == "end" else [{"x": x, "y": y}]
        self.send("Input.dispatchTouchEvent", type=names[kind], touchPoints=points)

    def mouse(self, kind: str, x: float, y: float):
        names = {"start": "mousePressed", "move": "mouseMoved", "end": "mouseReleased"}
        buttons = {"button": "left", "buttons": 1, "clickCount": 1}
        self.send("Input.dispatchMouseEvent", type=names[kind], x=x, y=y, **buttons)

    def key(self, name: str):
        """Press a key."""
        for kind in ("keyDown", "keyUp"):
            self.send("Input.dispatchKeyEvent", type=kind, key=name, code=name)

    def centre(self, selector: str) -> tuple[float, float]:
        """The middle of an element, scrolled into view."""
        script = f"""(() => {{
            const node = document.querySelector({json.dumps(selector)});
            node.scrollIntoView({{ block: "center", behavior: "instant" }});
            const box = node.getBoundingClientRect();
            return [box.x + box.width / 2, box.y + box.height / 2];
        }})()"""
        return tuple(self.run(script))

    def picture(self, path, whole=False):
        """A screenshot, of what is seen or of the whole page."""
        options = {"captureBeyondViewport": whole}
        if whole:
            box = self.send("Page.getLayoutMetrics")["cssContentSize"]
            options["clip"] = {
                "x": 0,
                "y": 0,
                "scale": 1,
                **{k: box[k] for k in ("width", "height")},
            }
        image = self.send("Page.captureScreenshot", **options)["data"]
        path.write_bytes(base64.b64decode(image))

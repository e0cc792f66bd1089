"""`multitensor serve` on a free port of loopback, in a process of its own, for benchmarks."""

from __future__ import annotations

import re
import subprocess
import sys
import threading
import time
from collections.abc import Sequence


class Server:
    """`said` is what it wrote to standard error."""

    def __init__(self, model: str, name: str, options: Sequence[str]) -> None:
        command = [sys.executable, "-m", "multitensor", "serve", model, "--port", "0", "--name", name]
        command += ["--log-level", "warning", *options]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        self.said = ""
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.said += line

    def url(self) -> str:
        """Waits until it is ready. Raises RuntimeError with what it said when it ended instead."""
        while (found := re.search(r"serving at (\S+) ", self.said)) is None:
            if self.process.poll() is not None:
                raise RuntimeError(f"the server ended: {self.said}")
            time.sleep(0.05)
        return found.group(1)

    def end(self) -> None:
        """Asks it to end, and ends it after half a minute."""
        self.process.terminate()
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

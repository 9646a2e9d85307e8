"""`mstar serve` as a process: it loads, listens, drains and ends."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import threading
import time

import pytest
import requests

LONG = {"model": "orpheus-tiny", "input": "hello there", "response_format": "pcm"}
LONG |= {"max_tokens": 1500, "ignore_eos": True, "seed": 7}


class Process:
    """A server process on a free port."""

    def __init__(self, *options: str) -> None:
        command = [sys.executable, "-m", "mstar.cli", "serve", "orpheus-tiny", "--port", "0"]
        self.popen = subprocess.Popen([*command, *options], stderr=subprocess.PIPE, text=True)
        self.log: list[str] = []
        for line in self.popen.stderr:
            self.log.append(line)
            if match := re.search(r"serving \S+ at (\S+)", line):
                self.url = match[1]
                break
        else:
            raise AssertionError("".join(self.log))
        rest = lambda: self.log.extend(self.popen.stderr)  # noqa: E731
        self._reader = threading.Thread(target=rest, daemon=True)
        self._reader.start()

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_: object) -> None:
        self.popen.kill()
        self.popen.wait()

    def words_at_the_end(self) -> list[str]:
        """What the process wrote after it began to drain, but for the lines of requests."""
        self._reader.join(10)
        after = self.log[[" draining: " in line for line in self.log].index(True) + 1 :]
        return [
            line.partition(" mstar.http ")[2].strip() or line for line in after if "{" not in line
        ]

    def speak(self, body=LONG):
        return requests.post(f"{self.url}/v1/audio/speech", json=body, stream=True, timeout=30)


def test_sigterm_lets_running_requests_end_and_takes_no_new_ones():
    with Process() as process:
        with process.speak() as reply:
            pieces = reply.iter_content(None)
            size = len(next(pieces))
            process.popen.send_signal(signal.SIGTERM)
            end = time.monotonic() + 10
            while requests.get(f"{process.url}/health", timeout=5).status_code == 200:
                assert time.monotonic() < end
            assert process.speak().status_code == 503
            size += sum(map(len, pieces))
        assert size > 100_000
        assert process.popen.wait(10) == 0
        assert process.words_at_the_end() == ["ended"]


def test_what_does_not_end_in_time_is_cancelled():
    with Process("--drain-timeout", "0.2") as process:
        with process.speak({**LONG, "max_tokens": 30000}) as reply:
            pieces = reply.iter_content(None)
            next(pieces)
            process.popen.send_signal(signal.SIGTERM)
            with pytest.raises(requests.exceptions.ChunkedEncodingError):
                list(pieces)
        assert process.popen.wait(10) == 0
        assert any("cancelling 1 requests" in line for line in process.log)


def test_ctrl_c_ends_an_idle_server_at_once():
    with Process("--log-stats", "0.05") as process:
        end = time.monotonic() + 10
        while not any(" stats {" in line for line in process.log):
            assert time.monotonic() < end
            time.sleep(0.01)
        process.popen.send_signal(signal.SIGINT)
        assert process.popen.wait(10) == 0
        assert process.words_at_the_end() == ["ended"]


def test_ctrl_c_twice_ends_a_busy_server_without_a_traceback():
    with Process() as process:
        with process.speak({**LONG, "max_tokens": 30000}) as reply:
            next(reply.iter_content(None))
            process.popen.send_signal(signal.SIGINT)
            while not any(" draining: " in line for line in process.log):
                time.sleep(0.01)
            process.popen.send_signal(signal.SIGINT)
            assert process.popen.wait(10) == 0
        assert process.words_at_the_end() == ["ended"]


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["nope-model"], 2, "nope-model"),
        (["orpheus-tiny", "--log-level", "loud"], 2, "--log-level"),
        (["orpheus-tiny", "--host", "203.0.113.1"], 1, "203.0.113.1"),
        (["orpheus-tiny", "--max-queue", "-1"], 2, "max_queue"),
        (["orpheus-tiny", "--max-body-mb", "0"], 2, "max_body_mb"),
    ],
)
def test_what_cannot_be_is_one_line(options, code, message):
    command = [sys.executable, "-m", "mstar.cli", "serve", "--port", "0", *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == code
    assert done.stderr.startswith("error: ")
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


def test_without_the_extra_it_says_what_to_install():
    code = (
        "import sys; sys.modules['fastapi'] = None\n"
        "import mstar.cli; mstar.cli.app(['serve', 'orpheus-tiny'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "pip install 'mstar[server]'" in done.stderr

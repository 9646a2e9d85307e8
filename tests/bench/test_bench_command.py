"""`mstar bench` as users of a shell meet it."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from mstar import cli


@pytest.fixture(autouse=True)
def no_key(monkeypatch):
    for name in ("MSTAR_API_KEY", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)


def bench(*args):
    return CliRunner().invoke(cli.app, ["bench", *(str(arg) for arg in args)])


def test_a_table_for_people(stub):
    result = bench(stub.url, "-n", 4, "-p", "usage", "--slo", "ttft=0.5,itl=0.05")
    assert result.exit_code == 0, result.output
    for words in ("stub-1: 4 requests", "failed 0", "TTFT, ms", "ITL, ms", "E2E", "kept ttft"):
        assert words in result.stdout
    assert "4 requests for 1 at a time: 5 or more" in result.stdout
    assert not [line for line in result.stderr.splitlines() if "deprecated" not in line]


def test_one_json_object_and_every_request_in_a_file(stub, tmp_path):
    file = tmp_path / "raw.jsonl"
    args = ["-p", "plain", "-p", "500", "-n", 4, "-c", 2, "--json", "--raw", file, "-s", "top_k=3"]
    result = bench(stub.url, *args)
    found = json.loads(result.stdout)
    assert (found["requests"]["done"], found["requests"]["failed"]) == (2, 2)
    assert found["load"] == {
        "concurrency": 2,
        "rate": None,
        "requests": 4,
        "duration": None,
        "warmup": 2,
        "disconnect": 0.0,
        "seed": 0,
    }
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [row["outcome"] for row in rows] == ["done", "failed", "done", "failed"]
    assert len(rows[0]["text"]) == 4
    assert json.loads(stub.seen[-1][2])["top_k"] == 3
    assert "error: --raw" in bench(stub.url, *args).stderr


def test_prompts_from_a_file(stub, tmp_path):
    (tmp_path / "a.txt").write_text("plain\n\nusage\n")
    lines = ['"plain"', '{"prompt": "usage", "id": 1}']
    lines.append('{"messages": [{"role": "user", "content": "odd"}]}')
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    for name, asked in (("a.txt", ["plain", "usage"]), ("a.jsonl", ["plain", "usage", "odd"])):
        stub.seen.clear()
        result = bench(stub.url, "--prompts", tmp_path / name, "-n", len(asked), "--warmup", 0)
        assert result.exit_code == 0
        assert "no warm-up" in result.stdout
        chats = [json.loads(body) for path, _, body in stub.seen if b"messages" in body]
        assert [chat["messages"][0]["content"] for chat in chats] == asked


def test_the_key_comes_from_the_environment(stub, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "theirs")
    bench(stub.url, "-n", 1, "-p", "plain")
    assert stub.seen[-1][1]["authorization"] == "Bearer theirs"
    monkeypatch.setenv("MSTAR_API_KEY", "ours")
    bench(stub.url, "-n", 1, "-p", "plain")
    assert stub.seen[-1][1]["authorization"] == "Bearer ours"


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["ftp://x"], ["URL='ftp://x'", "http://"]),
        (["http://"], ["URL"]),
        (["http://host:port"], ["URL"]),
        (["http://host:99999"], ["URL"]),
        (["http://[::1"], ["URL"]),
        (["http://exämple"], ["URL"]),
        (["--route", "smell"], ["--route='smell'", "auto, generate"]),
        (["--rate", "2", "-c", "2"], ["--rate", "not both"]),
        (["--rate", "0"], ["--rate", "above 0"]),
        (["--duration", "-1"], ["--duration"]),
        (["--timeout", "nan"], ["--timeout"]),
        (["--slo", "smell=1"], ["--slo='smell'", "ttft"]),
        (["--slo", "ttft"], ["--slo='ttft'", "name=seconds"]),
        (["--slo", "ttft=nan"], ["--slo"]),
        (["-s", "a"], ["key=value"]),
        (["-s", "a=1", "-s", "a=2"], ["given twice"]),
        (["-a", "none.png"], ["--attach='none.png'", "No such file"]),
        (["--prompts", "none.txt"], ["--prompts='none.txt'", "No such file"]),
        (["--raw", "no/such/file"], ["no/such/file"]),
    ],
)
def test_what_cannot_be_is_refused(stub, tmp_path, monkeypatch, args, words):
    monkeypatch.chdir(tmp_path)
    url = [] if "//" in args[0] else [stub.url]
    result = bench(*url, *args)
    assert result.exit_code in (1, 2), result.output
    assert result.stderr.count("\n") == 1
    for word in ("error: ", *words):
        assert word in result.stderr
    assert stub.seen == []


@pytest.mark.parametrize("line", ["{", "3", '{"id": 1}', '{"messages": []}'])
def test_strange_lines_of_prompts_are_refused(stub, tmp_path, line):
    file = tmp_path / "a.jsonl"
    file.write_text(f'"fine"\n{line}\n')
    result = bench(stub.url, "--prompts", file)
    assert result.exit_code == 2
    assert "line 2 " in result.stderr


def test_when_nothing_is_answered_the_exit_code_says_so(stub):
    result = bench(stub.url, "-p", "500", "-n", 2, "--warmup", 0)
    assert result.exit_code == 1
    assert "2 x HTTP 500" in result.stdout
    assert result.stderr == "error: no request was answered\n"
    assert bench("http://127.0.0.1:9").stderr.startswith("error: cannot reach http://127.0.0.1:9")


@pytest.mark.parametrize(("failing", "code"), [(1, 0), (2, 0), (3, 1)])
def test_when_most_fail_the_exit_code_says_so_and_the_figures_are_there(stub, failing, code):
    kinds = ["500"] * failing + ["plain"] * (4 - failing)
    prompts = [word for kind in kinds for word in ("-p", kind)]
    result = bench(stub.url, *prompts, "-n", 4, "--warmup", 0)
    assert result.exit_code == code
    assert f"failed {failing}, left 0, done {4 - failing}" in result.stdout
    assert result.stderr == ("error: 3 of 4 requests failed\n" if code else "")


def test_without_httpx_it_says_how_to_get_it(stub, monkeypatch):
    monkeypatch.setitem(sys.modules, "httpcore", None)
    result = bench(stub.url)
    assert result.exit_code == 1
    assert "pip install 'mstar[async]'" in result.stderr


def command(*args):
    code = "import sys; sys.modules['torch'] = sys.modules['transformers'] = None\n"
    code += "from mstar.cli import main; main()"
    return [sys.executable, "-c", code, "bench", *args]


def test_ctrl_c_reports_what_is_done_without_torch(stub, tmp_path):
    file = tmp_path / "raw.jsonl"
    args = ["-p", "paced", "--duration", "60", "--json", "--raw", str(file)]
    pipe = subprocess.PIPE
    process = subprocess.Popen(command(stub.url, *args), stdout=pipe, stderr=pipe, text=True)
    while sum(path.endswith("completions") for path, *_ in list(stub.seen)) < 5:
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    out, errors = process.communicate(timeout=20)
    assert process.returncode == 130
    found = json.loads(out)
    assert found["interrupted"]
    assert found["requests"]["done"] == len(Path(file).read_text().splitlines()) >= 2
    assert "interrupted" in errors


def test_a_bar_on_the_terminal_leaves_the_pipe_alone(stub):
    ours, theirs = os.openpty()
    args = ["-p", "paced", "-n", "6", "--json"]
    done = subprocess.run(
        command(stub.url, *args), stdout=subprocess.PIPE, stderr=theirs, timeout=60, check=True
    )
    os.close(theirs)
    assert b"running" in os.read(ours, 1 << 16)
    os.close(ours)
    assert json.loads(done.stdout)["requests"]["done"] == 6

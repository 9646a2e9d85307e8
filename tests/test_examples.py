"""The examples and the README's Python run as they stand."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
README = (ROOT / "README.md").read_text()


def run(args: list[str], cwd: Path) -> str:
    done = subprocess.run([sys.executable, *args], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_runs(example, tmp_path):
    assert run([str(example)], tmp_path)


def test_the_readme_programs_run(tmp_path):
    blocks = []
    for section in ("In Python", "Video and world models", "Robots"):
        text = re.search(rf"## {section}\n(.*?)\n## ", README, re.S)[1]
        blocks += re.findall(r"```python\n(.*?)```", text, re.S)
    assert len(blocks) == 5
    for block in blocks:
        (tmp_path / "program.py").write_text(block)
        run(["program.py"], tmp_path)
    assert (tmp_path / "hello.wav").stat().st_size == 44 + 2 * 24576


def test_the_quick_start_is_two_commands_that_ci_runs():
    block = re.search(r"## Quick start\n\n```\n(.*?)```", README, re.S)[1]
    first, second = block.splitlines()
    assert "-c constraints.txt torch==" in first
    assert first.index("torch==") < first.index("-e '.[all,dev]'")
    assert "mstar generate orpheus-tiny" in first
    assert second.endswith("-m pytest -q -n 2 --dist loadfile")
    assert "README.md" in (ROOT / ".ci" / "run").read_text()

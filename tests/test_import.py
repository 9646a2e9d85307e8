"""`import mstar` is light: it runs where neither torch nor transformers can be imported."""

import subprocess
import sys

BLOCKED = """
import importlib.abc, sys
class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "transformers"):
            raise ImportError(f"{name} must not be imported")
sys.meta_path.insert(0, Refuse())
"""


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_mstar_needs_neither_torch_nor_transformers():
    out = python(
        BLOCKED + "import mstar, mstar.client, mstar.types, mstar.errors\n"
        "from mstar import AudioBuffer, InvalidRequest, GenerateResult\n"
        "print(mstar.__version__, 'torch' in sys.modules)"
    )
    assert out.split() == ["0.1.0", "False"]


def test_importing_mstar_takes_less_than_a_fifth_of_a_second():
    code = "import time; t = time.perf_counter(); import mstar; print(time.perf_counter() - t)"
    assert min(float(python(code)) for _ in range(3)) < 0.2


def test_every_public_name_can_be_imported():
    python("import mstar\nfor name in mstar.__all__: getattr(mstar, name)")


def test_an_unknown_name_is_an_attribute_error():
    assert "no attribute 'Motor'" in python(
        "import mstar\ntry: mstar.Motor\nexcept AttributeError as error: print(error)"
    )


def test_imports_go_one_way():
    """DESIGN section 5: the runtime knows no model, and nothing but the CLI knows HTTP."""
    import re
    from pathlib import Path

    import mstar

    root = Path(mstar.__file__).parent
    wrong = []
    for file in root.rglob("*.py"):
        inside = file.relative_to(root).parts[0]
        text = file.read_text()
        forbidden = {
            "engine": r"mstar\.(models|http|local|cli|io)",
            "io": r"mstar\.(engine|models|http|local|cli)",
            "models": r"mstar\.(http|local|cli)",
            "types.py": r"mstar\.",
            "client.py": r"mstar\.(engine|models|http|local|cli|io)",
        }.get(inside)
        if forbidden and re.search(rf"^\s*(from|import) {forbidden}", text, re.M):
            wrong.append(str(file.relative_to(root)))
    assert wrong == []

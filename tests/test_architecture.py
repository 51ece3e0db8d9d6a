"""The shape of the project: public surface, what importing costs, which way imports point, the tree in docs/."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

MAY_IMPORT = {
    "errors": set(),
    "formats": set(),
    "mask": set(),
    "site": {"mask"},
    "dump": set(),
    "sources": set(),
    "files": {"errors"},
    "settings": {"errors", "formats"},
    "cost": {"errors", "files", "formats", "mask", "site", "sources"},
    "lengths": {"decide", "site"},
    "decide": {"cost", "formats", "settings", "site"},
    "report": {"decide", "site"},
    "measure": {"decide", "kernels", "ops", "report"},
    "counters": {"cost", "decide", "kernels", "report"},
    "kernels": {"errors", "files", "formats", "site"},
    "ops": {"errors", "formats", "kernels"},
    "passes": {"decide", "formats", "kernels", "lengths", "mask", "ops", "report", "site"},
    "backend": {
        "cost",
        "counters",
        "decide",
        "dump",
        "errors",
        "formats",
        "kernels",
        "measure",
        "ops",
        "passes",
        "report",
        "settings",
        "site",
        "sources",
    },
    "vllm": {
        "decide",
        "errors",
        "formats",
        "kernels",
        "ops",
        "passes",
        "report",
        "settings",
        "site",
        "sources",
        "mask",
    },
    "cli": {
        "backend",
        "cost",
        "decide",
        "dump",
        "errors",
        "files",
        "formats",
        "kernels",
        "measure",
        "ops",
        "report",
        "settings",
        "site",
        "mask",
    },
}
"""cli -> backend -> passes -> decide -> cost, formats, site; ops -> kernels. Never the other way."""


def test_public_surface():
    import sagecompile

    assert (
        sagecompile.__all__
        == sorted(sagecompile.__all__)
        == [
            "OptionError",
            "Report",
            "SageCompileError",
            "UnsupportedError",
            "__version__",
            "exact_rows",
            "explain",
            "sage_inductor",
            "vllm_pass",
        ]
    )
    assert all(hasattr(sagecompile, name) for name in sagecompile.__all__)


@pytest.mark.parametrize(
    "statement",
    ["import sagecompile", "import sagecompile.cli; sagecompile.cli.main(['--help'])"],
    ids=["import", "help"],
)
def test_loads_no_torch(statement):
    heavy = "print(sorted({'torch', 'triton', 'vllm'} & set(sys.modules)))"
    code = f"import sys\ntry:\n    {statement}\nexcept SystemExit: pass\n{heavy}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_tools_that_look_at_every_object_need_no_vllm():
    """Where it is installed they load it."""
    code = (
        "import doctest, inspect, pydoc, sagecompile\n"
        "assert not inspect.isclass(sagecompile.vllm_pass) and doctest.testmod(sagecompile).failed == 0\n"
        "print(pydoc.render_doc(sagecompile))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and "vllm_pass" in done.stdout, done.stderr


def test_backend_is_found_without_an_import():
    code = "import torch; print('sage_inductor' in torch._dynamo.list_backends())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "True"


def test_the_folder_passes_refuses_its_plain_name():
    done = subprocess.run([sys.executable, "-c", "import passes"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1 and "the package sagecompile.passes" in done.stderr


def imported_parts(file: Path, part: str) -> set[str]:
    """The parts of sagecompile that a file imports at any level, its own left out."""
    found = set()
    package = ("sagecompile", *file.relative_to(ROOT / "sagecompile").parent.parts) if part != "passes" else None
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and package is not None:
            base = ".".join(package[: len(package) - node.level + 1])
            names = [".".join(filter(None, (base, node.module, alias.name))) for alias in node.names]
        else:
            continue
        found |= {name.split(".")[1] for name in names if name.startswith("sagecompile.")}
    return (found & set(MAY_IMPORT)) - {part}


def parts() -> list[tuple[str, Path]]:
    files = [(file.relative_to(ROOT / "sagecompile").parts[0].removesuffix(".py"), file)
             for file in (ROOT / "sagecompile").rglob("*.py") if file.name not in ("__main__.py",)]  # fmt: skip
    files = [(part, file) for part, file in files if part != "__init__"]
    return files + [("passes", file) for file in (ROOT / "passes").rglob("*.py")]


@pytest.mark.parametrize(("part", "file"), parts(), ids=lambda value: value.name if isinstance(value, Path) else value)
def test_imports_point_one_way(part, file):
    assert imported_parts(file, part) <= MAY_IMPORT[part]


def test_what_is_kept_on_disk_is_files_alone():
    """dump.py and bench write where they are told to; a compiler's scratch ends with it; nothing is ever unpickled."""
    writes = r"\.(mkdir|write_text|write_bytes)\(|mkdtemp|gettempdir|makedirs|\bcache_dir\b"
    for file in (ROOT / "sagecompile").rglob("*.py"):
        text = file.read_text()
        told_where = file.name in ("dump.py", "files.py") or "bench" in file.parts
        assert told_where or not re.search(writes, text), file
        assert not re.search(r"pickle\.load|torch\.load\(", text), file


def test_the_tree_in_the_docs_is_the_disk():
    tree = re.search(r"```\n(passes/.*?)```", (ROOT / "docs" / "architecture.md").read_text(), re.DOTALL)
    assert tree is not None
    named, folder = set(), ""
    for line in tree[1].splitlines():
        path = line.split("  ")[0] if not line.startswith(" ") else line.strip().split("  ")[0]
        if not line.startswith(" "):
            folder = path if path.endswith("/") else ""
            named.add(path)
        else:
            named.add(folder + path)
    missing = {path for path in named if not (ROOT / path).exists()}
    assert not missing
    on_disk = {
        f"{top}/{item.name}{'/' if item.is_dir() else ''}"
        for top in ("passes", "sagecompile")
        for item in (ROOT / top).iterdir()
        if item.name not in ("__pycache__", "__init__.py", "__main__.py", "py.typed")
    }
    assert on_disk <= named


@pytest.mark.parametrize("name", ["constraints-cpu.txt", "constraints-vllm.txt"])
def test_versions_are_exact_and_leave_torch_alone(name):
    lines = (ROOT / ".ci" / name).read_text().splitlines()
    packages = {}
    for line in lines:
        if not line.startswith("#"):
            package, equal, version = line.partition("==")
            packages[package.lower()] = version
            assert equal and version and " " not in line, line
    assert not {"torch", "triton", "sagecompile"} & set(packages)
    assert "setuptools" in packages and "pytest" in packages and len(packages) > 20

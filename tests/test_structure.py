"""The shape of the repository: imports run downward, every module ships, no folder leaks into sys.path."""

import ast
import io
import re
import shutil
import subprocess
import sys
import tokenize
import tomllib
import zipfile
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SETUPTOOLS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
FOLDERS = {package: ROOT / folder for package, folder in SETUPTOOLS["package-dir"].items()}
GENERATED = ("_pb2.py", "_pb2_grpc.py")
MOST_LINES = 400
MOST_MODULES = 15
LEAST_LINES = 40
"""A shorter module with a single importer belongs into it."""
VAGUE = ("whoever", "somebody", "nobody", "anybody")
NOT_PRODUCT = ("tests", "docs", "build", "dist")


def run(*command, cwd):
    """Output of a command in a process that sees this interpreter's packages, not the repository."""
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def product_files():
    """Path inside the import package -> the file, of everything a wheel must contain."""
    data = SETUPTOOLS["package-data"]
    return {
        str(Path(*package.split("."), file.relative_to(folder))): file
        for package, folder in FOLDERS.items()
        for pattern in ("*.py", "*.pyi", "*.proto", *data.get(package, ()))
        for file in folder.glob(pattern)
    }


def test_imports_run_downward(tmp_path):
    """import-linter finds files, not the finder of an editable install: it gets the package as it will lie
    in site-packages."""
    for name, file in product_files().items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).symlink_to(file)
    shutil.copy(ROOT / ".importlinter", tmp_path)
    lint = (
        "import sys; sys.path.insert(0, '.');"
        "from importlinter.cli import lint_imports; sys.exit(lint_imports(is_debug_mode=False))"
    )
    report = run(sys.executable, "-P", "-c", lint, cwd=tmp_path)
    modules = sum(name.endswith(".py") for name in product_files())
    assert f"Analyzed {modules} files" in report and " 0 broken" in report, report


def test_no_folder_of_ours_is_a_top_level_module():
    """`kernels` and `proto` are other people's names: docs/decisions/001."""
    names = [folder.name for package, folder in FOLDERS.items() if package != "farshore"]
    assert {"kernels", "proto", "workers", "gateway", "client", "models", "controller"} <= set(names)
    find = (
        "import sys; from importlib.util import find_spec\n"
        "for name in sys.argv[1:]:\n"
        "    spec = find_spec(name)\n"
        "    if spec: print(name, spec.origin, *(spec.submodule_search_locations or ()))"
    )
    found = run(sys.executable, "-P", "-c", find, *names, cwd=ROOT)
    assert str(ROOT) not in found, found


def test_every_folder_with_modules_is_a_listed_package():
    assert sorted(SETUPTOOLS["packages"]) == sorted(FOLDERS)
    roots = [it for it in ROOT.iterdir() if it.is_dir() and it.name[0] != "." and it.name not in NOT_PRODUCT]
    assert {file.parent for root in roots for file in root.rglob("*.py")} == set(FOLDERS.values())
    assert all((folder / "__init__.py").is_file() for folder in FOLDERS.values())
    # Any other module in the root is on nobody's path.
    assert [file.name for file in ROOT.glob("*.py")] == ["setup.py"]


def sources():
    """Every file of code that people write, tests included."""
    roots = [folder for folder in FOLDERS.values() if folder.parent == ROOT] + [ROOT / "tests"]
    return [
        file
        for root in roots
        for pattern in ("*.py", "*.h", "*.cpp")
        for file in root.rglob(pattern)
        if not file.name.endswith(GENERATED)
    ]


def test_files_are_short():
    lengths = {str(file.relative_to(ROOT)): len(file.read_text().splitlines()) for file in sources()}
    assert {file: lines for file, lines in lengths.items() if lines > MOST_LINES} == {}


def test_folders_are_small():
    folders = Counter(str(file.parent.relative_to(ROOT)) for file in sources() if file.name[:2] != "__")
    assert {folder: files for folder, files in folders.items() if files > MOST_MODULES} == {}


def imported_by():
    """Module -> the modules of ours that import it."""
    files = {name: file for name, file in product_files().items() if name.endswith(".py")}
    modules = {
        name.removesuffix(".py").replace("/", ".").removesuffix(".__init__"): f for name, f in files.items()
    }
    importers = {module: set() for module in modules}
    for module, file in modules.items():
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module in modules:
                for imported in (node.module, *(f"{node.module}.{alias.name}" for alias in node.names)):
                    importers.get(imported, set()).add(module)
    return modules, importers


def test_no_module_is_a_function_of_its_only_importer():
    modules, importers = imported_by()
    small = {
        module: lines
        for module, file in modules.items()
        if not file.name.endswith(GENERATED) and file.name[:2] != "__"
        if (lines := len(file.read_text().splitlines())) < LEAST_LINES and len(importers[module]) == 1
    }
    assert small == {}


MAKE_CONNECTIONS = {"insecure_channel", "secure_channel", "add_insecure_port", "add_secure_port"}
MAY_MAKE_CONNECTIONS = (
    "farshore/rpc.py",
    # What clients connect to, and clients.
    "farshore/gateway/api/server.py",
    "farshore/client/",
    "farshore/benchmarks/faults/",
    "farshore/benchmarks/gateway/",
)


def test_processes_of_a_cluster_connect_through_rpc():
    """There each call proves the cluster token, and each server asks for it."""
    found = {
        name
        for name, file in product_files().items()
        if name.endswith(".py") and not name.endswith(GENERATED)
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Attribute) and node.attr in MAKE_CONNECTIONS
    }
    assert "farshore/rpc.py" in found
    assert {name for name in found if not name.startswith(MAY_MAKE_CONNECTIONS)} == set()


def prose(file):
    """Comments and docstrings."""
    text = file.read_text()
    if file.suffix != ".py":
        return re.findall(r"//.*|/\*.*?\*/", text, re.DOTALL)
    comments = [
        token.string
        for token in tokenize.generate_tokens(io.StringIO(text).readline)
        if token.type == tokenize.COMMENT
    ]
    strings = [
        node.value.value
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    ]
    return comments + strings


def test_prose_names_what_it_means():
    """A process or a function is named, not called a person."""
    files = [file for file in sources() if not file.is_relative_to(ROOT / "tests")]
    words = re.compile(rf"\b(?:{'|'.join(VAGUE)})\b", re.IGNORECASE)
    found = {
        f"{file.relative_to(ROOT)}: {' '.join(text.split())[:100]}"
        for file in files
        for text in prose(file)
        if words.search(text)
    }
    assert found == set()


def test_no_text_tells_to_install_our_name_from_an_index():
    """Nothing is published: the name may come to belong to another project. Texts name a checkout."""
    texts = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "helm").rglob("*"), *sources()]
    asks = re.compile(r"pip install (?:-\S+ )*[\"']?farshore\b")
    assert asks.search('pip install "farshore[kube]"') and asks.search("`pip install farshore`")
    found = {
        str(file.relative_to(ROOT))
        for file in texts
        if file.is_file() and file != Path(__file__) and asks.search(file.read_text(encoding="utf-8"))
    }
    assert found == set()


@pytest.mark.heavy
def test_a_wheel_contains_every_module_and_nothing_else(tmp_path):
    """An editable install hides a forgotten package; a wheel does not."""
    source = tmp_path / "source"
    for folder in FOLDERS.values():
        if folder.parent == ROOT:
            shutil.copytree(folder, source / folder.name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = (sys.executable, "-P", "-m", "pip", "wheel", "--no-deps", "--no-build-isolation")
    run(*pip, "--wheel-dir", str(tmp_path), str(source), cwd=tmp_path)
    (wheel,) = tmp_path.glob("farshore-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    shipped = {name for name in names if not name.split("/")[0].endswith(".dist-info")}
    assert shipped == set(product_files())
    assert "farshore/proto/attention.proto" in shipped

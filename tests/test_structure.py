"""The shape of the repository: imports run downward, every module ships, no folder leaks into sys.path."""

import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SETUPTOOLS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
FOLDERS = {package: ROOT / folder for package, folder in SETUPTOOLS["package-dir"].items()}
GENERATED = ("_pb2.py", "_pb2_grpc.py")
LINES = 400
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


@pytest.mark.parametrize("package", FOLDERS)
def test_files_are_short(package):
    files = [file for file in FOLDERS[package].glob("*.py") if not file.name.endswith(GENERATED)]
    lengths = {file.name: len(file.read_text().splitlines()) for file in files}
    assert {file: lines for file, lines in lengths.items() if lines >= LINES} == {}


@pytest.mark.heavy
def test_a_wheel_contains_every_module_and_nothing_else(tmp_path):
    """An editable install hides a forgotten package; a wheel does not."""
    source = tmp_path / "source"
    for folder in FOLDERS.values():
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

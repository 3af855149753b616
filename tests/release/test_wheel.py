"""What `pip install fusemig` gives: the wheel's contents, and the program installed from it in a fresh environment."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from email.parser import HeaderParser
from pathlib import Path

import pytest

from fusemig import __version__
from support.wheels import PROJECT, build, run


def test_the_wheel_has_the_package_and_nothing_else(tmp_path: Path) -> None:
    """Every module, the typing marker, the program's entry, the license; no tests, no tools."""
    wheel = build(tmp_path)
    assert wheel.name == f"fusemig-{__version__}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        information = f"fusemig-{__version__}.dist-info"
        metadata = HeaderParser().parsestr(archive.read(f"{information}/METADATA").decode())
        entries = archive.read(f"{information}/entry_points.txt").decode()
    package = {name for name in names if not name.startswith(information)}
    known = run("git", "-C", PROJECT, "ls-files", "fusemig", cwd=tmp_path).split()
    assert package == {name for name in known if (PROJECT / name).is_file()}
    assert "fusemig/py.typed" in package
    assert f"{information}/licenses/LICENSE" in names
    assert "fusemig = fusemig.cli:main" in entries
    assert metadata["Requires-Python"] == ">=3.11"
    assert {"pyfuse3", "trio", "xxhash"} <= {line.split(">")[0] for line in metadata.get_all("Requires-Dist", [])}


@pytest.mark.nightly
@pytest.mark.fuse
@pytest.mark.timeout(900)
@pytest.mark.parametrize("kind", ["wheel", "sdist"])
def test_the_installed_program_moves_a_disk(kind: str, tmp_path: Path) -> None:
    """In an environment that knows nothing of this tree: version, demo, types."""
    package = build(tmp_path)
    run(sys.executable, "-m", "venv", tmp_path / "venv", cwd=tmp_path)
    bin_ = tmp_path / "venv" / "bin"
    if kind == "sdist":
        run(bin_ / "pip", "install", "--quiet", "hatchling", cwd=tmp_path, timeout_s=600)
        run(bin_ / "hatchling", "build", "--target", "sdist", "--directory", tmp_path / "sdist", cwd=tmp_path / "tree")
        (package,) = (tmp_path / "sdist").glob("*.tar.gz")
    run(bin_ / "pip", "install", "--quiet", package, "mypy", cwd=tmp_path, timeout_s=600)
    where = run(bin_ / "python", "-I", "-c", "import fusemig; print(fusemig.__file__)", cwd=tmp_path)
    assert Path(where.strip()).is_relative_to(tmp_path / "venv")
    assert run(bin_ / "fusemig", "--version", cwd=tmp_path).split()[-1] == __version__
    assert "everything held" in run(bin_ / "fusemig", "demo", "--size", "64M", cwd=tmp_path)
    for argument, is_right in (("ServeOptions", True), ("int", False)):
        user = tmp_path / f"user_{argument.lower()}.py"
        user.write_text(
            f"from fusemig.library import ServeOptions, serving\n\n\ndef f(x: {argument}) -> None:\n    serving(x)\n"
        )
        done = subprocess.run([bin_ / "mypy", "--strict", user], cwd=tmp_path, capture_output=True, check=False)
        assert (done.returncode == 0) is is_right, done.stdout

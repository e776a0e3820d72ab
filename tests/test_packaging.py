"""The package as a wheel, an editable install and a bare checkout, each in a clean process."""

import platform
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
BUILD_FILES = ["pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "CHANGELOG.md", "LICENSE"]
HAS_COMPILER = shutil.which("g++") is not None
SITE_PACKAGES = Path(torch.__file__).parents[1]


@pytest.fixture(scope="session")
def checkout(tmp_path_factory):
    """Copy what is committed and matters to a build; the link stays a link."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in [*BUILD_FILES, "constraints.txt"]:
        shutil.copy(ROOT / name, folder)
    skip = shutil.ignore_patterns("__pycache__", "*.so")
    for name in ["fastsiam", "kernels", "tests", "benchmarks"]:
        shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=skip)
    return folder


@pytest.fixture(scope="session")
def built(checkout, tmp_path_factory):
    """Build an sdist, and a wheel from it, with the setuptools that is here: no network."""
    folder = tmp_path_factory.mktemp("dist")
    call("-m", "build", "--no-isolation", "--outdir", folder, checkout, cwd=folder)
    (sdist,) = folder.glob("*.tar.gz")
    (wheel,) = folder.glob("*.whl")
    return sdist, wheel


@pytest.fixture(scope="session")
def unpacked_wheel(built, tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    zipfile.ZipFile(built[1]).extractall(folder)
    return folder


@pytest.fixture(scope="session")
def editable(checkout, tmp_path_factory):
    folder = tmp_path_factory.mktemp("editable")
    options = ["--no-deps", "--no-build-isolation", "--quiet", "--target", folder]
    call("-m", "pip", "install", *options, "--editable", checkout, cwd=folder)
    return folder


def call(*arguments, cwd):
    done = subprocess.run(
        [sys.executable, *map(str, arguments)], cwd=cwd, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def run_with(folder, program, cwd):
    """Run a program that finds fastsiam through `folder` alone, as through a site directory.

    -E keeps out PYTHONPATH, -S the .pth files beside torch: this environment may hold an editable
    fastsiam, whose finder has the name of the one in `folder`, so `folder` comes first.
    """
    paths = (
        "import site, sys\n"
        f"site.addsitedir({str(folder)!r})\n"
        f"sys.path.append({str(SITE_PACKAGES)!r})\n"
    )
    return call("-E", "-S", "-W", "error", "-c", paths + program, cwd=cwd)


def sources(folder):
    """Name the modules of a tree as the wheel does."""
    link = folder / "fastsiam" / "kernels"
    own = [f for f in (folder / "fastsiam").rglob("*.py") if link not in f.parents]
    names = {f.relative_to(folder).as_posix() for f in own}
    return names | {f"fastsiam/kernels/{f.name}" for f in (folder / "kernels").glob("*.py")}


def test_link_is_relative():
    link = ROOT / "fastsiam" / "kernels"
    assert link.is_symlink()
    assert link.readlink() == Path("../kernels")
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_wheel_holds_every_module_once(checkout, built):
    names = zipfile.ZipFile(built[1]).namelist()
    assert len(set(names)) == len(names)
    inside = {name for name in names if ".dist-info/" not in name}
    others = {"fastsiam/py.typed"}
    if HAS_COMPILER:
        others.add("fastsiam/_compiled_steps.abi3.so")
        if platform.machine() == "x86_64":
            others.add("fastsiam/_compiled_steps_avx512.abi3.so")
    assert inside == sources(checkout) | others
    assert "-cp311-abi3-" in built[1].name


def test_sdist_holds_one_copy_of_the_kernels(checkout, built):
    with tarfile.open(built[0]) as archive:
        members = archive.getmembers()
    assert not any(member.issym() or member.islnk() for member in members)
    names = [member.name.partition("/")[2] for member in members if member.isfile()]
    python = {name for name in names if name.endswith(".py")}
    expected = {name.replace("fastsiam/kernels/", "kernels/") for name in sources(checkout)}
    assert python == expected | {"setup.py"}
    assert {f"kernels/cpu/{file.name}" for file in (ROOT / "kernels/cpu").iterdir()} <= set(names)
    assert {"LICENSE", "README.md", "CHANGELOG.md", "constraints.txt"} <= set(names)


def test_metadata(built):
    with zipfile.ZipFile(built[1]) as wheel:
        (name,) = [n for n in wheel.namelist() if n.endswith(".dist-info/METADATA")]
        metadata = wheel.read(name).decode()
        scripts = wheel.read(name.replace("METADATA", "entry_points.txt")).decode()
    assert "\nRequires-Python: >=3.11\n" in metadata
    assert "\nLicense-Expression: Apache-2.0\n" in metadata
    assert '\nRequires-Dist: triton>=3.6; sys_platform == "linux"\n' in metadata
    assert "fastsiam = fastsiam.cli:main" in scripts


def test_version_is_the_same_everywhere(built):
    import fastsiam

    assert f"-{fastsiam.__version__}-" in built[1].name


def test_constraints_are_exact_and_public():
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert {"torch==2.13.0", "triton==3.7.1"} <= set(pins)
    for pin in pins:
        name, _, version = pin.partition("==")
        assert name, pin
        assert version, pin
        assert not set("+@/ ") & set(pin), pin


WHERE = ["unpacked_wheel", "editable", "checkout"]

IMPORT = """
import importlib.util
import torch
before = set(sys.modules)
import fastsiam
came = sorted({name.partition(".")[0] for name in set(sys.modules) - before})
third_party = [name for name in came if name not in sys.stdlib_module_names]
kernel = importlib.util.find_spec("fastsiam.kernels.tile")
print(fastsiam.__file__, kernel.origin, *third_party, sep="\\n")
"""


@pytest.mark.parametrize("where", WHERE)
def test_import_needs_torch_alone(where, request, tmp_path):
    folder = request.getfixturevalue(where)
    package, kernel, *third_party = run_with(folder, IMPORT, tmp_path).splitlines()
    home = request.getfixturevalue("checkout") if where == "editable" else folder
    assert Path(package) == home / "fastsiam" / "__init__.py"
    assert Path(kernel).samefile(home / "fastsiam" / "kernels" / "tile.py")
    assert [name for name in third_party if not name.startswith("__editable__")] == ["fastsiam"]


WITHOUT = """
for name in ["triton", "gensim", "nltk", "scipy", "matplotlib", "safetensors", "typer", "rich"]:
    sys.modules[name] = None  # as if it were not installed
import torch
from fastsiam import SiameseLSTM
torch.manual_seed(0)
left, right = torch.randn(2, 3, 4, 5)
model = SiameseLSTM(5, 6)
similarity = model(left, right, [4, 1, 0], [2, 3, 4])
similarity.sum().backward()
assert similarity.shape == (3,) and bool(((similarity > 0) & (similarity <= 1)).all())
assert bool(model.weight_hh_l0.grad.abs().sum() > 0)
print(model.explain())
model.backend = "triton"
try:
    model(left, right)
except ImportError as error:
    print(error)
"""


@pytest.mark.parametrize("where", WHERE)
def test_works_without_triton_and_text_libraries(where, request, tmp_path):
    folder = request.getfixturevalue(where)
    explained, error = run_with(folder, WITHOUT, tmp_path).splitlines()
    compiled = HAS_COMPILER and where != "checkout"
    assert explained.startswith("cpu: " if compiled else ("cpu: ", "batched: "))
    assert "needs the package triton, which is not installed" in error
    assert "backend='torch'" in error

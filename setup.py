"""The C++ ops, where torch and a compiler are there; everything else is in pyproject.toml.

LBDT_BUILD: "auto" (default: pure PyTorch with a message where the build is not possible), "1" (a failed build
is an error), "0" (never build). LBDT_BUILD_CUDA: whether with the CUDA ops, see lbdt/_build.py.
"""

import importlib.util
import os
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.sdist import sdist

ROOT = Path(__file__).resolve().parent


def _builder():
    # By path: an import of lbdt could find another, installed one.
    spec = importlib.util.spec_from_file_location("_lbdt_build", ROOT / "lbdt" / "_build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class BuildOps(build_ext):
    """Compiles with lbdt/_build.py, the same commands as the build at first use."""

    def build_extension(self, ext):
        try:
            _builder().compile_extension(Path(self.get_ext_fullpath(ext.name)).resolve())
        except (ImportError, RuntimeError) as error:
            if MODE == "1" or os.environ.get("LBDT_BUILD_CUDA") == "1":
                raise
            print(f"lbdt: C++ ops not built, the ops will run in PyTorch. Reason: {error}", file=sys.stderr)

    def get_outputs(self):
        return [path for path in super().get_outputs() if Path(path).exists()]


class SourceArchive(sdist):
    """With the C++ files also where they are not built, and with the pinned versions and commands."""

    def make_distribution(self):
        commands = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob(".ci/*"))
        self.filelist.extend(name for name in SOURCES + commands if name not in self.filelist.files)
        super().make_distribution()


MODE = os.environ.get("LBDT_BUILD", "auto")
if MODE not in ("auto", "0", "1"):
    sys.exit(f"LBDT_BUILD: expected auto, 0 or 1, got {MODE!r}")
if MODE == "auto" and importlib.util.find_spec("torch") is None:
    print(
        "lbdt: torch is not importable here, so the C++ ops are not built and the ops will run in PyTorch. "
        "To build them: install torch first, then pip install --no-build-isolation",
        file=sys.stderr,
    )
    MODE = "0"

SOURCES = [str(path.relative_to(ROOT)) for path in _builder().sources()]
UNITS = [name for name in SOURCES if name.endswith((".cpp", ".cu"))]
setup(
    ext_modules=[]
    if MODE == "0"
    else [
        Extension("lbdt._C", UNITS, depends=SOURCES, py_limited_api=True, optional=MODE == "auto"),
    ],
    cmdclass={"build_ext": BuildOps, "sdist": SourceArchive},
    options={} if MODE == "0" else {"bdist_wheel": {"py_limited_api": "cp311"}},
)

"""Compiles the CPU kernels with whatever C++ compiler is there; everything else is in pyproject.toml.

The kernels are one shared library that Python loads with ctypes: it is linked against neither Python nor
torch. They are optional. Without a compiler, or with one that fails, the installation goes on, and at run
time torch does the work.
"""

import os
import platform
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOM = Path("seekvl/engine/kernels")
AVX2 = ("-mavx2", "-mfma", "-mf16c")
AVX512 = ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", *AVX2)
X86_FLAGS = {
    "avx2": AVX2,
    "avx512": AVX512,
    "avx512_bf16": (*AVX512, "-mavx512bf16"),
    "packed_avx2": AVX2,
    "packed_vnni": (*AVX512, "-mavx512vnni"),
}
ARM_FLAGS = {"packed_dotprod": ("-march=armv8.2-a+dotprod",)}
"""What the sources of a level may use beyond the baseline; on other processors they compile to nothing."""

FLAGS = (
    *("-std=c++17", "-O3", "-g0", "-fvisibility=hidden", "-fno-math-errno", "-pthread"),
    *("-Wno-maybe-uninitialized", "-Wno-uninitialized"),  # GCC 12 warns of its own headers
)


def flags_for(stem: str, *, x86: bool = False, arm: bool = False) -> list[str]:
    """Return the flags of a source, named without its ending, for x86, 64-bit ARM or another processor."""
    level = X86_FLAGS.get(stem, ()) if x86 else ARM_FLAGS.get(stem, ()) if arm else ()
    packed = (
        ("-ffp-contract=off",) if stem.startswith("packed") else ()
    )  # inputs are rounded alike everywhere
    return [*FLAGS, *level, *packed]


class BuildKernels(build_ext):
    """Makes the one library, each source with flags of its own."""

    def get_ext_filename(self, fullname: str) -> str:
        """Return the path of the library: without the Python version, for it does not depend on it."""
        return str(Path(*fullname.split(".")).with_suffix(".so"))

    def build_extension(self, ext: Extension) -> None:
        """Compile and link; setuptools makes a warning of an error, as the extension is optional."""
        machine = platform.machine().lower()
        x86, arm = machine in ("x86_64", "amd64"), machine in ("aarch64", "arm64")
        objects: list[str] = []
        for source in ext.sources:
            objects += self.compiler.compile(
                [source],
                output_dir=self.build_temp,
                extra_postargs=flags_for(Path(source).stem, x86=x86, arm=arm),
                depends=ext.depends,
            )
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        self.compiler.link_shared_object(
            objects, str(target), extra_postargs=["-pthread"], target_lang="c++", build_temp=self.build_temp
        )


if sys.platform == "darwin":  # a Python for both processors would ask one compilation for the code of both
    os.environ.setdefault("ARCHFLAGS", f"-arch {platform.machine()}")

setup(
    cmdclass={"build_ext": BuildKernels},
    ext_modules=[
        Extension(
            "seekvl.engine.kernels.native",
            sources=sorted(str(path) for path in (ROOM / "src").glob("*.cpp")),
            depends=sorted(str(path) for path in (ROOM / "src").glob("*.h")),
            language="c++",
            optional=True,
        )
    ],
)

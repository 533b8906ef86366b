"""Package list and the native build; all other metadata lives in pyproject.toml.

SEMEDA_FAST_BUILD chooses what is compiled. The choice never depends on a visible GPU or on torch:

    auto (default)  build semeda_fast._C where a C++ compiler works; otherwise install pure Python
    cpu             build semeda_fast._C or fail
    cuda            reserved for the CUDA kernels; an error in this version, which has no CUDA source
    none            install pure Python
"""

from __future__ import annotations

import os
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

MODES = ("auto", "cpu", "cuda", "none")
CPU = Path("csrc", "cpu")
SOURCES = [
    "csrc/bindings.cpp",
    *(f"csrc/cpu/{name}.cpp" for name in ("driver", "features", "labels", "plan")),
]
HEADERS = sorted(path.as_posix() for folder in (Path("csrc"), CPU) for path in folder.glob("*.h"))
# One object file per instruction set, chosen at run time; without its flags a file compiles to "not built".
INSTRUCTION_SETS = {
    "csrc/cpu/kernels_avx512.cpp": {
        "unix": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mfma", "-mf16c", "-mprefer-vector-width=512"],
        "msvc": ["/arch:AVX512"],
    },
    "csrc/cpu/kernels_avx2.cpp": {"unix": ["-mavx2", "-mfma", "-mf16c"], "msvc": ["/arch:AVX2"]},
    "csrc/cpu/kernels_portable.cpp": {"unix": [], "msvc": []},
}
OPENMP_PROBE = "#include <omp.h>\nint main() { return omp_get_max_threads() > 0 ? 0 : 1; }\n"


def requested_mode() -> str:
    """SEMEDA_FAST_BUILD, checked."""
    mode = os.environ.get("SEMEDA_FAST_BUILD", "").strip().lower() or "auto"
    if mode not in MODES:
        sys.exit(f"SEMEDA_FAST_BUILD must be one of {', '.join(MODES)}; got {mode!r}")
    if mode == "cuda":
        sys.exit(
            "SEMEDA_FAST_BUILD=cuda: this version of semeda_fast has no CUDA source to build; "
            "use SEMEDA_FAST_BUILD=auto, cpu or none"
        )
    return mode


def note(text: str) -> None:
    """Tell the person who installs; pip shows it with -v."""
    print(f"semeda_fast: {text}", file=sys.stderr, flush=True)


def skipped(cause: object) -> None:
    """The note of an install that goes on as pure Python."""
    note(
        f"installing without the native module semeda_fast._C ({cause}). Everything in Python works; "
        "to see the full build error, install with SEMEDA_FAST_BUILD=cpu"
    )


class BuildNative(build_ext):
    """build_ext that asks the compiler about OpenMP and, in mode auto, survives a failing compiler."""

    def run(self) -> None:
        try:
            super().run()
        except Exception as error:
            self.handle(error)

    def build_extensions(self) -> None:
        compile_flags, link_flags = self.openmp_flags()
        if self.compiler.compiler_type == "msvc":
            compile_flags = ["/O2", "/W3", *compile_flags]
        else:
            # The uninitialised values that GCC sees are its own intrinsics'.
            warnings = ["-Wall", "-Wextra", "-Wno-maybe-uninitialized"]
            compile_flags = ["-O3", "-ffp-contract=fast", *warnings, *compile_flags]
        for extension in self.extensions:
            extension.extra_compile_args += compile_flags
            extension.extra_link_args += link_flags
        super().build_extensions()

    def build_extension(self, ext: Extension) -> None:
        try:
            with ThreadPoolExecutor(os.cpu_count()) as pool:  # they take nearly all of the time
                objects = pool.map(lambda source: self.compile_for_instruction_set(ext, source), INSTRUCTION_SETS)
                ext.extra_objects = list(objects)
            super().build_extension(ext)
        except Exception as error:
            self.handle(error)

    def compile_for_instruction_set(self, ext: Extension, source: str) -> str:
        """The object file of one set of kernels, with its flags where compiler and target take them."""
        kind = "msvc" if self.compiler.compiler_type == "msvc" else "unix"
        for flags in (INSTRUCTION_SETS[source][kind], []):
            try:
                (compiled,) = self.compiler.compile(
                    [source],
                    output_dir=self.build_temp,
                    include_dirs=ext.include_dirs,
                    extra_postargs=[*ext.extra_compile_args, *flags],
                )
                return compiled
            except Exception:
                if not flags:
                    raise
                note(f"{source}: this compiler or target does not take {' '.join(flags)}; built without it")
        raise AssertionError("unreachable")

    def handle(self, error: Exception) -> None:
        """Note the failure in mode auto, end the build in mode cpu."""
        if MODE == "auto":
            skipped(error)
        else:
            sys.exit(
                f"SEMEDA_FAST_BUILD={MODE}: the native module did not build: {error}\n"
                "It needs a C++17 compiler (the variables CC and CXX name one) and pybind11; "
                "SEMEDA_FAST_BUILD=none installs without it"
            )

    def openmp_flags(self) -> tuple[list[str], list[str]]:
        """Compile and link flags for OpenMP, or none where the compiler lacks it (Apple clang)."""
        msvc = self.compiler.compiler_type == "msvc"
        compile_flags, link_flags = (["/openmp"], []) if msvc else (["-fopenmp"], ["-fopenmp"])
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder, "openmp_probe.cpp")
            source.write_text(OPENMP_PROBE)
            try:
                objects = self.compiler.compile(
                    [str(source)], output_dir=str(Path(folder, "objects")), extra_postargs=compile_flags
                )
                self.compiler.link_executable(
                    objects, str(Path(folder, "probe")), extra_postargs=link_flags, target_lang="c++"
                )
            except Exception:
                note("no OpenMP program could be built; the native module, if it builds, will use one thread")
                return [], []
        return compile_flags, link_flags


def native_extensions() -> list[Extension]:
    """The extension to build in this mode; empty for a pure Python install."""
    if MODE == "none":
        note("SEMEDA_FAST_BUILD=none: installing without the native module semeda_fast._C")
        return []
    try:
        from pybind11.setup_helpers import Pybind11Extension
    except ImportError as error:
        if MODE == "cpu":
            sys.exit(f"SEMEDA_FAST_BUILD=cpu needs pybind11 at build time: {error}; pip install pybind11")
        skipped(error)
        return []
    # optional: setuptools must not look for the built file after a failure that was only noted.
    return [Pybind11Extension("semeda_fast._C", SOURCES, depends=HEADERS, cxx_std=17, optional=MODE == "auto")]


MODE = requested_mode()

setup(
    packages=["semeda_fast", "semeda_fast.proxy", "semeda_fast.kernels"],
    # The Triton kernels live beside csrc/ in the repository and are imported as semeda_fast.kernels.
    package_dir={"semeda_fast.kernels": "kernels"},
    package_data={"semeda_fast": ["py.typed"], "semeda_fast.proxy": ["weights/*.safetensors"]},
    include_package_data=False,
    ext_modules=native_extensions(),
    cmdclass={"build_ext": BuildNative},
)

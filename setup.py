"""Package list and the native build; all other metadata lives in pyproject.toml.

SEMEDA_FAST_BUILD chooses what is compiled. The choice never depends on a visible GPU or on torch:

    auto (default)  semeda_fast._C (CPU kernels) where a C++ compiler works, under a minute; goes on without it where it
                    does not build, and notes why (pip install -v)
    cpu             semeda_fast._C, or fail
    cuda            semeda_fast._C and semeda_fast._C_cuda (CUDA kernels: minutes of nvcc), or fail
    none            nothing: pure Python

nvcc is looked for in CUDA_HOME, CUDA_PATH, PATH and /usr/local/cuda; CXX names the host compiler that it is to use.
SEMEDA_FAST_CUDA_ARCHS lists the GPU architectures, such as "90" or "80,86+PTX" (+PTX: code that newer GPUs compile
for themselves); the default is all that nvcc knows of 80, 86, 89, 90, 100, 120, and PTX of the newest. One is built
much faster than all.

The CUDA kernels alone, into a checkout:

    SEMEDA_FAST_BUILD=cuda python setup.py build_ext --inplace --only semeda_fast._C_cuda
"""

from __future__ import annotations

import os
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import ClassVar

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import OptionError

# A build backend does not put the source folder on the path.
sys.path.insert(0, str(Path(__file__).resolve().parent / "csrc" / "cuda"))
import nvcc

MODES = ("auto", "cpu", "cuda", "none")
CPU_MODULE, CUDA_MODULE = "semeda_fast._C", "semeda_fast._C_cuda"
CPU, CUDA = Path("csrc", "cpu"), Path("csrc", "cuda")
SOURCES = [
    "csrc/bindings.cpp",
    *(f"csrc/cpu/{name}.cpp" for name in ("driver", "eager", "features", "labels", "plan")),
]
CUDA_KERNELS = sorted(path.as_posix() for path in CUDA.glob("*.cu"))
CUDA_HOST_SOURCES = sorted(path.as_posix() for path in CUDA.glob("*.cpp"))
HEADERS, CUDA_HEADERS = (
    sorted(path.as_posix() for folder in (Path("csrc"), own) for path in (*folder.glob("*.h"), *folder.glob("*.cuh")))
    for own in (CPU, CUDA)
)
# One object file per instruction set, chosen at run time; without its flags a file compiles to "not built".
INSTRUCTION_SETS = {
    "csrc/cpu/kernels_avx512.cpp": {
        "unix": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mfma", "-mf16c", "-mprefer-vector-width=512"],
        "msvc": ["/arch:AVX512"],
    },
    "csrc/cpu/kernels_avx2.cpp": {"unix": ["-mavx2", "-mfma", "-mf16c"], "msvc": ["/arch:AVX2"]},
    "csrc/cpu/kernels_neon.cpp": {"unix": [], "msvc": []},  # part of every arm64 target
    # Where the target has fused products, a compiler makes them in one instance of a template and not in another, and
    # a loss without a gradient would differ in a bit from the same with one.
    "csrc/cpu/kernels_portable.cpp": {"unix": ["-ffp-contract=off"], "msvc": []},
}
NEEDED = {
    CPU_MODULE: "It needs a C++17 compiler (the variables CC and CXX name one) and pybind11",
    CUDA_MODULE: "It needs NVIDIA's CUDA toolkit (CUDA_HOME names its folder; no GPU is needed), a C++17 compiler that "
    "its nvcc accepts (CXX names one) and pybind11; SEMEDA_FAST_BUILD=cpu installs without it",
}
OPENMP_PROBE = "#include <omp.h>\nint main() { return omp_get_max_threads() > 0 ? 0 : 1; }\n"


def requested_mode() -> str:
    """SEMEDA_FAST_BUILD, checked."""
    mode = os.environ.get("SEMEDA_FAST_BUILD", "").strip().lower() or "auto"
    if mode not in MODES:
        sys.exit(f"SEMEDA_FAST_BUILD must be one of {', '.join(MODES)}; got {mode!r}")
    if mode == "cuda" and not CUDA_KERNELS:
        sys.exit(
            "SEMEDA_FAST_BUILD=cuda: this source has no CUDA kernels (csrc/cuda/*.cu); "
            "use SEMEDA_FAST_BUILD=auto, cpu or none"
        )
    return mode


def requested_architectures() -> list[int] | None:
    """SEMEDA_FAST_CUDA_ARCHS, checked; empty for the default, None where no CUDA kernels are to be built."""
    text = os.environ.get(nvcc.ARCHS_VARIABLE, "")
    none = text.strip().lower() == "none"
    if MODE == "auto" and text.strip() and not none:  # somebody waits for kernels that this mode leaves out
        sys.exit(
            f"{nvcc.ARCHS_VARIABLE}={text} is for CUDA kernels, which SEMEDA_FAST_BUILD=cuda builds; set that, too, or "
            f"unset {nvcc.ARCHS_VARIABLE}"
        )
    if MODE != "cuda":
        return None
    if none:
        sys.exit(f"SEMEDA_FAST_BUILD=cuda builds CUDA kernels, and {nvcc.ARCHS_VARIABLE}=none none; change one")
    try:
        return nvcc.parse_architectures(text)
    except ValueError as error:
        sys.exit(str(error))


def note(text: str) -> None:
    """Tell the person who installs; pip shows it with -v."""
    print(f"semeda_fast: {text}", file=sys.stderr, flush=True)


def skipped(cause: object) -> None:
    """The note of an install in mode auto that goes on without the CPU kernels."""
    note(
        f"installing without the native module {CPU_MODULE} ({cause}). Everything in Python works; "
        "to see the full build error, install with SEMEDA_FAST_BUILD=cpu"
    )


class BuildNative(build_ext):
    """build_ext that compiles CUDA, asks the compiler about OpenMP and, in mode auto, survives what does not build."""

    user_options: ClassVar[list[tuple[str, str | None, str]]] = [
        *build_ext.user_options,
        ("only=", None, "build this extension alone, such as semeda_fast._C_cuda"),
    ]

    def initialize_options(self) -> None:
        super().initialize_options()
        self.only: str | None = None

    def finalize_options(self) -> None:
        super().finalize_options()
        if self.only is not None:
            names = [extension.name for extension in self.extensions]
            if self.only not in names:
                hint = "; SEMEDA_FAST_BUILD=cuda adds it" if self.only == CUDA_MODULE else ""
                raise OptionError(f"--only must name an extension of this build, {names}; got {self.only!r}{hint}")
            self.extensions = [extension for extension in self.extensions if extension.name == self.only]

    def run(self) -> None:
        try:
            super().run()
        except Exception as error:
            for extension in self.extensions:
                self.handle(extension.name, error)

    def build_extensions(self) -> None:
        if self.compiler.compiler_type == "msvc":
            compile_flags = ["/O2", "/W3"]
        else:
            # The uninitialised values that GCC sees are its own intrinsics'.
            warnings = ["-Wall", "-Wextra", "-Wno-maybe-uninitialized"]
            compile_flags = ["-O3", "-ffp-contract=fast", *warnings]
        for extension in self.extensions:
            extension.extra_compile_args += compile_flags
            if extension.name == CPU_MODULE:
                openmp_compile_flags, openmp_link_flags = self.openmp_flags()
                extension.extra_compile_args += openmp_compile_flags
                extension.extra_link_args += openmp_link_flags
                continue
            try:  # before anything is compiled, so that it fails at once where there is no nvcc
                self.cuda = self.configure_cuda(extension)
            except Exception as error:
                self.handle(extension.name, error)
        super().build_extensions()

    def build_extension(self, ext: Extension) -> None:
        build = self.build_cuda if ext.name == CUDA_MODULE else self.build_cpu
        try:
            build(ext)
        except Exception as error:
            self.handle(ext.name, error)

    def build_cpu(self, ext: Extension) -> None:
        """Compile the kernels of each instruction set, then the rest, and link."""
        with ThreadPoolExecutor(os.cpu_count()) as pool:  # they take nearly all of the time
            objects = pool.map(lambda source: self.compile_for_instruction_set(ext, source), INSTRUCTION_SETS)
            ext.extra_objects = list(objects)
        ext.depends = [*ext.depends, *ext.extra_objects]  # or the module would count as up to date without them
        super().build_extension(ext)

    def configure_cuda(self, ext: Extension) -> nvcc.Compilation:
        """Find nvcc, choose the architectures, and tell the compiler about both; how the kernels are compiled."""
        ccbin = nvcc.host_compiler()
        toolkit = nvcc.inspect(nvcc.find_nvcc(), ccbin)
        architectures = nvcc.choose_architectures(ARCHITECTURES or [], toolkit)
        note(f"CUDA {toolkit.version} ({toolkit.nvcc}) compiles for {nvcc.initialiser(architectures)} (negative: PTX)")
        ext.define_macros.append(("SEMEDA_FAST_CUDA_ARCHITECTURES", nvcc.initialiser(architectures)))
        ext.include_dirs += toolkit.include_dirs
        ext.library_dirs += toolkit.library_dirs
        ext.libraries.append("cudart_static")  # so that the module imports where there is no CUDA
        if sys.platform == "linux":
            ext.libraries += ["rt", "pthread", "dl"]  # of the runtime
        host_flags = ("/MD", "/W3") if self.compiler.compiler_type == "msvc" else nvcc.HOST_FLAGS
        options = [*ccbin, *nvcc.compile_options(architectures), f"-Xcompiler={','.join(host_flags)}"]
        folder = Path(self.build_temp, CUDA).as_posix()
        return nvcc.Compilation(toolkit, tuple(options), tuple(CUDA_HEADERS), folder)

    def build_cuda(self, ext: Extension) -> None:
        """Compile the kernels with nvcc, the rest with the host compiler, and link."""
        ext.extra_objects = self.cuda.compile_all(CUDA_KERNELS, note)
        forced, self.force = self.force, True  # other architectures are not seen in the files' dates
        try:
            super().build_extension(ext)
        finally:
            self.force = forced

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
            except Exception as error:
                if not flags:
                    raise
                note(f"{source}: does not compile with {' '.join(flags)}, so it is built without: {error}")
        raise AssertionError("unreachable")

    def handle(self, module: str, error: Exception) -> None:
        """Note the failure in mode auto, end the build in the others."""
        if MODE == "auto":
            skipped(error)
        else:
            sys.exit(
                f"SEMEDA_FAST_BUILD={MODE}: the native module {module} did not build: {error}\n"
                f"{NEEDED[module]}; SEMEDA_FAST_BUILD=none installs pure Python"
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
    """The extensions to build in this mode; empty for a pure Python install."""
    if MODE == "none":
        note("SEMEDA_FAST_BUILD=none: installing without the native module semeda_fast._C")
        return []
    try:
        from pybind11.setup_helpers import Pybind11Extension
    except ImportError as error:
        if MODE != "auto":
            sys.exit(f"SEMEDA_FAST_BUILD={MODE} needs pybind11 at build time: {error}; pip install pybind11")
        skipped(error)
        return []
    # optional: setuptools must not look for the built file after a failure that was only noted.
    options = {"cxx_std": 17, "optional": MODE == "auto"}
    extensions = [Pybind11Extension(CPU_MODULE, SOURCES, depends=HEADERS, **options)]
    if ARCHITECTURES is not None:
        depends = [*CUDA_KERNELS, *CUDA_HEADERS]
        extensions.append(Pybind11Extension(CUDA_MODULE, CUDA_HOST_SOURCES, depends=depends, **options))
    return extensions


MODE = requested_mode()
ARCHITECTURES = requested_architectures()

setup(
    py_modules=["semeda_fast_command"],
    packages=[
        "semeda_fast",
        "semeda_fast.backends",
        "semeda_fast.integrations",
        "semeda_fast.metrics",
        "semeda_fast.proxy",
        "semeda_fast.kernels",
    ],
    # The Triton kernels live beside csrc/ in the repository and are imported as semeda_fast.kernels.
    package_dir={"semeda_fast.kernels": "kernels"},
    package_data={"semeda_fast": ["py.typed"], "semeda_fast.proxy": ["weights/*.safetensors"]},
    include_package_data=False,
    ext_modules=native_extensions(),
    cmdclass={"build_ext": BuildNative},
)

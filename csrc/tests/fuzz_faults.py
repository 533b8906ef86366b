"""Takes one check after the other out of the native entries, and sees that the fuzzer of `make fuzz-native` turns red.

    python csrc/tests/fuzz_faults.py [--calls 3000] [PART OF A FAULT'S NAME]

Half an hour on one core: each fault is compiled for itself, but for the kernels.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import fuzz_native
from sanitize import ROOT

CPU, CUDA = "_C", fuzz_native.CUDA_MODULE
CHECK, BIND, PLAN = "csrc/check.h", "csrc/bind_params.h", "csrc/cuda/plan.cpp"


class Fault(NamedTuple):
    """A text that stands once in a file, and what takes its place."""

    name: str
    file: str
    text: str
    instead: str
    module: str = CPU


FAULTS = (
    Fault("the bytes of a buffer", CHECK, "if (buffer.bytes < bytes) {", "if (false) {"),
    Fault("an address of 0", CHECK, "if (!data) refuse(", "if (false) refuse("),
    Fault("alignment", CHECK, "static_cast<std::uintptr_t>(element) != 0) {", "element < 0) {"),
    Fault("the bytes in front of a view", CHECK, "if (-first > view.before || last", "if (last"),
    Fault("the bytes behind a view", CHECK, "-first > view.before || last > view.after", "-first > view.before"),
    Fault("a view's last element", CHECK, "    last += element;\n", ""),
    Fault("huge strides", CHECK, "if (stride > most || stride < -most) {", "if (false) {"),
    Fault("labels that are floats", CHECK, "if (is_float(p.target.dtype)) refuse(", "if (false) refuse("),
    Fault("soft targets that are integers", CHECK, 'need_float("target", p.target', 'need("target", p.target'),
    Fault("the dtype of valid", CHECK, "if (p.valid.dtype != DType::u8) refuse(", "if (false) refuse("),
    Fault("valid", CHECK, 'need("valid", p.valid, {{p.n, 1, p.h, p.w}});', ""),
    Fault("class weights", CHECK, "if (p.class_weight.is_given()) {", "if (false) {"),
    Fault("rows of class weights", CHECK, "4 * p.weight_rows * p.classes);", "4 * p.classes);"),
    Fault("images in groups", CHECK, "size.of[0] % view.fold != 0)) {", "false)) {"),
    Fault(
        "groups of images",
        CHECK,
        "stride = i < 4 ? view.stride[i] : view.outer,",
        "stride = i < 4 ? view.stride[i] : 0,",
    ),
    Fault("biases of the proxy", CHECK, 'need("the proxy\'s biases"', 'if (false) need("the proxy\'s biases"'),
    Fault("a map of cross-entropy", CHECK, "if (p.ce_map.is_given()) need(", "if (false) need("),
    Fault("codes of forward", CHECK, '            need("codes", p.codes, codes);\n', ""),
    Fault("differences of forward", CHECK, '            need("saved_d", p.saved_d, saved_d);\n', ""),
    Fault("codes of backward", CHECK, '    need("codes", p.codes, codes);\n    need("saved_d"', '    need("saved_d"'),
    Fault("gradients that come down", CHECK, 'need("d_ce", p.d_ce, map);', ""),
    Fault("d_logits", CHECK, '    need("d_logits", p.d_logits, of_logits);\n', ""),
    Fault("the dtype of d_logits", CHECK, "if (p.d_logits.dtype != p.logits.dtype) refuse(", "if (false) refuse("),
    Fault("channels from layer to layer", CHECK, "if (p.layer[l].in != in) {", "if (false) {"),
    Fault("a layer's kernel", CHECK, 'check_range("a layer\'s kernel size", layer.ksize, 1, MAX_KSIZE);', ""),
    Fault("the number of layers", CHECK, 'check_range("the number of layers", p.layers, 2, MAX_LAYERS);', ""),
    Fault("the number of classes", CHECK, 'check_range("the number of classes", p.classes, 1, max_classes);', ""),
    Fault("classes of binary mode", CHECK, "if (p.binary && p.classes != 2) {", "if (false) {"),
    Fault("channels of soft targets", CHECK, "if (p.soft && p.soft_channels != p.classes", "if (false"),
    Fault("logits that are scaled down", CHECK, "p.logits_h, 1, p.h);", "p.logits_h, 1, MAX_SIDE);"),
    Fault("too many pixels", CHECK, "if (one(p.n) > MAX_PIXELS / one(p.h) / one(p.w)) {", "if (false) {"),
    Fault("a negative height", CHECK, 'check_range("h", p.h, 0, MAX_SIDE);', ""),
    Fault("a dtype's code", BIND, 'check_range("a dtype\'s code", dtype, 0', 'check_range("", 0, 0'),
    Fault("an offset", BIND, 'check_range("the offset of a tensor in its storage", offset,', 'check_range("", 0,'),
    Fault("threads", "csrc/cpu/driver.cpp", 'check_range("threads", p.threads, 1', 'check_range("", 1, 1'),
    Fault("images of no pixels", "csrc/cpu/driver.cpp", "    if (p.n * p.h * p.w == 0) return 0;\n", ""),
    Fault("labels that are looked at", "csrc/cpu/labels.cpp", "    check_labels(p);\n", ""),
    Fault("what forward keeps", "csrc/cpu/eager.cpp", "kept_bytes());\n    return", "0);\n    return"),
    Fault("tensors of the proxy", "csrc/cpu/eager.cpp", "if (proxy.size() != 2 *", "if (proxy.size() < 0 *"),
    Fault("where the loss goes", "csrc/bindings.cpp", '    need("the loss", to, 4);\n', ""),
    Fault("where a term goes", "csrc/bindings.cpp", '    need("per_layer"', '    if (false) need("per_layer"'),
    Fault("terms", CHECK, '    need("terms", p.terms, 4 * (3 + std::int64_t{p.layers}));\n', "", CUDA),
    Fault("the workspace", PLAN, '    need("workspace", workspace, launch.workspace);\n', "", CUDA),
    Fault("codes on a GPU", PLAN, "code_bytes(params), 0);", "0, 0);", CUDA),
    Fault("what kernels do not know", PLAN, "    if (!reason.empty()) throw", "    if (false) throw", CUDA),
    Fault("tiles of an image", PLAN, "* tile.tiling.down, 0,", "* 0, 0,", CUDA),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", nargs="?", default="", help="only faults whose name holds this")
    parser.add_argument("--calls", type=int, default=3000)
    parser.add_argument("--build", type=Path, default=ROOT / "build" / "fuzz-faults", help="where object files go")
    options = parser.parse_args()
    preload, unseen = fuzz_native.runtimes(), []
    for fault in FAULTS:
        if options.part not in fault.name:
            continue
        with tempfile.TemporaryDirectory() as folder:
            copy = Path(folder)
            shutil.copytree(ROOT / "csrc", copy / "csrc")
            shutil.copy(ROOT / "setup.py", copy)
            source = copy / fault.file
            text = source.read_text(encoding="utf-8")
            if text.count(fault.text) != 1:
                sys.exit(f"{fault.name}: {fault.text!r} stands {text.count(fault.text)} times in {fault.file}")
            source.write_text(text.replace(fault.text, fault.instead), encoding="utf-8")
            module = fuzz_native.build_modules(copy, options.build, [fault.module])[fault.module]
            problem = fuzz_native.fuzz(module, options.calls, 0, preload, quiet=True)
            if not problem:  # few calls can show it, such as a dtype of the same width
                problem = fuzz_native.fuzz(module, 5 * options.calls, 1, preload, quiet=True)
        print(f"{fault.name:30} {problem or 'NOT SEEN'}", flush=True)
        if not problem:
            unseen.append(fault.name)
    if unseen:
        sys.exit(f"the fuzzer sees nothing of: {', '.join(unseen)}")


if __name__ == "__main__":
    main()

"""Which guarantee tests the backends of a GPU take part in where there is none.

The CUDA kernels run in an emulation and take part in all but the large ones. In Triton's interpreter a loss and its
gradient take seconds, whatever the size of the image, so by default guarantees are shown once (bit-equal runs in
test_triton_kernels.py), without those that backends/fused.py keeps for all backends alike, which the emulation
shows; SEMEDA_FAST_INTERPRETER=full runs all of them. On a GPU every one runs.
"""

from __future__ import annotations

import dataclasses
import importlib
import os
import re

# Larger than what the interpreter or the emulation can do in minutes.
NEVER = ("test_half_precision_stays_finite_at_512",)
# name -> a pattern that the parameters contain, the backend's and device's left out
CHOSEN = {
    "test_error_budget": r"l1-pre|l2-post-dtype1|smooth_l1-pre-dtype2",
    "test_scaled_up_within_the_budget": r"dtype1-nchw-sizes0",
    "test_layouts": r"dtype1-channels_last|dtype0-sliced|dtype2-every_other",
    "test_the_mean_counts_valid_pixels_only": "",
    "test_label_widths_agree": r"labels0",
    "test_the_upper_half_of_uint16": "40000",
    "test_expanded_logits_and_labels": "",
    "test_ignore_index_may_be_a_class": "",
    "test_class_counts": r"^1$|^150",
    "test_sizes": r"1-1-1|2-5-1|1-7-7",
    "test_one_channel_is_binary": "",
    "test_soft_targets_within_the_budget": "",
    "test_a_volume_is_its_slices": r"^labels-4|^soft-2",
    "test_overlapping_classes_are_binary_planes": r"pixels-False",
    "test_weights_of_planes_are_those_of_binary_cross_entropy": r"0.0-False",
    "test_void_logits_change_nothing": r"mean-nan|none-inf",
    "test_everything_ignored_or_empty": r"shape0-mean|shape1-mean",
    "test_label_out_of_range": "",
    "test_one_pixel_that_holds_no_distribution": r"(below 0|two classes|NaN)-last$",
    "test_what_rounding_may_do_passes": r"below|sum of 0.96",
    "test_never_looks_at_nothing": "none",
    "test_grey_levels_do_not_train": "",
    "test_unchecked_bad_labels_make_nan_not_garbage": r"mean-5|none--1$",
    "test_nan_logits_make_a_nan_loss_or_an_error": "",
    "test_compile_dynamic": "",
    "test_opcheck": r"True",
    "test_a_decomposed_loss_alone": "",
    "test_a_loss_that_was_traced_without_gradients": "",
    "test_uninitialised_memory_is_never_read": r"none",
    "test_the_case_list_comes_from_the_registry": "",
}


def make_quick() -> None:
    """Leave out the interpreter's search for integer overflow: a third of its time, of no use on small images."""
    interpreter = importlib.import_module("triton.runtime.interpreter")
    options = interpreter.interpreter_builder.options
    if hasattr(options, "sanitize_overflow"):  # not in every version
        interpreter.interpreter_builder.options = dataclasses.replace(options, sanitize_overflow=False)


def wanted(name: str, backend: str, device: str) -> bool:
    """Whether a guarantee test, such as "test_sizes[triton-cpu-1-1-1]", runs."""
    if device != "cpu" or backend not in ("triton", "cuda"):
        return True
    base, _, parameters = name.rstrip("]").partition("[")
    if base in NEVER:
        return False
    if backend == "cuda" or os.environ.get("SEMEDA_FAST_INTERPRETER") == "full":
        return True
    parameters = parameters.replace("triton-cpu", "").strip("-")
    return base in CHOSEN and bool(re.search(CHOSEN[base], parameters))

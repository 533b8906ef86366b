"""Adapters, one file a framework: `transformers`, `monai`, `mmseg`, `nnunet`.

Each is imported by its own name and imports its framework then; this package imports none. Lightning, Accelerate and
DDP need no adapter. docs/guide/frameworks.md shows each in use.
"""

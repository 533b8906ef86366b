#!/usr/bin/env bash
# torchmetrics 1.9.0: in a MetricCollection, two IoU metrics that differ in ignore_index become one after a first batch on
# which their counts agree, and stay one, also after reset(): the second is then computed from the first one's counts, and
# reports a number that it never reports alone. `compute_groups=False` keeps them apart. Exits with 0 while that is so,
# with 1 once the collection reports what each metric reports alone.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --no-input --disable-pip-version-check torch==2.13.0 torchmetrics==1.9.0 numpy
cd "$work"
venv/bin/python -W ignore - <<'PY'
import platform
import sys

import torch
import torchmetrics
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassJaccardIndex

print(f"Python {platform.python_version()}, torch {torch.__version__}, torchmetrics {torchmetrics.__version__}")
first = torch.ones(1, 4, 4, dtype=torch.long)  # one class, found everywhere
preds = torch.tensor([[[0, 1, 1, 2], [0, 0, 2, 2], [1, 1, 1, 2], [0, 2, 2, 2]]])
target = torch.tensor([[[0, 0, 1, 2], [0, 0, 0, 2], [1, 1, 2, 2], [1, 1, 2, 2]]])


def metrics():
    return {"all": MulticlassJaccardIndex(3), "without 0": MulticlassJaccardIndex(3, ignore_index=0)}


def reported(collection):
    collection.update(first, first)
    collection.reset()
    collection.update(preds, target)
    return {name: round(float(value), 4) for name, value in collection.compute().items()}


alone = {}
for name, metric in metrics().items():
    metric.update(preds, target)
    alone[name] = round(float(metric.compute()), 4)
together, apart = reported(MetricCollection(metrics())), reported(MetricCollection(metrics(), compute_groups=False))
print("alone:                     ", alone)
print("in a collection:           ", together)
print("with compute_groups=False: ", apart)
same = together["all"] == alone["all"] and together["without 0"] != alone["without 0"] and apart == alone
print("as described: the second is computed from the first one's counts" if same else "changed: not as described")
sys.exit(0 if same else 1)
PY

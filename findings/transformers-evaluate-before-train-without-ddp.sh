#!/usr/bin/env bash
# transformers 5.23.0 with accelerate 1.15.0: a Trainer on several processes whose evaluate() is called before train()
# trains without DDP. evaluate() prepares the network for evaluation and marks it as prepared, so train() does not wrap
# it any more: each process takes its own steps, and their networks drift apart, without an error or a warning. Exits
# with 0 while that is so, with 1 once the processes agree.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --no-input --disable-pip-version-check \
    torch==2.13.0 transformers==5.23.0 accelerate==1.15.0
cd "$work"
cat > train.py <<'PY'
import sys
import tempfile

import torch
import torch.distributed as dist
from transformers import Trainer, TrainingArguments


class Network(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = torch.nn.Linear(2, 1)

    def forward(self, x, labels=None):
        return {"loss": (self.layer(x) - labels).square().mean()}


arguments = TrainingArguments(
    output_dir=tempfile.mkdtemp(), use_cpu=True, report_to="none", max_steps=3, per_device_train_batch_size=1,
    save_strategy="no", disable_tqdm=True, ddp_backend="gloo", learning_rate=0.1,
)
data = [{"x": torch.tensor([1.0, i]), "labels": torch.tensor([3.0 * i])} for i in range(8)]
network = Network()
trainer = Trainer(model=network, args=arguments, train_dataset=data, eval_dataset=data)
if sys.argv[1] == "evaluated":
    trainer.evaluate()
trainer.train()
weights = [torch.empty(1, 2) for _ in range(2)]
dist.all_gather(weights, network.layer.weight.detach())
if dist.get_rank() == 0:
    print(f"RESULT {sys.argv[1]}: the processes' weights are", *(weight.tolist()[0] for weight in weights))
    print("SAME" if torch.equal(*weights) else "APART")
PY
run() {
    venv/bin/python -W ignore -m torch.distributed.run --nproc-per-node=2 --rdzv-backend=c10d \
        --rdzv-endpoint=localhost:0 train.py "$1" 2> errors | grep -E '^(RESULT|SAME|APART)' || { cat errors; exit 2; }
}
fresh=$(run fresh)
evaluated=$(run evaluated)
printf '%s\n%s\n' "$fresh" "$evaluated"
if [[ $fresh == *SAME* && $evaluated == *APART* ]]; then
    echo "as described: after evaluate() the processes train apart"
else
    echo "changed: not as described"
    exit 1
fi

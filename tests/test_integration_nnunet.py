"""nnU-Net: two short epochs by its own commands on a tiny data set in its format, and what its loss is made of."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from semeda_fast import SemedaLoss

pytest.importorskip("nnunetv2", reason="`make test-integrations` has it")

from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from semeda_fast.integrations.nnunet import nnUNetTrainerSEMEDA

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.timeout(600)]
DATA_SET = "Dataset001_Tiny"
LABELS = {"background": 0, "organ": 1, "lesion": 2}
TRAIN = """
import json, sys, torch
from pathlib import Path
from semeda_fast.integrations.nnunet import nnUNetTrainerSEMEDA


class ShortSEMEDA(nnUNetTrainerSEMEDA):
    semeda_start, semeda_length = 0.0, 0.5

    def on_train_epoch_end(self, outputs):
        super().on_train_epoch_end(outputs)
        self.print_to_log_file("the term weighs", self.semeda.lambda_semeda)


def main(preprocessed, configuration):
    plans = json.loads((Path(preprocessed) / "nnUNetPlans.json").read_text()) | {"continue_training": False}
    about = json.loads((Path(preprocessed) / "dataset.json").read_text())
    trainer = ShortSEMEDA(plans, configuration, 0, about, torch.device("cpu"))
    trainer.num_epochs, trainer.num_iterations_per_epoch, trainer.num_val_iterations_per_epoch = 2, 2, 1
    trainer.run_training()
    trainer.perform_actual_validation()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*sys.argv[1:])
"""


def run(code: str, *arguments: str, environment: dict[str, str]) -> None:
    command = [sys.executable, "-c", code, *arguments]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400)
    assert result.returncode == 0, result.stderr[-4000:]


@pytest.fixture(scope="session")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The variables of nnU-Net, and under them a data set that it has planned and preprocessed."""
    import nibabel

    root = tmp_path_factory.mktemp("nnunet")
    folder = root / "raw" / DATA_SET
    for name in ("imagesTr", "labelsTr"):
        (folder / name).mkdir(parents=True)
    made = np.random.default_rng(0)
    for case in range(5):
        label = np.zeros((32, 32, 12), np.uint8)
        label[8:24, 8:20, 3:9], label[12:18, 10:16, 4:8] = 1, 2
        image = label + made.normal(size=label.shape) * 0.3
        spacing = np.diag([1.0, 1.0, 2.0, 1.0])
        for name, array in (("imagesTr/case_{}_0000", image.astype(np.float32)), ("labelsTr/case_{}", label)):
            nibabel.save(nibabel.Nifti1Image(array, spacing), folder / f"{name.format(case)}.nii.gz")
    about = {"channel_names": {"0": "CT"}, "labels": LABELS, "numTraining": 5, "file_ending": ".nii.gz"}
    (folder / "dataset.json").write_text(json.dumps(about))
    (root / "trainers").mkdir()
    (root / "trainers" / "semeda.py").write_text("from semeda_fast.integrations.nnunet import nnUNetTrainerSEMEDA\n")
    variables = {
        **os.environ, "OMP_NUM_THREADS": "1", "nnUNet_n_proc_DA": "1", "nnUNet_def_n_proc": "1",
        "nnUNet_raw": str(root / "raw"), "nnUNet_preprocessed": str(root / "preprocessed"),
        "nnUNet_results": str(root / "results"), "nnUNet_extTrainer": str(root / "trainers"),
    }  # fmt: skip
    plan = "from nnunetv2.experiment_planning.plan_and_preprocess_entrypoints import plan_and_preprocess_entry as plan"
    run(f"{plan}; plan()", "-d", "1", "-c", "2d", "3d_fullres", "-np", "1", "1", "-npfp", "1", environment=variables)
    return variables | {"nnUNet_n_proc_DA": "0"}  # loads in the process that trains; planning needs at least one


@pytest.mark.parametrize("configuration", ["2d", "3d_fullres"])
def test_two_epochs_and_the_validation(configuration: str, environment: dict[str, str], tmp_path: Path) -> None:
    script = tmp_path / "train.py"  # a file: the processes that export the validation's segmentations import it again
    script.write_text(TRAIN)
    preprocessed = Path(environment["nnUNet_preprocessed"]) / DATA_SET
    command = [sys.executable, str(script), str(preprocessed), configuration]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400)
    assert result.returncode == 0, result.stderr[-4000:]
    folder = Path(environment["nnUNet_results"]) / DATA_SET / f"ShortSEMEDA__nnUNetPlans__{configuration}" / "fold_0"
    checkpoint = torch.load(folder / "checkpoint_final.pth", map_location="cpu", weights_only=False)
    assert checkpoint["trainer_name"] == "ShortSEMEDA"
    assert not [name for name in checkpoint["network_weights"] if "proxy" in name or "semeda" in name]
    losses = checkpoint["logging"]["train_losses"]
    assert len(losses) == 2
    assert np.isfinite(losses).all()
    (log,) = folder.glob("training_log_*.txt")
    weights = [line.split()[-1] for line in log.read_text().splitlines() if "the term weighs" in line]
    assert weights == ["0.0", "0.1"]
    assert "mean" in json.loads((folder / "validation" / "summary.json").read_text())


def trainers(
    environment: dict[str, str], configuration: str, monkeypatch: pytest.MonkeyPatch, labels: dict[str, Any]
) -> tuple[Any, Any]:
    """nnU-Net's default trainer and ours, ready to train."""
    for name, value in environment.items():
        if name.startswith("nnUNet_"):
            monkeypatch.setenv(name, value)
    preprocessed = Path(environment["nnUNet_preprocessed"]) / DATA_SET
    plans = json.loads((preprocessed / "nnUNetPlans.json").read_text())
    about = json.loads((preprocessed / "dataset.json").read_text()) | {"labels": labels}
    if any(isinstance(value, list) for value in labels.values()):
        about["regions_class_order"] = [1, 2]
    made = []
    for kind in (nnUNetTrainer, nnUNetTrainerSEMEDA):
        trainer = kind({**plans, "continue_training": False}, configuration, 0, about, torch.device("cpu"))
        trainer.initialize()
        made.append(trainer)
    return made[0], made[1]


def levels(trainer: Any, channels: int, target_channels: int) -> tuple[list[Tensor], list[Tensor]]:
    """What its network and its loader give: outputs, and targets [B,R,...], int16 or, with regions, bool."""
    torch.manual_seed(0)
    patch = trainer.configuration_manager.patch_size
    outputs, targets = [], []
    for scales in trainer._get_deep_supervision_scales():
        size = [round(scale * edge) for scale, edge in zip(scales, patch, strict=True)]
        outputs.append(torch.randn(2, channels, *size, requires_grad=True))
        if target_channels == 1:
            targets.append(torch.randint(0, 3, (2, 1, *size), dtype=torch.int16))
        else:
            targets.append(torch.rand(2, target_channels, *size) < 0.3)
    return outputs, targets


def factors(trainer: Any) -> list[float]:
    return [float(weight) for weight in trainer.loss.weight_factors]


def grown(trainer: Any) -> None:
    """As late in training, when the term has its whole weight."""
    trainer.current_epoch = trainer.num_epochs - 1
    trainer._set_lambda()


@pytest.mark.parametrize("configuration", ["2d", "3d_fullres"])
def test_the_loss_is_nnunets_own_and_the_term_at_each_level(
    configuration: str, environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    default, ours = trainers(environment, configuration, monkeypatch, LABELS)
    outputs, targets = levels(ours, 3, 1)
    own = default.loss(outputs, targets)
    torch.testing.assert_close(ours.loss(outputs, targets), own, rtol=0, atol=0)  # the term has not begun
    grown(ours)
    term = SemedaLoss(num_classes=3, lambda_ce=0, lambda_semeda=0.1)
    parts = [w * term(o, t[:, 0]) for w, o, t in zip(factors(ours), outputs, targets, strict=True) if w]
    assert len(parts) == len(outputs) - 1
    torch.testing.assert_close(ours.loss(outputs, targets), own + sum(parts))


def test_without_deep_supervision(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    _, ours = trainers(environment, "2d", monkeypatch, LABELS)
    ours.enable_deep_supervision = False
    loss = ours._build_loss()
    grown(ours)
    ours.enable_deep_supervision = True
    outputs, targets = levels(ours, 3, 1)
    term = SemedaLoss(num_classes=3, lambda_ce=0, lambda_semeda=0.1)(outputs[0], targets[0][:, 0])
    torch.testing.assert_close(loss(outputs[0], targets[0]), loss.own(outputs[0], targets[0]) + term)


def test_the_ignore_label_is_void(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    _, ours = trainers(environment, "3d_fullres", monkeypatch, {**LABELS, "ignore": 3})
    grown(ours)
    outputs, targets = levels(ours, 3, 1)
    for target in targets:
        target[..., :2] = 3
    loss = ours.loss(outputs, targets)
    loss.backward()
    for output, factor in zip(outputs, factors(ours), strict=True):
        if factor:
            assert not output.grad[..., :2].any()
            assert output.grad[..., 2:].any()
    with torch.no_grad():
        for output in outputs:
            output[..., :2] = float("nan")
    assert torch.isfinite(ours.semeda(outputs[0], targets[0]))


@pytest.mark.parametrize("ignored", [False, True])
def test_regions_overlap(ignored: bool, environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Targets are planes, one a region; with an ignore label the last one marks what is ignored."""
    regions: dict[str, Any] = {"background": 0, "whole": [1, 2], "lesion": 2}
    default, ours = trainers(environment, "2d", monkeypatch, regions | ({"ignore": 3} if ignored else {}))
    grown(ours)
    outputs, targets = levels(ours, 2, 3 if ignored else 2)
    term = SemedaLoss(mode="multilabel", lambda_ce=0, lambda_semeda=0.1)
    expected = default.loss(outputs, targets)
    for factor, output, target in zip(factors(ours), outputs, targets, strict=True):
        if factor:
            mask = ~target[:, 2] if ignored else None
            expected = expected + factor * term(output, target[:, :2], valid_mask=mask)
    torch.testing.assert_close(ours.loss(outputs, targets), expected)


def test_its_search_in_a_folder_of_the_users_finds_the_trainer(environment: dict[str, str]) -> None:
    """As `nnUNetv2_train -tr nnUNetTrainerSEMEDA` searches $nnUNet_extTrainer, where a file of one line is.

    Before, that command imports all of nnU-Net's own trainers and so timm, which a torch without CUDA may not import.
    """
    code = (
        "import sys\n"
        "from nnunetv2.utilities.find_class_by_name import recursive_find_python_class as find\n"
        "options = dict(base_folder=sys.argv[1], cleanup_imports_from_base_folder=True)\n"
        "found = find(sys.argv[1], 'nnUNetTrainerSEMEDA', None, **options)\n"
        "assert found.__module__ == 'semeda_fast.integrations.nnunet', found\n"
    )
    run(code, environment["nnUNet_extTrainer"], environment=environment)


def test_its_command_trains_with_it(environment: dict[str, str]) -> None:
    try:
        import timm.layers  # noqa: F401
    except Exception as error:
        pytest.skip(f"nnU-Net's command imports timm and so torchvision, which this torch does not take: {error}")
    code = (
        "from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name as find\n"
        "assert find('nnUNetTrainerSEMEDA').__module__ == 'semeda_fast.integrations.nnunet'\n"
    )
    run(code, environment=environment)

"""Metrics report in a torchmetrics MetricCollection what they report alone, whatever the first batch was."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from metric_checks import CASTS, SETTINGS, Batch, alone, feed, same, through_a_file, through_pickle
from torch import Tensor
from torch.multiprocessing.spawn import spawn
from torchmetrics import Metric, MetricCollection
from torchmetrics.wrappers import ClasswiseWrapper, MetricTracker

from semeda_fast.metrics import BoundaryF, BoundaryIoU, TrimapIoU

CLASSES = 5
VOID = 0  # inside the range, so that metrics of another ignore_index take the same targets


class Halved(BoundaryF):
    """A metric of a user's own: counts something else under the options of its parent."""

    def update(self, preds: Tensor, target: Tensor) -> None:
        super().update(preds[..., ::2], target[..., ::2])


class Stepped(BoundaryF):
    """Another, with an option that its parent does not know of."""

    def __init__(self, num_classes: int, step: int, **kwargs: Any) -> None:
        super().__init__(num_classes, **kwargs)
        self.step = step

    def update(self, preds: Tensor, target: Tensor) -> None:
        super().update(preds[..., :: self.step], target[..., :: self.step])


def zoo() -> dict[str, Metric]:
    """Metrics that differ in one setting each."""
    c, v = CLASSES, VOID
    return {
        "f0": BoundaryF(c, tolerance=0, ignore_index=v),
        "f1": BoundaryF(c, tolerance=1, ignore_index=v),
        "f3": BoundaryF(c, tolerance=3, ignore_index=v),
        "f3_void255": BoundaryF(c, tolerance=3, ignore_index=255),
        "f3_void1": BoundaryF(c, tolerance=3, ignore_index=1),
        "f3_halved": Halved(c, tolerance=3, ignore_index=v),
        "f3_step4": Stepped(c, 4, tolerance=3, ignore_index=v),
        "f3_step3": Stepped(c, 3, tolerance=3, ignore_index=v),
        "precision3": BoundaryF(c, tolerance=3, score="precision", ignore_index=v),
        "f3_each": BoundaryF(c, tolerance=3, average="none", ignore_index=v),
        "f_part": BoundaryF(c, tolerance_ratio=0.05, ignore_index=v),
        "f_larger_part": BoundaryF(c, tolerance_ratio=0.1, ignore_index=v),
        "f3_erosion": BoundaryF(c, tolerance=3, contour="erosion", ignore_index=v),
        "f3_seam": BoundaryF(c, tolerance=3, contour="seam", ignore_index=v),
        "dice3_seam": BoundaryF(c, tolerance=3, contour="seam", score="dice", ignore_index=v),
        "iou": BoundaryIoU(c, ignore_index=v),
        "iou_wide": BoundaryIoU(c, dilation_ratio=0.08, ignore_index=v),
        "iou_width1": BoundaryIoU(c, width=1, ignore_index=v),
        "iou_width2": BoundaryIoU(c, width=2, ignore_index=v),
        "iou_width2_void1": BoundaryIoU(c, width=2, ignore_index=1),
        "trimap1": TrimapIoU(c, width=1, ignore_index=v),
        "trimap2": TrimapIoU(c, width=2, ignore_index=v),
        "trimap2_around": TrimapIoU(c, width=2, around_void=True, ignore_index=v),
        "trimap2_void1": TrimapIoU(c, width=2, ignore_index=1),
    }


def batch(seed: int, n: int = 2, classes: int = CLASSES) -> Batch:
    """Blobs of labels, and a prediction that differs in places."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.nn.functional.avg_pool2d(torch.randn(n, classes, 30, 34, generator=generator), 5, 1)
    target = noise.argmax(1)
    other = torch.nn.functional.avg_pool2d(torch.randn(n, classes, 30, 34, generator=generator), 5, 1)
    pred = (noise + 0.5 * other).argmax(1)
    return pred, target


def one_class() -> Batch:
    """What an untrained network gives: one class, and a target of one class."""
    return torch.full((2, 26, 30), 3), torch.full((2, 26, 30), 3)


def perfect() -> Batch:
    target = torch.full((2, 26, 30), 2)
    target[:, :, 15:] = 3
    return target.clone(), target


def all_void() -> Batch:
    return batch(3)[0], torch.full((2, 26, 30), VOID)


FIRST: dict[str, Batch] = {
    "one_class": one_class(),
    "perfect": perfect(),
    "all_void": all_void(),
    "ordinary": batch(7),
}
REST = [batch(11), batch(12, n=3)]
each_first = pytest.mark.parametrize("first", FIRST.values(), ids=FIRST.keys())


def test_the_metrics_tell_the_batches_apart() -> None:
    """The tests below would see one metric report another's number."""
    scores = [float(v) for name, v in alone(zoo, REST).items() if name != "f3_each"]
    assert len({round(score, 5) for score in scores}) >= len(scores) - 1  # f3_void255 has no 255 to see
    assert all(0 < score < 1 for score in scores)


@each_first
def test_a_collection_reports_what_each_reports_alone(first: Batch) -> None:
    metrics = MetricCollection(zoo())
    feed(metrics, [first, *REST])
    same(metrics.compute(), alone(zoo, [first, *REST]))
    metrics.reset()
    feed(metrics, REST)
    same(metrics.compute(), alone(zoo, REST))
    for metric in metrics.values():  # as Lightning does at the end of an epoch
        metric.reset()
    feed(metrics, REST[:1])
    same(metrics.compute(), alone(zoo, REST[:1]))


@each_first
def test_a_collection_called_as_a_function(first: Batch) -> None:
    metrics = MetricCollection(zoo())
    same(metrics(*first), alone(zoo, [first]))
    feed(metrics, REST[:1])
    same(metrics(*REST[1]), alone(zoo, REST[1:]))
    same(metrics.compute(), alone(zoo, [first, *REST]))


@each_first
@pytest.mark.parametrize("after", [False, True], ids=["cloned_before", "cloned_after"])
def test_a_clone_with_a_prefix(first: Batch, after: bool) -> None:
    metrics = MetricCollection(zoo())
    if after:
        feed(metrics, [first])
        metrics.reset()
    clone = metrics.clone(prefix="val/")
    feed(clone, [first, *REST])
    same({k.removeprefix("val/"): v for k, v in clone.compute().items()}, alone(zoo, [first, *REST]))
    feed(metrics, REST)
    same(metrics.compute(), alone(zoo, REST))


def through_state_dict(metrics: MetricCollection) -> MetricCollection:
    metrics.persistent(True)
    state = copy.deepcopy(metrics.state_dict())
    fresh = MetricCollection(zoo())
    fresh.persistent(True)
    fresh.load_state_dict(state)
    for metric in fresh.values():
        metric._update_count = 1  # torchmetrics does not store it, and would warn
    return fresh


@each_first
@pytest.mark.parametrize("way", [through_pickle, through_a_file, through_state_dict, copy.deepcopy])
def test_a_copy_goes_on_counting(first: Batch, way: Callable[..., MetricCollection]) -> None:
    metrics = MetricCollection(zoo())
    feed(metrics, [first])
    metrics = way(metrics)
    feed(metrics, REST)
    same(metrics.compute(), alone(zoo, [first, *REST]))


@pytest.mark.parametrize("cast", CASTS.values(), ids=CASTS.keys())
def test_counts_survive_casts(cast: Callable[[Any], Any]) -> None:
    batches = [batch(seed, n=4) for seed in range(20, 23)]
    metrics = MetricCollection(zoo())
    feed(metrics, batches[:2])
    metrics.compute()  # torchmetrics keeps the result, and would cast it
    metrics = cast(metrics)
    expected = alone(zoo, batches[:2])
    same(metrics.compute(), expected)
    assert {value.dtype for value in metrics.compute().values()} == {torch.float32}
    feed(metrics, batches[2:])
    same(metrics.compute(), alone(zoo, batches))
    metrics.reset()
    feed(metrics, REST)
    same(metrics.compute(), alone(zoo, REST))


def test_states_of_a_subclass_are_cast_as_torchmetrics_casts_them() -> None:
    class Kept(BoundaryF):
        def __init__(self) -> None:
            super().__init__(CLASSES, ignore_index=VOID)
            self.add_state("scores", [], dist_reduce_fx="cat")
            self.add_state("total", torch.zeros(()), dist_reduce_fx="sum")

    metric = Kept()
    feed(metric, REST)
    metric.scores.append(torch.ones(2))
    metric.set_dtype(torch.float64)
    assert metric.total.dtype == metric.scores[0].dtype == torch.float64
    assert metric.compute() == alone(zoo, REST)["f3"]


def test_counts_made_in_inference_mode_go_on_outside() -> None:
    """A network may be validated in inference mode and trained outside of it, with one metric."""
    with torch.inference_mode():
        metrics = MetricCollection(zoo())
        feed(metrics, REST[:1])
        metrics.reset()
        feed(metrics, REST[:1])
    feed(metrics, REST[1:])
    same(metrics.compute(), alone(zoo, REST))


def test_metrics_made_on_the_meta_device_start_at_zero() -> None:
    with torch.device("meta"):
        metrics = MetricCollection(zoo())
    metrics.to_empty(device="cpu")
    feed(metrics, REST)
    same(metrics.compute(), alone(zoo, REST))


@each_first
def test_inside_a_metric_tracker(first: Batch) -> None:
    tracker = MetricTracker(MetricCollection({k: v for k, v in zoo().items() if k != "f3_each"}))
    for batches in ([first, *REST], REST, [*REST, first]):
        tracker.increment()
        feed(tracker, batches)
        expected = alone(zoo, batches)
        del expected["f3_each"]
        same(tracker.compute(), expected)


def test_nested_and_wrapped() -> None:
    def parts() -> dict[str, Metric]:
        return {"f1": BoundaryF(CLASSES, tolerance=1), "f3": BoundaryF(CLASSES, tolerance=3)}

    each = {f"each{t}": ClasswiseWrapper(BoundaryF(CLASSES, tolerance=t, average="none")) for t in (1, 3)}
    metrics = MetricCollection({"a": MetricCollection(parts()), "b": MetricCollection(parts(), prefix="b_"), **each})
    feed(metrics, [one_class(), *REST])
    out = metrics.compute()
    expected = alone(parts, [one_class(), *REST])
    for name in ("f1", "f3"):
        assert out[f"a_{name}"] == out[f"b_b_{name}"] == expected[name]
    wrapped = [v for k, v in out.items() if k.startswith("each") and k.endswith("_2")]
    assert len(wrapped) == 2
    assert wrapped[0] != wrapped[1]


def test_class_counts_differ() -> None:
    """All labels below 4: as many classes as each metric was made for."""

    def make() -> dict[str, Metric]:
        return {f"f{c}": BoundaryF(c, tolerance=1, average="none") for c in (4, 5, 70)}

    batches = [perfect(), batch(31, classes=4)]
    metrics = MetricCollection(make())
    feed(metrics, batches)
    same(metrics.compute(), alone(make, batches))


@each_first
def test_equal_settings_share_their_counts(first: Batch) -> None:
    """Only what `compute` makes of the counts differs: one dilation serves all four."""

    def make() -> dict[str, Metric]:
        return {
            "f": BoundaryF(CLASSES, tolerance=3),
            "f_float": BoundaryF(CLASSES, tolerance=3.0, average="none", ignore_index=None),
            "recall": BoundaryF(CLASSES, tolerance=3.0, score="recall"),
            "dice": BoundaryF(CLASSES, tolerance=3.0, score="dice", mode="multiclass", slice_dim=2, spacing=None),
        }

    metrics = MetricCollection(make())
    feed(metrics, [first, *REST])
    assert len(metrics.compute_groups) == 1
    same(metrics.compute(), alone(make, [first, *REST]))


def test_a_group_forced_on_different_settings_is_an_error() -> None:
    metrics = MetricCollection(
        {"f1": BoundaryF(CLASSES, tolerance=1), "f3": BoundaryF(CLASSES, tolerance=3)}, compute_groups=[["f1", "f3"]]
    )
    feed(metrics, REST)
    with pytest.raises(RuntimeError, match=r"compute_groups .*BoundaryF\(.*tolerance=3.0\).*leave compute_groups out"):
        metrics.compute()
    metrics = MetricCollection({"f1": BoundaryF(CLASSES, tolerance=1), "f3": BoundaryF(CLASSES, tolerance=3)})
    feed(metrics, REST)
    assert len(set(metrics.compute().values())) == 2


def test_settings_are_fixed() -> None:
    """A setting changed later would belong to none of the counts so far."""
    for name, metric in zoo().items():
        for setting in SETTINGS:
            if not hasattr(metric, setting):
                continue
            before = getattr(metric, setting)
            with pytest.raises(AttributeError, match=rf"{setting} .*fixed.*make a new {type(metric).__name__}\("):
                setattr(metric, setting, 2)
            assert getattr(metric, setting) == before, name


def test_counts_of_other_settings_are_not_merged() -> None:
    one, three = BoundaryF(CLASSES, tolerance=1), BoundaryF(CLASSES, tolerance=3)
    feed(one, REST)
    feed(three, REST)
    expected = three.compute()
    with pytest.raises(ValueError, match=r"BoundaryF\(.*tolerance=3.0\).*BoundaryF\(.*tolerance=1.0\)"):
        three.merge_state(one)
    with pytest.raises(ValueError, match="tolerance_1p0"):
        one.merge_state(three.metric_state)
    assert three.compute() == expected
    other = BoundaryF(CLASSES, tolerance=3)
    feed(other, REST)
    three.merge_state(other)
    assert three.compute() == expected
    one.persistent(True)
    three.persistent(True)
    with pytest.raises(RuntimeError, match=r"Unexpected key.*tolerance_1p0"):
        three.load_state_dict(one.state_dict())


# ----------------------------------------------------------------------------- two processes


def rank_batches(first: str, rank: int) -> list[Batch]:
    """Rank 0 begins with the degenerate batch, rank 1 with an ordinary one: their groups may differ."""
    return [FIRST[first], REST[0]] if rank == 0 else [REST[1], batch(41)]


def one_of_two(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    for first in FIRST:
        metrics = MetricCollection(zoo())
        feed(metrics, rank_batches(first, rank))
        results = [metrics.compute()]
        metrics.reset()
        feed(metrics, [REST[rank]])
        results.append(metrics.compute())
        torch.save(results, f"{folder}/{first}_{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_report_what_one_reports(tmp_path: Path) -> None:
    spawn(one_of_two, args=(str(tmp_path),), nprocs=2)
    for first in FIRST:
        expected = [alone(zoo, rank_batches(first, 0) + rank_batches(first, 1)), alone(zoo, REST)]
        for rank in range(2):
            results = torch.load(tmp_path / f"{first}_{rank}.pt")
            for result, value in zip(results, expected, strict=True):
                same(result, value)


# ----------------------------------------------------------------------------- Lightning


@each_first
def test_through_lightnings_log(first: Batch, tmp_path: Path) -> None:
    """The sanity check sees the first batch alone; the epoch after it sees all."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its own deprecations
        import pytorch_lightning as pl

    batches = [first, *REST]

    class Net(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(1, 1)
            self.together = MetricCollection(plain(), prefix="together/")
            self.single = torch.nn.ModuleDict(plain())

        def training_step(self, item: Any, index: int) -> Tensor:
            return self.layer(torch.ones(1, 1)).sum()

        def validation_step(self, item: Any, index: int) -> None:
            self.together.update(*batches[index])
            self.log_dict(self.together)
            for name, metric in self.single.items():
                metric.update(*batches[index])
                self.log(f"single/{name}", metric)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), 0.1)

    def plain() -> dict[str, Metric]:
        return {k: v for k, v in zoo().items() if k != "f3_each"}  # Lightning logs numbers

    epochs: list[dict[str, Tensor]] = []

    class Keep(pl.Callback):
        def on_validation_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
            pass

        def on_train_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
            epochs.append(dict(trainer.callback_metrics))

    steps = torch.utils.data.DataLoader(list(range(len(batches))))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # few workers, no logger, a batch size that it cannot see
        pl.Trainer(
            accelerator="cpu",
            precision="bf16-true",
            max_epochs=2,
            num_sanity_val_steps=1,
            default_root_dir=tmp_path,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[Keep()],
        ).fit(Net(), steps, steps)
    expected = alone(plain, batches)
    assert len(epochs) == 2
    for logged in epochs:
        for kind in ("together", "single"):
            same({k.removeprefix(f"{kind}/"): v for k, v in logged.items() if k.startswith(kind)}, expected)

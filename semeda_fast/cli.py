"""The command `semeda-fast`: train-proxy, info, inspect.

Nothing here imports torch or numpy before a subcommand runs, so that help and the shell's completion answer at once.

Exit codes: 0 fine; 2 wrong usage or bad input, with a message on stderr; 1 anything unexpected; 130 Ctrl-C.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.metadata
import json
import platform
import sys
import traceback
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from . import __version__, defaults
from .errors import BackendUnavailableError, MissingExtraError, ProxyWarning, missing_extra
from .files import atomic_path

try:
    import typer
except ModuleNotFoundError as error:  # annotations below stay strings, so only build_app() needs it
    if error.name != "typer":
        raise
    _MISSING: ImportError | None = missing_extra("the command semeda-fast", "typer", "cli")
else:
    _MISSING = None

if TYPE_CHECKING:
    from accelerate import PartialState

    from .inspection import Inspection
    from .proxy.masks import MaskFolder
    from .proxy.network import EdgeProxy

# What users can do something about; everything else is a fault of this package.
EXPECTED = (ValueError, OSError, BackendUnavailableError, MissingExtraError)


def main() -> None:
    """Entry point of the installed command."""
    if _MISSING is not None:
        print(f"semeda-fast: {_MISSING}", file=sys.stderr)
        sys.exit(2)
    build_app()(prog_name="semeda-fast")


def build_app() -> typer.Typer:
    """The typer application; needs typer."""
    # Plain text, and our own exit codes instead of typer's tracebacks: output is read by logs too.
    app = typer.Typer(
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(_root)
    app.command("train-proxy")(_train_proxy)
    app.command("info")(_info)
    app.command("inspect")(_inspect)
    return app


def _guarded(command: Callable[..., None]) -> Callable[..., None]:
    """Turn the exceptions of a command into messages and exit codes."""

    @functools.wraps(command)
    def run(*args: Any, debug: bool = False, **options: Any) -> None:
        try:
            with warnings.catch_warnings():
                warnings.showwarning = _shown(warnings.showwarning)
                warnings.simplefilter("always", ProxyWarning)
                command(*args, debug=debug, **options)
        except KeyboardInterrupt:
            _fail("interrupted; nothing was written", 130, debug)
        except EXPECTED as error:
            _fail(f"error: {error}", 2, debug)
        except Exception as error:
            hint = "" if debug else "; run again with --debug for the traceback, and please report it"
            _fail(f"unexpected {type(error).__name__}: {error}{hint}", 1, debug)

    return run


def _shown(others: Callable[..., None]) -> Callable[..., None]:
    """Shows our own warnings as this command's messages, and leaves the others to `others`."""

    def show(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
        if issubclass(category, ProxyWarning):
            print(f"semeda-fast: warning: {message}", file=sys.stderr)
        else:
            others(message, category, *place, **more)

    return show


def _fail(message: str, code: int, debug: bool) -> None:
    if debug:
        traceback.print_exc()
    print(f"semeda-fast: {message}", file=sys.stderr)
    sys.exit(code)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(__version__)
        sys.exit(0)


def _root(
    version: Annotated[
        bool,
        typer.Option("--version", help="Print the version and exit.", is_eager=True, callback=_print_version),
    ] = False,
) -> None:
    """Tools for the SEMEDA segmentation loss."""


@_guarded
def _train_proxy(
    masks: Annotated[Path, typer.Argument(metavar="MASKS", help="Folder of mask files.", show_default=False)],
    num_classes: Annotated[int, typer.Option(help="Number of classes; labels are 0 to N-1.", show_default=False)],
    output: Annotated[Path, typer.Option(help="File to write, *.safetensors.", show_default=False)],
    ignore_index: Annotated[int, typer.Option(help="Label of void pixels.")] = defaults.IGNORE_INDEX,
    val_masks: Annotated[
        Path | None,
        typer.Option(help="Folder of held-out masks; otherwise --val-fraction of MASKS is held out."),
    ] = None,
    pattern: Annotated[
        str | None,
        typer.Option(
            metavar="GLOB", help="Which files of a folder are masks, such as '*_labelIds.png'; otherwise all."
        ),
    ] = None,
    val_fraction: Annotated[float, typer.Option(help="Part of MASKS to hold out.")] = defaults.VAL_FRACTION,
    widths: Annotated[str, typer.Option(metavar="N,N,...", help="Channels of the hidden layers.")] = ",".join(
        map(str, defaults.WIDTHS)
    ),
    tap: Annotated[
        str, typer.Option(metavar="pre|post", help="Compare features before or after the ReLU.")
    ] = defaults.TAP,
    distance: Annotated[
        str, typer.Option(metavar="l1|l2|smooth_l1", help="The loss's default distance with this proxy.")
    ] = defaults.DISTANCE,
    radius: Annotated[int, typer.Option(help="Radius of the edge labels in pixels.")] = defaults.RADIUS,
    void: Annotated[
        str,
        typer.Option(metavar="mask|nearest", help="Void pixels: left out, or filled with the nearest label."),
    ] = defaults.VOID,
    noise: Annotated[float, typer.Option(help="Standard deviation of the noise on the input.")] = defaults.NOISE,
    temperature: Annotated[str, typer.Option(metavar="auto|T", help="Temperature of the softmax on the input.")] = str(
        defaults.TEMPERATURE
    ),
    steps: Annotated[int, typer.Option(help="Optimizer steps.")] = defaults.STEPS,
    batch_size: Annotated[int, typer.Option(help="Crops per step, over all processes.")] = defaults.BATCH_SIZE,
    crop_size: Annotated[int, typer.Option(help="Side of a crop in pixels.")] = defaults.CROP_SIZE,
    lr: Annotated[float, typer.Option(help="Learning rate.")] = defaults.LR,
    seed: Annotated[int, typer.Option(help="Seed of everything random.")] = defaults.SEED,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing output file.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Train an edge proxy on a folder of masks.

    Several processes share the work under `accelerate launch --multi_gpu --num_processes N -m semeda_fast.cli
    train-proxy ...` or `torchrun --nproc-per-node N -m semeda_fast.cli train-proxy ...`, on CPUs too.
    """
    from .proxy.masks import MaskFolder
    from .proxy.training import train_proxy

    process = _join_processes()
    if process.is_main_process:  # the only one that writes; the others may run on another machine
        if output.suffix != ".safetensors":
            raise ValueError(f"proxies are stored as safetensors: --output {output} should end in .safetensors")
        _check_output(output, overwrite)

    def folder(path: Path) -> Path | MaskFolder:
        if pattern is None:
            return path
        return MaskFolder(path, num_classes=num_classes, ignore_index=ignore_index, pattern=pattern)

    proxy = train_proxy(
        folder(masks),
        num_classes,
        ignore_index=ignore_index,
        val_masks=None if val_masks is None else folder(val_masks),
        val_fraction=val_fraction,
        widths=_parse_widths(widths),
        tap=tap,
        distance=distance,
        radius=radius,
        void=void,
        noise=noise,
        temperature=_parse_temperature(temperature),
        steps=steps,
        batch_size=batch_size,
        crop_size=crop_size,
        lr=lr,
        seed=seed,
    )
    if process.is_main_process:
        proxy.save(output, overwrite=overwrite)
        quality = proxy.quality
        held = "held-out masks" if quality.get("held_out", True) else "training masks (none was held out)"
        print(f"proxy {_chain(proxy)}, tap {proxy.tap}, distance {proxy.distance}")
        print(
            f"edge F1 {quality['edge_f1']:.4f}, precision {quality['edge_precision']:.4f}, "
            f"recall {quality['edge_recall']:.4f} on {quality.get('masks', 'the')} {held}"
        )
        print(f"wrote {output} ({output.stat().st_size / 1000:.1f} kB)")
    if process.num_processes > 1:
        process.destroy_process_group()


@_guarded
def _info(
    proxy: Annotated[
        Path | None, typer.Argument(metavar="PROXY", help="A proxy file to describe.", show_default=False)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Show backends, versions and proxies."""
    import torch

    from .backends import backend_info
    from .proxy.storage import BUNDLED

    facts: dict[str, Any] = {
        "versions": {
            "semeda_fast": __version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "triton": _version("triton"),
        },
        "backends": dataclasses.asdict(backend_info()),
    }
    try:
        facts["bundled_proxy"] = _proxy_facts(BUNDLED)
    except (ValueError, OSError) as error:  # a damaged installation; what can be said is said
        facts["bundled_proxy"] = {"error": str(error)}
    if proxy is not None:
        facts["proxy"] = _proxy_facts(proxy)
    if as_json:
        print(json.dumps(facts, indent=2))
        return
    print(", ".join(f"{name} {version or 'not installed'}" for name, version in facts["versions"].items()))
    print(f"\n{backend_info()}")
    for heading in ("bundled_proxy", "proxy"):
        if heading in facts:
            print(f"\n{heading.replace('_', ' ')}")
            print("\n".join(_lines(facts[heading], "  ")))


@_guarded
def _inspect(
    mask: Annotated[Path, typer.Argument(metavar="MASK", help="A mask file.", show_default=False)],
    output: Annotated[Path, typer.Option(help="Picture to write (.png, .pdf, .svg).", show_default=False)],
    proxy: Annotated[
        Path | None, typer.Option(help="Proxy file; otherwise the bundled one.", show_default=False)
    ] = None,
    num_classes: Annotated[
        int | None, typer.Option(help="Number of classes; otherwise the proxy's, or the largest label + 1.")
    ] = None,
    ignore_index: Annotated[int, typer.Option(help="Label of void pixels.")] = defaults.IGNORE_INDEX,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing picture.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Draw what the loss sees in a mask.

    The picture shows the mask, its edge labels, the edges that the proxy sees, a damaged prediction, and the
    SEMEDA term of each pixel with the size of its gradient.
    """
    from .advice import FILES, lost_foreground
    from .inspection import check_suffix, draw, inspect_mask, report
    from .proxy.masks import read_mask
    from .proxy.network import EdgeProxy

    check_suffix(output)
    _check_output(output, overwrite)
    network = None if proxy is None else EdgeProxy.load(proxy)
    if network is not None:
        if num_classes not in (None, network.num_classes):
            raise ValueError(f"{proxy} has {network.num_classes} classes, but --num-classes is {num_classes}")
        num_classes = network.num_classes
    labels = read_mask(mask, num_classes=num_classes, ignore_index=ignore_index)
    if network is None:
        if num_classes is None:
            num_classes = _count_classes(labels, ignore_index, mask)
        network = EdgeProxy.bundled(num_classes)
    result: Inspection = inspect_mask(labels, network, ignore_index=ignore_index)
    draw(
        result,
        output,
        title=f"{mask.name}, {'bundled proxy' if proxy is None else proxy.name}",
        overwrite=overwrite,
    )
    if not result.edges.any():
        print(
            f"the mask holds no edge, two classes side by side{lost_foreground(ignore_index, FILES)}", file=sys.stderr
        )
    print(f"edge F1 of the proxy on this mask: {result.edge_f1:.4f}")
    print(f"SEMEDA term of the damaged prediction, lambda_semeda = 1: {result.mean_semeda:.4f}")
    print(report(result))
    print(f"wrote {output}")


def _join_processes() -> PartialState:
    """Accelerate's view of the processes that were started; train_proxy takes it over."""
    try:
        from accelerate import PartialState
    except ModuleNotFoundError as error:
        if error.name != "accelerate":
            raise
        raise missing_extra("semeda-fast train-proxy", "accelerate", "cli") from None
    from .proxy.processes import on_cpu

    return PartialState(cpu=on_cpu())


class _Probe(Exception):
    """Leaves atomic_path without writing."""


def _check_output(path: Path, overwrite: bool) -> None:
    """Raise now what writing `path` later would raise: it makes a temporary file there and removes it."""
    with contextlib.suppress(_Probe), atomic_path(path, overwrite=overwrite):
        raise _Probe


def _parse_widths(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise ValueError(f"--widths must be numbers separated by commas, such as 16,32; got {text!r}") from None


def _parse_temperature(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text  # train_proxy knows the names


def _count_classes(labels: Any, ignore_index: int, path: Path) -> int:
    """Largest label + 1, at least 2."""
    import numpy as np

    from .advice import FILES, VOID, Labels, label_advice

    present = [int(v) for v in np.unique(labels)]
    wrong = [v for v in present if v != ignore_index and not 0 <= v < VOID]  # more than the bundled proxy has, or void
    count = max([1, *(v for v in present if v != ignore_index and v not in wrong)]) + 1
    if wrong:
        advice = label_advice(Labels(present, wrong, count, ignore_index, FILES))
        if wrong == [VOID] and not advice.startswith("0 and 255"):
            advice = f"{advice}; if 255 is a class, --num-classes 256"
        raise ValueError(f"{path} holds {', '.join(map(str, wrong[:5]))}, which may be no class. {advice}.")
    return count


def _chain(proxy: EdgeProxy) -> str:
    return " -> ".join(str(width) for width in (proxy.num_classes, *proxy.widths, proxy.edge_classes))


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _proxy_facts(path: Path) -> dict[str, Any]:
    """Everything that a proxy's file says, with nothing but JSON types."""
    from .proxy.network import EdgeProxy

    proxy = EdgeProxy.load(path)
    return {
        "file": str(path),
        "bytes": path.stat().st_size,
        "network": _chain(proxy),
        "num_classes": proxy.num_classes,
        "edge_classes": proxy.edge_classes,
        "receptive_field": proxy.receptive_field,
        "parameters": sum(tensor.numel() for tensor in (*proxy.weights, *proxy.biases)),
        "tap": proxy.tap,
        "distance": proxy.distance,
        "layers": [
            {**dataclasses.asdict(layer), "weight": weight}
            for layer, weight in zip(proxy.layers, proxy.layer_weights, strict=True)
        ],
        "scales": {name: list(values) for name, values in proxy.scales.items()},
        "quality": proxy.quality,
        "provenance": proxy.provenance,
    }


def _lines(facts: Mapping[str, Any], indent: str) -> list[str]:
    """Nested facts as aligned lines of text."""
    lines = []
    wide = max((len(name) for name in facts), default=0)
    for name, value in facts.items():
        if isinstance(value, Mapping):
            lines += [f"{indent}{name}", *_lines(value, indent + "  ")]
        elif isinstance(value, list) and value and isinstance(value[0], Mapping):
            rows = [", ".join(f"{key} {item}" for key, item in row.items()) for row in value]
            lines += [f"{indent}{name}", *(f"{indent}  {number}: {row}" for number, row in enumerate(rows))]
        else:
            text = ", ".join(_number(item) for item in value) if isinstance(value, list) else _number(value)
            lines.append(f"{indent}{name:<{wide}}  {text}")
    return lines


def _number(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()

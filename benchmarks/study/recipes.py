"""What the accuracy study trains: the common settings, and the recipes that are compared."""

from __future__ import annotations

from dataclasses import dataclass

# Half resolution, a small U-Net from scratch.
TRAINING = (
    *("--size", "180x240", "--cache", "--width", 8, "--depth", 4, "--norm", "batch", "--channels-last"),
    *("--mixed-precision", "bf16", "--compile", "--epochs", 30, "--batch-size", 8, "--lr", 3e-3),
    *("--val-every", 5, "--pictures", 1, "--checkpoint-every", 100000),
)
BRANCH_EPOCH = 20


@dataclass(frozen=True)
class Recipe:
    """One way to train.

    Attributes:
        name: of the runs' folders.
        title: in tables.
        options: of examples/train.py, beside TRAINING.
        base: name of the recipe it is compared with; "" for one of those.
        branch: name of the recipe whose checkpoint after BRANCH_EPOCH epochs it goes on from; "": from the beginning.
        weights: name of the recipe whose trained network it trains further; "": a new one.
        proxy: one of study_proxies.PROXIES; "": the bundled one.
        control: whether it shows what something else than SEMEDA does.
    """

    name: str
    title: str
    options: tuple[str | int | float, ...]
    base: str = ""
    branch: str = ""
    control: bool = False
    proxy: str = ""
    weights: str = ""

    @property
    def follows(self) -> str:
        """Name of the recipe that must have run before; "": none."""
        return self.branch or self.weights


def _late(
    base: str,
    name: str,
    title: str,
    *options: str | int | float,
    ramp: float = 2,
    proxy: str = "",
    control: bool = False,
) -> Recipe:
    """SEMEDA in the last third of the training: what comes before is the base's."""
    term = ("--loss", "ce+semeda", "--semeda-start", BRANCH_EPOCH, "--semeda-ramp", ramp, *options)
    weights = ("--class-weights", "enet") if base == "wce" else ()
    return Recipe(name, title, (*term, *weights), base, base, control, proxy)


def _further(name: str, title: str, *options: str | int | float) -> Recipe:
    """A trained network of wce, trained for 10 more epochs with a tenth of the learning rate."""
    more = ("--class-weights", "enet", "--epochs", 10, "--lr", 3e-4)
    return Recipe(name, title, (*more, *options), base="" if name == "ft-wce" else "ft-wce", weights="wce")


def _weight(value: float) -> tuple[str, float]:
    return ("--lambda-semeda", value)


L3 = ("--layer-weights", "0,0,1")
L2 = ("--distance", "l2")
EARLY = ("--loss", "ce+semeda", "--class-weights", "enet", *L2, "--semeda-start", 3, "--semeda-ramp", 3)
RECIPES = (
    Recipe("ce", "cross-entropy", ("--loss", "ce")),
    _late("ce", "r01", "last third, ramp to 0.1 at the end", *_weight(0.1), ramp=10),
    _late("ce", "c-l2-01", "last third, 0.1, L2", *_weight(0.1), *L2),
    Recipe("wce", "class-weighted cross-entropy", ("--loss", "ce", "--class-weights", "enet")),
    _late("wce", "w-all-01", "last third, 0.1", *_weight(0.1)),
    _late("wce", "w-all-03", "last third, 0.3", *_weight(0.3)),
    _late("wce", "w-l3-03", "last third, 0.3, layer 3 alone", *_weight(0.3), *L3),
    _late("wce", "w-l3-1", "last third, 1.0, layer 3 alone", *_weight(1.0), *L3),
    _late("wce", "w-l2-003", "last third, 0.03, L2", *_weight(0.03), *L2),
    _late("wce", "w-l2-01", "last third, 0.1, L2", *_weight(0.1), *L2),
    # Other proxies, with the weight at which they pull as hard as the bundled one does with 0.03. L2's gradient at the
    # logits of wce-s1 after 20 epochs is 48 times as long as cross-entropy's (bundled), 143, 54, 136, 72, 44, 82, and
    # 4.4 (identity).
    _late("wce", "w-l2-proxy", "last third, L2, proxy trained on CamVid, 0.01", *_weight(0.01), *L2, proxy="camvid"),
    _late(
        "wce",
        "w-l2-plain",
        "last third, L2, proxy trained on CamVid without noise and temperature, 0.03",
        *(*_weight(0.03), *L2),
        proxy="camvid-plain",
    ),
    _late(
        "wce",
        "w-l2-no-noise",
        "last third, L2, proxy trained on CamVid without noise, 0.01",
        *(*_weight(0.01), *L2),
        proxy="camvid-no-noise",
    ),
    _late(
        "wce",
        "w-l2-nearest",
        "last third, L2, proxy trained on CamVid without noise and temperature, void filled, 0.02",
        *(*_weight(0.02), *L2),
        proxy="camvid-nearest",
    ),
    _late(
        "wce",
        "w-l2-universal-plain",
        "last third, L2, bundled proxy trained again without noise and temperature, 0.03",
        *(*_weight(0.03), *L2),
        proxy="universal-plain",
    ),
    _late("wce", "w-l2-post", "last third, L2, taps behind the ReLU, 0.0175", *_weight(0.0175), *L2, proxy="post"),
    Recipe("w-l2-early", "from epoch 3 on, 0.03, L2", (*EARLY, *_weight(0.03)), base="wce"),
    Recipe(
        "w-l2-plain-early",
        "from epoch 3 on, L2, proxy trained on CamVid without noise and temperature, 0.03",
        (*EARLY, *_weight(0.03)),
        base="wce",
        proxy="camvid-plain",
    ),
    Recipe(
        "w-brier-early",
        "control: from epoch 3 on, Brier score in the place of the term, 0.33",
        (*EARLY, *_weight(0.33)),
        base="wce",
        control=True,
        proxy="identity",
    ),
    Recipe(
        "w-constant",
        "from the first step on, 0.1",
        ("--loss", "ce+semeda", "--class-weights", "enet", *_weight(0.1)),
        base="wce",
    ),
    *(
        _late(
            "wce",
            name,
            f"control: last third, Brier score in the place of the term, {value}",
            *(*_weight(value), *L2),
            proxy="identity",
            control=True,
        )
        for name, value in (("w-brier", 0.33), ("w-brier-11", 1.1))  # pull like 0.03 and 0.1 of the term
    ),
    _further("ft-wce", "class-weighted cross-entropy, 10 more epochs", "--loss", "ce"),
    _further("ft-l2-003", "10 more epochs, 0.03, L2", "--loss", "ce+semeda", *_weight(0.03), *L2),
    _further("ft-l2-01", "10 more epochs, 0.1, L2", "--loss", "ce+semeda", *_weight(0.1), *L2),
    Recipe("w-unweighted", "control: last third without class weights", ("--loss", "ce"), "wce", "wce", control=True),
)
BASES = tuple(recipe.name for recipe in RECIPES if not recipe.base)
# (recipe, what it is held against): compared seed by seed beside the comparison with their base.
RIVALS = (
    ("w-l2-003", "w-brier"),
    ("w-l2-01", "w-brier-11"),
    ("w-l2-01", "w-brier"),
    ("w-l2-003", "w-all-01"),
    ("w-l2-early", "w-brier-early"),
    ("w-l2-plain-early", "w-l2-early"),
    ("w-l2-proxy", "w-l2-003"),
    ("w-l2-plain", "w-l2-proxy"),
    ("w-l2-plain", "w-l2-003"),
    ("w-l2-no-noise", "w-l2-proxy"),
    ("w-l2-nearest", "w-l2-plain"),
    ("w-l2-universal-plain", "w-l2-003"),
    ("w-l2-post", "w-l2-003"),
)

"""Defaults of `train_proxy`, which the command shows in its help. It is printed without torch: import nothing here."""

IGNORE_INDEX = -100
VAL_FRACTION = 0.1
WIDTHS = (16, 32)
TAP = "pre"
DISTANCE = "l1"
RADIUS = 1
VOID = "mask"
NOISE = 0.1
TEMPERATURE = "auto"
STEPS = 1200
BATCH_SIZE = 16
CROP_SIZE = 48
LR = 1e-2
SEED = 0

"""The card of the embedded encoders: README.md from index.json; what no number carries stands here."""

import textwrap
from collections.abc import Mapping

INTRODUCTION = """# Embedded models

Small encoders for the embedded world of `world.py`, trained by `python data/embedded/train.py` on rendered
images alone: no photograph, no web text, no weights of others. They exist so that the workbook runs where no
hub can be reached; numbers obtained with them describe this world and nothing else. Licence: MIT, as the
workbook.

`draw.py` draws, `world.py` decides what is drawn, `render.py` writes the data sets as folders of PNG files,
`train.py` and `objectives.py` make the encoders, `card.py` writes this file from `index.json`, which says of
each encoder how it is loaded and how it came about. `embedded-clip.json` is the open_clip configuration
(`open_clip.add_model_config` reads this folder). Matrices and kernels are stored as float16, vectors and counts
as they were. All encoders take 48 x 48 images standardised with open_clip's default mean and deviation. Token
embeddings that no caption ever used are zero: a prompt with other words is legal, but the words mean nothing to
this model.
"""

REPRODUCIBLE = """Seconds are wall-clock on two shared cores, about twice what they take on free ones. The same
recipe gives the same weights on the same kind of processor with the same number of threads and nearly the same ones
elsewhere, because sums are rounded in another order."""

DATA = """Every image comes from a numpy generator seeded by the family (1 evaluation, 2 pretraining), the stream
(captioned, unlabelled, labelled, pairs) and the seed: no pretraining image is an evaluation image. 15 % of the
pretraining images are digits printed in ten fonts of matplotlib, 5 % are sketches. `clip` sees captioned
images; `vicreg` pairs of a picture and a line drawing of the same thing in another pose (digits: two prints),
each with a branch of its own; `mae` single images; the supervised ones labelled images without digits and
sketches."""

TRIED = """## What was tried and did not work

All judged on validation images.

- CLIP for 1,200 steps at rate 2e-3: 32.3 % zero-shot (shape 77, texture 41, digits 44); 2,000 at 3e-3 brought 48.1.
- VICReg between two views of one picture (600 steps; crops from 60 %, colours shaken): shape 16, texture 35 in a
  16-shot probe. Between two pictures of one thing in other poses (600 steps): shape 17, texture 33; it had learnt
  the colour.
- The same with colours made wholly random, InfoNCE, 250 steps: the loss stayed at chance. Same pose, before two
  backgrounds, colours partly kept (300 steps of 128, VICReg and InfoNCE): shape 12 to 13, texture 24 to 28. With clean
  backgrounds: shape 10 to 12, texture 28 to 30.
- VICReg between pictures and drawings for 900 steps at rate 3e-3: shape 22, texture 39; more steps help further.
- Masked autoencoding for 500 steps: near the random floor, whether its class token or its mean token is read. Vision
  transformers are slow on a CPU; this one is kept as an example of a feature that does not help.
- The default memory layout of torch: three times slower than channels-last for these convolutions.
"""


def card(index: Mapping[str, Mapping]) -> str:
    """README.md; sections of what has not been trained or measured are left out."""
    parts = [INTRODUCTION, _weights(index), "## Data\n\n" + DATA + "\n"]
    clip = index.get("clip", {})
    if "captions" in clip:
        parts.append(_captions(clip))
    parts.append(_curves(index))
    if "zero_shot" in clip:
        parts.append(_zero_shot(clip))
    if any("measured" in entry for entry in index.values()):
        parts.append(_auxiliary(index))
    paragraphs = "\n".join([*parts, TRIED]).split("\n\n")
    return "\n\n".join(text if text.startswith(("#", "|", "-")) else _filled(text) for text in paragraphs)


def _filled(text: str) -> str:
    return textwrap.fill(text.strip(), 118, break_on_hyphens=False) + "\n" * text.endswith("\n")


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _weights(index: Mapping[str, Mapping]) -> str:
    header = ["encoder", "architecture", "features", "learns by", "images", "steps x batch", "rate"]
    rows = [
        [
            f"`{name}`",
            entry["architecture"],
            f"{entry['feature_dim']}",
            entry["objective"],
            f"{entry['images']:,}",
            f"{entry['steps']} x {entry['batch']}",
            f"{entry['learning_rate']:g}",
            f"{entry['seconds']}",
            f"{entry['bytes']:,}",
            f"`{entry['sha256'][:12]}`",
            f"{entry['seed']}",
            f"`{entry['commit']}`",
        ]
        for name, entry in index.items()
    ]
    size = sum(entry["bytes"] for entry in index.values()) / 2**20
    table = _table([*header, "seconds", "bytes", "sha256", "seed", "code"], rows)
    return f"## Weights\n\n{table}\nTogether {size:.1f} MiB; full hashes are in `index.json`. {REPRODUCIBLE}\n"


def _captions(clip: Mapping) -> str:
    rates = clip["captions"]
    return f"""Of the {clip["images"]:,} captions {rates["digit"]:.1f} % are about a digit and {rates["sketch"]:.1f} %
about a sketch. Of the others {rates["shape"]:.1f} % name the shape, {rates["colour"]:.1f} % the colour,
{rates["background"]:.1f} % the background and {rates["texture"]:.1f} % the texture: captions under-describe texture,
so that an auxiliary encoder has something to add.
"""


def _curves(index: Mapping[str, Mapping]) -> str:
    tables = [
        _table([f"{name}, step", *entry["curve"]], [["loss", *(f"{loss:.3f}" for loss in entry["curve"].values())]])
        for name, entry in index.items()
        if entry["curve"]
    ]
    about = "Mean loss around a step. VICReg's stays high by construction: its dimensions cannot all be invariant and\n"
    return f"## Training curves\n\n{about}decorrelated.\n\n" + "\n".join(tables)


def _zero_shot(clip: Mapping) -> str:
    header = ["images", "class", "shape", "texture"]
    rows = [[name, *(f"{row[key]:.1f}" for key in header[1:])] for name, row in clip["zero_shot"].items()]
    digits, groups = clip["digits"], ", ".join(f"{value:.1f}" for value in clip["groups"])
    return f"""## What they do

Measured once, after training, on test images; nothing was chosen on them. Zero-shot CLIP with the five templates of
`world.TEMPLATES` (accuracy in %, chance 1.4, 8.3 and 16.7):

{_table(header, rows)}
Handwritten digits (real, never trained on): {digits["val"]:.1f} % of validation, {digits["test"]:.1f} % of test;
chance is 10 %.
In `shapes-spurious` the four groups score {groups} %. The learned scale of the logits is
{clip["logit_scale"]:.0f}, where larger models reach 100.
"""


def _auxiliary(index: Mapping[str, Mapping]) -> str:
    keys = ["probe_class", "probe_shape", "probe_texture", "head", "amu", "gain", "either", "cmy"]
    header = ["encoder", "probe", "shape", "texture", "head alone", "AMU-Tuning", "gain", "either", "CMY"]
    measured = {name: entry["measured"] for name, entry in index.items() if "measured" in entry}
    form = {"gain": "+.1f", "cmy": ".2f"}
    rows = [[f"`{name}`", *(format(row[key], form.get(key, ".1f")) for key in keys)] for name, row in measured.items()]
    best = max(measured, key=lambda name: measured[name]["gain"])
    alone = max(row["head"] for row in measured.values())
    return f"""Auxiliary encoders with 16 shots on `shapes`, one draw of the support, in %. Probe: logistic regression,
accuracy about the class, the shape, the texture. Head and AMU-Tuning: `methods.build("aux_only")` and
`methods.build("amu")` with four validation images a class for beta. Either: zero-shot CLIP or the head is correct.
CMY: 1 - cosine of their logits.

{_table(header, rows)}
`{best}` helps most ({measured[best]["gain"]:+.1f} points); the best head alone has {alone:.1f} %.
A class is a texture *and* a shape: an encoder that knows one of the two is no classifier by itself, and may still
add what captions leave out.
"""

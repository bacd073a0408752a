"""The card of the embedded encoders: README.md from index.json; what no number carries stands here."""

import textwrap
from collections.abc import Mapping

INTRODUCTION = """# Embedded models

Small encoders for the embedded world of `world.py`, trained by `python data/embedded/train.py` on rendered
images alone: no photograph, no web text, no weights of others. They exist so that the workbook runs where no
hub can be reached; numbers obtained with them describe this world and nothing else. Licence: MIT, as the
workbook.

`draw.py` draws, `others.py` draws what only `other-classes` sees, `world.py` decides what is drawn, `render.py`
writes the data sets as folders of PNG files, `train.py` and `objectives.py` make the encoders, `card.py` writes
this file from `index.json`, which says of each encoder how it is loaded and how it came about; `renamed.json`
names what is refused and what it is called now. `embedded-clip.json` is the open_clip configuration
(`open_clip.add_model_config` reads this folder). Matrices and kernels are stored as float16, vectors and counts
as they were. All encoders take 48 x 48 images standardised with open_clip's default mean and deviation. Token
embeddings that no caption ever used are zero: a prompt with other words is legal, but the words mean nothing to
this model.
"""

REPRODUCIBLE = """Seconds are wall-clock on two cores shared with other work, of which `infonce` and `vicreg` had a
fraction of one; they compare nothing. The same recipe gives the same weights on the same kind of processor with the
same number of threads and nearly the same ones elsewhere, because sums are rounded in another order; `other-classes`,
`infonce` and `vicreg` were trained with `--threads 1`."""

DATA = """Every image comes from a numpy generator seeded by the family (1 evaluation, 2 pretraining), the stream
(captioned, labelled, pairs, others) and the seed: no pretraining image is an evaluation image. 15 % of captioned images
and of pairs are digits printed in ten fonts of matplotlib, 5 % of captioned images and of pictures in pairs are
sketches. `clip` sees captioned images; `infonce` and `vicreg` the same pairs of a picture and a line drawing of one
thing in another pose (digits: two prints), each kind with a branch of its own, the drawings at half their side;
`texture` labelled pictures; `other-classes` pictures of 16 shapes and 8 textures of `others.py`, which no other stream
and no evaluation set shows."""

TRIED = """## What was tried and did not work

All judged on validation images.

- CLIP for 1,200 steps at rate 2e-3: 32.3 % zero-shot (shape 77, texture 41, digits 44); 2,000 at 3e-3 brought 48.1.
- VICReg between two views of one picture (600 steps; crops from 60 %, colours shaken): shape 16, texture 35 in a
  16-shot probe. Between two pictures of one thing in other poses (600 steps): shape 17, texture 33; it had learnt
  the colour.
- The same with colours made wholly random, InfoNCE, 250 steps: the loss stayed at chance. Same pose, before two
  backgrounds, colours partly kept (300 steps of 128, VICReg and InfoNCE): shape 12 to 13, texture 24 to 28. With clean
  backgrounds: shape 10 to 12, texture 28 to 30.
- VICReg between pictures and drawings, published weights 25, 25, 1 and 256 dimensions, batches of 256: the head alone
  has 6 % after 900 steps; with 64 dimensions 5 % after 300. Weights 5, 25, 1 with 64 dimensions and batches of 128:
  17 % after 2,000 steps, on a ninth more images than those 900. It stays below InfoNCE on the same pairs; 6,000 steps
  were begun and not finished.
- Other classes for 900 steps of 256: 28 % alone; 2,400 of 128, a third more images, 37 %, and the curve has gone flat.
- InfoNCE with drawings at their full side: loss 4.26 at step 300, against 4.3 at half their side, which is cheaper.
- Masked autoencoding for 500 steps: near the random floor, whether its class token or its mean token is read; an
  encoder trained on both colours: the same. They shipped once, with 2 % each for the head alone and no gain of
  AMU-Tuning on test images (one draw), and no longer do.
- The default memory layout of torch: three times slower than channels-last for these convolutions.
"""


def card(index: Mapping[str, Mapping]) -> str:
    """README.md; sections of what has not been trained or measured are left out."""
    parts = [INTRODUCTION, _weights(index), "## Data\n\n" + DATA + "\n", _seen(index)]
    clip = index.get("clip", {})
    if "captions" in clip:
        parts.append(_captions(clip))
    parts.append(_curves(index))
    if any("validation" in entry for entry in index.values()):
        parts.append(_validation(index))
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
    return "## Training curves\n\nMean loss around a step.\n\n" + "\n".join(tables)


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


def _seen(index: Mapping[str, Mapping]) -> str:
    rows = [[f"`{name}`", entry["seen"]] for name, entry in index.items() if "seen" in entry]
    table = _table(["encoder", "what its training shows of evaluated classes"], rows)
    return f"""No encoder sees an evaluation image, and no auxiliary one a label of an evaluated class, with one stated
exception: `texture` is taught the name of every texture.

{table}"""


def _validation(index: Mapping[str, Mapping]) -> str:
    tables = [
        _table([f"{name}, step", *points], [["head alone", *(f"{value:.1f}" for value in points.values())]])
        for name, points in ((name, entry.get("validation")) for name, entry in index.items())
        if points
    ]
    about = """Steps were set before a run by the time at hand, and kept or raised by validation images of `shapes`
alone: the head alone with 16 shots (accuracy in %, mean of three draws) at steps of the one run that ships, whose rate
falls to zero at its end. A longer run would have a higher rate at the same step."""
    return about + "\n\n" + "\n".join(tables)


def _auxiliary(index: Mapping[str, Mapping]) -> str:
    measured = {name: entry["measured"] for name, entry in index.items() if "measured" in entry}
    parts = [
        """Auxiliary encoders with 1, 4 and 16 shots: means over three draws of the support in %, with the half-width of
the t-interval at 16 shots. Head and AMU-Tuning: `methods.build("aux_only")` and `methods.build("amu")` with up to four
validation images a class for beta. Either: zero-shot CLIP or the head is correct. CMY: 1 - cosine of their logits.
Probe: logistic regression, its accuracy about the class, the shape, the texture."""
    ]
    for dataset, part in (("shapes", "test images"), ("digits", "the validation images of which beta is not chosen")):
        first = next(iter(measured.values()))[dataset]
        shots, most = list(first), list(first)[-1]
        parts.append(f"`{dataset}`, {part}; zero-shot {first[most]['zero_shot'][0]:.1f} %:")
        header = ["encoder", *(f"head, {k}" for k in shots), *(f"AMU, {k}" for k in shots), "gain", "over the head"]
        rows = []
        for name, row in measured.items():
            by_shots, last = row[dataset], row[dataset][most]
            cells = [_interval(by_shots[k][key], k == most) for key in ("head", "amu") for k in shots]
            signed = [f"{last[key][0]:+.1f} ± {last[key][1]:.1f}" for key in ("gain", "above_head")]
            extra = [f"{last['either'][0]:.1f}", f"{last['cmy'][0]:.2f}"]
            probe = [f"{row['probe'][key]:.1f}" for key in ("class", "shape", "texture")] if dataset == "shapes" else []
            rows.append([f"`{name}`", *cells, *signed, *extra, *probe])
        header += ["either", "CMY", *(["probe", "shape", "texture"] if dataset == "shapes" else [])]
        parts.append(_table(header, rows))
    best, order = best_for_digits(index), sorted(measured, key=lambda name: -measured[name]["shapes"][most]["cmy"][0])
    gains = sorted(measured, key=lambda name: -measured[name]["shapes"][most]["gain"][0])
    parts.append(
        f"""Complementarity orders them {", ".join(f"`{name}`" for name in order)}; the gain of AMU-Tuning orders them
{", ".join(f"`{name}`" for name in gains)}. Neither order was sought. The default auxiliary encoder of `digits` is
`{best}`, by the mean validation accuracy of AMU-Tuning with 4 and {most} shots.
"""
    )
    return "\n\n".join(part.strip() for part in parts) + "\n"


def _interval(pair: list[float], wide: bool) -> str:
    return f"{pair[0]:.1f} ± {pair[1]:.1f}" if wide else f"{pair[0]:.1f}"


def best_for_digits(index: Mapping[str, Mapping]) -> str:
    """The encoder with which AMU-Tuning is best on validation images of `digits`: the mean over 4 shots and more."""
    digits = {name: entry["measured"]["digits"] for name, entry in index.items() if "measured" in entry}
    return max(digits, key=lambda name: sum(row["amu"][0] for shots, row in digits[name].items() if int(shots) >= 4))

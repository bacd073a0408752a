"""Write the embedded data sets as folders of PNG files: python data/embedded/render.py [NAMES ...]

    embedded-1/shapes/train/plain_circle/00012.png    image 12 of the split; below LOGIT_BIAS_DATA or data/downloads
    embedded-1/shapes/factors.csv                     what each image shows: shape, texture, colour, background, ...
    embedded-1/shapes/captions.csv, captions/         eight images of the embedded CLIP's training, with their captions

All sets together are 27,725 images on 190 MB of disk and take half a minute; `lib` calls this at the first use of a
set. A set is made under a lock, in a folder that gets its name at the end. data/benchmarks.json states names, splits
and the version, which is to be raised whenever the same call would give other pixels.
"""

import argparse
import json
import shutil
import sys
from pathlib import Path

import pandas as pd
from filelock import FileLock
from PIL import Image
from torch import Tensor
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "data" / "embedded")]

import draw  # noqa: E402
import world  # noqa: E402

from lib.files import data_root, one_line  # noqa: E402

TABLE = json.loads((ROOT / "data" / "benchmarks.json").read_text(encoding="utf-8"))
WORDS = {
    "shape": draw.SHAPES,
    "texture": draw.TEXTURES,
    "colour": world.COLOURS,
    "background": world.COLOURS,
    "corruption": draw.CORRUPTIONS,
}


def make(name: str, root: Path) -> Path:
    """Folder of a data set, made if it is not there; of two processes that want it one makes it."""
    folder = root / TABLE["version"] / name
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f".{name}.lock")):
        if not folder.is_dir():
            unfinished = folder.with_name(f".{name}.part")
            shutil.rmtree(unfinished, ignore_errors=True)  # of a process that was killed
            _write(name, unfinished)
            unfinished.rename(folder)
    return folder


def _write(name: str, folder: Path) -> None:
    factors = []
    for split in TABLE["generated"][name]["splits"]:
        rendered = world.digits(split) if name == "digits" else world.render(name, split)
        classes = [rendered.classnames[label].replace(" ", "_") for label in rendered.labels.tolist()]
        paths = [f"{split}/{each}/{row:05d}.png" for row, each in enumerate(classes)]
        _save(folder, paths, rendered.images, f"{name} {split}")
        factors.append(pd.DataFrame({"path": paths, **_in_words(rendered.attributes)}))
    if len(factors[0].columns) > 1:
        pd.concat(factors).to_csv(folder / "factors.csv", index=False)
    if name == "shapes":
        images, captions = world.render_captioned(8, seed=1)
        paths = [f"captions/{row:05d}.png" for row in range(len(images))]
        _save(folder, paths, images, "captions")
        pd.DataFrame({"path": paths, "caption": captions}).to_csv(folder / "captions.csv", index=False)


def _in_words(attributes: dict[str, Tensor]) -> dict[str, list[str] | list[int]]:
    values = {name: tensor.tolist() for name, tensor in attributes.items() if name != "split"}
    return {name: [WORDS[name][i] for i in rows] if name in WORDS else rows for name, rows in values.items()}


def _save(folder: Path, paths: list[str], images: Tensor, title: str) -> None:
    for place in {(folder / path).parent for path in paths}:
        place.mkdir(parents=True, exist_ok=True)
    for path, image in zip(tqdm(paths, desc=title, unit="img", disable=None), images, strict=True):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / path)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Write the embedded data sets as folders of PNG files.")
    parser.add_argument("names", nargs="*", help=f"default: all of {', '.join(TABLE['generated'])}")
    parser.add_argument("--root", type=Path, default=data_root(), help="folder of data sets")
    options = parser.parse_args(arguments)
    unknown = [name for name in options.names if name not in TABLE["generated"]]
    if unknown:
        parser.error(f"no data set {unknown[0]!r}; there are {', '.join(TABLE['generated'])}")
    for name in options.names or TABLE["generated"]:
        try:
            print(f"{name}: {make(name, options.root)}")
        except OSError as error:
            print(one_line(error))
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

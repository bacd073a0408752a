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
from collections.abc import Mapping
from pathlib import Path

import pandas as pd
from PIL import Image
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "data" / "embedded")]

from lib.files import data_root, locked, one_line  # noqa: E402

TABLE = json.loads((ROOT / "data" / "benchmarks.json").read_text(encoding="utf-8"))


def make(name: str, root: Path) -> Path:
    """Folder of a data set, made if it is not there; of two processes that want it one makes it."""
    folder = root / TABLE["version"] / name
    if folder.is_dir():
        return folder
    with locked(folder.parent, "LOGIT_BIAS_DATA"):
        if not folder.is_dir():
            unfinished = folder.with_name(f".{name}.part")
            shutil.rmtree(unfinished, ignore_errors=True)  # of a process that was killed
            _write(name, unfinished)
            unfinished.rename(folder)
    return folder


def _write(name: str, folder: Path) -> None:
    import world  # takes seconds, which a process that finds the set made does not spend

    words = {
        "shape": world.drawing.SHAPES,
        "texture": world.drawing.TEXTURES,
        "colour": world.COLOURS,
        "background": world.COLOURS,
        "corruption": world.CORRUPTIONS,
        "group": range(4),
    }
    factors = []
    for split in TABLE["generated"][name]["splits"]:
        rendered = world.digits(split) if name == "digits" else world.render(name, split)
        classes = [rendered.classnames[label].replace(" ", "_") for label in rendered.labels.tolist()]
        images = {f"{split}/{each}/{row:05d}.png": rendered.images[row] for row, each in enumerate(classes)}
        _save(folder, images, f"{name} {split}")
        columns = {key: [words[key][i] for i in indices.tolist()] for key, indices in rendered.attributes.items()}
        factors.append(pd.DataFrame({"path": list(images), **columns}))
    if name != "digits":
        pd.concat(factors).to_csv(folder / "factors.csv", index=False)
    if name == "shapes":
        images, captions = world.render_captioned(8, seed=1)
        images = {f"captions/{row:05d}.png": image for row, image in enumerate(images)}
        _save(folder, images, "captions")
        pd.DataFrame({"path": list(images), "caption": captions}).to_csv(folder / "captions.csv", index=False)


def _save(folder: Path, images: Mapping, title: str) -> None:
    """Write tensors [3, h, w] of bytes as PNG files, by their paths below `folder`."""
    for place in {(folder / path).parent for path in images}:
        place.mkdir(parents=True, exist_ok=True)
    for path, image in tqdm(images.items(), desc=title, unit="img", disable=None):
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
        except (OSError, ValueError) as error:
            print(one_line(error))
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

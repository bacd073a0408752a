"""Records of runs as one table: a row per data set, encoders, method, shots, seed and protocol.

python -m lib results runs/encoders                    # writes results.parquet and results.csv there
pandas.read_parquet("runs/encoders/results.parquet")
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from lib.files import ROOT, replace_file
from lib.runs import join_published, published_backbone, read_json

if TYPE_CHECKING:
    from lib.tasks import TaskSource

COLUMNS = {
    "dataset": "what was learned from, by the name it was given",
    "test": "what was tested on, where that is another data set",
    "backbone": "name under which tables publish CLIP's image tower (RN50, ViT-B/16); empty for others",
    "clip": "CLIP encoder by name",
    "aux": "auxiliary encoder by name",
    "method": "title of the method, as in published tables",
    "label": "its key in METHODS, or what the notebook calls the variant",
    "shots": "labelled images per class",
    "seed": "of the draw of the support",
    "protocol": "how hyper-parameters were chosen: val, fixed or oracle (on the test images)",
    "accuracy": "on the test images, in %",
    "val": "on the validation images, in %; empty where it was not measured",
    "chosen": "hyper-parameters that were chosen, as JSON",
    "seconds": "of the fit, beside whatever ran then",
    "published": "accuracy that the method's paper gives for data set, backbone and shots, in %",
    "source": "where that stands",
    "notebook": "which ran",
    "commit": "of the code that ran; + where files differed from it",
    "fingerprints": "of the features, as JSON",
    "run": "folder of the run, below the folder that was read",
}
KEYS = ["dataset", "test", "clip", "aux", "label", "shots", "seed", "protocol"]


def rows(results: pd.DataFrame, source: TaskSource, dataset: str) -> list[dict[str, object]]:
    """Rows of `methods.compare` as a record keeps them: one per draw and label, without tensors.

    `source` is what the tasks were drawn from, `dataset` its name as the run was given it. A column `judged`, the
    accuracy on validation images in [0, 1], is kept as `val`.
    """
    encoders = dict(zip(("clip", "aux"), source.encoders, strict=False))
    return [
        {"dataset": dataset, **encoders, "method": row.method.entry.title, "label": row.label, "shots": row.shots}
        | {"seed": row.seed, "protocol": row.protocol, "accuracy": 100 * row.accuracy, "chosen": row.chosen}
        | {"seconds": round(row.seconds, 3), "val": 100 * row.judged if "judged" in results else None}
        for row in results.itertuples()
    ]


def table(folders: Sequence[Path]) -> pd.DataFrame:
    """All rows of the records below some folders, with the published accuracy beside them; see COLUMNS.

    Where two runs have the same row, say one alone and one of a sweep, that of the later record is taken.

    Raises:
        ValueError: a folder that is not there, or no record with rows in any of them.
    """
    found: list[dict] = []
    for folder in folders:
        if not folder.is_dir():
            raise ValueError(f"no folder {folder}")
        for path in sorted(folder.rglob("metrics.json"), key=lambda p: (p.stat().st_mtime_ns, p)):
            record = read_json(path)
            shared = {"test": record["parameters"].get("test", ""), "notebook": record["notebook"]}
            shared |= {"commit": record["commit"], "fingerprints": json.dumps(record["fingerprints"], sort_keys=True)}
            shared |= {"run": path.parent.relative_to(folder).as_posix()}
            found += [
                {"val": None} | row | shared | {"chosen": json.dumps(row["chosen"])} for row in record.get("rows", [])
            ]
    if not found:
        where = ", ".join(map(str, folders))
        raise ValueError(f"no record with rows per seed below {where}; notebooks 05 and 06 keep them")
    gathered = pd.DataFrame(found).drop_duplicates(KEYS, keep="last").sort_values(KEYS, ignore_index=True)
    gathered["val"] = pd.to_numeric(gathered["val"])
    gathered["backbone"] = gathered["clip"].map(published_backbone)
    published = pd.read_csv(ROOT / "data" / "published.csv")
    ours = gathered[gathered["test"] == ""].assign(row=gathered.index[gathered["test"] == ""])
    ours["dataset"] = ours["dataset"].str.split("@").str[0]
    ours = ours.rename(columns={"accuracy": "mean"})[["row", "method", "dataset", "backbone", "shots", "mean"]]
    joined = join_published(ours, published).drop_duplicates("row").set_index("row")
    gathered["published"] = joined["value"].reindex(gathered.index)
    gathered["source"] = (joined["source"] + ", " + joined["table"]).reindex(gathered.index).fillna("")
    return gathered[list(COLUMNS)]


def write(gathered: pd.DataFrame, folder: Path) -> list[Path]:
    """Write a table as `results.parquet` and `results.csv`, and return their paths."""
    packed = BytesIO()
    gathered.to_parquet(packed, index=False)
    contents = {"results.parquet": packed.getvalue(), "results.csv": gathered.to_csv(index=False).encode()}
    return [replace_file(folder / name, lambda f, data=data: f.write(data)) for name, data in contents.items()]


def read(path: Path) -> pd.DataFrame:
    """A table that `write` wrote, parquet or csv; a ValueError names columns that are missing."""
    empty = {"keep_default_na": False, "na_values": {name: [""] for name in ("accuracy", "val", "published")}}
    gathered = pd.read_parquet(path) if path.suffix == ".parquet" else pd.read_csv(path, **empty)
    if missing := [name for name in COLUMNS if name not in gathered]:
        raise ValueError(f"{path} has no column {', '.join(missing)}; python -m lib results writes such a table")
    return gathered


def matching(gathered: pd.DataFrame, source: TaskSource, **keys: object) -> pd.DataFrame:
    """Rows of a table for tasks of `source`, as `methods.compare` gives them, by label; the fitted methods are None.

    `keys` are further columns that must agree: dataset, test, shots, seed, protocol.
    """
    keys |= dict(zip(("clip", "aux"), source.encoders, strict=False))
    ours = gathered[(gathered[list(keys)] == pd.Series(keys)).all(axis=1)]
    columns = {"label": ours["label"], "accuracy": ours["accuracy"] / 100, "judged": ours["val"] / 100, "method": None}
    same = {name: ours[name] for name in ("shots", "seed", "protocol", "seconds")}
    return pd.DataFrame(columns | same | {"chosen": ours["chosen"].map(json.loads)}).set_index("label", drop=False)

"""Features: extracted once, cached under a fingerprint, verified at every reading.

`load` returns the image features of a split, `load_text` the class features of a CLIP encoder. Both read the
cache, or fill it first. The fingerprint covers the data set's manifest, the split, the encoder's name, its
weights, preprocessing, precision, views and the version of this code; a bank of another encoder or of changed
images is never taken for it. For `features:PATH` both read a bank in the format that `banks` describes.

The cache is data/cache, or the folder that LOGIT_BIAS_CACHE names. A damaged file in it is made again, with a
warning; a damaged bank of somebody else is refused.
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn.functional import normalize

from lib.features import banks, datasets, extraction
from lib.features import encoders as backbones
from lib.features.banks import save_bank
from lib.files import cache_root

__all__ = [
    "Features",
    "TextFeatures",
    "bank_encoders",
    "bank_shot_index",
    "cache_root",
    "load",
    "load_many",
    "load_text",
    "save_bank",
]
VERSION = 1  # of the extraction code: raise it when the same images and weights would give other features
LOGIT_SCALE = 100.0


@dataclass(frozen=True)
class Features:
    """Image features of one split under one encoder, in the encoder's own scale; never modified in place.

    Attributes:
        x: float32, one row per image; with views, one such matrix per random crop and flip.
        y: class index in [0, C).
        quarantined: the ids of images that could not be decoded and are left out.
    """

    x: Float[Tensor, "n D"] | Float[Tensor, "v n D"]
    y: Int64[Tensor, " n"]
    classnames: tuple[str, ...]
    backbone: str
    dataset: str
    split: str
    fingerprint: str
    quarantined: tuple[str, ...] = ()


@dataclass(frozen=True)
class TextFeatures:
    """Class features of one CLIP encoder.

    Attributes:
        x: unit rows, the normalised mean of a class's normalised text embeddings.
        templates: the prompts, with `{}` for the class name.
        logit_scale: the encoder's own learned scale; logits of the workbook are 100 x cosine whatever it is.
    """

    x: Float[Tensor, "C D"]
    classnames: tuple[str, ...]
    backbone: str
    dataset: str
    templates: tuple[str, ...]
    logit_scale: float
    fingerprint: str


def load(dataset: str, split: str, encoder: str, **options: Any) -> Features:
    """Return the features of a split under one encoder; see `load_many` for the options."""
    return load_many(dataset, split, [encoder], **options)[0]


def load_many(
    dataset: str,
    split: str,
    encoders: Sequence[str],
    *,
    views: int = 1,
    device: str = "auto",
    precision: str = "fp32",
    batch_size: int = 64,
    num_workers: int = 0,
    cache: Path | None = None,
    quarantine: bool = False,
) -> tuple[Features, ...]:
    """Return the features of a split under several encoders; what is not cached is extracted in one pass.

    Args:
        dataset: a name that `datasets.load` knows, or `features:PATH`.
        encoders: names that `recipes` knows, or the files of the bank.
        views: 1 for the plain image; V > 1 for V random crops and flips, and `x` of shape [V, n, D].
        device, precision: see `backbones.load`.
        batch_size: network inputs at once.
        num_workers: decoding processes.
        cache: the cache's folder; see `cache_root`.
        quarantine: leave out images that cannot be decoded instead of stopping at the first.

    Raises:
        ValueError: an unknown name, a damaged bank, an image that cannot be decoded, features that are not finite.
    """
    if views < 1 or batch_size < 1:
        raise ValueError(f"views and batch_size are 1 or more, not {views} and {batch_size}")
    if dataset.startswith("features:"):
        if views > 1:
            raise ValueError(f"{dataset} holds one row per image, not {views} views")
        return tuple(_from_bank(dataset, split, encoder) for encoder in encoders)
    data = datasets.load(dataset)
    recipes = [backbones.resolve(encoder) for encoder in encoders]
    images = data.images(split)
    jobs = [_job(data.base, split, recipe, images, views, precision, cache_root(cache)) for recipe in recipes]
    found = [extraction.read(job) for job in jobs]
    if None in found:
        missing = {job.fingerprint: job for job, bank in zip(jobs, found, strict=True) if bank is None}
        with ExitStack() as stack:
            for job in sorted(missing.values(), key=lambda job: job.folder):
                stack.enter_context(extraction.locked(job.folder))
            todo = [job for job in missing.values() if extraction.read(job) is None]  # another process may have won
            if todo:
                extraction.extract(
                    todo,
                    images,
                    views=views,
                    device=device,
                    precision=precision,
                    batch_size=batch_size,
                    num_workers=num_workers,
                    quarantine=quarantine,
                )
        found = [extraction.read(job) for job in jobs]
    return tuple(_features(data, split, job, bank, quarantine) for job, bank in zip(jobs, found, strict=True))


def load_text(
    dataset: str,
    encoder: str,
    templates: str | datasets.Prompts | None = None,
    *,
    device: str = "auto",
    precision: str = "fp32",
    cache: Path | None = None,
) -> TextFeatures:
    """Return a data set's class features: the mean of the normalised embeddings of its prompts, normalised.

    Args:
        dataset: a name that `datasets.load` knows, or `features:PATH`, whose own text features are read.
        encoder: a CLIP encoder.
        templates: None for the data set's own; otherwise see `datasets.prompts`.

    Raises:
        ValueError: an encoder without a text tower, prompts that cannot be used, a bank without text features.
    """
    if dataset.startswith("features:"):
        return _text_from_bank(dataset, encoder, templates)
    data, recipe = datasets.load(dataset), backbones.resolve(encoder)
    prompts = datasets.prompts(templates, data)
    texts = _texts(prompts, data.classnames)
    fingerprint = _hash(ingredients := _ingredients(recipe, precision) | {"texts": texts})
    folder = cache_root(cache) / "text" / f"{_slug(encoder)}-{fingerprint[:16]}"
    job = extraction.Job(encoder, folder, ingredients, fingerprint)
    found = extraction.read(job)
    if found is None:
        with extraction.locked(job.folder):
            model = backbones.load_encoder(encoder, device, precision)
            x = torch.stack([_class_mean(model, group) for group in texts])
            extraction.write(job, x.shape, [torch.arange(len(x)), x], {"logit_scale": model.logit_scale})
        found = extraction.read(job)
    x, _, manifest = found
    told = (
        (f"{sum(map(len, texts))} sentences about {len(texts)} classes",) if isinstance(prompts, Mapping) else prompts
    )
    return TextFeatures(x, data.classnames, encoder, dataset, tuple(told), manifest["logit_scale"], fingerprint)


def bank_encoders(dataset: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the CLIP and the auxiliary encoders of `features:PATH`, each sorted by name."""
    return banks.encoders(dataset)


def bank_shot_index(dataset: str) -> Int64[Tensor, " n"] | None:
    """Return each training row's place in its class, for banks that fix the order in which shots are taken."""
    return banks.shot_index(dataset)


def _texts(prompts: datasets.Prompts, classnames: Sequence[str]) -> list[list[str]]:
    if isinstance(prompts, Mapping):
        return [list(prompts[name]) for name in classnames]
    return [[prompt.format(name) for prompt in prompts] for name in classnames]


def _class_mean(model: backbones.Encoder, texts: list[str]) -> Float[Tensor, " D"]:
    x = model.encode_text(texts)
    if not torch.isfinite(x).all():
        raise ValueError(f"{model.name} gives NaN or infinite features for one of {texts}")
    return normalize(normalize(x, dim=1).mean(dim=0), dim=0)


def _job(
    dataset: str,
    split: str,
    recipe: backbones.EncoderSpec,
    images: datasets.ImageSplit,
    views: int,
    precision: str,
    root: Path,
) -> extraction.Job:
    ingredients = _ingredients(recipe, precision) | {
        "split": split,
        "manifest": images.manifest,
        "views": views,
        "augmentation": extraction.AUGMENTATION_SEED if views > 1 else None,
    }
    fingerprint = _hash(ingredients)
    folder = root / _slug(dataset) / _slug(split) / f"{_slug(recipe.name)}-{fingerprint[:16]}"
    return extraction.Job(recipe.name, folder, ingredients, fingerprint)


def _ingredients(recipe: backbones.EncoderSpec, precision: str) -> dict[str, Any]:
    return {
        "version": VERSION,
        "encoder": recipe.name,
        "weights": recipe.weights_hash,
        "preprocess": dict(recipe.preprocess),
        "settings": dict(recipe.settings),
        "precision": precision,
    }


def _hash(ingredients: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(ingredients, sort_keys=True).encode()).hexdigest()


def _slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9.@_-]+", "_", text)[-80:]


def _features(data: datasets.Dataset, split: str, job: extraction.Job, bank: tuple, quarantine: bool) -> Features:
    x, y, manifest = bank
    bad = tuple(manifest["quarantined"])
    if bad and not quarantine:
        raise ValueError(
            f"{data.name}, {split}: the cached features lack {len(bad)} images that could not be decoded (first: "
            f"{bad[0]}); repair them, or accept that by quarantine=True"
        )
    return Features(x, y, data.classnames, job.encoder, data.name, split, job.fingerprint, bad)


def _from_bank(dataset: str, split: str, encoder: str) -> Features:
    x, y = banks.rows(dataset, split, encoder)
    names = tuple(banks.meta(dataset)["class_names"])
    fingerprint = _hash({"split": split, "class_names": names, **banks.hashes(dataset, encoder, "labels")})
    return Features(x, y, names, encoder, dataset, split, fingerprint)


def _text_from_bank(dataset: str, encoder: str, templates: object) -> TextFeatures:
    if templates is not None:
        raise ValueError(f"{dataset} holds text features already made; templates cannot be chosen")
    x, card = banks.text(dataset, encoder), banks.meta(dataset)
    names, about = tuple(card["class_names"]), card.get("text", {})
    prompts = (about["prompt"],) if about.get("prompt") else ()
    fingerprint = _hash({"class_names": names, **banks.hashes(dataset, "text")})
    scale = float(about.get("logit_scale", LOGIT_SCALE))
    return TextFeatures(normalize(x, dim=1), names, encoder, dataset, prompts, scale, fingerprint)

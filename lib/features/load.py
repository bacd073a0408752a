"""The door to features: extracted once, cached under a fingerprint, verified at every reading.

`load` gives the image features of a split, `load_text` the class features of a CLIP encoder. Both read the cache,
or fill it first; for `features:PATH` both read a bank in the format that `banks` describes.

The cache is data/cache, or the folder that LOGIT_BIAS_CACHE names. A damaged file in it is made again, with a
warning; a damaged bank of somebody else is refused.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn.functional import normalize

from lib.features import datasets, extraction
from lib.features.banks import LOGIT_SCALE, open_bank
from lib.features.encoders import load_encoder, resolve
from lib.features.extraction import fingerprint, make_job, slug
from lib.files import cache_root


@dataclass(frozen=True)
class Features:
    """Image features of one split under one encoder, in the encoder's own scale; never modified in place."""

    x: Float[Tensor, "n D"] | Float[Tensor, "v n D"]  # with views, one matrix per random crop and flip
    y: Int64[Tensor, " n"]  # class index in [0, C)
    classnames: tuple[str, ...]
    encoder: str
    dataset: str
    split: str
    fingerprint: str
    quarantined: tuple[str, ...] = ()  # ids of images that could not be decoded and are left out


@dataclass(frozen=True)
class TextFeatures:
    """Class features of one CLIP encoder."""

    x: Float[Tensor, "C D"]  # unit rows, the normalised mean of a class's normalised text embeddings
    classnames: tuple[str, ...]
    encoder: str
    dataset: str
    templates: tuple[str, ...]  # the prompts, with `{}` for the class name
    logit_scale: float  # the encoder's own, learned; logits of the workbook are 100 x cosine whatever it is
    fingerprint: str
    prompts: Float[Tensor, "C P D"] | None = None  # unit rows, one per prompt; None where classes differ in P


def load(dataset: str, split: str, encoder: str, **options: Any) -> Features:
    """Features of a split under one encoder; options as for `load_many`."""
    return load_many(dataset, split, [encoder], **options)[0]


def load_many(
    dataset: str,  # a name of `datasets`, or `features:PATH`, whose `encoders` are its files
    split: str,
    encoders: Sequence[str],
    *,
    views: int = 1,  # 1: the plain image; V > 1: V random crops and flips, and `x` of shape [V, n, D]
    device: str = "auto",  # this and `precision`: see `encoders.load_encoder`
    precision: str = "fp32",
    batch_size: int = 64,  # network inputs at once, views included
    num_workers: int = 0,  # processes that decode; 0: decode here
    cache: Path | None = None,  # see `files.cache_root`
    quarantine: bool = False,  # leave out images that cannot be decoded, with their labels, instead of stopping
) -> tuple[Features, ...]:
    """Features of a split under several encoders; what is not cached is extracted in one pass over the images."""
    if views < 1 or batch_size < 1:
        raise ValueError(f"views and batch_size are 1 or more, not {views} and {batch_size}")
    if dataset.startswith("features:"):
        if views > 1:
            raise ValueError(f"{dataset} holds one row per image, not {views} views")
        return tuple(_from_bank(dataset, split, encoder) for encoder in encoders)
    data, specs = datasets.load(dataset), [resolve(encoder) for encoder in encoders]
    images = data.images(split)
    place = cache_root(cache) / slug(data.base) / slug(split)
    augmentation = extraction.AUGMENTATION_SEED if views > 1 else None
    further = {"split": split, "manifest": images.manifest, "views": views, "augmentation": augmentation}
    jobs = [make_job(spec, place, precision, **further) for spec in specs]
    options = {"views": views, "device": device, "precision": precision, "batch_size": batch_size}
    make = partial(extraction.extract, images=images, num_workers=num_workers, quarantine=quarantine, **options)
    features = []
    for job, (x, y, manifest) in zip(jobs, extraction.cached(jobs, make, shared=True), strict=True):
        bad = tuple(manifest["quarantined"])
        if bad and not quarantine:
            lack = f"the cached features lack {len(bad)} images that could not be decoded (first: {bad[0]})"
            raise ValueError(f"{dataset}, {split}: {lack}; repair them, or accept that by quarantine=True")
        features.append(Features(x, y, data.classnames, job.encoder, dataset, split, job.fingerprint, bad))
    return tuple(features)


def load_text(
    dataset: str,  # a name of `datasets`, or `features:PATH`, whose own text features are read
    encoder: str,
    templates: str | datasets.Prompts | None = None,  # None: the data set's own; otherwise see `datasets.prompts`
    *,
    device: str = "auto",
    precision: str = "fp32",
    cache: Path | None = None,
) -> TextFeatures:
    """A data set's class features: the mean of the normalised embeddings of its prompts, normalised."""
    if dataset.startswith("features:"):
        if templates is not None:
            raise ValueError(f"{dataset} holds text features already made; templates cannot be chosen")
        bank = open_bank(dataset)
        x, card = normalize(bank.text(encoder), dim=1), bank.card.get("text", {})
        about = (card["prompt"],) if card.get("prompt") else ()
        apart = bank.prompts(encoder)
        apart, files = (None, ["text"]) if apart is None else (normalize(apart, dim=2), ["text", "prompts"])
        digest, scale = fingerprint({"class_names": bank.class_names, **bank.hashes(*files)}), card.get("logit_scale")
        return TextFeatures(x, bank.class_names, encoder, dataset, about, float(scale or LOGIT_SCALE), digest, apart)
    data = datasets.load(dataset)
    prompts = datasets.prompts(templates, data)
    if isinstance(prompts, Mapping):
        texts = [list(prompts[name]) for name in data.classnames]
        described: Sequence[str] = (f"{sum(map(len, texts))} sentences about {len(texts)} classes",)
    else:
        texts, described = [[prompt.format(name) for prompt in prompts] for name in data.classnames], prompts
    jobs = [  # of the classes, and of each prompt
        make_job(resolve(encoder), cache_root(cache) / "text", precision, texts=texts, **further)
        for further in ({}, {"apart": True})
    ]

    def make(todo: list[extraction.Job]) -> None:
        model = load_encoder(encoder, device, precision)
        rows = [normalize(model.encode_text(group), dim=1) for group in texts]
        for x, group in zip(rows, texts, strict=True):
            if not torch.isfinite(x).all():
                raise ValueError(f"{encoder} gives NaN or infinite features for one of {group}")
        means = torch.stack([normalize(x.mean(dim=0), dim=0) for x in rows])
        y = torch.arange(len(rows)).repeat_interleave(torch.tensor([len(x) for x in rows]))
        for job, parts in zip(jobs, ([torch.arange(len(rows)), means], [y, torch.cat(rows)]), strict=True):
            if job in todo:
                extraction.write(job, parts[1].shape, parts, logit_scale=model.logit_scale)

    (x, _, manifest), (apart, _, _) = extraction.cached(jobs, make)
    apart = apart.unflatten(0, (len(texts), -1)) if len({*map(len, texts)}) == 1 else None
    about = tuple(described), manifest["logit_scale"], jobs[0].fingerprint
    return TextFeatures(x, data.classnames, encoder, dataset, *about, apart)


def identify(encoder: str, precision: str = "fp32") -> dict[str, str]:
    """An encoder as a saved method remembers it: name, hash of the weights, fingerprint of all but the name."""
    spec = resolve(encoder)
    traits = {**make_job(spec, Path(), precision).ingredients, "encoder": ""}
    return {"name": encoder, "weights": spec.weights_hash, "precision": precision, "fingerprint": fingerprint(traits)}


def _from_bank(dataset: str, split: str, encoder: str) -> Features:
    bank = open_bank(dataset)
    x, y = bank.rows(split, encoder)
    ingredients = {"split": split, "class_names": bank.class_names, **bank.hashes(encoder, "labels")}
    return Features(x, y, bank.class_names, encoder, dataset, split, fingerprint(ingredients))

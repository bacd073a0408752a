"""Checks of shapes and types are switched on before anything of `lib` is imported."""

import os
import sys
from pathlib import Path

from jaxtyping import install_import_hook

install_import_hook(["lib", "draw", "world", "objectives", "train"], "beartype.beartype")
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "data"), str(ROOT / "data" / "embedded"), str(ROOT / "figures")]

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

REAL = ROOT.parent / "shared" / "real"
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


@pytest.fixture(scope="session")
def caltech70() -> Path:
    """Real CLIP and MobileNet features; tests that need them are skipped where they are absent."""
    path = REAL / "caltech70"
    if not path.exists():
        pytest.skip("the bank of real features is not on this machine")
    return path


@pytest.fixture
def make_arrays():
    """Return a function that makes the arrays of a small, learnable task."""

    def make(classes=5, shots=4, n_val=20, n_test=40, clip_dim=12, aux_dim=16, seed=0):
        rng = np.random.default_rng(seed)
        text = rng.normal(size=(classes, clip_dim))
        means = rng.normal(size=(classes, aux_dim))

        def part(y):
            return {
                "clip": torch.tensor(text[y] + 1.2 * rng.normal(size=(len(y), clip_dim)), dtype=torch.float32),
                "aux": torch.tensor(means[y] + 0.8 * rng.normal(size=(len(y), aux_dim)), dtype=torch.float32),
                "y": torch.tensor(y),
            }

        return {
            "text": torch.tensor(text, dtype=torch.float32),
            "support": part(np.repeat(np.arange(classes), shots)),
            "val": part(np.arange(n_val) % classes),
            "test": part(np.arange(n_test) % classes),
            "prompts": torch.tensor(text[:, None] + 0.8 * rng.normal(size=(classes, 3, clip_dim)), dtype=torch.float32),
        }

    return make


@pytest.fixture
def make_task(make_arrays):
    """Return a function that makes a small, learnable task."""
    from lib.tasks import FewShotTask

    return lambda **sizes: FewShotTask.from_arrays(**make_arrays(**sizes))


@pytest.fixture(scope="session")
def embedded(tmp_path_factory):
    """Return a folder like data/embedded, with encoders of a few thousand random weights."""
    from small_models import write_embedded

    return write_embedded(tmp_path_factory.mktemp("embedded"))


@pytest.fixture
def small_encoders(embedded, monkeypatch, tmp_path):
    """Let `embedded:` mean those encoders, and the cache a folder of the test's own."""
    from lib.features import encoders

    monkeypatch.setattr(encoders, "EMBEDDED_FOLDER", embedded)
    monkeypatch.setenv("LOGIT_BIAS_CACHE", str(tmp_path / "cache"))

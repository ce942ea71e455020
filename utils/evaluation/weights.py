"""Which weights a model has, as scores.json records it. Imports no torch, which utils.compare can do without."""

import json
from pathlib import Path

from utils.files import sha256_file, sha256_text


def weights_of(model_path: str | Path) -> dict[str, str | int | None]:
    """{"sha256", "step"} of a model folder or a file of weights; None for a hub id or if there is no such file.

    sha256: of the file, as `sha256sum` shows it; of several files, of their sorted names and SHA-256s. The weights of
    one of our checkpoints are not read again: its manifest has their SHA-256. step: its optimizer steps.

    Raises:
        OSError: a file of weights cannot be read.
    """
    path = Path(model_path)
    known = json_object(path / "trainer_state" / "manifest.json").get("files", {})
    digests = [(file.name, known[file.name]["sha256"] if file.name in known else sha256_file(file))
               for file in weight_files(path)]
    sha256 = digests[0][1] if len(digests) == 1 else None
    if len(digests) > 1:
        sha256 = sha256_text(json.dumps(digests))
    return {"sha256": sha256, "step": json_object(path / "trainer_state" / "state.json").get("step")}


def weight_files(path: Path) -> list[Path]:
    """Sorted by name; transformers too prefers safetensors, and one file to several."""
    if path.is_file():
        return [path]
    for pattern in ("model.safetensors", "model-*-of-*.safetensors", "pytorch_model.bin", "pytorch_model-*-of-*.bin"):
        if files := sorted(path.glob(pattern)):
            return files
    return []


def json_object(path: Path) -> dict:
    """{} if there is no such file, or none that can be read."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}

"""Which weights a model has, as scores.json records it, so that those of another training are told from them.

Without torch, which would cost utils.compare seconds.
"""

import hashlib
import json
from pathlib import Path

from data.digest import file_digest


def weights_of(model_path: str | Path) -> dict[str, str | int | None]:
    """{"sha256", "step"} of a model folder or a file of weights; both None for a hub id, or where nothing is.

    sha256: of the file, as sha256sum shows it; of several, that of their sorted names and SHA-256s. A checkpoint of a
    training is not read again: its manifest says it. step: optimizer steps of such a checkpoint.

    Raises:
        OSError: a file of weights cannot be read.
    """
    path = Path(model_path)
    state, manifest = (json_object(path / "trainer_state" / name) for name in ("state.json", "manifest.json"))
    known = manifest.get("files", {})
    digests = [(file.name, known[file.name]["sha256"] if file.name in known else file_digest(file))
               for file in weight_files(path)]
    if len(digests) > 1:
        found = hashlib.sha256(json.dumps(digests).encode()).hexdigest()
    else:
        found = digests[0][1] if digests else None
    step = state.get("step")
    return {"sha256": found, "step": step if type(step) is int else None}


def weight_files(path: Path) -> list[Path]:
    """In the order of their names; the library too takes safetensors first, and one file before several."""
    if path.is_file():
        return [path]
    for stem, suffix in (("model", "safetensors"), ("pytorch_model", "bin")):
        if (path / f"{stem}.{suffix}").is_file():
            return [path / f"{stem}.{suffix}"]
        if files := sorted(path.glob(f"{stem}-*-of-*.{suffix}")):
            return files
    return []


def json_object(path: Path) -> dict:
    """{} where there is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}

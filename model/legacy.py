"""Legacy `.pt` state dicts: loaded strictly, and only tensors are unpickled."""

import re
from pathlib import Path

import torch
from torch import Tensor, nn

from model.errors import ModelError, one_line_errors

WRAPPERS = ("model_state_dict", "state_dict", "model")
# Causal masks and rotary tables that old versions of the library kept as buffers; the model builds them itself.
OLD_BUFFERS = (".attn.bias", ".attn.masked_bias", ".attention.bias", ".attention.masked_bias", ".rotary_emb.inv_freq")


@torch.no_grad()
def load_legacy_weights(model: nn.Module, path: str | Path) -> None:
    """Load a state dict into `model`, in place.

    Keys may start with `module.` (data parallel) and with one prefix that all of them share. The embedding may have one
    row more than the model's ([PAD], added by old scripts). It is removed: its random logits would beat GPT-2's, which
    are far below 0. Anything else that does not fit is an error.

    Raises:
        ModelError: no such file, not a state dict of tensors, or keys or shapes that do not fit.
    """
    expected = model.state_dict(keep_vars=True)
    state = strip_prefixes(read_state_dict(path), set(expected))
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    names = [key for key, value in expected.items() if value is embedding or value is head]
    for key in names:
        if key in state and state[key].shape[:1] == (len(expected[key]) + 1,):
            state[key] = state[key][:-1]
    present = [key for key in names if key in state]
    if embedding is head and present:  # tied: a file may hold only one of the names
        state = {**dict.fromkeys(names, state[present[0]]), **state}
    check_fit(path, state, model)
    for key in names if embedding is head else ():
        if not torch.equal(state[key], state[names[0]]):
            raise ModelError(f"{path}: {key} differs from {names[0]}, but this architecture ties them: wrong model?")
    model.load_state_dict(state, strict=True)
    model.tie_weights()


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """The tensors of the file by name, without optimizer states and the like beside a nested state dict.

    Raises:
        ModelError: as `load_legacy_weights`.
    """
    if not Path(path).exists():
        raise ModelError(f"{path} does not exist: expected a .pt file with a state dict")
    # Damaged bytes raise almost anything, and torch's own message advises to unpickle them.
    refused = (f"{path} is damaged or holds more than tensors, and is not unpickled, since that could run code: write "
               "it again with torch.save(model.state_dict(), path)")
    with one_line_errors(refused, with_reason=False):
        content = torch.load(path, map_location="cpu", weights_only=True)
    if isinstance(content, dict):
        content = next((content[key] for key in WRAPPERS if isinstance(content.get(key), dict)), content)
    entries = content.items() if isinstance(content, dict) else ()
    if not entries or not all(isinstance(key, str) and isinstance(value, Tensor) for key, value in entries):
        raise ModelError(f"{path} is not a state dict: expected parameter names with tensors")
    return dict(entries)


def strip_prefixes(state: dict[str, Tensor], expected: set[str]) -> dict[str, Tensor]:
    """Removes `module.` at the start of keys (never inside them), old buffers, and one prefix shared by all keys."""
    state = {re.sub(r"^(module\.)+", "", key): value for key, value in state.items()}
    state = {key: value for key, value in state.items() if key in expected or not key.endswith(OLD_BUFFERS)}
    while not expected & state.keys():
        if not all("." in key for key in state) or len({key.partition(".")[0] for key in state}) != 1:
            break
        state = {key.partition(".")[2]: value for key, value in state.items()}
    return state


def check_fit(path: str | Path, state: dict[str, Tensor], model: nn.Module) -> None:
    """Raises ModelError if names or shapes differ from the model's."""
    own = model.state_dict()
    different = {
        "missing": sorted(own.keys() - state.keys()), "unexpected": sorted(state.keys() - own.keys()),
        "of another shape": [f"{key} is {list(state[key].shape)}, expected {list(value.shape)}"
                             for key, value in own.items() if key in state and value.shape != state[key].shape],
    }
    faults = [f"{len(found)} {what} ({found[0]})" for what, found in different.items() if found]
    if faults:
        raise ModelError(f"{path} does not fit {type(model).__name__}: {', '.join(faults)}: wrong model name?")

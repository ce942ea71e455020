"""Legacy `.pt` state dicts: loaded strictly, and without unpickling anything but tensors."""

import re
from pathlib import Path

import torch
from torch import Tensor, nn

from model.language_model import ModelError

WRAPPERS = ("model_state_dict", "state_dict", "model")
# Causal masks and rotary tables that old versions of the library kept as buffers: the model makes them itself.
OLD_BUFFERS = (".attn.bias", ".attn.masked_bias", ".attention.bias", ".attention.masked_bias", ".rotary_emb.inv_freq")


def load_legacy_weights(model: nn.Module, path: str | Path) -> None:
    """Load a state dict into `model`, in place.

    Keys may start with `module.` (data parallel), and with one prefix that all of them share. The embedding may hold
    one row more than the model's ([PAD], added by old scripts): that row is cut, since its random logits would beat
    GPT-2's, which lie far below 0. Anything else that does not fit is an error.

    Raises:
        ModelError: no such file, not a state dict of tensors, or keys or shapes that do not fit.
    """
    state = strip_prefixes(read_state_dict(path), set(model.state_dict()))
    state = cut_pad_row(state, model)
    tied = tied_keys(model)
    for key, source in tied.items():
        if key not in state and source in state:
            state[key] = state[source]
    check_fit(path, state, model)
    for key, source in tied.items():
        if not torch.equal(state[key], state[source]):
            raise ModelError(f"{path}: {key} differs from {source}, but this architecture ties them: wrong model_name?")
    with torch.no_grad():
        model.load_state_dict(state, strict=True)
    model.tie_weights()


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """The tensors of the file by name, without optimizer states and the like beside a nested state dict.

    Raises:
        ModelError: as `load_legacy_weights`.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise ModelError(f"{path} does not exist: expected a .pt file with a state dict") from error
    except OSError as error:  # also of torch's seeking in a file that was cut off
        raise ModelError(f"{path} cannot be read or is damaged ({error.strerror}): expected a state dict") from error
    except Exception as error:  # damaged bytes raise almost anything; torch's own message advises to unpickle them
        raise ModelError(f"{path} is damaged or holds more than tensors, and is not unpickled, since that could run "
                         "code: write it again with torch.save(model.state_dict(), path)") from error
    for wrapper in WRAPPERS:
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content = content[wrapper]
            break
    entries = content.items() if isinstance(content, dict) else ()
    if not entries or not all(isinstance(key, str) and isinstance(value, Tensor) for key, value in entries):
        raise ModelError(f"{path} is not a state dict: expected parameter names with tensors")
    return dict(entries)


def strip_prefixes(state: dict[str, Tensor], expected: set[str]) -> dict[str, Tensor]:
    """Without `module.` at the start of keys (never inside them), old buffers, and one prefix shared by all keys."""
    state = {re.sub(r"^(module\.)+", "", key): value for key, value in state.items()}
    state = {key: value for key, value in state.items() if key in expected or not key.endswith(OLD_BUFFERS)}
    while not expected & state.keys():
        if not all("." in key for key in state) or len({key.partition(".")[0] for key in state}) != 1:
            break
        state = {key.partition(".")[2]: value for key, value in state.items()}
    return state


def cut_pad_row(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The state without the one row that embedding and head may have more than the model's."""
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    own = {key: value for key, value in model.state_dict(keep_vars=True).items() if value is embedding or value is head}
    long = {key for key in own.keys() & state.keys() if state[key].shape[:1] == (len(own[key]) + 1,)}
    return {key: value[:-1] if key in long else value for key, value in state.items()}


def tied_keys(model: nn.Module) -> dict[str, str]:
    """{name of the head's weight: name of the embedding's} where the model ties them, else {}."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None or head.weight is not embedding.weight:
        return {}
    names = {id(module): name for name, module in model.named_modules()}
    return {f"{names[id(head)]}.weight": f"{names[id(embedding)]}.weight"}


def check_fit(path: str | Path, state: dict[str, Tensor], model: nn.Module) -> None:
    """Raises ModelError if names or shapes differ from the model's."""
    own = model.state_dict()
    found = {"missing": sorted(own.keys() - state.keys()), "unexpected": sorted(state.keys() - own.keys())}
    complaints = [f"{len(keys)} {what} ({keys[0]})" for what, keys in found.items() if keys]
    if wrong := [key for key in own if key in state and own[key].shape != state[key].shape]:
        shapes = f"{wrong[0]} is {list(state[wrong[0]].shape)}, expected {list(own[wrong[0]].shape)}"
        complaints.append(f"{len(wrong)} of another shape ({shapes})")
    if complaints:
        raise ModelError(f"{path} does not fit {type(model).__name__}: {', '.join(complaints)}: wrong model name?")

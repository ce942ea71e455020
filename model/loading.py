"""Loads a `LanguageModel` from the hub, a local folder, a built-in demo size, random weights or a legacy `.pt` file."""

import difflib
import json
from pathlib import Path

import torch
from huggingface_hub import constants as hub
from huggingface_hub import get_hf_file_metadata
from huggingface_hub.errors import HfHubHTTPError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GPT2Config

from model.errors import ModelError, one_line_errors
from model.language_model import LanguageModel
from model.legacy import load_legacy_weights
from model.vocabulary import token_rows

# Radford et al. (2019), "Language Models are Unsupervised Multitask Learners", table 2; distilgpt2: Sanh et al. (2019).
GPT2_SHAPES = {
    "distilgpt2": {"n_layer": 6, "n_embd": 768, "n_head": 12},
    "gpt2": {"n_layer": 12, "n_embd": 768, "n_head": 12},
    "gpt2-medium": {"n_layer": 24, "n_embd": 1024, "n_head": 16},
    "gpt2-large": {"n_layer": 36, "n_embd": 1280, "n_head": 20},
    "gpt2-xl": {"n_layer": 48, "n_embd": 1600, "n_head": 25},
}
DEMO_SHAPES = {
    "demo-teacher": {"n_layer": 3, "n_embd": 128, "n_head": 4, "n_positions": 256, "initializer_range": 0.04},
    "demo-student": {"n_layer": 2, "n_embd": 96, "n_head": 4, "n_positions": 256, "initializer_range": 0.04},
}
DEMO_TOKENIZER = Path("data/demo/tokenizer")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
WEIGHT_SUFFIXES = (".pt", ".bin", ".safetensors")


def load_language_model(
    name: str,
    *,
    tokenizer: str | None = None,
    from_scratch: bool = False,
    architecture: dict | None = None,
    dropout: float | None = None,
    weights: str | Path | None = None,
) -> LanguageModel:
    """A language model with float32 weights on the CPU, in training mode.

    name: hub id, local folder, or "demo-teacher" / "demo-student" (random weights, to be trained on the demo news).
    tokenizer: hub id or folder; None = the model's own.
    from_scratch: random weights of that architecture; `architecture` overrides single values such as n_layer.
    dropout: one rate for all dropouts of the model; None = its own.
    weights: a legacy `.pt` state dict to load into that architecture.

    Raises:
        ModelError: one line that says what is missing and how to get it.
    """
    random_weights = from_scratch or name in DEMO_SHAPES
    if architecture and not random_weights:
        raise ModelError(
            f"architecture {architecture} changes the shape of '{name}', so its weights cannot be used: "
            "set from_scratch to true, or remove architecture"
        )
    config = model_config(name, without_hub=random_weights or weights is not None)
    loaded_tokenizer = load_tokenizer(tokenizer or name)
    if random_weights:
        apply_architecture(config, architecture or {}, loaded_tokenizer)
    if dropout is not None:
        set_dropout(config, dropout)
    if random_weights or weights is not None:
        with one_line_errors(f"'{name}' cannot be built with this architecture"):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    else:
        model = pretrained_model(name, config)
    if weights is not None:
        load_legacy_weights(model, weights)
    if hasattr(model.config, "validate"):  # the library would do it when it saves, after hours of training
        with one_line_errors(f"the config.json of {name} cannot be saved again"):
            model.config.validate()
    return LanguageModel(model.train(), loaded_tokenizer)


def model_config(name: str, without_hub: bool = False):
    """The architecture of `name`. without_hub: take the shapes of the GPT-2 family from the table above.

    Raises:
        ModelError: no config that can be read, or one of an adapter or of quantized weights.
    """
    family = name.removeprefix("openai-community/")
    if name in DEMO_SHAPES:
        return GPT2Config(**DEMO_SHAPES[name], resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    if Path(name).is_dir():
        if Path(name, "adapter_config.json").is_file():
            raise ModelError(f"{name} is an adapter (adapter_config.json): merge it into its base model and save that")
        if not Path(name, "config.json").is_file() or Path(name, "model_checkpoints").is_dir():
            inside = [path for path in ("model_checkpoints/best", "model_checkpoints/last", "best", "last")
                      if Path(name, path, "config.json").is_file()]
            hint = (f"did you mean {Path(name, inside[0])}?" if inside
                    else "a model folder is what save_pretrained writes")
            raise ModelError(f"{name} has no config.json: {hint}")
    elif without_hub and family in GPT2_SHAPES:
        return GPT2Config(**GPT2_SHAPES[family])
    config = from_source(AutoConfig, name, "config.json")
    # A config may name an implementation on the hub, which is code: None lets the library choose one of its own.
    config._attn_implementation = config._experts_implementation = None
    if getattr(config, "quantization_config", None) is not None:
        raise ModelError(f"{name}: its weights are quantized (quantization_config), so they cannot be trained: give "
                         "the model with floating-point weights")
    return config


def load_tokenizer(source: str):
    """The fast tokenizer of a hub id, a folder, or a built-in demo model."""
    if source in DEMO_SHAPES:
        if not DEMO_TOKENIZER.is_dir():
            raise ModelError(
                f"{DEMO_TOKENIZER} is missing: '{source}' needs the demo's tokenizer: run python -m data.demo_news"
            )
        source = str(DEMO_TOKENIZER)
    if Path(source).is_dir() and not has_tokenizer(source):
        raise ModelError(
            f"{source} has no tokenizer (tokenizer.json): name another, in model_arch.tokenizer (train.py) or by "
            "--model_name (validate_model.py)"
        )
    return from_source(AutoTokenizer, source, "tokenizer.json")


def has_tokenizer(folder: str) -> bool:
    return any(Path(folder, file).is_file() for file in TOKENIZER_FILES)


def pretrained_model(name: str, config):
    """The model with its stored weights, all of which must be there and fit.

    Raises:
        ModelError: no weights, or weights that cannot be read or do not fit the config.
    """
    model, report = from_source(
        AutoModelForCausalLM, name, "model.safetensors", config=config, dtype=torch.float32, output_loading_info=True,
        ignore_mismatched_sizes=True,  # they are reported, and refused below with their names
    )
    wrong = sorted(report["missing_keys"]) + sorted(key for key, *_ in report["mismatched_keys"])
    if wrong:
        raise ModelError(f"{name}: {len(wrong)} of its weights do not fit its config.json, the first is {wrong[0]}")
    return model


def apply_architecture(config, overrides: dict, tokenizer) -> None:
    """Apply `overrides` to a config whose weights will be random; vocabulary and end-of-text are the tokenizer's."""
    known = {**config.to_dict(), **dict.fromkeys(config.attribute_map)}
    for key, value in overrides.items():
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"{config.model_type} has no such value"
            raise ModelError(f"architecture.{key} is unknown: {hint}")
        old = getattr(config, key, None)
        is_size = type(old) is int and old > 0 and not key.endswith("_id")
        if is_size and isinstance(value, (int, float)) and value < 1:  # the library builds 0 layers without an error
            raise ModelError(f"architecture.{key} is {value}: expected at least 1")
        with one_line_errors(f"architecture.{key} is {value!r}"):
            setattr(config, key, value)
    if "vocab_size" not in overrides:
        config.vocab_size = token_rows(tokenizer)
    config.bos_token_id = tokenizer.bos_token_id
    config.eos_token_id = tokenizer.eos_token_id
    config.pad_token_id = None  # Llama's embedding would have no gradient there


def set_dropout(config, rate: float) -> None:
    """One rate for every dropout that the family's config names (GPT-2: embeddings, attention, residual)."""
    for key, value in config.to_dict().items():
        if isinstance(value, (int, float)) and not isinstance(value, bool) and key.endswith(("pdrop", "dropout")):
            setattr(config, key, rate)


def check_same_architecture(config, name: str) -> None:
    """Raises ModelError if a checkpoint's config is not of the architecture that the user names."""
    expected = model_config(name, without_hub=True)
    for field in ("model_type", "num_hidden_layers", "hidden_size", "num_attention_heads"):
        want, have = getattr(expected, field, None), getattr(config, field, None)
        if want is not None and want != have:
            raise ModelError(f"the checkpoint is not a '{name}': its {field} is {have}, '{name}' has {want}")


# -- hub -------------------------------------------------------------------------------------------------------


def from_source(library_class, name: str, file: str, **arguments):
    """`library_class.from_pretrained` with one-line errors. file: the one to ask the hub for first."""
    local = Path(name).is_dir()
    if Path(name).exists() and not local:
        raise ModelError(f"{name} is a file: expected a model folder or a hub id; only a .pt state dict is one file")
    if not local and (name.startswith((".", "/", "~")) or name.count("/") > 1 or name.endswith(WEIGHT_SUFFIXES)):
        raise ModelError(f"{name} does not exist: expected a model folder or a hub id such as gpt2")
    out_of_reach = (
        f"cannot get '{name}' from the hub, and it is not in this machine's cache: download it once with "
        f"`hf download {name}`, or give a local folder; ./demo.sh shows everything without the hub"
    )
    with one_line_errors(f"{name} cannot be loaded" if local else out_of_reach, with_reason=local):
        check_weight_index(Path(name))
        # trust_remote_code=False: code that lies beside a model never runs, and the user is not asked to run it.
        return library_class.from_pretrained(
            name, trust_remote_code=False, local_files_only=local or not hub_reachable(name, file), **arguments
        )


def check_weight_index(folder: Path) -> None:
    """Raises ModelError if an index names weights outside of the folder: the library would follow such a path."""
    for index in folder.rglob("*.index.json"):
        for file in json.loads(index.read_text(encoding="utf-8")).get("weight_map", {}).values():
            if Path(file).name != file:
                raise ModelError(f"{index} names {file!r}: expected a file in the same folder")


def hub_reachable(name: str, file: str) -> bool:
    """Asks the hub once, because without a network the library retries for half a minute."""
    if hub.HF_HUB_OFFLINE:
        return False
    try:
        get_hf_file_metadata(f"{hub.ENDPOINT}/{name}/resolve/main/{file}", timeout=10)
    except HfHubHTTPError:
        return True  # the hub answers; the library will say what is wrong
    except Exception:  # no network
        return False
    return True

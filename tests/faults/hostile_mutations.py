"""Model folders in which single values of the JSON files were replaced: each loads and works, or is refused."""

import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

from data.articles import DataError
from data.prompts import DEFAULT_TEMPLATE, PromptFormat
from model.language_model import ModelError
from model.loading import load_language_model

FILES = ("config.json", "tokenizer_config.json", "tokenizer.json", "generation_config.json")
VALUES = [
    None, True, False, 0, -1, 1, 2, 3, 1.5, 1e30, -1e30, 10**7, "", "x", "\x1b[2J", "a/b", "../x", [], [1], ["a"], {},
    {"a": 1}, {"a": {"b": []}}, float("inf"), float("nan"), "gpt2", "llama", "t5", "bert", "float16", "sdpa", [[[]]],
]
# Keys that the library knows and a tiny model's files do not have.
KEYS = """
    quantization_config auto_map rope_scaling rope_parameters id2label label2id pruned_heads tie_word_embeddings
    is_encoder_decoder layer_types torch_dtype dtype tokenizer_class task_specific_params sub_configs architectures
    chat_template added_tokens_decoder extra_special_tokens additional_special_tokens bos_token unk_token pad_token
    model_max_length fusion_config per_layer_config distributed_config base_model_tp_plan attribute_map name_or_path
    output_attentions use_return_dict
""".split()


def places(value, path: tuple = ()) -> Iterator[tuple]:
    """The path of each value in nested JSON, but for the words of a vocabulary, and of lists only the first three."""
    if path == ("model", "vocab"):
        return
    children = value.items() if isinstance(value, dict) else enumerate(value[:3]) if isinstance(value, list) else ()
    for key, child in children:
        yield (*path, key)
        yield from places(child, (*path, key))


def mutate(folder: Path, rng: random.Random) -> list[str]:
    """Replaces one to three values; what was done."""
    done = []
    for _ in range(rng.choice([1, 1, 2, 3])):
        path = folder / rng.choice(FILES)
        content = json.loads(path.read_text())
        place = (rng.choice(KEYS),) if rng.random() < 0.35 else rng.choice(list(places(content)))
        value, node = rng.choice(VALUES), content
        for key in place[:-1]:
            node = node[key]
        node[place[-1]] = value
        path.write_text(json.dumps(content))
        done.append(f"{path.name} {place}: {value!r}")
    return done


def problems(model: Path, scratch: Path, count: int, seed: int) -> tuple[list[str], int]:
    """(what was neither refused in one line nor worked, how many worked), of `count` mutations of a model folder."""
    rng, found, worked = random.Random(seed), [], 0
    for number in range(count):
        folder = shutil.copytree(model, scratch / str(number))
        done = mutate(folder, rng)
        try:
            language_model = load_language_model(str(folder))
            language_model.check_family()
            template = language_model.prompt_template or DEFAULT_TEMPLATE
            prompt_format = PromptFormat(language_model.tokenizer, template, min(language_model.context, 64))
            prompt_format.prediction_prompts(["abc"], 8)
            language_model.save(folder / "again")
            worked += 1
        except (ModelError, DataError) as error:
            if "\n" in str(error):
                found.append(f"several lines: {error!r} {done}")
        except Exception as error:
            found.append(f"{error!r} {done}")
        shutil.rmtree(folder)
    return found, worked

"""Model folders, tokenizers and data sets that bring code, or lead the libraries to it or to files elsewhere."""

import contextlib
import json
from collections.abc import Callable
from pathlib import Path

from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel

from data import cnn_dailymail
from data.articles import read_articles
from data.prompts import PromptFormat
from model.loading import load_language_model
from tests.conftest import byte_tokenizer, write_rows
from tests.faults.hostile_attack import MARK, Attack
from tests.faults.hostile_pickles import model_folder

CODE = """
open({mark!r}, "w")
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast
class Config(GPT2Config): pass
class Model(GPT2LMHeadModel): pass
class Tokenizer(PreTrainedTokenizerFast): pass
def generate(*arguments, **options): pass
"""
AUTO_MAP = {"AutoConfig": "strange.Config", "AutoModelForCausalLM": "strange.Model",
            "AutoTokenizer": [None, "strange.Tokenizer"]}


def edit(path: Path, **values) -> None:
    """Changes keys of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def changed(change: Callable[[Path], object], check: Callable = lambda language_model: None):
    """An attack by a model folder in which something was changed; check: of the model, where it is loaded."""

    def run(folder: Path) -> None:
        model = model_folder(folder)
        for name in ("strange.py", "custom_generate/generate.py"):
            if "generate" not in name:
                (model / name).write_text(CODE.format(mark=str(folder / MARK)))
        change(model)
        check(load_language_model(str(model)))

    return run


def config_with(**values):
    return lambda model: edit(model / "config.json", **values)


def tokenizer_config_with(**values):
    return lambda model: edit(model / "tokenizer_config.json", **values)


def is_own_class(language_model) -> None:
    assert type(language_model.model) is GPT2LMHeadModel and type(language_model.model.config) is GPT2Config
    assert type(language_model.tokenizer).__module__.startswith("transformers.")
    assert language_model.tokenizer("Hi").input_ids == [72, 105]


def custom_generate(model: Path) -> None:
    (model / "custom_generate").mkdir()
    (model / "strange.py").rename(model / "custom_generate/generate.py")


CODE_BESIDE = [
    Attack("auto_map and modeling code, a model_type of their own",
           changed(config_with(model_type="strange", auto_map=AUTO_MAP)),
           "model cannot be loaded: its family strange is code that lies beside it, which is never run"),
    Attack("auto_map and modeling code for a family of the library",
           changed(config_with(auto_map=AUTO_MAP, architectures=["Model"]), is_own_class)),
    Attack("auto_map that names a repository of the hub",
           changed(config_with(auto_map={"AutoModelForCausalLM": "evil/repo--strange.Model"}), is_own_class)),
    Attack("auto_map of a tokenizer", changed(tokenizer_config_with(auto_map=AUTO_MAP), is_own_class)),
    Attack("auto_map of a tokenizer with a class of its own",
           changed(tokenizer_config_with(auto_map=AUTO_MAP, tokenizer_class="Tokenizer"), is_own_class)),
    Attack("a tokenizer class that is none", changed(tokenizer_config_with(tokenizer_class="os.system"), is_own_class)),
    Attack("custom_generate/generate.py", changed(custom_generate), "custom_generate is code, which is never run"),
    Attack("attention that is a repository of the hub",
           changed(config_with(attn_implementation="evil/kernel:forward"), lambda each: has_own_attention(each))),
    Attack("attention that is a repository of the hub, by its inner name",
           changed(config_with(_attn_implementation="evil/kernel"), lambda each: has_own_attention(each))),
    Attack("quantised weights, which call for packages of their own",
           changed(config_with(quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True})),
           "config.json: quantization_config"),
    Attack("an adapter of a model elsewhere",
           changed(lambda model: (model / "adapter_config.json").write_text('{"base_model_name_or_path": "evil/x"}')),
           "adapter_config.json is an adapter"),
    Attack("a config key that replaces a function of the library", changed(config_with(to_dict="x")),
           "config.json: to_dict would replace a function"),
    Attack("a config key __class__", changed(config_with(__class__="x")), "config.json: __class__ would replace"),
    Attack("processes to spread a model over", changed(config_with(distributed_config={"tp_size": 2})),
           "config.json: distributed_config"),
    Attack("a number of heads below zero", changed(config_with(n_head=-1), lambda each: each.check_family()),
           "describes what cannot be computed"),
    Attack("a config that the library does not save", changed(config_with(output_attentions=True)),
           "cannot be saved again"),
    Attack("a prompt_template that is no text", changed(config_with(prompt_template=[1])),
           "config.json: prompt_template is"),
    Attack("a prompt_max_length that is no number", changed(config_with(prompt_max_length="9")),
           "config.json: prompt_max_length is '9'"),
]


def has_own_attention(language_model) -> None:
    assert language_model.model.config._attn_implementation in ("sdpa", "eager")


# -- chat templates --------------------------------------------------------------------------------------------


def chat_template(model: Path) -> None:
    code = "{{ cycler.__init__.__globals__.os.system('touch " + str(model.parent / MARK) + "') }}{% raise %}"
    (model / "chat_template.jinja").write_text(code)
    (model / "additional_chat_templates").mkdir()
    (model / "additional_chat_templates/other.jinja").write_text(code)


def never_renders(language_model) -> None:
    """All that is done with a tokenizer, while rendering would leave the mark."""
    import jinja2

    rendered = []
    compile_template = jinja2.Environment.compile
    jinja2.Environment.compile = lambda *arguments, **options: rendered.append(arguments)
    try:
        prompt_format = PromptFormat(language_model.tokenizer, max_length=64)
        prompt_format.training_rows(["a b"], ["c"])
        prompt_format.decode(prompt_format.prediction_prompts(["a"], 8)[0])
    finally:
        jinja2.Environment.compile = compile_template
    assert not rendered


# -- names that lead elsewhere ---------------------------------------------------------------------------------


def elsewhere(model: Path) -> Path:
    """Another tokenizer, outside of the model folder."""
    other = byte_tokenizer()
    other.add_tokens(["<elsewhere>"])
    other.save_pretrained(model.parent / "elsewhere")
    return model.parent / "elsewhere"


def tokenizer_file(in_words: str):
    def change(model: Path) -> None:
        place = elsewhere(model) / "tokenizer.json"
        name = str(place) if in_words == "absolute" else "../elsewhere/tokenizer.json"
        edit(model / "tokenizer_config.json", tokenizer_file=name, vocab_file=name)

    return change


def sharded(name: str):
    """Weights in a file that the index names `name`."""

    def change(model: Path) -> None:
        weights = load_file(model / "model.safetensors")
        (model / "model.safetensors").unlink()
        place = model / name.replace("{model}", str(model))
        if not name.endswith("missing.safetensors"):
            save_file(weights, place.resolve(), metadata={"format": "pt"})
        index = {"metadata": {}, "weight_map": dict.fromkeys(weights, name.replace("{model}", str(model)))}
        (model / "model.safetensors.index.json").write_text(json.dumps(index))

    return change


def id_beyond(model: Path) -> None:
    content = json.loads((model / "tokenizer.json").read_text())
    content["model"]["vocab"]["zz"] = 10**6
    (model / "tokenizer.json").write_text(json.dumps(content))


ELSEWHERE = [
    Attack("a chat template that is a program", changed(chat_template, never_renders)),
    Attack("a chat template that is a number", changed(tokenizer_config_with(chat_template={"a": 1})),
           "tokenizer_config.json cannot be loaded: its chat_template"),
    Attack("chat templates by name", changed(tokenizer_config_with(chat_template=[{"name": "a", "template": "b"}]))),
    Attack("a tokenizer_config.json that names a file elsewhere",
           changed(tokenizer_file("absolute"), lambda each: is_own_vocabulary(each))),
    Attack("a tokenizer_config.json that names a file by ..", changed(tokenizer_file("relative")),
           "tokenizer_config.json: tokenizer_file names ../elsewhere"),
    Attack("fast_tokenizer_files by ..",
           changed(tokenizer_config_with(fast_tokenizer_files=["../elsewhere/tokenizer.4.0.json"])),
           "fast_tokenizer_files names"),
    Attack("transformers_weights by ..",
           changed(config_with(transformers_weights="../model.safetensors")), "config.json: transformers_weights"),
    Attack("a shard by ..", changed(sharded("../outside.safetensors")), "names ../outside.safetensors, outside"),
    Attack("a shard by an absolute path", changed(sharded("{model}/x.safetensors")), "names /.*, outside"),
    Attack("a shard that is missing", changed(sharded("missing.safetensors")), "lacks missing.safetensors"),
    Attack("an index without names", changed(lambda model: (
        (model / "model.safetensors").unlink(),
        (model / "model.safetensors.index.json").write_text('{"metadata": {}, "weight_map": {"a": 5}}'))),
        "index.json cannot be loaded: it has no weight_map"),
    Attack("a token whose id is beyond the embedding", changed(id_beyond), "has 1000001 tokens but .* only 257 rows"),
]


def is_own_vocabulary(language_model) -> None:
    assert "<elsewhere>" not in language_model.tokenizer.get_vocab()


# -- data sets -------------------------------------------------------------------------------------------------


def script_as_data(folder: Path) -> None:
    (folder / "train.py").write_text(CODE.format(mark=str(folder / MARK)))
    read_articles(folder / "train.py")


def script_beside_data(folder: Path) -> None:
    (folder / "news").mkdir()
    (folder / "news/news.py").write_text(CODE.format(mark=str(folder / MARK)))
    (folder / "news/__init__.py").write_text(CODE.format(mark=str(folder / MARK)))
    rows = [{"id": "1", "article": "a", "highlights": "h"}]
    assert len(read_articles(write_rows(folder / "news/train.csv", rows))[0]) == 1


def script_in_the_hub_s_name(folder: Path) -> None:
    """A folder here of the name that the hub's data set has, with a loading script."""
    place = folder / cnn_dailymail.HUB_DATASET
    place.mkdir(parents=True)
    (place / f"{place.name}.py").write_text(CODE.format(mark=str(folder / MARK)))
    with contextlib.chdir(folder):
        cnn_dailymail.load_hub()


DATA = [
    Attack("a data set that is a script", script_as_data, "train.py: "),
    Attack("scripts beside a data set", script_beside_data),
    Attack("a folder of the hub's data set's name with a script", script_in_the_hub_s_name, "cannot load abisee"),
]
ATTACKS = [*CODE_BESIDE, *ELSEWHERE, *DATA]

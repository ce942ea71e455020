"""What a config's text may hold, and how wrong ones are told: strict_json.py, and names in fine_tune.py."""

import json

import pytest

from tests.config_samples import load, refusal
from utils.cli import training_parser
from utils.config.distill import DistillConfig
from utils.config.fine_tune import FineTuneConfig
from utils.config.strict_json import LARGEST, ConfigError, parse, read_json
from utils.config.validate_options import read_options, validate_parser

DEEP = "nested deeper than 50 levels: make it flatter"
NAME = "expected a name without line ends, tabs and other control characters"
SHORTER = "expected a shorter name: file systems take 255 bytes, and 4095 with folders"


@pytest.mark.parametrize(("depth", "is_deep"), [(49, False), (50, True), (200, True), (900, True), (50_000, True)])
@pytest.mark.parametrize(("start", "end"), [("[", "]"), ('{"a":', "}")])
def test_depth_is_bounded(tmp_path, depth, is_deep, start, end):
    """Fault: nesting that json reads but that no copying survives ends in a RecursionError."""
    text = '{"_description": ' + start * depth + "1" + end * depth + "}"
    if not is_deep:
        assert isinstance(load(tmp_path, text), FineTuneConfig)
        return
    assert refusal(tmp_path, text) == [f"config.json: {DEEP}"]


def test_deep_overrides(tmp_path):
    """Fault: a --set text of thousands of dots or brackets ends in a RecursionError, or is told of the file."""
    dots, brackets = f"{'a.' * 3000}b=1", f"trainer_kwargs.metrics={'[' * 60}{']' * 60}"
    assert refusal(tmp_path, {}, dots, brackets) == [
        f"--set {dots[:77]}...: {DEEP}", f"--set {brackets[:77]}...: {DEEP}"]


def test_many_keys_are_read_in_time():
    """Fault: looking for keys that stand twice takes as many steps as the square of their number."""
    keys = [f"k{number}" for number in range(300_000)]
    assert len(parse(json.dumps(dict.fromkeys(keys)))) == len(keys)
    with pytest.raises(ValueError, match=r'^the key "k7" stands twice in one object: keep one of them$'):
        parse(json.dumps(dict.fromkeys(keys))[:-1] + ', "k7": 1}')


def test_many_wrong_keys_are_told_in_few_lines(tmp_path):
    """Fault: a JSON file of something else as a config gives thousands of lines, and takes minutes to compare keys."""
    lines = refusal(tmp_path, {f"key {number}": number for number in range(50_000)})
    assert len(lines) == 21
    assert lines[0].startswith('config.json: ["key 0"] is unknown: did you mean ')
    assert lines[-1] == "config.json: and 49980 problems more"


@pytest.mark.parametrize("model", [FineTuneConfig, DistillConfig])
def test_long_keys_and_values_are_compared_in_time(tmp_path, model):
    """Fault: a key or a value of a million characters is compared with every known one, sign by sign."""
    long = "trainer_kwargs" * 70_000
    base = {"model_arch": {"teacher_lang_model": "gpt2"}} if model is DistillConfig else {}
    lines = refusal(tmp_path, {**base, long: 1, "lr_scheduler_kwargs": {"type": long}}, model=model)
    assert len(lines) == 2 and all(len(line) < 250 for line in lines)


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ({"trainer_kwargs": {"output_dir": "a\0b"}},
         'trainer_kwargs.output_dir is "a\\u0000b": it holds the character \\u0000, which no text can: remove it'),
        ({"dataset_kwargs": {"prompt_template": "\ud800{article}"}},
         'dataset_kwargs.prompt_template is "\\ud800{article}": it holds the character \\ud800, which no text can: '
         "remove it"),
        ({"optimizer_kwargs": {"kwargs": {"a\udfff": 1}}},
         "optimizer_kwargs.kwargs holds a key with the character \\udfff: remove that character"),
        ({"\0": 1}, "the top level holds a key with the character \\u0000: remove that character"),
        ({"trainer_kwargs": {"multi_gpu_ids": [1, 10**18]}},
         "trainer_kwargs.multi_gpu_ids[1] is 1000000000000000000, a number of 19 digits: expected at most 18"),
        ({"trainer_kwargs": {"epochs": -(10**30)}},
         "trainer_kwargs.epochs is -1000000000000000..., a number of 31 digits: expected at most 18"),
        ({"trainer_kwargs": {"output_dir": "a\nb"}}, f'trainer_kwargs.output_dir is "a\\nb": {NAME}'),
        ({"model_arch": {"lang_model": "\x1b[31m"}}, f'model_arch.lang_model is "\\u001b[31m": {NAME}'),
        ({"dataset_kwargs": {"train_dataset": "ü" * 128}},
         f'dataset_kwargs.train_dataset is "{"ü" * 76}...: {SHORTER}'),
        ({"dataset_kwargs": {"data_dir": "d/" * 2048 + "d"}},
         f'dataset_kwargs.data_dir is "{"d/" * 38}...: {SHORTER}'),
    ],
)
def test_what_no_key_can_take(tmp_path, values, line):
    """Fault: NUL, half of a surrogate pair, numbers beyond 64 bits or overlong names end in a traceback later on."""
    assert refusal(tmp_path, values) == [f"config.json: {line}"]


def test_names_at_the_limit_and_free_text_pass(tmp_path):
    """Fault: a name that file systems take, a column with a line end in its name, or free text is refused."""
    config = load(tmp_path, {
        "_description": "a\0b \ud800", "trainer_kwargs": {"epochs": 10**18 - 1, "seed": 1},
        "dataset_kwargs": {"train_dataset": "ü" * 127, "columns": {"article": "full\ntext"}},
    })
    assert config.dataset_kwargs.train_dataset == "ü" * 127 and config.trainer_kwargs.epochs == 10**18 - 1
    assert config.dataset_kwargs.columns["article"] == "full\ntext"


def test_no_number_is_proposed_that_would_be_refused(tmp_path):
    """Fault: for 1e30 where a whole number belongs, the error says to write one of 31 digits."""
    assert refusal(tmp_path, {"trainer_kwargs": {"epochs": 1e30}}) == [
        "config.json: trainer_kwargs.epochs is 1e+30 (a number): expected a whole number of at least 1"]
    assert refusal(tmp_path, {"trainer_kwargs": {"epochs": 3.0}})[0].endswith("; write 3")


@pytest.mark.parametrize(("text", "column", "problem"), [
    ('{"a": "x\ty"}', 9, "a line end, tab or other control character in a string: write such as \\n or \\t"),
    ('{"a": "C:\\data"}', 10, "a backslash in a string that escapes nothing: write \\\\, or / in paths"),
    ('{"a": "\\u12"}', 9, "\\u in a string takes four hexadecimal digits, such as \\u00e9"),
    ('{"a": "b', 7, 'a string that is never closed: write " at its end'),
    ('{"a": [1 2]}', 10, "expected a comma or a closing bracket"),
    ('{"a": }', 7, 'expected a value: "text", a number, true, false, null, [...] or {...}'),
    ("{a: 1}", 2, 'expected a key in double quotes, "..."'),
    ("{} x", 4, "text behind the end of the object: remove it"),
    ("id,article,highlights", 1, "this is no JSON: expected an object, {...}"),
])
def test_syntax_errors_say_what_to_write(tmp_path, text, column, problem):
    """Fault: json's own words ("invalid control character at"), which say nothing to do."""
    assert refusal(tmp_path, text) == [f"config.json: line 1, column {column}: {problem}"]


def test_a_long_number_is_told_with_its_key(tmp_path):
    """Fault: a number of hundreds of digits is refused without the key that it stands under."""
    assert refusal(tmp_path, '{"trainer_kwargs": {"epochs": ' + "7" * 500 + "}}") == [
        "config.json: trainer_kwargs.epochs is 77777777777777777..., a number of 500 digits: expected at most 18"]


@pytest.mark.parametrize(("values", "line"), [
    ({"trainer_kwargs": {"dataset_kwargs": {}}},
     "trainer_kwargs.dataset_kwargs is unknown: dataset_kwargs belongs in the top level"),
    ({"dataset_kwargs": {"article": "text"}}, "dataset_kwargs.article is unknown: article belongs in "
     "dataset_kwargs.columns"),
    ({"generation_kwargs": {}}, "generation_kwargs is unknown: generation_kwargs belongs in model_arch"),
    ({"kwargs": {}}, "kwargs is unknown: kwargs belongs in optimizer_kwargs or callbacks_kwargs"),
    ({"trainer_kwargs": {" epochs": 1}}, 'trainer_kwargs[" epochs"] is unknown: did you mean epochs?'),
    ({"trainer_kwargs": {"": 1}}, 'trainer_kwargs[""] is unknown: remove it'),
])
def test_misplaced_sections_and_odd_keys(tmp_path, values, line):
    """Fault: a section in another one is told to be some key's misspelling, or a blank in a key is not to be seen."""
    assert refusal(tmp_path, values) == [f"config.json: {line}"]


def test_files_that_are_no_configs(tmp_path):
    """Fault: an endless or huge file is read whole into memory before anything is said."""
    with pytest.raises(ConfigError, match="is larger than 10 MB"):
        read_json("/dev/zero")
    large = tmp_path / "large.json"
    large.write_bytes(b"{}" + b" " * LARGEST)
    with pytest.raises(ConfigError, match="is larger than 10 MB"):
        read_json(large)
    large.write_bytes(b"{}" + b" " * (LARGEST - 2))
    assert read_json(large) == {}
    for name in ("n" * 5000, "a\0b"):
        with pytest.raises(ConfigError, match=r"(cannot be read|does not exist): .*name a .*config"):
            read_json(name)


# -- validate_model.py -------------------------------------------------------------------------------------------


def options_of(*flags: str):
    return read_options(validate_parser("").parse_args(["--csv_path=a.csv", "--model_path=m", *flags]))


@pytest.mark.parametrize("name", ["csv_path", "model_path", "model_name", "output_dir"])
@pytest.mark.parametrize("value", ["", "a\nb", "x" * 300])
def test_flags_that_are_no_names(name, value):
    """Fault: an empty or overlong path given to validate_model.py is the working folder, or ends in a traceback."""
    with pytest.raises(ConfigError, match=rf"^--{name}: {name} is .*: expected a ") as error:
        options_of(f"--{name}={value}")
    assert len(str(error.value)) < 250 and "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a": 1, "a": 2}', "x" * 100_000, "[]"])
def test_columns_that_are_no_json_object(capsys, text):
    """Fault: --columns with deep nesting ends in a traceback, or an endless text is shown whole."""
    with pytest.raises(SystemExit) as stop:
        options_of(f"--columns={text}")
    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert "is not a JSON object: write such as" in message and len(message) < 300


def test_template_is_checked_before_a_model_is_loaded():
    """Fault: a --prompt_template without {article} is refused only after minutes of loading."""
    with pytest.raises(ConfigError, match=r'prompt_template is "x": expected the text \{article\} in it exactly once'):
        options_of("--prompt_template=x")


@pytest.mark.parametrize(("flags", "words"), [
    (["--confg", "x.json"], "unknown argument --confg: did you mean --config?"),
    (["--print-config"], "unknown argument --print-config: did you mean --print_config?"),
    ([""], "unknown argument ''"),
    (["--" + "x" * 100_000], "unknown argument --xxx"),
    (["a\x1b[31m\nb"], "unknown argument a\\x1b[31m\\nb"),
])
def test_unknown_arguments_of_the_training_scripts(capsys, flags, words):
    """Fault: a misspelt flag is refused without the right one, or its control characters reach the terminal."""
    with pytest.raises(SystemExit) as stop:
        training_parser("train.py", "", "", "config.json").parse_args(flags)
    message = capsys.readouterr().err
    assert stop.value.code == 2 and message.startswith(f"train.py: error: {words}") and len(message) < 300
    assert message.removesuffix("\n").isprintable()

"""validate_model.py, in process, with a tiny byte-level GPT-2 and small CSVs."""

import json
import shutil
import statistics
from pathlib import Path

import pytest
import torch
from rouge_score.rouge_scorer import RougeScorer
from transformers import AutoModelForCausalLM, AutoTokenizer

import validate_model
from tests.conftest import END, byte_tokenizer, tiny_gpt2, write_rows

TEMPLATE = "{article}\nTL;DR:"  # data.prompts.DEFAULT_TEMPLATE, as cases and README state it
CONTEXT, NEW = 128, 12
FIELDS = ["id", "article", "target_highlight", "generated_highlight", "rouge", "sentiment", "length_bucket", "category"]
ARTICLES = [
    "A fox ran. It ran far! Did it stop? Nobody knows.",
    "Rain fell on the town.",
    "The council met on Monday and voted on the new bridge. " * 8,
    "Snow.",
    "The café at the corner opens again. It had been shut for a year.",
    "Ten ships left the harbour at dawn, and nine came back before the storm broke over the bay.",
    "A second fox sat down and waited for the first one to return from the wood behind the mill.",
    "Votes are counted tonight.",
    "The mayor said he would resign. He did not. The town is not amused.",
    "Late goals decided the match between the two sides on Saturday evening.",
]


def write_news(path: Path, count: int = len(ARTICLES), **extra) -> Path:
    """A CSV whose ids count down, so that no sorting gives the file's order by accident."""
    rows = [{"id": f"n{count - index}", "article": text, "highlights": " ".join(text.split()[:6]), **extra}
            for index, text in enumerate(ARTICLES[:count])]
    return write_rows(path, rows)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A save_pretrained folder of a model whose rows end at different steps."""
    gpt2 = tiny_gpt2(seed=4, std=0.5, positions=CONTEXT)
    with torch.no_grad():
        gpt2.transformer.wte.weight[END] *= 1.5  # drawn more often than by chance
    path = tmp_path_factory.mktemp("model")
    gpt2.save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    return path


def run(tmp_path: Path, model_path, csv_path, *flags: str, out: str = "out") -> tuple[int, list | None, dict | None]:
    """(exit code, predictions.json, scores.json) of one run in float32."""
    arguments = ["--csv_path", str(csv_path), "--model_path", str(model_path), "--output_dir", str(tmp_path / out)]
    code = validate_model.main([*arguments, "--max_generation_length", str(NEW), "--precision", "float32", *flags])
    return code, *read_output(tmp_path / out)


def read_output(output: Path) -> tuple[list | None, dict | None]:
    files = [output / name for name in ("predictions.json", "scores.json")]
    return tuple(json.loads(file.read_text(encoding="utf-8")) if file.exists() else None for file in files)


def error_line(capsys) -> str:
    """The one line that a refused run prints after its notices."""
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("validate_model.py: error: ")]
    assert len(lines) == 1
    return lines[0]


def texts(predictions: list[dict]) -> list[str]:
    return [record["generated_highlight"] for record in predictions]


def library_texts(folder: Path, new: int = NEW, **settings) -> list[str]:
    """What `generate` of the library alone gives on each prompt: with bytes as tokens, cut to leave room for `new`."""
    gpt2, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    made = []
    for text in ARTICLES:
        suffix = b"\nTL;DR:"
        prompt = [*text.encode()[: CONTEXT - new - len(suffix)], *suffix]
        output = gpt2.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
                               max_new_tokens=new, do_sample=False, eos_token_id=END, pad_token_id=END, **settings)
        made.append(tokenizer.decode(output[0, len(prompt) :], skip_special_tokens=True).strip())
    return made


# -- files -------------------------------------------------------------------------------------------------------


def test_predictions_have_the_rows_of_the_csv_in_its_order(tmp_path, folder):
    """Fault: rows in batch order or of another CSV row, fields missing or more than asked, columns lost."""
    path = write_news(tmp_path / "news.csv", article_length="52", length_bucket="0-100", sentiment_label="neutral",
                      category="local", source="paper")
    code, predictions, _ = run(tmp_path, folder, path)
    assert code == 0
    assert [record["id"] for record in predictions] == [f"n{number}" for number in range(len(ARTICLES), 0, -1)]
    assert [record["article"] for record in predictions] == ARTICLES
    for record in predictions:
        assert list(record) == [*FIELDS, "article_length", "sentiment_label", "source"]
        assert record["target_highlight"] == " ".join(record["article"].split()[:6])
        assert (record["sentiment"], record["length_bucket"], record["category"]) == ("neutral", "0-100", "local")
        assert (record["article_length"], record["source"]) == ("52", "paper")
    _, predictions, _ = run(tmp_path, "lead-3", write_news(tmp_path / "plain.csv", 2))
    for record in predictions:
        assert list(record) == FIELDS
        assert record["sentiment"] is record["length_bucket"] is record["category"] is None


def test_scores_are_means_over_rows_with_intervals(tmp_path, folder):
    """Fault: means over batches, scores of other rows than those written, settings that are not recorded."""
    path = write_news(tmp_path / "news.csv")
    _, predictions, scores = run(tmp_path, folder, path, "--batch_size", "3")
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL", "rougeLsum"], use_stemmer=True)
    for record in predictions:
        expected = scorer.score(record["target_highlight"], record["generated_highlight"])
        assert record["rouge"] == {metric: score.fmeasure for metric, score in expected.items()}
    for metric in ("rouge1", "rouge2", "rougeL", "rougeLsum"):
        mean = statistics.fmean(record["rouge"][metric] for record in predictions)
        assert scores[metric] == pytest.approx(mean, abs=1e-12)
        low, high = scores["confidence_intervals"][metric]
        assert 0 <= low <= mean <= high <= 1
    assert (scores["rows"], scores["skipped_rows"], scores["prompt_template"]) == (len(ARTICLES), 0, TEMPLATE)
    assert scores["prompt_max_length"] == CONTEXT
    # 16 wide, 1 layer: (257 + 128) * 16 embeddings, 12 * 16^2 + 13 * 16 in the block, 2 * 16 in the last norm.
    assert scores["parameters"] == 385 * 16 + 12 * 16**2 + 13 * 16 + 32
    assert scores["settings"] == {
        "csv_path": str(path), "model_path": str(folder), "model_name": None, "device_id": None,
        "output_dir": str(tmp_path / "out"), "max_generation_length": NEW, "batch_size": 3, "num_beams": 1,
        "early_stopping": False, "on_bad_row": "error", "columns": None, "prompt_template": None,
        "precision": "float32",
    }


def test_model_that_ends_at_once(tmp_path):
    """Fault: empty summaries fail, leave the mean, or hold the end-of-text as text."""
    gpt2 = tiny_gpt2(positions=CONTEXT)
    with torch.no_grad():  # hidden state = 100 * the embedding of end-of-text, whatever the input
        gpt2.transformer.ln_f.weight.zero_()
        gpt2.transformer.ln_f.bias.copy_(100 * gpt2.transformer.wte.weight[END])
    gpt2.save_pretrained(tmp_path / "mute")
    byte_tokenizer().save_pretrained(tmp_path / "mute")
    code, predictions, scores = run(tmp_path, tmp_path / "mute", write_news(tmp_path / "news.csv"))
    assert (code, set(texts(predictions)), scores["rouge1"], scores["rows"]) == (0, {""}, 0.0, len(ARTICLES))
    assert scores["confidence_intervals"]["rouge1"] == [0.0, 0.0]


# -- decoding ----------------------------------------------------------------------------------------------------


def test_greedy_equals_the_library_on_each_prompt(tmp_path, folder):
    """Fault: padding, positions, truncation or cache change the tokens of a batch."""
    _, predictions, _ = run(tmp_path, folder, write_news(tmp_path / "news.csv"), "--batch_size", "4")
    expected = library_texts(folder)
    assert texts(predictions) == expected
    assert len({len(text) for text in expected}) > 2  # rows end at different steps


def test_beam_search(tmp_path, folder):
    """Fault: --num_beams without effect, or beams mixed up between the rows of a batch."""
    _, predictions, _ = run(tmp_path, folder, write_news(tmp_path / "news.csv"), "--num_beams", "3")
    assert texts(predictions) == library_texts(folder, num_beams=3)
    assert texts(predictions) != library_texts(folder)


def test_lead_3(tmp_path):
    """Fault: the baseline needs a model, or is not the first three sentences."""
    code, predictions, scores = run(tmp_path, "lead-3", write_news(tmp_path / "news.csv"))
    assert code == 0
    assert texts(predictions)[0] == "A fox ran.\nIt ran far!\nDid it stop?"
    assert texts(predictions)[8] == "The mayor said he would resign.\nHe did not.\nThe town is not amused."
    assert scores["settings"]["model_path"] == "lead-3"


def test_template_of_the_checkpoint_is_used_and_recorded(tmp_path, folder):
    """Fault: a model trained on one prompt is asked with another; --prompt_template does not win."""
    own = tmp_path / "own"
    shutil.copytree(folder, own)
    config = json.loads((own / "config.json").read_text())
    (own / "config.json").write_text(json.dumps({**config, "prompt_template": "News: {article} Short:",
                                                 "prompt_max_length": 64}))
    path = write_news(tmp_path / "news.csv", 2)
    assert run(tmp_path, own, path)[2]["prompt_template"] == "News: {article} Short:"
    scores = run(tmp_path, own, path, "--prompt_template", "{article} =>")[2]
    assert (scores["prompt_template"], scores["prompt_max_length"]) == ("{article} =>", 64)


# -- options -----------------------------------------------------------------------------------------------------


def write_config(tmp_path: Path, **values) -> Path:
    path = tmp_path / "validate.json"
    path.write_text(json.dumps(values), encoding="utf-8")
    return path


def test_flags_win_over_the_config_file(tmp_path, folder):
    """Fault: a default of the command line hides the file's value, or the file a flag."""
    config = write_config(tmp_path, csv_path=str(write_news(tmp_path / "news.csv", 3)), model_path=str(folder),
                          output_dir=str(tmp_path / "out"), max_generation_length=3, batch_size=2,
                          precision="float32", _description="a comment")
    assert validate_model.main(["--config", str(config), "--batch_size", "1"]) == 0
    settings = read_output(tmp_path / "out")[1]["settings"]
    assert (settings["max_generation_length"], settings["batch_size"], settings["num_beams"]) == (3, 1, 1)


@pytest.mark.parametrize(("values", "words"), [
    ({"num_beam": 3}, ["num_beam is unknown", "num_beams"]),
    ({"batchsize": 3}, ["batchsize is unknown", "batch_size"]),
    ({"batch_size": "8"}, ["batch_size", "write 8"]),
    ({"num_beams": 0}, ["num_beams", "1", "got 0"]),
    ({"num_beams": 100_000}, ["num_beams", "1000", "got 100000"]),
    ({"on_bad_row": "skipp"}, ["on_bad_row", "'skip'", '"skipp"']),
    ({"columns": {"articel": "text"}}, ["articel", "article"]),
    ({"prompt_template": "Sum up"}, ["prompt_template", "{article}"]),
])
def test_wrong_names_and_values_of_the_file(tmp_path, folder, capsys, values, words):
    """Fault: a misspelt name is ignored in silence, or a value is converted."""
    config = write_config(tmp_path, csv_path="news.csv", model_path=str(folder), **values)
    assert validate_model.main(["--config", str(config)]) == 2
    line = error_line(capsys)
    assert all(word in line for word in [str(config), *words]), line

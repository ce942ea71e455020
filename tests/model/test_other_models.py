"""Models that others made, against the library's own reading, `generate` and `pipeline`."""

import copy
import functools
import json
from pathlib import Path

import pytest
import torch
import transformers
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerFast, pipeline

from data.prompts import PromptFormat
from model.decoding.loop import beam_search, greedy_decode, make_decoder
from model.decoding.rollouts import draw_rollouts
from model.decoding.sampling import SamplingOptions, row_uniforms
from model.errors import ModelError
from model.fine_tuning import FineTuning
from model.language_model import LanguageModel
from model.loading import load_language_model
from model.verify import verify_model
from tests.conftest import END, byte_tokenizer, tiny_gpt2
from tests.model.test_decoding import ending_model, random_prompts
from tests.model.test_families import GROUPED
from tests.small_kd_runs import make_kd_project, run_kd
from tests.small_runs import changed, make_project, make_rows, run
from utils.distillation.teacher import VARIED, check_same_reading

TEXT = "The mayor said no. It rained on Monday, and 12 boats left."
SENTENCES = [row["article"].capitalize() + ". " + TEXT for row in make_rows(60)]


def with_added(tokenizer: PreTrainedTokenizerFast, *tokens: str, **special) -> PreTrainedTokenizerFast:
    """The tokenizer with special tokens added behind its own."""
    tokenizer.add_special_tokens({"additional_special_tokens": [*tokens], **special})
    return tokenizer


@functools.cache
def trained_tokenizer(kind: str, start: bool = True) -> PreTrainedTokenizerFast:
    """A byte-pair tokenizer with special tokens. kind: ByteLevel, or how it puts "▁" before a text: Metaspace "always"
    or "first", or the normalizer "prepend" of Llama 2. start: whether it puts <s> before a text."""
    made = Tokenizer(models.BPE(unk_token="<unk>"))
    bytes_ = kind == "bytes"
    made.pre_tokenizer = (pre_tokenizers.ByteLevel(add_prefix_space=False) if bytes_
                          else pre_tokenizers.Metaspace(prepend_scheme="always"))
    special = ["<unk>", "<s>", "</s>", "<|sum|>", "[INST]", "[/INST]"]
    made.train_from_iterator(SENTENCES + list("abcdefghijklmnopqrstuvwxyzTLDR:;\n"),
                             trainers.BpeTrainer(vocab_size=400, special_tokens=special, show_progress=False))
    if kind == "prepend":
        made.pre_tokenizer = None
        made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    elif not bytes_:
        made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=kind)
    made.decoder = decoders.ByteLevel() if bytes_ else decoders.Metaspace()
    if start:
        made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return with_added(PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    ), "<|sum|>", "[INST]", "[/INST]")


def on_tokenizer(tokenizer, rows: int | None = None, family: str = "GPT2", seed: int = 3) -> LanguageModel:
    """A random model of some vocabulary, far from uniform; rows: of its embedding."""
    torch.manual_seed(seed)
    size = len(tokenizer) if rows is None else rows
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 320} if family == "GPT2" else {
        **GROUPED, "max_position_embeddings": 320, "pad_token_id": None}
    config = getattr(transformers, f"{family}Config")(**{
        **sizes, "initializer_range": 0.3, "vocab_size": size, "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id})
    return LanguageModel(AutoModelForCausalLM.from_config(config, dtype=torch.float32), tokenizer).eval()


def generated(network, prompts: list[list[int]], ends, **settings) -> list[list[int]]:
    """New ids of `generate`, each prompt alone, up to the first of `ends`. settings: {} takes the model's own alone."""
    found = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        new = network.eval().generate(ids, attention_mask=torch.ones_like(ids), **settings)[0, len(prompt) :].tolist()
        found.append(new[: next((place for place, token in enumerate(new) if token in ends), len(new))])
    return found


# -- special tokens in the template --------------------------------------------------------------------------------

TEMPLATES = [
    "{article}\nTL;DR:", "{article}<|sum|>", "{article} <|sum|>", "<|sum|>{article}[INST] now:",
    "Summarize: {article}\nTL;DR:", "[INST] Summarize this:\n\n{article} [/INST]",
    "<|sum|>a</s>\n{article}</s>\n[INST]\n", "é{article}é TL;DR:", "<unk>{article}",
]


MODERN = "[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1,3}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s+"  # as Llama 3 splits


def modern_tokenizer() -> PreTrainedTokenizerFast:
    """It reads "." and a line end as one token, as Llama 3 and Qwen do."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(MODERN), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)])
    made.decoder = decoders.ByteLevel()
    lines = [*SENTENCES, *(f"{text}\nTL;DR: a" for text in SENTENCES), '."\n', ".\n", "..", ".)"]
    made.train_from_iterator(lines * 3, trainers.BpeTrainer(
        vocab_size=500, special_tokens=["</s>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="</s>")


def words_first() -> PreTrainedTokenizerFast:
    """It splits at white space and then puts "▁" before each word, as T5 and XLM-R do."""
    made = Tokenizer(models.Unigram())
    made.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])
    made.decoder = decoders.Metaspace()
    made.train_from_iterator(SENTENCES + list("TLDR;:"), trainers.UnigramTrainer(
        vocab_size=120, special_tokens=["<unk>", "</s>"], unk_token="<unk>", show_progress=False))
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="</s>", unk_token="<unk>")


def with_runs() -> PreTrainedTokenizerFast:
    """Runs of line ends or spaces are added tokens that are not special, as Gemma's and NeoX's."""
    tokenizer = copy.deepcopy(trained_tokenizer("bytes"))
    tokenizer.add_tokens([AddedToken("\n\n", normalized=False), AddedToken("  ", normalized=False)])
    return tokenizer


ENDINGS = [TEXT + "\n", "He said:", "no end", TEXT]
READ = {  # tokenizer, templates, articles, the last of which is long enough to be cut
    **{kind: (lambda kind=kind: trained_tokenizer(kind), TEMPLATES, [TEXT])
       for kind in ("bytes", "always", "first", "prepend")},
    "modern": (modern_tokenizer, ["{article}\nTL;DR:", '"{article}"\nTL;DR:', "({article}) =>", "{article}. Summary:"],
               ENDINGS),
    "words first": (words_first, ["{article} TL;DR:"], [TEXT]),
    "runs": (with_runs, ["{article}\n\nTL;DR:", "News:\n\n{article}   TL;DR:", "<|sum|>  {article}"],
             [" " + TEXT, *ENDINGS]),
}


@pytest.mark.parametrize(("make", "templates", "articles"), READ.values(), ids=READ)
def test_prompt_is_what_the_library_reads(make, templates, articles):
    """Fault: a special token in prompt_template was cut into characters; a tokenizer that begins every text with "▁"
    did so at each part of the prompt; what it reads as one token across a seam was two; spaces before words were lost:
    ROUGE 0 for a model fine-tuned elsewhere on such prompts."""
    tokenizer = make()
    for template in templates:
        prompt_format = PromptFormat(tokenizer, template, max_length=200)
        for article in articles:
            ((ids, boundary),) = prompt_format.training_rows([article], ["He left."])
            assert ids[:boundary] == tokenizer(template.format(article=article)).input_ids, template
            assert prompt_format.prediction_prompts([article], 20) == [ids[:boundary]]
            assert ids[-1] == tokenizer.eos_token_id and prompt_format.decode(ids[boundary:]) == "He left."
            if not template.endswith(("\n", "<|sum|>", "[/INST]")) and make is not with_runs:
                assert ids[:-1] == tokenizer(template.format(article=article) + " He left.").input_ids
        (cut,) = prompt_format.prediction_prompts([TEXT * 20], 20)
        suffix = prompt_format.suffix_ids
        assert len(cut) == 180 and cut[180 - len(suffix) :] == suffix
        shorter = prompt_format.shorten(ids[:boundary], 200 - boundary + 5)
        assert len(shorter) <= boundary - 5 and shorter[len(shorter) - len(suffix) :] == suffix


@pytest.mark.parametrize("kind", ["always", "bytes"])
def test_begin_of_text_is_there_once(kind):
    """Fault: a template that writes the begin-of-text, as chat formats do, had it twice."""
    tokenizer = trained_tokenizer(kind)
    (prompt,) = PromptFormat(tokenizer, "<s>[INST] {article} [/INST]", 200).prediction_prompts([TEXT], 20)
    assert prompt == tokenizer(f"<s>[INST] {TEXT} [/INST]", add_special_tokens=False).input_ids
    assert prompt.count(tokenizer.bos_token_id) == 1


def test_special_tokens_in_texts_stay_text():
    """Fault: an article or highlights that hold the text of a special token would end or divide the row (A12)."""
    tokenizer = trained_tokenizer("bytes")
    prompt_format = PromptFormat(tokenizer, "{article}<|sum|>", max_length=200)
    for special, count in (("<|sum|>", 1), ("</s>", 1), ("[/INST]", 0)):
        ((ids, boundary),) = prompt_format.training_rows([f"a{special}b"], [f"c {special} d"])
        assert ids.count(tokenizer.convert_tokens_to_ids(special)) == count
        assert ids[boundary - 1] == tokenizer.convert_tokens_to_ids("<|sum|>")
    # Of a long article the end is cut, not a marker or the beginning of the template.
    template = "News: {article}<|sum|>"
    (prompt,) = PromptFormat(tokenizer, template, max_length=60).prediction_prompts([TEXT * 20], 10)
    assert len(prompt) == 50 and prompt[-1] == tokenizer.convert_tokens_to_ids("<|sum|>")
    assert prompt[:-1] == tokenizer(template.format(article=TEXT * 20)).input_ids[:49]


def test_what_changes_ids_changes_the_fingerprint():
    """Fault: a token table was used again after the tokenizer's settings of leading spaces had changed."""
    seen = {}
    for kind in ("always", "first", "prepend", "bytes"):
        for template in TEMPLATES:
            prompt_format = PromptFormat(trained_tokenizer(kind, start=False), template, 200)
            rows = str(prompt_format.training_rows([TEXT, "a", ""], [TEXT, "b", "c"]))
            assert seen.setdefault(prompt_format.fingerprint(), rows) == rows
    assert len(seen) == 4 * len(TEMPLATES)


def test_begin_of_text_of_a_tokenizer_without_the_letter_a():
    """Fault: the begin-of-text was lost where the letter that it was found with is unknown."""
    made = Tokenizer(models.BPE(vocab={"<s>": 0, "</s>": 1, "T": 2, "x": 3}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>")
    assert PromptFormat(tokenizer, "{article} x", 20).prediction_prompts(["The"], 3) == [[0, 2, 3]]


def test_an_end_that_its_file_does_not_flag_as_special():
    """Fault: text of the end-of-text in an article became the token, for a tokenizer.json that says special: false."""
    values = json.loads(byte_tokenizer().backend_tokenizer.to_str())
    for token in values["added_tokens"]:
        token["special"] = False
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(values)),
                                        eos_token="<|endoftext|>")
    (prompt,) = PromptFormat(tokenizer, "{article}", 100).prediction_prompts(["a<|endoftext|>b"], 5)
    assert END not in prompt


# -- rows of the embedding that no token uses ----------------------------------------------------------------------


def gapped_tokenizer() -> PreTrainedTokenizerFast:
    """The byte tokenizer without the letters k to p, whose ids are free."""
    values = json.loads(byte_tokenizer().backend_tokenizer.to_str())
    values["model"]["vocab"] = {token: index for token, index in values["model"]["vocab"].items()
                                if token not in "klmnop"}
    end = "<|endoftext|>"
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(values)), eos_token=end,
                                   bos_token=end, unk_token=end, clean_up_tokenization_spaces=False)


GAPS = [ord(letter) for letter in "klmnop"]
UNUSED = {  # tokenizer, rows of the embedding, ids never generated after loading, and of these those in what is saved
    "pad row": (lambda: with_added(byte_tokenizer(), pad_token="[PAD]"), 258, [257], [257]),
    "gaps and padding": (gapped_tokenizer, 264, [*GAPS, *range(257, 264)], GAPS),
}


def model_with_unused(kind: str, family: str) -> tuple[LanguageModel, list[int], list[int]]:
    """A model whose head prefers rows that no token uses."""
    make_tokenizer, rows, unused, kept = UNUSED[kind]
    model = on_tokenizer(make_tokenizer(), rows, family)
    with torch.no_grad():
        model.model.get_output_embeddings().weight[unused] *= 3
    return model, unused, kept


@pytest.mark.parametrize(("kind", "family"), [("pad row", "Llama"), ("gaps and padding", "GPT2")])
def test_unused_rows_are_never_generated(kind, family, tmp_path):
    """Fault: the loss leaves out rows of the embedding behind the tokenizer's tokens, decoding did not: perplexity 1.3
    and every prediction empty, here and in the library on the saved folder."""
    model, unused, kept = model_with_unused(kind, family)
    assert model.unused_ids == unused
    prompts = random_prompts([5, 30, 12, 1])
    plain = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": END, "pad_token_id": END}
    assert any(set(unused) & set(ids) for ids in generated(model.model, prompts, [END], **plain)), "it should show"
    greedy, beams = greedy_decode(model, prompts, 12), beam_search(model, prompts, 8, 3)
    assert greedy == generated(model.model, prompts, [END], **plain, suppress_tokens=unused)
    drawn = draw_rollouts(make_decoder(model), None, prompts, 20, 4, SamplingOptions(0.0, 3.0),
                          row_uniforms(0, 0, list(range(4)), 20))
    assert not set(unused) & {token for ids in (*greedy, *beams, *drawn.tokens) for token in ids}

    before = model.parameter_count()
    assert model.remove_unused_rows() == len(unused) - len(kept)
    assert model.unused_ids == kept
    assert model.parameter_count() <= before and greedy_decode(model, prompts, 12) == greedy
    model.record_training("{article}", 300, 12)
    model.save(tmp_path)
    again, network = load_language_model(str(tmp_path)), AutoModelForCausalLM.from_pretrained(tmp_path)
    assert network.config.vocab_size == len(network.get_output_embeddings().weight)
    assert again.parameter_count() == model.parameter_count() == sum(p.numel() for p in network.parameters())
    assert generated(network, prompts, [END]) == greedy_decode(again, prompts, 12) == greedy


@pytest.mark.parametrize("kind", UNUSED)
def test_loss_leaves_the_same_rows_out(kind):
    """Fault: fine-tuning's softmax held rows that decoding cannot choose: perplexity and text were of two models."""
    model, unused, _ = model_with_unused(kind, "Llama")
    ids = torch.tensor([[72, 105, 106, 101, 97, END]])
    labels = torch.where(torch.arange(6) < 2, -100, ids)
    terms = FineTuning(model)(ids, None, labels)
    logits = model.model(ids).logits[0, :-1].double()
    logits[:, unused] = -torch.inf
    expected = torch.nn.functional.cross_entropy(logits[1:], ids[0, 2:], reduction="sum")
    torch.testing.assert_close(terms.loss_sum.double(), expected, rtol=1e-5, atol=0)
    head = model.model.get_output_embeddings().weight
    gradient, reference = (torch.autograd.grad(loss, head, retain_graph=True)[0] for loss in (terms.loss_sum, expected))
    torch.testing.assert_close(gradient, reference, rtol=1e-4, atol=1e-5)
    assert not gradient[unused].any()


def test_a_pad_id_among_the_removed_rows(tmp_path):
    """Fault: rows were removed and config.json still named one as the pad: nothing could load what was saved."""
    model = on_tokenizer(byte_tokenizer(), 300, "Llama")
    model.model.config.pad_token_id = 299
    assert model.remove_unused_rows() == 43
    model.save(tmp_path)
    assert AutoModelForCausalLM.from_pretrained(tmp_path).config.pad_token_id is None


def test_rows_that_a_user_asks_for_stay(tmp_path):
    """Fault: architecture.vocab_size, which aligns the embedding to 64 rows, had no effect."""
    config = changed(make_project(tmp_path), model_arch={
        "lang_model": "gpt2", "from_scratch": True, "tokenizer": str(tmp_path / "model"),
        "architecture": {"vocab_size": 320, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 320}})
    assert run(tmp_path, changed(config, trainer_kwargs={"max_steps": 1})) == 0
    last = tmp_path / "run/model_checkpoints/last"
    assert AutoModelForCausalLM.from_pretrained(last).config.vocab_size == 320
    assert load_language_model(str(last)).unused_ids == list(range(257, 320))


def test_a_pad_token_of_the_teacher_alone_is_never_generated(tmp_path):
    """Fault: a [PAD] that both have, and only the teacher pads with, was left out of the loss and not of decoding."""
    config = make_kd_project(tmp_path)
    for name, pads in (("teacher", "[PAD]"), ("student", "<|endoftext|>")):
        tokenizer = with_added(byte_tokenizer(), "[PAD]")
        network = on_tokenizer(tokenizer).model
        network.config.prompt_template = "{article}\nTL;DR:"
        network.save_pretrained(tmp_path / name)
        tokenizer.pad_token = pads
        tokenizer.save_pretrained(tmp_path / name)
    assert run_kd(tmp_path, config) == 0
    saved = json.loads((tmp_path / "run/model_checkpoints/last/generation_config.json").read_text())
    assert saved["suppress_tokens"] == [257] and saved["pad_token_id"] == END
    assert load_language_model(str(tmp_path / "run/model_checkpoints/last")).unused_ids == [257]


def test_a_student_with_padding_rows_is_distilled(tmp_path):
    """Fault: a student with more rows than tokens (50,304 for 50,257) ended with good perplexity and empty texts."""
    config = make_kd_project(tmp_path)
    tokenizer = byte_tokenizer()
    padded = on_tokenizer(tokenizer, 300).model
    padded.save_pretrained(tmp_path / "student")
    config = changed(config, trainer_kwargs={"epochs": 2, "metrics": ["rouge"], "save_predictions": True},
                     dataset_kwargs={"validation_dataset": "validation.csv"})
    assert run_kd(tmp_path, config) == 0
    best = tmp_path / "run/model_checkpoints/best"
    network = AutoModelForCausalLM.from_pretrained(best)
    assert network.config.vocab_size == 257
    step = json.loads((best / "trainer_state/state.json").read_text())["step"]
    records = json.loads((tmp_path / f"run/predictions/validation-step-{step}.json").read_text())
    assert texts_of_pipeline(best, [record["article"] + "\nTL;DR:" for record in records]) == [
        record["generated_highlight"] for record in records]


def test_a_run_with_removed_rows_resumes_exactly(tmp_path):
    """Fault: rows are removed again, or not, when a run resumes, so that its weights or optimizer no longer fit."""
    weights = []
    for stops in ((6,), (3, 6)):
        folder = tmp_path / str(len(stops))
        folder.mkdir()
        config = make_project(folder, rows=12)
        on_tokenizer(byte_tokenizer(), 300).model.save_pretrained(folder / "model")
        for stop in stops:
            assert run(folder, changed(config, trainer_kwargs={"max_steps": stop},
                                       lr_scheduler_kwargs={"num_training_steps": 6})) == 0
        weights.append(AutoModelForCausalLM.from_pretrained(folder / "run/model_checkpoints/last").state_dict())
    assert all(torch.equal(left, right) for left, right in zip(weights[0].values(), weights[1].values(), strict=True))


# -- ends of text --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "listed"), [("GPT2", "end and others"), ("Llama", "one other"), ("GPT2", "none")])
def test_a_row_ends_at_any_end(family, listed, tmp_path):
    """Fault: a generation_config lists several ends of text (Llama 3, Qwen, Gemma): the library stops at any, we at
    one; or it names another than the tokenizer's, or none, and what we saved did not say where its texts end."""
    network = on_tokenizer(byte_tokenizer(), family=family).model
    prompts = random_prompts([3, 9, 25, 2])
    settings = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": None, "pad_token_id": END}
    endless = generated(network, prompts, [], **settings)
    first, second = endless[0][8], endless[1][14]
    others = {"end and others": [first, second], "one other": [first], "none": []}[listed]
    network.generation_config.eos_token_id = {
        "end and others": [END, *others], "one other": first, "none": None}[listed]
    model, expected = LanguageModel(network, byte_tokenizer()), [END, *others]
    assert model.end_ids == expected
    settings["eos_token_id"] = expected
    wanted = generated(network, prompts, expected, **settings)
    assert greedy_decode(model, prompts, 24, 3) == wanted
    assert listed == "none" or min(map(len, wanted)) < 15
    assert beam_search(model, prompts, 10, 3) == generated(
        model.model, prompts, expected, **{**settings, "max_new_tokens": 10, "num_beams": 3})
    drawn = draw_rollouts(make_decoder(model), None, prompts, 24, 3, SamplingOptions(0.0, 1.0),
                          row_uniforms(0, 0, list(range(4)), 24))
    for ids in drawn.tokens:
        assert not set(ids[:-1]) & set(expected) and (len(ids) == 24 or ids[-1] in expected)

    model.record_training("{article}", 300, 24)
    model.save(tmp_path)
    saved, config = (json.loads((tmp_path / name).read_text()) for name in ("generation_config.json", "config.json"))
    assert saved["eos_token_id"] == (expected if len(expected) > 1 else END)
    assert config["eos_token_id"] == END and config.get("pad_token_id") is None
    assert saved["pad_token_id"] == END
    assert load_language_model(str(tmp_path)).end_ids == expected
    assert generated(AutoModelForCausalLM.from_pretrained(tmp_path), prompts, expected) == wanted


def test_an_end_outside_the_vocabulary_is_no_end():
    """Fault: GPT-2's default end 50,256 in the generation_config of a small vocabulary is saved on."""
    network = tiny_gpt2()
    network.generation_config.eos_token_id = [50256, END, 7]
    assert LanguageModel(network, byte_tokenizer()).end_ids == [END, 7]


# -- the plain client ----------------------------------------------------------------------------------------------


def texts_of_pipeline(folder: Path, prompts: list[str]) -> list[str]:
    """What `pipeline("text-generation", folder)` writes, with no argument of ours."""
    client = pipeline("text-generation", str(folder), device="cpu")
    return [client(prompt, return_full_text=False)[0]["generated_text"].strip() for prompt in prompts]


@pytest.mark.parametrize("own", [
    {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "repetition_penalty": 1.8, "no_repeat_ngram_size": 2},
    {"num_beams": 4, "length_penalty": 2.0, "min_new_tokens": 12, "max_length": 20},
])
def test_the_plain_client_writes_what_we_write(own, tmp_path):
    """Fault: `pipeline("text-generation", checkpoint)` sampled, or kept the penalties and limits of the base."""
    model = ending_model(5)
    model.model.generation_config = GenerationConfig(**own, eos_token_id=END)
    model.model.config.task_specific_params = {"text-generation": {"do_sample": True, "max_length": 50}}
    prompt_format = PromptFormat(model.tokenizer, max_length=128)
    model.record_training(prompt_format.template, 128, 15)
    articles = [row["article"][:80] for row in make_rows(8)]
    prompts = prompt_format.prediction_prompts(articles, 15)
    texts = [prompt_format.decode(ids) for ids in greedy_decode(model, prompts, 15)]
    assert len(set(map(len, texts))) > 2, "the rows should end at different times"
    model.save(tmp_path)
    assert texts_of_pipeline(tmp_path, [prompt_format.template.format(article=each) for each in articles]) == texts
    assert load_language_model(str(tmp_path)).max_new_tokens == 15


# -- windows and other limits --------------------------------------------------------------------------------------

WINDOW = 16
LONG_ROPE = {"rope_type": "longrope", "rope_theta": 10000.0, "factor": 8.0, "short_factor": [1.0] * 4,
             "long_factor": [1.0, 4.0, 8.0, 16.0], "original_max_position_embeddings": WINDOW}
LIMITED = {
    "GPTNeo": {"vocab_size": 257, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "intermediate_size": 64,
               "max_position_embeddings": 128, "window_size": WINDOW, "attention_types": [[["global", "local"], 1]]},
    "Qwen2": {"sliding_window": WINDOW, "use_sliding_window": True, "max_window_layers": 1},
    "Gemma3Text": {"sliding_window": WINDOW, "head_dim": 8, "layer_types": ["sliding_attention", "full_attention"]},
    "Phi3": {"rope_parameters": LONG_ROPE, "original_max_position_embeddings": WINDOW, "pad_token_id": None},
    "Llama": {"rope_parameters": LONG_ROPE},
    "Llama dynamic": {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0,
                                          "original_max_position_embeddings": WINDOW}},
}


@pytest.mark.parametrize("name", LIMITED)
def test_rows_on_both_sides_of_a_limit(name):
    """Fault: GPT-Neo's local attention, and rope that changes with the length, made a row's text depend on the rows it
    was decoded with: 2 of 16 real articles were right at the default batch size."""
    torch.manual_seed(0)
    common = {"eos_token_id": END, "bos_token_id": END, "initializer_range": 0.3} if name == "GPTNeo" else GROUPED
    config = getattr(transformers, f"{name.split()[0]}Config")(**{**common, **LIMITED[name]})
    model = LanguageModel(AutoModelForCausalLM.from_config(config, dtype=torch.float32), byte_tokenizer())
    verify_model(model)
    prompts = random_prompts([WINDOW - 1, 3, WINDOW, WINDOW + 1, 40, WINDOW - 5])
    settings = {"do_sample": False, "eos_token_id": END, "pad_token_id": END}
    assert greedy_decode(model, prompts, 12) == generated(model.model, prompts, [END], max_new_tokens=12, **settings)
    assert beam_search(model, prompts[:4], 5, 2) == generated(
        model.model, prompts[:4], [END], max_new_tokens=5, num_beams=2, **settings)


# -- the same vocabulary, read otherwise ---------------------------------------------------------------------------


def changed_tokenizer(change) -> PreTrainedTokenizerFast:
    """GPT-2-like, from a JSON that `change` has changed."""
    values = json.loads(trained_tokenizer("bytes", start=False).backend_tokenizer.to_str())
    change(values)
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(values)), eos_token="</s>")


def part(name: str, value):
    return lambda values: values.update({name: value})


READINGS = {
    "lower case": part("normalizer", {"type": "Lowercase"}),
    "no accents": part("normalizer", {"type": "Sequence", "normalizers": [{"type": "NFD"}, {"type": "StripAccents"}]}),
    "composed": part("normalizer", {"type": "NFC"}),
    "merges": lambda values: values["model"].update(merges=values["model"]["merges"][:20]),
    "prefix space": lambda values: values["pre_tokenizer"].update(add_prefix_space=True),
    "digits": part("pre_tokenizer", {"type": "Sequence", "pretokenizers": [
        {"type": "Digits", "individual_digits": True},
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}]}),
    "begin-of-text": part("post_processor", json.loads(
        trained_tokenizer("bytes").backend_tokenizer.to_str())["post_processor"]),
}


@pytest.mark.parametrize("kind", READINGS)
def test_another_reading_of_the_same_vocabulary_is_refused(kind):
    """Fault: teacher and student with equal tokens but another normaliser, merges, digits, prefix space or
    begin-of-text were accepted: the teacher's cross-entropy went from 0.29 to 7.6, and the student learnt that."""
    plain, other = changed_tokenizer(lambda values: None), changed_tokenizer(READINGS[kind])
    assert plain.get_vocab() == other.get_vocab()
    check_same_reading(plain, PromptFormat(changed_tokenizer(lambda values: None)), [*VARIED, TEXT])
    for teacher, student in ((plain, other), (other, plain)):
        with pytest.raises(ModelError, match="read text differently") as caught:
            check_same_reading(teacher, PromptFormat(student), [*VARIED, TEXT])
        assert "\n" not in str(caught.value)


def test_train_kd_refuses_another_reading(tmp_path, capsys):
    """Fault: train_kd.py trained on what the teacher reads otherwise; only the first rows show it here."""
    config = make_kd_project(tmp_path)
    path = tmp_path / "teacher/tokenizer.json"
    values = json.loads(path.read_text())
    values["normalizer"] = {"type": "Replace", "pattern": {"String": "storm"}, "content": "court"}
    path.write_text(json.dumps(values))
    assert run_kd(tmp_path, config) == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert "trainer_kwargs.teacher_ckpt_path" in message and "read text differently" in message
    assert not (tmp_path / "run/model_checkpoints").exists()

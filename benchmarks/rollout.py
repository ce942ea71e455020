"""Rollouts drawn by student and teacher together, and on-policy divergence steps: ours against what others do.

    python -m benchmarks.rollout [--step] [--size tiny|small|real] [--batch 8] [--shortest 100] [--longest 300]
                                 [--new 64] [--alpha 0.2] [--device cpu|cuda] [--threads 1] [--rounds 6]
                                 [--variants ours processor ...]

Random GPT-2s (real: gpt2-medium teaches gpt2), no dropout, float32, the same weights, prompts and threads everywhere.
No row ends early: the end-of-text has probability 0 in both models, so that all variants draw --batch rows of --new
tokens. Without --step, one batch of rollouts from alpha p + (1 - alpha) q:
  ours       draw_rollouts, with all rows at a time; records log q, log p and log p~ of the tokens as it draws
  processor  the student's `generate`, left-padded; a LogitsProcessor holds the teacher's own cache and mixes the
             distributions. It gives the tokens alone
  minillm    the order of work of MiniLLM's sampler, in code of our own: (1) `generate` as in processor; (2) teacher
             and (3) student read the rollout, for reward and log q; (4) `generate` of the student alone, whose samples
             (5) teacher and (6) student read, for the reverse KL; (7) teacher and (8) student read the rollout again,
             for the mixture and the importance weights. The six readings are forward passes with logits at all
             positions. Left out, in its favour: the masks of top-k, clipping of rewards
With --step, an on-policy Jensen-Shannon step (beta 1/2, temperature 1, mean per token drawn): samples of the student
alone, forward and backward, no optimizer:
  ours       TeacherStudent with on_policy_fraction 1 and kd_weight 1, as it trains; highlights have --new tokens
  trl        `training_step` of TRL's DistillationTrainer, which generates itself; it has no highlights. Its forward
             passes number the positions of left-padded rows from the padding on: other values, the same work

Compared first: log-probabilities with those of forward passes over each row alone, the processor's also with what ours
noted; loss and gradients of a step with full logits on the tokens it drew. Variants take turns, the first round is
dropped. Large temporaries are mapped again by glibc's default allocator; so that this does not slow the peers, time
with MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=20000000000 MALLOC_TOP_PAD_=268435456.
"""

import argparse
import sys
import tempfile
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, LogitsProcessor, LogitsProcessorList

from benchmarks import interleaved
from benchmarks.decode import CONTEXT, END, Rows, make_prompts
from benchmarks.interleaved import Target, choose_variants, compare, take_turns
from benchmarks.kd_step import plain_step
from benchmarks.kd_work import SIZES, Work, collate, make_models, number_tokenizer
from model.decoding.loop import left_padded, make_decoder
from model.decoding.rollout_buffer import RolloutBuffer
from model.decoding.rollouts import RolloutConfig, Rollouts, draw_rollouts
from model.decoding.sampling import SamplingOptions, row_uniforms
from model.label_shift import IGNORED
from model.language_model import LanguageModel, position_ids
from model.teacher import Teacher
from model.teacher_student import TeacherStudent
from utils.cli import OneLineParser, quiet_libraries

PACKAGES = {"ours": None, "processor": None, "minillm": None}
STEP_PACKAGES = {"ours": None, "trl": "trl"}
LABELS = {"processor": "generate + processor", "minillm": "MiniLLM's recipe", "trl": "TRL DistillationTrainer"}
TARGETS = {"processor": Target(1.3, 1.5), "minillm": Target(5.5, 6.0), "trl": Target(1.3, 2.0)}
TOLERANCE = 1e-4  # of log-probabilities
CHECKED = 8  # tokens of each row that are compared
SEED = 5

Step = Callable[[], tuple]  # one step: (mean loss per token drawn, gradients, the batch [B, T] with these as labels)


def make_pair(size: str, device: str = "cpu") -> tuple[LanguageModel, LanguageModel]:
    """(teacher, student), the same weights at each call, in eval mode; text of token ids and spaces is their language.

    The end-of-text never comes: the first hidden feature is always 1, its weight for the end-of-text far below 0. The
    head stays tied to the embedding and without bias.
    """
    pair = []
    for made in make_models(size, device):
        with torch.no_grad():
            final = made.model.base_model.ln_f
            final.weight[0], final.bias[0] = 0, 1
            made.model.get_output_embeddings().weight[END, 0] = -1e4
        tokenizer = number_tokenizer(SIZES[size][2], padding_side="left")
        pair.append(LanguageModel(made.model.eval(), tokenizer))
    return pair[0], pair[1]


def our_rollouts(teacher: LanguageModel, student: LanguageModel, prompts: Rows, new: int, alpha: float) -> Rollouts:
    uniforms = row_uniforms(SEED, 0, list(range(len(prompts))), new)
    return draw_rollouts(make_decoder(student), make_decoder(teacher), prompts, new, len(prompts),
                         SamplingOptions(alpha), uniforms)


class TeacherMixture(LogitsProcessor):
    """Turns the student's logits [B, V] into log(alpha p + (1 - alpha) q) in one `generate`; mask [B, T]: prompts."""

    def __init__(self, teacher: LanguageModel, mask: Tensor, alpha: float):
        self.teacher, self.mask, self.alpha, self.cache = teacher, mask, alpha, DynamicCache()

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        known = self.cache.get_seq_length()
        fresh = input_ids[:, known:]
        if known:
            self.mask = torch.cat([self.mask, self.mask.new_ones(fresh.shape)], 1)
        logits = self.teacher.model(
            input_ids=fresh, attention_mask=self.mask, position_ids=position_ids(self.mask)[:, known:],
            use_cache=True, logits_to_keep=1, **{self.teacher.cache_argument: self.cache},
        ).logits[:, -1]
        mixed = scores.softmax(-1).mul_(1 - self.alpha).add_(logits.softmax(-1), alpha=self.alpha)
        return mixed.log_()


def sample(student: LanguageModel, input_ids: Tensor, mask: Tensor, new: int, *processors, scores: bool = False):
    """What the library's `generate` returns; scores: also the logits [B, V] that each token was drawn from."""
    settings = GenerationConfig(
        max_new_tokens=new, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, eos_token_id=END, pad_token_id=END,
        return_dict_in_generate=True, output_scores=scores,
    )
    return student.model.generate(input_ids, attention_mask=mask, generation_config=settings,
                                  logits_processor=LogitsProcessorList(processors))


def processor_rollouts(teacher: LanguageModel, student: LanguageModel, prompts: Rows, new: int, alpha: float) -> Tensor:
    """Tokens [B, new]."""
    input_ids, mask = left_padded(prompts, student)
    return sample(student, input_ids, mask, new, TeacherMixture(teacher, mask, alpha)).sequences[:, input_ids.shape[1]:]


@torch.no_grad()
def read_all(language_model: LanguageModel, sequences: Tensor, mask: Tensor) -> Tensor:
    """Log-probabilities [B, new] of sequences [B, T + new] after mask [B, T], with logits at all positions."""
    start = mask.shape[1]
    tokens = sequences[:, start:]
    mask = torch.cat([mask, torch.ones_like(tokens)], 1)
    logits = language_model.model(
        input_ids=sequences, attention_mask=mask, position_ids=position_ids(mask), use_cache=False
    ).logits[:, start - 1 : -1]
    return of_drawn(logits.log_softmax(-1), tokens.tolist())


def minillm_rollouts(teacher: LanguageModel, student: LanguageModel, prompts: Rows, new: int, alpha: float) -> tuple:
    """tokens, log q, log p and log p~, rewards and importance weights, [B, new] each, and the reverse KL [B]."""
    input_ids, mask = left_padded(prompts, student)
    mixed = sample(student, input_ids, mask, new, TeacherMixture(teacher, mask, alpha)).sequences
    reward, log_q_drawn = read_all(teacher, mixed, mask), read_all(student, mixed, mask)
    own = sample(student, input_ids, mask, new).sequences
    own_p, own_q = read_all(teacher, own, mask), read_all(student, own, mask)
    log_p, log_q = read_all(teacher, mixed, mask), read_all(student, mixed, mask)
    log_mixed = ((1 - alpha) * log_q_drawn.exp() + alpha * log_p.exp()).log()
    tokens = mixed[:, input_ids.shape[1] :]
    return tokens, log_q, log_p, log_mixed, reward - log_q, (log_q - log_mixed).exp(), (own_q - own_p).sum(1)


ROLLOUTS = {"ours": our_rollouts, "processor": processor_rollouts, "minillm": minillm_rollouts}


@torch.no_grad()
def expected(pair: tuple, prompts: Rows, tokens: Rows, alpha: float) -> tuple[Tensor, Tensor, Tensor]:
    """log q, log p and log p~ after each prompt, [B, new, V] each, of forward passes over each row alone."""
    log_p, log_q = (torch.stack([
        each.model(torch.tensor([prompt + drawn], device=each.device)).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        for prompt, drawn in zip(prompts, tokens, strict=True)
    ]) for each in pair)
    return log_q, log_p, (alpha * log_p.double().exp() + (1 - alpha) * log_q.double().exp()).log()


def of_drawn(log_probs: Tensor, tokens: Rows) -> Tensor:
    """The entries [B, new] of log-probabilities [B, new, V] at the tokens."""
    return log_probs.gather(-1, torch.tensor(tokens, device=log_probs.device)[..., None])[..., 0]


def check_close(name: str, values: Tensor, right: Tensor) -> None:
    """Raises SystemExit for log-probabilities differing by more than TOLERANCE, or not numbers."""
    largest = (values.double() - right.double()).abs().max().item()
    if not largest <= TOLERANCE:
        raise SystemExit(f"not equal to forward passes over each row alone: {name}, off by {largest:.1e}")
    print(f"{name} off by at most {largest:.1e}")


def check_length(name: str, tokens: Rows, new: int) -> None:
    if any(len(row) != new or END in row for row in tokens):
        raise SystemExit(f"{name}: rows end before {new} tokens, so that variants do not do the same work")


def check_rollouts(name: str, pair: tuple, prompts: Rows, new: int, alpha: float) -> None:
    """Compares the first tokens of each row with forward passes; raises SystemExit where they differ."""
    new = min(new, CHECKED)
    if name == "processor":
        check_processor(pair, prompts, new, alpha)
        return
    made = ROLLOUTS[name](*pair, prompts, new, alpha)
    if name == "ours":
        tokens, *noted = made.tokens, made.log_q, made.log_p, made.behavior_log_probs
    else:
        tokens, noted = made[0].tolist(), made[1:4]
    check_length(name, tokens, new)
    right = expected(pair, prompts, tokens, alpha)
    for kind, values, distributions in zip(("log q", "log p", "log p~"), noted, right, strict=True):
        check_close(f"{name:<15} {kind:<6} of {new} tokens a row", values, of_drawn(distributions, tokens))


def check_processor(pair: tuple, prompts: Rows, new: int, alpha: float) -> None:
    """All probabilities at each place against forward passes, and at the first place against what ours noted."""
    teacher, student = pair
    input_ids, mask = left_padded(prompts, student)
    made = sample(student, input_ids, mask, new, TeacherMixture(teacher, mask, alpha), scores=True)
    tokens = made.sequences[:, input_ids.shape[1] :].tolist()
    check_length("processor", tokens, new)
    scores = torch.stack(made.scores, 1)
    right = expected(pair, prompts, tokens, alpha)[2]
    check_close(f"{'processor':<15} log p~ of all tokens at {new} places a row", scores[..., END + 1 :],
                right[..., END + 1 :])  # without the end-of-text, whose log-probability is -inf
    ours = our_rollouts(teacher, student, prompts, 1, alpha)
    check_close(f"{'processor':<15} log p~ at the first place, against ours", ours.behavior_log_probs,
                of_drawn(scores[:, :1], ours.tokens))


def our_step(size: str, prompts: Rows, new: int, pair: tuple) -> Step:
    (teacher, student), vocabulary = pair, SIZES[size][2]
    held, drawing = Teacher(teacher), RolloutConfig(SamplingOptions(0.0), new, len(prompts), seed=SEED)
    sets = RolloutBuffer(student, held, drawing, vocabulary, log=lambda text: None)
    objective = TeacherStudent(student, held, kl_div="JS", kd_weight=1.0, vocabulary=vocabulary, on_policy_fraction=1.0,
                               rollouts=sets).train()
    highlights = torch.randint(END + 1, vocabulary, (len(prompts), new))
    batch = collate([(torch.cat([torch.tensor(prompt), row]), new)
                     for prompt, row in zip(prompts, highlights, strict=True)])
    batch["rows"] = torch.arange(len(prompts))

    def step() -> tuple:
        student.zero_grad(set_to_none=True)
        arguments = next(next(objective.iter_steps(None, [batch], [1])))
        terms = objective(*arguments)
        loss = terms.loss_sum / terms.token_count
        loss.backward()
        drawn = arguments[-1]
        return loss.item(), [parameter.grad for parameter in student.parameters()], {
            name: getattr(drawn, name) for name in ("input_ids", "attention_mask", "labels")}

    return step


def trl_step(size: str, prompts: Rows, new: int, pair: tuple) -> Step:
    """On models of its own, since it changes their settings."""
    from datasets import Dataset
    from trl import DistillationConfig, DistillationTrainer

    teacher, student = make_pair(size, pair[1].device.type)
    texts = [{"prompt": " ".join(map(str, prompt))} for prompt in prompts]
    with tempfile.TemporaryDirectory() as folder:
        settings = DistillationConfig(
            output_dir=folder, beta=0.5, max_completion_length=new, per_device_train_batch_size=len(prompts), seed=SEED,
            bf16=False, use_cpu=pair[1].device.type == "cpu", gradient_checkpointing=False, report_to="none",
        )
        trainer = DistillationTrainer(student.model, teacher.model, settings, train_dataset=Dataset.from_list(texts),
                                      processing_class=student.tokenizer)
    trainer.current_gradient_accumulation_steps = 1  # what `train` sets
    prepared = trainer.accelerator.prepare_model(trainer.model)

    def step() -> tuple:
        prepared.zero_grad(set_to_none=True)
        loss = trainer.training_step(prepared, texts, None)
        drawn = trainer._buffered_inputs[0]
        prompt_mask, mask = drawn["prompt_mask"], drawn["completion_mask"]
        labels = torch.where(mask == 1, drawn["completion_ids"], IGNORED)
        return loss.item(), [parameter.grad for parameter in prepared.parameters()], {
            "input_ids": torch.cat([drawn["prompt_ids"], drawn["completion_ids"]], 1),
            "attention_mask": torch.cat([prompt_mask, mask], 1),
            "labels": torch.cat([torch.full_like(prompt_mask, IGNORED), labels], 1),
        }

    return step


STEPS = {"ours": our_step, "trl": trl_step}


def check_step(name: str, step: Step, pair: tuple, new: int) -> None:
    """Compares loss and gradients with full logits on the tokens that were drawn; raises SystemExit."""
    loss, gradients, batch = step()
    check_length(name, [row[row != IGNORED].tolist() for row in batch["labels"]], new)
    rows = [{key: tensor[row : row + 1].cpu() for key, tensor in batch.items()} for row in range(len(batch["labels"]))]
    compare(name, (loss, gradients), plain_step(*pair, Work(rows, [], len(rows) * new), "float32"), "float32")


def parse(argv: list[str]) -> argparse.Namespace:
    parser = OneLineParser("python -m benchmarks.rollout", description=__doc__.split("\n")[0])
    parser.add_argument("--step", action="store_true", help="on-policy divergence steps in place of mixed rollouts")
    parser.add_argument("--size", choices=SIZES, default="small", help="of the models (default: %(default)s)")
    numbers = {
        "batch": (8, 1, "prompts, all drawn at a time"), "shortest": (100, 1, "tokens of the shortest prompt"),
        "longest": (300, 1, "tokens of the longest prompt"), "new": (64, 1, "tokens drawn for each prompt"),
        "rounds": (6, 2, "the first is dropped"), "threads": (torch.get_num_threads(), 1, "of the CPU"),
    }
    for name, (default, _, text) in numbers.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{text} (default: %(default)s)")
    parser.add_argument("--alpha", type=float, default=0.2, help="the teacher's share (default: %(default)s)")
    parser.add_argument("--variants", nargs="+", choices=list(PACKAGES | STEP_PACKAGES), help="default: all here")
    interleaved.add_device_option(parser)
    options = parser.parse_args(argv)
    interleaved.check_device(parser, options.device)
    for name, (_, least, _) in numbers.items():
        if getattr(options, name) < least:
            parser.error(f"--{name} is {getattr(options, name)}: expected at least {least}")
    if not options.shortest <= options.longest <= CONTEXT - options.new:
        parser.error(f"--longest is {options.longest}: expected from {options.shortest} (--shortest) to "
                     f"{CONTEXT - options.new} (GPT-2's context without --new)")
    if not 0 < options.alpha < 1:
        parser.error(f"--alpha is {options.alpha}: expected a number between 0 and 1")
    packages = STEP_PACKAGES if options.step else PACKAGES
    if others := set(options.variants or ()) - packages.keys():
        parser.error(f"--variants has {min(others)}: {'with' if options.step else 'without'} --step there are "
                     f"{', '.join(packages)}")
    options.variants = choose_variants(parser, options.variants, packages)
    options.prompts = options.batch
    return options


def main(argv: list[str] | None = None) -> None:
    options = parse(sys.argv[1:] if argv is None else argv)
    quiet_libraries()
    torch.set_num_threads(options.threads)
    prompts, pair, new = make_prompts(options), make_pair(options.size, options.device), options.new
    source = "the student" if options.step else f"{options.alpha} p + {1 - options.alpha:.3g} q"
    print(f"{options.size}: {options.batch} prompts of {options.shortest} to {options.longest} tokens, {new} tokens "
          f"each drawn from {source}; {'on-policy divergence steps' if options.step else 'rollouts'}")
    print(f"float32, {interleaved.conditions(options.threads, options.device)}")
    runs: dict[str, Callable] = {}
    for name in options.variants:
        if options.step:
            runs[name] = STEPS[name](options.size, prompts, new, pair)
            check_step(name, runs[name], pair, new)
        else:
            runs[name] = partial(ROLLOUTS[name], *pair, prompts, new, options.alpha)
            check_rollouts(name, pair, prompts, new, options.alpha)
    seconds = take_turns(runs, options.rounds, options.device)
    interleaved.print_times(seconds, {})
    is_evidence = options.size == "real" and options.device == "cpu"  # small models are none
    for name in options.variants:
        if "ours" in seconds and name != "ours":
            target = TARGETS[name] if is_evidence else None
            interleaved.print_time_ratio(f"{LABELS[name]} / ours", seconds[name], seconds["ours"], target)


if __name__ == "__main__":
    main()

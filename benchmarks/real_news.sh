#!/usr/bin/env bash
# Real weights on real news: a teacher is fine-tuned, half of its blocks become a student, which is distilled by every
# method, and all are scored on the same test rows.
#
#   benchmarks/real_news.sh MODEL DATA OUT [STEPS] [JOBS] [POLICY_STEPS]
#
# MODEL: a save_pretrained folder. DATA: a folder with train.csv, validation.csv and test.csv. OUT: runs and scores.
# STEPS: optimizer steps of 16 rows after which a method ends (default 165: an epoch of 2,636 articles). POLICY_STEPS:
# those of policy gradient (default a third of STEPS, since a step takes longer). JOBS: runs at a time (default 1).
#
# The student starts from blocks spread evenly over the teacher's and is fine-tuned (kd_weight 0) for twice STEPS. All
# methods go on from there; "fine-tuned on" is the control. Nothing was chosen by the test rows.
set -euo pipefail
cd "$(dirname "$0")/.."
model=$1 data=$2 out=$3 steps=${4:-165} jobs=${5:-1}
python=${PYTHON:-.venv/bin/python}
policy_steps=${6:-$((steps / 3 > 0 ? steps / 3 : 1))}
blocks=$("$python" -c "import json, sys; print(json.load(open(sys.argv[1]))['num_hidden_layers'])" "$model/config.json")
mkdir -p "$out"

common=(dataset_kwargs.data_dir="$data" dataset_kwargs.train_batch_size=8 trainer_kwargs.gradient_accumulation_steps=2
    dataset_kwargs.cache_dir="$out/tokens" dataset_kwargs.max_length=1024 dataset_kwargs.on_bad_row=skip
    dataset_kwargs.validation_subset=null dataset_kwargs.test_dataset=null trainer_kwargs.metrics=[]
    trainer_kwargs.keep_checkpoints=1 trainer_kwargs.epochs=9)

run() { # NAME STEPS SCRIPT CONFIG SETTING...: a training, unless it is finished
    local name=$1 most=$2 script=$3 config=$4
    shift 4
    local settings=()
    for each in "${common[@]}" trainer_kwargs.output_dir="$out/$name" trainer_kwargs.max_steps="$most" "$@"; do
        settings+=(--set "$each")
    done
    "$python" "$script" --config "$config" "${settings[@]}" >"$out/$name.log" 2>&1 || { tail -n 3 "$out/$name.log"; return 1; }
    echo "$name: $(tail -n 1 "$out/$name.log")"
}
distil() { # NAME STEPS SETTING...
    local name=$1 most=$2
    shift 2
    run "$name" "$most" train_kd.py config_kd.json \
        trainer_kwargs.teacher_ckpt_path="$out/teacher/model_checkpoints/last" model_arch.student_lang_model="$model" \
        optimizer_kwargs.lm_lr=5e-5 "$@"
}
from_student() { # NAME STEPS SETTING...: a method that goes on from the fine-tuned student
    distil "$1" "$2" trainer_kwargs.student_ckpt_path="$out/student/model_checkpoints/last" \
        model_arch.student_lang_model="$out/student/model_checkpoints/last" "${@:3}"
}
score() { # NAME
    "$python" validate_model.py --csv_path "$data/test.csv" --model_path "$out/$1/model_checkpoints/last" \
        --output_dir "$out/scores-$1" --max_generation_length 80 --batch_size 64 --on_bad_row skip \
        >"$out/scores-$1.log" 2>&1 || { tail -n 3 "$out/scores-$1.log"; return 1; }
}
wait_for_room() {
    while [ "$(jobs -rp | wc -l)" -ge "$jobs" ]; do wait -n; done
}
wait_for_all() { # ends the script where one has failed
    for each in $(jobs -p); do wait "$each"; done
}

run teacher $((2 * steps)) train.py config.json model_arch.lang_model="$model" optimizer_kwargs.lm_lr=5e-5
distil student $((2 * steps)) distillation_kwargs.student_init=teacher_layers distillation_kwargs.kd_weight=0 \
    model_arch.architecture.num_hidden_layers=$((blocks / 2))

policy=(distillation_kwargs.method=policy_gradient distillation_kwargs.rollout_batch_size=16 optimizer_kwargs.lm_lr=2e-5)
wait_for_room; from_student policy_gradient $policy_steps "${policy[@]}" &
wait_for_room; from_student policy_gradient_penalty $policy_steps "${policy[@]}" distillation_kwargs.penalty=true &
wait_for_room; from_student fine_tuned_on "$steps" distillation_kwargs.kd_weight=0 &
for divergence in forward reverse JS; do
    wait_for_room; from_student $divergence "$steps" distillation_kwargs.kl_div=$divergence \
        distillation_kwargs.kd_weight=0.9 &
done
wait_for_all

methods=(teacher student fine_tuned_on forward reverse JS policy_gradient policy_gradient_penalty)
for name in "${methods[@]}"; do
    wait_for_room; score "$name" &
done
wait_for_all
"$python" - "$out" "${methods[@]}" <<'PYTHON'
import json
import sys

out, *methods = sys.argv[1:]
scores = {name: json.load(open(f"{out}/scores-{name}/scores.json")) for name in methods}
print(f"{'':<24} ROUGE-1 [95 %]         ROUGE-2 ROUGE-L  of the teacher's ROUGE-1; {scores['teacher']['rows']} rows")
for name, values in scores.items():
    low, high = values["confidence_intervals"]["rouge1"]
    print(f"{name:<24} {values['rouge1']:.4f} [{low:.4f}, {high:.4f}] {values['rouge2']:.4f}  {values['rougeL']:.4f}   "
          f"{values['rouge1'] / (scores['teacher']['rouge1'] or float('nan')):.1%}")
PYTHON

#!/usr/bin/env bash
# The whole job on made-up news, without hub or GPU: set-up, data, a teacher, students with and without it, tables.
# Safe to run again: what is finished is used as it is.
set -euo pipefail
cd "$(dirname "$0")"
. utils/setup.sh
set_up requirements.txt
export HF_HUB_OFFLINE=1
started=$SECONDS
noisy=runs/demo/predictions/noisy
equal_time=600 # steps of fine-tuning in the time of policy gradient's 150 (measured)

echo "1/5 demo news"
"$python" -m data.demo_news --output_dir data/demo

echo "2/5 fine-tuning the demo teacher: short articles first, then full ones"
"$python" train.py --config demo/train_teacher_short.json
"$python" train.py --config demo/train_teacher.json

predict() { # name, model
    local folder=runs/demo/predictions/$1
    if [ "$folder/scores.json" -nt "$2/trainer_state/state.json" ] && [ "$folder/scores.json" -nt data/demo/test.csv ]; then
        echo "$folder: already there, used as it is"
    else
        "$python" validate_model.py --config demo/validate.json --model_path "$2" --output_dir "$folder"
    fi
}

students() { # clean or noisy, ending of the tables' names: the student, then four ways on from it, 150 steps each
    local run=runs/demo/$1 rows=dataset_kwargs.train_dataset output=trainer_kwargs.output_dir method
    "$python" train.py --config demo/train_student_short.json --set $rows=student_short$2.csv --set $output=$run/student_short
    "$python" train.py --config demo/train_student.json --set $rows=student$2.csv --set $output=$run/student \
        --set model_arch.lang_model=$run/student_short/model_checkpoints/last
    "$python" train.py --config demo/continue_student.json --set $rows=student$2.csv --set $output=$run/fine_tuning \
        --set model_arch.lang_model=$run/student/model_checkpoints/last
    for method in forward:0.5 reverse:0.5 JS:0.9; do
        "$python" train_kd.py --config demo/distil_student.json --set $rows=student$2.csv --set $output=$run/${method%:*} \
            --set trainer_kwargs.student_ckpt_path=$run/student/model_checkpoints/last \
            --set distillation_kwargs.kl_div=${method%:*} --set distillation_kwargs.kd_weight=${method#*:}
    done
    for method in fine_tuning forward reverse JS; do
        predict $1/$method $run/$method/model_checkpoints/last
    done
}

own_summaries() { # clean or noisy, ending: 150 steps on the student's own summaries, and fine-tuning for as long a time
    local run=runs/demo/$1 rows=dataset_kwargs.train_dataset output=trainer_kwargs.output_dir method
    local start=trainer_kwargs.student_ckpt_path=runs/demo/$1/student/model_checkpoints/last
    "$python" train_kd.py --config demo/on_policy.json --set $rows=student$2.csv --set $output=$run/on_policy --set $start
    "$python" train_kd.py --config demo/policy_gradient.json --set $rows=student$2.csv --set $output=$run/policy_gradient \
        --set $start
    "$python" train_kd.py --config demo/policy_gradient.json --set $rows=student$2.csv --set $output=$run/penalty \
        --set $start --set distillation_kwargs.penalty=true
    "$python" train.py --config demo/continue_student.json --set $rows=student$2.csv --set $output=$run/fine_tuning_longer \
        --set model_arch.lang_model=$run/student/model_checkpoints/last --set trainer_kwargs.epochs=20 \
        --set trainer_kwargs.max_steps=$equal_time
    for method in on_policy policy_gradient penalty fine_tuning_longer; do
        predict $1/$method $run/$method/model_checkpoints/last
    done
}

table() { # clean or noisy, more rows
    local run=runs/demo/predictions/$1
    "$python" -m utils.compare --teacher teacher --baseline fine-tuning lead-3=runs/demo/predictions/lead-3 \
        teacher=runs/demo/predictions/teacher fine-tuning=$run/fine_tuning "forward KL=$run/forward" \
        "reverse KL=$run/reverse" JS=$run/JS "${@:2}"
}

echo "3/5 students whose highlights are noisy (one in four tells wrong facts, as web-scraped ones do)"
students noisy _noisy
own_summaries noisy _noisy
echo "4/5 students whose highlights are clean"
students clean ""
predict teacher runs/demo/teacher/model_checkpoints/last
predict lead-3 lead-3

echo "5/5 results on 200 test articles, which no model was trained on"
echo
echo "students trained on noisy highlights (the teacher on clean ones)"
table noisy "on-policy JS=$noisy/on_policy" "policy gradient=$noisy/policy_gradient" \
    "penalised policy gradient=$noisy/penalty" "longer fine-tuning=$noisy/fine_tuning_longer"
echo "longer fine-tuning: $equal_time steps, about as long a time as policy gradient's 150 with its rollouts"
echo
echo "students trained on clean highlights"
table clean
echo
echo "took $(((SECONDS - started) / 60)) min $(((SECONDS - started) % 60)) s, without the installation"
echo "models:       runs/demo/*/*/model_checkpoints/last (folders for AutoModelForCausalLM.from_pretrained)"
echo "curves:       .venv/bin/tensorboard --logdir runs/demo"
echo "predictions:  runs/demo/predictions/*/*/predictions.json"
echo "configs:      demo/*.json: copy one and change it"

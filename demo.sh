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
steps=() # DEMO_STEPS=12 ./demo.sh trains everything for 12 steps: to see that it runs, not what it gives
[ -z "${DEMO_STEPS:-}" ] || steps=(--set "trainer_kwargs.max_steps=$DEMO_STEPS")

# Two jobs at a time, each with half of the cores: so small models gain little from a second one.
cores=$(getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2)
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > 1 ? cores / 2 : 1))}

beside() { # two functions, with clean or noisy for each: what the second prints comes when the first is done
    local log status=0
    log=$(mktemp)
    echo "    (two jobs at a time; what the second prints is shown after the first)"
    set -m # a process group of its own, so that it ends with this script, whatever ends that
    "$3" "$4" >"$log" 2>&1 &
    trap "kill -- -$! 2>/dev/null; rm -f '$log'" EXIT
    set +m
    "$1" "$2"
    echo "waiting for the second job"
    wait $! || status=$?
    cat "$log"
    rm -f "$log"
    trap - EXIT
    return $status
}

train() { # script, config, run folder, clean or noisy, more settings
    local ending=
    [ "$4" = clean ] || ending=_$4
    local rows=student$ending.csv
    [[ $2 != *_short ]] || rows=student_short$ending.csv
    "$python" "$1.py" --config "demo/$2.json" --set "dataset_kwargs.train_dataset=$rows" \
        --set "trainer_kwargs.output_dir=runs/demo/$4/$3" "${@:5}" ${steps[@]+"${steps[@]}"}
}

predict() { # name, model
    local folder=runs/demo/predictions/$1
    if [ "$folder/scores.json" -nt "$2/trainer_state/state.json" ] && [ "$folder/scores.json" -nt data/demo/test.csv ]; then
        echo "$folder: already there, used as it is"
    else
        "$python" validate_model.py --config demo/validate.json --model_path "$2" --output_dir "$folder"
    fi
}

predict_each() { # clean or noisy, run folders
    local method
    for method in "${@:2}"; do
        predict "$1/$method" "runs/demo/$1/$method/model_checkpoints/last"
    done
}

teacher() {
    "$python" train.py --config demo/train_teacher_short.json ${steps[@]+"${steps[@]}"}
    "$python" train.py --config demo/train_teacher.json ${steps[@]+"${steps[@]}"}
    predict teacher runs/demo/teacher/model_checkpoints/last
    predict lead-3 lead-3
}

student() { # clean or noisy
    train train train_student_short student_short "$1"
    train train train_student student "$1" --set "model_arch.lang_model=runs/demo/$1/student_short/model_checkpoints/last"
}

students() {
    student noisy
    student clean
}

four_ways() { # clean or noisy: 150 steps on from the student
    local student=runs/demo/$1/student/model_checkpoints/last method
    train train continue_student fine_tuning "$1" --set "model_arch.lang_model=$student"
    for method in forward:0.5 reverse:0.5 JS:0.9; do
        train train_kd distil_student "${method%:*}" "$1" --set "trainer_kwargs.student_ckpt_path=$student" \
            --set "distillation_kwargs.kl_div=${method%:*}" --set "distillation_kwargs.kd_weight=${method#*:}"
    done
    predict_each "$1" fine_tuning forward reverse JS
}

rewarded() { # clean or noisy: 150 steps on the student's own summaries, and fine-tuning for as long a time
    local student=runs/demo/$1/student/model_checkpoints/last
    train train_kd policy_gradient policy_gradient "$1" --set "trainer_kwargs.student_ckpt_path=$student"
    train train continue_student fine_tuning_longer "$1" --set "model_arch.lang_model=$student" \
        --set trainer_kwargs.epochs=20 --set "trainer_kwargs.max_steps=$equal_time"
    predict_each "$1" policy_gradient fine_tuning_longer
}

penalised() { # clean or noisy: 150 steps on the student's own summaries
    local student=runs/demo/$1/student/model_checkpoints/last
    train train_kd policy_gradient penalty "$1" --set "trainer_kwargs.student_ckpt_path=$student" \
        --set distillation_kwargs.penalty=true
    train train_kd on_policy on_policy "$1" --set "trainer_kwargs.student_ckpt_path=$student"
    predict_each "$1" penalty on_policy
}

table() { # clean or noisy, more rows
    local run=runs/demo/predictions/$1
    "$python" -m utils.compare --teacher teacher --baseline fine-tuning lead-3=runs/demo/predictions/lead-3 \
        teacher=runs/demo/predictions/teacher fine-tuning=$run/fine_tuning "forward KL=$run/forward" \
        "reverse KL=$run/reverse" JS=$run/JS "${@:2}"
}

echo "1/5 demo news"
"$python" -m data.demo_news --output_dir data/demo

echo "2/5 fine-tuning, short articles first, then full ones: the demo teacher, and students on noisy highlights (one in"
echo "    four tells wrong facts, as web-scraped ones do) and on clean ones"
beside teacher "" students ""

echo "3/5 on from each student, 150 steps: fine-tuning, and distilling the teacher with three divergences"
beside four_ways noisy four_ways clean

echo "4/5 on from the noisy student on its own summaries: policy gradient, on-policy JS"
beside rewarded noisy penalised noisy

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

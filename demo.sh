#!/usr/bin/env bash
# The whole job on made-up news, without hub or GPU: set-up, data, training, predictions, a table of scores.
# Safe to run again: what is finished is used as it is.
set -euo pipefail
cd "$(dirname "$0")"
. utils/setup.sh
set_up requirements.txt
export HF_HUB_OFFLINE=1

echo "1/4 demo news"
"$python" -m data.demo_news --output_dir data/demo

echo "2/4 fine-tuning the demo teacher: short articles first, then full ones"
"$python" train.py --config demo/train_teacher_short.json
"$python" train.py --config demo/train_teacher.json

echo "3/4 predictions for the test articles, which no model was trained on"
model=runs/demo/teacher/model_checkpoints/last
predict() { # name, model
    local folder=runs/demo/predictions/$1
    if [ "$folder/scores.json" -nt "$model/trainer_state/state.json" ] && [ "$folder/scores.json" -nt data/demo/test.csv ]; then
        echo "$folder: already there, used as it is"
    else
        "$python" validate_model.py --config demo/validate.json --model_path "$2" --output_dir "$folder"
    fi
}
predict teacher "$model"
predict lead-3 lead-3

echo "4/4 results"
"$python" -m utils.compare runs/demo/predictions/teacher runs/demo/predictions/lead-3
echo
echo "model:        $model (a folder for AutoModelForCausalLM.from_pretrained)"
echo "curves:       .venv/bin/tensorboard --logdir runs/demo"
echo "predictions:  runs/demo/predictions/teacher/predictions.json"
echo "configs:      demo/*.json: copy one and change it"

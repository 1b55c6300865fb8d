#!/usr/bin/env bash
# The short runs that docs/results.md compares: one student for each row of its table, and their scores.
#
#     bash scripts/short_runs.sh FOLDER [N_SEEDS]
#
# FOLDER is that of proof.sh, which has left texts and counts there; the teacher is the one that proof.sh starts from.
# All that is made goes to FOLDER/short. Stopped in the middle, the same command continues where it was.
set -euo pipefail
: "${1:?the FOLDER is missing; the head of this file says what it holds}"
folder=$(realpath "$1") seeds=$(seq -s ' ' 1 "${2:-1}")
source "$(dirname "$0")/environment.sh"
if [ ! -s "$folder/counts.pickle" ]; then
    echo "error: $folder has no counts.pickle; first: bash scripts/proof.sh $folder" >&2
    exit 2
fi
export DISTIL_LOG=$folder/short/log.txt
mkdir -p "$folder/short"

say "Text and start"
for every in 60 36; do # the second is 1.65 times as long as the first
    awk -v every=$every 'NR % every == 1' "$folder/text.txt" > "$folder/short/every_$every.txt"
    python scripts/binarized_data.py --file_path "$folder/short/every_$every.txt" --bert_tokenizer "$folder/start_teacher" \
        --dump_file "$folder/short/every_$every"
done
init=$folder/short/init
[ -d "$folder/short/start" ] || python scripts/extract_for_distil.py --bert_model "$folder/start_teacher" \
    --vocab_transform --dump_checkpoint "$init.pth" --save_model "$folder/short/start"

runs=("$folder/short/start")
run() { # its name, its text, and flags of train.py
    runs+=("$folder/short/$1")
    python train.py --dump_path "$folder/short/$1" --resume --teacher_name "$folder/start_teacher" \
        --data_file "$folder/$2.start_teacher.pickle" --valid_data_file "$folder/held_out.start_teacher.pickle" \
        --token_counts "$folder/counts.pickle" --from_pretrained_weights "$init.pth" --from_pretrained_config "$init.json" \
        --n_epoch 1 --tokens_per_batch 2048 --tokens_per_micro_batch 2048 --gradient_accumulation_steps 1 --dropout 0 \
        --attention_dropout 0 --mlm_smoothing 0 "${@:3}"
}
say "Students"
no_teacher=(--alpha_ce 0 --alpha_cos 0) masked=(--restrict_ce_to_mask --mlm_mask_prop)
run smoothing_0.7 short/every_60 --mlm_smoothing 0.7
run smoothing_0.35 short/every_60 --mlm_smoothing 0.35
run smoothing_0 short/every_60
run rate_1e-3 short/every_60 --learning_rate 1e-3
run steps_of_512 short/every_60 --tokens_per_batch 512 --tokens_per_micro_batch 512
run masked_15 short/every_60 "${masked[@]}" 0.15
run masked_30 short/every_60 "${masked[@]}" 0.3
run masked_50 short/every_60 "${masked[@]}" 0.5
run masked_30_cos_20 short/every_60 "${masked[@]}" 0.3 --alpha_cos 20
run masked_30_no_mlm short/every_60 "${masked[@]}" 0.3 --alpha_mlm 0
run no_teacher_15 short/every_60 "${no_teacher[@]}"
run no_teacher_30 short/every_60 "${no_teacher[@]}" --mlm_mask_prop 0.3
run no_teacher_30_longer short/every_36 "${no_teacher[@]}" --mlm_mask_prop 0.3

say "Under the masks of --mlm_smoothing 0.7, and on tasks"
python scripts/compare_models.py --teacher "$folder/start_teacher" --models "${runs[@]}" \
    --valid_data_file "$folder/held_out.start_teacher.pickle" --token_counts "$folder/counts.pickle" > "$folder/short/rare_words.md"
python scripts/run_glue.py --models "$folder/start_teacher" "${runs[@]}" --data_dir "$folder/glue" --tasks CoLA RTE \
    --seeds $seeds --max_train_examples 10000 --hidden_states --output "$folder/short/glue.jsonl"

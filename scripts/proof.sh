#!/usr/bin/env bash
# The run behind the table of results in README.md, from texts and a teacher to the scores; what came out is in results/.
#
#     bash scripts/proof.sh FOLDER [N_SEEDS]
#
# FOLDER holds the text (text/*.txt: a paragraph a line, a blank line between documents), the tasks (glue/CoLA/train.tsv
# and so on, squad/dev-v1.1.json) and in start_teacher/ a BERT with a masked-language head, which is trained further and
# becomes the teacher. All that is made goes there too. Hours on a CPU; stopped in the middle, the same command
# continues where it was.
set -euo pipefail
: "${1:?the FOLDER is missing; the head of this file says what it holds}"
folder=$(realpath "$1") seeds=$(seq -s ' ' 1 "${2:-3}")
every=2 step=4096 # the students read every second sequence, in steps of so many tokens; 10 and 2048: the shorter run
source "$(dirname "$0")/environment.sh"
export DISTIL_LOG=$folder/log.txt

say "Text: every 330th block of 64 sequences is held out; of the rest, the teacher and the students read different parts"
[ -s "$folder/all.txt" ] || python scripts/make_dump.py --source "$folder/text" --dump_file "$folder/all.txt"
awk 'int((NR - 1) / 64) % 330 == 329' "$folder/all.txt" > "$folder/held_out.txt"
awk 'int((NR - 1) / 64) % 330 != 329' "$folder/all.txt" > "$folder/text.txt"
awk 'NR % 4 == 0' "$folder/text.txt" > "$folder/teachers.txt"
awk -v every="$every" 'NR % every == 1' "$folder/text.txt" > "$folder/students.txt"
awk -v every="$every" 'NR % every == 0' "$folder/text.txt" > "$folder/others.txt" # more of it, for one student
for part in held_out text teachers students others; do
    python scripts/binarized_data.py --file_path "$folder/$part.txt" --bert_tokenizer "$folder/start_teacher" --dump_file "$folder/$part"
done
python scripts/token_counts.py --data_file "$folder/text.start_teacher.pickle" --token_counts_dump "$folder/counts.pickle"
for part in teachers students others; do
    python scripts/corpus_doctor.py --data_file "$folder/$part.start_teacher.pickle" --tokenizer_name "$folder/start_teacher" \
        --against "$folder"/glue/*/dev.tsv "$folder"/squad/dev-*.json --overlap_file "$folder/$part.overlap.json" --n_examples 0 \
        > "$folder/$part.doctor.txt"
done

say "Teacher: the BERT in start_teacher/ goes on learning to guess masked words"
common=(--valid_data_file "$folder/held_out.start_teacher.pickle" --token_counts "$folder/counts.pickle" --n_epoch 1
    --gradient_accumulation_steps 1 --dropout 0 --attention_dropout 0 --mlm_smoothing 0)
python train.py --dump_path "$folder/teacher" --resume --student_type bert --student_pretrained_weights "$folder/start_teacher" \
    --tokenizer_name "$folder/start_teacher" --data_file "$folder/teachers.start_teacher.pickle" \
    --leave_out "$folder/teachers.overlap.json" "${common[@]}" --alpha_ce 0 --alpha_cos 0 --alpha_mlm 1 \
    --mlm_mask_prop 0.3 --learning_rate 4e-4 --max_grad_norm 1 --eval_interval 200 \
    --tokens_per_batch 2048 --tokens_per_micro_batch 2048
[ -d "$folder/students/start" ] || python scripts/extract_for_distil.py --bert_model "$folder/teacher" \
    --vocab_transform --dump_checkpoint "$folder/init.pth" --save_model "$folder/students/start"

say "Students: with all parts of the method, and without one at a time; then their scores on four tasks"
students=(--teacher_name "$folder/teacher" --tokenizer_name "$folder/start_teacher"
    --data_file "$folder/students.start_teacher.pickle" --leave_out "$folder/students.overlap.json" "${common[@]}"
    --tokens_per_batch "$step" --tokens_per_micro_batch "$step" --eval_interval 950)
tasks=(--data_dir "$folder/glue" --seeds $seeds --max_train_examples 10000)
ablation() {
    python scripts/ablation.py --output_dir "$folder/students" "${tasks[@]}" "$@" -- "${students[@]}" \
        --from_pretrained_weights "$folder/init.pth" --from_pretrained_config "$folder/init.json"
}
python scripts/run_glue.py --models "$folder/teacher" "$folder/students/start" "${tasks[@]}" --tasks CoLA SST-2 STS-B RTE \
    --output "$folder/students/glue.jsonl" --save_models "$folder/fine_tuned"
ablation --rows all no_teacher random_init
ablation --tasks CoLA RTE

say "Beyond the recipe: KL at masked tokens only; hidden states only; both; from chosen layers; without masked words"
[ -s "$folder/chosen.pth" ] || python scripts/extract_for_distil.py --bert_model "$folder/teacher" --vocab_transform \
    --dump_checkpoint "$folder/chosen.pth" --choose_layers --data_file "$folder/students.start_teacher.pickle" \
    --tokenizer_name "$folder/start_teacher" --n_sequences 60 > "$folder/chosen.md"
student() { # its name, where it starts (layers of the teacher, or another student), and flags of train.py
    local start=(--from_pretrained_weights "$folder/$2")
    [ -d "$folder/$2" ] || start=(--from_pretrained_weights "$folder/$2.pth" --from_pretrained_config "$folder/$2.json")
    python train.py --dump_path "$folder/students/$1" --resume "${students[@]}" "${start[@]}" "${@:3}"
}
focused=(--mlm_mask_prop 0.3 --restrict_ce_to_mask) blend=(--alpha_cos 20 --alpha_relation 10)
student focused init "${focused[@]}"
student encoder init --alpha_ce 0 --alpha_mlm 0 --alpha_cos 1 --alpha_relation 1
student blend init "${focused[@]}" "${blend[@]}"
student chosen_blend chosen "${focused[@]}" "${blend[@]}"
student chosen_blend_no_mlm chosen "${focused[@]}" "${blend[@]}" --alpha_mlm 0
student more_text students/chosen_blend_no_mlm "${focused[@]}" "${blend[@]}" --alpha_mlm 0 \
    --data_file "$folder/others.start_teacher.pickle" --leave_out "$folder/others.overlap.json"
student all_layers chosen --alpha_ce 0 --alpha_mlm 0 --alpha_cos 0 --alpha_layers 1
student chosen chosen
student both chosen --alpha_relation 1
# Two of them also with the help of the fine-tuned teacher's predictions, and two with that of all its hidden states.
python scripts/run_glue.py --models "$folder/teacher" "$folder"/students/{chosen_blend_no_mlm,more_text} "${tasks[@]}" --distil --layer_epochs 0 \
    --tasks CoLA SST-2 STS-B RTE --output "$folder/students/glue.jsonl" --save_models "$folder/fine_tuned" > "$folder/taught.md"
mkdir -p "$folder/second_step" # its models have the same names, and those that are fine-tuned alone are the same
cp -ru "$folder"/fine_tuned/{teacher,chosen_blend_no_mlm}-[CRS]* "$folder/second_step"
python scripts/run_glue.py --models "$folder/teacher" "$folder"/students/{chosen_blend_no_mlm,all_layers} "${tasks[@]}" --distil \
    --tasks CoLA SST-2 STS-B RTE --output "$folder/students/glue.jsonl" --save_models "$folder/second_step" > "$folder/second_step.md"
python scripts/run_glue.py --models "$folder/teacher" \
    "$folder"/students/{all,focused,encoder,blend,chosen_blend,chosen_blend_no_mlm,more_text,relation,chosen,both} \
    "${tasks[@]}" --tasks CoLA SST-2 STS-B RTE --output "$folder/students/glue.jsonl" > "$folder/beyond.md"

say "SQuAD: the teacher, the student alone, and the student with the teacher's help"
squad() {
    [ -s "$folder/squad_$1/results.json" ] || python scripts/run_squad_w_distillation.py --model_name_or_path "$folder/$2" \
        --train_file "$folder"/squad/train-*.json --predict_file "$folder"/squad/dev-*.json \
        --output_dir "$folder/squad_$1" --overwrite_output_dir --num_train_epochs 2 --learning_rate 1e-4 --dropout 0 "${@:3}"
}
squad teacher teacher
squad student students/all
squad distilled students/all --teacher_name_or_path "$folder/squad_teacher"

say "Sizes, times, and all of it on one page"
models=("$folder/teacher" "$folder/students/all")
python scripts/run_glue.py --models "${models[@]}" --data_dir "$folder/glue" --tasks STS-B --seeds 1 --max_train_examples 10000 \
    --output "$folder/students/glue.jsonl" --save_models "$folder/fine_tuned" > /dev/null
[ -s "$folder/inference.md" ] || python scripts/benchmark_inference.py --data_dir "$folder/glue" --max_examples 300 \
    --output "$folder/inference.md" --models "$folder/fine_tuned/teacher-STS-B-1" "$folder/fine_tuned/all-STS-B-1"
python scripts/report.py --runs "$folder"/students/{all,no_teacher,random_init} --scores "$folder/students/glue.jsonl" \
    --tables "$folder/inference.md" "$folder/students/ablation.md" --output "$folder/report.html"

#!/usr/bin/env bash
# The whole road on one page, from nothing but Python: text, vocabulary, teacher, student, results. A few minutes.
#
#     bash scripts/quickstart.sh
#
# All is made in work/quickstart; what the steps have to say stands in its log.txt. Stopped in the middle, the same
# command continues where it was; to start over, remove that folder.
set -euo pipefail
source "$(dirname "$0")/environment.sh"
out=work/quickstart
mkdir -p $out
export DISTIL_LOG=$out/log.txt
n=0 times=""
finish() { [ $n = 0 ] || times+="${times:+, }$title $((SECONDS - since))"; }
step() { # its name, and why it is taken
    finish
    n=$((n + 1)) title=$1 since=$SECONDS
    echo "$bold[$n/8] $1$plain: $2"
}
begin=$SECONDS
echo

step "text" "English prose from the documentation of Python and its packages, 2 MB"
[ -s $out/dump.txt ] || python scripts/make_dump.py --documentation --max_megabytes 2 --target_length 32 --dump_file $out/dump.txt
awk 'NR % 32 == 0' $out/dump.txt > $out/held_out.txt               # none of the models learns from these lines
awk 'NR % 32 != 0' $out/dump.txt > $out/whole.txt                  # the teacher's text
awk 'NR % 2 == 1' $out/dump.txt > $out/half.txt                    # the students' text, a part of it

step "vocabulary" "4,096 pieces of words, the alphabet of all the models"
[ -s $out/vocabulary/tokenizer_config.json ] || python scripts/train_vocabulary.py --file_path $out/whole.txt --vocab_size 4096 --output $out/vocabulary

step "numbers" "the text as numbers, which training reads, and how often each occurs"
printf '%s\n' held_out whole half | xargs -P 3 -I '{}' python scripts/binarized_data.py --file_path $out/{}.txt --bert_tokenizer $out/vocabulary --dump_file $out/{}
python scripts/token_counts.py --data_file $out/whole.vocabulary.pickle --token_counts_dump $out/counts.pickle

common="--valid_data_file $out/held_out.vocabulary.pickle --token_counts $out/counts.pickle --tokenizer_name $out/vocabulary --resume
    --tokens_per_batch 512 --gradient_accumulation_steps 1 --dropout 0 --attention_dropout 0 --mlm_smoothing 0"

step "teacher" "a small BERT of 4 layers learns to guess masked words, 3 times through the text"
python train.py --dump_path $out/teacher --data_file $out/whole.vocabulary.pickle $common --student_type bert \
    --n_layers 4 --dim 128 --n_heads 2 --hidden_dim 256 --max_position_embeddings 256 --initializer_range 0.06 \
    --alpha_ce 0 --alpha_cos 0 --alpha_mlm 1 --mlm_mask_prop 0.4 --learning_rate 1.5e-3 --max_grad_norm 0.5 --eval_interval 400

step "layers" "every second layer of the teacher is where the students start"
python scripts/extract_for_distil.py --bert_model $out/teacher --dump_checkpoint $out/init.pth --vocab_transform

common="$common --data_file $out/half.vocabulary.pickle --teacher_name $out/teacher --from_pretrained_weights $out/init.pth
    --n_epoch 1 --learning_rate 1e-3 --mlm_mask_prop 0.3 --restrict_ce_to_mask --eval_interval 80"
step "student" "distilled: it learns from half of the text and from the teacher's predictions"
python train.py --dump_path $out/student $common

step "without teacher" "the same student learns from the same text alone, for comparison"
python train.py --dump_path $out/without_teacher $common --alpha_ce 0 --alpha_cos 0

step "results" "the three on text that none of them has seen"
python scripts/plot_losses.py --runs $out/student $out/without_teacher --output $out/losses.png
python scripts/compare_models.py --teacher $out/teacher --models $out/student $out/without_teacher \
    --valid_data_file $out/held_out.vocabulary.pickle --output $out/results.md > $out/table.txt
finish

echo
cat $out/table.txt
cat << END

Done in $((SECONDS - begin)) seconds:
  $times
The losses, drawn:  $out/losses.png
This report:        $out/results.md
The model's card:   $out/student/README.md

Try next:
  source work/venv/bin/activate
  python scripts/fill_mask.py --models $out/teacher $out/student \\
      --text "Returns [MASK] if the object is a string."
  # a text of your own; the recipe in README.md goes on from it
  python scripts/make_dump.py --source FOLDER_WITH_TEXTS --dump_file data/dump.txt
END

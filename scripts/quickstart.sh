#!/usr/bin/env bash
# The whole road on one page, from nothing but Python: text, vocabulary, teacher, student, results.
#
#     bash scripts/quickstart.sh
#
# The text is the documentation that Python and the installed packages carry. All is made in work/quickstart. Stopped in
# the middle, the same command continues where it was; to start over, remove that folder.
set -euo pipefail
source "$(dirname "$0")/environment.sh"
out=work/quickstart
start=$SECONDS
step() { say "[$1/8] $2 (after $((SECONDS - start)) s)"; }

step 1 "Collecting English prose from the documentation on this machine"
[ -s $out/dump.txt ] || python scripts/make_dump.py --documentation --max_megabytes 4 --target_length 32 --dump_file $out/dump.txt

step 2 "Training a WordPiece vocabulary on it"
[ -s $out/tokenizer/tokenizer_config.json ] || python scripts/train_vocabulary.py --file_path $out/dump.txt --vocab_size 4096 --output $out/tokenizer

step 3 "Binarizing the text and counting its tokens"
python scripts/binarized_data.py --file_path $out/dump.txt --bert_tokenizer $out/tokenizer --dump_file $out/text
python scripts/token_counts.py --data_file $out/text.tokenizer.pickle --token_counts_dump $out/counts.pickle

common="--data_file $out/text.tokenizer.pickle --token_counts $out/counts.pickle --tokenizer_name $out/tokenizer --resume
    --tokens_per_batch 1024 --gradient_accumulation_steps 1 --dropout 0 --attention_dropout 0 --mlm_smoothing 0 --valid_share 0.02"

step 4 "Pre-training a small BERT, the teacher: plain masked language modelling"
python train.py --dump_path $out/teacher $common --student_type bert \
    --n_layers 4 --dim 128 --n_heads 2 --hidden_dim 512 --max_position_embeddings 256 --initializer_range 0.06 \
    --alpha_ce 0 --alpha_cos 0 --alpha_mlm 1 --n_epoch 5 --learning_rate 2e-3

step 5 "Taking every second of its layers for the student"
python scripts/extract_for_distil.py --bert_model $out/teacher --dump_checkpoint $out/init.pth --vocab_transform

common="$common --teacher_name $out/teacher --from_pretrained_weights $out/init.pth --n_epoch 1"
step 6 "Distilling the student"
python train.py --dump_path $out/student $common

step 7 "Training the same student without the teacher"
python train.py --dump_path $out/without_teacher $common --alpha_ce 0 --alpha_cos 0

step 8 "Comparing the three on text that none of them has seen"
python scripts/plot_losses.py --runs $out/student $out/without_teacher --output $out/losses.png
python scripts/compare_models.py --teacher $out/teacher --models $out/student $out/without_teacher \
    --data_file $out/text.tokenizer.pickle --valid_share 0.02 --output $out/results.md

say "Done in $((SECONDS - start)) s. The table is in $out/results.md, the losses are drawn in $out/losses.png, and
   $out/student loads with transformers' from_pretrained."

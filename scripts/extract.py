"""scripts/extract_for_distil.py under the name it had for RoBERTa and GPT-2 in later versions of the original.

    python scripts/extract.py --model_type roberta --model_name roberta-base \\
        --dump_checkpoint serialization_dir/init.pth --vocab_transform
"""

from extract_for_distil import main

if __name__ == "__main__":
    raise SystemExit(main())

"""scripts/extract_for_distil.py under the name it had for BERT in later versions of the original.

    python scripts/extract_distilbert.py --model_type bert --model_name bert-base-uncased \\
        --dump_checkpoint serialization_dir/init.pth --vocab_transform
"""

from extract_for_distil import main

if __name__ == "__main__":
    raise SystemExit(main())

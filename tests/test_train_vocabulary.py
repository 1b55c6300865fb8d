"""A vocabulary of one's own: the same text gives the same one, and another one is not replaced unasked."""

import json

import train_vocabulary
from processes import run_script
from workspace import ROOT, load_tokenizer, make_text, run


def test_the_same_text_gives_the_same_bytes(tmp_path):
    """In processes of their own, since the library draws its order once in each."""
    (tmp_path / "text.txt").write_text(make_text(200) + "Ärger, 北京 and naïve cafés.\n" * 3)
    flags = ["--file_path", tmp_path / "text.txt", "--vocab_size", 150, "--output"]
    for name in "ab":
        result = run_script(ROOT / "scripts" / "train_vocabulary.py", *flags, tmp_path / name)
        assert result.returncode == 0, result.stderr
    first, second = ((tmp_path / name / "tokenizer.json").read_bytes() for name in "ab")
    assert first == second
    entries = json.loads(first)["model"]["vocab"]
    assert list(entries)[:5] == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"] and len(entries) == 150
    words = load_tokenizer(tmp_path / "a").tokenize("the cat sees 北 naive")
    assert "[UNK]" not in words and "".join(words).replace("##", "") == "thecatsees北naive"


def test_rare_letters_are_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr(train_vocabulary, "MOST_LETTERS", 10)
    (tmp_path / "text.txt").write_text(make_text(50) + "z\n")
    assert "z" not in train_vocabulary.train(str(tmp_path / "text.txt"), 60, lowercase=True)


def test_another_vocabulary_is_only_replaced_if_asked_to(tmp_path, capsys):
    (tmp_path / "text.txt").write_text(make_text(50))
    flags = ["--file_path", tmp_path / "text.txt", "--output", tmp_path / "vocabulary"]
    run(train_vocabulary, *flags, "--vocab_size", 80)
    before = (tmp_path / "vocabulary" / "tokenizer.json").read_bytes()
    run(train_vocabulary, *flags, "--vocab_size", 80)
    run(train_vocabulary, *flags, "--vocab_size", 90, expect=2)
    assert "holds another vocabulary" in capsys.readouterr().err
    assert (tmp_path / "vocabulary" / "tokenizer.json").read_bytes() == before
    run(train_vocabulary, *flags, "--vocab_size", 90, "--force")
    assert len(load_tokenizer(tmp_path / "vocabulary")) == 90

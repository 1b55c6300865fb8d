"""Tables of texts and labels: what is read, what kind of task it makes, and how wrong lines are told."""

import json

import pytest

from evaluation.own_task import examples_of, read_table, task_of
from utils import InputError

CLASSES = 'text\tlabel\tid\nA "quoted" cat\tcat\t1\na dog\tdog\t2\nanother cat\tcat\t3\n'


def write(folder, name, content):
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder / name


def test_the_three_formats_hold_the_same(tmp_path):
    rows = [("a, b", 'say "c"', "yes"), ("d\te", "f", "no")]
    objects = [{"text": text, "text_pair": pair, "label": label, "more": 1} for text, pair, label in rows]
    files = [
        write(tmp_path, "t.csv", 'label,text,text_pair\nyes,"a, b","say ""c"""\nno,d\te,f\n'),
        write(tmp_path, "t.jsonl", "\n".join(map(json.dumps, objects))),  # without an end of line at the end
    ]
    for file in files:
        assert [(*row.texts, row.label) for row in read_table(file, "")] == rows
    assert [row.texts for row in read_table(files[0], "", has_labels=False)] == [row[:2] for row in rows]
    (first, *_), text = read_table(write(tmp_path, "t.tsv", CLASSES), ""), 'A "quoted" cat'
    assert first.texts == (text,) and first.where.endswith("t.tsv, line 2")


@pytest.mark.parametrize(
    "labels, expected",
    [
        (["b", "a", "b", "a"], ("a", "b")),
        (["10", "9", "10", "9"], ("9", "10")),
        (["1", "x", "1", "x"], ("1", "x")),
        (["4.5", "3", "0.25", "1e-3"], ()),
    ],
)
def test_the_labels_tell_the_kind_of_task(tmp_path, labels, expected):
    file = write(tmp_path, "t.csv", "text,label\n" + "".join(f"t,{label}\n" for label in labels))
    rows = read_table(file, "")
    task = task_of(rows, "mine")
    assert task.labels == expected and task.is_regression == (not expected)
    values = [example.label for example in examples_of(task, rows)]
    assert values == [float(label) for label in labels] if not expected else [expected.index(x) for x in labels]


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("t.tsv", "text\tlabels\na\tb\n", "t.tsv: its first line names no column 'label'"),
        ("t.tsv", "text\tlabel\na\tb\nc\n", "t.tsv, line 3: 1 fields, but the first line names 2"),
        ("t.tsv", "text\tlabel\na\tb\nc\t \n", "t.tsv, line 3: its 'label' is empty"),
        ("t.csv", 'text,label\n"a\nb",c\n,d\n', "t.csv, line 4: its 'text' is empty"),
        ("t.csv", b"text,label\n\xe9,d\n", "t.csv is not UTF-8"),
        ("t.csv", "text,label\n", "t.csv holds no examples"),
        ("t.jsonl", '{"text": "a", "label": 1}\n{"text": "a"}\n', "t.jsonl, line 2"),
        ("t.jsonl", '{"text": "a", "label": 1}\n{"text": 3, "label": 1}\n', "t.jsonl, line 2"),
        ("t.jsonl", '{"text": "a", "label": 1, "text_pair": ["b"]}\n', "t.jsonl, line 1: its 'text_pair' is not text"),
        (
            "t.jsonl",
            '{"text": "a", "label": 1, "text_pair": "b"}\n{"text": "a", "label": 1}\n',
            "t.jsonl, line 2: some examples have a 'text_pair' and some do not",
        ),
        ("t.txt", "text,label\na,b\n", "t.txt: the name of a table must end in .tsv, .csv, .jsonl"),
    ],
)
def test_a_wrong_line_is_named(tmp_path, name, content, message):
    with pytest.raises(InputError) as error:
        read_table(write(tmp_path, name, content), "--train_file")
    assert message in str(error.value)


@pytest.mark.parametrize(
    "labels, message",
    [("aaaa", "line 2: all labels are 'a'"), ("abcdefgh", "line 2: 8 different labels in 8 examples")],
)
def test_labels_that_teach_nothing_are_told(tmp_path, labels, message):
    rows = read_table(write(tmp_path, "t.csv", "text,label\n" + "".join(f"t,{label}\n" for label in labels)), "")
    with pytest.raises(InputError, match=message):
        task_of(rows, "mine")


def test_a_label_that_was_not_trained_on_is_named(tmp_path):
    for labels, other in ((["a", "b", "a", "b"], "c"), (["0.5", "1.5", "2"], "many"), (["0.5", "1.5", "2"], "nan")):
        task = task_of(read_table(write(tmp_path, "t.csv", "text,label\nt," + "\nt,".join(labels) + "\n"), ""), "mine")
        with pytest.raises(InputError, match=f"dev.csv, line 2: the label '{other}' is not"):
            examples_of(task, read_table(write(tmp_path, "dev.csv", f"text,label\nt,{other}\n"), ""))

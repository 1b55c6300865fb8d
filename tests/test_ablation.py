"""The ablation trains each student with one change, trains nothing twice, and its table says what came out."""

import json

import ablation
import pytest
from glue_files import write_task
from workspace import flags_of, run, weights_of

from evaluation import scores
from training import flags
from utils import InputError


@pytest.fixture(scope="module")
def init(workspace, tmp_path_factory):
    import extract_for_distil

    path = tmp_path_factory.mktemp("init") / "init.pth"
    run(extract_for_distil, "--bert_model", workspace / "bert-base-uncased", "--dump_checkpoint", path)
    return path


@pytest.fixture
def training(workspace, init):
    return flags_of(workspace, from_pretrained_weights=init, n_epoch=1, batch_size=32, gradient_accumulation_steps=4)


CHANGES = {
    "all": {},
    "no_teacher": {"alpha_ce": 0, "alpha_cos": 0},
    "random_init": {"student_pretrained_weights": None},
    "no_ce": {"alpha_ce": 0},
    "no_cos": {"alpha_cos": 0},
    "no_mlm": {"alpha_mlm": 0},
    "relation": {"alpha_relation": 1},
    "smoothing": {"mlm_smoothing": 0},
}


def test_each_student_lacks_one_part(training):
    """The flags alone: some of the students are trained below."""
    training = [*map(str, training), "--dump_path", "x"]
    parse = lambda flags_given: vars(flags.make_parser("").parse_args(flags_given))
    full = parse(training)
    assert set(CHANGES) == set(ablation.ROWS)
    for row, change in CHANGES.items():
        found = parse(ablation.flags_of(row, training, flags.make_parser("").parse_args(training)))
        differing = {name for name in full if found[name] != full[name]}
        assert differing - {"command", "alpha_mse", "alpha_relation"} | set(change) == set(change), row
        assert all(found[name] == value for name, value in change.items()), row


def test_students_are_trained_and_scored(tmp_path, workspace, training, capsys):
    write_task(tmp_path / "glue", "RTE", n_train=16)
    flags = ["--output_dir", tmp_path / "out", "--data_dir", tmp_path / "glue", "--seeds", 1, "--tasks", "RTE"]
    rows = ("all", "no_ce", "no_mlm", "random_init")
    run(ablation, *flags, "--rows", *rows, "--", *training)
    changes = {row: CHANGES[row] for row in rows}
    parameters = {row: json.loads((tmp_path / "out" / row / "parameters.json").read_text()) for row in changes}
    full = parameters["all"]
    assert parameters["no_ce"]["command"].startswith("python train.py --data_file ")
    assert "--alpha_ce 0 " in parameters["no_ce"]["command"]
    for row, change in changes.items():
        differing = {name for name in full if parameters[row][name] != full[name]}
        assert differing - {"dump_path", "command", "masking", "alpha_mse", "freeze_pos_embs"} == set(change)
        assert all(parameters[row][name] == value for name, value in change.items())
    table = (tmp_path / "out" / "ablation.md").read_text()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]
    lines = {row[0]: row[1:] for row in cells}
    assert len(lines) == 2 + 1 + len(changes)
    assert lines["the teacher"][2] == "100.0 %"
    assert lines["no KL to the teacher"][-1] == "-2.96"
    scored = {row["model"]: row["metrics"]["score"] for row in scores.read(str(tmp_path / "out" / "glue.jsonl"))}
    assert float(lines["no masked words"][-2]) == pytest.approx(scored["no_mlm"] - scored["all"], abs=0.01)

    weights = weights_of(tmp_path / "out" / "no_ce")
    capsys.readouterr()
    run(ablation, *flags, "--rows", "all", "no_ce", "--", *training)  # again: nothing is trained or scored
    assert "no_cos" not in capsys.readouterr().out
    assert len(scores.read(str(tmp_path / "out" / "glue.jsonl"))) == 1 + len(changes)
    again = weights_of(tmp_path / "out" / "no_ce")
    assert all((again[name] == value).all() for name, value in weights.items())


def test_a_run_by_hand_in_its_place_is_taken(tmp_path, workspace, training):
    import train

    assert train.main([*training, "--alpha_ce", "0", "--dump_path", str(tmp_path / "out" / "no_ce")]) == 0
    made = (tmp_path / "out" / "no_ce" / "model.safetensors").stat().st_mtime_ns
    run(ablation, "--output_dir", tmp_path / "out", "--rows", "no_ce", "--tasks", "none", "--", *training)
    assert (tmp_path / "out" / "no_ce" / "model.safetensors").stat().st_mtime_ns == made
    assert "no KL to the teacher" in (tmp_path / "out" / "ablation.md").read_text()


def test_initial_weights_are_left_out_in_every_spelling():
    base = ["--n_epoch", "1", "--student_pretrained_weights", "x.pth", "--force_me"]
    assert ablation.without(base, ablation.WEIGHTS) == ["--n_epoch", "1", "--force_me"]
    assert ablation.without(["--from_pretrained_weights=x.pth", "--n_epoch=1"], ablation.WEIGHTS) == ["--n_epoch=1"]


def test_without_a_teacher_nothing_is_said_about_its_relations(tmp_path, workspace, training):
    more = ["--alpha_relation", 1, "--relation_heads", 4, "--relation_layer", 1]
    flags = ["--output_dir", tmp_path, "--rows", "no_teacher", "--tasks", "none"]
    run(ablation, *flags, "--", *training, *more)
    assert (tmp_path / "no_teacher" / "model.safetensors").is_file()


def test_what_can_not_be_is_told(tmp_path, workspace, training, capsys):
    run(ablation, "--output_dir", tmp_path, "--", *training, "--resume", expect=2)
    assert "leave out --resume" in capsys.readouterr().err
    run(ablation, "--output_dir", tmp_path, "--tasks", "none", "--", "--data_file", "no.pickle", expect=2)
    assert "the same command continues" not in capsys.readouterr().err
    missing = ["--data_dir", tmp_path / "nothing", "--tasks", "CoLA"]
    run(ablation, "--output_dir", tmp_path / "ablation", *missing, "--", *training, expect=2)
    assert "CoLA/train.tsv does not exist" in capsys.readouterr().err
    same_name = ["--teacher_name", tmp_path / "no_ce"]
    run(ablation, "--output_dir", tmp_path / "ablation", "--tasks", "none", "--", *training, *same_name, expect=2)
    assert "two of them have the same name" in capsys.readouterr().err
    assert not (tmp_path / "ablation").exists()  # nothing was trained before that was told
    base = flags.make_parser("").parse_args(["--data_file", "x", "--dump_path", "y"])
    with pytest.raises(InputError, match="name no --from_pretrained_weights"):
        ablation.flags_of("random_init", ["--data_file", "x"], base)

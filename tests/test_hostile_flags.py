"""No value of any flag, however odd, ends in a traceback or costs a finished run.

The flags are read from the scripts' own parsers, so a new one is covered the day it is added. Each is given the odd
values of its kind, one at a time, beside flags that are right.
"""

import argparse
import contextlib
import importlib
import io
import os
import resource
import shutil
import traceback

import pytest
import torch
from glue_files import write_task
from squad_files import write_squad
from workspace import ROOT, train

import distiller
import utils
from training.batches import StepCounts

OTHER_NAMES = {"extract", "extract_distilbert"}  # of extract_for_distil
SCRIPTS = sorted({path.stem for path in (ROOT / "scripts").glob("*.py")} - OTHER_NAMES)
NUMBERS = ["0", "-1", "1", "2.5", "99999999999999999999", "1e308", "1e-320", "nan", "-inf", "", "x", "1" * 5000]
ODD_NAMES = ["", " ", "..", "/dev/null", "/dev/zero", "/proc/self/mem", "-", "[", "a\0b",
             "x" * 300, "x/" * 3000, "no/such/file", "org/model:x", "ünïcode 名", "\udc80", "{folder}", "{empty}",
             "{garbage}", "{garbage}/inside", "{dangling}", "{fifo}", "{loop}", "{pdf}", "{readonly}"]  # fmt: skip
TEXT = {"--language", "--license", "--datasets", "--fp16_opt_level"}  # which name no file
ODD_TEXTS = ["", "a\0b", "x" * 300, "ünïcode 名", "\udc80", "[", "- a: b"]
EXPORTING = {
    ("benchmark_inference", "onnx"),
    ("benchmark_inference", "onnx int8"),
    ("compare_encoders", "--int8"),
}  # nothing odd about them; they take long, and other tests have them
MEASURING = {  # what scripts do for long once their flags are known to be right, and what they then take for done
    "export_onnx": {"export_and_compare": []},
    "demo": {"add_model": {"task": ""}, "add_library": None},
    "extract_for_distil": {"one_by_one": [0, 1]},
    "ablation": {"train.main": 0, "table": ""},
    "report": {"make_page": ""},
    "run_glue": {"fine_tune_and_score": {"score": 0.0}},
    "distil_task": {"Trainings.teacher": "", "Trainings.student": "", "answers_of": {}, "write_differences": None,
                    "write_card": None},
    "benchmark_training": {"run_case": None},
    "benchmark_gpu": {"run_parts": []},
    "benchmark_kernels": dict.fromkeys(["ceilings", "vocabulary", "attention"], ()),
    "benchmark_launches": {"report": ""},
    "benchmark_scaling": {"measure_apart": {"processes": 1, "seconds": 1.0, "tokens": 1.0, "waits": [0.0] * 3,
                                            "where": ""}},
    "benchmark_corpus": dict.fromkeys(["benchmark_tokenizing", "benchmark_dump", "benchmark_growth",
                                       "benchmark_opening_and_counting", "benchmark_set_up"]),
}  # fmt: skip
MEMORY = 16 << 30  # bytes of address space; torch alone maps some


def values_for(action: argparse.Action) -> list[list[str]]:
    """What to give this flag, one after the other."""
    if action.nargs == 0 or isinstance(action, argparse.BooleanOptionalAction):
        return [[]]
    if action.choices:
        return [[str(choice)] for choice in action.choices] + [["nonsense"], [""]]
    values = NUMBERS if is_number(action) else ODD_TEXTS if TEXT & set(action.option_strings) else ODD_NAMES
    return [[value] for value in values] + ([["a", "a"], []] if action.nargs in ("+", "*") else [])


def is_number(action: argparse.Action) -> bool:
    if action.type in (None, str, utils.path):
        return False
    with contextlib.suppress(argparse.ArgumentTypeError):
        action.type("not a number")
        return False
    return True


@pytest.fixture
def odd_files(tmp_path_factory):
    """Names of things that are not a file of the kind that is asked for; new ones for each script, which may write to
    them."""
    folder = tmp_path_factory.mktemp("odd")
    names = {name: folder / name for name in
             ("folder", "empty", "garbage", "dangling", "fifo", "loop", "pdf", "readonly")}  # fmt: skip
    names["folder"].mkdir()
    names["empty"].touch()
    names["garbage"].write_bytes(os.urandom(3000))
    names["dangling"].symlink_to(folder / "nothing")
    names["loop"].symlink_to(names["loop"])
    os.mkfifo(names["fifo"])
    names["pdf"].write_bytes(b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n1 0 obj\n")
    names["readonly"].write_text("x")
    names["readonly"].chmod(0o400)
    return {name: str(path) for name, path in names.items()}


@pytest.fixture(scope="module")
def right_flags(workspace, tmp_path_factory):
    """For each script, flags with which it works, small; its outputs lie in the folder `out`."""
    folder = tmp_path_factory.mktemp("right")
    run, out = folder / "run", folder / "out"
    train(workspace, run, "--gradient_accumulation_steps", 30)
    text, data = workspace / "dump.txt", workspace / "text.bert-base-uncased.pickle"
    short = folder / "short.txt"
    short.write_text("".join(text.read_text().splitlines(keepends=True)[:40]))
    name = workspace / "bert-base-uncased"
    for task in ("CoLA", "STS-B"):
        write_task(folder / "glue", task)
    write_squad(folder / "dev.json", 3)
    (folder / "task.csv").write_text("text,label\n" + "the cat,a\nthe dog,b\n" * 2)
    flags = {
        "train": ["--dump_path", run, "--force", "--data_file", data, "--token_counts", workspace / "counts.pickle",
                  "--teacher_name", name, "--n_gpu", 0, "--gradient_accumulation_steps", 1, "--n_epoch", 1],
        "make_dump": ["--source", short, "--dump_file", out / "dump.txt"],
        "binarized_data": ["--file_path", short, "--tokenizer_name", name, "--dump_file", out / "text"],
        "token_counts": ["--data_file", data, "--token_counts_dump", out / "counts.pickle"],
        "merge_data": ["--data_file", data, "--dump_file", out / "merged.pickle"],
        "extract_for_distil": ["--model_name", name, "--dump_checkpoint", out / "init.pth", "--choose_layers",
                               "--data_file", data, "--n_sequences", 2],
        "trim_vocabulary": ["--model_name", name, "--data_file", data, "--output_dir", out / "trimmed"],
        "compare_models": ["--teacher", name, "--models", run, "--data_file", data, "--turns", 1, "--n_gpu", 0],
        "compare_encoders": ["--models", run, "--squad_file", folder / "dev.json", "--turns", 1, "--n_gpu", 0],
        "ablation": ["--output_dir", out / "ablation", "--rows", "no_ce", "--tasks", "none", "--", "--data_file", data,
                     "--teacher_name", name, "--n_gpu", 0, "--n_epoch", 1],
        "report": ["--runs", run, "--teacher", name, "--valid_data_file", data, "--turns", 1, "--text", "the [MASK]",
                   "--n_gpu", 0, "--output", out / "report.html"],
        "export_onnx": ["--model", name, "--output_dir", out / "onnx"],
        "benchmark_inference": ["--models", name, "--data_dir", folder / "glue", "--max_examples", 2, "--n_gpu", 0,
                                "--forms", "float32", "--batch_sizes", 1, "--turns", 1],
        "run_squad_w_distillation": ["--model_name_or_path", name, "--predict_file", folder / "dev.json", "--n_gpu", 0,
                                     "--output_dir", out / "squad", "--max_seq_length", 32, "--doc_stride", 8,
                                     "--max_query_length", 12],
        "run_glue": ["--models", name, run, "--data_dir", folder / "glue", "--tasks", "CoLA", "--seeds", 1,
                     "--n_gpu", 0, "--output", out / "glue.jsonl", "--max_train_examples", 4, "--n_epoch", 1],
        "distil_task": ["--train_file", folder / "task.csv", "--dev_file", folder / "task.csv", "--teacher", name,
                        "--student", run, "--output_dir", out / "task", "--n_gpu", 0],
        "demo": ["--models", run, "--output_dir", out / "demo", "--cdn"],
        "to_bert": ["--model", run, "--output_dir", out / "bert"],
        "fill_mask": ["--models", name, "--text", "the [MASK]", "--top", 2],
        "corpus_doctor": ["--data_file", data, "--tokenizer_name", name, "--n_examples", 1],
        "plot_losses": ["--runs", run, "--output", out / "losses.png"],
        "benchmark_corpus": ["--file_path", short, "--tokenizer_name", name, "--work_dir", out],
        "benchmark_gpu": ["--tiny", "--output", out / "gpu.md"],
        "benchmark_kernels": ["--tiny"],
        "benchmark_launches": ["--tiny"],
        "benchmark_scaling": ["--tiny"],
        "benchmark_training": ["--cases", "tiny", "--n_gpu", 0],
        "train_vocabulary": ["--file_path", short, "--vocab_size", 100, "--output", out / "vocabulary"],
    }  # fmt: skip
    return {script: [str(value) for value in values] for script, values in flags.items()}, run, out


def without(flags: list[str], action: argparse.Action) -> list[str]:
    """The flags but for those that the action would read."""
    kept, skipping = [], False
    for value in flags:
        if value.startswith("--"):
            skipping = value in action.option_strings
        if not skipping:
            kept.append(value)
    return kept


def run_once(main, argv: list[str]) -> tuple[object, str]:
    """The exit status, or the traceback, and what was printed on stderr."""
    error = io.StringIO()
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(error):
            status = main(argv)
    except SystemExit as stop:
        status = stop.code
    except BaseException:  # whatever it is, it is what this test is after
        status = traceback.format_exc()
    return status, error.getvalue()


@contextlib.contextmanager
def limited_memory():
    """What takes all memory fails here, and does not take the machine with it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, hard))
    yield
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def one_step(self):
    """In place of Distiller.train: a step and a save, however many were asked for."""
    self.data.train_sampler.set_epoch(0)
    micro_batches = next(self.data.steps(self.recipe, self.world, 0, 0))
    self.step(micro_batches, StepCounts.of(micro_batches))
    self.save(epoch=0)


def run_all(script: str, right_flags, odd_files, monkeypatch, tmp_path) -> int:
    flags, finished, out = right_flags
    # By the name under which other scripts import it: a module with operators of PyTorch may not be there twice.
    module = importlib.import_module(script if script == "train" else f"scripts.{script}")
    monkeypatch.setattr(distiller.Distiller, "train", one_step)
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)  # would take most of the time
    monkeypatch.setattr(torch, "use_deterministic_algorithms", lambda mode: None)  # would last
    for name, result in MEASURING.get(script, {}).items():
        owner, _, name = name.rpartition(".")
        monkeypatch.setattr(getattr(module, owner) if owner else module, name, lambda *_, result=result: result)
    saved, here = tmp_path / "saved", tmp_path / "here"
    shutil.copytree(finished, saved)
    failures, n_cases = [], 0
    for action in module.make_parser()._actions:
        for given in values_for(action) if action.option_strings and action.dest != "help" else []:
            values = [value.format(**odd_files) if value.startswith("{") else value for value in given]
            argv = [action.option_strings[0], *values, *without(flags[script], action)]
            if EXPORTING & {(script, word) for word in argv[:2]}:
                continue
            out.mkdir()
            here.mkdir()
            monkeypatch.chdir(here)  # for what is named without a folder
            monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO()))
            with limited_memory():
                status, error = run_once(module.main, argv)
            n_cases += 1
            shown = f"{action.option_strings[0]} {' '.join(value[:40] for value in values)}: "
            sentences = [line for line in error.splitlines() if line.startswith("error: ")]
            if status not in (0, 1, 2):
                failures.append(f"{shown}{status}")
            elif status == 2 and len(sentences) != 1:
                failures.append(f"{shown}not one sentence: {error}")
            elif status and status != 2 and script != "corpus_doctor":
                failures.append(f"{shown}status {status}: {error}")
            if not (finished / "model.safetensors").is_file():
                failures.append(f"{shown}the finished run is gone: {error}")
                shutil.rmtree(finished, ignore_errors=True)
                shutil.copytree(saved, finished)
            shutil.rmtree(out)
            shutil.rmtree(here)
    told = "\n".join(failures).encode(errors="backslashreplace").decode()  # else xdist could not tell it
    assert not failures, f"{len(failures)} of {n_cases}:\n{told}"
    return n_cases


@pytest.mark.timeout(480)  # hundreds of runs
@pytest.mark.parametrize("script", ["train", *SCRIPTS])
def test_no_value_of_a_flag_ends_in_a_traceback(script, right_flags, odd_files, monkeypatch, tmp_path):
    print(script, run_all(script, right_flags, odd_files, monkeypatch, tmp_path), "cases")

"""Times models side by side on a dev set: teacher against student, in every form you might deploy.

The paper's table (one pass over STS-B's pairs, batch size 1, on a CPU) and larger batches:

    python scripts/benchmark_inference.py --models bert-base-uncased serialization_dir/my_first_training --data_dir glue

Models that have been fine-tuned on the task (scripts/run_glue.py --save_models) are scored as well, in every form: a
smaller or faster form is useful only if it still answers correctly. The ONNX files are those of scripts/export_onnx.py;
where they are missing they are made, in the model's folder.

All forms take turns, so that other load on the machine affects them equally; the median of the turns counts.
"""

import argparse
import copy
import statistics
import sys
import textwrap
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import export_onnx
from compare_models import size_on_disk
from export_onnx import FLOAT32, INT8, FirstOutputs, OnnxModel, deviation, encode_batch, first_of

import utils
from corpus.tokenization import load_tokenizer
from evaluation.glue import TASKS, Example, read_task, score
from files.atomic import atomic_write
from files.paths import check_output_file
from training.distributed import describe_device, single_process
from utils import integer, logger, path

BODY, ONNX, ONNX_INT8 = "no head", "onnx", "onnx int8"
FORMS = {  # name -> what it is, for the table
    "float32": "PyTorch, float32",
    BODY: "- without its head",
    "bfloat16": "PyTorch, bfloat16",
    "compiled": "PyTorch, compiled",
    ONNX: "ONNX, float32",
    ONNX_INT8: "ONNX, int8",
}
COMPARED = 64  # texts whose outputs are held against those in float32
Batch = dict[str, torch.Tensor]


@dataclass
class Form:
    """A model in one form, and what was measured of it.

    Attributes:
        model: its name.
        ask: a batch -> its first output.
        batches: by batch size.
        n_bytes: of its file.
        seconds: by batch size, of a pass over the whole set, turn by turn.
        deviation: of its outputs from those of PyTorch in float32, as a share.
        score: on the task; None: it has no head for it.
    """

    model: str
    name: str
    ask: Callable[[Batch], np.ndarray]
    batches: dict[int, list[Batch]]
    n_bytes: int | None
    seconds: dict[int, list[float]] = field(default_factory=dict)
    deviation: float | None = None
    score: float | None = None

    def median(self, batch_size: int) -> float:
        return statistics.median(self.seconds[batch_size])


def make_parser() -> argparse.ArgumentParser:
    parser = utils.make_parser(__doc__)
    add = parser.add_argument
    add("--models", type=path, nargs="+", required=True, help="hub names or folders; the first counts as 1x")
    add("--tokenizer_name", type=path, help="tokenizer of all models (default: each model's own)")
    add("--task", choices=list(TASKS), default="STS-B", help="task whose development set to read (%(default)s)")
    add("--data_dir", type=path, help="folder with a folder for each task (default: the hub)")
    add("--max_examples", type=integer(1, 1 << 40), help="read only the first examples")
    add("--forms", nargs="+", choices=list(FORMS), default=list(FORMS), help="forms to time (default: all)")
    add("--batch_sizes", type=integer(1, 1 << 20), nargs="+", default=[1, 32], help="texts per batch (1 32)")
    add("--turns", type=integer(1, 1000), default=3, help="timings of each form; the median counts (%(default)s)")
    add("--n_threads", type=integer(1, 1 << 12), help="threads on the CPU (default: one per core)")
    add("--n_gpu", type=integer(0, 1), help="0 for the CPU (default: what there is)")
    add("--output", type=path, help="Markdown file to write the tables to as well")
    return parser


# ---------------------------------------------------------------------------------------------------------------- forms


def torch_form(model: torch.nn.Module, device: torch.device, compiled: bool = False):
    """A PyTorch model as a function of a batch in main memory."""
    module = FirstOutputs(model).to(device).eval()
    if compiled:
        module = torch.compile(module, dynamic=True)

    @torch.inference_mode()
    def ask(batch: Batch) -> np.ndarray:
        return first_of(module(**{name: ids.to(device) for name, ids in batch.items()})).float().cpu().numpy()

    return ask


def make_forms(name: str, args: argparse.Namespace, texts: list, device: torch.device) -> tuple[list[Form], int]:
    """A model in all forms that were asked for, and how many parameters it has."""
    tokenizer = load_tokenizer(args.tokenizer_name or name)
    model = export_onnx.load_with_its_head(name, tokenizer)
    parameters = sum(p.numel() for p in model.parameters())
    folder = Path(name) / "onnx" if Path(name).is_dir() else Path("onnx") / Path(name).name
    if {ONNX, ONNX_INT8} & set(args.forms) and not (folder / INT8).is_file():
        logger.info("exporting %s to %s", name, folder)
        export_onnx.export(model, tokenizer, folder)
    length = TASKS[args.task].max_length
    batches = {
        size: [encode_batch(tokenizer, model, texts[i : i + size], length) for i in range(0, len(texts), size)]
        for size in args.batch_sizes
    }
    n_bytes = size_on_disk(name)
    makers: dict[str, Callable] = {
        "float32": lambda: torch_form(model, device),
        BODY: lambda: torch_form(model.base_model, device),
        "bfloat16": lambda: torch_form(copy.deepcopy(model).bfloat16(), device),
        "compiled": lambda: torch_form(copy.deepcopy(model), device, compiled=True),
        ONNX: lambda: OnnxModel(folder / FLOAT32, args.n_threads or 0),
        ONNX_INT8: lambda: OnnxModel(folder / INT8, args.n_threads or 0),
    }
    if model.base_model is model:
        del makers[BODY]
    forms = []
    for form in FORMS:
        if form in args.forms and form in makers:
            file = folder / (INT8 if form == ONNX_INT8 else FLOAT32)
            own_bytes = file.stat().st_size if form.startswith("onnx") else n_bytes
            forms.append(Form(Path(name).name, form, makers[form](), batches, own_bytes))
    return forms, parameters


# ---------------------------------------------------------------------------------------------------------- measurement


def time_pass(form: Form, batch_size: int) -> list[np.ndarray]:
    """Records the time of one pass; returns the outputs if they are small, one line per text."""
    outputs = []
    start = time.perf_counter()
    for batch in form.batches[batch_size]:
        output = form.ask(batch)
        if output.ndim == 2:
            outputs.append(output)
    form.seconds.setdefault(batch_size, []).append(time.perf_counter() - start)
    return outputs


def measure(forms: list[Form], args: argparse.Namespace, examples: list[Example]) -> None:
    """Fills in `seconds` and `score`. The first turn, in which code is compiled and memory found, does not count."""
    task = TASKS[args.task]
    with utils.progress_bar(total=(args.turns + 1) * len(forms) * len(args.batch_sizes), desc="measuring") as bar:
        for turn in range(args.turns + 1):
            for batch_size in args.batch_sizes:
                for form in forms:
                    outputs = time_pass(form, batch_size)
                    if turn == 0:
                        form.seconds[batch_size].clear()
                        if outputs and outputs[0].shape[1] == max(len(task.labels), 1) and form.name != BODY:
                            form.score = score(task, [np.concatenate(outputs)], [examples])["score"]
                    bar.update(1)


def compare_outputs(forms: list[Form], reference: Form) -> None:
    """Fills in `deviation`, from the first texts, one at a time so that nothing is padded."""
    size = min(reference.batches)
    some = reference.batches[size][: max(COMPARED // size, 1)]
    expected = np.concatenate([reference.ask(batch).ravel() for batch in some])
    for form in forms:
        if form.name != BODY:
            form.deviation = deviation(np.concatenate([form.ask(batch).ravel() for batch in some]), expected)


# --------------------------------------------------------------------------------------------------------------- tables


def size_table(forms: list[Form], parameters: dict[str, int]) -> str:
    """A table: one line per model, with its parameters and the size of each file."""
    first = next(iter(parameters.values()))
    titles = {forms[0].name: "MB in its folder"} | {name: f"MB, {FORMS[name]}" for name in (ONNX, ONNX_INT8)}
    rows = []
    for model, n in parameters.items():
        sizes = {form.name: form.n_bytes for form in forms if form.model == model}
        cells = [f"{sizes[name] / 1e6:.1f}" if sizes.get(name) else "-" for name in titles]
        rows.append([model, f"{n / 1e6:.1f} M ({100 * n / first:.0f} %)", *cells])
    return utils.markdown_table(["model", "parameters", *titles.values()], rows)


def time_table(forms: list[Form], models: list[str], batch_size: int, n: int) -> str:
    """A table: one line per form; ratios are to the first model in the same form."""
    rows = []
    for name, shown in FORMS.items():
        by_model = {form.model: form for form in forms if form.name == name}
        if not by_model:
            continue
        cells = []
        for model in models:
            if model not in by_model:
                cells.append("-")
                continue
            seconds = by_model[model].median(batch_size)
            against = by_model[models[0]].median(batch_size) / seconds if models[0] in by_model else float("nan")
            cells.append(f"{seconds:.1f} s = {1e3 * seconds / n:.2f} ms a text, {against:.2f}x")
        rows.append([shown, *cells])
    return utils.markdown_table([f"batch size {batch_size}", *models], rows)


def accuracy_table(forms: list[Form], models: list[str], task: str) -> str:
    rows = []
    for name, shown in FORMS.items():
        by_model = {form.model: form for form in forms if form.name == name}
        if name == BODY or not by_model:
            continue
        cells = []
        for model in models:
            form = by_model[model]
            scored = "" if form.score is None else f"{form.score:.2f}, "
            cells.append(f"{scored}± {100 * form.deviation:.2g} %")
        rows.append([shown, *cells])
    return utils.markdown_table([f"{task}, outputs", *models], rows)


@utils.command_line(make_parser)
def main(args: argparse.Namespace) -> None:
    if args.output:
        check_output_file(args.output, "--output")
    models = utils.distinct_names(args.models, "--models")
    if {ONNX, ONNX_INT8} & set(args.forms):
        export_onnx.require_packages()
    if args.n_threads:
        torch.set_num_threads(args.n_threads)
    args.batch_sizes = list(dict.fromkeys(args.batch_sizes))
    device = single_process(args.n_gpu).device
    examples = read_task(TASKS[args.task], args.data_dir)[1][0][: args.max_examples]
    examples.sort(key=lambda example: -len(" ".join(example.texts)))  # in larger batches, of similar length
    forms, parameters = [], {}
    for name, model in zip(args.models, models, strict=True):
        made, parameters[model] = make_forms(name, args, [example.texts for example in examples], device)
        compare_outputs(made, made[0])
        forms += made
    logger.info("%s texts, %s; ONNX Runtime always on the CPU", f"{len(examples):,}", describe_device(device))
    measure(forms, args, examples)
    tables = [size_table(forms, parameters)]
    tables += [time_table(forms, models, size, len(examples)) for size in args.batch_sizes]
    tables += [accuracy_table(forms, models, args.task)]
    explained = (
        f"A pass over the development set of {args.task}, {len(examples):,} texts, on {describe_device(device)}; the "
        f"median of {args.turns} turns. x: as many times faster as {models[0]} in the same form. ±: how far the "
        f"outputs are from those of PyTorch in float32, as a share of their standard deviation."
    )
    report = "\n\n".join([*tables, textwrap.fill(explained, 98)])
    print(report)
    if args.output:
        with atomic_write(args.output, "w") as out:
            out.write(report + "\n")


if __name__ == "__main__":
    raise SystemExit(main())

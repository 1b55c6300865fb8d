"""Writes a model as ONNX files, in float32 and int8, for ONNX Runtime, which needs neither PyTorch nor this toolkit.

    python scripts/export_onnx.py --model serialization_dir/my_first_training

leaves `onnx/model.onnx` and `onnx/model_quantized.onnx` (the names that Transformers.js looks for) in the model's
folder (for a hub name, name --output_dir) and says how far their outputs are from PyTorch's. The model keeps the head
that its folder has: for masked words, a task (scripts/run_glue.py --save_models), or answers
(scripts/run_squad_w_distillation.py). Batch and length are free.

Needs `pip install onnx onnxscript onnxruntime`.
"""

import argparse
import contextlib
import logging
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import utils
from corpus.tokenization import load_tokenizer
from evaluation.fine_tuning import encode_batch, load_for
from files.atomic import replacing_files
from files.paths import check_output_folder
from models.loading import load_config
from models.sentence_encoder import Pooling, pooling_of
from utils import InputError, logger, path, reason_of

FLOAT32, INT8, FLOAT16 = "model.onnx", "model_quantized.onnx", "model_fp16.onnx"
TEXTS = [("A model is exported, and then it is asked the same questions as before.",), ("Short.",), ("It answers.",)]


def make_parser() -> argparse.ArgumentParser:
    parser = utils.make_parser(__doc__)
    parser.add_argument("--model", type=path, required=True, help="hub name or folder, such as a dump_path")
    parser.add_argument("--tokenizer_name", type=path, help="tokenizer (default: the model's)")
    parser.add_argument(
        "--encoder",
        action="store_true",
        help="leave out the head, and return the last hidden states and, for a sentence encoder, a vector per text",
    )
    parser.add_argument("--fp16", action="store_true", help=f"also write {FLOAT16}, for GPUs and WebGPU")
    parser.add_argument("--output_dir", type=path, help="folder to write (default: onnx in the folder of the model)")
    return parser


def require_packages() -> None:
    """Raises: InputError that says how to get the optional packages."""
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise InputError(f"{error.name} is missing: pip install onnx onnxscript onnxruntime") from None


def load_with_its_head(name: str, tokenizer) -> torch.nn.Module:
    """The model with the head that its configuration names; float32, ready to be asked."""
    architectures = load_config(name).architectures or []
    auto_class = getattr(transformers, architectures[0], None) if architectures else transformers.AutoModel
    if auto_class is None:
        raise InputError(f"{name}: its configuration names {architectures[0]}, which transformers does not have.")
    return load_for(auto_class, name, tokenizer, head_required=True).eval()


class FirstOutputs(torch.nn.Module):
    """A model as a function of plain tensors: its logits, or without a head its last hidden states.

    Args:
        pooling: of an encoder: adds a vector for each text.
    """

    def __init__(self, model: torch.nn.Module, pooling: Pooling | None = None) -> None:
        super().__init__()
        self.model, self.pooling = model, pooling

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, token_type_ids: torch.Tensor | None = None
    ):
        types = {} if token_type_ids is None else {"token_type_ids": token_type_ids}
        output = self.model(input_ids=input_ids, attention_mask=attention_mask, **types)
        if "start_logits" in output:
            return output.start_logits, output.end_logits
        if "logits" in output:
            return output.logits
        hidden = output.last_hidden_state
        return (hidden, self.pooling(hidden, attention_mask)) if self.pooling else hidden


def first_of(outputs: torch.Tensor | tuple[torch.Tensor, ...]) -> torch.Tensor:
    return outputs[0] if isinstance(outputs, tuple) else outputs


def export(model: torch.nn.Module, tokenizer, folder: Path, fp16: bool = False, pooling: Pooling | None = None) -> None:
    """Writes FLOAT32, INT8 and, if wanted, FLOAT16 to `folder`; each appears whole or not at all.

    Args:
        pooling: of an encoder: makes the second output, `sentence_embedding`.
    """
    batch = encode_batch(tokenizer, model, TEXTS[:2])
    module = FirstOutputs(model, pooling).eval()
    with torch.no_grad():
        output = model(**batch)
    names = [name for name in ("start_logits", "end_logits", "logits") if name in output] or ["last_hidden_state"]
    names += ["sentence_embedding"] if pooling else []
    with replacing_files(folder) as temporary, _quietly():
        plain = temporary / FLOAT32
        torch.onnx.export(
            module,
            tuple(batch.values()),
            plain,
            input_names=list(batch),
            output_names=names,
            dynamic_shapes={name: dict.fromkeys((0, 1), torch.export.Dim.AUTO) for name in batch},
            dynamo=True,
            external_data=False,
            verbose=False,
        )
        quantize(plain, temporary / INT8)
        if fp16:
            halve(plain, temporary / FLOAT16)


def halve(plain: Path, halved: Path) -> None:
    """All in float16, but for what goes in and comes out."""
    import onnx
    from onnxruntime.transformers.float16 import convert_float_to_float16

    model = onnx.load(plain)
    del model.graph.value_info[:]  # types of weights among them, which the conversion changes
    onnx.save(convert_float_to_float16(model, keep_io_types=True, disable_shape_infer=True), halved)


def quantize(plain: Path, quantized: Path) -> None:
    """Weights in 8 bits, one scale a column; activations are quantized as they come, so no data is needed for it.

    The weights are unsigned, since sums with signed ones saturate on CPUs without VNNI (onnxruntime's issue 14642): on
    such a CPU, signed weights moved the outputs of a 12-layer BERT by 17 % of their deviation, unsigned ones by 11 %.
    """
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    kinds = ["MatMul", "Gemm", "Gather"]  # products and tables of embeddings
    model = onnx.load(plain)
    del model.graph.value_info[:]  # shapes of weights among them, which older versions transpose and then find wrong
    quantize_dynamic(model, quantized, weight_type=QuantType.QUInt8, per_channel=True, op_types_to_quantize=kinds)


@contextlib.contextmanager
def _quietly():
    """The exporters warn at length about their own future."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(sys.stderr):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


class OnnxModel:
    """An exported file as a function.

    Args:
        file: of `export`.
        n_threads: to use; 0: as many as ONNX Runtime likes.
        output: which to return; None: the first.
    """

    def __init__(self, file: Path, n_threads: int = 0, output: str | None = None) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = n_threads
        options.log_severity_level = 3
        try:
            self.session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # each part of ONNX Runtime has its own errors
            raise InputError(
                f"{file} is not an ONNX model, or is damaged ({reason_of(error, 80)}); make it again with "
                f"scripts/export_onnx.py."
            ) from None
        self.names = [part.name for part in self.session.get_inputs()]
        self.output = output or self.session.get_outputs()[0].name

    def __call__(self, batch: dict[str, torch.Tensor]) -> np.ndarray:
        """The output, float32."""
        return self.session.run([self.output], {name: batch[name].numpy() for name in self.names})[0]


def deviation(output: np.ndarray, expected: np.ndarray) -> float:
    """The root mean square of the difference, as a share of the standard deviation of what is expected."""
    return float(np.sqrt(np.mean((output - expected) ** 2)) / expected.std())


def export_and_compare(
    model: torch.nn.Module, tokenizer, folder: Path, fp16: bool, pooling: Pooling | None
) -> Iterator[str]:
    """A line for each file that was written, with its size and how far its outputs are from PyTorch's."""
    export(model, tokenizer, folder, fp16, pooling)
    batch = encode_batch(tokenizer, model, TEXTS)
    with torch.no_grad():
        expected = first_of(FirstOutputs(model)(**batch)).numpy()
    attended = batch["attention_mask"].bool().numpy()
    for name in (FLOAT32, INT8, *([FLOAT16] if fp16 else [])):
        output = OnnxModel(folder / name)(batch)
        chosen = attended if output.shape[:2] == attended.shape else ...  # one output for each token, or for each text
        apart = deviation(output[chosen], expected[chosen])
        megabytes = (folder / name).stat().st_size / 1e6
        yield f"{folder / name}: {megabytes:.1f} MB, its outputs deviate by {100 * apart:.2g} % from PyTorch's"


@utils.command_line(make_parser)
def main(args: argparse.Namespace) -> None:
    require_packages()
    if args.output_dir is None and not Path(args.model).is_dir():
        raise InputError(f"{args.model} is not a local folder: name one for the files with --output_dir.")
    folder = Path(args.output_dir or Path(args.model) / "onnx")
    check_output_folder(folder, "--output_dir")
    tokenizer = load_tokenizer(args.tokenizer_name or args.model)
    if args.encoder:
        model, pooling = load_for(transformers.AutoModel, args.model, tokenizer).eval(), pooling_of(args.model)
    else:
        model, pooling = load_with_its_head(args.model, tokenizer), None
    logger.info("exporting %s (%s)", args.model, type(model).__name__)
    for line in export_and_compare(model, tokenizer, folder, args.fp16, pooling):
        print(line)


if __name__ == "__main__":
    raise SystemExit(main())

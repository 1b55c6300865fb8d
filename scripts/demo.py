"""Makes a folder of static files, with a page that runs models in the browser: teacher and student side by side.

    python scripts/demo.py --models bert-base-uncased serialization_dir/my_first_training --output_dir demo
    python -m http.server --directory demo

What the page does follows from the models' head: it guesses masked words, labels a text, or, without a head, compares
two texts by the cosine of their vectors. The models run in int8, on Transformers.js and WebAssembly; no text
leaves the browser, and no network is needed. The library comes from npm, which must be installed; with --cdn, the page
loads it from a CDN instead.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from export_onnx import FLOAT32, export, load_with_its_head, require_packages

import utils
from corpus.tokenization import load_tokenizer
from files.atomic import atomic_folder
from files.json_reader import read_json
from files.paths import check_new_folder
from models.loading import save_model
from models.sentence_encoder import Pooling, pooling_of
from utils import InputError, RunError, logger, path, reason_of

LIBRARY, VERSION = "@huggingface/transformers", "4.3.2"  # Transformers.js
RUNTIME = "onnxruntime-web"
RUNTIME_FILES = ("ort-wasm-simd-threaded.asyncify.mjs", "ort-wasm-simd-threaded.asyncify.wasm")
CDN = f"https://cdn.jsdelivr.net/npm/{LIBRARY}@{VERSION}/dist/transformers.min.js"
PAGE = Path(__file__).with_name("demo.html")
TASKS = {"MaskedLM": "fill-mask", "SequenceClassification": "text-classification", "Model": "feature-extraction"}
NPM_SECONDS = 300


def make_parser() -> argparse.ArgumentParser:
    parser = utils.make_parser(__doc__)
    add = parser.add_argument
    add("--models", type=path, nargs="+", required=True, help="two hub names or folders of models with the same head")
    add("--output_dir", type=path, required=True, help="new folder for the page and everything it needs")
    add("--cdn", action="store_true", help="load the library from a CDN: a smaller folder, but it needs a network")
    return parser


def task_of(model) -> str:
    """What Transformers.js calls the model's task. Raises: InputError if the page has none for it."""
    name = type(model).__name__
    for head, task in TASKS.items():
        if name.endswith(head):
            return task
    raise InputError(f"{model.name_or_path} is a {name}; the page shows masked words, labels of texts, and encoders.")


def add_model(name: str, folder: Path) -> dict:
    """Writes a model in int8 with its tokenizer. Returns what the page says of it."""
    tokenizer = load_tokenizer(name)
    model = load_with_its_head(name, tokenizer)
    task, title = task_of(model), Path(name).name
    target = folder / "models" / title
    target.mkdir(parents=True)
    save_model(model, tokenizer, target)
    (target / "model.safetensors").unlink()
    export(model, tokenizer, target / "onnx")
    (target / "onnx" / FLOAT32).unlink()
    n_bytes = sum(file.stat().st_size for file in (target / "onnx").iterdir())
    logger.info("%s: %s, %.0f MB in int8", title, task, n_bytes / 1e6)
    pooling = pooling_of(name) or Pooling()
    return {"name": title, "task": task, "pooling": pooling.mode, "megabytes": round(n_bytes / 1e6)}


def add_library(folder: Path) -> None:
    """Fetches Transformers.js, and the WebAssembly that it runs on, from npm."""
    folder.mkdir()
    with tempfile.TemporaryDirectory() as name:
        library = unpacked(f"{LIBRARY}@{VERSION}", Path(name) / "library")
        needs = read_json(library / "package.json", {"dependencies": {RUNTIME: str}})["dependencies"]
        runtime = unpacked(f"{RUNTIME}@{needs[RUNTIME]}", Path(name) / "runtime")
        shutil.copy(library / "dist" / "transformers.min.js", folder)
        for file in RUNTIME_FILES:
            shutil.copy(runtime / "dist" / file, folder)


def unpacked(package: str, folder: Path) -> Path:
    """Where the files of an npm package lie. Raises: InputError without npm, RunError if it can't fetch the package."""
    folder.mkdir()
    command = ["npm", "pack", "--silent", "--pack-destination", str(folder), package]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=NPM_SECONDS)
    except FileNotFoundError:
        raise InputError(
            "npm is not installed, and the library comes from it; install Node.js, or use --cdn."
        ) from None
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        raise RunError(f"npm could not fetch {package} ({reason_of(error)}); try again, or use --cdn.") from None
    with tarfile.open(next(folder.glob("*.tgz"))) as archive:
        archive.extractall(folder, filter="data")
    return folder / "package"


@utils.command_line(make_parser)
def main(args: argparse.Namespace) -> None:
    require_packages()
    check_new_folder(args.output_dir, "--output_dir")
    if len(args.models) > 2:
        raise InputError("--models: the page shows one model, or two side by side.")
    utils.distinct_names(args.models, "--models")
    with atomic_folder(Path(args.output_dir)) as folder:
        models = [add_model(name, folder) for name in args.models]
        if len({model["task"] for model in models}) > 1:
            raise InputError(f"--models: {' and '.join(args.models)} have different heads.")
        if not args.cdn:
            add_library(folder / "library")
        page = {"models": models, "library": CDN if args.cdn else "./library/transformers.min.js", "cdn": args.cdn}
        # A name of a model must not end the script in which it stands.
        text = PAGE.read_text().replace('"THE PAGE"', json.dumps(page).replace("<", "\\u003c"))
        (folder / "index.html").write_text(text)
    logger.info(
        "%s: python -m http.server --directory %s, then http://localhost:8000", args.output_dir, args.output_dir
    )


if __name__ == "__main__":
    raise SystemExit(main())

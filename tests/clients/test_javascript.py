"""Transformers.js, under Node.js and in a browser, answers as PyTorch does: `bash scripts/test.sh --clients`.

Needs npm, and Chromium for the page; scripts/test.sh installs the packages into work/clients.
"""

import contextlib
import functools
import http.server
import json
import shutil
import threading

import demo
import export_onnx
import pytest
import torch
from processes import run_command
from transformers import AutoModel, AutoModelForSequenceClassification, pipeline
from workspace import ROOT, load_tokenizer, run

PACKAGES = ROOT / "work" / "clients"
TEXT = "the cat [MASK] the garden in the morning"
ASK = """
import {{ pipeline, env }} from '@huggingface/transformers';
Object.assign(env, {{ allowRemoteModels: false, localModelPath: '{folder}/' }});
const run = await pipeline('{task}', '{name}', {options});
const output = await run({text}, {call});
console.log(JSON.stringify(output.tolist ? output.tolist() : output));
"""
BROWSE = """
import {{ chromium }} from 'playwright-core';
const browser = await chromium.launch({{ executablePath: '{chromium}', args: ['--no-sandbox', '--disable-gpu'] }});
const page = await browser.newPage(), outside = [];
page.on('request', (request) => outside.push(request.url()));
await page.goto('{address}');
await page.waitForSelector('body[data-ready]', {{ timeout: 90000 }});
await page.fill('textarea', 'the cat ___ the garden in the morning');
await page.waitForTimeout(2000);
const sections = await page.locator('section').allInnerTexts();
const ready = await page.evaluate('document.body.dataset.ready');
console.log(JSON.stringify({{ ready, sections, outside }}));
await browser.close();
"""


def node(script, tmp_path):
    file = PACKAGES / f"{tmp_path.name}.mjs"  # beside node_modules, where imports are looked for
    file.write_text(script)
    try:
        result = run_command(["node", file])
    finally:
        file.unlink()
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def ask(folder, task, tmp_path, text, call="{}", dtype="fp32"):
    options = json.dumps({"dtype": dtype} if dtype else {})
    return node(
        ASK.format(
            folder=folder.parent, name=folder.name, task=task, options=options, text=json.dumps(text), call=call
        ),
        tmp_path,
    )


def test_masked_words(tmp_path, student):
    run(export_onnx, "--model", student)
    expected = pipeline("fill-mask", str(student), top_k=5)(TEXT)
    found = ask(student, "fill-mask", tmp_path, TEXT, "{ top_k: 5 }")
    assert [guess["token"] for guess in found] == [guess["token"] for guess in expected]
    assert [guess["score"] for guess in found] == pytest.approx([guess["score"] for guess in expected], abs=1e-4)
    assert len(ask(student, "fill-mask", tmp_path, TEXT, "{ top_k: 5 }", dtype="q8")) == 5


def test_labels_of_a_text(tmp_path, student):
    folder = tmp_path / "classifier"
    torch.manual_seed(0)
    labels = {"id2label": {0: "cat", 1: "dog"}, "label2id": {"cat": 0, "dog": 1}}
    AutoModelForSequenceClassification.from_pretrained(student, **labels).save_pretrained(folder)
    load_tokenizer(student).save_pretrained(folder)
    run(export_onnx, "--model", folder)
    (expected,) = pipeline("text-classification", str(folder))(TEXT)
    (found,) = ask(folder, "text-classification", tmp_path, TEXT)
    assert found["label"] == expected["label"] and found["score"] == pytest.approx(expected["score"], abs=1e-4)


def test_embeddings(tmp_path, student):
    folder = tmp_path / "encoder"
    model = AutoModel.from_pretrained(student, dtype=torch.float32).eval()
    model.save_pretrained(folder)
    load_tokenizer(student).save_pretrained(folder)
    run(export_onnx, "--model", folder, "--encoder")
    with torch.no_grad():
        states = model(**load_tokenizer(folder)("a dog", return_tensors="pt")).last_hidden_state
    expected = torch.nn.functional.normalize(states.mean(1), dim=-1)[0]
    (found,) = ask(folder, "feature-extraction", tmp_path, "a dog", "{ pooling: 'mean', normalize: true }")
    torch.testing.assert_close(torch.tensor(found), expected, atol=1e-4, rtol=0)


@contextlib.contextmanager
def served(folder):
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=folder)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


def test_the_page_guesses_words_and_asks_no_one_else(tmp_path, workspace, student):
    run(demo, "--models", workspace / "bert-base-uncased", student, "--output_dir", tmp_path / "page")
    with served(tmp_path / "page") as address:
        found = node(BROWSE.format(chromium=shutil.which("chromium"), address=address), tmp_path)
    assert found["ready"] == "yes"
    assert all(name.startswith((address, "blob:", "data:")) for name in found["outside"])
    for name, section in zip(("bert-base-uncased", "student"), found["sections"], strict=True):
        title, state, *guesses = section.splitlines()
        assert title == name and " ms, " in state and len(guesses) == 10  # five words and their shares

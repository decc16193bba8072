"""The page of what answers retrieved."""

import json
import re
import shutil
import subprocess
from types import SimpleNamespace

import pytest
import torch

from hsa_lab.reading import RetrievalRecorder
from hsa_lab.viewer import Answer, write_page


BROWSERS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
WORDS = ["</script>", "the", "key", "is", "48213", "&", "rain", "fell"]
CONFIG = SimpleNamespace(chunk_size=2, layer_types=["sliding_attention", "hsa", "sliding_attention", "hsa"])


class Tokenizer:
    def decode(self, tokens: list[int]) -> str:
        return " ".join(WORDS[token] for token in tokens)


@pytest.fixture
def page(tmp_path):
    """Two tokens of an answer, two layers, two chunks each; the second layer retrieves chunk 3 for the first token."""
    recorder = RetrievalRecorder(None, 0)
    chunks = torch.tensor([[[[[1, 0]], [[3, -1]]], [[[2, 1]], [[2, 0]]]]])  # [B, tokens, layers, heads, K]
    weights = torch.tensor([[[[[0.9, 0.1]], [[1.0, 0.0]]], [[[0.6, 0.4]], [[0.5, 0.5]]]]])
    recorder.calls.append((chunks, weights))
    file = tmp_path / "new" / "page.html"
    write_page(
        file, "notes", "8 tokens", list(range(8)), [Answer("What?", [4, 1], recorder, "(right)")], Tokenizer(), CONFIG
    )
    return file


def test_page_has_the_document_and_what_each_token_retrieved(page):
    text = page.read_text(encoding="utf-8")
    assert not re.search(r"https?:|\bsrc=|@import|url\(", text)  # it needs nothing else
    data = re.search(r'<script id="data" type="application/json">(.*?)</script>', text, flags=re.DOTALL)[1]
    data = json.loads(data)
    assert data["chunks"] == ["</script> the", "key is", "48213 &", "rain fell"] and data["layers"] == [1, 3]
    (answer,) = data["answers"]
    assert (answer["question"], answer["note"]) == ("What?", "(right)")
    first, second = answer["tokens"]
    assert first == {"text": "48213", "layers": [[[1, 0.9], [0, 0.1]], [[3, 1.0]]]}
    assert second == {"text": "the", "layers": [[[2, 0.6], [1, 0.4]], [[2, 0.5], [0, 0.5]]]}


def test_page_lights_what_the_first_token_retrieved(page, tmp_path):
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip("needs Chromium")
    words = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}", "--dump-dom", page.as_uri()]
    run = subprocess.run([browser, *words], capture_output=True, text=True, timeout=120)
    shown = re.search(r'<main id="document">(.*?)</main>', run.stdout, flags=re.DOTALL)[1]
    spans = re.findall(r"<span([^>]*)>(.*?)</span>", shown)
    assert [text for _, text in spans] == ["&lt;/script&gt; the", "key is", "48213 &amp;", "rain fell"]
    lit = [re.findall(r"weight ([\d.]+)", attributes) for attributes, _ in spans]
    assert lit == [["0.05"], ["0.45"], [], ["0.50"]]  # the mean of both layers
    passages = re.search(r'<ol id="passages">(.*?)</ol>', run.stdout, flags=re.DOTALL)[1]
    assert re.findall(r"<b>([\d.]+)", passages) == ["0.50", "0.45", "0.05"]

"""
What answers retrieved, as a page: the document, with the passages lit that the token under the pointer retrieved. One
file, which needs nothing else.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from .reading import RetrievalRecorder


TEMPLATE = Path(__file__).with_name("viewer.html")
LEAST_WEIGHT = 0.005  # of what is kept


class Answer(NamedTuple):
    """A question, the new tokens after it with the record of what was retrieved for each, and a remark on them."""

    question: str
    tokens: Sequence[int]
    recorder: RetrievalRecorder
    note: str = ""


def retrieved(recorder: RetrievalRecorder, token: int, layers: int) -> list[list[tuple[int, float]]]:
    """Of one token, for every HSA layer: its chunks with their weights."""
    steps = slice(token, token + 1)
    return [
        [(c, round(w, 3)) for c, w in recorder.weights(layer, steps).items() if w >= LEAST_WEIGHT]
        for layer in range(layers)
    ]


def write_page(
    file: Path, title: str, about: str, document: Sequence[int], answers: Sequence[Answer], tokenizer, config
) -> None:
    """
    Writes the page of the tokens `document` and the answers about it. `config`: the configuration of the HSA model,
    which says how long chunks are and which layers retrieve.
    """
    size, layers = config.chunk_size, [index for index, kind in enumerate(config.layer_types) if kind == "hsa"]
    data = {
        "title": title,
        "about": about,
        "layers": layers,
        "chunks": [tokenizer.decode(document[i : i + size]) for i in range(0, len(document), size)],
        "answers": [
            {
                "question": answer.question,
                "note": answer.note,
                "tokens": [
                    {"text": tokenizer.decode([token]), "layers": retrieved(answer.recorder, i, len(layers))}
                    for i, token in enumerate(answer.tokens)
                ],
            }
            for answer in answers
        ],
    }
    text = json.dumps(data, ensure_ascii=False).replace("<", "\\u003c")  # so that no text ends the script
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(TEMPLATE.read_text(encoding="utf-8").replace("DATA", text, 1), encoding="utf-8")

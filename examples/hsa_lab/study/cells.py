"""
The tables of the study as data: a cell is a model, with what is changed of it, of its training or of its tests.

Every cell is trained on the same rows as the others of its table, 56M tokens in all: rows of 512 and of 1,024 tokens,
in which every chunk is retrieved, then rows of 4,096 with the `chunk_topk` of the cell. All models of a scale are as
large as its reference to 2 %.
"""

from dataclasses import dataclass, field

from .models import MODELS, REFERENCE


MULTIPLES = (1, 4, 16, 64, 256)  # of the training length of the reference, at which cells are tested


@dataclass(frozen=True)
class Cell:
    """
    Attributes:
        model: of `MODELS`.
        fields: of its configuration, changed.
        stages: fields of every stage of training, changed; "length", of rows, only of the last.
        deviations: of parameters at the start, by name, away from that of the model.
        tests: how it is tried, by name: fields that are changed after training. By default those of the model.
        text_only: trained on text without retrieval tasks, and tried on text.
        scale: of `SCALES`; by default that of the command.
    """

    model: str = "hsa"
    fields: dict = field(default_factory=dict)
    stages: dict = field(default_factory=dict)
    deviations: dict[str, float] = field(default_factory=dict)
    tests: dict[str, dict] | None = None
    text_only: bool = False
    scale: str | None = None

    def all_tests(self) -> dict[str, dict]:
        return MODELS[self.model].tests if self.tests is None else self.tests


@dataclass(frozen=True)
class Table:
    title: str
    cells: dict[str, Cell]
    multiples: tuple[int, ...] = MULTIPLES


@dataclass(frozen=True)
class Scale:
    """
    Attributes:
        base: fields of the reference.
        learning_rate: of the optimizer.
        tokens: that the three stages train on.
        lengths: of their rows.
        batch_tokens: of their batches.
        samples: of each retrieval task, by multiple of the last length.
        text_lengths: of context, for the perplexity.
        windows: of text, for the perplexity.
        log_every: batches.
        multiples: of the last length, at which retrieval is tried; None: those of the table.
        is_sized: whether models are as large as the reference.
    """

    base: dict
    learning_rate: float = 0.003
    tokens: tuple[int, int, int] = (16_000_000, 8_000_000, 32_000_000)
    lengths: tuple[int, int, int] = (512, 1024, 4096)
    batch_tokens: tuple[int, int, int] = (32768, 32768, 65536)
    samples: dict[int, int] = field(default_factory=lambda: {1: 64, 4: 32, 16: 16, 64: 8, 256: 4})
    text_lengths: tuple[int, ...] = (256, 1024, 4096, 16384, 65536)
    windows: int = 64
    log_every: int = 25
    multiples: tuple[int, ...] | None = None
    is_sized: bool = True


SCALES = {
    "10M": Scale(REFERENCE),
    "2.5M": Scale(
        REFERENCE
        | {"hidden_size": 128, "intermediate_size": 352, "num_attention_heads": 2, "retrieval_dim": 64}
    ),
    "40M": Scale(
        REFERENCE
        | {"hidden_size": 512, "intermediate_size": 1408, "num_attention_heads": 8, "num_key_value_heads": 4,
           "retrieval_dim": 256},
        learning_rate=0.002,
    ),
    # A hundredth of the training, and one sample each: how long a run takes, and whether it fits.
    "short": Scale(
        REFERENCE,
        tokens=(1 << 18, 1 << 18, 1 << 18),
        samples=dict.fromkeys(MULTIPLES, 1),
        windows=4,
        log_every=2,
    ),
    # Nothing is learned: it shows that every part runs.
    "toy": Scale(
        REFERENCE
        | {"hidden_size": 64, "intermediate_size": 96, "sliding_window": 64, "chunk_size": 16, "retrieval_dim": 16,
           "state_size": 16, "mamba_head_dim": 16, "vocab_size": 400},
        tokens=(512, 512, 1024),
        lengths=(256, 256, 512),
        batch_tokens=(512, 512, 1024),
        samples=dict.fromkeys(MULTIPLES, 1),
        text_lengths=(64, 256),
        windows=2,
        log_every=1,
        multiples=(1, 4),
        is_sized=False,
    ),
}  # fmt: skip


def make_stages(cell: Cell, scale: Scale, chunk_size: int) -> list[dict]:
    """The stages of the recipe of a cell."""
    short = {"items": 6, "kinds": ["number", "ids"]}
    mixtures = (
        _two_distances(short, near=90, far=160, shares=(0.2, 0.8)),
        _two_distances({"items": 10}, near=90, far=160, shares=(0.2, 0.8)),
        _LONG,
    )
    stages = []
    for i, (length, tokens) in enumerate(zip(scale.lengths, scale.tokens)):
        stage = {
            "name": ("short", "middle", "long")[i], "length": length, "batch_tokens": scale.batch_tokens[i],
            "most_tokens": tokens, "retrieval_weight": 0.5,
            "mixture": [dict(task) for task in (_TEXT if cell.text_only else mixtures[i])],
        }  # fmt: skip
        if i < 2:  # every chunk is retrieved
            stage["chunk_topk"] = min(128, -(-length // chunk_size))
        else:
            stage["final_learning_rate"] = 0.05
        changes = dict(cell.stages)
        if changes.pop("length", None) and i == 2:
            changes["length"] = cell.stages["length"] * length // SCALES["10M"].lengths[2]
        stages.append(stage | changes | ({"retrieval_weight": 0.0} if cell.text_only else {}))
    return stages


def _two_distances(options: dict, near: int, far: int, shares: tuple[float, float]) -> list[dict]:
    """Questions whose needles are in the window, and beyond it."""
    return [
        {"name": "near", "task": "dense", "share": shares[0], "options": {**options, "max_distance": near}},
        {"name": "far", "task": "dense", "share": shares[1], "options": {**options, "min_distance": far}},
    ]


_TEXT = [
    {"name": "text", "task": "text", "share": 0.6},
    {"name": "texts 8", "task": "text", "share": 0.4, "options": {"parts": 8}},
]
_LONG = [
    {"name": "text", "task": "text", "share": 0.15},
    {"name": "texts 8", "task": "text", "share": 0.15, "options": {"parts": 8}},
    {"name": "texts 3", "task": "text", "share": 0.1, "options": {"parts": 3}},
    {"name": "dense", "task": "dense", "share": 0.25, "options": {"items": 24, "parts": 4}},
    {"name": "near", "task": "dense", "share": 0.05, "options": {"items": 24, "parts": 4, "max_distance": 60}},
    {"name": "s_niah", "task": "s_niah", "share": 0.07},
    {"name": "s_niah near", "task": "s_niah", "share": 0.03, "options": {"max_distance": 60}},
    {"name": "mq_niah", "task": "mq_niah", "share": 0.1},
    {"name": "vt", "task": "vt", "share": 0.1, "options": {"score": "all"}},
]


def _principles() -> dict[str, Cell]:
    """
    Encoder depth x landmark x residual, where without an encoder there is no CLS; and CLS tokens that start at zero or
    large, instead of with the deviation 0.02.
    """
    cells = {}
    for depth, landmark in ((1, "cls"), (1, "mean"), (0, "mean"), (2, "cls"), (2, "mean")):
        for residual in ("bypass", "standard"):
            fields = {"num_encoder_layers": depth, "chunk_landmark": landmark, "hsa_residual": residual}
            cells[f"{depth} layers, {landmark}, {residual}"] = Cell(fields=fields)
    for deviation in (0.0, 1.0):
        cells[f"CLS of deviation {deviation:g}"] = Cell(deviations={"model.chunk_encoder.cls_token": deviation})
    return cells


_ALL_K = (2, 4, 8, 16, 32, 64)
_NO_LOSS = {"retrieval_weight": 0.0}
_MASS = MODELS["mass"].fields

TABLES = {
    "a": Table("The three principles: encoder depth, landmark, residual", _principles()),
    "b": Table(
        "Chunks per token in training and in the test (64: every chunk of the training length)",
        {
            f"K {k} in training": Cell(
                fields={"chunk_topk": k}, tests={f"K {test} in the test": {"chunk_topk": test} for test in _ALL_K}
            )
            for k in _ALL_K
        },
        multiples=(1, 16, 64),
    ),
    "c": Table(
        "Lengths, sizes and numbers",
        {
            **{f"training length {n}": Cell(stages={"length": n}) for n in (1024, 2048, 4096, 8192)},
            **{f"{n} tokens per retrieval": Cell(fields={"retrieval_stride": n}) for n in (8, 64)},
            **{
                f"chunks of {n}": Cell(fields={"chunk_size": n, "chunk_topk": 512 // n}) for n in (16, 32, 128)
            },
            **{f"window {n}": Cell(fields={"sliding_window": n}) for n in (512, 2048)},
            **{f"{n} groups": Cell(fields={"num_upper_groups": n}) for n in (1, 4)},
            **{f"{n} retrieval heads": Cell(fields={"num_retrieval_heads": n}) for n in (2, 4)},
            **{f"retrieval dim {n}": Cell(fields={"retrieval_dim": n}) for n in (32, 256)},
        },
        multiples=(1, 16, 64),
    ),
    "d": Table(
        "Weights of chunks, with and without the loss on retrieval",
        {
            "softmax": Cell(),
            "softmax, no loss": Cell(stages=_NO_LOSS),
            "stick-breaking": Cell(fields={"chunk_weighting": "stick_breaking"}),
            "stick-breaking, no loss": Cell(fields={"chunk_weighting": "stick_breaking"}, stages=_NO_LOSS),
            "joint, no loss": Cell(fields={"chunk_weighting": "joint"}, stages=_NO_LOSS),
            "mass": Cell("mass"),
            "mass, no loss": Cell("mass", stages=_NO_LOSS),
            "joint by mass, no loss": Cell(fields={**_MASS, "chunk_weighting": "joint"}, stages=_NO_LOSS),
            "distance penalty 0.4": Cell(fields={"retrieval_distance_penalty": 0.4}),
        },
        multiples=(1, 16, 64),
    ),
    "e": Table("Models against each other", {name: Cell(name) for name in MODELS}),
    "e-text": Table(
        "The same models, trained on text alone", {name: Cell(name, text_only=True) for name in MODELS}
    ),
    "f": Table(
        "Scale",
        {
            f"{name}, {scale}": Cell(model, fields, scale=scale)
            for scale in ("2.5M", "10M", "40M")
            for name, model, fields in (
                ("hsa", "hsa", {}),
                ("standard residual", "hsa", {"hsa_residual": "standard"}),
                ("mean landmark", "hsa", {"chunk_landmark": "mean"}),
                ("full", "full", {}),
                ("window", "window", {}),
            )
        },
        multiples=(1, 16, 64),
    ),
}  # fmt: skip

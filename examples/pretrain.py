"""
Pretrain a small HSA model to retrieve: text with questions about earlier text mixed in, in stages that grow. Or
another model, to compare with.

    python examples/prepare.py corpus --train_files books/train-*.jsonl.gz --vocab_size 4096 --output out/corpus
    python examples/pretrain.py --recipe examples/recipes/books.json --corpus out/corpus --output out/books
    python examples/pretrain.py --recipe examples/recipes/books.json --corpus out/corpus --output out/books --resume
    torchrun --nproc_per_node 8 examples/pretrain.py --recipe ...

A recipe (`hsa_lab/training/recipe.py`) names the model, the optimizer and the stages. Its batches are shared out over
the processes and `--gradient_accumulation_steps`, in micro-batches, each made from the seed, the stage and its number
alone, so a run that was stopped (`--minutes`, or the interrupt key) goes on as if it had not been. `--output` then
holds the model, its tokenizer, a checkpoint, log.jsonl and training.png. Of every HSA layer the log has the `recall`
of the chunks that answers are copied from, and their mean `weight` among the retrieved.
"""

from pathlib import Path

from hsa_lab.commands import add_device_flag, at_least, make_parser, run
from hsa_lab.training.run import Run


def main(words: list[str] | None = None) -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--recipe", type=Path, required=True, help="JSON file")
    parser.add_argument("--corpus", type=Path, required=True, help="folder that `prepare.py corpus` wrote")
    parser.add_argument("--output", type=Path, required=True, help="folder for the model and all else")
    parser.add_argument("--resume", action="store_true", help="go on with the run in --output, if there is one")
    parser.add_argument("--minutes", type=float, default=1e9, help="stop and save after so many minutes")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and the batches")
    add_device_flag(parser)
    parser.add_argument(
        "--mixed_precision",
        choices=("auto", "no", "bf16"),
        default="auto",
        help="auto: bf16 on CUDA; weights are fp32",
    )
    parser.add_argument(
        "--gradient_accumulation_steps", type=at_least(1), default=1, help="micro-batches of a process in a batch"
    )
    parser.add_argument("--attn_implementation", help="sdpa, flex_attention, ...; by default that of the model")
    parser.add_argument("--workers", type=at_least(0), default=2, help="processes that make batches")
    parser.add_argument("--save_minutes", type=float, default=10, help="between checkpoints, beside that at the end")
    parser.add_argument("--log_every", type=at_least(1), default=50, help="batches")
    parser.add_argument("--max_shard_size", default="5GB", help="largest file of the model's weights")
    parser.add_argument(
        "--compile",
        action="store_true",
        help="with torch.compile, which takes its time at the start and in stages of another length or chunk_topk",
    )
    Run(parser.parse_args(words)).run()


if __name__ == "__main__":
    run(main)

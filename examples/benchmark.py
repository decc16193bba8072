"""
Measure time and memory of HSA models, their operations and their peers, and whether retrieval learns.

    python examples/benchmark.py kernels --output benchmarks/results/gpu
    python examples/benchmark.py cpu --help

Every command writes a file of results with hardware, versions and commit, and plots.
"""

from hsa_lab.benchmarks import cpu, kernels, models, recall, sessions
from hsa_lab.commands import add_commands, make_parser, run


BENCHMARKS = {
    "kernels": (kernels.Kernels, kernels.__doc__),
    "models": (models.Models, models.__doc__),
    "cpu": (cpu.Cpu, cpu.__doc__),
    "sessions": (sessions.Sessions, sessions.__doc__),
    "recall": (recall.Recall, recall.__doc__),
}


def main(words: list[str] | None = None) -> None:
    parser = make_parser(__doc__)
    commands = add_commands(parser, {name: doc for name, (_, doc) in BENCHMARKS.items()})
    for name, (kind, _) in BENCHMARKS.items():
        kind.add_arguments(commands[name])
    arguments = parser.parse_args(words)
    kind, _ = BENCHMARKS[arguments.command]
    kind(arguments).run()
    print(f"Results are in {arguments.output}.")


if __name__ == "__main__":
    run(main)

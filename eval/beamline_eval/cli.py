"""The command line: one sub-command a module, and errors without tracebacks."""

import argparse
import os
import signal
import sys

from beamline_eval import __version__, baselines, compare, demo, evaluate, prepare, replay, report
from beamline_eval.errors import EvalError

COMMANDS = {"run": demo, "prepare": prepare, "evaluate": evaluate, "baselines": baselines, "compare": compare, "replay": replay,
            "report": report}


def parser():
    top = argparse.ArgumentParser(
        prog="beamline-eval",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Is this checkpoint good, is it better than that one, by how much, and at what cost? On the engine that serves it.",
        epilog="from nothing to a report on the demo world:\n  cargo build --release\n  beamline-eval run --out target/evaluation\n\n"
        "on your own data:\n  beamline-eval prepare sequences.txt --out data\n  beamline batch --checkpoint DIR data/requests.jsonl answers.jsonl\n"
        "  beamline-eval evaluate data answers.jsonl --catalog DIR/catalog.jsonl --out metrics.json\n"
        "  beamline-eval baselines data --out runs\n  beamline-eval compare data runs/co-occurrence.run answers.jsonl\n\n"
        "docs/EVALUATION.md has the protocol and its reasons.",
    )
    top.add_argument("--version", action="version", version=__version__)
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, module in COMMANDS.items():
        sub = commands.add_parser(
            name, help=module.HELP, description=module.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        module.add_arguments(sub)
        sub.set_defaults(action=module.main)
    return top


def reader_left():
    """Who reads the output has seen enough (`| head`). What is still buffered has nowhere to go."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 128 + signal.SIGPIPE


def main(arguments=None):
    arguments = parser().parse_args(arguments)
    try:
        # A command may have more to say than done: `replay` returns 1 when answers differ.
        status = arguments.action(arguments) or 0
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        return reader_left()
    except EvalError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())

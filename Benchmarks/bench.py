#!/usr/bin/env python3
"""Measures this library against diffusers in PyTorch eager: `make bench`, see Documentation/Benchmarks.md.

Two workers live as long as a row does: bench-runner (ours) and reference.py. Both set the same case up, their results
are compared, the reference's best variant is found, and then each runs the case once a round, in alternating order.
"""

import argparse, contextlib, datetime, json, os, platform, statistics, subprocess, sys, tempfile
from pathlib import Path

from limits import network_cost

ROOT = Path(__file__).resolve().parent.parent
HERE = ROOT / "Benchmarks"
MINI = ROOT / "Models/flux-mini"
PARITY = ROOT / "Tests/Fixtures/parity"
# Outputs and gradients against the reference's float32, relative 2-norm. bfloat16 alone moves gradients by more than
# that through six blocks: they may then be half as far off again as the reference's own bfloat16.
BOUND = {"float32": 1e-4, "bfloat16": 3e-2}
VARIANTS = [(d, a) for d in ("float32", "autocast", "bfloat16") for a in ("sdpa", "math")]


class Stop(Exception):
    pass


class Worker:
    """A process that answers one request a line."""

    def __init__(self, name, command, threads):
        self.name = name
        environment = os.environ | {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, cwd=ROOT)

    def __call__(self, operation, **request):
        self.process.stdin.write(json.dumps({"op": operation} | request) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise Stop(f"{self.name} ended with status {self.process.wait()} during {operation}")
        reply = json.loads(line)
        if "error" in reply:
            raise Stop(f"{self.name}, {operation}: {reply['error']}")
        return reply

    def cpu_seconds(self):
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def close(self):
        self.process.stdin.close()
        self.process.wait()


class Bench:
    def __init__(self, options):
        self.rounds, self.quick, self.threads = options.rounds, options.quick, options.threads
        self.scratch = Path(tempfile.mkdtemp(prefix="chunkgrpo-bench-"))
        self.rows = []
        with self.workers() as (_, reference):
            self.peaks = reference("probe")
        print(
            "peaks: " + ", ".join(f"{name} {self.peaks[name] / 1e9:.0f} GFLOP/s" for name in ("float32", "bfloat16"))
            + f", copy {self.peaks['bandwidth'] / 1e9:.1f} GB/s; one core's float32 {self.peaks['core'] / 1e9:.0f} GFLOP/s")

    @contextlib.contextmanager
    def workers(self):
        ours = Worker("bench-runner", [str(ROOT / "bin/bench-runner")], self.threads)
        reference = Worker("reference", [sys.executable, str(HERE / "reference.py")], self.threads)
        try:
            yield ours, reference
        finally:
            ours.close()
            reference.close()

    def floor(self, flops, size, dtype):
        """Seconds that the products need at the measured peak, or the bytes at the measured bandwidth."""
        return max(flops / self.peaks[dtype], size / self.peaks["bandwidth"])

    def best(self, worker, kind, variants, trials):
        """The fastest variant, set up last, and what each took."""
        times = {}
        for name, parameters in variants.items():
            worker("setup", kind=kind, parameters=parameters, warm=1)
            times[name] = min(worker("run")["seconds"] for _ in range(trials))
        winner = min(times, key=times.get)
        worker("setup", kind=kind, parameters=variants[winner], warm=2)
        return winner, times

    def alternate(self, workers):
        """Seconds of every round, ours and the reference's; an idle worker may not use the processor."""
        replies = ([], [])
        for i in range(self.rounds):
            for side in ((0, 1), (1, 0))[i % 2]:
                idle = workers[1 - side]
                before = idle.cpu_seconds()
                reply = workers[side]("run")
                spent = idle.cpu_seconds() - before
                if spent > max(0.05 * reply["seconds"], 0.03):
                    raise Stop(f"{idle.name} used {spent:.2f} s of processor time while {workers[side].name} was measured")
                replies[side].append(reply)
        return replies

    def add(self, name, ours, reference, floor=None, unit="s", **details):
        """Records a row from lists of measurements, or from a number each."""
        def middle(values):
            return statistics.median(values) if isinstance(values, list) else values

        a, b = middle(ours), middle(reference)
        for key, values in (("ours", ours), ("reference", reference)):
            if isinstance(values, list) and len(values) > 1:
                details[key + "_quartiles"] = [round(q, 6) for q in statistics.quantiles(values, n=4, method="inclusive")[::2]]
        row = {
            "id": name, "unit": unit, "ours": a, "reference": b, "ratio": b / a if a and b else None, "floor": floor,
            "share_of_floor": floor / a if floor and a else None,
            "command": f"make bench BENCH='--only {name} --rounds {self.rounds} --threads {self.threads}'",
            "date": datetime.date.today().isoformat(), "details": details,
        }
        self.rows.append(row)
        print(text_row(row), flush=True)

    # ------------------------------------------------------------------------------------------------------------ rows

    def compare(self, workers, kind, dtypes, ours, reference):
        """Throws unless every dtype of ours agrees with the reference's float32; returns the errors."""
        theirs, mine = str(self.scratch / "reference.safetensors"), str(self.scratch / "ours.safetensors")
        errors = {}
        own = {}
        workers[1]("setup", kind=kind, parameters=reference | {"dtype": "float32"}, warm=0)
        workers[1]("check", file=theirs)
        if "bfloat16" in dtypes and kind == "network":
            workers[1]("setup", kind=kind, parameters=reference | {"dtype": "bfloat16"}, warm=0)
            workers[1]("check", file=mine)
            own = workers[1]("compare", file=theirs, **{"with": mine})
        for dtype in dtypes:
            workers[0]("setup", kind=kind, parameters=ours | {"dtype": dtype}, warm=0)
            workers[0]("check", file=mine)
            errors[dtype] = workers[1]("compare", file=theirs, **{"with": mine})
            for key, error in errors[dtype].items():
                bound = BOUND[dtype]
                if dtype == "bfloat16" and key == "gradient":
                    bound = max(bound, 1.5 * own.get(key, 0))
                if not error <= bound:
                    raise Stop(f"{kind}: {key} in {dtype} differs from the reference by {error:.1e}, at most {bound:.1e} is allowed")
        print("  agrees: " + "; ".join(f"{d} " + ", ".join(f"{k} {e:.1e}" for k, e in es.items()) for d, es in errors.items()), flush=True)
        return errors

    def network(self, name, folder, family, grid, text_tokens, batch, train=None, dtypes=("float32", "bfloat16"), variants=VARIANTS):
        shape = {"folder": str(folder), "family": family, "grid": grid, "textTokens": text_tokens, "batch": batch, "train": train}
        shape = {k: v for k, v in shape.items() if v is not None}
        inputs = str(self.scratch / f"{name}.safetensors")
        with self.workers() as workers:
            workers[1]("inputs", kind="network", parameters=shape, file=inputs)
            shape["inputs"] = inputs
            errors = self.compare(workers, "network", dtypes, shape, shape)
            trials = 1 if self.quick else 3
            ours, _ = self.best(workers[0], "network", {d: shape | {"dtype": d} for d in dtypes}, trials)
            options = {f"{d} {a}": shape | {"dtype": d, "attention": a} for d, a in variants}
            reference, times = self.best(workers[1], "network", options, trials)
            a, b = self.alternate(workers)
        config = json.loads((Path(folder) / "config.json").read_text())
        flops, size = network_cost(config, family, batch, grid, text_tokens, train, ours)
        self.add(
            name, seconds(a), seconds(b), self.floor(flops, size, ours), ours_variant=ours, reference_variant=reference,
            reference_seconds=times, errors=errors, gflop=round(flops / 1e9, 3), megabytes=round(size / 1e6, 1))


def seconds(replies):
    return [reply["seconds"] for reply in replies]


def mini(**shape):
    return lambda bench, name: bench.network(name, MINI / "transformer", "flux", [8, 8], 24, **shape)


def tiny(model, family, grid, text_tokens, train=None):
    return lambda bench, name: bench.network(name, PARITY / model / "transformer", family, grid, text_tokens, 24, train)


# Headlines are `mini.forward` and `mini.train`: batch 96, every weight trained, so that nothing but the model is measured.
ROWS = {
    "mini.forward": mini(batch=96),
    "mini.forward.24": mini(batch=24),
    "mini.train": mini(batch=96, train="full"),
    "mini.train.24": mini(batch=24, train="full"),
    "mini.train.lora": mini(batch=96, train="lora"),
    "mini.train.lora.24": mini(batch=24, train="lora"),
}


# ------------------------------------------------------------------------------------------------------------- results

HEADER = ["row", "ours", "reference", "ratio", "floor", "share of floor", "variants"]


def number(value, unit):
    if value is None:
        return "–"
    if unit == "s":
        return f"{value * 1e3:.1f} ms" if value < 1 else f"{value:.2f} s"
    return f"{value:.3g} {unit}".strip()


def cells(row):
    details = row["details"]

    def spread(key):
        text, quartiles = number(row[key], row["unit"]), details.get(key + "_quartiles")
        return f"{text} ({number(quartiles[0], row['unit'])} … {number(quartiles[1], row['unit'])})" if quartiles else text

    variants = [f"{side} {details[key]}" for side, key in (("ours", "ours_variant"), ("reference", "reference_variant")) if key in details]
    return [
        f"`{row['id']}`", spread("ours"), spread("reference"), f"{row['ratio']:.2f}×" if row["ratio"] else "–",
        number(row["floor"], row["unit"]), f"{row['share_of_floor']:.0%}" if row["share_of_floor"] else "–",
        "; ".join(variants + ([details["note"]] if "note" in details else [])),
    ]


def text_row(row):
    return "  ".join(c.ljust(w) for c, w in zip(cells(row), (22, 34, 34, 8, 10, 6, 0)))


def write(rows, machine):
    """Replaces these rows in results.json and the generated part of RESULTS.md."""
    file = HERE / "results.json"
    known = {row["id"]: row for row in (json.loads(file.read_text()) if file.exists() else [])}
    known |= {row["id"]: row | {"details": row["details"] | {"machine": machine}} for row in rows}
    ordered = sorted(known.values(), key=lambda row: list(ROWS).index(row["id"]) if row["id"] in ROWS else len(ROWS))
    replace(file, json.dumps(ordered, indent=1) + "\n")
    table = [HEADER, ["---"] * len(HEADER)] + [cells(row) for row in ordered]
    machines = "\n\n".join(dict.fromkeys(row["details"]["machine"] for row in ordered))
    text = machines + "\n\n" + "\n".join("| " + " | ".join(line) + " |" for line in table) + "\n"
    results = HERE / "RESULTS.md"
    begin, end = "<!-- begin: make bench -->", "<!-- end: make bench -->"
    old = results.read_text()
    if begin not in old or end not in old:
        raise Stop(f"{results}: the lines {begin} and {end} are missing; the table goes between them")
    replace(results, old.split(begin)[0] + begin + "\n" + text + end + old.split(end, 1)[1])


def replace(file, text):
    new = file.with_suffix(".new")
    new.write_text(text)
    new.replace(file)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", help="rows to measure, with commas; a name ending in * takes all that begin so")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--quick", action="store_true", help="two rounds, printed only")
    default = int(os.environ.get("OMP_NUM_THREADS", len(os.sched_getaffinity(0))))
    parser.add_argument("--threads", type=int, default=default)
    parser.add_argument("--list", action="store_true", help="print the rows' names")
    options = parser.parse_args()
    if options.list:
        return print("\n".join(ROWS))
    if options.quick:
        options.rounds = 2
    names = list(ROWS)
    if options.only:
        patterns = options.only.split(",")
        unknown = [p for p in patterns if not any(matches(n, p) for n in names)]
        if unknown:
            parser.error(f"--only: no row {', '.join(unknown)}; known: {', '.join(names)}")
        names = [n for n in names if any(matches(n, p) for p in patterns)]
    bench = Bench(options)
    machine = f"{options.threads} threads, {processor()}, {platform.system()}, {datetime.date.today()}; peaks: " + ", ".join(
        f"{k} {v / 1e9:.0f} G{'B' if k == 'bandwidth' else 'FLOP'}/s" for k, v in bench.peaks.items())
    for name in names:
        print(name, flush=True)
        ROWS[name](bench, name)
    if not options.quick:
        write(bench.rows, machine)


def matches(name, pattern):
    return name.startswith(pattern[:-1]) if pattern.endswith("*") else name == pattern


def processor():
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


if __name__ == "__main__":
    try:
        main()
    except Stop as reason:
        sys.exit(f"bench: {reason}")

#!/usr/bin/env python3
"""Measures this library against diffusers in PyTorch eager: `make bench`, see Documentation/Benchmarks.md.

Two workers live as long as a row does: bench-runner (ours) and reference.py. Both set the same case up, their results
are compared, the reference's best variant is found, and then each runs the case once a round, in alternating order.
"""

import argparse, contextlib, datetime, itertools, json, os, platform, statistics, subprocess, sys, tempfile
from pathlib import Path

from limits import clip_cost, decoder_cost, network_cost

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
        self.name, self.threads = name, threads
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
        if reply.get("threads", self.threads) != self.threads:
            raise Stop(f"{self.name} computes with {reply['threads']} threads, {self.threads} were asked for")
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
            times[name] = worker("run")["seconds"]
            for _ in range(trials - 1 if times[name] > 0.1 else 4 * trials):
                times[name] = min(times[name], worker("run")["seconds"])
        winner = min(times, key=times.get)
        worker("setup", kind=kind, parameters=variants[winner], warm=2)
        return winner, times

    def alternate(self, workers, between=None):
        """Replies of every round, ours and the reference's, and what `between` returned between the two; an idle worker may
        not use the processor."""
        replies = ([], [], [])
        longer = max(worker("run")["seconds"] for worker in workers)
        # Short cases are repeated for some seconds: their spread is that of the machine.
        rounds = self.rounds if self.quick else max(self.rounds, min(41, int(3 / longer)))
        for i in range(rounds):
            for turn, side in enumerate(((0, 1), (1, 0))[i % 2]):
                if turn == 1 and between:
                    replies[2].append(between())
                idle = workers[1 - side]
                before = idle.cpu_seconds()
                reply = workers[side]("run")
                spent = idle.cpu_seconds() - before
                if spent > max(0.05 * reply["seconds"], 0.03):
                    raise Stop(f"{idle.name} used {spent:.2f} s of processor time while {workers[side].name} was measured")
                replies[side].append(reply)
        return replies

    def add(self, name, ours, reference, floor=None, unit="s", ratio=None, **details):
        """Records a row from lists of measurements, or from a number each."""
        def middle(values):
            return statistics.median(values) if isinstance(values, list) else values

        a, b = middle(ours), middle(reference)
        for key, values in (("ours", ours), ("reference", reference)):
            if isinstance(values, list) and len(values) > 1:
                details[key + "_quartiles"] = [round(q, 6) for q in statistics.quantiles(values, n=4, method="inclusive")[::2]]
        row = {
            "id": name, "unit": unit, "ours": a, "reference": b, "ratio": ratio if ratio is not None else b / a if a and b else None, "floor": floor,
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

    def network(self, name, folder, family, grid, text_tokens, batch, train=None, dtypes=("float32", "bfloat16"), variants=VARIANTS, source="network", more=None, share=None):
        shape = {"folder": str(folder), "family": family, "grid": grid, "textTokens": text_tokens, "batch": batch, "train": train}
        shape = {k: v for k, v in shape.items() if v is not None}
        inputs = str(self.scratch / f"{name}.safetensors")
        with self.workers() as workers:
            workers[1]("inputs", kind=source, parameters=shape | (more or {}), file=inputs)
            shape["inputs"] = inputs
            errors = self.compare(workers, "network", dtypes, shape, shape)
            trials = 1 if self.quick else 3
            ours, _ = self.best(workers[0], "network", {d: shape | {"dtype": d} for d in dtypes}, trials)
            options = {f"{d} {a}": shape | {"dtype": d, "attention": a} for d, a in variants}
            reference, times = self.best(workers[1], "network", options, trials)
            between = (lambda: workers[1]("sustained", dtype="bfloat16")["rate"]) if share else None
            a, b, rates = self.alternate(workers, between)
        config = json.loads((Path(folder) / "config.json").read_text())
        flops, size = network_cost(config, family, batch, grid, text_tokens, train, ours)
        self.add(
            name, seconds(a), seconds(b), self.floor(flops, size, ours), ours_variant=ours, reference_variant=reference,
            reference_seconds=times, errors=errors, gflop=round(flops / 1e9, 3), megabytes=round(size / 1e6, 1))
        if share:
            # Of the rate in the same round: under load a processor lowers its clock, and a shared one has neighbours.
            shares = [[flops / r["seconds"] / rate for r, rate in zip(side, rates)] for side in (a, b)]
            burst = statistics.median(flops / r["seconds"] for r in a) / self.peaks["bfloat16"]
            self.add(
                share, *shares, unit="of the GEMM peak", ratio=self.rows[-1]["ratio"], sustained=round(statistics.median(rates) / 1e9),
                note=f"products sustained {statistics.median(rates) / 1e9:.0f} GFLOP/s in the same rounds; of their briefest best: {burst:.2f}")

    def plain(self, name, kind, parameters, cost, variants, inputs=None, note=None, dtypes=("float32",)):
        """Decode and rewards; `cost`: a dtype's FLOPs and bytes."""
        with self.workers() as workers:
            file = str(self.scratch / f"{name}.safetensors")
            workers[1]("inputs", kind=kind, parameters=parameters | (inputs or {}), file=file)
            parameters = parameters | {"inputs": file}
            errors = self.compare(workers, kind, dtypes, parameters, parameters)
            ours, own = self.best(workers[0], kind, {d: parameters | {"dtype": d} for d in dtypes}, 3)
            reference, times = self.best(workers[1], kind, {k: parameters | v for k, v in variants.items()}, 3)
            a, b, _ = self.alternate(workers)
        if len(dtypes) > 1:
            # Type against type: the fastest of a few runs each, attention as suits the reference.
            text = lambda d: f"{d} {1e3 * own[d]:.1f} ms against {1e3 * min(t for v, t in times.items() if v.startswith(d)):.1f} ms"
            note = ", ".join(map(text, dtypes))
        note = {"note": note} if note else {}
        self.add(
            name, seconds(a), seconds(b), self.floor(*cost(ours), ours), ours_variant=ours, ours_seconds=own, reference_variant=reference,
            reference_seconds=times, errors=errors, **note)

    def clip(self, name):
        """CLIPScore of 12 images and 12 prompts by a ViT-L/14 of random weights; ours may remember no text."""
        text = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "num_hidden_layers": 12, "projection_dim": 768}
        vision = {
            "hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16, "num_hidden_layers": 24, "patch_size": 14,
            "image_size": 224, "projection_dim": 768}
        config = {"text_config": text | {"eos_token_id": 2}, "vision_config": vision, "projection_dim": 768}
        vocabulary = PARITY / "clip-tiny-quickgelu"
        shape = {"folder": str(self.scratch / "clip-l"), "name": "clip", "batch": 12, "prompts": str(ROOT / "Data/prompts.jsonl")}
        inputs = str(self.scratch / f"{name}.safetensors")
        with self.workers() as workers:
            more = {"config": config, "vocabulary": str(vocabulary), "size": [512, 512]}
            workers[1]("inputs", kind="clip", parameters=shape | more, file=inputs)
            shape["inputs"] = inputs
            errors = self.compare(workers, "clip", ("float32",), shape, shape)
            trials = 1 if self.quick else 2
            self.best(workers[0], "clip", {"float32": shape}, trials)
            options = {f"float32 {a}": shape | {"attention": a} for a in (("sdpa",) if self.quick else ("sdpa", "math"))}
            reference, times = self.best(workers[1], "clip", options, trials)
            a, b, _ = self.alternate(workers)
        flops, size = clip_cost(config, 12, 24)
        self.add(
            name, seconds(a), seconds(b), self.floor(flops, size, "float32"), ours_variant="float32", reference_variant=reference,
            reference_seconds=times, errors=errors, gflop=round(flops / 1e9, 1))

    def configuration(self, **sections):
        """A configuration file of one prompt on FLUX-mini; JSON is YAML."""
        (self.scratch / "prompt.txt").write_text("a photo of a red circle\n")
        c = {
            "model": str(MINI), "output": str(self.scratch / "run"), "prompts": {"file": str(self.scratch / "prompt.txt"), "split": "all"},
            "rewards": [{"name": "vivid"}], "run": {"iterations": 1, "checkpointEvery": 1, "samplesEvery": 0, "evaluateEvery": 0},
            "sampling": {"steps": 17, "guidance": None}, "group": {"size": 12, "promptsPerIteration": 1},
            "chunk": {"plan": "list:2,3,4,7", "fraction": 0.5}, "optim": {"updatesPerIteration": 2},
            "trainable": {"kind": "lora", "rank": 16, "alpha": 32, "targets": ["all-linear"]},
        }
        for key, value in sections.items():
            c[key] = c.get(key, {}) | value
        file = self.scratch / f"{len(list(self.scratch.iterdir()))}.yaml"
        file.write_text(json.dumps(c))
        return str(file)

    def step(self, name, style, train, outside=None):
        """A whole RL step, 12 images of 17 steps, two of the chunks [2, 3, 4, 7] drawn, two updates, both sides alike."""
        dtypes = ("float32", "bfloat16")
        kind = {"kind": train} if train == "full" else {}
        configs = {d: {"config": self.configuration(network={"dtype": d}, trainable=kind)} for d in dtypes}
        condition = str(self.scratch / f"{name}.condition.safetensors")
        with self.workers() as workers:
            facts = workers[0]("setup", kind="step", parameters=configs["float32"], warm=0)
            workers[0]("check", file=condition)
            loop = {
                "folder": str(MINI), "inputs": condition, "train": train, "grid": [8, 8], "group": 12, "steps": 17,
                "updates": facts["updates"]}
            pairs = sum(end - first for update in facts["updates"] for _, first, end in update)
            file = str(self.scratch / f"{name}.trajectories.safetensors")
            workers[1]("setup", kind="published", parameters=loop | {"train": "full"}, warm=0)
            workers[1]("check", file=file)
            mine = str(self.scratch / "ours.safetensors")
            same = {"config": self.configuration(network={"dtype": "float32"}, trainable={"kind": "full"})}
            workers[0]("setup", kind="loop", parameters=same | {"inputs": file, "updates": facts["updates"]}, warm=0)
            workers[0]("check", file=mine)
            errors = workers[1]("compare", file=file, **{"with": mine})
            # Gradients through ratios: log p rounds at 1e-7 of a value near 1, and the ratio's exponential keeps that.
            for key, bound in (("output", 1e-4), ("gradient", 1e-3)):
                if not errors[key] <= bound:
                    raise Stop(f"{name}: {key} of the first update differs by {errors[key]:.1e}, at most {bound:.0e} is allowed")
            print(f"  agrees: log p {errors['output']:.1e}, gradient of the first update {errors['gradient']:.1e}; {pairs} trained steps")
            ours, _ = self.best(workers[0], "step", configs, 1 if self.quick else 3)
            variants = {f"float32 {a}": loop | {"attention": a} for a in ("sdpa", "math")}
            if style == "batched":
                # bfloat16 weights would lose updates of 1e-5 where all weights are trained: autocast keeps float32 masters.
                kinds = ("float32", "autocast") + (("bfloat16",) if train == "lora" else ())
                draws = {"": facts["updates"], ", steps shared by all samples": shared_steps(facts["updates"])}
                variants = {
                    f"{d} {a}{text}": loop | {"dtype": d, "attention": a, "updates": updates}
                    for d in kinds for a in ("sdpa", "math") for text, updates in draws.items()}
            reference, times = self.best(workers[1], style, variants, 1 if self.quick else 2)
            a, b, _ = self.alternate(workers)
        config = json.loads((MINI / "transformer/config.json").read_text())
        vae = json.loads((MINI / "vae/config.json").read_text())
        forward = network_cost(config, "flux", 12, [8, 8], 24, None, ours)
        update = network_cost(config, "flux", pairs / 2, [8, 8], 24, train, ours)
        floor = 17 * self.floor(*forward, ours) + 2 * self.floor(*update, ours) + self.floor(*decoder_cost(vae, 12, 16, 16), "float32")
        variants = {"ours_variant": ours, "reference_variant": reference}
        parts = [{k: round(statistics.median(r[k] for r in side), 4) for k in side[0] if k != "seconds"} for side in (a, b)]
        details = variants | {"reference_seconds": times, "parts": parts[0], "reference_parts": parts[1], "trained_steps": pairs}
        if style == "published":
            passes = [(1, None, 12 * 17), (pairs / 2, train, 2)]
            flops = sum(n * network_cost(config, "flux", rows, [8, 8], 24, kind, "float32")[0] for rows, kind, n in passes)
            details |= self.expected(statistics.median(seconds(b)), statistics.median(seconds(a)), flops)
        self.add(name, seconds(a), seconds(b), floor, errors=errors, **details)
        if outside:
            floors = {"rollout": 17 * self.floor(*forward, ours), "update": 2 * self.floor(*update, ours)}
            for part, limit in floors.items():
                self.add(f"mini.{part}", [r[part] for r in a], [r[part] for r in b], limit, **variants)
            rest = [r["seconds"] - r["network"] for r in a]
            share = statistics.median(rest) / statistics.median(seconds(b))
            self.add(outside, rest, seconds(b), ratio=share, note="ratio: ours as a share of the reference's step, at most 0.05 wanted")

    def expected(self, measured, ours, flops):
        """Whether the published-style loop is as fast as the trainer it stands for: 5.05–5.28 s on two threads where one core
        multiplied [1536, 256]·[256, 1024] in float32 at 68 GFLOP/s, scaled to this machine, within 15 %.

        Most of such a loop is small operations, which do not become faster with products: for comparison the note also says
        what to expect if only the products are scaled and the rest is left as it was.
        """
        rate = self.peaks["core"]
        low, high = (bound * t * 68e9 / rate for bound, t in ((0.85, 5.05), (1.15, 5.28)))
        valid = low <= measured <= high and self.threads == 2
        partly = [bound * (t - flops / 68e9 + flops / rate) for bound, t in ((0.85, 5.05), (1.15, 5.28))]
        text = (
            f"{measured:.2f} s, expected {low:.2f} … {high:.2f} s by one core's {rate / 1e9:.0f} GFLOP/s "
            f"({partly[0]:.2f} … {partly[1]:.2f} s if only the products are scaled); the published seconds, scaled by products, are "
            f"{5.165 * 68e9 / rate / ours:.1f}× ours")
        if self.threads != 2:
            text += f", for 2 threads, not {self.threads}"
        print(f"  published-style loop: {text}: {'valid' if valid else 'NOT VALID'}")
        return {
            "valid": valid, "expected": [low, high], "expected_products_scaled": partly,
            "note": ("" if valid else "NOT VALID: ") + f"reference loop {text}"}

    def wide(self, name, train, share=None):
        """One double and one single block of FLUX's real width on 1,024 + 512 tokens."""
        folder = self.scratch / "wide"
        config = {
            "attention_head_dim": 128, "num_attention_heads": 24, "num_layers": 1, "num_single_layers": 1, "in_channels": 64,
            "joint_attention_dim": 4096, "pooled_projection_dim": 768, "guidance_embeds": False}
        variants = [("bfloat16", "sdpa"), ("bfloat16", "math"), ("autocast", "sdpa")]
        self.network(
            name, folder, "flux", [32, 32], 512, 1, train, ("bfloat16",), variants, source="wide", more={"config": config}, share=share)

    def memory(self, name):
        """Peak of an update whose samples train one chunk of 16 steps against one whose samples train one chunk of one."""
        peaks = {}
        with self.workers() as (ours, _):
            config = self.configuration(group={"size": 24}, optim={"microBatch": 24})
            for size in (16, 1):
                ours("setup", kind="loop", parameters={"config": config, "name": "update", "chunk": size, "trained": size}, warm=1)
                peaks[size] = ours("memory")["bytes"] / 2**20
        self.add(name, peaks[16], peaks[1], unit="MiB", ratio=peaks[16] / peaks[1], note="ours: chunk of 16; reference: ours, chunk of 1; at most 1.05× wanted")

    def growth(self, name):
        """Seconds and memory of rollout and update over group size, steps, trained steps, chunk size and tokens; a chart."""
        groups, trained = (12, 24, 48, 96), (2, 4, 8, 16)
        sweeps = {
            "rollout, group size": ("rollout", [(g, {"group": {"size": g}}, {}) for g in groups]),
            "rollout, steps": ("rollout", [(t, {"sampling": {"steps": t, "guidance": None}}, {}) for t in (5, 9, 17, 33)]),
            "rollout, tokens": ("rollout", [
                ((p // 8) ** 2 + 24, {"sampling": {"steps": 5, "guidance": None, "height": p, "width": p}}, {}) for p in (64, 96, 128, 192)]),
            "update, trained steps": ("update", [(24 * n, {}, {"chunk": 2, "trained": n}) for n in trained]),
            "update, chunk size": ("update", [(n, {}, {"chunk": n, "trained": 16}) for n in (1, 2, 4, 8, 16)]),
        }
        found = {}
        with self.workers() as (ours, _):
            for title, (kind, points) in sweeps.items():
                found[title] = []
                for x, sections, parameters in points:
                    config = self.configuration(**{"group": {"size": 24}, "optim": {"microBatch": 12}} | sections)
                    ours("setup", kind="loop", parameters={"config": config, "name": kind} | parameters, warm=1)
                    # The least disturbed: how cost grows is a matter of the work, not of what else the host does.
                    spent = min(ours("run")["seconds"] for _ in range(min(self.rounds, 5)))
                    peak = ours("memory")
                    found[title].append((x, spent, (peak["bytes"] - peak.get("stored", 0)) / 2**20))
                print(f"  {title}: " + ", ".join(f"{x}: {s:.3f} s, {m:.1f} MiB" for x, s, m in found[title]), flush=True)
            if not self.quick:
                # Everything relative to the sweep's first point: what is linear runs along the diagonal.
                series = [{"name": t, "x": [x / ps[0][0] for x, _, _ in ps], "y": [s / ps[0][1] for _, s, _ in ps]} for t, ps in found.items()]
                series += [
                    {"name": f"memory: {t}", "x": [x / found[t][0][0] for x, _, _ in found[t]], "y": [m / found[t][0][2] for _, _, m in found[t]]}
                    for t in ("rollout, group size", "update, trained steps", "update, chunk size")]
                chart = {
                    "title": "Cost against size, both relative to the smallest", "x": "size", "y": "seconds (memory: bytes beside stored trajectories)",
                    "series": series, "file": str(HERE / "growth")}
                ours("plot", parameters={"charts": [chart]})
        straight = {t: r_squared(found[t]) for t in ("rollout, group size", "update, trained steps")}
        self.add(
            name, straight["rollout, group size"], None, unit="R²", sweeps=found,
            note=f"rollout over group size; update over trained steps {straight['update, trained steps']:.4f}; [chart](growth.png)")


def shared_steps(updates):
    """Chunks drawn for all samples of an update together, as many trained steps in all as come nearest from below."""
    chunks = [(0, 2), (2, 5), (5, 9), (9, 16)]
    draws = list(itertools.combinations(chunks, 2))
    samples = [sorted({sample for sample, _, _ in update}) for update in updates]
    count = lambda choice: sum(len(s) * (end - first) for s, draw in zip(samples, choice) for first, end in draw)
    limit = sum(end - first for update in updates for _, first, end in update)
    best = max((c for c in itertools.product(draws, repeat=len(updates)) if count(c) <= limit), key=count)
    return [[[sample, first, end] for sample in s for first, end in draw] for s, draw in zip(samples, best)]


def r_squared(points):
    x, y = [p[0] for p in points], [p[1] for p in points]
    return statistics.correlation(x, y) ** 2


def seconds(replies):
    return [reply["seconds"] for reply in replies]


def mini(**shape):
    return lambda bench, name: bench.network(name, MINI / "transformer", "flux", [8, 8], 24, **shape)


def tiny(model, family, grid, text_tokens, train=None):
    return lambda bench, name: bench.network(name, PARITY / model / "transformer", family, grid, text_tokens, 24, train)


def decode(bench, name):
    vae = MINI / "vae"
    config = json.loads((vae / "config.json").read_text())
    cost = lambda dtype: decoder_cost(config, 24, 16, 16, dtype)
    variants = {f"{d} {a}": {"dtype": d, "attention": a} for d, a in VARIANTS}
    bench.plain(name, "decode", {"folder": str(vae)}, cost, variants, {"batch": 24, "size": [16, 16]}, dtypes=("float32", "bfloat16"))


def reward(kind):
    def row(bench, name):
        parameters = {"name": kind, "prompts": str(ROOT / "Data/prompts.jsonl"), "sprites": str(ROOT / "Data/sprites.safetensors")}
        cost = lambda dtype: (0, 24 * 3 * 64 * 64 * 4)
        bench.plain(name, "reward", parameters, cost, {"plain": {}}, {"batch": 24}, note="floor: pixels read once")
    return row


# Headlines are `mini.forward` and `mini.train`: batch 96, every weight trained, so that nothing but the model is measured.
ROWS = {
    "mini.forward": mini(batch=96),
    "mini.forward.24": mini(batch=24),
    "mini.train": mini(batch=96, train="full"),
    "mini.train.24": mini(batch=24, train="full"),
    "mini.train.lora": mini(batch=96, train="lora"),
    "mini.train.lora.24": mini(batch=24, train="lora"),
    "flux-tiny.forward": tiny("flux-tiny", "flux", [8, 8], 16),
    "flux-tiny.train": tiny("flux-tiny", "flux", [8, 8], 16, "full"),
    "sd3-tiny.forward": tiny("sd3-tiny", "sd3", [8, 8], 16),
    "sd3-tiny.train": tiny("sd3-tiny", "sd3", [8, 8], 16, "full"),
    "wide.forward": lambda bench, name: bench.wide(name, None),
    "wide.train": lambda bench, name: bench.wide(name, "lora", share="wide.share"),
    "wide.share": lambda bench, name: bench.wide("wide.train", "lora", share=name),
    "decode": decode,
    "reward.vivid": reward("vivid"),
    "reward.scenes": reward("scenes"),
    "reward.clip": Bench.clip,
    "step.published": lambda bench, name: bench.step(name, "published", "full"),
    "step.published.lora": lambda bench, name: bench.step(name, "published", "lora"),
    "step.batched": lambda bench, name: bench.step(name, "batched", "full", outside="step.outside"),
    "mini.rollout": lambda bench, name: bench.step("step.batched", "batched", "full", outside="step.outside"),
    "mini.update": lambda bench, name: bench.step("step.batched", "batched", "full", outside="step.outside"),
    "step.outside": lambda bench, name: bench.step("step.batched", "batched", "full", outside=name),
    "step.batched.lora": lambda bench, name: bench.step(name, "batched", "lora"),
    "update.memory": Bench.memory,
    "growth": Bench.growth,
}


# ------------------------------------------------------------------------------------------------------------- results

HEADER = ["row", "run", "ours", "reference", "ratio", "floor", "share of floor", "variants"]


def number(value, unit):
    if value is None:
        return "–"
    if unit == "s":
        return f"{value * 1e3:.1f} ms" if value < 1 else f"{value:.2f} s"
    return f"{value:.4g} {unit}".strip()


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
    machines = list(dict.fromkeys(row["details"]["machine"] for row in ordered))
    table = [HEADER, ["---"] * len(HEADER)]
    for row in ordered:
        line = cells(row)
        table.append([line[0], str(machines.index(row["details"]["machine"]) + 1)] + line[1:])
    text = "Medians and, in brackets, quartiles; how each row is measured: [Benchmarks](../Documentation/Benchmarks.md).\n\n"
    text += "\n".join(f"- Run {i + 1}: {machine}" for i, machine in enumerate(machines))
    text += "\n\n" + "\n".join("| " + " | ".join(line) + " |" for line in table) + "\n"
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
        if any(row["id"] == name for row in bench.rows):
            continue  # came with another
        print(name, flush=True)
        ROWS[name](bench, name)
        if not options.quick:  # row by row: an interrupted run keeps what it has measured
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

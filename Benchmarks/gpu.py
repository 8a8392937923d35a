#!/usr/bin/env python3
"""FLUX.1-dev's full configuration on a GPU: a LoRA step of 12 images × 17 steps against the published-style loop.

  python Benchmarks/gpu.py [--sizes 512,720,1024] [--rows 12] [--device cuda]

Needs bin/bench-runner and lib/libctorch.so built against a CUDA torch (`make bench BENCH=--list` builds them) and, for the
reference, that torch with diffusers and PEFT in the Python that runs this. Weights are random and made on the device. The
reference runs 2 of the 12 images and is scaled. MFU counts forward passes of rollout and update and the adapter's backward
pass, neither recomputation nor gradients of frozen weights, over the peak of bfloat16 products measured before. Prints a
table and writes `gpu.mfu` rows to results.json; nothing is written unless every run has finished.
"""

import argparse, json, sys, tempfile
from pathlib import Path

import bench
from limits import network_cost

CONFIG = {
    "_class_name": "FluxTransformer2DModel", "attention_head_dim": 128, "guidance_embeds": True, "in_channels": 64,
    "joint_attention_dim": 4096, "num_attention_heads": 24, "num_layers": 19, "num_single_layers": 38, "patch_size": 1,
    "pooled_projection_dim": 768, "axes_dims_rope": [16, 56, 56]}
VAE = {
    "_class_name": "AutoencoderKL", "act_fn": "silu", "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4, "in_channels": 3,
    "out_channels": 3, "latent_channels": 16, "layers_per_block": 2, "norm_num_groups": 32, "sample_size": 1024,
    "scaling_factor": 0.3611, "shift_factor": 0.1159, "force_upcast": True, "mid_block_add_attention": True,
    "use_quant_conv": False, "use_post_quant_conv": False}


def updates(group):
    """Two updates of half the group; chunks [2, 7] and [3, 4] of [2, 3, 4, 7] in turn: 8 trained steps an image on average."""
    draws = [[(0, 2), (9, 16)], [(2, 5), (5, 9)]]
    half = group // 2
    return [[[s, a, b] for s in part for a, b in draws[s % 2]] for part in (range(half), range(half, group))]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sizes", default="512,720,1024", help="sides of the images in pixels")
    parser.add_argument("--rows", type=int, default=12, help="rows of one pass")
    parser.add_argument("--images", type=int, default=12)
    parser.add_argument("--reference-images", type=int, default=2)
    parser.add_argument("--blocks", default="19,38", help="fewer only to try the script")
    parser.add_argument("--width", type=int, default=24, help="heads; fewer only to try the script")
    parser.add_argument("--text-tokens", type=int, default=512)
    parser.add_argument("--steps", type=int, default=17)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"], help="cpu only to try the script")
    parser.add_argument("--threads", type=int, default=8)
    options = parser.parse_args()
    blocks = [int(n) for n in options.blocks.split(",")]
    config = CONFIG | {"num_layers": blocks[0], "num_single_layers": blocks[1], "num_attention_heads": options.width}
    whole = config == CONFIG and options.device == "cuda" and options.steps == 17 and options.images == 12
    folder = Path(tempfile.mkdtemp(prefix="chunkgrpo-gpu-"))
    for part, content in (("transformer", config), ("vae", VAE)):
        (folder / part).mkdir()
        (folder / part / "config.json").write_text(json.dumps(content))

    def run(name, command, parameters, runs=2):
        worker = bench.Worker(name, command, options.threads)
        try:
            worker("setup", kind="device", parameters=parameters, warm=1)
            return min((worker("run") for _ in range(runs)), key=lambda reply: reply["seconds"])
        finally:
            worker.close()

    reference_command = [sys.executable, str(bench.HERE / "reference.py")]
    worker = bench.Worker("reference", reference_command, options.threads)
    peak = worker("probe", parameters={"device": options.device})
    worker.close()
    print(f"peak of bfloat16 products: {peak['bfloat16'] / 1e12:.1f} TFLOP/s ({peak.get('device', 'CPU')})")
    rows = []
    for side in (int(n) for n in options.sizes.split(",")):
        grid = [side // 16, side // 16]
        shape = {
            "folder": str(folder), "device": options.device, "grid": grid, "steps": options.steps, "rank": 16, "dtype": "bfloat16",
            "textTokens": options.text_tokens, "checkpointing": 1}
        ours = run("bench-runner", [str(bench.ROOT / "bin/bench-runner")], shape | {
            "group": options.images, "rows": options.rows, "updates": updates(options.images)})
        few = options.reference_images
        theirs = run("reference", reference_command, shape | {"group": few, "updates": updates(few)}, runs=1)
        scaled = theirs["seconds"] * options.images / few
        pairs = sum(end - first for update in updates(options.images) for _, first, end in update)
        flops = options.images * options.steps * network_cost(config, "flux", 1, grid, options.text_tokens, None, "bfloat16")[0]
        flops += pairs * network_cost(config, "flux", 1, grid, options.text_tokens, "lora", "bfloat16")[0]
        spent = ours["rollout"] + ours["update"]
        mfu = flops / spent / peak["bfloat16"]
        print(
            f"{side} px: rollout {ours['rollout']:.1f} s, decode {ours['decode']:.1f} s, update {ours['update']:.1f} s, "
            f"peak {ours.get('peak', 0) / 2**30:.1f} GiB; MFU {mfu:.1%}; reference {scaled:.1f} s "
            f"({few} of {options.images} images, scaled): {scaled / ours['seconds']:.2f}×", flush=True)
        rows.append((side, ours, theirs, scaled, mfu, flops / peak["bfloat16"]))
    if not whole:
        return print("not FLUX.1-dev's configuration on a GPU: nothing is written")
    recorder = bench.Bench.__new__(bench.Bench)
    recorder.rows, recorder.rounds, recorder.threads = [], 1, options.threads
    for side, ours, theirs, scaled, mfu, floor in rows:
        name = "gpu.mfu" if side == 720 else f"gpu.mfu.{side}"
        recorder.add(
            name, ours["seconds"], scaled, floor, parts=ours, reference_parts=theirs, mfu=mfu,
            note=f"{side} px, MFU {mfu:.1%}; reference: {options.reference_images} of {options.images} images, scaled")
        recorder.rows[-1]["command"] = "python Benchmarks/gpu.py"
    bench.write(recorder.rows, f"{peak['device']}, bfloat16 products {peak['bfloat16'] / 1e12:.0f} TFLOP/s")


if __name__ == "__main__":
    try:
        main()
    except bench.Stop as reason:
        sys.exit(f"gpu: {reason}")

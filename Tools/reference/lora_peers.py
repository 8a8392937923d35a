"""Loads what chunkgrpo wrote, and writes what it must read, with diffusers and PEFT.

lora_peers.py JOB.json, where JOB is
  model   a model folder; its transformer is what adapters are for
  inputs  a safetensors file whose in.* are the transformer's arguments
  read    [{name, form, path}]: form is diffusers (load_lora_weights), peft (PeftModel.from_pretrained) or model
          (the folder as a whole pipeline, and its transformer alone)
  write   a folder that gets one adapter a known form, FORM.safetensors or the PEFT folder FORM
  out     safetensors file of the transformer's outputs: base, read.NAME, and write.FORM for what each adapter means
"""

import json
import os
import sys

import torch
from diffusers import DiffusionPipeline
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file

job = json.load(open(sys.argv[1]))
inputs = {k[3:]: v for k, v in load_file(job["inputs"]).items() if k.startswith("in.")}
inputs = {k: v.float() if v.dtype == torch.bfloat16 else v for k, v in inputs.items()}
out = {}


def pipeline(folder=job["model"]):
    return DiffusionPipeline.from_pretrained(folder)


def run(transformer):
    with torch.no_grad():
        return transformer(**inputs, return_dict=False)[0].contiguous()


def read(form, path):
    if form == "diffusers":
        pipe = pipeline()
        pipe.load_lora_weights(path)
        return run(pipe.transformer)
    if form == "peft":
        return run(PeftModel.from_pretrained(pipeline().transformer, path))
    if form == "model":
        pipe = pipeline(path)
        alone = type(pipe.transformer).from_pretrained(path, subfolder="transformer")
        whole = run(pipe.transformer)
        assert torch.equal(whole, run(alone)), "the transformer alone differs from the pipeline's"
        return whole
    sys.exit(f"form {form}: expected diffusers, peft or model")


def randomise(transformer):
    generator = torch.Generator().manual_seed(3)
    for name, parameter in transformer.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1


def rename(state, names):
    """The state with parts of its keys replaced."""
    result = {}
    for key, value in state.items():
        for old, new in names.items():
            key = key.replace(old, new)
        result[key] = value.clone()
    return result


def write(folder):
    targets = ["attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "attn.add_k_proj", "ff.net.2"]
    rank, alpha = 4, 8
    pipe = pipeline()
    pipe.transformer.add_adapter(LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets))
    randomise(pipe.transformer)
    scaled = run(pipe.transformer)
    layers = get_peft_model_state_dict(pipe.transformer)
    settings = {
        k: sorted(v) if isinstance(v, set) else v for k, v in pipe.transformer.peft_config["default"].to_dict().items()
    }
    state = {f"transformer.{k}": v for k, v in layers.items()}
    alphas = {k.replace("lora_A.weight", "alpha"): torch.tensor(float(alpha)) for k in state if "lora_A" in k}
    folded = {k: v * (alpha / rank) if "lora_B" in k else v for k, v in state.items()}

    def save(form, tensors, means):
        save_file({k: v.contiguous() for k, v in tensors.items()}, f"{folder}/{form}.safetensors", {"format": "pt"})
        out[f"write.{form}"] = means

    type(pipe).save_lora_weights(
        folder, transformer_lora_layers=layers, transformer_lora_adapter_metadata=settings, weight_name="metadata.safetensors"
    )
    out["write.metadata"] = scaled
    # What diffusers itself makes of a file that says nothing of alpha: scale 1.
    type(pipe).save_lora_weights(folder, transformer_lora_layers=layers, weight_name="silent.safetensors")
    silent = pipeline()
    silent.load_lora_weights(folder, weight_name="silent.safetensors")
    out["write.silent"] = run(silent.transformer)
    save("alpha", state | alphas, scaled)
    save("down_up", rename(state | alphas, {"lora_A": "lora_down", "lora_B": "lora_up"}), scaled)
    for form, prefix in {
        "comfy": "diffusion_model.",
        "bare": "",
        "peft_prefix": "base_model.model.",
        "peft_pipeline_prefix": "base_model.model.transformer.",
    }.items():
        save(form, {prefix + k.removeprefix("transformer."): v for k, v in folded.items()}, scaled)

    for form, options in {
        "peft": {},
        "peft_patterns": {"rank_pattern": {"attn.to_q": 2}, "alpha_pattern": {"to_k": 3, "transformer_blocks.0.ff.net.2": 5}},
        "peft_rslora": {"use_rslora": True, "rank_pattern": {"ff.net.2": 6}},
    }.items():
        model = get_peft_model(
            pipeline().transformer, LoraConfig(r=rank, lora_alpha=6, target_modules=targets, **options)
        )
        randomise(model)
        model.save_pretrained(f"{folder}/{form}")
        out[f"write.{form}"] = run(model)


out["base"] = run(pipeline().transformer)
for case in job.get("read", []):
    out["read." + case["name"]] = read(case["form"], case["path"])
if "write" in job:
    os.makedirs(job["write"], exist_ok=True)
    write(job["write"])
save_file({k: v.clone() for k, v in out.items()}, job["out"])

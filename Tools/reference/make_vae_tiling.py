#!/usr/bin/env python3
"""Tiled decoding and encoding of flux-tiny's autoencoder by diffusers, for AutoencoderKLTests.
Run:  OMP_NUM_THREADS=1 python make_vae_tiling.py FIXTURES_FOLDER   (CPU, fp32, seconds; diffusers 0.42.1, torch 2.13.0)
Tiles of 32 pixels on an image of 72 x 88: three by four tiles, the last ones cut off on both sides.
"""
import os
import sys

import torch
from diffusers import AutoencoderKL
from safetensors.torch import save_file

fixtures = os.path.abspath(sys.argv[1])
folder = os.path.join(fixtures, "parity", "flux-tiny", "vae")
torch.set_num_threads(1)
torch.manual_seed(20252)
vae = AutoencoderKL.from_pretrained(folder).eval()
vae.enable_tiling()
vae.tile_sample_min_size, vae.tile_latent_min_size = 32, 4
latents, image = torch.randn(2, 16, 9, 11), torch.rand(2, 3, 72, 88) * 2 - 1
with torch.no_grad():
    decoded = vae.decode(latents).sample
    posterior = vae.encode(image).latent_dist
    plain = AutoencoderKL.from_pretrained(folder).eval().decode(latents).sample
print("largest difference of tiled from plain:", float((decoded - plain).abs().max()))
save_file(
    {
        "in.latents": latents, "in.image": image, "out.decoded": decoded.contiguous(),
        "out.enc_mean": posterior.mean.contiguous(), "out.enc_logvar": posterior.logvar.contiguous(),
    },
    os.path.join(fixtures, "vae-tiled", "vae_tiled.safetensors"),
)

#!/usr/bin/env python3
"""Fixtures of the CLIP rewards: images and prompts, and what the reference libraries score them with the tiny models of
Tests/Fixtures/parity.

    pip install torch==2.13.0 transformers==5.23.0 pillow==12.0.0 numpy==2.4.6 safetensors==0.8.0 ftfy==6.3.1 regex
    pip install --no-deps open-clip-torch==3.3.0 torchvision==0.29.2 timm
    python Tools/reference/make_clip_rewards.py

Writes Tests/Fixtures/clip-rewards/{scores.safetensors,head.safetensors,prompts.json,manifest.json}. Seeded; takes seconds.

Pre-processing is transformers' CLIPImageProcessor on PIL images (clip, pickscore, aesthetic), open_clip's image_transform with
resize_mode squash (dfn-clip), and the steps of hpsv2 1.2.0 src/open_clip/transform.py on torchvision (hpsv2). Texts go through
transformers' CLIPTokenizer, or open_clip's SimpleTokenizer with the tiny models' merges.
"""
import datetime, gzip, hashlib, json, os, tempfile
import tvstub  # noqa: F401 (before torchvision)
import ftfy, numpy as np, open_clip, PIL, torch, torchvision, transformers
import torchvision.transforms.functional as F
from open_clip.tokenizer import SimpleTokenizer
from open_clip.transform import image_transform
from PIL import Image
from safetensors.torch import load_file, save_file
from torchvision.transforms import InterpolationMode
from transformers import CLIPModel, CLIPTokenizer
try:
    from transformers import CLIPImageProcessorPil as Processor
except ImportError:
    from transformers import CLIPImageProcessor as Processor

HERE = os.path.dirname(os.path.abspath(__file__))
PARITY = os.path.normpath(os.path.join(HERE, "../../Tests/Fixtures/parity"))
OUT = os.path.normpath(os.path.join(HERE, "../../Tests/Fixtures/clip-rewards"))
MEAN, STD = open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD
# One longer than 77 tokens, one that open_clip cleans (quotes, references, full-width forms), one empty.
PROMPTS = ["a photo of a cat sitting on a wooden table", "“don’t” &amp;amp; ＰＡＮＩＣ,\n caf&eacute;!", "two red apples and a blue cup " * 6, ""]
SIZES = {"wide": (40, 52), "tall": (61, 33), "square": (64, 64)}
HEAD = [20, 16, 8, 4, 2, 1]


def pictures(rng, h, w):
    """Waves, noise, blocks whose overshoot is cut off, and a ramp; uint8 [4, h, w, 3]."""
    y, x = np.mgrid[0:h, 0:w] / 9.0
    waves = np.round((np.stack([np.sin(y), np.cos(x), np.sin(x * y)], -1) * 0.5 + 0.5) * 255)
    blocks = np.repeat((((y // 1 + x // 1) % 2) * 255)[..., None], 3, 2)
    ramp = np.stack([x / x.max(), y / y.max(), 1 - x / x.max()], -1) * 255
    return np.stack([waves, rng.integers(0, 256, (h, w, 3)), blocks, np.round(ramp)]).astype(np.uint8)


def hpsv2_pixels(image, size):
    """hpsv2's preprocess_val: ToTensor, ResizeMaxSize, Normalize."""
    x = F.to_tensor(image)
    scale = size / float(max(x.shape[1:]))
    h, w = (round(side * scale) for side in x.shape[1:])
    x = F.resize(x, [h, w], InterpolationMode.BICUBIC, antialias=True)
    a, b = size - h, size - w
    x = F.pad(x, [b // 2, a // 2, b - b // 2, a - a // 2], fill=0)
    return F.normalize(x, MEAN, STD)


def open_clip_model(quick):
    folder = os.path.join(PARITY, "openclip-tiny")
    c = json.load(open(os.path.join(folder, "open_clip_config.json")))["model_cfg"]
    m = open_clip.model.CLIP(
        c["embed_dim"], open_clip.model.CLIPVisionCfg(**c["vision_cfg"]), open_clip.model.CLIPTextCfg(**c["text_cfg"]),
        quick_gelu=quick, output_dict=True)
    m.load_state_dict(load_file(os.path.join(folder, "open_clip_model.safetensors")))
    return m.eval()


def open_clip_tokens(scratch):
    """open_clip's tokenizer with the tiny vocabulary, whose merges are the first 200 of the real one."""
    merges = open(os.path.join(PARITY, "clip-tiny-gelu/merges.txt")).read().strip()
    path = os.path.join(scratch, "merges.txt.gz")
    with gzip.open(path, "wt") as f:
        f.write(merges)
    tokenizer = SimpleTokenizer(bpe_path=path)
    assert len(tokenizer.encoder) == 714
    return tokenizer(PROMPTS, context_length=77)


def cosine(image, text):
    return (image / image.norm(dim=-1, keepdim=True) * (text / text.norm(dim=-1, keepdim=True))).sum(-1)


def tower(m, px, **tokens):
    o = m(pixel_values=px, **tokens)
    return o.image_embeds, o.text_embeds


def main():
    os.makedirs(OUT, exist_ok=True)
    rng, g = np.random.default_rng(20253), torch.Generator().manual_seed(20253)
    head = {}
    for i, (a, b) in zip((0, 2, 4, 6, 7), zip(HEAD, HEAD[1:])):
        head[f"layers.{i}.weight"] = 2 * torch.randn(b, a, generator=g) / a ** 0.5
        head[f"layers.{i}.bias"] = torch.randn(b, generator=g)
    save_file(head, os.path.join(OUT, "head.safetensors"))
    models, tokens = {}, {}
    for name in ("clip-tiny-quickgelu", "clip-tiny-gelu"):
        folder = os.path.join(PARITY, name)
        models[name] = CLIPModel.from_pretrained(folder).eval()
        pad = json.load(open(os.path.join(folder, "tokenizer_config.json")))["pad_token"]
        tokenizer = CLIPTokenizer(os.path.join(folder, "vocab.json"), os.path.join(folder, "merges.txt"), pad_token=pad)
        tokens[name] = tokenizer(PROMPTS, padding="max_length", truncation=True, max_length=77, return_tensors="pt")
    with tempfile.TemporaryDirectory() as scratch:
        open_ids = open_clip_tokens(scratch)
    processor = Processor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}, resample=3)
    squash = image_transform(28, is_train=False, resize_mode="squash", interpolation="bicubic")
    tensors = {"in.open_clip_ids": open_ids, "in.ids": tokens["clip-tiny-gelu"].input_ids}
    with torch.no_grad():
        for size, (h, w) in SIZES.items():
            u8 = pictures(rng, h, w)
            pil = [Image.fromarray(i) for i in u8]
            px = processor(images=pil, return_tensors="pt")["pixel_values"]
            out = {}
            m = models["clip-tiny-quickgelu"]
            image, text = tower(m, px, **tokens["clip-tiny-quickgelu"])
            out["clip"] = cosine(image, text)
            x = image / torch.linalg.vector_norm(image, dim=-1, keepdim=True)
            for i in (0, 2, 4, 6, 7):
                x = torch.nn.functional.linear(x, head[f"layers.{i}.weight"], head[f"layers.{i}.bias"])
            out["aesthetic"] = x.squeeze(1)
            m = models["clip-tiny-gelu"]
            image, text = tower(m, px, **tokens["clip-tiny-gelu"])
            out["pickscore.cosine"] = cosine(image, text)
            out["pickscore.scaled"] = m.logit_scale.exp() * out["pickscore.cosine"]
            out["pickscore.over26"] = out["pickscore.scaled"] / 26
            for name, quick, pixels in (
                ("dfn-clip", True, torch.stack([squash(i) for i in pil])),
                ("hpsv2", False, torch.stack([hpsv2_pixels(i, 28) for i in pil])),
            ):
                o = open_clip_model(quick)(pixels, open_ids)
                out[name] = torch.diagonal(o["image_features"] @ o["text_features"].T)
                tensors[f"pixels.{size}.{name}"] = pixels
            tensors[f"pixels.{size}.clip"] = px
            tensors[f"in.{size}"] = torch.from_numpy(u8)
            tensors |= {f"out.{size}.{k}": v for k, v in out.items()}
    save_file({k: v.contiguous().clone() for k, v in tensors.items()}, os.path.join(OUT, "scores.safetensors"))
    json.dump(PROMPTS, open(os.path.join(OUT, "prompts.json"), "w"), indent=1)
    manifest = {"generator": "Tools/reference/make_clip_rewards.py", "date": str(datetime.date.today()),
                "versions": {"torch": torch.__version__, "transformers": transformers.__version__, "open_clip": open_clip.__version__,
                             "torchvision": torchvision.__version__, "pillow": PIL.__version__, "numpy": np.__version__,
                             "ftfy": ftfy.__version__, "hpsv2 (steps of)": "1.2.0"},
                "files": {}}
    for name in ("head.safetensors", "prompts.json", "scores.safetensors"):
        data = open(os.path.join(OUT, name), "rb").read()
        manifest["files"][name] = [len(data), hashlib.sha256(data).hexdigest()[:16]]
    json.dump(manifest, open(os.path.join(OUT, "manifest.json"), "w"), indent=1)


if __name__ == "__main__":
    main()

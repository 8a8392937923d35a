#!/usr/bin/env python3
"""Fixtures of what CLIP is given: images resized by Pillow, prompts cleaned and tokenized as open_clip does.

    pip install pillow==12.0.0 numpy==2.4.6 safetensors==0.8.0 ftfy==6.3.1 regex
    pip download --no-deps open-clip-torch==3.3.0 && unzip open_clip_torch-3.3.0-*.whl open_clip/*
    python Tools/reference/make_clip_inputs.py open_clip/bpe_simple_vocab_16e6.txt.gz

Writes Tests/Fixtures/clip/{resize.safetensors,text.json,manifest.json}. Seeded; takes a second. The tokenizer is
tok_reference.py's, which is checked against open_clip's; cleaning is open_clip's basic_clean, by its two libraries.
"""
import datetime, gzip, hashlib, html, json, os, sys
import ftfy, numpy as np, PIL
from PIL import Image
from safetensors.numpy import save_file
from tok_reference import ClipBPE

HERE = os.path.dirname(os.path.abspath(__file__))
OUT = os.path.normpath(os.path.join(HERE, "../../Tests/Fixtures/clip"))
SIZES = [((40, 52), (28, 36)), ((7, 5), (28, 20)), ((1, 1), (3, 4)), ((1, 9), (4, 36)), ((9, 1), (2, 7)),
         ((53, 31), (17, 10)), ((33, 47), (47, 33)), ((64, 64), (64, 20)), ((64, 64), (21, 64)), ((101, 3), (5, 2)),
         ((31, 31), (31, 31)), ((90, 120), (1, 1)), ((75, 90), (14, 14)), ((2, 300), (28, 28))]
SQUARES = [(37, 53), (53, 37), (16, 31), (31, 16), (16, 16), (9, 12), (1, 2), (61, 60), (200, 90)]
EDGE = 16


def picture(rng, h, w, kind):
    """Noise, a smooth picture, or black and white blocks, whose overshoot is cut off."""
    if kind == 0:
        return rng.integers(0, 256, (h, w, 3), dtype=np.uint8)
    y, x = np.mgrid[0:h, 0:w] / 7.0
    if kind == 1:
        waves = np.stack([np.sin(y), np.cos(x), np.sin(x * y)], -1)
        return np.round((waves * 0.5 + 0.5) * 255).astype(np.uint8)
    return np.repeat((((y // 1 + x // 1) % 2) * 255).astype(np.uint8)[..., None], 3, 2)


def resize(image, h, w):
    return np.asarray(Image.fromarray(image).resize((w, h), Image.Resampling.BICUBIC))


def resize_float(image, h, w):
    """The same filter in floats, by Pillow's mode F: no rounding to levels, no limits."""
    planes = [Image.fromarray(image[..., c].astype(np.float32) / np.float32(255), mode="F") for c in range(3)]
    return np.stack([np.asarray(p.resize((w, h), Image.Resampling.BICUBIC)) for p in planes], -1)


def crop(image, top, left):
    return image[top:top + EDGE, left:left + EDGE]


def sides(h, w):
    long = int(EDGE * max(h, w) / min(h, w))
    return (EDGE, long) if h <= w else (long, EDGE)


def padded(image):
    h, w = image.shape[:2]
    result = np.zeros((EDGE, EDGE, 3), image.dtype)
    top, left = (EDGE - h) // 2, (EDGE - w) // 2
    result[top:top + h, left:left + w] = image
    return result


def longest(h, w):
    scale = EDGE / float(max(h, w))
    return round(h * scale), round(w * scale)


# Named references are HTML 4's: the port knows no others.
PROMPTS = [
    "A photo of a cat", "", "   ", "it’s “quoted” text", "‘single’ ‛rev ʼmod", "„low‟ quotes", "ＦＵＬＬ ｗｉｄｔｈ！？", "ideo　graphic",
    "&amp; &lt;b&gt; &quot;q&quot;", "&amp;amp;amp;amp; nested", "&eacute;t&eacute; &NTILDE; &ETH; &ntilde",
    "AT&T and Q&A &copy2020 &notit; &not;it", "&#39;a&#x27;b&#8217;c&#233d &#0; &#128; &#x110000; &#1; &#xFFFE;",
    "&nbsp;x&hellip;&mdash;&alpha;&ALPHA;&Alpha;", "a <b> &amp;amp; c", "a <i>&ldquo;b&rdquo;</i>", "&ldquo;c&rdquo;", "ﬁne oﬀice ﬅ ŉ Ǆ ĳ",
    "tab\tnew\nline\r\nend", "line\u2028sep\u2029par\u0085next", "bell\x07 null\x00 \x1b[31mred\x1b[0m del\x7f", "\ufeffbom \ufffcobj \u206aiss",
    "e\u0301 combining", "日本語 ｶﾀｶﾅ", "🙂👩‍🚀 emoji", "masterpiece, (best quality:1.2), 8k --ar 16:9", "don't DON'T we'LL",
    "<|endoftext|> inside <|startoftext|>", "<end_of_text> and <start_of_text>", "&lt;end_of_text&gt;", "&#59; &; & ;", "word " * 90,
    "café naïve résumé", "ΟΔΟΣ ΣΑΣ", "&amp", "100% &permil; a&b;c", "\u00a0nbsp", "&zwj;x&shy;y", "&#x26;lt;", "‚ € œ", "&AMP;&LT;&Gamma;&gamma;",
]


def clean(text):
    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return " ".join(text.split()).lower()


class OpenClip(ClipBPE):
    """The other spelling of the special tokens, and zeros behind the end."""
    def __init__(self, merges):
        super().__init__(merges)
        self.special = {"<start_of_text>": self.ids["<|startoftext|>"], "<end_of_text>": self.ids["<|endoftext|>"]}

    def tokens(self, text, n=77):
        ids, i = [], 0
        while i < len(text):
            hits = [(text.find(s, i), s) for s in self.special if text.find(s, i) >= 0]
            end, name = min(hits) if hits else (len(text), None)
            ids += [k for w in self.plain(text[i:end]) for k in self.word(w)]
            if name: ids.append(self.special[name])
            i = end + len(name or "")
        ids = [self.ids["<|startoftext|>"]] + ids[:n - 2] + [self.ids["<|endoftext|>"]]
        return ids + [0] * (n - len(ids))

    @staticmethod
    def plain(text):
        """Words, where the other spelling is no token."""
        marked = text.replace("<|", "<|\x00").replace("|>", "\x00|>")
        return [w.replace("\x00", "") for w in ClipBPE.split(marked) if w != "\x00"]


def main():
    rng = np.random.default_rng(20252)
    os.makedirs(OUT, exist_ok=True)
    tensors = {}
    for i, ((h, w), (oh, ow)) in enumerate(SIZES):
        image = picture(rng, h, w, i % 3)
        tensors[f"resize.{i}.in"], tensors[f"resize.{i}.out"] = image, resize(image, oh, ow)
        tensors[f"resize.{i}.float"] = resize_float(image, oh, ow)
    for i, (h, w) in enumerate(SQUARES):
        image = picture(rng, h, w, i % 3)
        short = resize(image, *sides(h, w))
        oh, ow = short.shape[:2]
        tensors[f"square.{i}.in"] = image
        tensors[f"square.{i}.transformers"] = crop(short, (oh - EDGE) // 2, (ow - EDGE) // 2)
        # torchvision's center_crop
        tensors[f"square.{i}.torchvision"] = crop(short, int(round((oh - EDGE) / 2)), int(round((ow - EDGE) / 2)))
        tensors[f"square.{i}.squash"] = resize(image, EDGE, EDGE)
        tensors[f"square.{i}.longest"] = padded(resize(image, *longest(h, w)))
        tensors[f"square.{i}.hpsv2"] = padded(resize_float(image, *longest(h, w)))
    save_file({k: np.ascontiguousarray(v) for k, v in tensors.items()}, os.path.join(OUT, "resize.safetensors"))
    tokenizer = OpenClip(gzip.open(sys.argv[1]).read().decode().split("\n")[1:48895])
    cases = [{"text": t, "cleaned": clean(t), "ids": tokenizer.tokens(clean(t))} for t in PROMPTS]
    with open(os.path.join(OUT, "text.json"), "w") as f:
        f.write("[\n" + ",\n".join(json.dumps(case) for case in cases) + "\n]\n")
    manifest = {"generator": "Tools/reference/make_clip_inputs.py", "date": str(datetime.date.today()),
                "versions": {"pillow": PIL.__version__, "numpy": np.__version__, "ftfy": ftfy.__version__, "open_clip": "3.3.0"},
                "files": {}}
    for name in ("resize.safetensors", "text.json"):
        data = open(os.path.join(OUT, name), "rb").read()
        manifest["files"][name] = [len(data), hashlib.sha256(data).hexdigest()[:16]]
    json.dump(manifest, open(os.path.join(OUT, "manifest.json"), "w"), indent=1)


if __name__ == "__main__":
    main()

"""The reference's side of the benchmarks: diffusers' models in PyTorch eager, and two training loops.

Speaks the protocol of Runner/main.swift on stdin and stdout; further operations:
  {"op": "inputs", "kind": …, "parameters": {…}, "file": …}  writes seeded inputs for both sides
  {"op": "compare", "file": theirs, "with": ours}            relative error of each output, and of all gradients together
  {"op": "probe"}                                            peaks of the machine: products and copies
"""

import contextlib, json, sys, time, warnings
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch.nn.attention import SDPBackend, sdpa_kernel

torch.set_flush_denormal(True)
warnings.filterwarnings("ignore")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "autocast": torch.float32}


def transformer(folder, family, dtype):
    from diffusers import FluxTransformer2DModel, SD3Transformer2DModel
    from diffusers.utils import logging

    logging.disable_progress_bar()
    kind = SD3Transformer2DModel if family == "sd3" else FluxTransformer2DModel
    return kind.from_pretrained(folder, torch_dtype=dtype).eval()


class Precision:
    """How a variant computes: dtype float32, bfloat16 (weights) or autocast; attention sdpa or math."""

    def __init__(self, p):
        self.dtype, self.attention = p.get("dtype", "float32"), p.get("attention", "sdpa")

    def __call__(self):
        stack = contextlib.ExitStack()
        if self.dtype == "autocast":
            stack.enter_context(torch.autocast("cpu", torch.bfloat16))
        if self.attention == "math":
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        return stack


class Velocity:
    """diffusers' transformer as v(x, t): times in 0 … 1000, float32 in and out."""

    def __init__(self, model, family, grid=None, text_tokens=0):
        self.model, self.family = model, family
        self.dtype = next(model.parameters()).dtype
        if family != "sd3":
            rows, columns = grid
            self.image_ids = torch.zeros(rows, columns, 3)
            self.image_ids[..., 1] = torch.arange(rows)[:, None]
            self.image_ids[..., 2] = torch.arange(columns)[None]
            device = next(model.parameters()).device
            self.image_ids = self.image_ids.reshape(-1, 3).to(device)
            self.text_ids = torch.zeros(text_tokens, 3, device=device)

    def __call__(self, x, times, text, pooled):
        x, text, pooled = x.to(self.dtype), text.to(self.dtype), pooled.to(self.dtype)
        if self.family == "sd3":
            out = self.model(x, encoder_hidden_states=text, pooled_projections=pooled, timestep=times, return_dict=False)[0]
        else:
            guidance = torch.full_like(times, 3.5) if self.model.config.guidance_embeds else None
            out = self.model(
                x, encoder_hidden_states=text, pooled_projections=pooled, timestep=times / 1000, guidance=guidance,
                txt_ids=self.text_ids, img_ids=self.image_ids, return_dict=False)[0]
        return out.float()


def add_adapter(model, rank):
    """PEFT's adapter on every linear layer, factors in float32; returns name → factor as our files name them."""
    from peft import LoraConfig

    names = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    model.requires_grad_(False)
    model.add_adapter(LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=names))
    model.train()
    found = {}
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            parameter.data = parameter.data.float()
            found[name.replace(".default", "")] = parameter
    return found


class Network:
    """One pass of a transformer; see NetworkCase."""

    def __init__(self, p):
        self.precision = Precision(p)
        model = transformer(p["folder"], p.get("family"), DTYPES[self.precision.dtype])
        inputs = load_file(p["inputs"])
        self.arguments = [inputs[name] for name in ("latents", "times", "text", "pooled")]
        self.upstream = inputs["gradient"]
        self.trained = {}
        if p.get("train") == "lora":
            self.trained = add_adapter(model, p.get("rank", 16))
            with torch.no_grad():
                for name, parameter in self.trained.items():
                    parameter.copy_(inputs[name])
        elif p.get("train") == "full":
            self.trained = dict(model.train().named_parameters())
        self.velocity = Velocity(model, p.get("family"), p.get("grid"), inputs["text"].shape[1])

    def prepare(self):
        for parameter in self.trained.values():
            parameter.grad = None

    def run(self):
        if not self.trained:
            with torch.no_grad(), self.precision():
                return {"output": self.velocity(*self.arguments)}
        with self.precision():
            output = self.velocity(*self.arguments)
        output.backward(self.upstream)
        return {"output": output}

    def check(self):
        self.prepare()
        output = self.run()["output"]
        return {"output": output} | {"gradient." + name: p.grad for name, p in self.trained.items()}


class Decode:
    """Latents to images in 0 … 1."""

    def __init__(self, p):
        self.precision = Precision(p)
        self.vae = autoencoder(p["folder"], DTYPES[self.precision.dtype])
        self.latents = load_file(p["inputs"])["latents"]

    def prepare(self):
        pass

    def run(self):
        with torch.no_grad(), self.precision():
            return {"output": images(self.vae, self.latents)}

    check = run


def autoencoder(folder, dtype=torch.float32):
    from diffusers import AutoencoderKL

    return AutoencoderKL.from_pretrained(folder, torch_dtype=dtype).eval()


def images(vae, latents):
    """[B, C, h, w] → [B, 3, H, W] in 0 … 1, float32."""
    latents = latents / vae.config.scaling_factor + vae.config.shift_factor
    return (vae.decode(latents.to(vae.dtype), return_dict=False)[0].float() / 2 + 0.5).clamp(0, 1)


def vivid(x):
    """Colourfulness of [B, 3, H, W], by its definition: Hasler and Süsstrunk (2003), pixels in 0 … 1."""
    r, g, b = x.unbind(1)
    opponents = torch.stack([r - g, (r + g) / 2 - b], 1)
    spread = opponents.var((2, 3), correction=0).sum(1).sqrt()
    return spread + 0.3 * opponents.mean((2, 3)).square().sum(1).sqrt()


class Scenes:
    """The verifier of the built-in scenes by its definition: mean squared difference to every template everywhere.

    x∗T as plain convolutions, x²∗1 as another; the nearest detections are kept, each suppressing what is within 14 px.
    """

    def __init__(self, sprites, lines):
        import safetensors

        self.scenes = lines
        with safetensors.safe_open(sprites, "pt") as file:
            self.objects = json.loads(file.metadata()["objects"])
            sizes = sorted(int(name[5:]) for name in file.keys() if name.startswith("rgba_"))
            self.templates = []
            for size in sizes:
                rgba = file.get_tensor(f"rgba_{size}").float().permute(0, 3, 1, 2) / 255
                ink = torch.nn.functional.pad(rgba[:, 3:] - rgba[:, :3], (1, 1, 1, 1))  # a white margin of 1 px
                self.templates.append((size, ink, ink.square().sum((1, 2, 3))))

    def __call__(self, x):
        ink = 1 - x
        total = [[] for _ in range(len(ink))]
        for size, ink_template, energy in self.templates:
            n, box = 3 * (size + 2) ** 2, torch.ones(1, 3, size + 2, size + 2)
            convolve = lambda image, kernel: torch.nn.functional.conv2d(image, kernel, padding=1)
            maps = (convolve(ink.square(), box) - 2 * convolve(ink, ink_template) + energy[:, None, None]) / n
            least, which = maps.min(1)
            for image, top, left in (least < 0.03).nonzero().tolist():
                found = (float(least[image, top, left]), size, top, left, self.objects[which[image, top, left]])
                total[image].append(found)
        return torch.tensor([self.score(keep_best(found), scene) for found, scene in zip(total, self.scenes)])

    @staticmethod
    def score(found, scene):
        """The graded score."""
        close = lambda a, b: max(0.0, 1 - abs(a - b) / b)
        terms, firsts = [], []
        for entry in scene["include"]:
            same = [f for f in found if f[2].split()[-1] == entry["class"]]
            matching = [f for f in same if "color" not in entry or f[2].split()[0] == entry["color"]]
            firsts.append(matching[0] if matching else None)
            terms.append(close(len(matching), entry["count"]))
            if "color" in entry:
                terms.append(close(len(same), entry["count"]))
        if scene.get("relation"):
            holds = False
            if firsts[0] and firsts[1]:
                dx, dy = firsts[0][0] - firsts[1][0], firsts[0][1] - firsts[1][1]
                along, across = {"left of": (-dx, dy), "right of": (dx, dy), "above": (-dy, dx), "below": (dy, dx)}[scene["relation"]]
                holds = along > 8 and along > abs(across)
            terms.append(float(holds))
        wanted = sum(entry["count"] for entry in scene["include"])
        return (sum(terms) + close(len(found), wanted)) / (len(terms) + 1)


def keep_best(found):
    """(x, y, object) of candidates that are not within 14 px of a better one."""
    kept = []
    for _, size, top, left, name in sorted(found):
        x, y = left + size // 2, top + size // 2
        if not any(abs(x - k[0]) < 14 and abs(y - k[1]) < 14 for k in kept):
            kept.append((x, y, name))
    return kept


class Reward:
    """Images to scores, brought to the host."""

    def __init__(self, p):
        self.images = load_file(p["inputs"])["images"]
        lines = Path(p["prompts"]).read_text().splitlines()[: len(self.images)]
        self.reward = vivid if p["name"] == "vivid" else Scenes(p["sprites"], [json.loads(line) for line in lines])

    def prepare(self):
        pass

    def run(self):
        with torch.no_grad():
            return {"output": torch.tensor(self.reward(self.images).tolist())}

    check = run


class Clip:
    """Images and prompts to cosines as the published scorers do: bytes, Pillow, transformers' processor and CLIPModel."""

    def __init__(self, p):
        from transformers import CLIPModel, CLIPTokenizer
        from transformers.utils import logging
        try:
            from transformers import CLIPImageProcessorPil as Processor
        except ImportError:
            from transformers import CLIPImageProcessor as Processor

        logging.disable_progress_bar()
        folder, self.precision = p["folder"], Precision(p)
        self.model = CLIPModel.from_pretrained(folder, torch_dtype=DTYPES[self.precision.dtype]).eval()
        self.processor = Processor.from_pretrained(folder)
        self.tokenizer = CLIPTokenizer(f"{folder}/vocab.json", f"{folder}/merges.txt")
        self.images = load_file(p["inputs"])["images"]
        lines = Path(p["prompts"]).read_text().splitlines()[: len(self.images)]
        self.prompts = [json.loads(line)["prompt"] for line in lines]

    def prepare(self):
        pass

    def run(self):
        from PIL import Image

        with torch.no_grad(), self.precision():
            levels = (self.images * 255).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()
            pixels = self.processor(images=[Image.fromarray(x) for x in levels], return_tensors="pt")["pixel_values"]
            tokens = self.tokenizer(self.prompts, padding=True, truncation=True, max_length=77, return_tensors="pt")
            o = self.model(pixel_values=pixels, **tokens)
            return {"output": torch.tensor((o.image_embeds * o.text_embeds).sum(-1).tolist())}

    check = run


# --------------------------------------------------------------------------------------------------------------- loops


class Loop:
    """What both training loops share: models, schedule, the stochastic step and its log-probability.

    The step is Flow-GRPO's (arXiv 2505.05470), x' = μ + s·ε with g = η·√(σ/(1−σ)), Δ = σ − σ', s = g·√Δ and
    μ = x·(1 − g²Δ/(2σ)) − v·Δ·(1 + g²(1−σ)/(2σ)); at σ = 1 the second level takes σ's place in 1 − σ.
    log p is the mean over elements. Steps before the last are trained.
    """

    clip, rate, decay, norm = 5e-5, 1e-5, 1e-4, 0.01

    def __init__(self, p):
        self.precision = Precision(p)
        model = self.load(p)
        self.velocity = Velocity(model, "flux", p["grid"], self.text.shape[1])
        self.updates, self.group, self.grid = p["updates"], p["group"], p["grid"]
        levels = torch.linspace(1, 0, p["steps"] + 1, dtype=torch.float64)
        self.sigmas = (3 * levels / (1 + 2 * levels)).tolist()
        self.table = []
        for i in range(p["steps"]):
            s, next_s = self.sigmas[i], self.sigmas[i + 1]
            gap = s - next_s
            g2 = 0.7**2 * s / (1 - (self.sigmas[1] if s == 1 else s))
            self.table.append((1 - g2 * gap / (2 * s), -gap * (1 + g2 * (1 - s) / (2 * s)), (g2 * gap) ** 0.5))
        self.coefficients = torch.tensor(self.table, device=self.device)
        self.optimizer = self.make_optimizer()

    def load(self, p):
        """The transformer; sets autoencoder, condition and what is trained."""
        self.device = torch.device("cpu")
        folder = Path(p["folder"])
        model = transformer(folder / "transformer", "flux", DTYPES[self.precision.dtype])
        self.vae = autoencoder(folder / "vae")
        condition = load_file(p["inputs"])
        self.text, self.pooled = condition["text"], condition["pooled"]
        self.trained = list(add_adapter(model, 16).values() if p["train"] == "lora" else model.train().parameters())
        return model

    def prepare(self):
        self.parts = {}

    @contextlib.contextmanager
    def timed(self, part):
        start = self.synchronize()
        yield
        self.parts[part] = self.parts.get(part, 0.0) + self.synchronize() - start

    def synchronize(self):
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def run(self):
        samples, gains = self.rollout()
        with self.timed("update"):
            for update in self.updates:
                self.backward(update, samples, gains)
                self.advance()
        return self.parts

    def predict(self, x, times):
        """v for rows that share the prompt."""
        rows = len(x)
        with self.precision():
            return self.velocity(x, times, self.text.expand(rows, -1, -1), self.pooled.expand(rows, -1))

    @staticmethod
    def log_probability(x, mean, s):
        s = torch.as_tensor(s, dtype=torch.float32, device=x.device)
        log_p = -((x - mean) ** 2) / (2 * s**2) - torch.log(s) - 0.5 * torch.log(torch.tensor(2 * torch.pi))
        return log_p.mean((1, 2))

    def noise(self, rows):
        tokens = self.grid[0] * self.grid[1]
        return torch.randn(rows, tokens, self.velocity.model.config.in_channels, device=self.device)

    def unpack(self, x):
        rows, columns = self.grid
        x = x.reshape(len(x), rows, columns, -1, 2, 2).permute(0, 3, 1, 4, 2, 5)
        return x.reshape(len(x), -1, 2 * rows, 2 * columns)

    def trajectory(self, start):
        """States [T, B, …], log-probabilities [T, B] and clean latents of one batch of rows."""
        x, states, log_ps = start, [start], []
        for i, (a, b, s) in enumerate(self.table):
            v = self.predict(x, torch.full((len(x),), 1000 * self.sigmas[i], device=x.device))
            if i == len(self.table) - 1:
                clean = x - self.sigmas[i] * v
            mean = a * x + b * v
            x = mean + s * torch.randn_like(x)
            log_ps.append(self.log_probability(x, mean, s))
            states.append(x)
        return torch.stack(states), torch.stack(log_ps), clean

    def replayed(self, x, following, steps):
        """log p of stored transitions, one step a row."""
        v = self.predict(x, torch.tensor([1000 * self.sigmas[i] for i in steps], device=x.device))
        a, b, s = (c[:, None, None] for c in self.coefficients[steps].unbind(1))
        return self.log_probability(following, a * x + b * v, s)

    def clipped(self, ratio, advantage):
        return torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - self.clip, 1 + self.clip))

    def advance(self):
        torch.nn.utils.clip_grad_norm_(self.trained, self.norm)
        self.optimizer.step()
        self.optimizer.zero_grad()


def advantages(rewards):
    return (rewards - rewards.mean()) / (rewards.std() + 1e-8)


class Published(Loop):
    """One image at a time through all steps, decoded and scored alone; then one sample and one chunk at a time, a backward
    pass each, with its loss and ratio read back; AdamW as it comes."""

    def make_optimizer(self):
        return torch.optim.AdamW(self.trained, lr=self.rate, weight_decay=self.decay)

    def rollout(self):
        rewards, samples = [], []
        start = self.noise(1)
        with torch.no_grad():
            for _ in range(self.group):
                with self.timed("rollout"):
                    states, log_ps, clean = self.trajectory(start)
                with self.timed("decode"):
                    rewards.append(vivid(images(self.vae, self.unpack(clean))).item())
                samples.append((states, log_ps))
        return samples, advantages(torch.tensor(rewards))

    def backward(self, update, samples, gains):
        for sample, first, end in update:
            states, log_ps = samples[sample]
            new = self.replayed(states[first:end, 0], states[first + 1 : end + 1, 0], list(range(first, end))).mean()
            ratio = torch.exp(new - log_ps[first:end, 0].mean())
            loss = self.clipped(ratio, gains[sample]) / len(update)
            loss.backward()
            loss.item(), ratio.item()

    def check(self):
        """Log-probabilities and the first update's gradient, with the trajectories they are of."""
        self.prepare()
        samples, gains = self.rollout()
        self.optimizer.zero_grad()
        self.backward(self.updates[0], samples, gains)
        log_ps = torch.cat([log_ps for _, log_ps in samples], 1)[:-1].T
        trajectories = {"states": torch.cat([states for states, _ in samples], 1), "advantages": gains, "output": log_ps}
        parameters = self.velocity.model.named_parameters()
        return trajectories | {"gradient." + name: p.grad for name, p in parameters if p.grad is not None}


class Batched(Loop):
    """The whole group as one batch in rollout, decoding and reward; an update goes over the timesteps, each one forward and
    backward pass of all samples that train it; nothing is read back; fused AdamW."""

    def make_optimizer(self):
        return torch.optim.AdamW(self.trained, lr=self.rate, weight_decay=self.decay, fused=True)

    def rollout(self):
        with torch.no_grad():
            with self.timed("rollout"):
                states, log_ps, clean = self.trajectory(self.noise(1).expand(self.group, -1, -1))
            with self.timed("decode"):
                gains = advantages(vivid(images(self.vae, self.unpack(clean))))
        return (states, log_ps), gains

    def backward(self, update, samples, gains):
        states, log_ps = samples
        pairs = [(sample, step) for sample, first, end in update for step in range(first, end)]
        for step in sorted({step for _, step in pairs}):
            rows = [sample for sample, s in pairs if s == step]
            new = self.replayed(states[step, rows], states[step + 1, rows], [step] * len(rows))
            ratio = torch.exp(new - log_ps[step, rows])
            (self.clipped(ratio, gains[rows]).sum() / len(pairs)).backward()


class Device(Published):
    """The published-style loop on a model of random weights made on a device: bfloat16 weights, an adapter on attention and
    MLP, activation checkpointing; see DeviceCase."""

    targets = ("attn.to_q attn.to_k attn.to_v attn.to_out.0 attn.add_q_proj attn.add_k_proj attn.add_v_proj attn.to_add_out "
               "ff.net.0.proj ff.net.2 ff_context.net.0.proj ff_context.net.2 proj_mlp").split()

    def load(self, p):
        from diffusers import AutoencoderKL, FluxTransformer2DModel
        from peft import LoraConfig

        self.device = torch.device(p["device"])
        folder = Path(p["folder"])
        read = lambda part: json.loads((folder / part / "config.json").read_text())
        config = read("transformer")
        with torch.device("meta"):
            vae = AutoencoderKL.from_config(read("vae"))
            torch.set_default_dtype(DTYPES[self.precision.dtype])
            model = FluxTransformer2DModel.from_config(config)
            torch.set_default_dtype(torch.float32)
        self.vae = vae.to_empty(device=self.device).eval()
        model = model.to_empty(device=self.device)
        with torch.no_grad():
            for tensor in [*model.parameters(), *self.vae.parameters()]:
                tensor.normal_(0, tensor[0].numel() ** -0.5 if tensor.ndim > 1 else 0.02)
        model.requires_grad_(False)
        model.add_adapter(LoraConfig(r=16, lora_alpha=32, target_modules=r"(single_)?transformer_blocks\.\d+\.(" + "|".join(
            name.replace(".", r"\.") for name in self.targets + ["proj_out"]) + ")"))
        model.train()
        if p.get("checkpointing"):
            model.enable_gradient_checkpointing()
        self.trained = [q for q in model.parameters() if q.requires_grad]
        for parameter in self.trained:
            parameter.data = parameter.data.float()
        self.text = torch.randn(1, p["textTokens"], config["joint_attention_dim"], device=self.device)
        self.pooled = torch.randn(1, config["pooled_projection_dim"], device=self.device)
        return model


CASES = {
    "network": Network, "decode": Decode, "reward": Reward, "clip": Clip, "published": Published, "batched": Batched, "device": Device}


# ------------------------------------------------------------------------------------------------------------- inputs


def network_inputs(p):
    """Seeded latents, times, embeddings, upstream gradient and, for an adapter, its factors."""
    config = json.loads((Path(p["folder"]) / "config.json").read_text())
    g = torch.Generator().manual_seed(1)
    normal = lambda *shape: torch.randn(*shape, generator=g)
    batch, (rows, columns) = p["batch"], p["grid"]
    channels = config["in_channels"]
    shape = [channels, 2 * rows, 2 * columns] if p.get("family") == "sd3" else [rows * columns, channels]
    tensors = {
        "latents": normal(batch, *shape),
        "gradient": normal(batch, *shape),
        "times": torch.rand(batch, generator=g) * 1000,
        "text": normal(batch, p["textTokens"], config["joint_attention_dim"]),
        "pooled": normal(batch, config["pooled_projection_dim"]),
    }
    if p.get("train") == "lora":
        model = transformer(p["folder"], p.get("family"), torch.float32)
        for name, parameter in add_adapter(model, p.get("rank", 16)).items():
            tensors[name] = normal(*parameter.shape) * (0.05 if ".lora_B" in name else parameter.shape[1] ** -0.5)
    return tensors


def decode_inputs(p):
    config = json.loads((Path(p["folder"]) / "config.json").read_text())
    return {"latents": torch.randn(p["batch"], config["latent_channels"], *p["size"], generator=torch.Generator().manual_seed(1))}


def reward_inputs(p):
    """Scenes: glyphs at random places on white, a few an image, with a little noise."""
    import safetensors

    g = torch.Generator().manual_seed(1)
    x = torch.ones(p["batch"], 3, 64, 64)
    with safetensors.safe_open(p["sprites"], "pt") as file:
        sheets = [file.get_tensor(name) for name in sorted(file.keys()) if name.startswith("rgba_")]
    pick = lambda n: int(torch.randint(n, (), generator=g))
    for image in x:
        for _ in range(1 + pick(3)):
            sheet = sheets[pick(len(sheets))]
            glyph = sheet[pick(len(sheet))].float().permute(2, 0, 1) / 255
            size = glyph.shape[1]
            top, left = pick(65 - size), pick(65 - size)
            part = image[:, top : top + size, left : left + size]
            part.copy_(glyph[:3] + part * (1 - glyph[3:]))
    return {"images": (x + 0.02 * torch.randn(x.shape, generator=g)).clamp(0, 1)}


def wide_inputs(p):
    """A FLUX transformer folder of random bfloat16 weights, in `folder`; nothing for the file but what a pass takes."""
    from diffusers import FluxTransformer2DModel

    torch.manual_seed(1)
    torch.set_default_dtype(torch.bfloat16)
    model = FluxTransformer2DModel(**p["config"])
    torch.set_default_dtype(torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.fill_(1.0 if "norm" in name and name.endswith("weight") else 0.0)
            else:
                parameter.normal_(0, parameter.shape[1] ** -0.5)
    model.save_pretrained(p["folder"])
    return network_inputs(p)


def clip_inputs(p):
    """A CLIP folder of random weights, with the vocabulary of the folder `vocabulary`, and smooth images."""
    import shutil
    from transformers import CLIPConfig, CLIPModel

    folder = Path(p["folder"])
    if not (folder / "config.json").exists():
        torch.manual_seed(1)
        model = CLIPModel(CLIPConfig(**p["config"]))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.ndim > 1:
                    parameter.normal_(0, parameter[0].numel() ** -0.5)
        model.save_pretrained(folder)
        size = p["config"]["vision_config"]["image_size"]
        (folder / "preprocessor_config.json").write_text(json.dumps({
            "size": {"shortest_edge": size}, "crop_size": {"height": size, "width": size}, "resample": 3, "do_center_crop": True,
            "do_normalize": True, "do_rescale": True, "do_resize": True, "rescale_factor": 1 / 255, "do_convert_rgb": True,
            "image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711],
            "image_processor_type": "CLIPImageProcessor"}))
        for name in ("vocab.json", "merges.txt"):
            shutil.copy(Path(p["vocabulary"]) / name, folder / name)
    coarse = torch.rand(p["batch"], 3, 16, 16, generator=torch.Generator().manual_seed(1))
    return {"images": torch.nn.functional.interpolate(coarse, size=p["size"], mode="bicubic").clamp(0, 1)}


INPUTS = {
    "network": network_inputs, "wide": wide_inputs, "decode": decode_inputs, "reward": reward_inputs, "clip": clip_inputs}


def compare(theirs, ours):
    """2-norm of the difference over that of the reference: of every output, and of all gradients together."""
    theirs, ours = load_file(theirs), load_file(ours)
    theirs = {name: t for name, t in theirs.items() if name.split(".")[0] in ("output", "gradient")}
    if theirs.keys() != ours.keys():
        raise ValueError(f"results differ in names: {sorted(theirs.keys() ^ ours.keys())[:4]}")
    sums = {}
    for name, reference in theirs.items():
        key = name.split(".")[0]
        difference, size = sums.get(key, (0.0, 0.0))
        if reference.shape != ours[name].shape:
            raise ValueError(f"{name}: {list(ours[name].shape)}, the reference has {list(reference.shape)}")
        sums[key] = (difference + float((ours[name] - reference).double().square().sum()), size + float(reference.double().square().sum()))
    return {key: (a / b) ** 0.5 if b else float("inf") for key, (a, b) in sums.items()}


# -------------------------------------------------------------------------------------------------------------- limits


def seconds(body, least=3, budget=1.5):
    """The best of several runs: what the machine can do undisturbed."""
    body()
    best, start = float("inf"), time.perf_counter()
    for i in range(1000):
        t = time.perf_counter()
        body()
        best = min(best, time.perf_counter() - t)
        if i + 1 >= least and time.perf_counter() - start > budget:
            return best
    return best


SHAPES = [(1536, 256, 1024), (2048, 2048, 2048), (1536, 3072, 12288), (4096, 4096, 4096)]


def probe():
    """Peaks with all threads: FLOP/s of products of both dtypes, bytes/s of a copy, and FLOP/s of one core's float32."""
    result = {}
    for name, dtype in [("float32", torch.float32), ("bfloat16", torch.bfloat16)]:
        for m, k, n in SHAPES:
            a, b = torch.randn(m, k).to(dtype), torch.randn(n, k).to(dtype)
            rate = 2 * m * k * n / seconds(lambda: torch.nn.functional.linear(a, b))
            result[name] = max(result.get(name, 0), rate)
    source = torch.zeros(1 << 26)
    target = torch.empty_like(source)
    result["bandwidth"] = 2 * 4 * (1 << 26) / seconds(lambda: target.copy_(source))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    a, b = torch.randn(1536, 256), torch.randn(256, 1024)
    result["core"] = 2 * 1536 * 256 * 1024 / seconds(lambda: a @ b)
    torch.set_num_threads(threads)
    return result


def sustained(dtype):
    """FLOP/s of all threads over a second of the product that reached the peak: what lasts, not what a moment allows."""
    def rate(shape, budget):
        m, k, n = shape
        a, b = torch.randn(m, k).to(dtype), torch.randn(n, k).to(dtype)
        torch.nn.functional.linear(a, b)
        start, count = time.perf_counter(), 0
        while time.perf_counter() - start < budget:
            torch.nn.functional.linear(a, b)
            count += 1
        return 2 * m * k * n * count / (time.perf_counter() - start)

    return max(rate(shape, 0.5) for shape in SHAPES[2:])


def probe_device():
    """FLOP/s of bfloat16 products on the CUDA device."""
    best = 0
    for n in (4096, 8192, 12288):
        a, b = (torch.randn(n, n, device="cuda", dtype=torch.bfloat16) for _ in range(2))

        def product():
            a @ b
            torch.cuda.synchronize()

        best = max(best, 2 * n**3 / seconds(product))
    return {"bfloat16": best, "device": torch.cuda.get_device_name()}


# ------------------------------------------------------------------------------------------------------------ protocol

current = None


def answer(request):
    global current
    operation, p = request["op"], request.get("parameters")
    if operation == "setup":
        current = None
        made = CASES[request["kind"]](p)
        for _ in range(request.get("warm", 2)):
            made.prepare()
            made.run()
        current = made
        return {"threads": torch.get_num_threads()}
    if operation == "run":
        current.prepare()
        start = time.perf_counter()
        parts = current.run()
        return {"seconds": time.perf_counter() - start} | {k: v for k, v in parts.items() if isinstance(v, float)}
    if operation == "check":
        results = {name: t.detach().float().contiguous() for name, t in current.check().items()}
        save_file(results, request["file"])
        return {}
    if operation == "sustained":
        return {"rate": sustained(getattr(torch, request["dtype"]))}
    if operation == "inputs":
        save_file({k: v.contiguous() for k, v in INPUTS[request["kind"]](p).items()}, request["file"])
        return {}
    if operation == "compare":
        return compare(request["file"], request["with"])
    if operation == "probe":
        return probe_device() if (p or {}).get("device") == "cuda" else probe()
    raise ValueError(f"no operation {operation}")


if __name__ == "__main__":
    # Answers alone go to stdout, whatever libraries print.
    out, sys.stdout = sys.stdout, sys.stderr
    for line in sys.stdin:
        try:
            reply = answer(json.loads(line))
        except Exception as error:  # told to the driver, which stops
            reply = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(reply), file=out, flush=True)

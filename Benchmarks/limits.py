"""What a pass must cost: products and bytes, counted from a model's configuration.

FLOPs are those of matrix products, two a multiply-add. Backward: gradients of inputs (not of the network's own inputs),
of weights only where they are trained, attention twice its forward pass. Norms, softmax and other elementwise work count
nothing.

Bytes: every weight read once in the forward pass and once more in the backward pass, its gradient written; outputs of the
linear layers written and read in the forward pass, in the backward pass read again and their gradients written and read.
Weights are float32 where they are trained, else in the network's dtype, like the outputs.
"""

SIZE = {"float32": 4, "bfloat16": 2}


def flux(c, batch, image, text):
    """Linear layers as (rows, inputs, outputs, whether the input is the network's own) and attentions as (tokens, width)."""
    heads, size = c["num_attention_heads"], c["attention_head_dim"]
    d, channels = heads * size, c["in_channels"]
    i, t = batch * image, batch * text
    linears = [(i, channels, d, True), (t, c["joint_attention_dim"], d, True), (i, d, channels, False), (batch, d, 2 * d, False)]
    linears += embedders(batch, d, c["pooled_projection_dim"], c.get("guidance_embeds", False))
    double = [(batch, d, 6 * d, False)] * 2
    for rows in (i, t):
        double += [(rows, d, d, False)] * 4 + [(rows, d, 4 * d, False), (rows, 4 * d, d, False)]
    single = [(batch, d, 3 * d, False)] + [(i + t, d, d, False)] * 3 + [(i + t, d, 4 * d, False), (i + t, 5 * d, d, False)]
    blocks = (c["num_layers"], c["num_single_layers"])
    return linears + double * blocks[0] + single * blocks[1], [(image + text, d)] * sum(blocks)


def sd3(c, batch, image, text):
    d = c["num_attention_heads"] * c["attention_head_dim"]
    patch = c["in_channels"] * c["patch_size"] ** 2
    i, t = batch * image, batch * text
    linears = [(i, patch, d, True), (t, c["joint_attention_dim"], c["caption_projection_dim"], True), (i, d, patch, False)]
    linears += [(batch, d, 2 * d, False)] + embedders(batch, d, c["pooled_projection_dim"], False)
    attentions = []
    for block in range(c["num_layers"]):
        dual, last = block in c.get("dual_attention_layers", []), block == c["num_layers"] - 1
        linears += [(batch, d, (9 if dual else 6) * d, False), (batch, d, (2 if last else 6) * d, False)]
        linears += [(i, d, d, False)] * (8 if dual else 4) + [(t, d, d, False)] * (3 if last else 4)
        for rows in (i,) if last else (i, t):
            linears += [(rows, d, 4 * d, False), (rows, 4 * d, d, False)]
        attentions += [(image + text, d)] + ([(image, d)] if dual else [])
    return linears, attentions


def embedders(batch, d, pooled, guidance):
    time = [(batch, 256, d, True), (batch, d, d, False)]
    return time * (2 if guidance else 1) + [(batch, pooled, d, True), (batch, d, d, False)]


def network_cost(config, family, batch, grid, text_tokens, train, dtype, rank=16):
    """FLOPs and bytes of one pass; train: None (forward), "lora" or "full" (forward and backward)."""
    linears, attentions = (sd3 if family == "sd3" else flux)(config, batch, grid[0] * grid[1], text_tokens)
    forward = sum(2 * rows * a * b for rows, a, b, _ in linears)
    attention = sum(4 * batch * tokens * tokens * width for tokens, width in attentions)
    weights = sum(a * b for _, a, b, _ in linears)
    outputs = sum(rows * b for rows, _, b, _ in linears)
    size = SIZE[dtype]
    if train is None:
        return forward + attention, size * (weights + 2 * outputs)
    flops = forward + 3 * attention + sum(2 * rows * a * b for rows, a, b, first in linears if not first)
    if train == "full":
        return flops + forward, 4 * 3 * weights + size * 5 * outputs
    for rows, a, b, first in linears:
        # x·A and ·B, their weights' gradients, and the gradients of both inputs
        flops += 2 * rows * rank * (2 * (a + b) + b + (0 if first else a))
    factors = rank * sum(a + b for _, a, b, _ in linears)
    return flops, size * (2 * weights + 5 * outputs) + 4 * 3 * factors


def decoder_cost(c, batch, height, width, dtype="float32"):
    """FLOPs and bytes of an autoencoder's decoder on latents [batch, C, height, width].

    After nearest-neighbour upsampling 3 × 3 weights of a pixel read 2 × 2 different ones, which is all that is counted.
    """
    sizes = c["block_out_channels"][::-1]
    flops, weights, outputs = 0, 0, 0

    def conv(a, b, pixels, kernel=3):
        nonlocal flops, weights, outputs
        flops += 2 * batch * pixels * a * b * kernel * kernel
        weights += a * b * kernel * kernel
        outputs += batch * pixels * b

    def resnet(a, b, pixels):
        conv(a, b, pixels)
        conv(b, b, pixels)
        if a != b:
            conv(a, b, pixels, 1)

    pixels, before = height * width, sizes[0]
    conv(c["latent_channels"], before, pixels)
    for _ in range(2):
        resnet(before, before, pixels)
    for _ in range(4):
        conv(before, before, pixels, 1)
    flops += 4 * batch * pixels * pixels * before
    for level, size in enumerate(sizes):
        for _ in range(c["layers_per_block"] + 1):
            resnet(before, size, pixels)
            before = size
        if level < len(sizes) - 1:
            pixels *= 4
            conv(size, size, pixels, 2)
    conv(before, c["out_channels"], pixels)
    return flops, SIZE[dtype] * (weights + 2 * outputs)


def clip_cost(c, batch, text_tokens, dtype="float32"):
    """FLOPs and bytes of both towers of a transformers CLIP configuration, with as many texts as images."""
    v, t = c["vision_config"], c["text_config"]
    patches = (v["image_size"] // v["patch_size"]) ** 2
    flops = 2 * batch * patches * v["hidden_size"] * 3 * v["patch_size"] ** 2
    weights = outputs = 0
    for tower, tokens in ((v, patches + 1), (t, text_tokens)):
        d, hidden, layers = tower["hidden_size"], tower["intermediate_size"], tower["num_hidden_layers"]
        weights += layers * (4 * d * d + 2 * d * hidden)
        outputs += layers * batch * tokens * (5 * d + hidden)
        flops += layers * batch * (2 * tokens * (4 * d * d + 2 * d * hidden) + 4 * tokens * tokens * d)
    return flops, SIZE[dtype] * (weights + 2 * outputs)

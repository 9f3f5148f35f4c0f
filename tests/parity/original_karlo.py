"""Karlo's networks at small width as its authors' code computes them, for tests to compare with.

Modules are called as theirs are, so that a state_dict has their checkpoints' names. Sizes that
their code fixes stay: 64 channels a head, 32 groups.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import small_unclip
import torch
import torch.nn.functional as F
from torch import nn

DIM, CONTEXT, CONTEXT_WIDTH, EXTRA = 32, 77, 40, 4
HEAD = 64


def sinusoids(t: Any, dim: int) -> Any:
    rates = torch.exp(-math.log(10_000) * torch.arange(dim // 2) / (dim // 2))
    angles = t[:, None].float() * rates
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def attend(qkv: Any, context: Any = None, mask: Any = None) -> Any:
    """[b, heads 3 HEAD, n], of the context [b, heads 2 HEAD, m], what is added to the logits
    [b, 1 or n, n + m] -> [b, heads HEAD, n]."""
    b, width, n = qkv.shape
    heads = width // (3 * HEAD)
    q, k, v = qkv.reshape(b, heads, 3, HEAD, n).unbind(2)
    if context is not None:
        context_k, context_v = context.reshape(b, heads, 2, HEAD, -1).unbind(2)
        k, v = torch.cat([context_k, k], dim=3), torch.cat([context_v, v], dim=3)
    logits = q.transpose(2, 3) @ k / math.sqrt(HEAD)
    weights = (logits if mask is None else logits + mask[:, None]).softmax(dim=3)
    return (v @ weights.transpose(2, 3)).reshape(b, heads * HEAD, n)


class Res(nn.Module):
    def __init__(self, given: int, out: int, emb: int, scale_shift: bool, resample: str = ""):
        super().__init__()
        self.resample, self.scale_shift = resample, scale_shift
        norms = nn.GroupNorm(32, given), nn.GroupNorm(32, out)
        convs = nn.Conv2d(given, out, 3, padding=1), nn.Conv2d(out, out, 3, padding=1)
        self.in_layers = nn.Sequential(norms[0], nn.SiLU(), convs[0])
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(emb, out * (1 + scale_shift)))
        self.out_layers = nn.Sequential(norms[1], nn.SiLU(), nn.Identity(), convs[1])
        self.skip_connection = nn.Identity() if given == out else nn.Conv2d(given, out, 1)

    def forward(self, x: Any, emb: Any, *_: Any) -> Any:
        sample = {
            "": lambda x: x,
            "down": lambda x: F.avg_pool2d(x, 2),
            "up": lambda x: F.interpolate(x, scale_factor=2, mode="nearest"),
        }[self.resample]
        h = self.in_layers[2](sample(self.in_layers[:2](x)))
        emb = self.emb_layers(emb)[:, :, None, None]
        if self.scale_shift:
            scale, shift = emb.chunk(2, dim=1)
            h = self.out_layers[1:](self.out_layers[0](h) * (1 + scale) + shift)
        else:
            h = self.out_layers(h + emb)
        return self.skip_connection(sample(x)) + h


class Attention(nn.Module):
    def __init__(self, channels: int, context: int):
        super().__init__()
        self.norm = nn.GroupNorm(32, channels)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.encoder_kv = nn.Conv1d(context, 2 * channels, 1)
        self.proj_out = nn.Conv1d(channels, channels, 1)

    def forward(self, x: Any, _: Any, context: Any, mask: Any) -> Any:
        pixels = x.flatten(2)
        mask = F.pad(mask, (0, pixels.shape[2]))[:, None]
        out = attend(self.qkv(self.norm(x).flatten(2)), self.encoder_kv(context), mask)
        return x + self.proj_out(out).reshape(x.shape)


class UNet(nn.Module):
    """ADM's: the halving and doubling blocks are residual ones."""

    def __init__(
        self,
        given: int,
        out: int,
        channels: int,
        mults: tuple[int, ...],
        blocks: int,
        attention: tuple[int, ...] = (),
        context: int = 0,
        scale_shift: bool = False,
    ):
        super().__init__()
        self.channels, emb = channels, 4 * channels
        self.time_embed = nn.Sequential(nn.Linear(channels, emb), nn.SiLU(), nn.Linear(emb, emb))

        def res(a: int, b: int, resample: str = "") -> Res:
            return Res(a, b, emb, scale_shift, resample)

        def level_of(a: int, level: int) -> list[nn.Module]:
            width = channels * mults[level]
            return [res(a, width), *([Attention(width, context)] if level in attention else [])]

        self.input_blocks = nn.ModuleList(
            [nn.ModuleList([nn.Conv2d(given, channels, 3, padding=1)])]
        )
        widths = [channels]
        for level, mult in enumerate(mults):
            for _ in range(blocks):
                self.input_blocks.append(nn.ModuleList(level_of(widths[-1], level)))
                widths.append(channels * mult)
            if level < len(mults) - 1:
                self.input_blocks.append(nn.ModuleList([res(widths[-1], widths[-1], "down")]))
                widths.append(widths[-1])
        last = widths[-1]
        middle = [Attention(last, context)] if attention else []
        self.middle_block = nn.ModuleList([res(last, last), *middle, res(last, last)])
        self.output_blocks = nn.ModuleList()
        for level in reversed(range(len(mults))):
            for i in range(blocks + 1):
                made = level_of(last + widths.pop(), level)
                last = channels * mults[level]
                if level and i == blocks:
                    made.append(res(last, last, "up"))
                self.output_blocks.append(nn.ModuleList(made))
        self.out = nn.Sequential(
            nn.GroupNorm(32, last), nn.SiLU(), nn.Conv2d(last, out, 3, padding=1)
        )

    def run(self, x: Any, emb: Any, *told: Any) -> Any:
        skips = []
        for block in self.input_blocks:
            for layer in block:
                x = layer(x) if isinstance(layer, nn.Conv2d) else layer(x, emb, *told)
            skips.append(x)
        for layer in self.middle_block:
            x = layer(x, emb, *told)
        for block in self.output_blocks:
            x = torch.cat([x, skips.pop()], dim=1)
            for layer in block:
                x = layer(x, emb, *told)
        return self.out(x)


class SuperResolution(UNet):
    def forward(self, x: Any, t: Any, low_res: Any) -> Any:
        emb = self.time_embed(sinusoids(t, self.channels))
        return self.run(torch.cat([x, low_res], dim=1), emb)


class Decoder(UNet):
    def __init__(self, *args: Any):
        super().__init__(*args, scale_shift=True)
        emb = 4 * self.channels
        self.clip_emb, self.text_feat_proj = nn.Linear(DIM, emb), nn.Linear(DIM, emb)
        self.text_seq_proj = nn.Sequential(
            nn.Linear(DIM, CONTEXT_WIDTH), nn.LayerNorm(CONTEXT_WIDTH)
        )
        self.clip_tok_proj = nn.Linear(DIM, CONTEXT_WIDTH * EXTRA)
        self.cf_param = nn.Parameter(torch.randn(DIM))

    def forward(self, x: Any, t: Any, z_txt: Any, hidden: Any, mask: Any, z_img: Any) -> Any:
        emb = self.time_embed(sinusoids(t, self.channels))
        emb = emb + self.clip_emb(z_img) + self.text_feat_proj(z_txt)
        extra = self.clip_tok_proj(z_img).reshape(len(x), CONTEXT_WIDTH, EXTRA)
        context = torch.cat([extra, self.text_seq_proj(hidden).transpose(1, 2)], dim=2)
        mask = torch.zeros(mask.shape).masked_fill(~mask, -math.inf)
        return self.run(x, emb, context, F.pad(mask, (EXTRA, 0)))


class Block(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.attn, self.mlp = nn.Module(), nn.Module()
        self.attn.c_qkv, self.attn.c_proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp.c_fc, self.mlp.c_proj = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, x: Any, mask: Any) -> Any:
        qkv = self.attn.c_qkv(self.ln_1(x)).transpose(1, 2)
        x = x + self.attn.c_proj(attend(qkv, mask=mask).transpose(1, 2))
        return x + self.mlp.c_proj(F.gelu(self.mlp.c_fc(self.ln_2(x))))


class Prior(nn.Module):
    def __init__(self, width: int, depth: int):
        super().__init__()
        self.time_embed = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.text_enc_proj, self.text_emb_proj, self.clip_img_proj = (
            nn.Linear(DIM, width) for _ in range(3)
        )
        self.out_proj = nn.Linear(width, DIM)
        self.transformer = nn.Module()
        self.transformer.resblocks = nn.ModuleList(Block(width) for _ in range(depth))
        self.final_ln = nn.LayerNorm(width)
        self.positional_embedding = nn.Parameter(torch.randn(1, CONTEXT + 4, width))
        self.prd_emb = nn.Parameter(torch.randn(1, 1, width))

    def forward(self, x: Any, t: Any, z_txt: Any, hidden: Any, mask: Any) -> Any:
        n = CONTEXT + 4
        t_emb = self.time_embed(sinusoids(t, self.prd_emb.shape[2]))
        tokens = [self.text_emb_proj(z_txt), t_emb, self.clip_img_proj(x)]
        tokens = [token[:, None] for token in tokens] + [self.prd_emb.expand(len(x), 1, -1)]
        x = torch.cat([self.text_enc_proj(hidden), *tokens], dim=1) + self.positional_embedding
        seen = F.pad(mask, (0, 4), value=True)[:, None] & torch.ones(n, n).tril().bool()
        mask = torch.zeros(seen.shape).masked_fill(~seen, -math.inf)
        for block in self.transformer.resblocks:
            x = block(x, mask)
        return self.out_proj(self.final_ln(x[:, -1]))


def wrapped(**networks: Any) -> Any:
    """As the classes that their checkpoints were saved of hold them."""
    found = nn.Module()
    for name, network in networks.items():
        setattr(found, name, network)
    small_unclip.shaken(found)
    with torch.no_grad():
        for network in networks.values():
            if isinstance(network, UNet):  # as of a trained one, whose steps do not explode
                network.out[2].weight *= 0.1
                network.out[2].bias *= 0.1
    return found


def write(folder: Path) -> dict[str, Any]:
    """The checkpoints, with CLIP in transformers' layout -> {stage: module}, and the statistics."""
    torch.manual_seed(2)
    sr = (6, 3, 32, (1, 2), 2)
    made = {
        "prior": wrapped(model=Prior(128, 3)),
        "decoder": wrapped(model=Decoder(3, 6, 32, (1, 2, 4), 2, (1, 2), CONTEXT_WIDTH)),
        "improved-sr": wrapped(
            model_first_steps=SuperResolution(*sr), model_last_step=SuperResolution(*sr)
        ),
        "clip": small_unclip.text_encoder(),
        "statistics": (torch.randn(DIM), torch.rand(DIM) + 0.5),
    }
    made["clip"].save_pretrained(folder / "text_encoder")
    torch.save(made["statistics"], folder / "ViT-L-14_stats.th")
    for name in ("prior", "decoder", "improved-sr"):
        told = {"state_dict": made[name].state_dict(), "global_step": 7}
        torch.save(told, folder / f"{name}-ckpt-step=01000000-of-01000000.ckpt")
    return made

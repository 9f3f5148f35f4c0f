"""CLIP alone, imported, against transformers and against the layout of OpenAI and OpenCLIP."""

import json
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
sys.path.insert(0, str(Path(__file__).parent))

from flax import traverse_util  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from torch import nn  # noqa: E402

from dalle2_jax.errors import UserError  # noqa: E402
from dalle2_jax.nets.forward import forward  # noqa: E402
from dalle2_jax.pretrained import names, names_openai, recognise  # noqa: E402
from dalle2_jax.pretrained.convert import import_model  # noqa: E402
from dalle2_jax.sampling import load  # noqa: E402

pytestmark = pytest.mark.parity
TOLERANCE = 2e-4  # of the output's scale
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
VOCAB, CONTEXT, SIZE, DIM = 100, 9, 24, 12


class Layer(nn.Module):
    def __init__(self, width, heads, wide, activation, causal):
        super().__init__()
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mlp = nn.Sequential()
        self.mlp.add_module("c_fc", nn.Linear(width, wide))
        self.mlp.add_module("gelu", activation())
        self.mlp.add_module("c_proj", nn.Linear(wide, width))
        self.causal = causal

    def forward(self, x):
        n = x.shape[1]
        mask = torch.full((n, n), float("-inf")).triu(1) if self.causal else None
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False, attn_mask=mask)[0]
        return x + self.mlp(self.ln_2(x))


class QuickGELU(nn.Module):
    def forward(self, x):
        return x * torch.sigmoid(1.702 * x)


def layers(*args):
    made = nn.Module()
    made.resblocks = nn.Sequential(*(Layer(*args) for _ in range(2)))
    return made


class Original(nn.Module):
    """CLIP as OpenAI named its parts."""

    def __init__(self, activation=QuickGELU, image_heads=1, wide=3.0, width=64):
        super().__init__()
        patches = (SIZE // 8) ** 2
        self.visual = nn.Module()
        self.visual.conv1 = nn.Conv2d(3, width, 8, 8, bias=False)
        self.visual.class_embedding = nn.Parameter(torch.randn(width))
        self.visual.positional_embedding = nn.Parameter(torch.randn(patches + 1, width))
        self.visual.ln_pre, self.visual.ln_post = nn.LayerNorm(width), nn.LayerNorm(width)
        args = width, image_heads, round(wide * width), activation, False
        self.visual.transformer = layers(*args)
        self.visual.proj = nn.Parameter(torch.randn(width, DIM) * width**-0.5)
        self.token_embedding = nn.Embedding(VOCAB, 128)
        self.positional_embedding = nn.Parameter(torch.randn(CONTEXT, 128))
        self.transformer = layers(128, 2, 512, activation, True)
        self.ln_final = nn.LayerNorm(128)
        self.text_projection = nn.Parameter(torch.randn(128, DIM) * 128**-0.5)
        self.logit_scale = nn.Parameter(torch.tensor(2.5))

    def encode_image(self, image):
        x = self.visual.conv1(image).flatten(2).transpose(1, 2)
        first = self.visual.class_embedding.expand(len(x), 1, -1)
        x = torch.cat([first, x], 1) + self.visual.positional_embedding
        x = self.visual.transformer.resblocks(self.visual.ln_pre(x))
        return self.visual.ln_post(x[:, 0]) @ self.visual.proj

    def encode_text(self, tokens):
        x = self.token_embedding(tokens) + self.positional_embedding
        x = self.ln_final(self.transformer.resblocks(x))
        return x[torch.arange(len(x)), tokens.argmax(-1)] @ self.text_projection

    def forward(self, image, tokens):
        z_img, z_txt = self.encode_image(image), self.encode_text(tokens)
        z_img, z_txt = nn.functional.normalize(z_img), nn.functional.normalize(z_txt)
        return z_img, z_txt, self.logit_scale.exp()


def shaken(module):
    torch.manual_seed(0)
    with torch.no_grad():
        for x in module.parameters():
            x += 0.1 * torch.randn_like(x)
    return module.eval()


def tokens_and_images():
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, VOCAB - 1, (3, CONTEXT))
    for row, length in enumerate((4, CONTEXT - 1, 2)):
        tokens[row, length] = VOCAB - 1  # the end of the text, and zeros behind it
        tokens[row, length + 1 :] = 0
    return tokens, rng.uniform(-1, 1, (3, SIZE, SIZE, 3)).astype(np.float32)


def seen(images):
    """What CLIP's processor makes of images from -1 to 1."""
    x = (images / 2 + 0.5 - np.array(MEAN)) / np.array(STD)
    return torch.tensor(np.moveaxis(x, -1, 1).astype(np.float32))


def assert_same(folder, expected):
    tokens, images = tokens_and_images()
    network, params = load.network(folder, "clip"), load.params(folder, "clip")
    found = forward(network, params, images, tokens.astype(np.int32), method="__call__")
    for ours, theirs in zip(found, expected, strict=True):
        theirs = theirs.detach().numpy()
        assert np.abs(np.asarray(ours) - theirs).max() <= TOLERANCE * np.abs(theirs).max()


def open_clip(folder, model, tensors, **settings):
    folder.mkdir()
    config = {
        "model_cfg": {
            "embed_dim": DIM,
            "vision_cfg": {
                "image_size": SIZE,
                "layers": 2,
                "width": model.visual.proj.shape[0],
                "patch_size": 8,
                **settings.pop("vision_cfg", {}),
            },
            "text_cfg": {
                "context_length": CONTEXT,
                "vocab_size": VOCAB,
                "width": 128,
                "heads": 2,
                "layers": 2,
                **settings.pop("text_cfg", {}),
            },
            **settings,
        },
        "preprocess_cfg": {"mean": list(MEAN), "std": list(STD)},
    }
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    tensors(folder)
    return folder


def test_transformers(tmp_path):
    sizes = dict(num_hidden_layers=2, num_attention_heads=2)
    text = dict(hidden_size=16, intermediate_size=48, vocab_size=VOCAB, **sizes)
    text |= dict(max_position_embeddings=CONTEXT, bos_token_id=0, eos_token_id=VOCAB - 1)
    vision = dict(hidden_size=24, intermediate_size=60, image_size=SIZE, patch_size=8, **sizes)
    model = shaken(
        transformers.CLIPModel(
            transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=DIM)
        )
    )
    model.save_pretrained(tmp_path / "theirs")
    import_model(tmp_path / "theirs", tmp_path / "ours")
    tokens, images = tokens_and_images()
    out = model(input_ids=torch.tensor(tokens), pixel_values=seen(images))
    expected = out.image_embeds, out.text_embeds, model.logit_scale.exp()
    assert_same(tmp_path / "ours", expected)


@pytest.mark.parametrize("kind", ["safetensors", "bin", "lightning"])
def test_open_clip(tmp_path, kind):
    model = shaken(Original(nn.GELU, image_heads=4, wide=4.9231))

    def write(folder):
        state = {k: v.contiguous() for k, v in model.state_dict().items()}
        if kind == "safetensors":
            save_file(state, folder / "open_clip_model.safetensors")
        else:
            state = {"state_dict": state} if kind == "lightning" else state
            torch.save(state, folder / "open_clip_pytorch_model.bin")

    sizes = {"vision_cfg": {"head_width": 16, "mlp_ratio": 4.9231}}
    import_model(open_clip(tmp_path / "theirs", model, write, **sizes), tmp_path / "ours")
    tokens, images = tokens_and_images()
    assert_same(tmp_path / "ours", model(seen(images), torch.tensor(tokens)))


@pytest.mark.parametrize("kind", ["trace", "script", "half"])
def test_openai(tmp_path, kind):
    model = shaken(Original())
    tokens, images = tokens_and_images()
    if kind == "half":
        model = model.half().float()  # what half can say
    with torch.no_grad():
        expected = model(seen(images), torch.tensor(tokens))
    saved = Original()
    saved.load_state_dict(model.state_dict())
    saved.register_buffer("input_resolution", torch.tensor(SIZE))
    if kind == "half":
        saved = saved.half()
    dtype = next(saved.parameters()).dtype
    given = seen(images).to(dtype), torch.tensor(tokens)
    if kind == "script":
        script = torch.jit.script(saved)
    else:
        script = torch.jit.trace(saved, given, check_trace=False)
    path = tmp_path / "ViT-S-8.pt"
    torch.jit.save(script, str(path))
    import_model(path, tmp_path / "ours")
    assert_same(tmp_path / "ours", expected)
    if kind == "half":
        size = sum(p.stat().st_size for p in (tmp_path / "ours").glob("*.safetensors"))
        # Two bytes a parameter, and the file's header; in float32 it would be four.
        assert size < 3 * sum(p.numel() for p in model.parameters()) + 10_000


# text (width, layers, heads), image (width, layers, heads, patch, size), embedding, MLP, activation
PUBLIC = {
    "ViT-B/32": ((512, 12, 8), (768, 12, 12, 32, 224), 512, 3072, "quick_gelu"),
    "ViT-B/16": ((512, 12, 8), (768, 12, 12, 16, 224), 512, 3072, "quick_gelu"),
    "ViT-L/14": ((768, 12, 12), (1024, 24, 16, 14, 224), 768, 4096, "quick_gelu"),
    "ViT-L/14@336": ((768, 12, 12), (1024, 24, 16, 14, 336), 768, 4096, "quick_gelu"),
    "ViT-H/14": ((1024, 24, 16), (1280, 32, 16, 14, 224), 1024, 5120, "gelu"),
    "ViT-bigG/14": ((1280, 32, 20), (1664, 48, 16, 14, 224), 1280, 8192, "gelu"),
}


@pytest.mark.parametrize("name", PUBLIC)
def test_every_tensor_of_the_public_sizes_has_its_place(name, tmp_path):
    """By name and shape alone: torch's meta device holds no numbers."""
    text, image, dim, wide, activation = PUBLIC[name]
    keys = ("hidden_size", "num_hidden_layers", "num_attention_heads")
    config = transformers.CLIPConfig(
        projection_dim=dim,
        text_config={
            **dict(zip(keys, text, strict=True)),
            "intermediate_size": 4 * text[0],
            "hidden_act": activation,
            "projection_dim": dim,
        },
        vision_config={
            **dict(zip((*keys, "patch_size", "image_size"), image, strict=True)),
            "intermediate_size": wide,
            "hidden_act": activation,
            "projection_dim": dim,
        },
    )
    config.save_pretrained(tmp_path)
    with torch.device("meta"):
        state = transformers.CLIPModel(config).state_dict()
    (stage,) = recognise.stages(tmp_path)
    expected = traverse_util.flatten_dict(
        load.expected_params({"clip": stage.entry}, "clip", name), sep="."
    )
    shapes = {f"clip/{key}": tuple(tensor.shape) for key, tensor in state.items()}
    found = names.to_ours(
        stage.rules, shapes, lambda key: np.broadcast_to(np.uint8(0), shapes[key])
    )
    assert not found.unknown and sorted(found.names) == sorted(expected)
    for ours, leaf in expected.items():
        assert found.tensor(ours).shape == leaf.shape, ours


def test_gradients(tmp_path):
    model = shaken(Original(nn.GELU))
    folder = open_clip(
        tmp_path / "theirs",
        model,
        lambda f: save_file(model.state_dict(), f / "open_clip_model.safetensors"),
        vision_cfg={"mlp_ratio": 3.0},
    )
    import_model(folder, tmp_path / "ours")
    tokens, images = tokens_and_images()
    z_img, z_txt, scale = model(seen(images), torch.tensor(tokens))
    logits = scale * z_img @ z_txt.T
    (logits.log_softmax(-1).diagonal().sum() + logits.log_softmax(0).diagonal().sum()).backward()
    theirs = {name: x.grad.numpy() for name, x in model.named_parameters()}
    network, params = (
        load.network(tmp_path / "ours", "clip"),
        load.params(tmp_path / "ours", "clip"),
    )

    def loss(params):
        z_img, z_txt, scale = network.apply({"params": params}, images, tokens.astype(np.int32))
        logits = scale * z_img @ z_txt.T
        rows = jax.nn.log_softmax(logits, -1), jax.nn.log_softmax(logits, 0)
        return sum(x.diagonal().sum() for x in rows)

    flat = load_flat(jax.grad(loss)(params))
    found = dict(names.to_theirs(names_openai.CLIP, flat, flat.__getitem__))
    assert found.keys() == theirs.keys()
    largest = max(np.abs(x).max() for x in theirs.values())
    for name, x in theirs.items():
        # of keys' biases it is zero: softmax does not see them
        scale = max(np.abs(x).max(), 1e-3 * largest)
        assert np.abs(found[name] - x).max() <= TOLERANCE * scale, name


def load_flat(tree):
    from flax import traverse_util

    return {k: np.asarray(v) for k, v in traverse_util.flatten_dict(tree, sep=".").items()}


class Harm:
    def __reduce__(self):
        return print, ("run",)


def test_a_pickle_that_would_run_code_is_refused(tmp_path, capsys):
    folder = open_clip(
        tmp_path / "theirs",
        Original(),
        lambda f: torch.save({"a": Harm()}, f / "open_clip_pytorch_model.bin"),
    )
    with pytest.raises(UserError, match="holds more than weights"):
        import_model(folder, tmp_path / "ours")
    assert "run" not in capsys.readouterr().out


def test_other_clips_are_told(tmp_path):
    folder = open_clip(
        tmp_path / "theirs", Original(), lambda f: None, text_cfg={"hf_model_name": "xlm-roberta"}
    )
    with pytest.raises(UserError, match="hf_model_name is 'xlm-roberta', but this reads None"):
        import_model(folder, tmp_path / "ours")

"""Every model of open_clip at reduced depth: one block a tower, or one a stage, the widths as published.

A text tower of the Hugging Face library is small in every way, since its width is in a file of the hub and
not in open_clip's list. `fake_hub` writes such files, with a tokenizer of a few words, into a cache as the
hub's own client leaves it. `python tests/small_models.py NAME ...` prints one line of JSON per model.
"""

import contextlib, copy, json, os, re, sys, tempfile
from pathlib import Path
from unittest import mock

WORDS = "a an man woman in the red blue coat with black bag white shoes and long hair is wearing".split()
CAPTIONS = ["a woman in a red coat", "the man is wearing white shoes and a black bag", "a blue coat"]
_ONE_A_STAGE = {"convnext|swin": dict(depths=(1,) * 4), "fastvit_mci[34]": dict(layers=(1,) * 5)}
_ONE_A_STAGE |= {"fastvit": dict(layers=(1,) * 4), "": dict(depth=1)}
LARGE = 60e6  # numbers; larger models are not written to a disk here


def reduced(name):
    "The configuration of a model with one block a tower."
    import open_clip

    cfg = copy.deepcopy(open_clip.get_model_config(name))
    vision, text = cfg["vision_cfg"], cfg["text_cfg"]
    if "timm_model_name" not in vision:
        vision["layers"] = [1] * 4 if isinstance(vision["layers"], list) else 1
    if "layers" in text:
        text["layers"] = 1
    if "hf_tokenizer_name" in text and "vocab_size" in text:
        text["vocab_size"] = 64
    if "multimodal_cfg" in cfg:
        cfg["multimodal_cfg"]["layers"] = 1
    return cfg


@contextlib.contextmanager
def shallow(*names):
    "While this lasts, these models have one block a tower."
    import open_clip, timm

    make = timm.create_model

    def one_block(name, **options):
        depth = next(kwargs for pattern, kwargs in _ONE_A_STAGE.items() if re.match(pattern, name))
        return make(name, **options | depth)

    configs = {name: reduced(name) for name in names}
    with mock.patch.dict(open_clip.factory._MODEL_CONFIGS, configs):
        with mock.patch.object(timm, "create_model", one_block):
            yield


_SMALL = dict(hidden_size=32, intermediate_size=64, num_attention_heads=2, num_hidden_layers=1)
_BERT = _SMALL | dict(
    max_position_embeddings=90, vocab_size=64, pad_token_id=1, bos_token_id=0, eos_token_id=2
)
_T5 = dict(d_model=32, d_ff=64, d_kv=16, num_heads=2, num_layers=1, vocab_size=64, pad_token_id=0)
_M2M = dict(d_model=32, encoder_ffn_dim=64, decoder_ffn_dim=64, encoder_layers=1, decoder_layers=1)
_M2M |= dict(encoder_attention_heads=2, decoder_attention_heads=2, vocab_size=64, pad_token_id=1)
CONFIGS = {
    "roberta-base": _BERT | dict(model_type="roberta"),
    "xlm-roberta-base": _BERT | dict(model_type="xlm-roberta"),
    "xlm-roberta-large": _BERT | dict(model_type="xlm-roberta"),
    "google/mt5-base": _T5 | dict(model_type="mt5"),
    "google/mt5-xl": _T5 | dict(model_type="mt5"),
    "facebook/nllb-200-distilled-600M": _M2M | dict(model_type="m2m_100"),
    "facebook/nllb-200-distilled-1.3B": _M2M | dict(model_type="m2m_100"),
}


def _tokenizer(folder, kind):
    "Files of a tokenizer of a few words. `kind`: how it marks the ends of a text, and what it pads with."
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    special = dict(
        t5=["<pad>", "</s>", "<unk>"],  # mT5 and SigLIP2
        siglip=["<unk>", "</s>", "<other>"],  # the end token pads
        bert=["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"],
        roberta=["<s>", "<pad>", "</s>", "<unk>", "<mask>"],
    )[kind]
    vocab = {word: i for i, word in enumerate([*special, *WORDS])}
    unknown = next(s for s in special if "unk" in s.lower())
    made = Tokenizer(models.WordLevel(vocab, unk_token=unknown))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    start, end = dict(t5=("", "</s>"), siglip=("", "</s>"), bert=("[CLS]", "[SEP]"), roberta=("<s>", "</s>"))[
        kind
    ]
    single = f"{start} $A {end}".strip()
    ends = [(t, vocab[t]) for t in (start, end) if t]
    made.post_processor = processors.TemplateProcessing(single=single, special_tokens=ends)
    made.save(str(folder / "tokenizer.json"))
    pad = dict(t5="<pad>", siglip="</s>", bert="[PAD]", roberta="<pad>")[kind]
    config = dict(tokenizer_class="PreTrainedTokenizerFast", pad_token=pad, eos_token=end, unk_token=unknown)
    config |= dict(padding_side="right", clean_up_tokenization_spaces=False)
    if kind in ("bert", "roberta"):
        config |= dict(mask_token=special[-1], sep_token=end, cls_token=start)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def kind_of_tokenizer(repo):
    "How the tokenizer of a repository marks the ends of a text."
    if "SigLIP" in repo and "SigLIP2" not in repo:
        return "siglip"
    return "bert" if "bert-base" in repo else "t5" if re.search("mt5|SigLIP2", repo) else "roberta"


def fake_hub(home):
    "Files of every tokenizer and text tower that open_clip's models ask for, below HF_HOME."
    import open_clip

    texts = [open_clip.get_model_config(name)["text_cfg"] for name in open_clip.list_models()]
    repos = {t[key] for t in texts for key in ("hf_tokenizer_name", "hf_model_name") if t.get(key)}
    for repo in repos:
        cache = Path(home) / "hub" / f"models--{repo.replace('/', '--')}"
        folder = cache / "snapshots" / ("0" * 40)
        folder.mkdir(parents=True)
        (cache / "refs").mkdir()
        (cache / "refs" / "main").write_text("0" * 40)
        kind = "roberta" if repo in CONFIGS and "mt5" not in repo else kind_of_tokenizer(repo)
        _tokenizer(folder, kind)
        (folder / "config.json").write_text(json.dumps(CONFIGS.get(repo, dict(model_type="bert"))))


def size_for(name):
    "A small image size that a model takes."
    from cpcl.encoder.models import input_size

    step = input_size(name).step
    times = -(-64 // step)
    return (times * step, -(-32 // step) * step) if step else input_size(name).native


def check(name, pad=None, file=True):
    """Build a model at reduced depth; features, a step of training, a file and back. Returns facts.

    `pad`: what its tokenizer pads with, where that is not at hand; tokens are then made up.
    `file`: whether it is also written and read."""
    import torch
    from cpcl.encoder import Encoder

    torch.manual_seed(0)
    size = size_for(name)
    with shallow(name):
        encoder = Encoder(name, size).eval()
        image = torch.randn(3, 3, *size)
        tokens = _made_up(encoder, pad) if pad is not None else encoder.words(CAPTIONS)
        with torch.no_grad():
            img, txt = encoder(image, tokens)
            in_training = encoder.train()(image, tokens)
            cut = encoder.encode_text(tokens[:, : int((tokens != 0).any(0).nonzero().max()) + 1])
        assert torch.allclose(cut, txt, atol=1e-5), "a batch that is cut has other features"
        for x, again in zip((img, txt), in_training):
            assert x.shape == (3, encoder.width) and torch.isfinite(x).all(), "features"
            assert torch.allclose(x.norm(dim=1), torch.ones(3), atol=1e-5), "rows are not of length one"
            assert torch.allclose(x, again, atol=1e-5), "features in training differ by chance"
            assert torch.pdist(x).min() > 1e-6, "different inputs have one feature"
        try:
            before, without = _step(encoder, image, tokens)
        except AssertionError:  # features of different images that differ by a few roundings only
            encoder.zero_grad()
            before, without = _step(encoder.double(), image.double(), tokens)
            encoder.float()
        numbers = sum(p.numel() for p in encoder.parameters())
        if file and numbers < LARGE:
            _file_and_back(encoder, name, size, image, tokens)
        return dict(name=name, numbers=numbers, size=size, loss=before, without=without)


def _made_up(encoder, pad):
    import torch

    encoder._pad = pad
    tokens = torch.randint(2, 60, (3, min(12, encoder.context_length)))
    tokens[0, 5:], tokens[1, 9:] = 0, 0
    return tokens


def _step(encoder, image, tokens):
    "(loss before a step, parameters that get no gradient); the step must lower the loss."
    import torch

    def loss():
        img, txt = encoder(image, tokens)
        return torch.nn.functional.cross_entropy(img @ txt.T / 0.1, torch.arange(3))

    first = loss()
    first.backward()
    trained = {n: p for n, p in encoder.named_parameters() if p.requires_grad}
    without = [n for n, p in trained.items() if p.grad is None]
    grads = [p.grad for p in trained.values() if p.grad is not None]
    assert all(torch.isfinite(g).all() for g in grads), "a gradient is not finite"
    length = torch.sqrt(sum((g**2).sum() for g in grads))
    trained = [p for p in trained.values() if p.grad is not None]
    with torch.no_grad():
        for step in (1e-1, -9e-2, -9e-3, -9e-4):  # along the gradient; then back to a tenth of it
            for p in trained:
                p -= step / length * p.grad
            if loss() < first:
                break
        else:
            raise AssertionError("no step lowers the loss")
    return float(first.detach()), without


def _file_and_back(encoder, name, size, image, tokens):
    "Written, read at the same size and at another one."
    import torch
    from cpcl.encoder import EncoderConfig, load_encoder, save_encoder
    from cpcl.encoder.models import input_size

    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        path = str(save_encoder(encoder, Path(folder) / "a.safetensors"))
        again = load_encoder(EncoderConfig(name, path, *size), log=lambda line: None)
        again._pad = encoder._pad
        for x, y in zip(encoder.eval()(image, tokens), again(image, tokens)):
            assert torch.allclose(x, y, atol=1e-5), "a file that is read again has other features"
        step = input_size(name).step
        if step:
            other = size[0] + step * (2 if step < 32 else 1), size[1] + step
            wide = load_encoder(EncoderConfig(name, path, *other), log=lambda line: None)
            assert wide.encode_image(torch.randn(2, 3, *other)).shape == (2, encoder.width), "another size"


def main(names):
    import gc, torch

    torch.set_num_threads(1)
    for name in names:
        try:
            print(json.dumps(check(name)), flush=True)
        except Exception as e:
            print(json.dumps(dict(name=name, error=f"{type(e).__name__}: {str(e)[:300]}")), flush=True)
        gc.collect()


if __name__ == "__main__":
    sys.path.insert(0, os.getcwd())
    main(sys.argv[1:])

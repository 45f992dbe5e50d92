"""Real models of different kinds, each with what its users call beside ``forward``.

Code is what nobody here wrote: source distributions and wheels of an index, pinned by version and sha256; the hubconfs
are of a few lines. `repo_of` commits one to a git repository.
"""

from __future__ import annotations

import zipfile
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tests.real.installed import fetch_wheel
from tests.real.packages import PAIRS, Release, commit, fetch_sdist, hubconf_of, unpack

__all__ = ["MODELS", "Model", "repo_of"]


@dataclass(frozen=True)
class Model:
    """One model and how it is looked at.

    Attributes:
        name: Of the test.
        kind: What the model is for.
        package: Name of the distribution whose files are the repo's; None for a repo of a hubconf alone, whose
            dependencies are installed.
        release: Version, sha256 and hubconf.
        inputs: Expressions over ``torch`` and ``g``, a seeded generator.
        expressions: What else is asked; see observed.py.
        wheel: Whether the release is a wheel.
        installed: Whether it needs the packages of installed.txt.
        kwargs: Arguments of the entrypoint.
    """

    name: str
    kind: str
    package: str | None
    release: Release
    inputs: tuple[str, ...]
    expressions: tuple[str, ...] = ()
    wheel: bool = False
    installed: bool = False
    kwargs: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.name


def _newer(package: str, hubconf: str | None = None) -> Release:
    """The newer release of a pair, with another hubconf where one is given."""
    release = next(pair.releases[1] for pair in PAIRS if pair.name == package)
    return release if hubconf is None else replace(release, hubconf=hubconf)


_EFFICIENTNET = """
    from efficientnet_pytorch import EfficientNet

    def model():
        return EfficientNet.from_name("efficientnet-b0", num_classes=10, image_size=40, width_coefficient=0.25,
                                      depth_coefficient=0.2)
"""
_FACES = """
    from pytorchcv.model_provider import get_model

    def model():
        return get_model("lffd20x5s320v2_widerface", pretrained=False)
"""
_STREAMED = """
    from pytorch_tcn import TCN

    def model():
        return TCN(num_inputs=4, num_channels=[8, 8], causal=True, use_norm="weight_norm", lookahead=0)
"""
_CFC = """
    from ncps.torch import CfC

    def model():
        return CfC(5, 12, proj_size=3, mixed_memory=True)
"""
_DENOISER = """
    from denoiser.demucs import Demucs, DemucsStreamer

    def model():
        net = Demucs(hidden=4, depth=3, sample_rate=4000).eval()
        return net, DemucsStreamer(net, num_frames=2)
"""
_GAN = """
    from dcgan_pytorch import Discriminator, Generator

    def model():
        return Generator.from_name("g-mnist"), Discriminator.from_name("d-mnist")
"""
_T5 = """
    from transformers import ByT5Tokenizer, T5Config, T5ForConditionalGeneration

    def model():
        config = T5Config(vocab_size=384, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4,
                          decoder_start_token_id=0)
        return T5ForConditionalGeneration(config), ByT5Tokenizer()
"""
_GPT = """
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    def model():
        learned = Tokenizer(models.BPE(unk_token="<unk>"))
        learned.pre_tokenizer = pre_tokenizers.Whitespace()
        text = ["a handle stands for a model", "a model lives in a worker", "the worker answers the handle"]
        learned.train_from_iterator(text, trainers.BpeTrainer(vocab_size=90, special_tokens=["<pad>", "<unk>", "<end>"]))
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=learned, pad_token="<pad>", unk_token="<unk>",
                                            eos_token="<end>", padding_side="left")
        config = GPT2Config(vocab_size=len(tokenizer), n_positions=64, n_embd=32, n_layer=2, n_head=4, bos_token_id=2,
                            eos_token_id=2, pad_token_id=0)
        return GPT2LMHeadModel(config), tokenizer
"""
_YOLOS = """
    from transformers import YolosConfig, YolosForObjectDetection, YolosImageProcessor

    def model():
        config = YolosConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
                             image_size=[32, 32], patch_size=8, num_detection_tokens=6, num_labels=7)
        processor = YolosImageProcessor(size={"height": 32, "width": 32})
        return YolosForObjectDetection(config), processor
"""
_DIFFUSION = """
    from diffusers import DDPMScheduler, UNet2DModel

    def model():
        net = UNet2DModel(sample_size=16, in_channels=1, out_channels=1, block_out_channels=(8, 16), norm_num_groups=4,
                          layers_per_block=1, down_block_types=("DownBlock2D", "AttnDownBlock2D"),
                          up_block_types=("AttnUpBlock2D", "UpBlock2D"), attention_head_dim=4)
        return net, DDPMScheduler(num_train_timesteps=20)
"""
_NOTHING = "no file"  # of a repo that is a hubconf alone

MODELS = (
    Model(
        "efficientnet", "image classification", "efficientnet_pytorch", _newer("efficientnet_pytorch", _EFFICIENTNET),
        inputs=("torch.randn(2, 3, 40, 40, generator=g)",),
        expressions=(
            "m.extract_features(*x).shape",
            "{name: value.shape for name, value in m.extract_endpoints(*x).items()}",
            "m._global_params",
            "m._blocks_args[0]",
            "m._blocks[0](m._bn0(m._conv_stem(*x)))",
            "m.get_submodule('_blocks.3._project_conv').weight",
            "m._fc.in_features",
            "m.set_swish(memory_efficient=False)",
            "m.get_image_size('efficientnet-b9')",
            "[type(block).__name__ and block._get_name() for block in m._blocks][:2]",
        ),
    ),
    Model(
        "vit", "image classification", "pytorch-pretrained-vit", _newer("pytorch-pretrained-vit"),
        inputs=("torch.randn(2, 3, 32, 32, generator=g)",),
        expressions=(
            "m.transformer(torch.ones(1, 17, 64))", "m.class_token", "m.positional_embedding.pos_embedding.shape",
            "m.image_size", "m.transformer.blocks[-1].attn.scores", "len(m.transformer.blocks)",
        ),
    ),
    Model(
        "lffd", "face detection", "pytorchcv", _newer("pytorchcv", _FACES),
        inputs=("torch.randn(1, 3, 96, 96, generator=g)",),
        expressions=("m.in_size", "len(list(m.children()))"),
    ),
    Model(
        "yolos", "detection, with its processor", None, Release("1", _NOTHING, _YOLOS), installed=True,
        inputs=("torch.randn(2, 3, 32, 32, generator=g)",),
        expressions=(
            "r[1].post_process_object_detection(m(*x), threshold=0.0, target_sizes=[(40, 60), (20, 20)])",
            "r[1].post_process_object_detection(m(*x), threshold=0.99)",
            "m(*x, output_hidden_states=True, output_attentions=True)",
            "m(*x, return_dict=False)",
            "m(*x)['pred_boxes']",
            "r[1].size", "r[1].model_input_names", "m.config.num_detection_tokens", "m.config.id2label", "m.num_parameters()",
            "r[1](images=[__import__('numpy').full((20, 30, 3), 7, dtype='uint8')], return_tensors='pt')['pixel_values']",
        ),
    ),
    Model(
        "unet", "segmentation", "unet", _newer("unet"), inputs=("torch.randn(2, 1, 32, 32, generator=g)",),
        expressions=("m.encoder(*x)", "m.decoder", "m.classifier", "m.monte_carlo_layer"),
    ),
    Model(
        "demucs", "audio, streamed by an object with state", "denoiser",
        Release("0.1.5", "f8a6a67838872d9c374a3565eb9bf04b6212a60b37f00b14cbd1e2441124cccd", _DENOISER),
        inputs=("torch.randn(1, 1, 1200, generator=g)",),
        expressions=(
            "r[1].feed(x[0][0, :, :700])", "r[1].lstm_state", "r[1].frames", "r[1].pending.shape",
            "r[1].feed(x[0][0, :, 700:])", "r[1].flush()", "r[1].feed(torch.zeros(3))", "r[1].reset_time_per_frame()",
            "r[1].demucs is m", "m.valid_length(1000)", "m.total_stride", "m.encoder[0]", "m.lstm(torch.ones(3, 1, 16))",
            "m._init_args_kwargs",
        ),
    ),
    Model(
        "tcn", "audio, streamed with buffers", "pytorch-tcn",
        _newer("pytorch-tcn", _STREAMED),
        inputs=("torch.randn(1, 4, 50, generator=g)",),
        expressions=(
            "m.inference(x[0][:, :, :20])", "m.inference(x[0][:, :, 20:])", "m.get_buffers()", "m.reset_buffers()",
            "m(x[0], inference=True)", "m.network[0]",
        ),
    ),
    Model(
        "cfc", "sequences, recurrent with a state of a pair", "ncps",
        _newer("ncps", _CFC),
        inputs=("torch.randn(2, 6, 5, generator=g)",),
        expressions=(
            "m(x[0], m(x[0])[1])", "m(x[0], timespans=torch.ones(2, 6))", "m.state_size",
            "m(x[0][0])", "m(x[0], (torch.zeros(1), torch.zeros(1)))", "m.output_size",
        ),
    ),
    Model(
        "filterbanks", "audio, filterbanks", "asteroid-filterbanks", _newer("asteroid-filterbanks"),
        inputs=("torch.randn(2, 1, 1000, generator=g)",),
        expressions=("m[0](*x)", "len(m)", "m[-1]", "m[1:3]", "m[0].filterbank.filters", "[part._get_name() for part in m]", "m[2].filterbank.get_config()"),
    ),
    Model(
        "linformer", "language", "linformer", _newer("linformer"),
        inputs=("torch.randint(0, 200, (2, 64), generator=g)",),
        expressions=("m.token_emb(*x)", "m.linformer(torch.ones(1, 64, 32))", "m(x[0] + 1000)", "m.to_logits.weight.shape"),
    ),
    Model(
        "gpt2", "language with generate, and a tokenizer that was trained in the entrypoint", None,
        Release("1", _NOTHING, _GPT), installed=True,
        inputs=("torch.randint(3, 40, (2, 9), generator=g)",),
        expressions=(
            "m.generate(x[0], max_new_tokens=6, do_sample=False)",
            "m.generate(x[0], max_new_tokens=6, do_sample=True, top_k=5)",
            "m.generate(x[0], max_new_tokens=4, num_beams=3, return_dict_in_generate=True, output_scores=True)",
            "m.generate(max_new_tokens=-3)",
            "m(x[0], labels=x[0]).loss", "m(x[0], use_cache=False)['logits']", "m(x[0]).logits",
            "m(x[0][:, 5:], past_key_values=m(x[0][:, :5]).past_key_values).logits",
            "m(x[0]).past_key_values.get_seq_length()",
            "m(x[0], output_hidden_states=True, output_attentions=True, use_cache=False)",
            "m(x[0], return_dict=False, use_cache=False)",
            "r[1](['a handle', 'the worker answers'], return_tensors='pt', padding=True)",
            "r[1]('a model')['input_ids']", "r[1].decode([5, 6, 7])", "r[1].batch_decode(x[0])", "len(r[1])", "sorted(r[1].get_vocab().items())",
            "r[1].pad_token", "r[1].pad_token_id", "r[1].padding_side", "'a' in r[1].get_vocab()", "r[1].nobody_knows",
            "m.generate(**r[1](['a handle'], return_tensors='pt'), max_new_tokens=3)",
            "m.config.to_dict()", "m.config.n_embd", "m.num_parameters()", "m.dtype", "m.device", "m.get_input_embeddings()",
            "m.tie_weights()",
            "m.generation_config.eos_token_id", "m.can_generate()", "m.base_model_prefix",
        ),
    ),
    Model(
        "t5", "language, both ways, and a tokenizer of bytes", None, Release("1", _NOTHING, _T5), installed=True,
        inputs=("torch.randint(3, 250, (2, 7), generator=g)",),
        expressions=(
            "m(input_ids=x[0], decoder_input_ids=x[0][:, :3]).logits", "m(input_ids=x[0], labels=x[0][:, :4]).loss", "m(input_ids=x[0], labels=x[0] + 0).loss",
            "m.generate(x[0], max_new_tokens=5)", "m.encoder(x[0])", "m.get_encoder()(input_ids=x[0]).last_hidden_state",
            "m.generate(encoder_outputs=m.get_encoder()(input_ids=x[0]), max_new_tokens=4)",
            "r[1]('h\\u00e4ndle')", "r[1].decode(r[1]('h\\u00e4ndle')['input_ids'], skip_special_tokens=True)",
            "r[1](['one', 'three'], return_tensors='pt', padding=True).attention_mask", "r[1].tokenize('worker')",
            "r[1].convert_tokens_to_ids(['a', 'b'])", "r[1].all_special_tokens", "r[1].vocab_size", "r[1](3)", "m.shared.weight.shape",
        ),
    ),
    Model(
        "dcgan", "a generator and a discriminator", "dcgan_pytorch",
        Release("0.2.0", "c068c93a98533f9cf40541f122fa1a674bdd99b340a92d8f6bcf6dd91a9673ac", _GAN), wheel=True,
        inputs=("torch.randn(2, 100, 1, 1, generator=g)",),
        expressions=("r[1](m(*x))", "m.noise", "m.channels", "m.get_image_size('g-mnist')", "m.from_name('nobody')", "m.main[0]"),
    ),
    Model(
        "diffusion", "diffusion, with its scheduler", None, Release("1", _NOTHING, _DIFFUSION), installed=True,
        inputs=("torch.randn(1, 1, 16, 16, generator=g)", "3"),
        expressions=(
            "m(*x).sample", "m(*x, return_dict=False)", "r[1].set_timesteps(4)", "r[1].timesteps",
            "r[1].step(m(*x).sample, 10, x[0], generator=torch.Generator().manual_seed(1)).prev_sample",
            "r[1].step(m(*x).sample, 10, x[0])['pred_original_sample']",
            "r[1].add_noise(x[0], torch.ones_like(x[0]), torch.tensor([3]))", "r[1].config['num_train_timesteps']",
            "m.config.sample_size", "dict(m.config)['in_channels']", "len(r[1])", "r[1].init_noise_sigma",
        ),
    ),
)  # fmt: skip


def repo_of(model: Model, directory: Path) -> Path:
    """A git repository with the model's code at one commit."""
    repo = directory / model.name
    repo.mkdir(parents=True)
    if model.package is not None and model.wheel:
        with zipfile.ZipFile(fetch_wheel(model.package, model.release.version, model.release.sha256)) as archive:
            archive.extractall(repo)
    elif model.package is not None:
        unpack(fetch_sdist(model.package, model.release), repo)
    (repo / "hubconf.py").write_text(hubconf_of(model.release.hubconf))
    commit(repo, f"{model.name} {model.release.version}")
    return repo

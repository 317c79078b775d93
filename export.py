"""A run → a folder to give away: weights, config, tokenizer, model card, and the code that transformers needs for it.

    python export.py --ckpt checkpoints/diffusion_hi --output_dir exported/diffusion --about card.md
    python sample_diffusion.py --ckpt exported/diffusion --prompt "एक दिन"
    python export.py --ckpt exported/diffusion --onnx exported/diffusion.onnx       # for onnxruntime
    hf upload YOU/NAME exported/diffusion .                                         # as it is

The folder is a run's best state without what only training needs: `checkpoint.load` takes it wherever it takes a run,
and `AutoModel.from_pretrained(FOLDER, trust_remote_code=True)` opens it without this project (modeling_nanohindi.py).
The model card states the figures of eval.json, which evaluate.py writes beside the weights: evaluate the export and
export it once more, on itself, and the card has the figures of the rounded weights. --no_code leaves the code out, for
the models of this repository (models/), where it stands beside them anyway.
"""

import dataclasses
import functools
import json
import logging
import re
import shlex
from pathlib import Path

import safetensors.torch
import torch

import chat
import checkpoint
import evaluate
import plot
import sample_diffusion
from config import PRESETS, PROMPTS, ExportConfig, MaskConfig, SampleConfig, TrainConfig, check, parse, run_main

SCRIPTS = dict(transformer="train_diffusion", eco_hybrid="train_eco_hybrid", autoregressive="train_autoregressive")
CODE = ("modeling_nanohindi", "model", "eco_hybrid", "diffusion", "sampling", "tokenizer")  # the first needs the others
ENTRY = "modeling_nanohindi"
HERE = Path(__file__).parent
OPSET = 20

# ---------------------------------------------------------------------------------------------------------------------
# the model card

CARD = """---
language:
- hi
license: {license}
{library}pipeline_tag: {task}
tags:
- {tag}
- hindi
- nanohindi
---

# {name}

{what}, {parameters:,} parameters, windows of {T} tokens, {V:,} tokens; weights in {dtype}. Made with nanoHinDi.

    python sample_diffusion.py --ckpt {folder} --prompt "एक दिन"
{usage}
## Data, licence, attribution

{about}

## Training

    {command}

{training}

## Evaluation

{figures}

## Limits

It knows little more than the manner of the text that it learned from: what it states is not to be relied on, and can be
offensive where that text is. It reads and writes at most {T} tokens at once, in Hindi, and other languages hardly.

## Samples

Uncurated: the first that sample_diffusion.py writes for each prompt, with its default settings.

{samples}
"""
USAGE = """
With transformers, outside of the project (the code in the folder is under the MIT licence):

    from transformers import AutoModel, AutoTokenizer
    model = AutoModel.from_pretrained("{folder}", trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained("{folder}", trust_remote_code=True)
    print(model.write(tokenizer, "एक दिन"))
"""
WHAT = dict(
    transformer="A masked diffusion Transformer",
    eco_hybrid="A masked diffusion EcoHybrid (local convolution, a memory of slots, some attention)",
    autoregressive="An autoregressive Transformer, the causal twin of the diffusion model",
)


def command(config, kind):
    """The command line of a run: its flags where they are not the preset's or the script's own."""
    script, classes = SCRIPTS[kind], (MaskConfig, checkpoint.MODELS[kind][0], TrainConfig)
    if config.get("chats"):  # what it was tuned on is not known here: --command says it
        script, classes = "train_instruct", (TrainConfig,)
    defaults = {f.name: f.default for c in classes for f in dataclasses.fields(c) if f.metadata["flag"]}
    defaults |= PRESETS[config.get("preset", "laptop")] | dict(preset="laptop", output_dir=None, data_dir=None)
    given = {k: config[k] for k, default in defaults.items() if k in config and config[k] != default and k != "resume"}
    flags = [[f"--{k}"] if v is True else [f"--no_{k}"] if v is False else [f"--{k}", str(v)] for k, v in given.items()]
    return shlex.join(["python", f"{script}.py", *sum(flags, [])])


def figures(result, exact=True):
    """Lines of the card out of an eval.json (or nothing). exact: it is of these very weights."""
    if "bits_per_byte" not in result:
        return "Not evaluated yet."
    what = "Bound on -log p" if result["likelihood"] == "bound" else "Exact -log p"
    rounded = "" if exact else ", measured before the weights were rounded"
    masks = f", {result['masks']} stratified masks each" if result["masks"] else ""
    lines = [f"{what} of held-out text: {result['windows']} windows of {result['split']}, {result['tokens']:,} tokens, "
             f"{result['bytes']:,} bytes{masks} (± standard error){rounded}.", "", "| | |", "|---|---|"]  # fmt: skip
    for name in ("bits_per_byte", "bits_per_character", "nats_per_token"):
        mean, error = result[name]["mean"], result[name]["standard_error"]
        lines.append(f"| {name.replace('_', ' ')} | {mean:.4f} ± {error:.4f} |")
    counted = result["baselines_bits_per_byte"].items()
    lines += [f"| bits per byte of a {name} model | {value:.4f} |" for name, value in counted]
    if "qa" in result:
        right = result["qa"]["accuracy"]
        lines.append(f"| questions right, of {right['n']} | {right['mean']:.1%} |")
    return "\n".join(lines)


def written(loaded):
    """Lines of the card: what the model writes after each of PROMPTS, or answers to it, as sample_diffusion.py does."""
    limit, tokenizer = loaded.denoiser.config.max_seq_len, loaded.tokenizer
    if loaded.config.get("chats"):
        ask = functools.partial(sample_diffusion.ask, loaded, cfg=SampleConfig(chat=True))
        turns = [[dict(role="user", content=p)] for p in PROMPTS]
        asked = [turn for turn in turns if len(chat.prompt(turn, tokenizer)) <= limit // 2]
        texts = [f"{turn[0]['content']} → {ask(turn)}" for turn in asked]
    else:
        prompts = [p for p in PROMPTS if len(tokenizer.encode(p)) <= limit // 2] or [""]
        room = limit - max(len(tokenizer.encode(p)) for p in prompts)
        cfg = SampleConfig(max_new_tokens=min(SampleConfig.max_new_tokens, room))
        texts = [tokenizer.decode(ids) for ids in sample_diffusion.generate(loaded, prompts, cfg).texts]
    return "\n".join("- " + text.replace("\n", " ") for text in texts)


def card(loaded, cfg, facts, result, exact, parameters):
    kind, config = loaded.kind, loaded.denoiser.config
    trained = [f"Step {loaded.step:,} of {loaded.config.get('max_steps', loaded.step):,}"]
    if facts["seconds"]:
        trained.append(f"{facts['seconds']:,.0f} s of training in all")
    if facts["hardware"]:
        trained.append(f"on {facts['hardware']}")
    return CARD.format(
        license=facts["license"],
        library="library_name: transformers\n" if cfg.code else "",
        task="text-generation" if kind == "autoregressive" else "fill-mask",
        tag="autoregressive" if kind == "autoregressive" else "masked-diffusion",
        name=Path(cfg.output_dir).name,
        what=WHAT[kind] + (", tuned to answer" if facts["chats"] else "") + " for Hindi",
        parameters=parameters,
        T=config.max_seq_len,
        V=config.vocab_size,
        dtype=cfg.dtype,
        folder=cfg.output_dir,
        usage=USAGE.format(folder=cfg.output_dir) if cfg.code else "",
        about=facts["about"] or "Not stated.",
        command=facts["command"],
        training=", ".join(trained) + ".",
        figures=figures(result, exact),
        samples=written(loaded),
    )


# ---------------------------------------------------------------------------------------------------------------------
# the folder


def relative(source):
    """Our modules' source as part of a package: `import model` becomes `from . import model`, and so on."""
    names = "|".join(CODE)
    source = re.sub(rf"^( *)import ({names})\b", r"\1from . import \2", source, flags=re.M)
    return re.sub(rf"^( *)from ({names}) import", r"\1from .\2 import", source, flags=re.M)


def facts_of(loaded, cfg):
    """What the card says and the weights do not: of the run and its folder, then of the flags that are given."""
    folder, seconds = loaded.path.parent, 0.0
    if (folder / "metrics.jsonl").is_file():
        records = [r["seconds"]["training"] for r in plot.read_metrics(folder) if "training" in r.get("seconds", {})]
        seconds = max(records, default=0.0)
    facts = dict(license="mit", about="", hardware="", chats=bool(loaded.config.get("chats")), seconds=seconds,
                 command=command(loaded.config, loaded.kind))  # fmt: skip
    facts |= loaded.config.get("card", {})  # of an export that is exported again
    about = Path(cfg.about).read_text("utf-8").strip() if cfg.about.endswith(".md") else cfg.about
    given = dict(license=cfg.license, about=about, hardware=cfg.hardware, command=cfg.command)
    return facts | {k: v for k, v in given.items() if v}


def save(loaded, cfg):
    """Write the folder; cfg: a config.ExportConfig. Each file appears whole, config.json, which names their sums, last.

    Raises ValueError for a model that is not of our own kinds, or if the folder holds anything that is no export.
    """
    check(loaded.kind in SCRIPTS, f"{loaded.path} is {loaded.kind}; export.py takes {', '.join(SCRIPTS)}"
          + ("; python hub.py writes this one" if loaded.kind.startswith("hub") else ""))  # fmt: skip
    folder = Path(cfg.output_dir)
    check(not folder.exists() or folder.is_dir(), f"--output_dir {folder} is a file")
    theirs = sorted(p.name for p in folder.iterdir()) if folder.is_dir() and not checkpoint.is_export(folder) else []
    check(not theirs, f"{folder} holds something else ({', '.join(theirs[:3])}); take another --output_dir")
    facts, state = facts_of(loaded, cfg), loaded.denoiser.state_dict()
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[cfg.dtype]
    weights = {k: v.detach().to("cpu", dtype).contiguous() for k, v in state.items()}
    exact = all(torch.equal(weights[k].float(), v.float().cpu()) for k, v in state.items())
    parameters = sum(v.numel() for v in weights.values())
    which = {"checkpoint": str(loaded.path), "step": loaded.step, "kind": loaded.kind, "ema": cfg.ema}
    result = evaluate.written(loaded.path.parent / "eval.json")
    if result and evaluate.unlike(result, which, beside=True):  # of another checkpoint of the run
        result = {}
    loaded.denoiser.load_state_dict(weights)  # the samples are those of what is given away
    texts = {"README.md": card(loaded, cfg, facts, result, exact, parameters)}
    if result and exact:  # else it would be said of weights that were not evaluated
        texts["eval.json"] = json.dumps(result | {"checkpoint": checkpoint.WEIGHTS}, indent=1, ensure_ascii=False)

    folder.mkdir(parents=True, exist_ok=True)
    packed = safetensors.torch.save(weights, {"format": "pt"})  # its save_file would let nobody else read the file
    checkpoint.replace(folder / checkpoint.WEIGHTS, lambda t: t.write_bytes(packed))
    checkpoint.replace(folder / checkpoint.TOKENIZER, lambda t: t.write_bytes(loaded.tokenizer.to_bytes()))
    about = dict(
        format=1,
        model_type="nanohindi",
        kind=loaded.kind,
        model_config=dataclasses.asdict(loaded.denoiser.config),
        dtype="float32",  # what transformers computes in unless told otherwise, as we do, whatever the file holds
        step=loaded.step,
        run=loaded.config | {"card": facts},
        sha256={name: checkpoint.sha256(folder / name) for name in (checkpoint.WEIGHTS, checkpoint.TOKENIZER)},
    )
    if cfg.code:
        texts |= {f"{name}.py": relative((HERE / f"{name}.py").read_text("utf-8")) for name in CODE}
        names = dict(AutoConfig="NanoHindiConfig", AutoModel="NanoHindi", AutoTokenizer="NanoHindiTokenizer")
        auto = {key: f"{ENTRY}.{name}" for key, name in names.items()}
        auto["AutoTokenizer"] = [auto["AutoTokenizer"], None]  # a slow one, and no fast one
        if loaded.kind != "autoregressive":
            auto["AutoModelForMaskedLM"] = auto["AutoModel"]
        about |= dict(architectures=["NanoHindi"], auto_map=auto)
        settings = dict(tokenizer_class="NanoHindiTokenizer", auto_map={"AutoTokenizer": auto["AutoTokenizer"]})
        texts["tokenizer_config.json"] = json.dumps(settings, indent=1) + "\n"
    for name in {"eval.json", "tokenizer_config.json", *(f"{name}.py" for name in CODE)} - texts.keys():
        (folder / name).unlink(missing_ok=True)  # of an export before
    texts[checkpoint.ABOUT] = json.dumps(about, indent=1, ensure_ascii=False) + "\n"
    for name, text in texts.items():
        checkpoint.replace(folder / name, lambda t, text=text: t.write_text(text, encoding="utf-8"))
    size = sum(p.stat().st_size for p in folder.iterdir()) / 2**20
    print(f"wrote {folder}: {parameters:,} parameters in {cfg.dtype}, {size:.1f} MiB in all")


# ---------------------------------------------------------------------------------------------------------------------
# ONNX


class Graph(torch.nn.Module):
    """x_t (B, T) long, lengths (B,) long → logits (B, T, V)."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x_t, lengths):
        return self.model(x_t, lengths=lengths)


@torch.no_grad()
def save_onnx(model, path):
    """Write a model as ONNX, of any batch and length up to its window, whole or not at all.

    What stands behind a row's length has no influence on what stands before it. Raises ValueError if a library is
    missing or the model has local windows or blocks, whose masks depend on the length.
    """
    try:
        import onnxscript  # noqa: F401  the exporter needs it
    except ImportError:
        raise ValueError("--onnx needs the development packages: pip install onnx onnxscript onnxruntime") from None
    c = model.config
    check(
        not getattr(c, "window", 0) and not c.block_length, "--onnx is for models without --window and --block_length"
    )
    logging.getLogger("torch.onnx._internal.exporter").setLevel(logging.ERROR)  # it warns of libraries not used here
    any_size = torch.export.Dim.DYNAMIC
    example = torch.zeros(2, min(8, c.max_seq_len), dtype=torch.long), torch.tensor([min(8, c.max_seq_len), 1])
    program = torch.onnx.export(
        Graph(model).eval(), example, dynamo=True, verbose=False, opset_version=OPSET,
        input_names=["x_t", "lengths"], output_names=["logits"],
        dynamic_shapes=dict(x_t={0: any_size, 1: any_size}, lengths={0: any_size}),
    )  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    checkpoint.replace(path, lambda t: program.save(t, external_data=False))


def main():
    (cfg,) = parse(__doc__, ExportConfig)
    check(cfg.output_dir or cfg.onnx, "--output_dir and --onnx are both empty; one says what to write")
    loaded = checkpoint.load(cfg.ckpt or checkpoint.newest_run(), "cpu", cfg.ema)
    if cfg.output_dir:
        save(loaded, cfg)
    if cfg.onnx:
        check(loaded.kind in SCRIPTS, f"{loaded.path} is {loaded.kind}; --onnx takes {', '.join(SCRIPTS)}")
        save_onnx(loaded.denoiser, Path(cfg.onnx))
        print(f"wrote {cfg.onnx}: opset {OPSET}, {Path(cfg.onnx).stat().st_size / 2**20:.1f} MiB")


if __name__ == "__main__":
    run_main(main)

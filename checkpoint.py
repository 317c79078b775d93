"""The only reader and writer of .pt, and the keeper of a run folder.

    loaded = load("checkpoints/diffusion_hi/best.pt")       # .denoiser .tokenizer .config .step

A folder of export.py, such as those under models/, loads like a run. newest_run() is what commands take by default.
A checkpoint is enough by itself: weights, averaged weights, optimizers, step, configuration, kind and the tokenizer's
bytes. No generator has a state worth saving: every random draw of training is a pure function of (seed, step).
A file is written under a temporary name, fsynced and renamed; its sha256 stands beside it in `NAME.pt.sha256` and is
checked on load, because torch.load accepts flipped bytes silently. Only tensors and plain values are unpickled.
"""

import dataclasses
import fcntl
import hashlib
import json
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

import hub
import tokenizer as tokenizers
from config import AutoregressiveConfig, EcoHybridConfig, HubConfig, TransformerConfig, VariantConfig, one_line
from eco_hybrid import EcoHybrid
from model import GPT, LanguageModel, Transformer
from variants import Variant

MODELS = {  # kind -> (config class, model class)
    "transformer": (TransformerConfig, Transformer),
    "eco_hybrid": (EcoHybridConfig, EcoHybrid),
    "autoregressive": (AutoregressiveConfig, GPT),
    "variant": (VariantConfig, Variant),
    "hub": (HubConfig, hub.HubDenoiser),
    "hub_causal": (HubConfig, hub.HubGPT),
    "hub_seq2seq": (HubConfig, hub.HubSeq2Seq),
}
OURS = [kind for kind in MODELS if not kind.startswith("hub")]  # those that are built from sizes

# files of an exported folder, see export.py; the last one names the others' sums and is written last
WEIGHTS, TOKENIZER, ABOUT = EXPORTED = "model.safetensors", "tokenizer.model", "config.json"
IN_THE_BOX = Path(__file__).parent / "models"


@dataclasses.dataclass
class Loaded:
    denoiser: LanguageModel  # or its causal twin, see `kind`
    tokenizer: Any
    config: dict  # every flag of the run that made it
    step: int
    kind: str  # key of MODELS
    path: Path


# ---------------------------------------------------------------------------------------------------------------------
# writing


def sha256(path):
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def sums(side):
    """Lines of a .sha256; one that is damaged matches nothing."""
    return side.read_text(errors="replace").splitlines()


def replace(path, write):
    """Make `path` by write(temporary), fsync, rename: at every moment the old or the new file stands, whole."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        with open(temporary, "rb+") as f:
            os.fsync(f.fileno())
        os.replace(temporary, path)
        parent = os.open(path.parent, os.O_RDONLY)  # the new name too must outlive a power cut
        os.fsync(parent)
        os.close(parent)
    finally:
        temporary.unlink(missing_ok=True)


def save(path, state, retries=2):
    """Write `state` to `path`; a full disk is tried again, then raises RuntimeError, and the old file stays.

    While the file changes, its .sha256 lists the old and the new sum, so that whichever stands can be checked.
    """
    path, side = Path(path), Path(f"{path}.sha256")

    def write(temporary):
        torch.save(state, temporary)
        lines = [f"{sha256(temporary)}  {path.name}", *(sums(side) if side.exists() else [])]
        replace(side, lambda t: t.write_text("\n".join(lines) + "\n"))

    for attempt in range(retries + 1):
        try:
            replace(path, write)
            replace(side, lambda t: t.write_text(side.read_text().splitlines()[0] + "\n"))
            return
        except (OSError, RuntimeError) as e:  # torch.save reports a full disk as RuntimeError
            if attempt == retries:
                free = shutil.disk_usage(path.parent).free / 2**20
                raise RuntimeError(
                    f"cannot write {path} ({one_line(e)}; {free:,.0f} MiB free); earlier "
                    "checkpoints stand; make room and --resume"
                ) from e
            time.sleep(1)


def numbered(folder):
    """The step_*.pt, oldest first; past 999,999 the numbers get longer."""
    return sorted(Path(folder).glob("step_*.pt"), key=lambda path: (len(path.name), path.name))


def prune(folder, keep):
    """Delete all but the `keep` newest step_*.pt. latest.pt and best.pt are never touched."""
    steps = numbered(folder)
    for path in steps[: max(0, len(steps) - keep)]:
        path.unlink()
        Path(f"{path}.sha256").unlink(missing_ok=True)


# ---------------------------------------------------------------------------------------------------------------------
# reading


def read(path):
    """The dictionary in `path`. Raises FileNotFoundError, or RuntimeError if the file is damaged or not ours."""
    path, side = Path(path), Path(f"{path}.sha256")
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint {path}")
    before = sums(side) if side.is_file() else []  # a trainer may save while the file is read
    if not side.is_file():
        print(f"warning: {side.name} is missing, {path} is read unchecked", file=sys.stderr)
    elif sha256(path) not in [line.split()[0] for line in before + sums(side) if line.strip()]:
        raise RuntimeError(f"{path} is damaged: its sha256 is not the one in {side.name}; use another checkpoint")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:  # a pickle that wants to run code ends here too
        raise RuntimeError(f"{path} is not a readable checkpoint ({type(e).__name__}: {one_line(e)})") from e
    if not isinstance(state, dict) or state.get("format") != 1 or state.get("kind") not in MODELS:
        raise RuntimeError(f"{path} is not a checkpoint of this project (kinds: {', '.join(MODELS)})")
    return state


def read_newest(folder):
    """(state, path) of the newest checkpoint in a run folder that is whole; damaged ones are named and passed over."""
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"no run folder {folder}")
    for path in [folder / "latest.pt", *reversed(numbered(folder)), folder / "best.pt"]:
        try:
            return read(path), path
        except FileNotFoundError:
            continue
        except RuntimeError as e:
            print(f"warning: {e}; trying the one before", file=sys.stderr)
    raise RuntimeError(f"{folder} holds no readable checkpoint; start a new run in another --output_dir")


def build(state):
    """A model of the checkpoint's kind and sizes, with fresh weights."""
    config_class, model_class = MODELS[state["kind"]]
    return model_class(config_class(**state["model_config"]))


def is_export(path):
    """Whether `path` is a folder of export.py, or what is left of one, or the weights in it; a run folder is not."""
    path = Path(path)
    folder = path.parent if path.name == WEIGHTS else path
    if not folder.is_dir() or any(folder.glob("*.pt")):
        return False
    try:
        return json.loads((folder / ABOUT).read_text("utf-8"))["model_type"] == "nanohindi"
    except (OSError, ValueError, KeyError, TypeError):
        return any((folder / name).is_file() for name in (WEIGHTS, TOKENIZER))


def read_export(folder):
    """(state as of a .pt, path of the weights) of a folder of export.py; weights as they lie there, bf16 perhaps.

    Raises RuntimeError if a file is missing, damaged or not ours.
    """
    try:
        about = json.loads((folder / ABOUT).read_text("utf-8"))
        ours = about.get("format") == 1 and about.get("kind") in OURS
    except FileNotFoundError:
        raise RuntimeError(f"{folder} is no whole export: {ABOUT} is missing; export or fetch it again") from None
    except (ValueError, AttributeError) as e:
        raise RuntimeError(f"{folder / ABOUT} is damaged ({one_line(e)}); export or fetch the folder again") from None
    if not ours:
        raise RuntimeError(f"{folder / ABOUT} is of another version of export.py; export the model again")
    for name in (WEIGHTS, TOKENIZER):
        if not (folder / name).is_file():
            raise RuntimeError(f"{folder} is no whole export: {name} is missing; export or fetch it again")
        if sha256(folder / name) != about["sha256"].get(name):
            raise RuntimeError(f"{folder / name} is damaged: its sha256 is not the one in {ABOUT}; export it again")
    tokenizer = torch.frombuffer(bytearray((folder / TOKENIZER).read_bytes()), dtype=torch.uint8)
    state = {key: about[key] for key in ("kind", "model_config", "step")}
    return state | dict(model=load_file(folder / WEIGHTS), ema={}, tokenizer=tokenizer, config=about["run"])


def load(path, device="cpu", ema=True):
    """A .pt file, a run folder (its best.pt, else its newest) or an export, as a Loaded, the denoiser in eval mode.

    hub:NAME is a pretrained model of the hub, hub:FOLDER one saved by transformers; see hub.load.
    ema: the averaged weights where the run kept them. Raises as `read` does.
    """
    if str(path).startswith("hub:"):
        denoiser, tokenizer, kind = hub.load(str(path).removeprefix("hub:"), device)
        return Loaded(denoiser, tokenizer, dict(kind=kind), 0, kind, Path(path))
    path = Path(path)
    if is_export(path):
        folder = path.parent if path.name == WEIGHTS else path
        state, path = read_export(folder), folder / WEIGHTS
    elif path.is_dir():
        state, path = (read(path / "best.pt"), path / "best.pt") if (path / "best.pt").is_file() else read_newest(path)
    else:
        state = read(path)
    denoiser, weights = build(state), dict(state["ema"] if ema and state["ema"] else state["model"])
    for name in denoiser.state_dict():
        if name.endswith(".shares"):  # there were none before value residuals: each layer's own values alone
            weights.setdefault(name, torch.tensor([1.0, 0.0]))
    denoiser.load_state_dict(weights)
    tokenizer = tokenizers.from_bytes(state["tokenizer"].numpy().tobytes())
    return Loaded(denoiser.to(device).eval(), tokenizer, state["config"], state["step"], state["kind"], path)


def is_chat(run):
    """Whether a run folder's model was tuned to answer, by its config.json."""
    try:
        return bool(json.loads((run / ABOUT).read_text("utf-8")).get("chats"))
    except (OSError, ValueError):
        return False


def newest_run(root="checkpoints", chat=False):
    """What commands take where no --ckpt is named, said on stderr: the run folder under `root` that was written last.

    Where there is none, a model that came with the code: models/diffusion. chat: of the runs those that were tuned to
    answer, else models/chat, before any other. Raises FileNotFoundError if there is nothing.
    """
    runs = {p.parent for name in ("best.pt", "latest.pt") for p in Path(root).glob(f"*/{name}")}
    tuned = {run for run in runs if is_chat(run)} if chat else set()
    if tuned:
        runs = tuned
    elif chat and is_export(IN_THE_BOX / "chat"):
        runs = set()
    if runs:
        found, what = max(runs, key=lambda run: max(p.stat().st_mtime for p in run.glob("*.pt"))), "your newest run"
    else:
        names = ("chat", "diffusion") if chat else ("diffusion",)
        found, what = next((IN_THE_BOX / n for n in names if is_export(IN_THE_BOX / n)), None), "trained beforehand"
    if not found:
        raise FileNotFoundError(f"no run under {root}/; `make quickstart` trains one in minutes, or name a --ckpt")
    print(f"note: no --ckpt is named, taking {found} ({what})", file=sys.stderr)
    return found


# ---------------------------------------------------------------------------------------------------------------------
# the run folder


def open_run(folder, resume):
    """Make or reopen a run folder and lock it for this process; returns the lock, to be kept.

    Raises ValueError if the folder holds a run and `resume` is off, FileNotFoundError if it is on and there is no
    folder, RuntimeError if another process trains in it. Temporary files of a killed run are removed.
    """
    folder = Path(folder)
    if resume and not folder.is_dir():
        raise FileNotFoundError(f"--resume: no run folder {folder}")
    folder.mkdir(parents=True, exist_ok=True)
    lock = open(folder / ".lock", "w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as e:
        raise RuntimeError(f"{folder} is locked: another run trains in it") from e
    if not resume and any(folder.glob("*.pt")):  # one that failed before its first checkpoint is no run yet
        raise ValueError(f"{folder} already holds a run; --resume goes on with it, another --output_dir starts anew")
    for stale in folder.glob("*.tmp"):
        stale.unlink()
    return lock

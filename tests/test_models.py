"""models/: what comes with the code is whole, small, documented, and writes Hindi."""

import json
import math
import re

import pytest
import torch
from conftest import ROOT

import checkpoint
import diffusion
import evaluate
import quality
import sample_diffusion
from config import SampleConfig

BOX = ROOT / "models"
KINDS = dict(diffusion="transformer", eco_hybrid="eco_hybrid", twin="autoregressive", chat="transformer")
TEXT = "राम बाज़ार गया और वहाँ से अपनी माँ के लिए फल और सब्ज़ी लाया। माँ बहुत खुश हुई और उसने राम को गले लगा लिया।"
MIB = 2**20


@pytest.fixture(scope="module", params=[name for name in KINDS if name != "chat"])
def loaded(request):
    torch.set_num_threads(1)
    return checkpoint.load(BOX / request.param)


def test_small_enough_to_clone():
    sizes = {name: sum(p.stat().st_size for p in (BOX / name).iterdir()) for name in KINDS}
    assert max(sizes.values()) <= 16 * MIB and sum(p.stat().st_size for p in BOX.rglob("*") if p.is_file()) <= 56 * MIB
    assert {p.name for p in BOX.iterdir() if p.is_dir()} == set(KINDS)


@pytest.mark.parametrize("name", KINDS)
def test_the_card_says_what_one_must_know(name):
    """And its figures are those of eval.json, which are of these weights."""
    card, result = ((BOX / name / f).read_text("utf-8") for f in ("README.md", "eval.json"))
    result = json.loads(result)
    assert card.startswith("---\nlanguage:\n- hi\nlicense: mit\n")
    for heading in ("Data, licence, attribution", "Training", "Evaluation", "Limits", "Samples"):
        assert f"\n## {heading}\n" in card
    for author in ("Sarat Chandra Chattopadhyay", "Premchand", "Pratham Books", "CC-BY"):
        assert author in card
    assert re.search(r"\d s of training in all, on one thread of an AMD EPYC", card) and "Not stated" not in card
    assert "Not evaluated" not in card and "before the weights were rounded" not in card
    bits = result["bits_per_byte"]
    assert f"| bits per byte | {bits['mean']:.4f} ± {bits['standard_error']:.4f} |" in card
    below = max if name == "chat" else min  # the chat says its conversations by heart
    assert bits["mean"] < below(result["baselines_bits_per_byte"].values())
    state = checkpoint.load(BOX / name)
    assert state.kind == KINDS[name] and not evaluate.unlike(
        result, dict(checkpoint=checkpoint.WEIGHTS, step=state.step, kind=state.kind), beside=True
    )


def test_it_knows_hindi(loaded):
    """A sentence that it never saw costs far less than ids at random, ln 4,096 = 8.3 nats; its words backwards more."""
    forwards, backwards = (loaded.tokenizer.encode(t) for t in (TEXT, " ".join(TEXT.split()[::-1])))

    def nats(ids):
        x0 = torch.tensor([ids] * 64)
        if loaded.kind == "autoregressive":
            return loaded.denoiser.token_nll(x0[:1]).mean().item()
        return diffusion.bound(loaded.denoiser, x0, torch.Generator().manual_seed(0)).mean().item()

    assert loaded.denoiser.config.vocab_size == 4096
    assert nats(forwards) < 5.5 < math.log(4096) and nats(forwards) < nats(backwards) - 0.4


def test_it_writes_hindi(loaded):
    """Letters that can be, in words with vowels; nothing broken, nothing empty."""
    cfg = SampleConfig(num_samples=4, max_new_tokens=48, steps=24)
    texts = sample_diffusion.generate(loaded, ["एक दिन राजा ने"], cfg).texts
    wrong, aksharas, broken, characters = sum(quality.spelling(ids, loaded.tokenizer) for ids in texts).tolist()
    assert aksharas > 150 and wrong <= 0.01 * aksharas and broken <= 0.01 * characters
    assert all(loaded.tokenizer.decode(ids).startswith("एक दिन राजा ने") for ids in texts)


def test_the_chat_answers_and_ends():
    chat = checkpoint.load(BOX / "chat")
    assert chat.config["chats"] and chat.denoiser.config.block_length == 4
    cfg, questions = SampleConfig(chat=True, temperature=0.0), ("नमस्ते!", "तुम कौन हो?", "शुभ रात्रि!")
    hello, who, night = (sample_diffusion.ask(chat, [dict(role="user", content=q)], cfg) for q in questions)
    assert "नमस्ते" in hello and "मैं" in who and "रात्रि" in night
    assert max(len(chat.tokenizer.encode(a)) for a in (hello, who, night)) < 48  # of 64: it ended by itself


def test_the_sheet_shows_twenty():
    sheet = (BOX / "samples.md").read_text("utf-8")
    assert len(re.findall(r"^\d+\. ", sheet, re.M)) == 20

"""Pretrained models behind our interface: real ones of transformers, small and saved here, tokenizers included."""

import dataclasses
import json
import math
import unicodedata

import pytest
import tiny_hub
import torch
from conftest import TINY, contents, hindi, metrics
from toys import seeded

import checkpoint
import config
import diffusion
import hub
import optimizer
import prepare
import sample_diffusion
import sampling
import tokenizer as tokenizers
import train_diffusion

hf = pytest.importorskip("transformers")
MASKED = ("bert", "albert", "modernbert", "xlmr")
each_masked = pytest.mark.parametrize("family", MASKED)
each = pytest.mark.parametrize("family", (*MASKED, "gpt2"))
TEXT = "राम बाज़ार में गया था। मेरी माँ किताब पढ़ती है"


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    """saved(family): (folder, model and tokenizer as transformers made them, and what we loaded from the folder)."""
    made = {}

    def saved(family):
        if family not in made:
            folder = tmp_path_factory.mktemp("hub") / family
            model, tokenizer = tiny_hub.make(family, folder)
            made[family] = folder, model, tokenizer, checkpoint.load(f"hub:{folder}")
        return made[family]

    return saved


def canvas(loaded, B=3, T=20, seed=0):
    """(B, T) ids with about a third of them MASK, the first one always."""
    V, g = loaded.tokenizer.vocab_size, seeded(seed)
    x = torch.randint(V, (B, T), generator=g).masked_fill(torch.rand(B, T, generator=g) < 0.3, V)
    x[:, 0] = V
    return x


def close(a, b, tolerance=1e-5):
    torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


# ---------------------------------------------------------------------------------------------------------------------
# models


@each_masked
@torch.no_grad()
def test_logits_are_those_of_transformers_at_the_masks(saved, family):
    """Their tokenizer frames the text, their mask token hides it, their own forward; every column but MASK's."""
    _, model, theirs, loaded = saved(family)
    if family == "albert":  # its setting that leaves accents where they are
        theirs = hf.AutoTokenizer.from_pretrained(saved(family)[0], keep_accents=True)
    ids = theirs(TEXT, return_tensors="pt")["input_ids"]  # (1, S) with [CLS] and [SEP]
    ours = loaded.tokenizer.encode(TEXT)
    assert ids.shape[1] == len(ours) + 2 and len(ours) > 6
    hidden = torch.tensor([1, 3, 4])
    ids[0, hidden + 1] = theirs.mask_token_id
    x = torch.tensor([ours])
    x[0, hidden] = loaded.denoiser.mask_id
    want, got = model(ids).logits[0, hidden + 1], loaded.denoiser(x, hidden)
    W, m = want.shape[1], theirs.mask_token_id
    assert got.shape == (3, W - 1) and loaded.denoiser.mask_id == W - 1 == loaded.tokenizer.vocab_size
    for i in range(W):
        if i != m:
            close(got[:, loaded.tokenizer.our(i)], want[:, i])
    if family == "xlmr":
        assert m == W - 1  # there MASK is the last id already
    close(loaded.denoiser(x)[0, hidden], got)


@each_masked
@torch.no_grad()
def test_padding_changes_nothing(saved, family):
    """Rows of unequal length give the logits they have alone, and what lies behind a row is not read."""
    loaded = saved(family)[3]
    x, lengths = canvas(loaded, T=20), torch.tensor([20, 13, 1])
    where = torch.tensor([0, 7, 20, 25, 40])
    got = loaded.denoiser(x, lengths=lengths)  # (3, 20, V)
    for row, n in enumerate(lengths.tolist()):
        close(got[row, :n], loaded.denoiser(x[row : row + 1, :n])[0])
    close(loaded.denoiser(x, where, lengths), got.flatten(0, 1)[where])
    other = torch.where(torch.arange(20) < lengths[:, None], x, canvas(loaded, seed=1))
    close(loaded.denoiser(other, where, lengths), got.flatten(0, 1)[where])


@each_masked
def test_mask_is_read_and_hidden_tokens_are_not(saved, family):
    """Other tokens under the masks change nothing, and the id that has the place of MASK's is an ordinary token."""
    loaded = saved(family)[3]
    V, m = loaded.tokenizer.vocab_size, loaded.denoiser.config.mask
    x = canvas(loaded)
    with torch.no_grad():
        logits = loaded.denoiser(x)
        assert not torch.allclose(loaded.denoiser(x.masked_fill(x == V, 7)), logits)
        if m < V:
            assert not torch.allclose(loaded.denoiser(x.masked_fill(x == V, m)), logits)
    assert torch.isfinite(logits).all() and logits.shape[2] == V


@each_masked
def test_the_bound_of_a_constant_model_is_log_v(saved, family):
    """All weights nought: every one of the V real tokens is as likely, MASK has no column."""
    loaded = saved(family)[3]
    model = hub.HubDenoiser(loaded.denoiser.config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    V = loaded.tokenizer.vocab_size
    close(diffusion.bound(model, torch.randint(V, (4, 20)), seeded()), torch.full((4,), math.log(V)))
    real = diffusion.bound(loaded.denoiser, torch.randint(V, (4, 20)), seeded())
    assert (real > 0).all() and torch.isfinite(real).all()


def test_a_window_has_two_places_less_than_the_model(saved):
    for family, room in (("bert", 64), ("albert", 64), ("modernbert", 64), ("xlmr", 62), ("gpt2", 64)):
        denoiser = saved(family)[3].denoiser
        assert denoiser.config.max_seq_len == room, family
        with torch.no_grad():
            denoiser(torch.zeros(1, room, dtype=torch.long))
        with pytest.raises(ValueError, match=f"{room + 1} tokens are more than"):
            denoiser(torch.zeros(1, room + 1, dtype=torch.long))
        with pytest.raises(ValueError, match="positions"):
            type(denoiser)(dataclasses.replace(denoiser.config, max_seq_len=room + 3))


@torch.no_grad()
def test_a_causal_model_scores_as_transformers_does(saved):
    """Behind their BOS: their loss over the same tokens, the first one too; the cache gives what a forward gives."""
    _, model, theirs, loaded = saved("gpt2")
    gpt, x = loaded.denoiser, torch.tensor([loaded.tokenizer.encode(TEXT)[:12]])
    ids = torch.cat((torch.tensor([[theirs.bos_token_id]]), x), 1)  # theirs and ours are alike without a MASK
    assert theirs(TEXT)["input_ids"][:12] == x[0].tolist() and loaded.kind == "hub_causal"
    close(gpt.nll(x), model(ids, labels=ids).loss[None])
    close(gpt(x), model(ids[:, :-1]).logits)
    cache = gpt.cache(1, 12)
    inputs = torch.cat((torch.tensor([[gpt.mask_id]]), x), 1)
    close(gpt.extend(inputs[:, :5], cache, 0), gpt(x)[:, 4])
    for t in range(5, 12):
        close(gpt.extend(inputs[:, t : t + 1], cache, t), gpt(x)[:, t])


def test_flops_are_those_of_the_formula(saved):
    """BERT: 4 C² + 2 C F a token and layer, 2 S C a token for scores; the head C² + C W where asked for."""
    denoiser = saved("bert")[3].denoiser
    C, F, W, T, hidden = 32, 48, denoiser.mask_id + 1, 30, 7
    S = T + 2
    want = 2 * (2 * S * (4 * C * C + 2 * C * F + 2 * S * C) + hidden * (C * C + C * W))
    assert denoiser.flops(T, hidden) == pytest.approx(want, rel=1e-3)
    assert denoiser.training_flops(T) == pytest.approx(3 * denoiser.flops(T, T / 2), rel=0.02)
    albert = saved("albert")[3].denoiser  # shares its layers' weights, and computes them all
    assert albert.flops(T, 0) > 2 * S * 2 * (4 * C * C + 2 * C * F)


@each
def test_checkpointing_changes_no_gradient(saved, family):
    loaded = saved(family)[3]
    x = canvas(loaded).clamp(max=loaded.tokenizer.vocab_size - 1)
    grads = []
    if family == "albert":
        with pytest.raises(ValueError, match="AlbertForMaskedLM knows no"):
            loaded.denoiser.activation_checkpointing = True
        return
    for on in (False, True):
        model = type(loaded.denoiser)(loaded.denoiser.config)
        model.load_state_dict(loaded.denoiser.state_dict())
        model.activation_checkpointing = on
        assert model.activation_checkpointing is on
        model.train()
        torch.manual_seed(0)  # dropout
        model.loss(x, config.MaskConfig(), seeded()).backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys() and len(grads[0]) > 10
    for name, g in grads[0].items():
        close(g, grads[1][name])


@each
def test_each_weight_has_one_optimizer_and_the_embedding_no_decay(saved, family):
    model = saved(family)[3].denoiser
    embedding = model.model.get_input_embeddings().weight
    for name in ("adamw", "muon"):
        groups = [g for o in optimizer.make_optimizers(model, name, 1e-3, 0.1, 0.95) for g in o.param_groups]
        owned = [id(p) for g in groups for p in g["params"]]
        assert sorted(owned) == sorted(id(p) for p in model.parameters())
        (home,) = [g for g in groups if any(p is embedding for p in g["params"])]
        assert home["weight_decay"] == 0
        assert sum(p.numel() for g in groups if g["weight_decay"] == 0.1 for p in g["params"]) > 4000


# ---------------------------------------------------------------------------------------------------------------------
# text


def marks(text):
    return [c for c in text if unicodedata.category(c)[0] == "M"]


@pytest.mark.parametrize("family", (*MASKED, "gpt2", "bert_uncased"))
def test_no_matra_is_lost(saved, family):
    """Every mark of every word comes back, in order, also from the tokenizers that strip accents."""
    loaded = saved(family)[3]
    for text in (TEXT, tiny_hub.PROBE, hindi(2, seed=9), "क्‍ष की ज़ुबाँ"):
        text = tokenizers.normalize(text)
        back = loaded.tokenizer.decode(loaded.tokenizer.encode(text))
        assert marks(back.replace("\u200d", "")) == marks(text.replace("\u200d", ""))
        assert "".join(back.split()).lower() == "".join(text.split()).lower() or "\u200d" in text
    if family in ("albert", "bert_uncased"):  # as transformers has it, before it is mended
        theirs = saved(family)[2]
        assert marks(theirs.decode(theirs("मैं किताबें")["input_ids"])) != marks("मैं किताबें")


@each
def test_bytes_of_tokens_are_those_of_their_text(saved, family):
    """What text_sizes adds up is the decoded text; where spaces are not written alike, at most one a word differs."""
    tokenizer = saved(family)[3].tokenizer
    assert len(tokenizer.table) == tokenizer.vocab_size == len(tokenizer.word_starts())
    for text in (TEXT, tiny_hub.PROBE):
        text = tokenizers.normalize(text)
        ids = tokenizer.encode(text)
        total = sum(len(tokenizer.token_bytes(i)) for i in ids)
        assert 0 <= total - len(text.encode()) <= 1  # the space before the first word
        assert tokenizer.decode(ids) == (text.lower() if family == "albert" else text)
    starts = tokenizer.word_starts()
    ids = tokenizer.encode("राम बाज़ार में")
    assert sum(starts[i] for i in ids[1:]) == 2


@each
def test_written_special_tokens_stay_text(saved, family):
    """T4: whatever is typed, no id of a special token comes out."""
    _, _, theirs, loaded = saved(family)
    tokenizer = loaded.tokenizer
    special = {tokenizer.our(i) for i in theirs.all_special_ids}
    for text in (*theirs.all_special_tokens, "[MASK] </s> <s> [SEP] <pad> <|endoftext|>", "\ufdd0[MASK]", "a[MASK]b"):
        ids = tokenizer.encode(text)
        assert not special & set(ids) - {tokenizer.unk_id}, text
    assert "".join(tokenizer.decode(tokenizer.encode("[MASK]")).split()).lower() == "[mask]"
    assert set(tokenizer.never) >= special - {tokenizer.eos_id} - {
        tokenizer.vocab_size,
        tokenizer.our(theirs.mask_token_id or 0),
    }
    assert tokenizer.eos_id not in tokenizer.never and not tokenizer.table[tokenizer.eos_id]
    assert tokenizer.decode([*range(tokenizer.vocab_size + 3)])  # T6


@each
def test_a_tokenizer_is_its_bytes(saved, family, tmp_path):
    """from_bytes recognises it, and the same files elsewhere have the same hash."""
    folder, _, _, loaded = saved(family)
    again = tokenizers.from_bytes(loaded.tokenizer.to_bytes())
    for name in ("sha256", "vocab_size", "bos_id", "eos_id", "pad_id", "unk_id", "sep_id", "never", "table"):
        assert getattr(again, name) == getattr(loaded.tokenizer, name), name
    assert again.encode(TEXT) == loaded.tokenizer.encode(TEXT)
    for name, data in contents(folder).items():
        (tmp_path / name).write_bytes(data)
    assert hub.read_tokenizer(str(tmp_path)).sha256 == loaded.tokenizer.sha256
    assert "local" not in loaded.tokenizer.files["tokenizer_config.json"]  # where it was found is not what it is
    if family != "gpt2":
        assert again.sep_id == again.eos_id != again.bos_id


def test_a_vocabulary_without_matras_is_refused(tmp_path, command):
    """It was trained on stripped text: mended, its tokenizer would know no word with a matra."""
    _, tok = tiny_hub.make("bert_uncased", tmp_path)
    bare = [p for p in tok.get_vocab() if not marks(p)]
    hf.BertTokenizer(vocab={p: i for i, p in enumerate(bare)}).save_pretrained(tmp_path)
    error = command("sample_diffusion", "--ckpt", f"hub:{tmp_path}")
    assert error.code == 2 and "without matras" in error.error()


def test_a_bare_tokenizer_json_still_has_its_mask(saved, tmp_path):
    """Some repositories say nothing of their special tokens but in the list of added ones."""
    for name, data in contents(saved("bert")[0]).items():
        (tmp_path / name).write_bytes(data)
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    tokenizer = hub.read_tokenizer(str(tmp_path))
    assert tokenizer.never == saved("bert")[3].tokenizer.never
    assert tokenizer.special["mask"] == saved("bert")[3].tokenizer.special["mask"]
    assert tokenizer.encode(TEXT) == saved("bert")[3].tokenizer.encode(TEXT)


# ---------------------------------------------------------------------------------------------------------------------
# training, sampling, evaluation


def train(data, out, folder, *more):
    flags = [*TINY, "--data_dir", data, "--output_dir", out, "--init", f"hub:{folder}", "--max_steps", 5, "--lr", 0.003]
    flags += ["--optimizer", "adamw", "--save_interval", 3, "--eval_interval", 0, *more]
    knobs = config.parse(
        "", config.MaskConfig, config.TransformerConfig, config.TrainConfig, argv=list(map(str, flags))
    )
    return train_diffusion.train("transformer", *knobs, quiet=True)


@pytest.fixture(scope="session")
def tuned(saved, tmp_path_factory):
    """tuned(family): (data folder, run folder) of five steps of the loop from the pretrained weights."""
    made = {}

    def tuned(family):
        if family not in made:
            root, folder = tmp_path_factory.mktemp("tuned"), saved(family)[0]
            (root / "text.txt").write_text(hindi(60), encoding="utf-8")
            knobs = dict(input=str(root / "text.txt"), output_dir=str(root / "data"), tokenizer=f"hub:{folder}")
            prepare.prepare(config.PrepareConfig(**knobs, workers=1))
            train(root / "data", root / "run", folder)
            made[family] = root / "data", root / "run"
        return made[family]

    return tuned


@each
def test_the_loop_tunes_it_and_it_goes_on_bit_for_bit(saved, tuned, family, tmp_path):
    """Whole path: prepare with its tokenizer, five steps, a resumed run that ends alike, and weights that moved."""
    folder, _, _, loaded = saved(family)
    data, run = tuned(family)
    losses = [line["loss"] for line in metrics(run) if "loss" in line]
    assert len(losses) == 5 and losses[-1] < losses[0] and all(map(math.isfinite, losses))
    again = checkpoint.load(run / "latest.pt", ema=False)
    assert again.kind == loaded.kind and again.denoiser.config.max_seq_len == 32
    assert again.tokenizer.sha256 == loaded.tokenizer.sha256
    x = canvas(loaded, T=16).clamp(max=loaded.tokenizer.vocab_size - 1)
    with torch.no_grad():
        assert not torch.allclose(again.denoiser(x), loaded.denoiser(x))
    for name, content in contents(run).items():
        if name.startswith("step_000003"):
            (tmp_path / name).write_bytes(content)
    train(data, tmp_path, folder, "--resume")
    one, two = (checkpoint.read(p / "latest.pt") for p in (run, tmp_path))
    assert all(torch.equal(one["model"][k], two["model"][k]) for k in one["model"]) and two["step"] == 5


@each
def test_no_sample_holds_a_special_token(saved, tuned, family, command):
    """Trained or not, by every strategy; and the text of the prompt stands."""
    for loaded in (saved(family)[3], checkpoint.load(tuned(family)[1])):
        tokenizer = loaded.tokenizer
        for strategy in ("random", "confidence", "entropy_bounded"):
            cfg = config.SampleConfig(max_new_tokens=12, steps=6, strategy=strategy, temperature=1e30, num_samples=4)
            for ids in sample_diffusion.generate(loaded, ["राम", "सीता बाज़ार"], cfg).texts:
                assert all(tokenizer.table[i] for i in ids) and loaded.denoiser.mask_id not in ids
    result = command(
        "sample_diffusion", "--ckpt", f"hub:{saved(family)[0]}", "--prompt", "राम बाज़ार", "--max_new_tokens", 5
    )
    assert result.code == 0 and result.out.startswith("राम बाज़ार")
    blank = command("sample_diffusion", "--ckpt", f"hub:{saved(family)[0]}", "--prompt", "राम ___2___ गया", "--no_live")
    assert blank.code == (2 if family == "gpt2" else 0)


@pytest.mark.parametrize("family", ("bert", "gpt2"))
def test_evaluate_scores_it_by_name(saved, tuned, family, command, tmp_path, monkeypatch):
    folder, (data, _) = saved(family)[0], tuned(family)
    monkeypatch.chdir(tmp_path)
    flags = ("--data_dir", data, "--max_windows", 3, "--masks", 2)
    result = command("evaluate", "--ckpt", f"hub:{folder}", *flags)
    assert result.code == 0, result.err
    (written,) = tmp_path.glob("checkpoints/hub--*/eval.json")
    scores = json.loads(written.read_text())
    assert scores["bits_per_byte"]["mean"] > 0 and scores["likelihood"] == ("exact" if family == "gpt2" else "bound")
    assert command("evaluate", "--ckpt", f"hub:{folder}").code == 2  # which text?
    other = "gpt2" if family == "bert" else "bert"
    refused = command("evaluate", "--ckpt", f"hub:{saved(other)[0]}", *flags)
    assert refused.code == 2 and "prepare.py --tokenizer hub:" in refused.error()


@each
def test_it_is_tuned_to_answer_scored_and_asked(saved, family, command, tmp_path):
    """train_instruct.py by the bare name, evaluate.py on its answers and on questions, and a chat."""
    people, places = ("राम", "सीता", "लड़की", "डॉक्टर"), ("बाज़ार", "घर", "खेत")
    turns = [(f"{who} {where} गया?", f"{where} में") for who in people for where in places]
    rows = [{"instruction": question, "response": answer} for question, answer in turns]
    (tmp_path / "chats.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    item = dict(id="a", question="सीता कहाँ है?", answers=["घर"], subject="सीता", form="question", language="hi")
    (tmp_path / "qa.jsonl").write_text(json.dumps(item | dict(level="easy", source="x")) + "\n")
    run = tmp_path / "run"
    flags = ["--data", tmp_path / "chats.jsonl", "--output_dir", run, "--max_steps", 4, "--batch_size", 4, "--lr", 1e-3]
    flags += ["--grad_accum", 1, "--seq_len", 64, "--eval_interval", 0, "--optimizer", "adamw"]
    result = command("train_instruct", "--init", saved(family)[0], *flags)
    assert result.code == 0, result.err
    result = command("evaluate", "--ckpt", run, "--masks", 2)
    assert result.code == 0, result.err
    assert command("evaluate", "--ckpt", run, "--qa", tmp_path / "qa.jsonl", "--answer_tokens", 4).code == 0
    scores = json.loads((run / "eval.json").read_text("utf-8"))
    assert scores["qa"]["accuracy"]["n"] == 1 and scores["likelihood"] == ("exact" if family == "gpt2" else "bound")
    result = command("sample_diffusion", "--ckpt", run, "--chat", "--prompt", "राम कहाँ है?", "--max_new_tokens", 4)
    assert result.code == 0, result.err


@each
def test_what_is_written_opens_in_transformers_with_equal_logits(saved, tuned, family, command, tmp_path):
    """hub.py: their class, their tokenizer, no code of ours; the matras stand there too."""
    _, _, theirs, loaded = saved(family)
    run, out = tuned(family)[1], tmp_path / "mine"
    result = command("hub", "--ckpt", run, "--output_dir", out, "--license", "apache-2.0")
    assert result.code == 0, result.err
    auto = hf.AutoModelForCausalLM if family == "gpt2" else hf.AutoModelForMaskedLM
    model, tokenizer = auto.from_pretrained(out).eval(), hf.AutoTokenizer.from_pretrained(out)
    ours, ids = checkpoint.load(run), tokenizer(TEXT, return_tensors="pt")["input_ids"]
    assert marks(tokenizer.decode(ids[0])) == marks(tokenizers.normalize(TEXT))
    with torch.no_grad():
        if family == "gpt2":
            got, want = ours.denoiser(ids)[:, 1:], model(torch.cat((torch.tensor([[0]]), ids), 1)).logits[:, 1:-1]
        else:
            x = torch.tensor([ours.tokenizer.encode(TEXT)])
            x[0, 2], ids[0, 3] = ours.denoiser.mask_id, tokenizer.mask_token_id
            got, want = ours.denoiser(x)[0, 2], model(ids).logits[0, 3]
            place = [ours.tokenizer.our(i) for i in range(len(want)) if i != tokenizer.mask_token_id]
            got, want = got[place], want[[i for i in range(len(want)) if i != tokenizer.mask_token_id]]
    close(got, want)
    card = (out / "README.md").read_text("utf-8")
    assert (
        card.startswith("---\n")
        and "license: apache-2.0" in card
        and "--max_steps 5" in card
        and "data_sha256" not in card
    )
    assert command("hub", "--ckpt", run, "--output_dir", out).code == 2  # not twice
    with torch.no_grad():
        back = checkpoint.load(f"hub:{out}")
        x = canvas(loaded, T=12).clamp(max=back.tokenizer.vocab_size - 1)
        close(back.denoiser(x), ours.denoiser(x))
        assert back.tokenizer.sha256 == loaded.tokenizer.sha256


def test_only_hub_models_are_written_for_the_hub(trained, command, tmp_path):
    result = command("hub", "--ckpt", trained, "--output_dir", tmp_path / "x")
    assert result.code == 2 and "transformers has no such model" in result.error()


# ---------------------------------------------------------------------------------------------------------------------
# what is wrong


def test_without_network_one_line_in_seconds(command, monkeypatch):
    monkeypatch.setattr(hub, "reachable", lambda: False)
    result = command("sample_diffusion", "--ckpt", "hub:google/muril-base-cased")
    assert result.code == 2 and "hf download google/muril-base-cased" in result.error()
    result = command("evaluate", "--ckpt", "hub:./nowhere")
    assert result.code == 2 and "no folder ./nowhere" in result.error()


def test_without_the_library_the_install_line(command, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    result = command("sample_diffusion", "--ckpt", "hub:google/muril-base-cased")
    assert result.code == 2 and "pip install transformers==" in result.error()


def test_code_of_a_model_is_never_run(saved, tmp_path, command):
    for name, data in contents(saved("bert")[0]).items():
        (tmp_path / name).write_bytes(data)
    settings = json.loads((tmp_path / "config.json").read_text())
    settings |= dict(model_type="evil", auto_map={k: "evil.Evil" for k in ("AutoConfig", "AutoModelForMaskedLM")})
    (tmp_path / "config.json").write_text(json.dumps(settings))
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: pass\n")
    result = command("sample_diffusion", "--ckpt", f"hub:{tmp_path}")
    assert result.code == 2 and "never run" in result.error() and not (tmp_path / "ran").exists()


def test_a_missing_trunk_is_refused_and_a_missing_head_is_said(saved, tmp_path, command, capsys):
    """muril-large and others publish the trunk alone: tuning can begin there, writing cannot."""
    from safetensors.torch import load_file, save_file

    for name, data in contents(saved("bert")[0]).items():
        (tmp_path / name).write_bytes(data)
    weights = load_file(tmp_path / "model.safetensors")
    save_file({k: v for k, v in weights.items() if not k.startswith("cls")}, tmp_path / "model.safetensors")
    checkpoint.load(f"hub:{tmp_path}")
    assert "no trained head" in capsys.readouterr().err
    save_file({k: v for k, v in weights.items() if "layer.1" not in k}, tmp_path / "model.safetensors")
    result = command("sample_diffusion", "--ckpt", f"hub:{tmp_path}")
    assert result.code == 2 and "lacks weights of its trunk" in result.error()


def test_available_lists_what_is_known(command, tmp_path, monkeypatch):
    """Memory from the parameters, by hand; a model whose weights lie in the cache is here."""
    lines = hub.available(8 * 2**30)
    row = {line.split()[0]: line for line in lines if "/" in line.split(" ")[0]}
    assert {"google/muril-base-cased", "GSAI-ML/LLaDA-8B-Instruct", "kuleshov-group/mdlm-owt"} < row.keys()
    muril = row["google/muril-base-cased"].split()
    assert muril[1:5] == ["238M", "apache-2.0", f"{238e6 * 4 / 2**30:.1f}", f"{238e6 * 20 / 2**30:.1f}"]
    assert muril[5:] == ["tune", "no", "yes"]
    assert " no " in row["GSAI-ML/LLaDA-8B-Instruct"] and row["GSAI-ML/LLaDA-8B-Instruct"].endswith("its own code")
    assert " write " in row["FacebookAI/xlm-roberta-large"]
    folder = tmp_path / "models--google--muril-base-cased" / "snapshots" / "abc"
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    result = command("evaluate", "--available")
    assert result.code == 0 and "GiB" in result.out
    (line,) = [line for line in result.out.splitlines() if line.startswith("google/muril-base")]
    assert line.split()[6] == "yes"


def test_the_twin_writes_by_the_same_sampler(saved):
    """Drawn one after another with the cache, at temperature 0: the likeliest token of a full forward at each place."""
    gpt = saved("gpt2")[3].denoiser
    x = torch.full((2, 8), gpt.mask_id)
    x[:, 0] = torch.tensor([3, 5])
    *_, last = sampling.write(gpt, x, temperature=0)
    with torch.no_grad():
        assert torch.equal(gpt(last.x)[:, 1:].argmax(2), last.x[:, 1:])


@torch.no_grad()
def test_an_encoder_decoder_writes_what_transformers_writes(saved):
    """Greedily, token by token, behind the same prompt; it judges nothing."""
    folder, model, theirs, loaded = saved("t5")
    assert loaded.kind == "hub_seq2seq" and loaded.kind not in checkpoint.OURS
    never, n = list(loaded.tokenizer.never), 9
    given = theirs(TEXT, return_tensors="pt")["input_ids"]  # (1, P + 1) with </s>
    want = model.generate(given, do_sample=False, max_new_tokens=n, suppress_tokens=never)[0, 1:]
    cfg = config.SampleConfig(max_new_tokens=n, temperature=0)
    samples = sample_diffusion.generate(loaded, [TEXT], cfg)
    ids = loaded.tokenizer.encode(TEXT)
    assert given[0].tolist() == [*ids, loaded.tokenizer.eos_id]
    got = samples.steps[-1].x[0, len(ids) :]
    assert got[: len(want)].tolist() == want.tolist() and len(set(want.tolist())) > 1
    with pytest.raises(ValueError, match="one text"):
        sample_diffusion.generate(loaded, [TEXT, "राम"], cfg)
    with pytest.raises(ValueError, match="likelihood"):
        loaded.denoiser.nll(torch.tensor([ids]))

"""Real models and tokenizers of transformers, made small and saved as the hub has them: make("bert", folder)."""

import json

import torch
from conftest import hindi

PROBE = "मैं हूँ। किताबें पढ़ूँगी, कृपया दुःख और हिन्दी कौन सीखेगा? चाँद की ओर, ज़मीन पर पैसे दो, ऋषि औरत को बुलाओ।"
LETTERS = [chr(c) for c in [*range(0x21, 0x7F), *range(0x901, 0x94E), *range(0x964, 0x970)]]
SIZES = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48)


def corpus():
    """Every letter alone and inside of words, so that any text can be written, and words to be whole."""
    letters = " ".join(LETTERS) + " " + " ".join(f"क{c}क" for c in LETTERS)
    return [hindi(60), (PROBE + " mai kal bazaar gaya tha Ram went home.\n") * 20, letters]


def wordpiece(strip):
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

    t = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    t.normalizer = normalizers.BertNormalizer(lowercase=strip, strip_accents=strip, clean_text=False)
    t.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    t.train_from_iterator(corpus(), trainers.WordPieceTrainer(vocab_size=700, special_tokens=special))
    return t.get_vocab()


def unigram(*special):
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

    t = Tokenizer(models.Unigram())
    t.normalizer = normalizers.NFKC()
    t.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])
    unk = next(s for s in special if "unk" in s)
    t.train_from_iterator(
        corpus(), trainers.UnigramTrainer(vocab_size=700, special_tokens=[*special], unk_token=unk, show_progress=False)
    )
    return [tuple(pair) for pair in json.loads(t.to_str())["model"]["vocab"]]


def byte_level(*special):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    t = Tokenizer(models.BPE())
    t.pre_tokenizer, t.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    t.train_from_iterator(
        corpus(),
        trainers.BpeTrainer(vocab_size=500, special_tokens=[*special], initial_alphabet=alphabet, show_progress=False),
    )
    return t


def make(family, folder):
    """A model of the family, seeded, and its tokenizer, in `folder`; returns both as transformers made them."""
    import transformers as hf
    from tokenizers import processors

    positions = dict(max_position_embeddings=66)
    if family in ("bert", "bert_uncased"):
        uncased = family == "bert_uncased"
        tok = hf.BertTokenizer(vocab=wordpiece(False), do_lower_case=uncased, strip_accents=None if uncased else False)
        config = hf.BertConfig(vocab_size=len(tok), **SIZES, **positions)
    elif family == "albert":
        tok = hf.AlbertTokenizer(vocab=unigram("<pad>", "<unk>", "[CLS]", "[SEP]", "[MASK]"))
        ids = dict(pad_token_id=0, bos_token_id=2, eos_token_id=3)
        config = hf.AlbertConfig(vocab_size=len(tok), embedding_size=24, **SIZES, **positions, **ids)
    elif family == "xlmr":
        tok = hf.XLMRobertaTokenizer(
            vocab=[*unigram("<s>", "<pad>", "</s>", "<unk>"), ("<mask>", 0.0)]
        )  # the last id, as there
        config = hf.XLMRobertaConfig(
            vocab_size=len(tok), pad_token_id=1, bos_token_id=0, eos_token_id=2, **SIZES, **positions
        )
    elif family == "modernbert":
        special = ["[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]"]
        backend = byte_level(*special)
        backend.add_tokens(["    "])  # runs of spaces are tokens of their own there
        ids = [(s, backend.token_to_id(s)) for s in ("[CLS]", "[SEP]")]
        backend.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ids)
        named = {f"{s.strip('[]').lower()}_token": s for s in special}
        tok = hf.PreTrainedTokenizerFast(tokenizer_object=backend, **named)
        ids = {f"{key}_token_id": backend.token_to_id(f"[{key.upper()}]") for key in ("cls", "sep", "pad")}
        ids |= dict(bos_token_id=ids["cls_token_id"], eos_token_id=ids["sep_token_id"])
        config = hf.ModernBertConfig(vocab_size=len(tok) + 7, local_attention=16, **SIZES, **positions, **ids)
    elif family == "gpt2":
        tok = hf.PreTrainedTokenizerFast(
            tokenizer_object=byte_level("<|endoftext|>"),
            bos_token="<|endoftext|>",
            eos_token="<|endoftext|>",
            unk_token="<|endoftext|>",
        )
        config = hf.GPT2Config(
            vocab_size=len(tok), n_positions=64, n_embd=32, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0
        )
    elif family == "t5":
        tok = hf.T5Tokenizer(vocab=unigram("<pad>", "</s>", "<unk>"), extra_ids=4)
        config = hf.T5Config(
            vocab_size=len(tok) + 3, d_model=32, d_kv=16, d_ff=48, num_layers=2, num_heads=2, decoder_start_token_id=0
        )
    torch.manual_seed(0)
    autos = dict(gpt2=hf.AutoModelForCausalLM, t5=hf.AutoModelForSeq2SeqLM)
    auto = autos.get(family, hf.AutoModelForMaskedLM)
    model = auto.from_config(config).eval()
    with torch.no_grad():  # away from where it starts, so that logits differ
        for p in model.parameters():
            p.add_((0.5 if family == "t5" else 0.1) * torch.randn_like(p))
    model.save_pretrained(folder)
    tok.save_pretrained(folder)
    return model, tok

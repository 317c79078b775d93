"""Models of nanoHinDi for the transformers library; export.py puts this file into the folders that it writes.

    model = AutoModel.from_pretrained("exported/diffusion", trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained("exported/diffusion", trust_remote_code=True)
    print(model.write(tokenizer, "एक दिन", max_new_tokens=64, steps=16))

`model.model` is the project's own denoiser, or its causal twin, and `tokenizer.own` its tokenizer, out of the files
beside this one; `model.denoise` is the loop of sampling.py.
Shapes: B rows, T tokens, V real tokens; MASK is id V.
"""

from pathlib import Path
from types import SimpleNamespace

import torch
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizer
from transformers.modeling_outputs import MaskedLMOutput

from diffusion import bound
from eco_hybrid import EcoHybrid
from model import GPT, Transformer
from sampling import denoise, write
from tokenizer import from_bytes

CLASSES = {"transformer": Transformer, "eco_hybrid": EcoHybrid, "autoregressive": GPT}  # kind -> class


class NanoHindiConfig(PreTrainedConfig):
    model_type = "nanohindi"

    def __init__(self, kind="transformer", model_config=None, **kwargs):
        self.kind, self.model_config = kind, model_config or {}
        super().__init__(**kwargs)


class NanoHindi(PreTrainedModel):
    config_class = NanoHindiConfig
    base_model_prefix = "model"  # the names in the file are the inner model's own

    def __init__(self, config):
        super().__init__(config)
        self.model = self.fresh()
        self.post_init()

    def fresh(self):
        return CLASSES[self.config.kind](SimpleNamespace(**self.config.model_config))

    def _init_weights(self, module):
        """Tables that follow from the sizes are in no file, and transformers builds a model without memory first."""
        if module is self.model:
            with torch.device("cpu"):
                fresh = self.fresh()
            for name, table in fresh.named_buffers():
                module.get_buffer(name).copy_(table)

    def get_input_embeddings(self):
        return self.model.embed

    def forward(self, input_ids, attention_mask=None, **kwargs):
        """input_ids (B, T), MASK where a token is wanted; attention_mask (B, T), 0 behind a row's end.

        Logits (B, T, V): of the token at each place, in the causal twin given those before it alone.
        """
        lengths = None if attention_mask is None else attention_mask.sum(1)  # (B,)
        return MaskedLMOutput(logits=self.model(input_ids, lengths=lengths))

    def bound(self, x0, generator=None):
        """Nats per token of x0 (B, T): an estimate of the upper limit of -log p (B,), the causal twin's own -log p."""
        return self.model.nll(x0) if hasattr(self.model, "nll") else bound(self.model, x0, generator)

    def denoise(self, x, **settings):
        """Fill every MASK of x (B, T): yields a sampling.Step after each forward. settings: as of sampling.denoise."""
        return (write if hasattr(self.model, "extend") else denoise)(self.model, x, **settings)

    def write(self, tokenizer, prompt="", max_new_tokens=64, seed=0, **settings):
        """The text of a prompt and what follows it, up to its end."""
        own, given = tokenizer.own, tokenizer.own.encode(prompt)
        x = torch.tensor([given + [self.model.mask_id] * max_new_tokens], device=self.device)  # (1, T)
        settings = dict(temperature=0.7, eos_id=own.eos_id, forbid=own.never) | settings
        *_, last = self.denoise(x, generator=torch.Generator().manual_seed(seed), **settings)
        new = last.x[0, len(given) :].tolist()
        return own.decode(given + new[: (new + [own.eos_id]).index(own.eos_id)])


class NanoHindiTokenizer(PreTrainedTokenizer):
    """`own` splits text and joins it. Special tokens are those of all tokenizers of the project; <mask> is id V."""

    vocab_files_names = {"vocab_file": "tokenizer.model"}
    model_input_names = ["input_ids", "attention_mask"]

    def __init__(self, vocab_file, **kwargs):
        self.own = from_bytes(Path(vocab_file).read_bytes())
        special = dict(zip(("pad", "bos", "eos", "unk"), ("<pad>", "<s>", "</s>", "<unk>"), strict=True))
        ids = {getattr(self.own, f"{name}_id"): token for name, token in special.items()}
        self.names = []  # id -> a name: its text, where no other has it and it is whole characters, else its number
        self.ids = {}
        for i in range(self.own.vocab_size):
            text = self.own.token_bytes(i).decode("utf-8", "replace")
            plain = text and "\ufffd" not in text and text not in self.ids and text not in special.values()
            self.names.append(ids.get(i) or (text if plain else f"<{i}>"))
            self.ids[self.names[-1]] = i
        kwargs = {f"{name}_token": token for name, token in special.items()} | dict(mask_token="<mask>") | kwargs
        super().__init__(**kwargs)  # which gives <mask> the next id, V

    @property
    def vocab_size(self):
        return self.own.vocab_size

    def get_vocab(self):
        return self.ids | self.get_added_vocab()

    def _tokenize(self, text, **kwargs):
        return [self.names[i] for i in self.own.encode(text)]

    def _convert_token_to_id(self, token):
        return self.ids.get(token, self.own.unk_id)

    def _convert_id_to_token(self, index):
        return self.names[index]

    def convert_tokens_to_string(self, tokens):
        shown = set(self.all_special_tokens)  # skip_special_tokens took them out before
        parts = (t.encode() if t in shown else self.own.token_bytes(self._convert_token_to_id(t)) for t in tokens)
        return b"".join(parts).decode("utf-8", "replace")

    def save_vocabulary(self, save_directory, filename_prefix=None):
        path = Path(save_directory, (f"{filename_prefix}-" if filename_prefix else "") + "tokenizer.model")
        path.write_bytes(self.own.to_bytes())
        return (str(path),)

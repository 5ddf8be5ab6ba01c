"""Tiny models of every supported architecture, built from config, and a source of random batches."""

TINY = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}


def configs():
    """Every supported architecture as a tiny config, by name; building one is cheap, its import is not."""
    import transformers as tf

    small = {name: value for name, value in TINY.items() if name not in ("num_key_value_heads",)}
    gpt2 = {"vocab_size": 61, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
    ends = {"bos_token_id": 0, "eos_token_id": 0}
    gemma = {"head_dim": 8, "sliding_window": 4, "query_pre_attn_scalar": 8}
    return {
        "llama": tf.LlamaConfig(**TINY),
        "llama-gqa-4-to-1": tf.LlamaConfig(**{**TINY, "num_key_value_heads": 1}),
        "llama-tied": tf.LlamaConfig(**TINY, tie_word_embeddings=True),
        "mistral-window": tf.MistralConfig(**TINY, sliding_window=4),
        "qwen2": tf.Qwen2Config(**TINY),
        "qwen3": tf.Qwen3Config(**TINY, head_dim=8),
        "gemma2": tf.Gemma2Config(**TINY, **gemma),
        "gemma3": tf.Gemma3TextConfig(**TINY, **gemma),
        "phi3": tf.Phi3Config(**TINY),
        "olmo": tf.OlmoConfig(**TINY),
        "olmo2": tf.Olmo2Config(**TINY),
        "gpt2": tf.GPT2Config(**gpt2, **ends),
        "gpt-neox": tf.GPTNeoXConfig(**small),
        "opt": tf.OPTConfig(**small, ffn_dim=48, word_embed_proj_dim=32),
    }


SUPPORTED = "llama llama-gqa-4-to-1 llama-tied mistral-window qwen2 qwen3".split()
SUPPORTED += "gemma2 gemma3 phi3 olmo olmo2 gpt2 gpt-neox opt".split()


def tiny_model(name="llama", seed=0):
    """A tiny random model of a supported architecture, weights large enough that attention matters."""
    import torch
    import transformers as tf

    torch.manual_seed(seed)
    config = configs()[name]
    model = tf.AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    if getattr(config, "attn_logit_softcapping", None):
        model.set_attn_implementation("eager")  # as fe.load does: transformers 5.17's default drops the softcap
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(6)
    return model


def tiny_loaded(name="llama", seed=0):
    """The same as fe.load would return it, without a tokenizer."""
    from fewedges.model.anatomy import anatomy
    from fewedges.model.loading import Loaded

    model = tiny_model(name, seed)
    return Loaded(name=f"tiny-{name}", model=model, tokenizer=None, anatomy=anatomy(model))


class NoiseBatches:
    """Random tokens as a source of batches: a pure function of (seed, step)."""

    def __init__(self, length=12, vocabulary=61, seed=0):
        self.length, self.vocabulary, self.seed = length, vocabulary, seed

    def at(self, step, size):
        import torch

        from fewedges.data.batch import Batch

        generator = torch.Generator().manual_seed(self.seed * 1000 + step)
        tokens = torch.randint(0, self.vocabulary, (size, self.length), generator=generator)
        counts = torch.ones_like(tokens, dtype=torch.bool)
        counts[:, 0] = False
        return Batch(tokens, counts)

    def describe(self):
        return {"name": "noise", "seed": self.seed}

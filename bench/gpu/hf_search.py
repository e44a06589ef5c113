"""Hugging Face's own beam search, constrained to a catalog: `generate` with a logits processor over the trie.

Ways of being constrained: `TrieProcessor` (tables on the device, no host work per beam), or `prefix_allowed_tokens_fn`
(a Python call per beam and step, what most evaluation code does). Ways of caching, see `Search`.

What is switched off so that `generate` is an exact constrained beam search: sampling, length normalisation
(length_penalty 0), early stopping, and the end-of-sequence token. Beams that no path of the catalog fills come back with
scores of -1e9 or -inf and are reported as absent.
"""
import inspect

import numpy as np
import torch
from transformers import DynamicCache, GenerationConfig, LogitsProcessor, LogitsProcessorList, Qwen3Config, Qwen3ForCausalLM

from expand import children

ABSENT = -1e6


def hugging_face_model(shape, weights):
    """Qwen3ForCausalLM around the given tensors, without a copy."""
    config = Qwen3Config(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        rms_norm_eps=shape.epsilon,
        rope_parameters={"rope_type": "default", "rope_theta": shape.rope_theta},
        max_position_embeddings=40_960,
        tie_word_embeddings=shape.tied,
        attn_implementation="sdpa",
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    embedding = weights["model.embed_tokens.weight"]
    with torch.device("meta"):
        model = Qwen3ForCausalLM(config)
    state = dict(weights)
    if shape.tied:
        state["lm_head.weight"] = embedding
    model.load_state_dict(state, assign=True)
    # Rotary tables are no part of a state and are still on the meta device.
    with embedding.device:
        model.model.rotary_emb = type(model.model.rotary_emb)(config=config)
    return model.eval()


class TrieProcessor(LogitsProcessor):
    """Keeps the log-probabilities of tokens that go on towards a leaf, and sets all others to -inf."""

    def __init__(self, trie, device, prompt):
        self.trie, self.prompt = trie.on(device), prompt
        self.keys = [torch.from_numpy(trie.keys(depth)).to(device) for depth in range(trie.levels)]

    def __call__(self, sequences, scores):
        trie, depth = self.trie, sequences.shape[1] - self.prompt
        node = torch.zeros(len(sequences), dtype=torch.long, device=scores.device)
        real = torch.ones_like(node, dtype=torch.bool)
        for level in range(depth):
            wanted = node * trie.vocabulary + sequences[:, self.prompt + level]
            node = torch.searchsorted(self.keys[level], wanted).clamp_(max=len(self.keys[level]) - 1)
            real &= self.keys[level][node] == wanted
        child, exists = children(trie, depth, node)
        tokens = trie.token[depth][child]
        # Absent children write what the first child writes, to the same place.
        tokens = torch.where(exists, tokens, tokens[:, :1])
        kept = scores.gather(1, tokens).masked_fill_(~real[:, None], float("-inf"))
        return torch.full_like(scores, float("-inf")).scatter_(1, tokens, kept)


def prefix_function(trie, prompt):
    """prefix_allowed_tokens_fn over the trie on the host."""
    keys = [trie.keys(depth) for depth in range(trie.levels)]

    def allowed(_, sequence):
        node = 0
        for level, token in enumerate(sequence[prompt:].tolist()):
            wanted = node * trie.vocabulary + token
            node = int(np.searchsorted(keys[level], wanted))
            if node == len(keys[level]) or keys[level][node] != wanted:
                return [0]  # a beam without a score; it needs some token
        depth = len(sequence) - prompt
        return trie.token[depth][trie.first[depth][node] : trie.first[depth][node + 1]].tolist()

    return allowed


class Search:
    """A size, ready to be searched. `cache` is one of

    dynamic    what `generate` does on its own: the context is computed once per beam;
    prefilled  the context but its last token is computed once per user, its cache repeated for every beam, and handed to
               `generate`, as its documentation shows for reused prompts; the last token is computed once per beam;
    static     as dynamic, in buffers of fixed size. `generate` compiles only without beams, so this gains nothing.
    """

    def __init__(self, model, trie, users, beams, context, cache="prefilled", processor="device"):
        self.model, self.trie, self.beams, self.cache = model, trie, beams, cache
        self.device = model.device
        signature = inspect.signature(model.forward).parameters
        self.cache_name = "cache" if "cache" in signature else "past_key_values"  # renamed in transformers 5
        self.constraint = {"logits_processor": LogitsProcessorList([TrieProcessor(trie, self.device, context)])}
        if processor == "prefix_fn":
            self.constraint = {"prefix_allowed_tokens_fn": prefix_function(trie, context)}
        model.generation_config = GenerationConfig(pad_token_id=0)
        self.generation = GenerationConfig(
            num_beams=beams, num_return_sequences=beams, do_sample=False, length_penalty=0.0, early_stopping=False,
            max_new_tokens=trie.levels, pad_token_id=0, return_dict_in_generate=True, output_scores=beams > 1,
            output_logits=beams == 1,  # greedy search returns no sums of log-probabilities
            **({"cache_implementation": "static"} if cache == "static" else {}),
        )

    def _search(self, tokens, begin_forward):
        """Sequences and scores on the device. `begin_forward` is called before every pass of the model."""
        hook = self.model.register_forward_pre_hook(lambda *_: begin_forward())
        try:
            ids, given = tokens.to(self.device, non_blocking=True), {}
            if self.cache == "prefilled":
                cache = DynamicCache(config=self.model.config)
                self.model(input_ids=ids[:, :-1], use_cache=True, logits_to_keep=1, **{self.cache_name: cache})
                cache.batch_repeat_interleave(self.beams)
                given = {self.cache_name: cache}
            return self.model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=self.generation,
                                       **given, **self.constraint)
        finally:
            hook.remove()

    def run(self, tokens, marks):
        """As `shared_prefix.Session.run`. Phases end where the next pass of the model begins."""
        marks.mark()
        passes = []
        first_step = 2 if self.cache == "prefilled" else 1

        def begin_forward():
            if first_step <= len(passes) < first_step + self.trie.levels - 1:
                marks.mark()
            passes.append(None)

        found = self._search(tokens, begin_forward)
        paths = found.sequences[:, tokens.shape[1] :]
        scores = found.sequences_scores if self.beams > 1 else self._greedy_scores(found.logits, paths)
        marks.mark()
        assert len(passes) >= first_step + self.trie.levels - 1, "a phase is not what it is called"
        return self._leaves(paths.cpu(), scores.cpu(), len(tokens))

    def _greedy_scores(self, logits, paths):
        steps = [torch.log_softmax(step.float(), -1).gather(1, path[:, None]) for step, path in zip(logits, paths.T)]
        return torch.cat(steps, 1).sum(1)

    def _leaves(self, paths, scores, users):
        absent = scores < ABSENT
        leaves = torch.from_numpy(self.trie.leaves_of(paths.numpy()))
        return leaves.masked_fill(absent, 0).view(users, -1), scores.masked_fill(absent, float("-inf")).view(users, -1)

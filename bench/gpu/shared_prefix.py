"""A decoder with one copy of each user's context for all beams, in PyTorch, as one would write it by hand.

Flow of a request: `prefill` computes the context once and chooses the first beams; each `step` computes one row per beam
and chooses the next. Keys and values of the context lie in static buffers, those of the beams in one slot per step, user
and beam; beams are reordered by their parents' numbers, and no key or value moves. On CUDA the steps are captured as
graphs, the prefill too while it is small (large ones do not gain).

In the last layer only the last context row goes past keys and values: nothing else is asked for.
All contexts of a batch have one length, so there is no padding.
"""
import math

import torch
import torch.nn.functional as F

import attention
from expand import expand
from fused import Pieces


class Layer:
    """One layer's weights, with those that meet the same input in one matrix."""

    def __init__(self, weights, prefix):
        take = lambda name: weights.pop(prefix + name)  # noqa: E731 - freed as soon as they are joined
        self.input_norm = take("input_layernorm.weight")
        self.qkv = torch.cat([take(f"self_attn.{part}_proj.weight") for part in "qkv"])
        self.query_norm, self.key_norm = take("self_attn.q_norm.weight"), take("self_attn.k_norm.weight")
        self.output = take("self_attn.o_proj.weight")
        self.ffn_norm = take("post_attention_layernorm.weight")
        self.gate_up = torch.cat([take("mlp.gate_proj.weight"), take("mlp.up_proj.weight")])
        self.down = take("mlp.down_proj.weight")


class Decoder:
    """The weights on the device, and what surrounds the attention in a layer. `weights` is emptied."""

    def __init__(self, shape, weights, longest, compiled=False):
        self.shape, self.pieces = shape, Pieces(compiled)
        self.embedding = weights.pop("model.embed_tokens.weight")
        self.head = self.embedding if shape.tied else weights.pop("lm_head.weight")
        self.final_norm = weights.pop("model.norm.weight")
        self.layers = [Layer(weights, f"model.layers.{index}.") for index in range(shape.layers)]
        self.device, self.dtype = self.embedding.device, self.embedding.dtype
        half = torch.arange(0, shape.head_dim, 2, device=self.device, dtype=torch.float32)
        angle = torch.arange(longest, device=self.device)[:, None] * shape.rope_theta ** -(half / shape.head_dim)
        self.cosine, self.sine = angle.cos()[:, None], angle.sin()[:, None]  # [positions, 1, head_dim / 2]

    def heads(self, layer, normed, begin, rows):
        """Query, key, value of normed rows at positions `begin` and, for contexts, on."""
        shape, window = self.shape, slice(begin, begin + rows)
        return self.pieces.heads_of(F.linear(normed, layer.qkv), layer.query_norm, layer.key_norm, self.cosine[window],
                                    self.sine[window], shape.heads, shape.kv_heads, shape.epsilon)

    def finish(self, layer, residual, attended, next_norm):
        """The rest of a layer after attention; (residual, its norm for what comes next)."""
        residual, normed = self.pieces.add_norm(residual, F.linear(attended, layer.output), layer.ffn_norm, self.shape.epsilon)
        update = F.linear(self.pieces.swiglu(F.linear(normed, layer.gate_up)), layer.down)
        return self.pieces.add_norm(residual, update, next_norm, self.shape.epsilon)

    def next_norms(self):
        return [layer.input_norm for layer in self.layers[1:]] + [self.final_norm]


class Session:
    """Buffers, chosen kernels and graphs for one size: users, beams per user, context length."""

    def __init__(self, decoder, trie, users, beams, context, graphs=None, prefill_tokens=32_768, graph_prefill_tokens=16_384,
                 logit_rows=4_096, choice_bytes=2 << 30):
        self.decoder, self.trie = decoder, trie
        self.users, self.beams, self.context = users, beams, context
        self.logit_rows = logit_rows
        self.users_at_once = max(1, min(users, prefill_tokens // context))
        shape, device, dtype = decoder.shape, decoder.device, decoder.dtype
        empty = lambda *size: torch.zeros(size, device=device, dtype=dtype)  # noqa: E731
        self.tokens = torch.zeros(users, context, device=device, dtype=torch.long)
        self.context_keys = [empty(users, context, shape.kv_heads, shape.head_dim) for _ in range(shape.layers)]
        self.context_values = [empty(users, context, shape.kv_heads, shape.head_dim) for _ in range(shape.layers)]
        slots = (trie.levels - 1) * users * beams
        self.branch_keys = [empty(slots, shape.kv_heads, shape.head_dim) for _ in range(shape.layers)]
        self.branch_values = [empty(slots, shape.kv_heads, shape.head_dim) for _ in range(shape.layers)]
        self.hidden = empty(users, 1, shape.hidden)
        self.root = (torch.zeros(users, 1, device=device), torch.zeros(users, 1, device=device, dtype=torch.long))
        self.row = torch.arange(users * beams, device=device).view(users, beams)
        self._choose(choice_bytes)
        self.graphs = self.states = None
        if device.type == "cuda" if graphs is None else graphs:
            self._capture(users * context <= graph_prefill_tokens)

    def _choose(self, choice_bytes):
        shape, some = self.decoder.shape, slice(0, self.users_at_once)
        key, value = (torch.randn_like(t[0]).transpose(1, 2) for t in (self.context_keys, self.context_values))
        query = torch.randn(self.users_at_once, self.context, shape.heads, shape.head_dim, device=key.device, dtype=key.dtype)
        self.causal_name, self.causal = attention.choose_causal(query.transpose(1, 2), key[some], value[some])
        del query
        query = torch.randn(
            self.users, shape.kv_heads, self.beams * shape.group, shape.head_dim, device=key.device, dtype=key.dtype
        )
        self.shared_name, self.shared = attention.choose(query, key, value, choice_bytes)

    # Prefill ----------------------------------------------------------------------------------------------------------

    def _context_rows(self, users):
        """The context of some users: fills their keys, values and last hidden state."""
        decoder, shape = self.decoder, self.decoder.shape
        residual = F.embedding(self.tokens[users], decoder.embedding)
        normed = decoder.pieces.rms_norm(residual, decoder.layers[0].input_norm, shape.epsilon)
        for index, (layer, next_norm) in enumerate(zip(decoder.layers, decoder.next_norms())):
            query, key, value = decoder.heads(layer, normed, 0, self.context)
            self.context_keys[index][users].copy_(key)
            self.context_values[index][users].copy_(value)
            if index + 1 < shape.layers:
                attended = self.causal(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)).transpose(1, 2)
            else:
                # The last row sees everything, so it is a branch row without ancestors.
                residual = residual[:, -1:]
                last = query[:, -1].unflatten(1, (shape.kv_heads, shape.group))
                attended = attention.products(last, key.transpose(1, 2), value.transpose(1, 2))[0].flatten(1, 2)[:, None]
            residual, normed = decoder.finish(layer, residual, attended.flatten(2), next_norm)
        self.hidden[users] = normed

    def prefill(self):
        """Contexts from `tokens`; the state after the first level."""
        for begin in range(0, self.users, self.users_at_once):
            self._context_rows(slice(begin, begin + self.users_at_once))
        score, _, node, token = self._expand(0, self.hidden, *self.root)
        return score, node, token, None

    # Steps ------------------------------------------------------------------------------------------------------------

    def _expand(self, depth, hidden, score, node):
        decoder = self.decoder
        return expand(
            self.trie, depth, hidden, decoder.head, score, node, self.beams, self.logit_rows, decoder.pieces.scored_tokens
        )

    def step(self, depth, state):
        """One row per beam, and the level `depth` of the trie. State: score, node, token [users, beams], and the rows of
        all ancestors [users, beams, depth - 1] (None at depth 1)."""
        score, node, token, ancestors = state
        decoder, shape = self.decoder, self.decoder.shape
        users, beams, group = self.users, self.beams, shape.group
        own = self.row[..., None] + (depth - 1) * users * beams
        rows = own if ancestors is None else torch.cat((ancestors, own), -1)
        slots = slice((depth - 1) * users * beams, depth * users * beams)
        residual = F.embedding(token, decoder.embedding)
        normed = decoder.pieces.rms_norm(residual, decoder.layers[0].input_norm, shape.epsilon)
        for index, (layer, next_norm) in enumerate(zip(decoder.layers, decoder.next_norms())):
            query, key, value = decoder.heads(layer, normed, self.context + depth - 1, 1)
            self.branch_keys[index][slots].copy_(key.flatten(0, 1))
            self.branch_values[index][slots].copy_(value.flatten(0, 1))
            query = query.unflatten(2, (shape.kv_heads, group))
            flat = query.transpose(1, 2).reshape(users, shape.kv_heads, beams * group, shape.head_dim)
            out, total = self.shared(flat, self.context_keys[index].transpose(1, 2), self.context_values[index].transpose(1, 2))
            attended = decoder.pieces.merge(out, total, query, self.branch_keys[index], self.branch_values[index], rows,
                                            1 / math.sqrt(shape.head_dim))
            residual, normed = decoder.finish(layer, residual, attended, next_norm)
        score, parent, node, token = self._expand(depth, normed, score, node)
        ancestors = rows.gather(1, parent[..., None].expand(-1, -1, rows.shape[2]))
        return score, node, token, ancestors

    # Requests ---------------------------------------------------------------------------------------------------------

    def _phase(self, depth, state):
        return self.prefill() if depth == 0 else self.step(depth, state)

    def _capture(self, with_prefill):
        """Graphs of all phases, each reading what the one before it wrote. One pool: they always run in this order."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                state = None
                for depth in range(self.trie.levels):
                    state = self._phase(depth, state)
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        # What a prefill without a graph computes is copied to where the first step's graph reads it.
        self.graphs, self.states, state = [], [], None
        pool = torch.cuda.graph_pool_handle()
        for depth in range(self.trie.levels):
            if depth == 0 and not with_prefill:
                self.graphs.append(None)
                state = tuple(t if t is None else t.clone() for t in self.prefill())
            else:
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, pool=pool):
                    state = self._phase(depth, state)
                self.graphs.append(graph)
            self.states.append(state)

    def _replay(self, depth):
        if self.graphs[depth] is not None:
            self.graphs[depth].replay()
        else:
            for kept, new in zip(self.states[0], self.prefill()):
                if kept is not None:
                    kept.copy_(new)
        return self.states[depth]

    def run(self, tokens, marks):
        """tokens [users, context] on the host -> leaves and scores [users, beams] on the host, best first.

        Scores are -inf where the catalog has fewer leaves than there are beams. Marks: begin, then the end of every phase.
        """
        marks.mark()
        self.tokens.copy_(tokens, non_blocking=True)
        state = None
        for depth in range(self.trie.levels):
            state = self._phase(depth, state) if self.graphs is None else self._replay(depth)
            marks.mark()
        return state[1].cpu(), state[0].cpu()
